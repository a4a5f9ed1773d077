/*
 * What the kernels share: element types, 16-byte vectors, reductions over lanes, faults.
 *
 * A kernel is written once, generic over its element type. No CUDA header is used, so that every compiler from NVRTC 11.8
 * on takes these files. Instructions of sm_80 have a plain twin for sm_72. Compiled without contraction, flushing or
 * approximate division: the numbers are those of asm/, bit for bit. NaN is written in one form per type.
 */
#pragma once
#include "generated/constants.cuh"
#include "generated/operands.cuh"

#define DEVICE __device__ __forceinline__
#define KERNEL extern "C" __global__ void

typedef unsigned char u8;
typedef signed char i8;
typedef unsigned short u16;
typedef int i32;
typedef unsigned u32;
typedef unsigned long long u64;

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define HAS_SM80 1
#else
#define HAS_SM80 0
#endif

constexpr u32 WARP = 32;
constexpr u32 ALL_LANES = 0xffffffff;
constexpr u32 ABS = 0x7fffffff;
constexpr u32 INFINITY_BITS = 0x7f800000;
constexpr u32 NAN_BITS = 0x7fc00000;
/* The smallest normal float32. */
constexpr float SMALLEST_NORMAL = 1.17549435e-38f;
/* 1.5 * 2^23 and 2^23: adding one leaves a small integer, rounded to nearest even, in the low bits. 2^21: so for quarters. */
constexpr float ROUND_SIGNED = 12582912.0f;
constexpr float ROUND_UNSIGNED = 8388608.0f;
constexpr float ROUND_QUARTERS = 2097152.0f;

// Arithmetic

DEVICE u32 bitsOf(float x) { return __float_as_uint(x); }
DEVICE float floatOf(u32 bits) { return __uint_as_float(bits); }

