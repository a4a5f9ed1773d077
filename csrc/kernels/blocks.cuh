/*
 * What the block quantizers share. A warp takes a tile of VECTORS 16-byte vectors a lane: whole blocks of up to that size; the
 * warps of a larger block find its absmax together. Whatever is not plain (the end, unaligned addresses, tiny, huge or
 * non-finite blocks) is for a `slowBlock`, a warp per block.
 */
#pragma once
#include "common.cuh"

static_assert(VECTORS == 4, "two vectors of 16-bit elements share a word when maxima are looked for");

/* Block sizes are powers of two. */
DEVICE u32 blockShift(u32 blocksize) { return 31 - __clz(blocksize); }

/*
 * 1 / x, IEEE, where x lies between 1e-30 and 2^125: what the compiler makes of rcp.rn, without its test of a range that
 * holds this one. One step from an approximation within an ulp is exact but for a few mantissas, and for those it depends on the
 * multiprocessor's own approximation, as rcp.rn does; `selfCheck` looks at them on every GPU that is probed.
 */
DEVICE float plainReciprocal(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return __fmaf_rn(r, -__fmaf_rn(r, x, -1.0f), r);
}

/* The bounds of what a quantizer's fast path takes as absmax; `isPlain` wants the lower one as bits. */
constexpr u32 LEAST_PLAIN = 0x0da24260;  // 1e-30
constexpr u32 MOST_PLAIN = 0x7e000000;   // 2^125
DEVICE bool isPlain(u32 absmaxBits, u32 least) { return isBetween(absmaxBits, least, MOST_PLAIN); }

// Tiles

/* A warp's tile of an operand. */
template <typename T>
struct Tile {
  static constexpr u32 VECTOR = Lanes<T>::COUNT;
  static constexpr u32 ELEMENTS = VECTORS * WARP * VECTOR;
  u64 begin;
  /* All of it is there, with the rest of its block, and aligned: `vectors` hold it. */
  bool whole;
  uint4 vectors[VECTORS];

  DEVICE void load(const void* x, u64 n, u32 blocksize, bool aligned) {
    u32 span = blocksize > ELEMENTS ? blocksize : ELEMENTS;
    // The warps that share a block, if any do, decide alike.
    whole = aligned && isAligned(x, 16) && (begin & ~(u64)(span - 1)) + span <= n;
    if (!whole) return;
    const void* from = advance(x, (begin + laneId() * VECTOR) * T::BYTES);
#pragma unroll
    for (u32 u = 0; u < VECTORS; u++) vectors[u] = loadStream16(advance(from, u * WARP * 16));
  }

  /* The element of the tile at which a lane's u-th vector starts. */
  static DEVICE u32 at(u32 u) { return laneId() * VECTOR + u * WARP * VECTOR; }
};

/* Sixteen bytes of elements as float32. */
template <typename T>
DEVICE void decodeVector(uint4 v, float* x) {
  if constexpr (T::BYTES == 4) {
    x[0] = floatOf(v.x);
    x[1] = floatOf(v.y);
    x[2] = floatOf(v.z);
    x[3] = floatOf(v.w);
  } else {
    decodePair<T>(v.x, x[0], x[1]);
    decodePair<T>(v.y, x[2], x[3]);
    decodePair<T>(v.z, x[4], x[5]);
    decodePair<T>(v.w, x[6], x[7]);
  }
}

/*
 * The absmax of the blocks that a warp's vectors belong to, as bits of a float32. Lane l has VECTORS vectors, of elements
 * (u * 32 + l) * 16 / BYTES and on; `lanes` of them make a block, or (from 32 on) several whole vectors of the warp do.
 */
template <typename T>
DEVICE void absmaxOfBlocks(const uint4 (&v)[VECTORS], u32 lanes, u32 (&m)[VECTORS]) {
  u32 within = (lanes < WARP ? lanes : WARP) - 1;
  if constexpr (T::BYTES == 4) {
#pragma unroll
    for (u32 u = 0; u < 4; u++) m[u] = absmaxWords(v[u]);
    if (lanes > WARP) {
      m[0] = m[1] = larger(m[0], m[1]);
      m[2] = m[3] = larger(m[2], m[3]);
      if (lanes > 2 * WARP) m[0] = m[1] = m[2] = m[3] = larger(m[0], m[2]);
    }
#pragma unroll
    for (u32 step = WARP / 2; step > 0; step /= 2) {
      if (step <= within) {
#pragma unroll
        for (u32 u = 0; u < 4; u++) m[u] = larger(m[u], __shfl_xor_sync(ALL_LANES, m[u], step));
      }
    }
  } else {
    // Two vectors share a word, so that one shuffle serves both.
    u32 h[4];
#pragma unroll
    for (u32 u = 0; u < 4; u++) h[u] = absmaxHalves<T>(v[u]);
    u32 a = largerHalves<T>(__byte_perm(h[0], h[1], 0x5410), __byte_perm(h[0], h[1], 0x7632));
    u32 b = largerHalves<T>(__byte_perm(h[2], h[3], 0x5410), __byte_perm(h[2], h[3], 0x7632));
    if (lanes > WARP) {
      a = largerHalves<T>(a, __byte_perm(a, a, 0x1032));
      b = largerHalves<T>(b, __byte_perm(b, b, 0x1032));
      if (lanes > 2 * WARP) a = b = largerHalves<T>(a, b);
    }
#pragma unroll
    for (u32 step = WARP / 2; step > 0; step /= 2) {
      if (step <= within) {
        a = largerHalves<T>(a, __shfl_xor_sync(ALL_LANES, a, step));
        b = largerHalves<T>(b, __shfl_xor_sync(ALL_LANES, b, step));
      }
    }
    m[0] = widened<T>(a & 0xffff);
    m[1] = widened<T>(a >> 16);
    m[2] = widened<T>(b & 0xffff);
    m[3] = widened<T>(b >> 16);
  }
}

