/*
 * Optimizers with states in float32. A block takes a chunk; a thread, of a whole and aligned one, twice eight elements whose loads all come
 * before the arithmetic.
 */
#pragma once
#include "optimizer.cuh"

constexpr u32 THREAD_EIGHTS = OPTIMIZER_CHUNK / (8 * CHUNK_THREADS);

/* Whether all that a chunk of this record touches is aligned to 16 bytes. */
template <u32 FAMILY>
DEVICE bool isWideAligned(const Record& r) {
  u64 bits = (u64)r.p | (u64)r.g;
#pragma unroll
  for (u32 i = 0; i < Family<FAMILY>::STATES; i++) bits |= (u64)stateOf<FAMILY>(r, i, 4);
  return (bits & 15) == 0;
}

template <u32 FAMILY, typename P, typename G>
struct WideEight {
  static constexpr u32 STATES = Family<FAMILY>::STATES;
  Eight p, g, state[STATES];

  DEVICE void load(const Record& r, u64 at, u32 dtype, u32 gradDtype) {
    p = loadEight<P>(r.p, at, dtype);
    g = loadEight<G>(r.g, at, gradDtype);
#pragma unroll
    for (u32 i = 0; i < STATES; i++) state[i] = loadEight<F32>(stateOf<FAMILY>(r, i, 4), at, DTYPE_F32);
  }

  DEVICE void update(const Record& r, u64 at, const Step& s, float factor, bool skipZeros, u32 dtype, u32 gradDtype) {
    float pv[8], gv[8], sv[STATES][8];
    decodeEight<P>(p, pv, dtype);
    decodeEight<G>(g, gv, gradDtype);
#pragma unroll
    for (u32 i = 0; i < STATES; i++) decodeEight<F32>(state[i], sv[i], DTYPE_F32);
#pragma unroll
    for (u32 e = 0; e < 8; e++) {
      float one[STATES];
#pragma unroll
      for (u32 i = 0; i < STATES; i++) one[i] = sv[i][e];
      pv[e] = updateOne<FAMILY, P, false>(s, factor, pv[e], gv[e], one, skipZeros, dtype);
#pragma unroll
      for (u32 i = 0; i < STATES; i++) sv[i][e] = one[i];
    }
    storeEight<P>(r.p, at, encodeEight<P>(pv, dtype), dtype);
#pragma unroll
    for (u32 i = 0; i < STATES; i++) storeEight<F32>(stateOf<FAMILY>(r, i, 4), at, encodeEight<F32>(sv[i], DTYPE_F32), DTYPE_F32);
  }
};

template <u32 FAMILY, typename P, typename G>
DEVICE void updateWide(const OptimizerUpdate32bit& op) {
  constexpr u32 STATES = Family<FAMILY>::STATES;
  if (isSkipped(op.guard)) return;
  const u32 at = recordOf(op.chunks, blockIdx.x);
  const Step s = loadStep(op.scalars, op.guard, op.known);
  const Chunk chunk = chunkOf(op.list, at, blockIdx.x);
  const Record& r = chunk.record;
  const float factor = stepOf(s, op.ratios, at);
  const bool skipZeros = op.skipZeros != 0;
  if (chunk.count == OPTIMIZER_CHUNK && isWideAligned<FAMILY>(r)) {
    WideEight<FAMILY, P, G> v[THREAD_EIGHTS];
#pragma unroll
    for (u32 u = 0; u < THREAD_EIGHTS; u++)
      v[u].load(r, chunk.begin + (u * CHUNK_THREADS + threadIdx.x) * 8, op.dtype, op.gradDtype);
#pragma unroll
    for (u32 u = 0; u < THREAD_EIGHTS; u++)
      v[u].update(r, chunk.begin + (u * CHUNK_THREADS + threadIdx.x) * 8, s, factor, skipZeros, op.dtype, op.gradDtype);
    return;
  }
#pragma unroll 1
  for (u32 i = threadIdx.x; i < chunk.count; i += CHUNK_THREADS) {
    const u64 e = chunk.begin + i;
    float state[STATES];
#pragma unroll
    for (u32 k = 0; k < STATES; k++) state[k] = load<F32>(stateOf<FAMILY>(r, k, 4), e);
    const float p = updateOne<FAMILY, P, false>(s, factor, loadOne<P>(r.p, e, op.dtype), loadOne<G>(r.g, e, op.gradDtype), state,
                                               skipZeros, op.dtype);
    storeOne<P>(r.p, e, p, op.dtype);
#pragma unroll
    for (u32 k = 0; k < STATES; k++) store<F32>(stateOf<FAMILY>(r, k, 4), e, state[k]);
  }
}
