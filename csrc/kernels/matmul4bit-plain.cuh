/*
 * The 4-bit product in float32 arithmetic: for float32 activations, for weights and addresses that the tensor cores' paths do not
 * take, and for GPUs without those instructions. A warp has a row of the weight, and up to eight rows of activations.
 */
#pragma once
#include "matmul4bit.cuh"

constexpr u32 PLAIN_WARPS = MATMUL4BIT_PLAIN_THREADS / WARP;
constexpr u32 PLAIN_ROWS = MATMUL4BIT_PLAIN_ROWS;

template <typename T>
struct PlainProduct {
  const Matmul4bit& op;
  const Scales scales;
  /* Lane l, and lane l + 16, have the value of code l. */
  const float value = valueOf(op.quantType, laneId() & 15);

  DEVICE PlainProduct(const Matmul4bit& o) : op(o), scales(o) {}

  DEVICE void run() {
    const u32 lane = laneId();
    const u64 rows = (op.n + PLAIN_WARPS - 1) / PLAIN_WARPS;
    const u32 parts = ((u32)op.m + PLAIN_ROWS - 1) / PLAIN_ROWS;
    const u64 n = blockIdx.x % rows * PLAIN_WARPS + warpId();
    const u32 m = (u32)(blockIdx.x / rows) % parts * PLAIN_ROWS;
    const u32 split = (u32)(blockIdx.x / rows) / parts;
    if (n >= op.n) return;
    const u32 count = op.m - m < PLAIN_ROWS ? (u32)op.m - m : PLAIN_ROWS;
    // The parts of k are as those of the tiles.
    const u64 chunks = (op.k + MATMUL4BIT_TILE_CHUNK - 1) / MATMUL4BIT_TILE_CHUNK;
    const u64 each = (chunks + op.splits - 1) / op.splits * MATMUL4BIT_TILE_CHUNK;
    const u64 begin = split * each < op.k ? split * each : op.k;
    const u64 end = begin + each < op.k ? begin + each : op.k;
    float y[PLAIN_ROWS];
#pragma unroll
    for (u32 i = 0; i < PLAIN_ROWS; i++) y[i] = 0;
    if (count == 1) row<1>(n, m, count, begin, end, y);
    else row<PLAIN_ROWS>(n, m, count, begin, end, y);
#pragma unroll
    for (u32 i = 0; i < PLAIN_ROWS; i++) {
      if (i >= count) break;
#pragma unroll
      for (u32 step = WARP / 2; step > 0; step /= 2) y[i] += __shfl_xor_sync(ALL_LANES, y[i], step);
      const u64 at = (m + i) * op.n + n;
      if (lane == 0) {
        if (op.splits > 1) ((float*)op.partial)[split * op.m * op.n + at] = y[i];
        else store<T>(op.y, at, y[i] + biasAt<T>(op.bias, n));
      }
    }
  }

  template <u32 MOST>
  DEVICE void row(u64 n, u32 m, u32 count, u64 begin, u64 end, float (&y)[PLAIN_ROWS]) {
    const u32 lane = laneId();
    const u32 shift = 31 - __clz(op.blocksize);
    const u64 first = n * op.k;
    // Eight codes a lane, of one block and in one word, where rows allow it.
    const bool words = op.k % 8 == 0 && isAligned(op.packed, 4) && isAligned(op.a, 16);
    u64 k = begin;
    if (words) {
      const u64 whole = begin + (end - begin) / 8 * 8;
      for (; k < whole; k += 8 * WARP) {
        const u64 at = k + lane * 8;
        const bool there = at < whole;
        u32 codes = there ? loadStream4((const u8*)op.packed + (first + at) / 2) : 0;
        const float scale = there ? scales.at((first + at) >> shift) : 0.0f;
        float w[8];
#pragma unroll
        for (u32 j = 0; j < 8; j++) {
          // Of a byte, the first code is the high nibble.
          const float v = __shfl_sync(ALL_LANES, value, codes >> (j / 2 * 8 + (1 - j % 2) * 4));
          w[j] = rounded<T>(v * scale);
        }
        if (!there) continue;
#pragma unroll
        for (u32 i = 0; i < MOST; i++) {
          if (i >= count) break;
          const u8* from = (const u8*)op.a + ((m + i) * op.k + at) * T::BYTES;
          float x[8];
#pragma unroll
          for (u32 v = 0; v < 8 / Lanes<T>::COUNT; v++) {
            const uint4 raw = __ldg((const uint4*)from + v);
            if constexpr (T::BYTES == 4) {
              x[4 * v] = floatOf(raw.x), x[4 * v + 1] = floatOf(raw.y), x[4 * v + 2] = floatOf(raw.z), x[4 * v + 3] = floatOf(raw.w);
            } else {
              decodePair<T>(raw.x, x[0], x[1]);
              decodePair<T>(raw.y, x[2], x[3]);
              decodePair<T>(raw.z, x[4], x[5]);
              decodePair<T>(raw.w, x[6], x[7]);
            }
          }
          // Eight products meet in a tree before they join the lane's sum.
          float s[4];
#pragma unroll
          for (u32 j = 0; j < 4; j++) s[j] = __fmaf_rn(w[j + 4], x[j + 4], w[j] * x[j]);
          y[i] += (s[0] + s[2]) + (s[1] + s[3]);
        }
      }
      return;
    }
    for (; k < end; k += WARP) {
      const u64 at = first + k + lane;
      const bool there = k + lane < end;
      const u32 byte = there ? ((const u8*)op.packed)[at / 2] : 0;
      const float v = __shfl_sync(ALL_LANES, value, at & 1 ? byte : byte >> 4);
      if (!there) continue;
      const float w = rounded<T>(v * scales.at(at >> shift));
#pragma unroll
      for (u32 i = 0; i < MOST; i++) {
        if (i >= count) break;
        y[i] = __fmaf_rn(w, load<T>(op.a, (m + i) * op.k + k + lane), y[i]);
      }
    }
  }
};
