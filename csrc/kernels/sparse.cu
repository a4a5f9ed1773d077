/*
 * A sparse matrix in coordinates, sorted by row, times a dense one. A block has a row and a strip of columns; a thread adds up the
 * entries of the row in their order, in float32, a multiplication and an addition each.
 */
#include "common.cuh"

/* The first of n ascending numbers that is not below `least`, found by a warp: each step looks at 32 of what is left. */
DEVICE u64 firstFrom(const i32* x, u64 n, u64 least) {
  u64 low = 0, high = n;
  while (low < high) {
    const u64 step = (high - low + WARP - 1) / WARP;
    const u64 at = low + laneId() * step;
    const bool below = at < high && (long long)x[at] < (long long)least;
    const u32 count = __popc(__ballot_sync(ALL_LANES, below));
    if (count == 0) break;
    const u64 end = low + count * step;
    low = end - step + 1;
    high = end < high ? end : high;
  }
  return low;
}

template <typename T>
DEVICE void multiplyRow(const SpmmCoo& op) {
  typedef typename T::Raw Raw;
  constexpr u32 EACH = SPARSE_COLUMNS;
  static_assert(EACH == 4, "");
  __shared__ u64 bounds[2];
  __shared__ u32 columns[SPARSE_THREADS];
  __shared__ float values[SPARSE_THREADS];
  const u32 across = (u32)((op.n + SPARSE_THREADS * EACH - 1) / (SPARSE_THREADS * EACH));
  const u64 row = blockIdx.x / across;
  const u64 col = ((u64)(blockIdx.x % across) * SPARSE_THREADS + threadIdx.x) * EACH;
  if (warpId() < 2) {
    const u64 bound = firstFrom((const i32*)op.rowidx, op.nnz, row + warpId());
    if (laneId() == 0) bounds[warpId()] = bound;
  }
  __syncthreads();
  const u64 end = bounds[1];
  const bool vectors = op.n % EACH == 0 && isAligned(op.b, EACH * T::BYTES) && isAligned(op.y, EACH * T::BYTES);
  float sums[EACH] = {};
  for (u64 first = bounds[0]; first < end; first += SPARSE_THREADS) {
    const u32 some = end - first < SPARSE_THREADS ? (u32)(end - first) : SPARSE_THREADS;
    __syncthreads();
    if (threadIdx.x < some) {
      columns[threadIdx.x] = (u32)((const i32*)op.colidx)[first + threadIdx.x];
      values[threadIdx.x] = load<T>(op.values, first + threadIdx.x);
    }
    __syncthreads();
    if (col >= op.n) continue;
#pragma unroll 4
    for (u32 i = 0; i < some; i++) {
      if (columns[i] >= op.cols) continue;
      const Raw* line = (const Raw*)op.b + columns[i] * op.n + col;
      float v[EACH] = {};
      if (vectors) {
        if constexpr (T::BYTES == 4) {
          const uint4 words = *(const uint4*)line;
          v[0] = floatOf(words.x), v[1] = floatOf(words.y), v[2] = floatOf(words.z), v[3] = floatOf(words.w);
        } else {
          const uint2 words = *(const uint2*)line;
          decodePair<T>(words.x, v[0], v[1]);
          decodePair<T>(words.y, v[2], v[3]);
        }
      } else {
#pragma unroll
        for (u32 e = 0; e < EACH; e++)
          if (col + e < op.n) v[e] = decode<T>(line[e]);
      }
#pragma unroll
      for (u32 e = 0; e < EACH; e++) sums[e] += values[i] * v[e];
    }
  }
#pragma unroll
  for (u32 e = 0; e < EACH; e++)
    if (col + e < op.n) store<T>(op.y, row * op.n + col + e, sums[e]);
}

#define SPMM(T, dtype) \
  KERNEL __launch_bounds__(SPARSE_THREADS) spmmCoo_##dtype(SpmmCoo op) { multiplyRow<T>(op); }
SPMM(F32, f32)
SPMM(F16, f16)
SPMM(BF16, bf16)
