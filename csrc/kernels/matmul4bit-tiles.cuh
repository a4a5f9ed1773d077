/*
 * The 4-bit product of more rows of activations than a vector product takes well: tensor cores on weights that are decoded on
 * their way into registers, code * scale rounded to T as decoding to memory would.
 *
 * A warp has 32 rows of the weight and a share of k; the warps of a group have different rows and the same k, and share the
 * activations, which stream through shared memory. As in vector.cuh a lane's 32 codes of a row lie side by side, and k is
 * permuted likewise for the activations. The groups' sums are added in their order.
 */
#pragma once
#include "matmul4bit.cuh"

#if HAS_SM80

constexpr u32 TILE_CHUNK = MATMUL4BIT_TILE_CHUNK;
/* The look-up table: for a byte the values of its two codes, once for each lane. */
constexpr u32 TILE_ENTRY = 256;
constexpr u32 TILE_TABLE_BYTES = 256 * TILE_ENTRY;
/* Bytes of a row of activations in a chunk. */
constexpr u32 X_ROW = TILE_CHUNK * 2;
constexpr u32 TILE_AT = SHARED_BASE;

DEVICE float2 loadPair(u32 at) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2 + %3];" : "=f"(v.x), "=f"(v.y) : "r"(at), "n"(TILE_AT));
  return v;
}

/*
 * TILES: of eight rows of activations. FRAGMENTS: of 16 rows of the weight, which a warp takes. ROWS: of the weight, which a block takes.
 * GROUPS: of warps that have their own part of k. AHEAD: codes are loaded a chunk ahead, where registers allow it; elsewhere they are
 * fetched into the second cache.
 */
template <typename T, u32 TILES, u32 FRAGMENTS, u32 ROWS, u32 GROUPS, bool AHEAD>
struct TileProduct {
  static constexpr u32 WARP_ROWS = 16 * FRAGMENTS;
  static constexpr u32 ROW_WARPS = ROWS / WARP_ROWS;
  static constexpr u32 THREADS = ROW_WARPS * GROUPS * WARP;
  static constexpr u32 STAGES = MATMUL4BIT_TILE_STAGES;
  static constexpr u32 GROUP_THREADS = ROW_WARPS * WARP;
  static constexpr u32 MOST_ROWS = 8 * TILES;
  static constexpr u32 STAGE_BYTES = MOST_ROWS * X_ROW;
  static constexpr u32 COPIES = MOST_ROWS * 16 / GROUP_THREADS;
  static_assert(COPIES >= 1, "every thread copies activations");

  const Matmul4bit& op;
  u8* const shared;
  // Sizes are read where they are used: registers are scarce, and operands cost none.
  const u32 lane = laneId(), g = lane / 4, t = lane % 4, warp = warpId();
  const u32 group = warp / ROW_WARPS, member = threadIdx.x % GROUP_THREADS;

  DEVICE TileProduct(const Matmul4bit& o, u8* s) : op(o), shared(s) {}

  DEVICE u32 N() { return (u32)op.n; }
  DEVICE u32 K() { return (u32)op.k; }
  DEVICE u32 M() { return (u32)op.m; }

  DEVICE void fillValues() {
    for (u32 i = threadIdx.x; i < 256 * 16; i += THREADS) {
      const float a = valueOf(op.quantType, i / 256), b = valueOf(op.quantType, i / 16 % 16);
      *(float4*)(shared + i / 16 * TILE_ENTRY + i % 16 * 16) = make_float4(a, b, a, b);
    }
  }

  /* The first chunk's activations that this thread copies: COPIES times 16 bytes, of rows GROUP_THREADS / 16 apart. */
  const u32 xRow = member / 16, xColumn = member % 16 * 8;
  const u16* const xFrom = (const u16*)op.a + (u64)xRow * K() + xColumn;
  // Lanes with the same quarter of a chunk find theirs side by side, odd rows shifted by half of the banks.
  const u32 xTo = sharedAddress(shared + TILE_TABLE_BYTES + group * STAGES * STAGE_BYTES) + xRow * X_ROW +
                  ((member % 16 / 4 + member % 4 * 4) ^ (xRow % 2 * 4)) * 16;

  DEVICE void copyX(u32 chunk, u32 stage, u32 end) {
    if (chunk < end) {
      const bool inside = chunk * TILE_CHUNK + xColumn < K();
      const u16* from = xFrom + chunk * TILE_CHUNK;
#pragma unroll
      for (u32 i = 0; i < COPIES; i++) {
        constexpr u32 STEP = GROUP_THREADS / 16;
        const bool there = inside && xRow + i * STEP < M();
        copyAsync16(xTo + stage * STAGE_BYTES + i * STEP * X_ROW, there ? from + (u64)(i * STEP) * K() : (const u16*)op.a, there ? 16 : 0);
      }
    }
    commitCopies();
  }

  struct Codes {
    uint4 words[2 * FRAGMENTS];
    float scale[2 * FRAGMENTS];
  };

  DEVICE void load(Codes& c, u32 begin, u32 chunk) {
    const u32 k = chunk * TILE_CHUNK + t * 32;
    // What lies behind the last column is multiplied with zeros, what lies behind the last row is not stored.
    const u32 column = k < K() ? k : 0;
    const u32 shift = 31 - __clz(op.blocksize);
#pragma unroll
    for (u32 i = 0; i < 2 * FRAGMENTS; i++) {
      const u32 n = begin + g + 8 * i;
      const u64 at = (u64)(n < N() ? n : N() - 1) * K() + column;
      c.words[i] = loadStream16((const u8*)op.packed + at / 2);
      c.scale[i] = k < K() ? __ldg((const float*)op.absmax + (at >> shift)) : 0.0f;
    }
  }

