/*
 * What is done with the gradients of a list: finite or not, norms, scaling. A warp takes a chunk. The sums are those of asm/gradient.ts, in
 * the same order.
 */
#include "list.cuh"

constexpr u32 STEPS = OPTIMIZER_CHUNK / (8 * WARP);

struct WarpChunk {
  Chunk chunk;
  u64 at;
  bool there;
};

/* The chunk of this warp. */
template <typename Op>
DEVICE WarpChunk warpChunk(const Op& op) {
  WarpChunk w;
  w.at = (u64)blockIdx.x * (CHUNK_THREADS / WARP) + warpId();
  w.there = w.at < op.count;
  if (w.there) w.chunk = chunkOf(op.list, recordOf(op.chunks, w.at), w.at);
  return w;
}

/* Whole, and its gradients aligned to 16 bytes. */
DEVICE bool isPlain(const Chunk& chunk) { return chunk.count == OPTIMIZER_CHUNK && isAligned(chunk.record.g, 16); }

/* The largest magnitude of eight elements, as bits of a float32; NaN beats all. */
DEVICE u32 largestOf(const float* x) {
  u32 m = 0;
#pragma unroll
  for (u32 e = 0; e < 8; e++) m = larger(m, bitsOf(x[e]) & ABS);
  return m;
}

KERNEL __launch_bounds__(CHUNK_THREADS) gradientCheck(GradientCheck op) {
  const WarpChunk w = warpChunk(op);
  if (!w.there) return;
  const Record& r = w.chunk.record;
  const u64 first = w.chunk.begin + laneId() * 8, end = w.chunk.begin + w.chunk.count;
  u32 m = 0;
  if (isPlain(w.chunk)) {
    Eight v[STEPS / 2];
#pragma unroll
    for (u32 half = 0; half < STEPS; half += STEPS / 2) {
#pragma unroll
      for (u32 i = 0; i < STEPS / 2; i++) v[i] = loadEight<AnyType>(r.g, first + (half + i) * 8 * WARP, op.gradDtype);
#pragma unroll
      for (u32 i = 0; i < STEPS / 2; i++) {
        // Of a 16-bit type the second half is zeros.
        if (op.gradDtype == DTYPE_F32) m = larger(m, larger(absmaxOfVector<F32>(v[i].low), absmaxOfVector<F32>(v[i].high)));
        else m = larger(m, op.gradDtype == DTYPE_F16 ? absmaxOfVector<F16>(v[i].low) : absmaxOfVector<BF16>(v[i].low));
      }
    }
  } else {
#pragma unroll 1
    for (u64 at = first; at < end; at += 8 * WARP) {
      float x[8];
      loadEightSafely<AnyType>(r.g, at, end, x, op.gradDtype);
      m = larger(m, largestOf(x));
    }
  }
  m = largestOfWarp(m);
  if (m >= INFINITY_BITS && laneId() == 0) atomicMin((u32*)op.guard + GUARD_FOUND, r.index);
}

/* One thread: whether the step under way is skipped. */
KERNEL gradientVerdict(GradientVerdict op) {
  u32* guard = (u32*)op.guard;
  const u32 found = guard[GUARD_FOUND];
  guard[GUARD_SKIP] = found != NONE_FOUND;
  if (found == NONE_FOUND) return;
  guard[GUARD_SKIPPED] += 1;
  guard[GUARD_LAST] = found;
  guard[GUARD_FOUND] = NONE_FOUND;
  fault(faultSlot(op), found);
}

KERNEL __launch_bounds__(CHUNK_THREADS) gradientSumSquares(GradientSumSquares op) {
  const WarpChunk w = warpChunk(op);
  if (!w.there) return;
  const Record& r = w.chunk.record;
  const u64 first = w.chunk.begin + laneId() * 8, end = w.chunk.begin + w.chunk.count;
  float a[8] = {0, 0, 0, 0, 0, 0, 0, 0};
  if (isPlain(w.chunk)) {
    Eight v[STEPS / 2];
#pragma unroll
    for (u32 half = 0; half < STEPS; half += STEPS / 2) {
#pragma unroll
      for (u32 i = 0; i < STEPS / 2; i++) v[i] = loadEight<AnyType>(r.g, first + (half + i) * 8 * WARP, op.gradDtype);
#pragma unroll
      for (u32 i = 0; i < STEPS / 2; i++) {
        float x[8];
        decodeEight<AnyType>(v[i], x, op.gradDtype);
#pragma unroll
        for (u32 e = 0; e < 8; e++) a[e] += x[e] * x[e];
      }
    }
  } else {
#pragma unroll 1
    for (u64 at = first; at < end; at += 8 * WARP) {
      float x[8];
      loadEightSafely<AnyType>(r.g, at, end, x, op.gradDtype);
#pragma unroll
      for (u32 e = 0; e < 8; e++) a[e] += x[e] * x[e];
    }
  }
  const float sum = sumOfLanes(a);
  if (laneId() == 0) store<F32>(op.partial, w.at, sum);
}

