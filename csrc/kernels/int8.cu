/*
 * Row-wise int8 quantization (LLM.int8() weights and activations). What is computed is said in asm/int8.ts; the bits are the
 * same. A short row is a warp's, a long one a block's; a row is read twice, the second time from the cache.
 */
#include "blocks.cuh"

constexpr u32 THREADS = ROW_THREADS;
constexpr float INVERSE_127 = 1.0f / 127.0f;
constexpr float UP = 18446744073709551616.0f;

/* The threads that share a row. */
struct Warp {
  static constexpr u32 THREADS = WARP;
  static DEVICE u64 row() { return (u64)blockIdx.x * (blockDim.x / WARP) + warpId(); }
  static DEVICE u32 thread() { return laneId(); }
  static DEVICE u32 largest(u32 m) { return largestOfWarp(m); }
};
struct Block {
  static constexpr u32 THREADS = ::THREADS;
  static DEVICE u64 row() { return blockIdx.x; }
  static DEVICE u32 thread() { return threadIdx.x; }
  static DEVICE u32 largest(u32 m) {
    __shared__ u32 partial[THREADS / WARP];
    m = largestOfWarp(m);
    __syncthreads();
    if (laneId() == 0) partial[warpId()] = m;
    __syncthreads();
    m = 0;
#pragma unroll
    for (u32 w = 0; w < THREADS / WARP; w++) m = larger(m, partial[w]);
    return m;
  }
};

/* The code of any x. NaN, also that of infinity times zero, gives 0. */
DEVICE i8 exactCode(float x, float absmax) {
  if (absmax == 0) return 0;
  float up = absmax < INT8_TINY ? UP : 1.0f;
  float v = x * up * (127.0f * reciprocal(absmax * up));
  return v == v ? (i8)(i32)rintf(v) : 0;
}

/* Four codes: the product rounds once, adding the constant again, to the nearest even integer. */
DEVICE u32 codes4(float a, float b, float c, float d, float factor) {
  u32 ab = __byte_perm(bitsOf(a * factor + ROUND_SIGNED), bitsOf(b * factor + ROUND_SIGNED), 0x0040);
  u32 cd = __byte_perm(bitsOf(c * factor + ROUND_SIGNED), bitsOf(d * factor + ROUND_SIGNED), 0x0040);
  return __byte_perm(ab, cd, 0x5410);
}

template <typename T, typename Group>
DEVICE void quantizeRow(const Int8VectorwiseQuant& op) {
  constexpr u32 VECTOR = Lanes<T>::COUNT;
  u64 row = Group::row();
  if (row >= op.rows) return;
  u64 cols = op.cols;
  const void* x = advance(op.x, row * cols * T::BYTES);
  i8* q = (i8*)op.q + row * cols;
  u64 vectors = isAligned(x, 16) && isAligned(q, 8) ? cols & ~(u64)(VECTOR - 1) : 0;
  u32 m = 0;
  for (u64 i = Group::thread() * VECTOR; i < vectors; i += Group::THREADS * VECTOR)
    m = larger(m, absmaxOfVector<T>(*(const uint4*)advance(x, i * T::BYTES)));
  for (u64 i = vectors + Group::thread(); i < cols; i += Group::THREADS) m = larger(m, bitsOf(load<T>(x, i)) & ABS);
  m = Group::largest(m);
  float absmax = floatOf(m);
  if (m >= INFINITY_BITS) {
    if (Group::thread() == 0) fault(faultSlot(op), row);
    m = 0;
    for (u64 i = Group::thread(); i < cols; i += Group::THREADS) {
      u32 bits = bitsOf(load<T>(x, i)) & ABS;
      if (bits <= INFINITY_BITS) m = larger(m, bits);
    }
    absmax = floatOf(Group::largest(m));
    vectors = 0;
  }
  if (absmax < INT8_TINY) vectors = 0;
  if (Group::thread() == 0) ((float*)op.scale)[row] = absmax;
  float factor = 127.0f * reciprocal(absmax);
  for (u64 i = Group::thread() * VECTOR; i < vectors; i += Group::THREADS * VECTOR) {
    float y[VECTOR];
    decodeVector<T>(*(const uint4*)advance(x, i * T::BYTES), y);
    u32 codes = codes4(y[0], y[1], y[2], y[3], factor);
    if constexpr (VECTOR == 8) *(uint2*)(q + i) = make_uint2(codes, codes4(y[4], y[5], y[6], y[7], factor));
    else *(u32*)(q + i) = codes;
  }
  for (u64 i = vectors + Group::thread(); i < cols; i += Group::THREADS) q[i] = exactCode(load<T>(x, i), absmax);
}

/* A signed byte of a word as float32: 2^23 + 128 + the byte, less that. */
DEVICE float byteToFloat(u32 flipped, u32 k) {
  return floatOf(__byte_perm(flipped, bitsOf(ROUND_UNSIGNED), 0x7440 | k)) - (ROUND_UNSIGNED + 128.0f);
}

/* y = (q * scale) * f32(1 / 127) */
template <typename T, typename Group>
DEVICE void dequantizeRow(const Int8VectorwiseDequant& op) {
  constexpr u32 VECTOR = Lanes<T>::COUNT;
  u64 row = Group::row();
  if (row >= op.rows) return;
  u64 cols = op.cols;
  const i8* q = (const i8*)op.q + row * cols;
  void* y = advance(op.y, row * cols * T::BYTES);
  float scale = ((const float*)op.scale)[row];
  // A code is finite, so only such a scale makes a NaN.
  bool plain = isAligned(y, 16) && isAligned(q, 8) && (bitsOf(scale) & ABS) < INFINITY_BITS;
  u64 vectors = plain ? cols & ~(u64)(VECTOR - 1) : 0;
  for (u64 i = Group::thread() * VECTOR; i < vectors; i += Group::THREADS * VECTOR) {
    uint2 codes = VECTOR == 8 ? loadStream8(q + i) : make_uint2(loadStream4(q + i), 0);
    float v[VECTOR];
#pragma unroll
    for (u32 k = 0; k < VECTOR; k++)
      v[k] = byteToFloat((k < 4 ? codes.x : codes.y) ^ 0x80808080, k % 4) * scale * INVERSE_127;
    storeStream16(advance(y, i * T::BYTES), encodeVector<T>(v));
  }
  for (u64 i = vectors + Group::thread(); i < cols; i += Group::THREADS)
    store<T>(y, i, (float)q[i] * scale * INVERSE_127);
}

#define ROWS(T, dtype, Group, group)                                                                             \
  KERNEL __launch_bounds__(THREADS)                                                                              \
      int8VectorwiseQuant_##dtype##_##group(Int8VectorwiseQuant op) {                    \
    quantizeRow<T, Group>(op);                                                                                   \
  }                                                                                                              \
  KERNEL __launch_bounds__(THREADS)                                                                              \
      int8VectorwiseDequant_##dtype##_##group(Int8VectorwiseDequant op) {                \
    dequantizeRow<T, Group>(op);                                                                                 \
  }
ROWS(F32, f32, Warp, warp)
ROWS(F16, f16, Warp, warp)
ROWS(BF16, bf16, Warp, warp)
ROWS(F32, f32, Block, block)
ROWS(F16, f16, Block, block)
ROWS(BF16, bf16, Block, block)
