/*
 * 4-bit quantization to NF4 and FP4. Two codes a byte, the first element in the high nibble. What is computed is said in
 * asm/fourbit.ts; the bits are the same.
 *
 * A scaled value finds its code with one look-up: a bin of scaled values holds at most one threshold, so the bin's rank and
 * one comparison decide exactly. Decoding, a lane's register holds a code's value and a shuffle looks it up.
 */
#include "blocks.cuh"

constexpr u32 THREADS = FOURBIT_THREADS;
constexpr u32 WARPS = THREADS / WARP;

/*
 * The bins of scaled values: for the one threshold that a bin may hold, -threshold * BIN_EXCESS, and the number of lower ones.
 * Two arrays of a word for each bank, so that no look-up has a conflict.
 */
struct Bins {
  float threshold[32];
  float rank[32];
};

/* A type's tables and rules. Ranks are what `codes8` turns into codes, eight at a time. */
struct Nf4 {
  static constexpr u32 PAD = NF4_PAD;
  static DEVICE float threshold(u32 bin) { return NF4_BIN_THRESHOLD[bin]; }
  static DEVICE float rank(u32 bin) { return NF4_BIN_RANK[bin]; }
  static DEVICE float key(float s) { return __fmaf_rn(s, NF4_KEY_SCALE, ROUND_QUARTERS + NF4_KEY_SHIFT); }
  static DEVICE float searched(float s) { return s; }
  static DEVICE float signRank(float rank, float, float) { return rank; }
  static DEVICE u32 codes8(u32 ranks) { return ranks; }
  static DEVICE float value(u32 code) { return NF4_VALUES[code]; }
  static DEVICE u32 exactCode(float s) {
    u32 code = 0;
#pragma unroll
    for (int i = 0; i < 15; i++) code += s > NF4_THRESHOLDS[i];
    return code;
  }
};

struct Fp4 {
  static constexpr u32 PAD = FP4_PAD;
  static DEVICE float threshold(u32 bin) { return FP4_BIN_THRESHOLD[bin]; }
  static DEVICE float rank(u32 bin) { return FP4_BIN_RANK[bin]; }
  static DEVICE float key(float s) { return __fmaf_rn(fabsf(s), FP4_KEY_SCALE, ROUND_QUARTERS + FP4_KEY_SHIFT); }
  static DEVICE float searched(float s) { return fabsf(s); }
  static DEVICE float signRank(float rank, float s, float least) { return s <= least ? rank + 8 : rank; }
  /* The code of a rank differs from it in bit 2, where bit 1 is set. */
  static DEVICE u32 codes8(u32 ranks) { return ranks ^ ((ranks & 0x22222222) << 1); }
  static DEVICE float value(u32 code) { return FP4_VALUES[code]; }
  static DEVICE u32 exactCode(float s) {
    u32 rank = 0;
#pragma unroll
    for (int i = 0; i < 7; i++) rank += fabsf(s) > FP4_THRESHOLDS[i];
    return codes8(rank) | (s < 0 ? 8 : 0);
  }
};

constexpr u32 fp4Code(u32 rank) { return rank ^ ((rank & 2) << 1); }
static_assert(fp4Code(0) == FP4_RANKS[0] && fp4Code(1) == FP4_RANKS[1] && fp4Code(2) == FP4_RANKS[2], "");
static_assert(fp4Code(3) == FP4_RANKS[3] && fp4Code(4) == FP4_RANKS[4] && fp4Code(5) == FP4_RANKS[5], "");
static_assert(fp4Code(6) == FP4_RANKS[6] && fp4Code(7) == FP4_RANKS[7], "");

/* A block by a warp, whatever it holds. */
template <typename T, typename Type>
__device__ __noinline__ void slowBlock(const void* x, u8* packed, float* absmaxes, u64 n, u32 blocksize, u64 block,
                                       FaultSlot slot) {
  u64 first = block * blocksize;
  u32 count = n - first < blocksize ? (u32)(n - first) : blocksize;
  x = advance(x, first * T::BYTES);
  packed += first / 2;
  float absmax = absmaxOfSlowBlock<T>(x, count, 0, slot, absmaxes, block);
  bool zero = absmax == 0;
  float r = reciprocal(absmax);
  for (u32 i = 2 * laneId(); i < count; i += 2 * WARP) {
    u32 high = zero ? 0 : Type::exactCode(flushed(flushed(load<T>(x, i)) * r));
    u32 low = Type::PAD;
    if (i + 1 < count) low = zero ? 0 : Type::exactCode(flushed(flushed(load<T>(x, i + 1)) * r));
    packed[i / 2] = (u8)(high << 4 | low);
  }
}

