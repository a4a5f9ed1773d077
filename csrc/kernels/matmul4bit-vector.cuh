/*
 * The 4-bit product of few rows of activations: bound by the weight's bytes, if decoding does not get in the way.
 *
 * Tensor cores multiply codes that are not scaled yet. A byte, two codes, looks up a word of two values of T in shared memory,
 * each lane in a bank of its own; the values are those of the codes times a common factor for which T holds them best
 * (constants.cuh). A block's scale is applied to its sum, in float32. So a weight costs half a look-up and no arithmetic.
 *
 * A fragment of 16 rows of the weight has k permuted: a lane's 32 codes of a row lie side by side, and so do its 32
 * activations. The four lanes of a row then belong to different blocks, SPLIT of them. So SPLIT of the eight columns of the
 * other operand are one row of activations, each with zeros for the lanes of the other blocks: every block's sum has a
 * column of its own.
 *
 * Sixteen warps of a block share its rows, four where k is short; each has every so manieth chunk of k, and their sums are added in the
 * order of the warps.
 */
#pragma once
#include "matmul4bit.cuh"

#if HAS_SM80

constexpr u32 VECTOR_WARPS = MATMUL4BIT_VECTOR_THREADS / WARP;
/* Codes of a row that the four lanes of a fragment take together. */
constexpr u32 CHUNK = 128;
/*
 * Shared memory: 256 entries of 256 bytes. Half of an entry is the look-up table's word for each lane. The other halves, taken
 * together, are room for scales, and then for the warps' sums. All of it has fixed addresses, so that a look-up needs no base:
 * the driver keeps up to the first 1,024 bytes for itself.
 */
constexpr u32 ENTRY = 256;
constexpr u32 ROOM = ENTRY / 2;
constexpr u32 ROOM_BYTES = 256 * ROOM;
constexpr u32 TABLE_AT = SHARED_BASE;
constexpr u32 ROOM_AT = TABLE_AT + ROOM;

template <u32 AT>
DEVICE u32 loadShared(u32 at) {
  u32 v;
  asm volatile("ld.shared.u32 %0, [%1 + %2];" : "=r"(v) : "r"(at), "n"(AT));
  return v;
}

template <u32 AT>
DEVICE float2 loadShared2(u32 at) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2 + %3];" : "=f"(v.x), "=f"(v.y) : "r"(at), "n"(AT));
  return v;
}

template <u32 AT>
DEVICE void storeShared(u32 at, float v) {
  asm volatile("st.shared.f32 [%0 + %1], %2;" ::"r"(at), "n"(AT), "f"(v) : "memory");
}

