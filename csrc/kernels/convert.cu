/*
 * Element type conversions. Into f16 and bf16: nearest even, overflow to infinity. Into integers: truncated and saturated,
 * NaN gives 0; between integers: saturated. Between integers and halves by way of f32. asm/convert.ts is the twin.
 */
#include "common.cuh"

constexpr u32 THREADS = CONVERT_THREADS;
constexpr u32 TILE = CONVERT_TILE;

struct I8 {
  typedef i8 Raw;
  static constexpr u32 BYTES = 1;
  static constexpr i32 LEAST = -128, MOST = 127;
};
struct U8 {
  typedef u8 Raw;
  static constexpr u32 BYTES = 1;
  static constexpr i32 LEAST = 0, MOST = 255;
};
struct I32 {
  typedef i32 Raw;
  static constexpr u32 BYTES = 4;
};

template <typename T>
struct Integral {
  static constexpr bool VALUE = Same<T, I8>::VALUE || Same<T, U8>::VALUE || Same<T, I32>::VALUE;
};

DEVICE i32 truncated(float x) {
  i32 i;
  asm("cvt.rzi.s32.f32 %0, %1;" : "=r"(i) : "f"(x));
  return x == x ? i : 0;
}

template <typename To>
struct Encode {
  static DEVICE u16 of(float x) { return (u16)encodeHalf<To>(x); }
};
template <>
struct Encode<F32> {
  static DEVICE float of(float x) { return x == x ? x : floatOf(NAN_BITS); }
};
template <typename To>
struct Saturate {
  static DEVICE typename To::Raw of(i32 x) {
    return (typename To::Raw)(x < To::LEAST ? To::LEAST : x > To::MOST ? To::MOST : x);
  }
};
template <>
struct Saturate<I32> {
  static DEVICE i32 of(i32 x) { return x; }
};

/* One conversion by the kinds of its types. */
template <typename From, typename To, bool FROM_INTEGRAL, bool TO_INTEGRAL>
struct Cast;
template <typename From, typename To>
struct Cast<From, To, false, false> {
  static DEVICE typename To::Raw of(typename From::Raw x) { return Encode<To>::of(decode<From>(x)); }
};
template <typename From, typename To>
struct Cast<From, To, false, true> {
  static DEVICE typename To::Raw of(typename From::Raw x) { return Saturate<To>::of(truncated(decode<From>(x))); }
};
template <typename From, typename To>
struct Cast<From, To, true, false> {
  static DEVICE typename To::Raw of(typename From::Raw x) { return Encode<To>::of((float)x); }
};
template <typename From, typename To>
struct Cast<From, To, true, true> {
  static DEVICE typename To::Raw of(typename From::Raw x) { return Saturate<To>::of(x); }
};
/* Of the same type: the same bits. */
template <typename T>
struct Cast<T, T, false, false> {
  static DEVICE typename T::Raw of(typename T::Raw x) { return x; }
};

template <typename Raw>
struct __align__(4 * sizeof(Raw)) Four {
  Raw a, b, c, d;
};

template <typename From, typename To>
DEVICE void convertTile(const Convert& op) {
  typedef Cast<From, To, Integral<From>::VALUE, Integral<To>::VALUE> Cast;
  typedef Four<typename From::Raw> In;
  typedef Four<typename To::Raw> Out;
  const typename From::Raw* x = (const typename From::Raw*)op.x;
  typename To::Raw* y = (typename To::Raw*)op.y;
  u64 tile = (u64)blockIdx.x * TILE;
  if (op.n - tile >= TILE && isAligned(x, sizeof(In)) && isAligned(y, sizeof(Out))) {
#pragma unroll
    for (u32 u = 0; u < TILE / (4 * THREADS); u++) {
      u64 i = tile + (u * THREADS + threadIdx.x) * 4;
      In v = *(const In*)(x + i);
      *(Out*)(y + i) = {Cast::of(v.a), Cast::of(v.b), Cast::of(v.c), Cast::of(v.d)};
    }
  } else {
    u64 end = op.n - tile < TILE ? op.n : tile + TILE;
    for (u64 i = tile + threadIdx.x; i < end; i += THREADS) y[i] = Cast::of(x[i]);
  }
}

template <typename From>
DEVICE void convertFrom(const Convert& op) {
  switch (op.to) {
    case DTYPE_F32: return convertTile<From, F32>(op);
    case DTYPE_F16: return convertTile<From, F16>(op);
    case DTYPE_BF16: return convertTile<From, BF16>(op);
    case DTYPE_I8: return convertTile<From, I8>(op);
    case DTYPE_U8: return convertTile<From, U8>(op);
    case DTYPE_I32: return convertTile<From, I32>(op);
  }
}

/* y[i] = x[i] as dtype `to`. */
KERNEL __launch_bounds__(THREADS) convert(Convert op) {
  switch (op.from) {
    case DTYPE_F32: return convertFrom<F32>(op);
    case DTYPE_F16: return convertFrom<F16>(op);
    case DTYPE_BF16: return convertFrom<BF16>(op);
    case DTYPE_I8: return convertFrom<I8>(op);
    case DTYPE_U8: return convertFrom<U8>(op);
    case DTYPE_I32: return convertFrom<I32>(op);
  }
}