/* The largest of a value over `warps` neighbouring warps (a power of two), which wait for each other. */
DEVICE u32 largestOfWarps(u32 m, u32 warps, u32* partial) {
  u32 first = warpId() & ~(warps - 1);
  if (laneId() == 0) partial[warpId()] = m;
  groupBarrier(first >> (31 - __clz(warps)), warps * WARP);
#pragma unroll 1
  for (u32 w = 0; w < warps; w++) m = larger(m, partial[first + w]);
  return m;
}

/* Stores the absmax of the plain blocks that start in a warp's tile at element `begin`, from where `absmaxOfBlocks` has put it. */
template <typename T>
DEVICE void storeAbsmax(const u32 (&m)[VECTORS], float* absmax, u64 begin, u32 blocksize, u32 least) {
  constexpr u32 VECTOR = Lanes<T>::COUNT;
  const u32 shift = 31 - __clz(blocksize);
  const u32 i = laneId() * VECTOR;
  absmax += (begin + i) >> shift;
  if (blocksize <= WARP * VECTOR) {
    const u32 step = (WARP * VECTOR) >> shift;
    if ((i & (blocksize - 1)) == 0) {
#pragma unroll
      for (u32 u = 0; u < VECTORS; u++)
        if (isPlain(m[u], least)) absmax[u * step] = floatOf(m[u]);
    }
  } else if (i == 0) {
#pragma unroll
    for (u32 u = 0; u < VECTORS; u++) {
      u32 at = (u32)begin + u * WARP * VECTOR;
      if ((at & (blocksize - 1)) == 0 && isPlain(m[u], least)) absmax[(u * WARP * VECTOR) >> shift] = floatOf(m[u]);
    }
  }
}

/* `absmaxOfBlocks` for blocks of any size; the vectors of a tile of T may have been made into such of another type. */
template <typename T, typename Vector = T>
DEVICE void absmaxOfTile(const uint4 (&v)[VECTORS], u32 blocksize, u32* partial, u32 (&m)[VECTORS]) {
  absmaxOfBlocks<Vector>(v, blocksize / Lanes<T>::COUNT, m);
  if (blocksize <= Tile<T>::ELEMENTS) return;
  u32 all = largestOfWarps(m[0], blocksize / Tile<T>::ELEMENTS, partial);
#pragma unroll
  for (u32 u = 0; u < VECTORS; u++) m[u] = all;
}

// Slow blocks

/* Calls `slow(block)` with the whole warp for each block of a tile that is not plain. */
template <typename T, typename Slow>
DEVICE void eachBlockNotPlain(const u32 (&m)[VECTORS], u64 begin, u32 blocksize, u32 least, Slow slow) {
#pragma unroll 1
  for (u32 u = 0; u < VECTORS; u++) {
    // The lanes at which a block starts have their turns.
    u32 i = Tile<T>::at(u);
    u32 bits = u == 0 ? m[0] : u == 1 ? m[1] : u == 2 ? m[2] : m[3];
    u32 leaders = __ballot_sync(ALL_LANES, !isPlain(bits, least) && (((u32)begin + i) & (blocksize - 1)) == 0);
    while (leaders != 0) {
      u32 leader = __ffs(leaders) - 1;
      leaders &= leaders - 1;
      slow((begin + __shfl_sync(ALL_LANES, i, leader)) >> blockShift(blocksize));
    }
  }
}

/* Calls `slow(block)` for each block that starts in a tile and is there. */
template <typename T, typename Slow>
DEVICE void eachBlockOf(u64 begin, u64 n, u32 blocksize, Slow slow) {
  u64 end = begin + Tile<T>::ELEMENTS < n ? begin + Tile<T>::ELEMENTS : n;
  u32 shift = blockShift(blocksize);
  for (u64 block = (begin + blocksize - 1) >> shift; block << shift < end; block++) slow(block);
}

/* The largest |x - offset| of a block, NaN ignored, found by a warp. */
template <typename T>
DEVICE float absmaxIgnoringNaN(const void* x, u32 count, float offset) {
  u32 m = 0;
  for (u32 i = laneId(); i < count; i += WARP) {
    u32 bits = bitsOf(load<T>(x, i) - offset) & ABS;
    if (bits <= INFINITY_BITS) m = larger(m, bits);
  }
  return floatOf(largestOfWarp(m));
}

/* The absmax of any block, found by a warp and stored; a fault where it is not finite; 0 for a zero block. */
template <typename T>
DEVICE float absmaxOfSlowBlock(const void* x, u32 count, float offset, FaultSlot slot, float* absmaxes, u64 block) {
  u32 bits = 0;
  for (u32 i = laneId(); i < count; i += WARP) bits = larger(bits, bitsOf(load<T>(x, i) - offset) & ABS);
  bits = largestOfWarp(bits);
  float absmax = floatOf(bits);
  if (bits >= INFINITY_BITS) {
    if (laneId() == 0) fault(slot, block);
    absmax = absmaxIgnoringNaN<T>(x, count, offset);
  }
  if (absmax < SMALLEST_NORMAL) absmax = 0;
  if (laneId() == 0) absmaxes[block] = absmax;
  return absmax;
}