/* The operands of a launch as arguments: a reference to them would put all of them into memory. */
template <typename T, typename Type>
DEVICE void slowBlock(const Quantize4bit& op, u64 block) {
  slowBlock<T, Type>(op.x, (u8*)op.packed, (float*)op.absmax, op.n, op.blocksize, block, faultSlot(op));
}

/* Where element k of eight has its nibble in 32 bits. */
DEVICE constexpr u32 nibble(u32 k) { return k / 2 * 8 + (k % 2 == 0 ? 4 : 0); }

/* The rank of s. The threshold's excess, saturated, is 1 or 0: the arithmetic stays on one pipe. */
template <typename Type>
DEVICE void lookUp(float s, const Bins& bins, float& rank, float& above) {
  u32 offset = bitsOf(Type::key(s)) & 0x7c;
  float threshold = *(const float*)((const u8*)bins.threshold + offset);
  rank = *(const float*)((const u8*)bins.rank + offset);
  above = __saturatef(__fmaf_rn(Type::searched(s), BIN_EXCESS, threshold));
}

/* ranks * 16 + the rank of s. */
template <typename Type>
DEVICE float append(float ranks, float s, const Bins& bins, float least) {
  float rank, above;
  lookUp<Type>(s, bins, rank, above);
  return Type::signRank(__fmaf_rn(ranks, 16.0f, rank) + above, s, least);
}

/* The ranks of four scaled elements in 16 bits, in the order of memory, after 2^23. */
template <typename Type>
DEVICE u32 ranks4(const float* s, const Bins& bins, float least) {
  float rank, above;
  lookUp<Type>(s[2], bins, rank, above);
  float ranks = Type::signRank(rank + above, s[2], least);
  ranks = append<Type>(ranks, s[3], bins, least);
  ranks = append<Type>(ranks, s[0], bins, least);
  ranks = append<Type>(ranks, s[1], bins, least);
  return bitsOf(ranks + ROUND_UNSIGNED);
}

/* The codes of 16 bytes of elements times r: 8 or 4 of them. */
template <typename T, typename Type>
DEVICE u32 codesOfVector(uint4 v, float r, const Bins& bins) {
  float least = -(fmaxf(r, 1.0f) * SMALLEST_NORMAL);
  constexpr u32 VECTOR = Lanes<T>::COUNT;
  float x[VECTOR];
  decodeVector<T>(v, x);
#pragma unroll
  for (u32 k = 0; k < VECTOR; k++) x[k] *= r;
  u32 ranks = ranks4<Type>(x, bins, least);
  if constexpr (VECTOR == 8) ranks = __byte_perm(ranks, ranks4<Type>(x + 4, bins, least), 0x5410);
  return Type::codes8(ranks);
}

template <typename T, typename Type>
DEVICE void quantize(const Quantize4bit& op) {
  constexpr u32 VECTOR = Lanes<T>::COUNT;
  __shared__ Bins bins;
  __shared__ u32 partial[WARPS];
  if (threadIdx.x < 32) {
    bins.threshold[threadIdx.x] = Type::threshold(threadIdx.x);
    bins.rank[threadIdx.x] = Type::rank(threadIdx.x);
  }
  __syncthreads();

  auto slow = [&](u64 block) { slowBlock<T, Type>(op, block); };
  const u32 blocksize = op.blocksize;
  Tile<T> tile;
  tile.begin = ((u64)blockIdx.x * WARPS + warpId()) * Tile<T>::ELEMENTS;
  tile.load(op.x, op.n, blocksize, isAligned(op.packed, 4));
  if (!tile.whole) {
    eachBlockOf<T>(tile.begin, op.n, blocksize, slow);
    return;
  }
  u32 m[VECTORS];
  absmaxOfTile<T>(tile.vectors, blocksize, partial, m);
  storeAbsmax<T>(m, (float*)op.absmax, tile.begin, blocksize, LEAST_PLAIN);
  void* packed = advance(op.packed, (tile.begin + laneId() * VECTOR) / 2);
  bool allPlain = true;
#pragma unroll
  for (u32 u = 0; u < VECTORS; u++) {
    bool plain = isPlain(m[u], LEAST_PLAIN);
    allPlain = allPlain && plain;
    u32 codes = codesOfVector<T, Type>(tile.vectors[u], plainReciprocal(floatOf(m[u])), bins);
    if (plain) {
      if constexpr (VECTOR == 8) *(u32*)advance(packed, u * WARP * 4) = codes;
      else *(u16*)advance(packed, u * WARP * 2) = (u16)codes;
    }
  }
  if (!__all_sync(ALL_LANES, allPlain)) eachBlockNotPlain<T>(m, tile.begin, blocksize, LEAST_PLAIN, slow);
}

