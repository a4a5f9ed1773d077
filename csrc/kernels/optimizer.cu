/*
 * Optimizer steps on lists of tensors, with states in float32 and in 8 bits. The numbers are those of asm/optimizer.ts, bit for bit.
 */
#include "optimizer-state8.cuh"
#include "optimizer-wide.cuh"

#define UPDATES(FAMILY, family, P, G, types)                                                                                     \
  KERNEL __launch_bounds__(CHUNK_THREADS) optimizerUpdate32bit_##family##_##types(OptimizerUpdate32bit op) {                     \
    updateWide<FAMILY, P, G>(op);                                                                                                \
  }                                                                                                                              \
  KERNEL __launch_bounds__(STATE_THREADS, 2) optimizerUpdate8bitBlockwise_##family##_##types(OptimizerUpdate8bitBlockwise op) {  \
    updateState8<FAMILY, P, G>(op);                                                                                              \
  }
#define FAMILY_UPDATES(FAMILY, family)              \
  UPDATES(FAMILY, family, F32, F32, f32)            \
  UPDATES(FAMILY, family, F16, F16, f16)            \
  UPDATES(FAMILY, family, BF16, BF16, bf16)         \
  UPDATES(FAMILY, family, AnyType, AnyType, mixed)
FAMILY_UPDATES(FAMILY_ADAM, adam)
FAMILY_UPDATES(FAMILY_ADEMAMIX, ademamix)
FAMILY_UPDATES(FAMILY_MOMENTUM, momentum)
FAMILY_UPDATES(FAMILY_RMSPROP, rmsprop)
FAMILY_UPDATES(FAMILY_ADAGRAD, adagrad)
FAMILY_UPDATES(FAMILY_LION, lion)

// Norms of parameters and of the updates that a step would make: a warp takes a chunk, 256 elements at a time.

struct WideStates {
  static constexpr bool BYTES = false;
  template <u32 FAMILY>
  static DEVICE void load(const OptimizerNorms32bit&, const Record& r, u64 e, float* state) {
#pragma unroll
    for (u32 i = 0; i < Family<FAMILY>::STATES; i++) state[i] = __ldg((const float*)stateOf<FAMILY>(r, i, 4) + e);
  }
};
struct ByteStates {
  static constexpr bool BYTES = true;
  template <u32 FAMILY>
  static DEVICE void load(const OptimizerNorms8bitBlockwise& op, const Record& r, u64 e, float* state) {
#pragma unroll
    for (u32 i = 0; i < Family<FAMILY>::STATES; i++) {
      const float* code = (const float*)(i < Family<FAMILY>::FIRSTS ? op.code1 : op.code2);
      state[i] = __ldg(code + __ldg(stateOf<FAMILY>(r, i, 1) + e)) * __ldg(scalesOf<FAMILY>(r, i) + e / OPTIMIZER_BLOCK);
    }
  }
};

template <u32 FAMILY, typename States, typename Op>
DEVICE void norms(const Op& op) {
  const u64 chunkAt = (u64)blockIdx.x * (CHUNK_THREADS / WARP) + warpId();
  if (chunkAt >= op.count || isSkipped(op.guard)) return;
  const Step s = loadStep(op.scalars, op.guard, op.known);
  const Chunk chunk = chunkOf(op.list, recordOf(op.chunks, chunkAt), chunkAt);
  const Record& r = chunk.record;
  const u64 end = chunk.begin + chunk.count;
  float ofP[8] = {0, 0, 0, 0, 0, 0, 0, 0}, ofU[8] = {0, 0, 0, 0, 0, 0, 0, 0};
#pragma unroll 1
  for (u64 at = chunk.begin + laneId() * 8; at < end; at += 8 * WARP) {
    float p[8], g[8];
    loadEightSafely<AnyType>(r.p, at, end, p, op.dtype);
    loadEightSafely<AnyType>(r.g, at, end, g, op.gradDtype);
#pragma unroll
    for (u32 e = 0; e < 8; e++) {
      if (at + e >= end) break;
      float state[Family<FAMILY>::STATES];
      States::template load<FAMILY>(op, r, at + e, state);
      float u = update<FAMILY, Exact, States::BYTES>(s, g[e] * s.gnormScale, state);
      if (FAMILY == FAMILY_LION) u = state[0];
      if (op.skipZeros && g[e] == 0) u = 0;
      ofP[e] += p[e] * p[e];
      ofU[e] += u * u;
    }
  }
  const float sumP = sumOfLanes(ofP), sumU = sumOfLanes(ofU);
  if (laneId() == 0) {
    store<F32>(op.partial, 2 * chunkAt, sumP);
    store<F32>(op.partial, 2 * chunkAt + 1, sumU);
  }
}

#define NORMS(FAMILY, family)                                                                              \
  KERNEL __launch_bounds__(CHUNK_THREADS) optimizerNorms32bit_##family(OptimizerNorms32bit op) {           \
    norms<FAMILY, WideStates>(op);                                                                         \
  }                                                                                                        \
  KERNEL __launch_bounds__(CHUNK_THREADS) optimizerNorms8bitBlockwise_##family(OptimizerNorms8bitBlockwise op) { \
    norms<FAMILY, ByteStates>(op);                                                                         \
  }
NORMS(FAMILY_ADAM, adam)
NORMS(FAMILY_ADEMAMIX, ademamix)
NORMS(FAMILY_MOMENTUM, momentum)
NORMS(FAMILY_RMSPROP, rmsprop)
NORMS(FAMILY_ADAGRAD, adagrad)
NORMS(FAMILY_LION, lion)

/* ratios[t]: what record t's update is multiplied by. */
KERNEL __launch_bounds__(CHUNK_THREADS) optimizerRatios(OptimizerRatios op) {
  const u64 t = (u64)blockIdx.x * CHUNK_THREADS + threadIdx.x;
  if (t >= op.records || isSkipped(op.guard)) return;
  const Step s = loadStep(op.scalars, op.guard, op.known);
  const float* norms = (const float*)op.norms + 2 * t;
  const float bound = op.maxUnorm * norms[0] + op.eps;
  const float u = s.unit * norms[1];
  float ratio = 1;
  if (u > bound) asm("div.rn.f32 %0, %1, %2;" : "=f"(ratio) : "f"(bound), "f"(u));
  store<F32>(op.ratios, t, ratio);
}
