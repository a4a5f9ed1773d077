/*
 * The update rules. Every operation is rounded by itself, in the order of asm/optimizer.ts; docs/numerics.md has the formulas.
 */
#pragma once
#include "list.cuh"

/* The numbers of a step that is made. */
struct Step {
  float gnormScale, beta1, rest1, beta2, rest2, beta3, rest3, step, eps, decay, l2, alpha, scale1, scale2, first, unit;
};
static_assert(SCALAR_GNORM_SCALE == 0 && SCALAR_BETA1 == 1 && SCALAR_REST1 == 2 && SCALAR_BETA2 == 3 && SCALAR_REST2 == 4 &&
                  SCALAR_BETA3 == 5 && SCALAR_REST3 == 6 && SCALAR_STEP == 7 && SCALAR_EPS == 8 && SCALAR_DECAY == 9 &&
                  SCALAR_L2 == 10 && SCALAR_ALPHA == 11 && SCALAR_SCALE1 == 12 && SCALAR_SCALE2 == 13 && SCALAR_FIRST == 14 &&
                  SCALAR_UNIT == 15 && STEP_ROW == 16,
              "a row is what src/core/optimizers.ts says");

DEVICE Step loadStep(const void* scalars, const void* guard, u32 known) {
  const u32 row = guard ? ((const u32*)guard)[GUARD_SKIPPED] - known : 0;
  const void* from = advance(scalars, (u64)row * STEP_ROW * 4);
  const uint4 a = loadCached16(from), b = loadCached16(advance(from, 16)), c = loadCached16(advance(from, 32)),
              d = loadCached16(advance(from, 48));
  return {floatOf(a.x), floatOf(a.y), floatOf(a.z), floatOf(a.w), floatOf(b.x), floatOf(b.y), floatOf(b.z), floatOf(b.w),
          floatOf(c.x), floatOf(c.y), floatOf(c.z), floatOf(c.w), floatOf(d.x), floatOf(d.y), floatOf(d.z), floatOf(d.w)};
}

DEVICE bool isSkipped(const void* guard) { return guard && ((const u32*)guard)[GUARD_SKIP] != 0; }

/* The factor of a record's update. */
DEVICE float stepOf(const Step& s, const void* ratios, u32 record) {
  return ratios ? s.step * __ldg((const float*)ratios + record) : s.step;
}

template <u32 FAMILY>
struct Family {
  static constexpr bool SECOND = FAMILY == FAMILY_ADAM || FAMILY == FAMILY_ADEMAMIX;
  /* States; the second moment, if there is one, is the last. */
  static constexpr u32 STATES = FAMILY == FAMILY_ADEMAMIX ? 3 : FAMILY == FAMILY_ADAM ? 2 : 1;
  static constexpr u32 FIRSTS = SECOND ? STATES - 1 : STATES;
  static constexpr bool DECAYS_BEFORE = FAMILY == FAMILY_LION;
  static constexpr bool DECAYS_AFTER = SECOND;
  static constexpr bool TAKES_L2 = !SECOND && FAMILY != FAMILY_LION;
  static constexpr bool TAKES_ROOT = SECOND || FAMILY == FAMILY_RMSPROP || FAMILY == FAMILY_ADAGRAD;
};

DEVICE float squareRoot(float x) {
  float y;
  asm("sqrt.rn.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/* The IEEE operations for any operand. */
struct Exact {
  static DEVICE float root(float x) { return squareRoot(x); }
  static DEVICE float inverse(float x) { return reciprocal(x); }
};

/*
 * What the compiler makes of them, without its tests: a root for 0 and from 2^-100 on, an inverse from 1e-30 to 2^125. See
 * plainReciprocal in blocks.cuh for how exact that is.
 */
constexpr u32 LEAST_ROOT = 0x0d800000;  // 2^-100
struct Plain {
  static DEVICE float root(float x) {
    float y;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(fmaxf(x, floatOf(LEAST_ROOT))));
    const float s = x * y;
    return __fmaf_rn(__fmaf_rn(-s, s, x), 0.5f * y, s);
  }
  static DEVICE float inverse(float x) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return __fmaf_rn(r, -__fmaf_rn(r, x, -1.0f), r);
  }
};

DEVICE float signOf(float x) { return x > 0 ? 1.0f : x < 0 ? -1.0f : x == 0 ? 0.0f : x; }

/*
 * One element: moves the states and gives the update. g has been scaled. The order of a second moment's factors is upstream's, which
 * differs between states in float32 and in 8 bits.
 */
template <u32 FAMILY, typename Math, bool BYTES>
DEVICE float update(const Step& s, float g, float* state) {
  if constexpr (FAMILY == FAMILY_ADAM) {
    state[0] = state[0] * s.beta1 + s.rest1 * g;
    state[1] = state[1] * s.beta2 + (BYTES ? s.rest2 * g * g : s.rest2 * (g * g));
    return state[0] * Math::inverse(Math::root(state[1]) + s.eps);
  } else if constexpr (FAMILY == FAMILY_ADEMAMIX) {
    state[0] = state[0] * s.beta1 + s.rest1 * g;
    state[1] = state[1] * s.beta3 + s.rest3 * g;
    state[2] = state[2] * s.beta2 + s.rest2 * g * g;
    return (state[0] * s.scale1 + s.alpha * state[1]) * Math::inverse(Math::root(state[2]) * s.scale2 + s.eps);
  } else if constexpr (FAMILY == FAMILY_MOMENTUM) {
    state[0] = s.first != 0 ? g : state[0] * s.beta1 + g;
    return state[0];
  } else if constexpr (FAMILY == FAMILY_LION) {
    const float u = signOf(state[0] * s.beta1 + s.rest1 * g);
    state[0] = state[0] * s.beta2 + s.rest2 * g;
    return u;
  } else {
    if constexpr (FAMILY == FAMILY_RMSPROP) state[0] = state[0] * s.beta1 + (BYTES ? s.rest1 * (g * g) : s.rest1 * g * g);
    else state[0] = state[0] + g * g;
    return g * Math::inverse(Math::root(state[0]) + s.eps);
  }
}

/*
 * One element from beginning to end: its new parameter, with the states moved. `grad` is the gradient as it is stored; BYTES: states
 * are 8-bit; a gradient to which the parameter has been added is rounded to the parameter's dtype only where they are not.
 */
template <u32 FAMILY, typename T, bool BYTES>
DEVICE float updateOne(const Step& s, float factor, float p, float grad, float* state, bool skipZeros, u32 dtype) {
  typedef Family<FAMILY> F;
  const float old = p;
  float kept[F::STATES];
#pragma unroll
  for (u32 i = 0; i < F::STATES; i++) kept[i] = state[i];
  float g = grad * s.gnormScale;
  if (F::TAKES_L2 && s.l2 != 0) {
    g = g + s.l2 * p;
    if (!BYTES) g = roundedTo<T>(g, dtype);
  }
  if (F::DECAYS_BEFORE && s.decay != 1) p = roundedTo<T>(p * s.decay, dtype);
  const float u = update<FAMILY, Exact, BYTES>(s, g, state);
  p = roundedTo<T>(p - factor * u, dtype);
  if (F::DECAYS_AFTER && s.decay != 1) p = roundedTo<T>(p * s.decay, dtype);
  if (!skipZeros || grad != 0) return p;
#pragma unroll
  for (u32 i = 0; i < F::STATES; i++) state[i] = kept[i];
  return old;
}

/* Where state `i` of a record lies, of elements of `bytes` bytes: AdEMAMix's two first moments lie one behind the other. */
template <u32 FAMILY>
DEVICE u8* stateOf(const Record& r, u32 i, u32 bytes) {
  if (i < Family<FAMILY>::FIRSTS) return r.state1 + i * r.n * bytes;
  return r.state2;
}

/* Where its scales lie. */
template <u32 FAMILY>
DEVICE float* scalesOf(const Record& r, u32 i) {
  if (i < Family<FAMILY>::FIRSTS) return r.absmax1 + i * ((r.n + OPTIMIZER_BLOCK - 1) / OPTIMIZER_BLOCK);
  return r.absmax2;
}