KERNEL __launch_bounds__(CHUNK_THREADS) scaleGradients(ScaleGradients op) {
  const WarpChunk w = warpChunk(op);
  if (!w.there) return;
  const Record& r = w.chunk.record;
  const u64 first = w.chunk.begin + laneId() * 8, end = w.chunk.begin + w.chunk.count;
  const float factor = *(const float*)op.factor;
  if (factor == 1) return;
  if (isPlain(w.chunk)) {
    Eight v[STEPS / 4];
#pragma unroll 1
    for (u32 part = 0; part < STEPS; part += STEPS / 4) {
#pragma unroll
      for (u32 i = 0; i < STEPS / 4; i++) v[i] = loadEight<AnyType>(r.g, first + (part + i) * 8 * WARP, op.gradDtype);
#pragma unroll
      for (u32 i = 0; i < STEPS / 4; i++) {
        float x[8];
        decodeEight<AnyType>(v[i], x, op.gradDtype);
#pragma unroll
        for (u32 e = 0; e < 8; e++) x[e] *= factor;
        storeEight<AnyType>(r.g, first + (part + i) * 8 * WARP, encodeEight<AnyType>(x, op.gradDtype), op.gradDtype);
      }
    }
  } else {
    for (u64 at = w.chunk.begin + laneId(); at < end; at += WARP)
      storeOne<AnyType>(r.g, at, loadOne<AnyType>(r.g, at, op.gradDtype) * factor, op.gradDtype);
  }
}

// The float64 tree: lane l of NORM_SUM_LANES adds up the values l, l + NORM_SUM_LANES ... in this order, then takes in lane l + h.

static_assert(NORM_THREADS == NORM_SUM_LANES, "a thread is a lane");

DEVICE double squareRoot64(double x) {
  double y;
  asm("sqrt.rn.f64 %0, %1;" : "=d"(y) : "d"(x));
  return y;
}

/* The result is thread 0's. */
DEVICE double sumOfBlock(double sum, double* lanes) {
  lanes[threadIdx.x] = sum;
  __syncthreads();
#pragma unroll
  for (u32 h = NORM_SUM_LANES / 2; h >= WARP; h /= 2) {
    if (threadIdx.x < h) lanes[threadIdx.x] += lanes[threadIdx.x + h];
    __syncthreads();
  }
  sum = lanes[laneId()];
#pragma unroll
  for (u32 h = WARP / 2; h > 0; h /= 2) sum += __shfl_down_sync(ALL_LANES, sum, h);
  return sum;
}

KERNEL __launch_bounds__(NORM_THREADS) tensorNorms(TensorNorms op) {
  __shared__ double lanes[NORM_SUM_LANES];
  const Record r = loadRecord(op.list, blockIdx.x);
  const u64 chunks = (r.n + OPTIMIZER_CHUNK - 1) / OPTIMIZER_CHUNK;
  const float* partial = (const float*)op.partial + (u64)r.first * op.width;
  for (u32 j = 0; j < op.width; j++) {
    double sum = 0;
    for (u64 c = threadIdx.x; c < chunks; c += NORM_SUM_LANES) sum += (double)partial[c * op.width + j];
    if (j > 0) __syncthreads();
    sum = sumOfBlock(sum, lanes);
    if (threadIdx.x == 0) store<F32>(op.norms, (u64)blockIdx.x * op.width + j, (float)squareRoot64(sum));
  }
}

KERNEL __launch_bounds__(NORM_THREADS) clipCoefficient(ClipCoefficient op) {
  __shared__ double lanes[NORM_SUM_LANES];
  double sum = 0;
  for (u64 i = threadIdx.x; i < op.count; i += NORM_SUM_LANES) {
    const double norm = ((const float*)op.norms)[i];
    sum += norm * norm;
  }
  sum = sumOfBlock(sum, lanes);
  if (threadIdx.x != 0) return;
  const float norm = (float)squareRoot64(sum);
  const float coefficient = op.maxNorm / (norm + 1e-6f);
  store<F32>(op.result, 0, norm);
  const bool keeps = op.errors != 0 && (bitsOf(norm) & ABS) >= INFINITY_BITS;
  // Written so that the coefficient of a NaN is NaN.
  store<F32>(op.result, 1, keeps || coefficient >= 1.0f ? 1.0f : coefficient);
}