// Bound by instructions as much as by memory, it needs many warps: the compiler, left alone, takes registers for half as many.
// Six blocks fill an Orin, and more would spill.
#define QUANTIZE(T, dtype, Type, type) \
  KERNEL __launch_bounds__(THREADS, 6) quantize4bit_##dtype##_##type(Quantize4bit op) { quantize<T, Type>(op); }
QUANTIZE(F32, f32, Nf4, nf4)
QUANTIZE(F32, f32, Fp4, fp4)
QUANTIZE(F16, f16, Nf4, nf4)
QUANTIZE(F16, f16, Fp4, fp4)
QUANTIZE(BF16, bf16, Nf4, nf4)
QUANTIZE(BF16, bf16, Fp4, fp4)

// Decoding: y[i] = code(nibble i) * absmax(block), rounded.

/* A warp's elements, one at a time: the end, unaligned addresses. */
template <typename T, typename Type>
DEVICE void decodeSlowly(const Dequantize4bit& op, u64 begin, u64 end) {
  for (u64 i = begin + laneId(); i < end; i += WARP) {
    u32 byte = ((const u8*)op.packed)[i / 2];
    u32 code = i & 1 ? byte & 15 : byte >> 4;
    store<T>(op.y, i, Type::value(code) * ((const float*)op.absmax)[i >> blockShift(op.blocksize)]);
  }
}

template <typename T, typename Type>
DEVICE void dequantize(const Dequantize4bit& op) {
  constexpr u32 VECTOR = Lanes<T>::COUNT;
  constexpr u32 WARP_TILE = Tile<T>::ELEMENTS;
  const u32 lane = laneId();
  const u64 begin = (u64)blockIdx.x * (WARPS * WARP_TILE) + warpId() * WARP_TILE;
  if (begin + WARP_TILE > op.n || !isAligned(op.y, 16) || !isAligned(op.packed, 4)) {
    decodeSlowly<T, Type>(op, begin, begin + WARP_TILE < op.n ? begin + WARP_TILE : op.n);
    return;
  }
  // Lane l holds the value of code l, as does lane l + 16: a shuffle looks up, and the fifth bit of its index may be anything.
  const float value = Type::value(lane & 15);
  const u32 shift = blockShift(op.blocksize);
  const void* packed = advance(op.packed, begin / 2 + lane * VECTOR / 2);
  const float* absmax = (const float*)op.absmax + (begin >> shift);
  const u32 at = ((u32)begin & (op.blocksize - 1)) + lane * VECTOR;
  u32 codes[VECTORS];
  float scale[VECTORS];
#pragma unroll
  for (u32 u = 0; u < VECTORS; u++) {
    if constexpr (VECTOR == 8) codes[u] = loadStream4(advance(packed, u * WARP * 4));
    else codes[u] = loadStream2(advance(packed, u * WARP * 2));
    scale[u] = absmax[(at + u * WARP * VECTOR) >> shift];
  }
  void* y = advance(op.y, (begin + lane * VECTOR) * T::BYTES);
#pragma unroll
  for (u32 u = 0; u < VECTORS; u++) {
    float v[VECTOR];
#pragma unroll
    for (u32 k = 0; k < VECTOR; k++) v[k] = __shfl_sync(ALL_LANES, value, codes[u] >> nibble(k)) * scale[u];
    void* to = advance(y, u * WARP * 16);
    // A value is finite, so only such a scale makes a NaN.
    if ((bitsOf(scale[u]) & ABS) < INFINITY_BITS) {
      storeStream16(to, encodeVector<T>(v));
    } else {
#pragma unroll
      for (u32 k = 0; k < VECTOR; k++) store<T>(to, k, v[k]);
    }
  }
}

#define DEQUANTIZE(T, dtype, Type, type) \
  KERNEL __launch_bounds__(THREADS) dequantize4bit_##dtype##_##type(Dequantize4bit op) { dequantize<T, Type>(op); }
DEQUANTIZE(F32, f32, Nf4, nf4)
DEQUANTIZE(F32, f32, Fp4, fp4)
DEQUANTIZE(F16, f16, Nf4, nf4)
DEQUANTIZE(F16, f16, Fp4, fp4)
DEQUANTIZE(BF16, bf16, Nf4, nf4)
DEQUANTIZE(BF16, bf16, Fp4, fp4)
