/*
 * Int8 quantization by rows (LLM.int8() weights and activations), with or without outliers, and by columns. What is computed is said
 * in asm/int8.ts; the bits are the same. A short row is a warp's, a long one a block's; a row is read twice, the second time from the
 * cache.
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

/* Without outliers every element counts. */
struct NoOutliers {
  static constexpr bool SOME = false;
};

/* Elements whose magnitude has bits of `threshold` or more are outliers: they do not count, have code 0, and mark their column. */
struct Outliers {
  static constexpr bool SOME = true;
  /* Beside the bits of a magnitude: something is not finite. */
  static constexpr u32 NOT_FINITE = ~ABS;
  u32 threshold;
  u8* marks;

  /* m with the magnitude of x, or the mark. */
  DEVICE u32 larger(u32 m, float x, u64 column) const {
    const u32 bits = bitsOf(x) & ABS;
    if (bits < threshold) return ::larger(m, bits);
    if (bits <= INFINITY_BITS) marks[column] = 1;
    return bits < INFINITY_BITS ? m : m | NOT_FINITE;
  }
  DEVICE float without(float x) const { return (bitsOf(x) & ABS) < threshold ? x : 0.0f; }
};

template <typename T, typename Group, typename Without>
DEVICE void quantizeRow(const Int8VectorwiseQuant& op, Without outliers) {
  constexpr u32 VECTOR = Lanes<T>::COUNT;
  u64 row = Group::row();
  if (row >= op.rows) return;
  u64 cols = op.cols;
  const void* x = advance(op.x, row * cols * T::BYTES);
  i8* q = (i8*)op.q + row * cols;
  u64 vectors = isAligned(x, 16) && isAligned(q, 8) ? cols & ~(u64)(VECTOR - 1) : 0;
  u32 m = 0;
  for (u64 i = Group::thread() * VECTOR; i < vectors; i += Group::THREADS * VECTOR) {
    const uint4 v = *(const uint4*)advance(x, i * T::BYTES);
    const u32 bits = absmaxOfVector<T>(v);
    if constexpr (Without::SOME) {
      if (bits >= outliers.threshold) {
        float y[VECTOR];
        decodeVector<T>(v, y);
#pragma unroll
        for (u32 k = 0; k < VECTOR; k++) m = outliers.larger(m, y[k], i + k);
        continue;
      }
    }
    m = larger(m, bits);
  }
  for (u64 i = vectors + Group::thread(); i < cols; i += Group::THREADS) {
    if constexpr (Without::SOME) m = outliers.larger(m, load<T>(x, i), i);
    else m = larger(m, bitsOf(load<T>(x, i)) & ABS);
  }
  m = Group::largest(m);
  float absmax = floatOf(m);
  if (m >= INFINITY_BITS) {
    if (Group::thread() == 0) fault(faultSlot(op), row);
    m = 0;
    for (u64 i = Group::thread(); i < cols; i += Group::THREADS) {
      u32 bits = bitsOf(load<T>(x, i)) & ABS;
      if constexpr (Without::SOME) bits = bits < outliers.threshold ? bits : 0;
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
    if constexpr (Without::SOME) {
#pragma unroll
      for (u32 k = 0; k < VECTOR; k++) y[k] = outliers.without(y[k]);
    }
    u32 codes = codes4(y[0], y[1], y[2], y[3], factor);
    if constexpr (VECTOR == 8) *(uint2*)(q + i) = make_uint2(codes, codes4(y[4], y[5], y[6], y[7], factor));
    else *(u32*)(q + i) = codes;
  }
  for (u64 i = vectors + Group::thread(); i < cols; i += Group::THREADS) {
    float y = load<T>(x, i);
    if constexpr (Without::SOME) y = outliers.without(y);
    q[i] = exactCode(y, absmax);
  }
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

#define ROWS(T, dtype, Group, group)                                                                           \
  KERNEL __launch_bounds__(THREADS) int8VectorwiseQuant_##dtype##_##group(Int8VectorwiseQuant op) {            \
    quantizeRow<T, Group>(op, NoOutliers());                                                                   \
  }                                                                                                            \
  KERNEL __launch_bounds__(THREADS) int8VectorwiseQuant_outliers_##dtype##_##group(Int8VectorwiseQuant op) {   \
    quantizeRow<T, Group>(op, Outliers{bitsOf(op.threshold), (u8*)op.outliers});                               \
  }                                                                                                            \
  KERNEL __launch_bounds__(THREADS) int8VectorwiseDequant_##dtype##_##group(Int8VectorwiseDequant op) {        \
    dequantizeRow<T, Group>(op);                                                                               \
  }
