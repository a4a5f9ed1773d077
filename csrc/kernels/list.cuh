/*
 * Lists of tensors: records in device memory, cut into chunks of OPTIMIZER_CHUNK elements. What takes a list finds the record of a chunk
 * in `chunks`.
 */
#pragma once
#include "common.cuh"

struct Record {
  u8* p;
  u8* g;
  u8* state1;
  u8* state2;
  float* absmax1;
  float* absmax2;
  u64 n;
  u32 first;
  u32 index;
};
static_assert(sizeof(Record) == LIST_RECORD_BYTES && LIST_P == 0 && LIST_G == 8 && LIST_STATE1 == 16 && LIST_STATE2 == 24 &&
                  LIST_ABSMAX1 == 32 && LIST_ABSMAX2 == 40 && LIST_N == 48 && LIST_FIRST == 56 && LIST_INDEX == 60,
              "a record is what src/core/optimizers.ts says");

/* A chunk: its record, and its elements from `begin` on. */
struct Chunk {
  Record record;
  u64 begin;
  u32 count;
};

DEVICE uint4 loadCached16(const void* p) {
  uint4 v;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}

DEVICE u64 joined(u32 low, u32 high) { return (u64)high << 32 | low; }

DEVICE Record loadRecord(const void* list, u32 at) {
  const void* from = advance(list, (u64)at * LIST_RECORD_BYTES);
  const uint4 a = loadCached16(from), b = loadCached16(advance(from, 16)), c = loadCached16(advance(from, 32)),
              d = loadCached16(advance(from, 48));
  return {(u8*)joined(a.x, a.y), (u8*)joined(a.z, a.w), (u8*)joined(b.x, b.y), (u8*)joined(b.z, b.w), (float*)joined(c.x, c.y),
          (float*)joined(c.z, c.w), joined(d.x, d.y), d.z, d.w};
}

/* The record that chunk `at` of a list belongs to. */
DEVICE u32 recordOf(const void* chunks, u64 at) { return __ldg((const u32*)chunks + at); }

DEVICE Chunk chunkOf(const void* list, u32 record, u64 at) {
  Chunk chunk;
  chunk.record = loadRecord(list, record);
  chunk.begin = (at - chunk.record.first) * OPTIMIZER_CHUNK;
  const u64 left = chunk.record.n - chunk.begin;
  chunk.count = left < OPTIMIZER_CHUNK ? (u32)left : OPTIMIZER_CHUNK;
  return chunk;
}

// Eight elements as float32, of a dtype that is known or not.

/* The dtype that an operand says. */
struct AnyType {};

template <typename T>
DEVICE u32 bytesOf(u32 dtype) {
  if constexpr (Same<T, AnyType>::VALUE) return dtype == DTYPE_F32 ? 4 : 2;
  else return T::BYTES;
}

template <typename T>
DEVICE float loadOne(const void* p, u64 i, u32 dtype) {
  if constexpr (!Same<T, AnyType>::VALUE) return load<T>(p, i);
  else if (dtype == DTYPE_F32) return load<F32>(p, i);
  else if (dtype == DTYPE_F16) return load<F16>(p, i);
  else return load<BF16>(p, i);
}

template <typename T>
DEVICE void storeOne(void* p, u64 i, float x, u32 dtype) {
  if constexpr (!Same<T, AnyType>::VALUE) store<T>(p, i, x);
  else if (dtype == DTYPE_F32) store<F32>(p, i, x);
  else if (dtype == DTYPE_F16) store<F16>(p, i, x);
  else store<BF16>(p, i, x);
}

/* x rounded to the dtype, as float32. */
template <typename T>
DEVICE float roundedTo(float x, u32 dtype) {
  if constexpr (!Same<T, AnyType>::VALUE) return rounded<T>(x);
  else return dtype == DTYPE_F32 ? x : dtype == DTYPE_F16 ? rounded<F16>(x) : rounded<BF16>(x);
}

/* Eight elements as they lie in memory: float32 fills both halves, 16-bit types the first. */
struct Eight {
  uint4 low, high;
};