/* 1 / x, IEEE. */
DEVICE float reciprocal(float x) {
  float r;
  asm("rcp.rn.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

/* x with denormals flushed to zero. NaN stays: it exceeds no threshold. */
DEVICE float flushed(float x) { return fabsf(x) < SMALLEST_NORMAL ? 0.0f : x; }

/* x - least <= most - least, all unsigned. */
DEVICE bool isBetween(u32 x, u32 least, u32 most) { return x - least <= most - least; }

DEVICE u32 laneId() { return threadIdx.x & (WARP - 1); }
DEVICE u32 warpId() { return threadIdx.x / WARP; }

// Element types

struct F32 {
  typedef float Raw;
  static constexpr u32 BYTES = 4;
};
struct F16 {
  typedef u16 Raw;
  static constexpr u32 BYTES = 2;
};
struct BF16 {
  typedef u16 Raw;
  static constexpr u32 BYTES = 2;
};

template <typename A, typename B>
struct Same {
  static constexpr bool VALUE = false;
};
template <typename A>
struct Same<A, A> {
  static constexpr bool VALUE = true;
};

/* Elements in 16 bytes. */
template <typename T>
struct Lanes {
  static constexpr u32 COUNT = 16 / T::BYTES;
};

DEVICE float halfToFloat(u16 bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

/* One element as float32. */
template <typename T>
DEVICE float decode(typename T::Raw raw);
template <>
DEVICE float decode<F32>(float raw) { return raw; }
template <>
DEVICE float decode<F16>(u16 raw) { return halfToFloat(raw); }
template <>
DEVICE float decode<BF16>(u16 raw) { return floatOf((u32)raw << 16); }

template <typename T>
DEVICE float load(const void* p, u64 i) {
  return decode<T>(((const typename T::Raw*)p)[i]);
}

/* Two neighbours of a 16-bit type as float32. */
template <typename T>
DEVICE void decodePair(u32 word, float& low, float& high) {
  if (Same<T, BF16>::VALUE) {
    low = floatOf(word << 16);
    high = floatOf(word & 0xffff0000);
  } else {
    low = halfToFloat((u16)word);
    high = halfToFloat((u16)(word >> 16));
  }
}

/* float32 to the bits of a 16-bit type, nearest even. NaN in the type's one form. */
template <typename T>
DEVICE u32 encodeHalf(float x) {
  if (Same<T, BF16>::VALUE) {
    u32 bits = bitsOf(x);
    return x != x ? NAN_BITS >> 16 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  }
  u16 h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
  return x != x ? 0x7e00 : h;
}

/* Two float32, none of them NaN, as two elements of a 16-bit type. */
template <typename T>
DEVICE u32 encodePair(float low, float high) {
#if HAS_SM80
  u32 word;
  if (Same<T, BF16>::VALUE) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
#else
  return encodeHalf<T>(low) | encodeHalf<T>(high) << 16;
#endif
}

/* 16 bytes of elements from float32, none of them NaN. */
template <typename T>
DEVICE uint4 encodeVector(const float* y) {
  constexpr u32 LAST = Lanes<T>::COUNT - 4;
  if (T::BYTES == 4) return make_uint4(bitsOf(y[0]), bitsOf(y[1]), bitsOf(y[2]), bitsOf(y[3]));
  return make_uint4(encodePair<T>(y[0], y[1]), encodePair<T>(y[2], y[3]), encodePair<T>(y[LAST], y[LAST + 1]),
                    encodePair<T>(y[LAST + 2], y[LAST + 3]));
}

/* Two float32, NaN or not, as two elements of a 16-bit type. */
template <typename T>
DEVICE u32 encodeAnyPair(float low, float high) {
  constexpr u32 CANONICAL = Same<T, BF16>::VALUE ? NAN_BITS >> 16 : 0x7e00;
  const u32 word = encodePair<T>(low, high);
  const u32 half = low == low ? word : __byte_perm(word, CANONICAL, 0x3254);
  return high == high ? half : __byte_perm(half, CANONICAL, 0x5410);
}

/* 16 bytes of elements from float32, NaN or not. */
template <typename T>
DEVICE uint4 encodeAnyVector(const float* y) {
  if constexpr (T::BYTES == 4) {
    u32 w[4];
#pragma unroll
    for (u32 e = 0; e < 4; e++) w[e] = y[e] == y[e] ? bitsOf(y[e]) : NAN_BITS;
    return make_uint4(w[0], w[1], w[2], w[3]);
  } else {
    return make_uint4(encodeAnyPair<T>(y[0], y[1]), encodeAnyPair<T>(y[2], y[3]), encodeAnyPair<T>(y[4], y[5]),
                      encodeAnyPair<T>(y[6], y[7]));
  }
}

/* Stores any float32, rounded to T. */
template <typename T>
DEVICE void store(void* p, u64 i, float x) {
  if (T::BYTES == 4) ((u32*)p)[i] = x == x ? bitsOf(x) : NAN_BITS;
  else ((u16*)p)[i] = (u16)encodeHalf<T>(x);
}

/* Any float32, rounded to T, as float32. */
template <typename T>
DEVICE float rounded(float x) {
  if constexpr (T::BYTES == 4) return x;
  else return decode<T>((u16)encodeHalf<T>(x));
}

// Memory. Streams are read and written once, so they pass by the first cache.

DEVICE uint4 loadStream16(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

DEVICE uint2 loadStream8(const void* p) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}

DEVICE u32 loadStream4(const void* p) {
  u32 v;
  asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}

DEVICE u32 loadStream2(const void* p) {
  u16 v;
  asm volatile("ld.global.nc.L1::no_allocate.u16 %0, [%1];" : "=h"(v) : "l"(p));
  return v;
}

DEVICE void storeStream16(void* p, uint4 v) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

DEVICE bool isAligned(const void* p, u32 bytes) { return ((u64)p & (bytes - 1)) == 0; }

DEVICE const void* advance(const void* p, u64 bytes) { return (const u8*)p + bytes; }
DEVICE void* advance(void* p, u64 bytes) { return (u8*)p + bytes; }

/*
 * A barrier of one of up to eight groups of warps. Barrier 0 is the whole block's. The numbers are constants, because a block
 * that computes them is given all sixteen, of which a multiprocessor has few.
 */
DEVICE void groupBarrier(u32 group, u32 threads) {
  switch (group) {
    case 0: asm volatile("bar.sync 1, %0;" ::"r"(threads) : "memory"); break;
    case 1: asm volatile("bar.sync 2, %0;" ::"r"(threads) : "memory"); break;
    case 2: asm volatile("bar.sync 3, %0;" ::"r"(threads) : "memory"); break;
    case 3: asm volatile("bar.sync 4, %0;" ::"r"(threads) : "memory"); break;
    case 4: asm volatile("bar.sync 5, %0;" ::"r"(threads) : "memory"); break;
    case 5: asm volatile("bar.sync 6, %0;" ::"r"(threads) : "memory"); break;
    case 6: asm volatile("bar.sync 7, %0;" ::"r"(threads) : "memory"); break;
    default: asm volatile("bar.sync 8, %0;" ::"r"(threads) : "memory");
  }
}

// Magnitudes. As integers the bits of |x| order like the numbers, and every NaN counts as larger than infinity: so one
// maximum finds absmax and tells whether all are finite.

DEVICE u32 larger(u32 a, u32 b) { return a > b ? a : b; }

/* The larger halves of two words, each half the magnitude of an F16 or BF16; NaN beats all. */
template <typename T>
DEVICE u32 largerHalves(u32 a, u32 b) {
#if HAS_SM80
  u32 m;
  if (Same<T, BF16>::VALUE) asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(m) : "r"(a), "r"(b));
  else asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(m) : "r"(a), "r"(b));
  return m;
#else
  return larger(a & 0xffff0000, b & 0xffff0000) | larger(a & 0xffff, b & 0xffff);
#endif
}

/* The bits of a magnitude as those of a float32. */
template <typename T>
DEVICE u32 widened(u32 half) {
  return Same<T, BF16>::VALUE ? half << 16 : bitsOf(halfToFloat((u16)half));
}

/* The largest magnitudes of 16 bytes of elements: for 16-bit types one in each half of a word. */
template <typename T>
DEVICE u32 absmaxHalves(uint4 v) {
  constexpr u32 MASK = 0x7fff7fff;
  return largerHalves<T>(largerHalves<T>(v.x & MASK, v.y & MASK), largerHalves<T>(v.z & MASK, v.w & MASK));
}

DEVICE u32 absmaxWords(uint4 v) { return larger(larger(v.x & ABS, v.y & ABS), larger(v.z & ABS, v.w & ABS)); }

/* The largest magnitude of 16 bytes of elements, as the bits of a float32. */
template <typename T>
DEVICE u32 absmaxOfVector(uint4 v) {
  if constexpr (T::BYTES == 4) return absmaxWords(v);
  else {
    u32 m = absmaxHalves<T>(v);
    return larger(widened<T>(m & 0xffff), widened<T>(m >> 16));
  }
}

/* The largest of a value over the warp, in all lanes. */
DEVICE u32 largestOfWarp(u32 m) {
#if HAS_SM80
  return __reduce_max_sync(ALL_LANES, m);
#else
#pragma unroll
  for (u32 step = WARP / 2; step > 0; step /= 2) m = larger(m, __shfl_xor_sync(ALL_LANES, m, step));
  return m;
#endif
}

// Faults

/* Where a launch says that a block or row is not finite; no word where that is allowed. */
struct FaultSlot {
  u64* word;
  u32 key;
};
template <typename Op>
DEVICE FaultSlot faultSlot(const Op& op) { return {op.allowNonFinite ? nullptr : op.faultWord, op.faultKey}; }

/* Says that block (or row) `index` holds something that is not finite: the first launch wins, in it the smallest index. */
DEVICE void fault(FaultSlot slot, u64 index) {
  u64 low = index < 0xffffffff ? index : 0xffffffff;
  if (slot.word) atomicMin(slot.word, (u64)slot.key << 32 | low);
}