/* 16 bytes that others will read too. */
DEVICE uint4 loadCached16(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

/* Where byte `at` of the room is, from ROOM_AT on. */
DEVICE u32 inRoom(u32 at) { return at / ROOM * ENTRY + at % ROOM; }

template <typename T>
DEVICE void fillLookUp(u32 quantType) {
  for (u32 i = threadIdx.x; i < 256 * 8; i += MATMUL4BIT_VECTOR_THREADS) {
    const u32 high = i / 128, low = i / 8 % 16;
    float a, b;
    if constexpr (Same<T, BF16>::VALUE) {
      a = quantType == QUANT_NF4 ? NF4_BF16_CODES[high] : FP4_BF16_CODES[high];
      b = quantType == QUANT_NF4 ? NF4_BF16_CODES[low] : FP4_BF16_CODES[low];
    } else {
      a = quantType == QUANT_NF4 ? NF4_F16_CODES[high] : FP4_F16_CODES[high];
      b = quantType == QUANT_NF4 ? NF4_F16_CODES[low] : FP4_F16_CODES[low];
    }
    const u32 word = encodePair<T>(a, b);
    asm volatile("st.shared.v4.u32 [%0 + %1], {%2, %2, %2, %2};" ::"r"(i / 8 * ENTRY + i % 8 * 16), "n"(TABLE_AT), "r"(word) : "memory");
  }
}

template <typename T>
DEVICE float lookUpFactor(u32 quantType) {
  if constexpr (Same<T, BF16>::VALUE) return quantType == QUANT_NF4 ? NF4_BF16_FACTOR : FP4_BF16_FACTOR;
  return quantType == QUANT_NF4 ? NF4_F16_FACTOR : FP4_F16_FACTOR;
}

/*
 * K_WARPS: of a block of threads, that share 16 rows of the weight and have a part of k each; the other warps have other rows. TILES:
 * of eight columns of activations. SPLIT: the blocks that a chunk may touch, 2 or 4.
 */
template <typename T, u32 SPLIT, u32 TILES, u32 K_WARPS>
struct VectorProduct {
  static constexpr u32 ROWS = 16 * VECTOR_WARPS / K_WARPS;
  /* Rows of activations in a tile, and in all. */
  static constexpr u32 TILE_ROWS = 8 / SPLIT;
  static constexpr u32 MOST_ROWS = TILE_ROWS * TILES;
  /*
   * Pairs of scales that a row has room for: two less than a multiple of 16, so that eight rows are in different banks and the next eight
   * at a fixed distance from them.
   */
  static constexpr u32 PAIRS = ROOM_BYTES / 8 / ROWS - 2;
  static constexpr u32 NEXT_ROWS = 8 * PAIRS * 8 / ROOM * ENTRY;
  static_assert(PAIRS % 16 == 14 && 8 * PAIRS * 8 % ROOM == 0, "rows of scales");
  /* Chunks whose scales are kept at a time: as many for every warp. */
  static constexpr u32 KEPT = PAIRS / (SPLIT / 2) / K_WARPS * K_WARPS;
  /* What the warps' next chunk is ahead by. */
  static constexpr u32 NEXT = K_WARPS * CHUNK;

  // Sizes are read where they are used: registers are scarce, and operands cost none.
  const Matmul4bit& op;
  const u32 lane = laneId(), g = lane / 4, t = lane % 4;
  const u32 warp = warpId() % K_WARPS, fragment = warpId() / K_WARPS * 16;

  DEVICE VectorProduct(const Matmul4bit& o) : op(o) {}

  DEVICE u32 N() { return (u32)op.n; }
  DEVICE u32 K() { return (u32)op.k; }
  DEVICE u32 M() { return (u32)op.m; }

  /* Keeps the scales of `count` chunks from `first` on, for the rows from `begin` on. */
  template <typename At>
  DEVICE void keepScales(u32 begin, u32 first, u32 count, At at) {
    const u32 shift = 31 - __clz(op.blocksize);
#pragma unroll
    for (u32 f = 0; f < ROWS / 16; f++) {
      static_assert(VECTOR_WARPS == 16, "a warp has every sixteenth row");
      const u32 row = f * 16 + warpId();
      const u64 from = (u64)(begin + row) * K() + first * CHUNK;
      const u32 rest = K() - first * CHUNK;
      u32 i = lane;
      // Also behind the last column, where a sum of zeros must not meet what is left there.
#pragma unroll 4
      for (u32 k = lane * (CHUNK / SPLIT); k < count * CHUNK; k += WARP * (CHUNK / SPLIT), i += WARP)
        storeShared<ROOM_AT>(inRoom((row * PAIRS * 2 + i) * 4), k < rest ? at((from + k) >> shift) : 0.0f);
    }
  }

  /* A lane's codes of a chunk: of rows g and g + 8, which begin 4 * K bytes apart. */
  struct Codes {
    uint4 upper, lower;
  };

  DEVICE void loadCodes(Codes& codes, const u8* from) {
    codes.upper = loadStream16(from);
    codes.lower = loadStream16(from + (u64)K() * 4);
  }

  DEVICE const u8* codesAt(u32 begin, u32 k) { return (const u8*)op.packed + ((u64)(begin + fragment + g) * K() + k) / 2; }

  /* The codes of this warp's first chunk; where it has none, any. */
  DEVICE void loadFirst(Codes& codes, u32 begin) {
    const u32 k = warp * CHUNK + t * 32;
    loadCodes(codes, k < K() ? codesAt(begin, k) : (const u8*)op.packed);
  }

  /* `codes` are those of the rows' first chunk, and then of the first chunk of the rows from `next` on. */
  DEVICE void rows(u32 begin, u32 next, Codes& codes) {
    float y[TILES][2];
#pragma unroll
    for (u32 i = 0; i < TILES; i++) y[i][0] = y[i][1] = 0;
    u32 k = warp * CHUNK + t * 32;
    const u8* from = codesAt(begin, k);
    const uint4* xFrom = (const uint4*)((const u16*)op.a + (u64)(g / SPLIT) * K() + k);
    bool mine[TILES];
#pragma unroll
    for (u32 i = 0; i < TILES; i++) mine[i] = i * TILE_ROWS + g / SPLIT < M() && g % SPLIT == t / (4 / SPLIT);
    const u32 chunks = (K() + CHUNK - 1) / CHUNK;
#pragma unroll 1
    for (u32 first = 0; first < chunks; first += KEPT) {
      const u32 end = first + KEPT < chunks ? first + KEPT : chunks;
      if (first != 0) __syncthreads();
      // Two loops: a choice inside one would make its loads wait for each other.
      const Scales scales(op);
      if (scales.code) keepScales(begin, first, end - first, [&](u64 block) { return scales.nested(block); });
      else keepScales(begin, first, end - first, [&](u64 block) { return scales.plain(block); });
      __syncthreads();
      u32 pair = (fragment + g) * PAIRS + (SPLIT == 2 ? warp : warp * 2 + t % 2);
#pragma unroll 1
      for (u32 chunk = first + warp; chunk < end; chunk += K_WARPS) {
        bool there[TILES];
#pragma unroll
        for (u32 i = 0; i < TILES; i++) there[i] = mine[i] && k < K();
        const uint4* const xNow = xFrom;
        xFrom += NEXT * 2 / 16;
        // The next chunk's codes are on their way while this one's are multiplied. Behind the last column activations are 0.
        k += NEXT;
        from += NEXT / 2;
        const Codes now = codes;
        loadCodes(codes, k < K() ? from : (const u8*)op.packed);
        float d[TILES][4];
        sums(now, xNow, there, d);
        const u32 at = inRoom(pair * 8);
        const float2 upper = loadShared2<ROOM_AT>(at), lower = loadShared2<ROOM_AT + NEXT_ROWS>(at);
#pragma unroll
        for (u32 i = 0; i < TILES; i++) {
          y[i][0] = __fmaf_rn(upper.y, d[i][1], __fmaf_rn(upper.x, d[i][0], y[i][0]));
          y[i][1] = __fmaf_rn(lower.y, d[i][3], __fmaf_rn(lower.x, d[i][2], y[i][1]));
        }
        pair += K_WARPS * (SPLIT / 2);
      }
    }
    loadFirst(codes, next);
    __syncthreads();
    store(begin, y);
    __syncthreads();
  }

  /* The sums of a chunk's blocks, of codes not scaled: of row g in d[0] and d[1], of row g + 8 in d[2] and d[3]. */
  DEVICE void sums(const Codes& codes, const uint4* xFrom, const bool (&there)[TILES], float (&d)[TILES][4]) {
    const u32 place = lane * 4;
#pragma unroll
    for (u32 i = 0; i < TILES; i++) d[i][0] = d[i][1] = d[i][2] = d[i][3] = 0;
#pragma unroll
    for (u32 half = 0; half < TILES; half++) {
      // With two tiles, the activations of half a chunk at a time: all of them would take too many registers.
      constexpr u32 PART = 4 / TILES;
      uint4 x[TILES][PART];
#pragma unroll
      for (u32 i = 0; i < TILES; i++)
#pragma unroll
        for (u32 j = 0; j < PART; j++)
          x[i][j] = there[i] ? loadCached16(xFrom + (u64)(i * TILE_ROWS) * K() / 8 + half * PART + j) : make_uint4(0, 0, 0, 0);
#pragma unroll
      for (u32 j = half * PART * 2; j < (half + 1) * PART * 2; j++) {
        // A byte of codes times 256, plus the lane's place: the look-up's address, in one instruction.
        const u32 first = j % 2 ? 0x7724 : 0x7704, second = j % 2 ? 0x7734 : 0x7714;
        const u32 upper = wordOf(codes.upper, j / 2), lower = wordOf(codes.lower, j / 2);
        u32 a[4];
        a[0] = loadShared<TABLE_AT>(__byte_perm(upper, place, first));
        a[1] = loadShared<TABLE_AT>(__byte_perm(lower, place, first));
        a[2] = loadShared<TABLE_AT>(__byte_perm(upper, place, second));
        a[3] = loadShared<TABLE_AT>(__byte_perm(lower, place, second));
#pragma unroll
        for (u32 i = 0; i < TILES; i++) {
          const uint4 v = x[i][j / 2 - half * PART];
          mma16<T>(d[i], a, j % 2 ? v.z : v.x, j % 2 ? v.w : v.y);
        }
      }
    }
  }

  /* A warp's sums lie in the room by row of activations, then by row of its fragment. */
  static constexpr u32 OWN_SUMS = MOST_ROWS * 16;

  DEVICE void store(u32 begin, const float (&y)[TILES][2]) {
#pragma unroll
    for (u32 i = 0; i < TILES; i++)
#pragma unroll
      for (u32 h = 0; h < 2; h++) {
        float sum = y[i][h];
        // The blocks of one row of activations lie in two lanes.
        if constexpr (SPLIT == 4) sum += __shfl_xor_sync(ALL_LANES, sum, 1);
        const u32 m = i * TILE_ROWS + t / (4 / TILE_ROWS);
        if (SPLIT == 2 || t % 2 == 0)
          storeShared<ROOM_AT>(inRoom((warpId() * OWN_SUMS + m * 16 + h * 8 + g) * 4), sum);
      }
    __syncthreads();
    for (u32 i = threadIdx.x; i < ROWS * MOST_ROWS; i += MATMUL4BIT_VECTOR_THREADS) {
      const u32 row = i % ROWS, m = i / ROWS;
      const u32 n = begin + row;
      if (m < M()) {
        const u32 own = row / 16 * K_WARPS * OWN_SUMS + m * 16 + row % 16;
        float sum = 0;
#pragma unroll
        for (u32 w = 0; w < K_WARPS; w++) sum += floatOf(loadShared<ROOM_AT>(inRoom((own + w * OWN_SUMS) * 4)));
        ::store<T>(op.y, (u64)m * N() + n, __fmaf_rn(sum, lookUpFactor<T>(op.quantType), biasAt<T>(op.bias, n)));
      }
    }
  }

  /* The first row of a group: the last group is as long as the others and may share rows, with the same results. */
  DEVICE u32 beginOf(u32 group) { return group < N() / ROWS ? group * ROWS : N() - ROWS; }

  /* N is not below ROWS. */
  DEVICE void run() {
    const u32 groups = (N() + ROWS - 1) / ROWS;
    Codes codes;
    loadFirst(codes, beginOf(blockIdx.x));
    fillLookUp<T>(op.quantType);
#pragma unroll 1
    for (u32 group = blockIdx.x; group < groups; group += gridDim.x)
      rows(beginOf(group), beginOf(group + gridDim.x), codes);
  }
};

#endif
