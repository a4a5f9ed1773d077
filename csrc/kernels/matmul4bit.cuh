/* What the 4-bit products share: their scales, plain or nested, and the values of the codes. */
#pragma once
#include "mma.cuh"

/* The scales of a weight's blocks. */
struct Scales {
  const void* absmax;
  const float* code;
  const float* absmax2;
  float offset;
  u32 shift2;

  DEVICE Scales(const Matmul4bit& op)
      : absmax(op.absmax), code((const float*)op.code), absmax2((const float*)op.absmax2), offset(0), shift2(0) {
    if (code) {
      offset = *(const float*)op.offset;
      shift2 = 31 - __clz(op.blocksize2);
    }
  }

  DEVICE float plain(u64 block) const { return __ldg((const float*)absmax + block); }

  DEVICE float nested(u64 block) const {
    return __ldg(code + ((const u8*)absmax)[block]) * __ldg(absmax2 + (block >> shift2)) + offset;
  }

  DEVICE float at(u64 block) const { return code ? nested(block) : plain(block); }
};

/* The value of a code. */
DEVICE float valueOf(u32 quantType, u32 code) { return quantType == QUANT_NF4 ? NF4_VALUES[code] : FP4_VALUES[code]; }

/* bias[n] as float32, 0 without one. */
template <typename T>
DEVICE float biasAt(const void* bias, u64 n) {
  return bias ? load<T>(bias, n) : 0.0f;
}

DEVICE u32 wordOf(const uint4& v, u32 i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }
