/*
 * Optimizers with 8-bit states. A warp takes a block of 256 elements, a block of threads the sixteen of a chunk, and the grid walks over
 * the chunks, so that tables are loaded once. The fast way is for plain blocks: whole, aligned, finite, with scales, roots and inverses
 * where the short forms are exact. A warp remembers the others of a round, and does them by plain formulas at its end.
 */
#pragma once
#include "optimizer.cuh"

constexpr u32 STATE_WARPS = STATE_THREADS / WARP;
static_assert(STATE_WARPS * OPTIMIZER_BLOCK == OPTIMIZER_CHUNK && OPTIMIZER_BLOCK == 8 * WARP, "a warp has a block of a chunk");

// The tables in shared memory, in words.

/* Search entries of the magnitudes from 2^-23 to 2: below lies no boundary. */
constexpr u32 STATE_BINS = 24 << (23 - SEARCH_SHIFT);
constexpr u32 FIRST_BIN = 0x3400;
static_assert(SEARCH_SHIFT == 16, "a bin has 2^16 values");
/* Of the signed map: where the lower 12 bits of a positive value's bin say, and 0x1000 further for a negative one. */
constexpr u32 SIGNED_BINS = FIRST_BIN & 0xfff;
/* Values of codes, for four lanes side by side, in the gaps before each half. */
constexpr u32 COPIES = 4;
constexpr u32 SIGNED_VALUES = 0;
constexpr u32 UNSIGNED_VALUES = 0x1000;
constexpr u32 UNSIGNED_BINS = 0x2000;
static_assert(256 * COPIES <= SIGNED_BINS && STATE_BINS + SIGNED_BINS == 0x1000, "the tables fill each other's gaps");
template <u32 FAMILY>
struct Tables {
  static constexpr u32 WORDS = Family<FAMILY>::SECOND ? UNSIGNED_BINS + STATE_BINS : UNSIGNED_BINS;
};
static_assert(Tables<FAMILY_ADAM>::WORDS * 4 == STATE_TABLE_BYTES && Tables<FAMILY_LION>::WORDS * 4 == ONE_STATE_TABLE_BYTES,
              "as the launches say");

extern __shared__ __align__(128) u8 dynamicShared[];

/* The tables begin at an address that instructions hold. A driver that kept more for itself would have to be noticed. */
DEVICE u32* tablesInShared() {
  const u32 begin = (u32)__cvta_generic_to_shared(dynamicShared);
  if (begin > SHARED_BASE) __trap();
  return (u32*)(dynamicShared + (SHARED_BASE - begin));
}

/* A word of the tables, from its offset in bytes behind word AT. */
template <u32 AT>
DEVICE u32 tableWord(u32 offset) {
  u32 v;
  asm("ld.shared.u32 %0, [%1 + %2];" : "=r"(v) : "r"(offset), "n"(SHARED_BASE + 4 * (i32)AT));
  return v;
}

template <u32 FAMILY>
DEVICE void loadTables(u32* tables, const OptimizerUpdate8bitBlockwise& op) {
  const u32* first = (const u32*)advance(op.table1, SEARCH_HEADER);
#pragma unroll 4
  for (u32 i = threadIdx.x; i < STATE_BINS; i += STATE_THREADS) {
    const u32 bin = FIRST_BIN + i;
    tables[SIGNED_BINS + i] = __ldg(first + bin);
    // The entry for inverted bits, as one for plain ones that gives the complement of the code.
    tables[0x1000 + SIGNED_BINS + i] = 0x80000000u - __ldg(first + (0x7fff - bin));
  }
  for (u32 i = threadIdx.x; i < 256 * COPIES; i += STATE_THREADS)
    tables[SIGNED_VALUES + i] = __ldg((const u32*)op.code1 + i / COPIES);
  if constexpr (Family<FAMILY>::SECOND) {
    const u32* second = (const u32*)advance(op.table2, SEARCH_HEADER);
#pragma unroll 4
    for (u32 i = threadIdx.x; i < STATE_BINS; i += STATE_THREADS) tables[UNSIGNED_BINS + i] = __ldg(second + (FIRST_BIN + i));
    for (u32 i = threadIdx.x; i < 256 * COPIES; i += STATE_THREADS)
      tables[UNSIGNED_VALUES + i] = __ldg((const u32*)op.code2 + i / COPIES);
  }
}

/* The values of eight codes, times a scale. */
template <u32 VALUES>
DEVICE void decodeCodes(uint2 q, float scale, float* x) {
  const u32 copy = laneId() % COPIES * 4;
#pragma unroll
  for (u32 k = 0; k < 8; k++) {
    const u32 word = k < 4 ? q.x : q.y;
    const u32 code = k % 4 == 0 ? word << 4 : word >> (k % 4 * 8 - 4);
    x[k] = floatOf(tableWord<VALUES>((code & 0xff0) | copy)) * scale;
  }
}

/* Of a scaled value: what has its code (SIGNED: for a negative one the complement of its code) in the top byte. */
template <bool SIGNED>
DEVICE u32 lookUp(float s) {
  const u32 magnitude = bitsOf(fmaxf(fabsf(s), LEAST_STATE_BIN));
  if constexpr (SIGNED) {
    u32 index;
    asm("lop3.b32 %0, %1, %2, 0xfff, 0xe4;" : "=r"(index) : "r"(magnitude >> 16), "r"(bitsOf(s) >> 19));
    return tableWord<0>(index * 4) + magnitude;
  } else {
    return tableWord<UNSIGNED_BINS - FIRST_BIN>(magnitude >> 14 & ~3u) + magnitude;
  }
}

/* The codes of four scaled values in the order of memory. */
template <bool SIGNED>
DEVICE u32 codes4(const float* s) {
  const u32 ab = __byte_perm(lookUp<SIGNED>(s[0]), lookUp<SIGNED>(s[1]), 0x0073);
  const u32 cd = __byte_perm(lookUp<SIGNED>(s[2]), lookUp<SIGNED>(s[3]), 0x0073);
  const u32 codes = __byte_perm(ab, cd, 0x5410);
  if constexpr (!SIGNED) return codes;
  // Selecting with 8 added repeats the sign of a byte.
  u32 signAB, signCD;
  asm("prmt.b32 %0, %1, %2, 0x00fb;" : "=r"(signAB) : "r"(bitsOf(s[0])), "r"(bitsOf(s[1])));
  asm("prmt.b32 %0, %1, %2, 0x00fb;" : "=r"(signCD) : "r"(bitsOf(s[2])), "r"(bitsOf(s[3])));
  return codes ^ __byte_perm(signAB, signCD, 0x5410);
}

// Any block, by plain formulas.

/* The code of any s by halving, ties to the even index; NaN gives 0. */
DEVICE u32 nearestCode(float s, const float* code) {
  u32 high = 0;
#pragma unroll 1
  for (u32 step = 128; step > 0; step /= 2) high += __ldg(code + high + step - 1) < s ? step : 0;
  if (high == 0) return 0;
  const u32 low = high - 1;
  const float middle = (__ldg(code + low) + __ldg(code + high)) * 0.5f;
  if (s > middle) return high;
  return s == middle ? high & ~1u : low;
}

/* The code of state s in a block with this scale. `signedMap`: a negative value never gets the zero's code. */
DEVICE u32 codeOfState(float s, float absmax, bool plainScale, float inverse, const float* code, bool signedMap) {
  if (absmax == 0) return signedMap ? ZERO_CODE_FIRST : ZERO_CODE_SECOND;
  float scaled = s * inverse;
  if (!plainScale) asm("div.rn.f32 %0, %1, %2;" : "=f"(scaled) : "f"(s), "f"(absmax));
  if (scaled != scaled) return 0;
  const u32 c = nearestCode(scaled, code);
  return signedMap && (bitsOf(s) >> 31) && __ldg(code + c) == 0 ? c - 1 : c;
}

template <u32 FAMILY, typename P, typename G>
struct SlowBlock {
  typedef Family<FAMILY> F;
  const OptimizerUpdate8bitBlockwise& op;
  const Record& r;
  const Step& s;
  const float factor;
  const u64 begin;