/* What the kernel itself writes later. */
DEVICE uint4 loadOwn16(const void* p) {
  uint4 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
DEVICE uint2 loadOwn8(const void* p) {
  uint2 v;
  asm volatile("ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}

/* Elements [at, at + 8), aligned to 16 bytes. */
template <typename T>
DEVICE Eight loadEight(const void* p, u64 at, u32 dtype) {
  Eight v;
  const u32 bytes = bytesOf<T>(dtype);
  const void* from = advance(p, at * bytes);
  v.low = loadOwn16(from);
  v.high = make_uint4(0, 0, 0, 0);
  if (bytes == 4) v.high = loadOwn16(advance(from, 16));
  return v;
}

template <typename T>
DEVICE void decodeHalves(uint4 v, float* x) {
  decodePair<T>(v.x, x[0], x[1]);
  decodePair<T>(v.y, x[2], x[3]);
  decodePair<T>(v.z, x[4], x[5]);
  decodePair<T>(v.w, x[6], x[7]);
}

DEVICE void decodeWords(uint4 v, float* x) {
  x[0] = floatOf(v.x);
  x[1] = floatOf(v.y);
  x[2] = floatOf(v.z);
  x[3] = floatOf(v.w);
}

template <typename T>
DEVICE void decodeEight(const Eight& v, float* x, u32 dtype) {
  if constexpr (Same<T, AnyType>::VALUE) {
    if (dtype == DTYPE_F32) decodeEight<F32>(v, x, dtype);
    else if (dtype == DTYPE_F16) decodeEight<F16>(v, x, dtype);
    else decodeEight<BF16>(v, x, dtype);
  } else if constexpr (T::BYTES == 4) {
    decodeWords(v.low, x);
    decodeWords(v.high, x + 4);
  } else {
    decodeHalves<T>(v.low, x);
  }
}

/* Eight float32, NaN or not, rounded to the dtype. */
template <typename T>
DEVICE Eight encodeEight(const float* x, u32 dtype) {
  if constexpr (Same<T, AnyType>::VALUE) {
    if (dtype == DTYPE_F32) return encodeEight<F32>(x, dtype);
    return dtype == DTYPE_F16 ? encodeEight<F16>(x, dtype) : encodeEight<BF16>(x, dtype);
  } else if constexpr (T::BYTES == 4) {
    return {encodeAnyVector<F32>(x), encodeAnyVector<F32>(x + 4)};
  } else {
    return {encodeAnyVector<T>(x), make_uint4(0, 0, 0, 0)};
  }
}

/* Eight float32, none of them NaN. */
template <typename T>
DEVICE Eight encodeFiniteEight(const float* x, u32 dtype) {
  if constexpr (Same<T, AnyType>::VALUE) return encodeEight<T>(x, dtype);
  else if constexpr (T::BYTES == 4) return {encodeVector<F32>(x), encodeVector<F32>(x + 4)};
  else return {encodeVector<T>(x), make_uint4(0, 0, 0, 0)};
}

template <typename T>
DEVICE void storeEight(void* p, u64 at, const Eight& v, u32 dtype) {
  const u32 bytes = bytesOf<T>(dtype);
  void* to = advance(p, at * bytes);
  storeStream16(to, v.low);
  if (bytes == 4) storeStream16(advance(to, 16), v.high);
}

/* Eight float32 rounded to the dtype, as float32. */
template <typename T>
DEVICE void roundEight(float* x, u32 dtype) {
  if constexpr (!Same<T, F32>::VALUE) {
#pragma unroll
    for (u32 e = 0; e < 8; e++) x[e] = roundedTo<T>(x[e], dtype);
  }
}

/* Elements [at, at + 8) of a chunk of `end` elements, zeros behind it; any alignment. */
template <typename T>
DEVICE void loadEightSafely(const void* p, u64 at, u64 end, float* x, u32 dtype) {
#pragma unroll
  for (u32 e = 0; e < 8; e++) x[e] = at + e < end ? loadOne<T>(p, at + e, dtype) : 0.0f;
}

// Sums of squares: lane 8 * l + e of the tree is element e of lane l of a warp.

/* The tree over 256 lanes of which each lane of a warp holds eight. The result is lane 0's. */
DEVICE float sumOfLanes(float (&a)[8]) {
#pragma unroll
  for (u32 h = WARP / 2; h > 0; h /= 2)
#pragma unroll
    for (u32 e = 0; e < 8; e++) a[e] += __shfl_down_sync(ALL_LANES, a[e], h);
  return ((a[0] + a[4]) + (a[2] + a[6])) + ((a[1] + a[5]) + (a[3] + a[7]));
}
static_assert(NORM_LANES == 8 * WARP, "a lane of a warp holds eight of the tree");
