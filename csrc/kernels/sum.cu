/*
 * The summation tree: float64 sums of chunks of 1,024 elements, level upon level. In a chunk, lane l of 32 adds up the
 * elements l, l + 32, l + 64 ... in this order; then lane i takes in lane i + h for h = 16, 8, 4, 2, 1. asm/sum.ts adds in
 * the same order.
 */
#include "common.cuh"

template <typename T>
DEVICE double sumOfChunk(const T* x, u32 count) {
  double sum = 0;
  u32 lane = laneId();
  if (count == SUM_CHUNK) {
#pragma unroll
    for (u32 i = 0; i < SUM_CHUNK; i += SUM_LANES) sum += (double)x[i + lane];
  } else {
    for (u32 i = lane; i < count; i += SUM_LANES) sum += (double)x[i];
  }
#pragma unroll
  for (u32 h = SUM_LANES / 2; h > 0; h /= 2) sum += __shfl_down_sync(ALL_LANES, sum, h);
  return sum;
}

/* y[c] = sum of chunk c: a warp each. */
KERNEL __launch_bounds__(SUM_THREADS) sumChunks(SumChunks op) {
  u64 chunk = (u64)blockIdx.x * (blockDim.x / WARP) + warpId();
  u64 first = chunk * SUM_CHUNK;
  if (first >= op.n) return;
  u32 count = op.n - first < SUM_CHUNK ? (u32)(op.n - first) : SUM_CHUNK;
  double sum = op.wide ? sumOfChunk((const double*)op.x + first, count) : sumOfChunk((const float*)op.x + first, count);
  if (laneId() == 0) ((double*)op.y)[chunk] = sum;
}

/* y[0] = f32(the rest of the tree over x / n): one block, a chunk for a warp at a time, then the chunk of their sums. */
KERNEL __launch_bounds__(MEAN_THREADS) meanOfSums(MeanOfSums op) {
  __shared__ double level[SUM_CHUNK];
  const double* x = (const double*)op.x;
  u32 sums = (u32)op.sums;
  if (sums > SUM_CHUNK) {
    u32 chunks = (sums + SUM_CHUNK - 1) / SUM_CHUNK;
    for (u32 chunk = warpId(); chunk < chunks; chunk += blockDim.x / WARP) {
      u32 first = chunk * SUM_CHUNK;
      double sum = sumOfChunk(x + first, sums - first < SUM_CHUNK ? sums - first : SUM_CHUNK);
      if (laneId() == 0) level[chunk] = sum;
    }
    __syncthreads();
    x = level;
    sums = chunks;
  }
  if (warpId() != 0) return;
  double sum = sumOfChunk(x, sums);
  if (laneId() == 0) store<F32>(op.y, 0, (float)(sum / (double)op.n));
}

// The sums of a product that was split along k.

template <typename T>
DEVICE void sumOfPartials(const SumPartials& op) {
  const u64 i = (u64)blockIdx.x * SUM_THREADS + threadIdx.x;
  const u64 n = op.rows * op.cols;
  if (i >= n) return;
  float sum = 0;
#pragma unroll 4
  for (u32 s = 0; s < op.splits; s++) sum += __ldg((const float*)op.x + s * n + i);
  if (op.bias) sum += load<T>(op.bias, i % op.cols);
  store<T>(op.y, i, sum);
}

KERNEL __launch_bounds__(SUM_THREADS) sumPartials_f32(SumPartials op) { sumOfPartials<F32>(op); }
KERNEL __launch_bounds__(SUM_THREADS) sumPartials_f16(SumPartials op) { sumOfPartials<F16>(op); }
KERNEL __launch_bounds__(SUM_THREADS) sumPartials_bf16(SumPartials op) { sumOfPartials<BF16>(op); }