  DEVICE float element(u64 e, const float* scale, float* state) const {
#pragma unroll
    for (u32 i = 0; i < F::STATES; i++) {
      const float* code = (const float*)(i < F::FIRSTS ? op.code1 : op.code2);
      state[i] = __ldg(code + stateOf<FAMILY>(r, i, 1)[e]) * scale[i];
    }
    return updateOne<FAMILY, P, true>(s, factor, loadOne<P>(r.p, e, op.dtype), loadOne<G>(r.g, e, op.gradDtype), state,
                                       op.skipZeros != 0, op.dtype);
  }

  /* Twice over the elements: for the new scales, then to write. A lane has the same ones both times. */
  DEVICE void run() const {
    const u64 block = begin / OPTIMIZER_BLOCK;
    const u64 end = begin + OPTIMIZER_BLOCK < r.n ? begin + OPTIMIZER_BLOCK : r.n;
    float scale[F::STATES], absmax[F::STATES], inverse[F::STATES];
    u32 largest[F::STATES];
    bool plainScale[F::STATES];
#pragma unroll
    for (u32 i = 0; i < F::STATES; i++) {
      scale[i] = scalesOf<FAMILY>(r, i)[block];
      absmax[i] = 0;
      largest[i] = 0;
    }
#pragma unroll 1
    for (u64 e = begin + laneId(); e < end; e += WARP) {
      float state[F::STATES];
      element(e, scale, state);
#pragma unroll
      for (u32 i = 0; i < F::STATES; i++) {
        absmax[i] = fmaxf(absmax[i], fabsf(state[i]));
        largest[i] = larger(largest[i], bitsOf(state[i]) & ABS);
      }
    }
#pragma unroll
    for (u32 i = 0; i < F::STATES; i++) {
      absmax[i] = floatOf(largestOfWarp(bitsOf(absmax[i])));
      // Decaying, a denormal scale comes to rest before it is 0.
      if (absmax[i] < SMALLEST_NORMAL) absmax[i] = 0;
      // With NaN among them the largest is none to go by, but it tells.
      plainScale[i] = largestOfWarp(largest[i]) < INFINITY_BITS && absmax[i] >= LEAST_STATE_SCALE && absmax[i] <= MOST_STATE_SCALE;
      inverse[i] = reciprocal(absmax[i]);
    }
    __syncwarp();
#pragma unroll 1
    for (u64 e = begin + laneId(); e < end; e += WARP) {
      float state[F::STATES];
      const float p = element(e, scale, state);
      storeOne<P>(r.p, e, p, op.dtype);
#pragma unroll
      for (u32 i = 0; i < F::STATES; i++) {
        const bool first = i < F::FIRSTS;
        const float* code = (const float*)(first ? op.code1 : op.code2);
        stateOf<FAMILY>(r, i, 1)[e] = (u8)codeOfState(state[i], absmax[i], plainScale[i], inverse[i], code, first);
      }
    }
    if (laneId() == 0) {
#pragma unroll
      for (u32 i = 0; i < F::STATES; i++) scalesOf<FAMILY>(r, i)[block] = absmax[i];
    }
  }
};

// Plain blocks.

template <u32 FAMILY>
DEVICE bool isStateAligned(const Record& r) {
  u64 bits = ((u64)r.p | (u64)r.g) & 15;
#pragma unroll
  for (u32 i = 0; i < Family<FAMILY>::STATES; i++) bits |= (u64)stateOf<FAMILY>(r, i, 1) & 7;
  return bits == 0;
}