ROWS(F32, f32, Warp, warp)
ROWS(F16, f16, Warp, warp)
ROWS(BF16, bf16, Warp, warp)
ROWS(F32, f32, Block, block)
ROWS(F16, f16, Block, block)
ROWS(BF16, bf16, Block, block)

// Outlier columns

/* The sum of a value over the warp, in all lanes. */
DEVICE u32 sumOfWarp(u32 x) {
#pragma unroll
  for (u32 step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
  return x;
}

/* One block: a thread looks at four columns at a time. */
KERNEL __launch_bounds__(COMPACT_THREADS) int8OutlierColumns(Int8OutlierColumns op) {
  constexpr u32 EACH = 4;
  static_assert(COMPACT_THREADS == WARP * WARP, "a lane for each warp's count");
  __shared__ u32 counts[WARP];
  const u8* marks = (const u8*)op.outliers;
  i32* columns = (i32*)op.columns;
  const bool aligned = isAligned(marks, EACH);
  u32 found = 0;
  for (u64 first = 0; first < op.cols; first += COMPACT_THREADS * EACH) {
    const u64 at = first + threadIdx.x * EACH;
    u32 word = 0;
    if (aligned && at + EACH <= op.cols) {
      word = *(const u32*)(marks + at);
    } else {
#pragma unroll
      for (u32 e = 0; e < EACH; e++)
        if (at + e < op.cols) word |= (u32)marks[at + e] << (8 * e);
    }
    u32 count = 0;
#pragma unroll
    for (u32 e = 0; e < EACH; e++) count += (word >> (8 * e) & 255) != 0;
    u32 upTo = count;
#pragma unroll
    for (u32 step = 1; step < WARP; step *= 2) {
      const u32 before = __shfl_up_sync(ALL_LANES, upTo, step);
      if (laneId() >= step) upTo += before;
    }
    if (laneId() == WARP - 1) counts[warpId()] = upTo;
    __syncthreads();
    const u32 others = counts[laneId()];
    u32 to = found + sumOfWarp(laneId() < warpId() ? others : 0) + upTo - count;
    found += sumOfWarp(others);
    __syncthreads();
#pragma unroll
    for (u32 e = 0; e < EACH; e++)
      if ((word >> (8 * e) & 255) != 0) columns[to++] = (i32)(at + e);
  }
  for (u64 i = found + threadIdx.x; i < op.cols; i += COMPACT_THREADS) columns[i] = -1;
  if (threadIdx.x == 0) *(i32*)op.count = (i32)found;
}

/* A warp has a row. */
KERNEL __launch_bounds__(ZERO_THREADS) int8ZeroColumns(Int8ZeroColumns op) {
  const u64 row = Warp::row();
  if (row >= op.rows) return;
  i8* q = (i8*)op.q + row * op.cols;
  const i32 count = *(const i32*)op.count;
  for (u64 j = laneId(); (long long)j < count && j < op.cols; j += WARP) {
    const u32 column = (u32)((const i32*)op.columns)[j];
    if (column < op.cols) q[column] = 0;
  }
}

// Quantization by columns

/* The largest magnitudes of a strip of columns: lanes have vectors of a row, a thread goes down. NaN does not count. */
template <typename T>
DEVICE void statsOfColumns(const Int8ColumnStats& op) {
  constexpr u32 VECTOR = Lanes<T>::COUNT;
  constexpr u32 ACROSS = COLUMN_STRIP / VECTOR;
  constexpr u32 DOWN = COLUMN_THREADS / ACROSS;
  constexpr u32 WARPS = COLUMN_THREADS / WARP;
  static_assert(COLUMN_STRIP == WARP, "the first warp has a lane for each column");
  __shared__ u32 partial[WARPS][COLUMN_STRIP];
  const u64 first = (u64)blockIdx.x * COLUMN_STRIP;
  const u32 lane = threadIdx.x % ACROSS;
  const u64 col = first + lane * VECTOR;
  const u32 limit = op.threshold > 0 ? bitsOf(op.threshold) : INFINITY_BITS + 1;
  const bool whole = isAligned(op.x, 16) && op.cols % VECTOR == 0 && col < op.cols;
  u32 m[VECTOR] = {};
#pragma unroll 4
  for (u64 row = threadIdx.x / ACROSS; row < op.rows; row += DOWN) {
    float y[VECTOR];
    if (whole) {
      decodeVector<T>(loadStream16(advance(op.x, (row * op.cols + col) * T::BYTES)), y);
    } else {
#pragma unroll
      for (u32 k = 0; k < VECTOR; k++) y[k] = col + k < op.cols ? load<T>(op.x, row * op.cols + col + k) : 0.0f;
    }
#pragma unroll
    for (u32 k = 0; k < VECTOR; k++) {
      const u32 bits = bitsOf(y[k]) & ABS;
      m[k] = larger(m[k], bits < limit ? bits : 0);
    }
  }
#pragma unroll
  for (u32 k = 0; k < VECTOR; k++) {
#pragma unroll
    for (u32 step = WARP / 2; step >= ACROSS; step /= 2) m[k] = larger(m[k], __shfl_xor_sync(ALL_LANES, m[k], step));
    if (laneId() < ACROSS) partial[warpId()][lane * VECTOR + k] = m[k];
  }
  __syncthreads();
  if (threadIdx.x >= COLUMN_STRIP || first + threadIdx.x >= op.cols) return;
  u32 most = 0;
#pragma unroll
  for (u32 w = 0; w < WARPS; w++) most = larger(most, partial[w][threadIdx.x]);
  ((float*)op.stats)[first + threadIdx.x] = floatOf(most);
}

/* rint(T(x * 127) / stat), saturated; outliers, NaN and what belongs to a zero column are 0. */
template <typename T>
DEVICE u32 columnCode(float x, float stat, u32 limit) {
  const float v = rounded<T>(x * 127.0f) / stat;
  if ((bitsOf(x) & ABS) >= limit || stat == 0 || v != v) return 0;
  return (u32)(i32)rintf(fminf(fmaxf(v, -127.0f), 127.0f)) & 255;
}

/* A thread has a vector of columns in a few rows. */
template <typename T>
DEVICE void quantizeColumns(const Int8ColumnQuant& op) {
  constexpr u32 VECTOR = Lanes<T>::COUNT;
  // No memory holds 16 times 2^32 elements.
  const u32 vectors = (u32)((op.cols + VECTOR - 1) / VECTOR);
  const u32 thread = blockIdx.x * COLUMN_THREADS + threadIdx.x;
  const u32 band = thread / vectors;
  const u64 col = (u64)(thread - band * vectors) * VECTOR;
  const u64 row = (u64)band * COLUMN_ROWS;
  if (row >= op.rows) return;
  const u32 limit = op.threshold > 0 ? bitsOf(op.threshold) : NAN_BITS;
  float stats[VECTOR];
#pragma unroll
  for (u32 k = 0; k < VECTOR; k++) stats[k] = col + k < op.cols ? ((const float*)op.stats)[col + k] : 0.0f;
  const bool whole = isAligned(op.x, 16) && isAligned(op.q, VECTOR) && op.cols % VECTOR == 0;
#pragma unroll 1
  for (u32 r = 0; r < COLUMN_ROWS && row + r < op.rows; r++) {
    const u64 at = (row + r) * op.cols + col;
    i8* q = (i8*)op.q + at;
    if (whole) {
      float y[VECTOR];
      decodeVector<T>(loadStream16(advance(op.x, at * T::BYTES)), y);
      u32 codes[2] = {0, 0};
#pragma unroll
      for (u32 k = 0; k < VECTOR; k++) codes[k / 4] |= columnCode<T>(y[k], stats[k], limit) << (8 * (k % 4));
      if constexpr (VECTOR == 8) *(uint2*)q = make_uint2(codes[0], codes[1]);
      else *(u32*)q = codes[0];
    } else {
#pragma unroll
      for (u32 k = 0; k < VECTOR; k++)
        if (col + k < op.cols) q[k] = (i8)columnCode<T>(load<T>(op.x, at + k), stats[k], limit);
    }
  }
}

#define COLUMNS(T, dtype)                                                                                               \
  KERNEL __launch_bounds__(COLUMN_THREADS) int8ColumnStats_##dtype(Int8ColumnStats op) { statsOfColumns<T>(op); }       \
  KERNEL __launch_bounds__(COLUMN_THREADS) int8ColumnQuant_##dtype(Int8ColumnQuant op) { quantizeColumns<T>(op); }
COLUMNS(F32, f32)
COLUMNS(F16, f16)
COLUMNS(BF16, bf16)