  /* Fetches a chunk's codes into the second cache. */
  DEVICE void fetch(u32 begin, u32 chunk) {
    const u32 k = chunk * TILE_CHUNK + t * 32;
    if (k >= K()) return;
    const u8* from = (const u8*)op.packed + ((u64)(begin + g) * K() + k) / 2;
#pragma unroll
    for (u32 i = 0; i < 2 * FRAGMENTS; i++)
      if (begin + 8 * i + g < N()) asm volatile("prefetch.global.L2 [%0];" ::"l"(from + (u64)(4 * i) * K()));
  }

  DEVICE void multiply(const Codes& c, u32 stage, float (&d)[FRAGMENTS][TILES][4]) {
    const u8* x = shared + TILE_TABLE_BYTES + (group * STAGES + stage) * STAGE_BYTES + g * X_ROW + t * 16;
    const u32 odd = g % 2 * 64, place = lane * 8;
#pragma unroll
    for (u32 j = 0; j < 8; j++) {
      u32 a[FRAGMENTS][4];
#pragma unroll
      for (u32 f = 0; f < FRAGMENTS; f++)
#pragma unroll
        for (u32 w = 0; w < 4; w++) {
          const u32 byte = j % 2 * 2 + w / 2;
          const float scale = c.scale[2 * f + w % 2];
          const float2 v = loadPair(__byte_perm(wordOf(c.words[2 * f + w % 2], j / 2), place, 0x7704 + byte * 16));
          a[f][w] = encodePair<T>(v.x * scale, v.y * scale);
        }
#pragma unroll
      for (u32 i = 0; i < TILES; i++) {
        const uint2 v = *(const uint2*)(x + i * 8 * X_ROW + (j / 2 * 64 ^ odd) + j % 2 * 8);
#pragma unroll
        for (u32 f = 0; f < FRAGMENTS; f++) mma16<T>(d[f][i], a[f], v.x, v.y);
      }
    }
  }

  DEVICE void run() {
    const u32 chunks = (K() + TILE_CHUNK - 1) / TILE_CHUNK;
    const u32 tiles = (N() + ROWS - 1) / ROWS;
    const u32 splits = op.splits;
    const u32 tile = blockIdx.x % tiles, split = blockIdx.x / tiles;
    // Every group takes as many chunks, so that all meet as often; behind the last column there are only zeros.
    const u32 perGroup = (chunks + splits * GROUPS - 1) / (splits * GROUPS);
    const u32 first = (split * GROUPS + group) * perGroup;
    const u32 end = first + perGroup;
    const u32 begin = tile * ROWS + warp % ROW_WARPS * WARP_ROWS;

    float d[FRAGMENTS][TILES][4];
#pragma unroll
    for (u32 f = 0; f < FRAGMENTS; f++)
#pragma unroll
      for (u32 i = 0; i < TILES; i++) d[f][i][0] = d[f][i][1] = d[f][i][2] = d[f][i][3] = 0;
    Codes codes;
    if constexpr (AHEAD) load(codes, begin, first);
#pragma unroll
    for (u32 s = 0; s < STAGES - 1; s++) copyX(first + s, s, end);
    fillValues();
    __syncthreads();
    u32 stage = 0;
#pragma unroll 1
    for (u32 chunk = first; chunk < end; chunk++) {
      Codes now;
      if constexpr (AHEAD) {
        now = codes;
        load(codes, begin, chunk + 1);
      } else {
        load(now, begin, chunk);
        fetch(begin, chunk + 2);
      }
      waitForCopies<STAGES - 2>();
      groupBarrier(group, GROUP_THREADS);
      copyX(chunk + STAGES - 1, stage == 0 ? STAGES - 1 : stage - 1, end);
      multiply(now, stage, d);
      stage = stage == STAGES - 1 ? 0 : stage + 1;
    }
    waitForCopies<0>();
    __syncthreads();
    float* sums = (float*)shared;
#pragma unroll
    for (u32 f = 0; f < FRAGMENTS; f++)
#pragma unroll
      for (u32 i = 0; i < TILES; i++)
#pragma unroll
        for (u32 h = 0; h < 4; h++) {
          const u32 row = warp % ROW_WARPS * WARP_ROWS + f * 16 + h / 2 * 8 + g;
          const u32 m = i * 8 + 2 * t + h % 2;
          sums[(group * MOST_ROWS + m) * ROWS + row] = d[f][i][h];
        }
    __syncthreads();
    for (u32 i = threadIdx.x; i < ROWS * MOST_ROWS; i += THREADS) {
      const u32 m = i / ROWS, n = tile * ROWS + i % ROWS;
      if (m < M() && n < N()) {
        float sum = 0;
#pragma unroll
        for (u32 k = 0; k < GROUPS; k++) sum += sums[k * MOST_ROWS * ROWS + i];
        const u64 at = (u64)m * N() + n;
        if (splits > 1) ((float*)op.partial)[split * op.m * op.n + at] = sum;
        else store<T>(op.y, at, sum + biasAt<T>(op.bias, n));
      }
    }
  }
};

#endif