DEVICE void storeCodes(u8* p, uint2 v) {
  asm volatile("st.global.cs.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(v.x), "r"(v.y) : "memory");
}

/* The block of a chunk that is this warp's: where it begins. */
DEVICE u64 blockBegin(const Record& r, u32 chunk) { return (u64)(chunk - r.first) * OPTIMIZER_CHUNK + warpId() * OPTIMIZER_BLOCK; }

/* This warp's block of a chunk; false, and nothing written, when there is one that is not plain. */
template <u32 FAMILY, typename P, typename G>
DEVICE bool plainBlock(const OptimizerUpdate8bitBlockwise& op, u32 record, u32 chunk, const Step& s) {
  typedef Family<FAMILY> F;
  Record r = loadRecord(op.list, record);
  u64 begin = blockBegin(r, chunk);
  if (begin >= r.n) return true;
  if (begin + OPTIMIZER_BLOCK > r.n || !isStateAligned<FAMILY>(r)) return false;
  u64 at = begin + laneId() * 8;
  u64 block = begin / OPTIMIZER_BLOCK;
  const float factor = stepOf(s, op.ratios, record);
  const Eight pBits = loadEight<P>(r.p, at, op.dtype);
  const Eight gBits = loadEight<G>(r.g, at, op.gradDtype);
  uint2 q[F::STATES];
  float scale[F::STATES];
#pragma unroll
  for (u32 i = 0; i < F::STATES; i++) {
    q[i] = loadOwn8(stateOf<FAMILY>(r, i, 1) + at);
    scale[i] = scalesOf<FAMILY>(r, i)[block];
  }
  // What the next round wants, where it is of the same tensor, comes into the second cache meanwhile. With three states registers are short.
  const u64 next = at + (u64)gridDim.x * OPTIMIZER_CHUNK;
  if (F::STATES < 3 && next + OPTIMIZER_BLOCK <= r.n) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(r.p + next * bytesOf<P>(op.dtype)));
    asm volatile("prefetch.global.L2 [%0];" ::"l"(r.g + next * bytesOf<G>(op.gradDtype)));
#pragma unroll
    for (u32 i = 0; i < F::STATES; i++) asm volatile("prefetch.global.L2 [%0];" ::"l"(stateOf<FAMILY>(r, i, 1) + next));
  }
  float state[F::STATES][8], p[8], g[8];
#pragma unroll
  for (u32 i = 0; i < F::FIRSTS; i++) decodeCodes<SIGNED_VALUES>(q[i], scale[i], state[i]);
  if constexpr (F::SECOND) decodeCodes<UNSIGNED_VALUES>(q[F::FIRSTS], scale[F::FIRSTS], state[F::FIRSTS]);
  decodeEight<P>(pBits, p, op.dtype);
  decodeEight<G>(gBits, g, op.gradDtype);
  if constexpr (F::DECAYS_BEFORE) {
    if (s.decay != 1) {
#pragma unroll
      for (u32 e = 0; e < 8; e++) p[e] *= s.decay;
      roundEight<P>(p, op.dtype);
    }
  }
  // One less than the bits of the least root operand that is not 0.
  u32 least = 0xffffffff;
#pragma unroll
  for (u32 e = 0; e < 8; e++) {
    float one[F::STATES];
#pragma unroll
    for (u32 i = 0; i < F::STATES; i++) one[i] = state[i][e];
    float x = g[e] * s.gnormScale;
    if (F::TAKES_L2) x = s.l2 != 0 ? x + s.l2 * p[e] : x;
    const float u = update<FAMILY, Plain, true>(s, x, one);
    p[e] = p[e] - factor * u;
#pragma unroll
    for (u32 i = 0; i < F::STATES; i++) state[i][e] = one[i];
    if constexpr (F::TAKES_ROOT) {
      const u32 bits = bitsOf(one[F::STATES - 1]) - 1;
      least = bits < least ? bits : least;
    }
  }
  if constexpr (F::DECAYS_AFTER) {
    if (s.decay != 1) {
      roundEight<P>(p, op.dtype);
#pragma unroll
      for (u32 e = 0; e < 8; e++) p[e] *= s.decay;
    }
  }
  bool plain = !F::TAKES_ROOT || least >= LEAST_ROOT - 1;
  // NaN or infinity in any of them, since the rest are zeros.
  float poison = 0;
#pragma unroll
  for (u32 e = 0; e < 8; e++) poison = __fmaf_rn(p[e], 0.0f, poison);
  plain = plain && poison == 0;
  u32 absmax[F::STATES];
#pragma unroll
  for (u32 i = 0; i < F::STATES; i++) {
    // What a root is taken of keeps its sign, so that a negative one is not plain. NaN in others has made a parameter NaN.
    constexpr u32 ROOTED = F::TAKES_ROOT ? F::STATES - 1 : F::STATES;
    u32 m = 0;
    float f = 0;
#pragma unroll
    for (u32 e = 0; e < 8; e++) {
      if (i == ROOTED) m = larger(m, bitsOf(state[i][e]));
      else f = fmaxf(f, fabsf(state[i][e]));
    }
    absmax[i] = largestOfWarp(i == ROOTED ? m : bitsOf(f));
    plain = plain && (absmax[i] == 0 || isBetween(absmax[i], bitsOf(LEAST_STATE_SCALE), bitsOf(MOST_STATE_SCALE)));
  }
  if (!__all_sync(ALL_LANES, plain)) return false;
  // Again, so that no register has held it all the while.
  r = loadRecord(op.list, record);
  begin = blockBegin(r, chunk);
  at = begin + laneId() * 8;
  block = begin / OPTIMIZER_BLOCK;
  storeEight<P>(r.p, at, encodeFiniteEight<P>(p, op.dtype), op.dtype);
#pragma unroll
  for (u32 i = 0; i < F::STATES; i++) {
    const float inverse = Plain::inverse(floatOf(absmax[i]));
    float scaled[8];
#pragma unroll
    for (u32 e = 0; e < 8; e++) scaled[e] = state[i][e] * inverse;
    uint2 codes;
    if (F::SECOND && i == F::FIRSTS) codes = make_uint2(codes4<false>(scaled), codes4<false>(scaled + 4));
    else codes = make_uint2(codes4<true>(scaled), codes4<true>(scaled + 4));
    if (absmax[i] == 0) codes.x = codes.y = (i < F::FIRSTS ? ZERO_CODE_FIRST : ZERO_CODE_SECOND) * 0x01010101u;
    storeCodes(stateOf<FAMILY>(r, i, 1) + at, codes);
    if (laneId() == 0) scalesOf<FAMILY>(r, i)[block] = floatOf(absmax[i]);
  }
  return true;
}

template <u32 FAMILY, typename P, typename G>
DEVICE void updateState8(const OptimizerUpdate8bitBlockwise& op) {
  if (isSkipped(op.guard)) return;
  const u32 count = (u32)op.count;
  const Step s = loadStep(op.scalars, op.guard, op.known);
  loadTables<FAMILY>(tablesInShared(), op);
  __syncthreads();
  // Where an inverse might be none of the short form's, all is slow.
  const bool roots = !Family<FAMILY>::TAKES_ROOT || (s.eps >= 1e-30f && s.eps <= 1e30f);
  const bool fast = roots && op.skipZeros == 0 && (FAMILY != FAMILY_ADEMAMIX || (s.scale2 > 0 && s.scale2 <= 1e15f));
  u32 chunk = blockIdx.x;
#pragma unroll 1
  while (chunk < count) {
    // Bit i: this warp's block of the round's chunk i is still to be done.
    u32 left = 0, bit = 1;
    u32 record = recordOf(op.chunks, chunk);
#pragma unroll 1
    for (; bit != 0 && chunk < count; bit <<= 1) {
      const u32 next = chunk + gridDim.x;
      const u32 nextRecord = next < count ? recordOf(op.chunks, next) : 0;
      if (!fast || !plainBlock<FAMILY, P, G>(op, record, chunk, s)) left |= bit;
      record = nextRecord;
      chunk = next;
    }
    if (left == 0) continue;
    const u32 first = chunk - (bit == 0 ? 32 : __ffs(bit) - 1) * gridDim.x;
#pragma unroll 1
    for (; left != 0; left &= left - 1) {
      const u32 slow = first + (__ffs(left) - 1) * gridDim.x;
      const u32 at = recordOf(op.chunks, slow);
      const Record r = loadRecord(op.list, at);
      const u64 begin = blockBegin(r, slow);
      if (begin < r.n) SlowBlock<FAMILY, P, G>{op, r, s, stepOf(s, op.ratios, at), begin}.run();
    }
  }
}
