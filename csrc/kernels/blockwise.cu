/*
 * 8-bit blockwise quantization with any sorted codebook of 256 values. What is computed is said in asm/blockwise.ts; the bits
 * are the same.
 *
 * A code is found by one look-up in the search table (src/quant/search-table.ts), of which shared memory holds the part for
 * magnitudes from 2^-31 to 2; where the codebook has a boundary below that, or no table, by a binary search over the codes.
 * Quantizing, the grid is small and walks over the tiles, so that tables are loaded once.
 */
#include "blocks.cuh"

constexpr u32 THREADS = BLOCKWISE_THREADS;
constexpr u32 WARPS = THREADS / WARP;

// The search table in shared memory: 4,096 bins of positive values by bits 16 to 27 of the float, then as many of negative ones.

constexpr u32 BINS = 4096;
/* 2^-31, the least magnitude that has a bin. */
constexpr float LEAST_BINNED = 4.656612873077393e-10f;
static_assert(SEARCH_SHIFT == 16, "bins are 2^16 floats wide");

/*
 * For the bits of |s|: code = (entry + bits) >> 24 where s is positive; where it is negative, that gives the complement of the
 * code. The table's own entries are for the inverted bits of s there: ~(e + ~(bits + 2^31)) = bits + (2^31 - e).
 */
DEVICE void loadTable(u32* entries, const void* table) {
  const u32* source = (const u32*)advance(table, SEARCH_HEADER);
  for (u32 i = threadIdx.x; i < BINS; i += THREADS) {
    u32 bin = 0x3000 + i;
    entries[i] = source[bin];
    entries[BINS + i] = 0x80000000u - source[0x7fff - bin];
  }
}

/* Of a scaled value: what has its code, or the complement of its code, in the top byte. */
DEVICE u32 lookUp(float s, const u32* entries) {
  u32 magnitude = bitsOf(fmaxf(fabsf(s), LEAST_BINNED));
  // The sign goes to bit 12 of the index, next to the bin's twelve bits.
  u32 index;
  asm("lop3.b32 %0, %1, %2, 0xfff, 0xe4;" : "=r"(index) : "r"(magnitude >> 16), "r"(bitsOf(s) >> 19));
  return entries[index] + magnitude;
}

/* Four codes in the order of memory. */
DEVICE u32 codes4(const float* s, const u32* entries) {
  u32 ab = __byte_perm(lookUp(s[0], entries), lookUp(s[1], entries), 0x0073);
  u32 cd = __byte_perm(lookUp(s[2], entries), lookUp(s[3], entries), 0x0073);
  // Selecting with 8 added repeats the sign of a byte.
  u32 signAB, signCD;
  asm("prmt.b32 %0, %1, %2, 0x00fb;" : "=r"(signAB) : "r"(bitsOf(s[0])), "r"(bitsOf(s[1])));
  asm("prmt.b32 %0, %1, %2, 0x00fb;" : "=r"(signCD) : "r"(bitsOf(s[2])), "r"(bitsOf(s[3])));
  return __byte_perm(ab ^ signAB, cd ^ signCD, 0x5410);
}

/* A codebook in global memory, and one in shared memory. */
struct GlobalCode {
  const float* values;
  DEVICE float operator[](u32 i) const { return values[i]; }
};
struct SharedCode {
  u32 address;
  DEVICE float operator[](u32 i) const {
    float value;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address + i * 4) : "memory");
    return value;
  }
};

/* The exact search: the code of any s, by halving. NaN gives 0. */
template <typename Code>
DEVICE u32 nearest(float s, Code code) {
  u32 high = 0;
#pragma unroll
  for (u32 step = 128; step > 0; step /= 2) high += code[high + step - 1] < s ? step : 0;
  u32 low = high > 0 ? high - 1 : 0;
  float middle = (code[low] + code[high]) * 0.5f;
  if (s > middle) return high;
  return s == middle ? high & ~1u : low;
}

/* Four codes in the order of memory. A function of its own, because it is long. */
__device__ __noinline__ u32 nearest4(float a, float b, float c, float d, SharedCode code) {
  return nearest(flushed(a), code) | nearest(flushed(b), code) << 8 | nearest(flushed(c), code) << 16 |
         nearest(flushed(d), code) << 24;
}

/* A block by a warp, whatever it holds. */
template <typename T>
__device__ __noinline__ void slowBlock(const void* x, u8* q, float* absmaxes, GlobalCode code, const float* shift, u64 n,
                                       u32 blocksize, u64 block, FaultSlot slot) {
  u64 first = block * blocksize;
  u32 count = n - first < blocksize ? (u32)(n - first) : blocksize;
  x = advance(x, first * T::BYTES);
  q += first;
  float offset = shift ? *shift : 0;
  float absmax = absmaxOfSlowBlock<T>(x, count, offset, slot, absmaxes, block);
  bool zero = absmax == 0;
  float r = reciprocal(absmax);
  for (u32 i = laneId(); i < count; i += WARP)
    q[i] = zero ? 0 : (u8)nearest(flushed(flushed(load<T>(x, i) - offset) * r), code);
}

/* The operands of a launch as arguments: a reference to them would put all of them into memory. */
template <typename T>
DEVICE void slowBlock(const QuantizeBlockwise& op, u64 block) {
  slowBlock<T>(op.x, (u8*)op.q, (float*)op.absmax, {(const float*)op.code}, (const float*)op.offset, op.n, op.blocksize, block,
               faultSlot(op));
}

/* Sixteen bytes of elements as float32 less the offset. */
template <typename T, bool SHIFTED>
DEVICE void decodeShifted(uint4 v, float offset, float* x) {
  decodeVector<T>(v, x);
  if constexpr (SHIFTED) {
#pragma unroll
    for (u32 i = 0; i < Lanes<T>::COUNT; i++) x[i] -= offset;
  }
}

/* A vector of float32 that has the absmax of a vector less the offset. */
template <typename T>
DEVICE uint4 absmaxOfShifted(uint4 v, float offset) {
  float x[Lanes<T>::COUNT];
  decodeShifted<T, true>(v, offset, x);
  u32 bits = 0;
#pragma unroll
  for (u32 i = 0; i < Lanes<T>::COUNT; i++) bits = larger(bits, bitsOf(x[i]) & ABS);
  return make_uint4(bits, 0, 0, 0);
}

template <typename T, bool SHIFTED, bool TABLE>
DEVICE void quantizeTile(const QuantizeBlockwise& op, const Tile<T>& tile, float offset, u32 leastPlain, const u32* search,
                         u32* partial) {
  constexpr u32 VECTOR = Lanes<T>::COUNT;
  const SharedCode code = {(u32)__cvta_generic_to_shared(search)};
  const u32 blocksize = op.blocksize;
  u32 m[VECTORS];
  if constexpr (SHIFTED) {
    uint4 largest[VECTORS];
#pragma unroll
    for (u32 u = 0; u < VECTORS; u++) largest[u] = absmaxOfShifted<T>(tile.vectors[u], offset);
    absmaxOfTile<T, F32>(largest, blocksize, partial, m);
  } else {
    absmaxOfTile<T, T>(tile.vectors, blocksize, partial, m);
  }
  storeAbsmax<T>(m, (float*)op.absmax, tile.begin, blocksize, leastPlain);
  void* q = advance(op.q, tile.begin + laneId() * VECTOR);
  bool allPlain = true;
#pragma unroll
  for (u32 u = 0; u < VECTORS; u++) {
    bool plain = isPlain(m[u], leastPlain);
    allPlain = allPlain && plain;
    float r = plainReciprocal(floatOf(m[u]));
    float x[VECTOR];
    decodeShifted<T, SHIFTED>(tile.vectors[u], offset, x);
#pragma unroll
    for (u32 k = 0; k < VECTOR; k++) x[k] = (TABLE ? x[k] : flushed(x[k])) * r;
    uint2 codes;
#pragma unroll
    for (u32 k = 0; k < VECTOR; k += 4) {
      u32 four = TABLE ? codes4(x + k, search) : nearest4(x[k], x[k + 1], x[k + 2], x[k + 3], code);
      if (k == 0) codes.x = four;
      else codes.y = four;
    }
    if (plain) {
      if constexpr (VECTOR == 8) *(uint2*)advance(q, u * WARP * 8) = codes;
      else *(u32*)advance(q, u * WARP * 4) = codes.x;
    }
  }
  if (__all_sync(ALL_LANES, allPlain)) return;
  eachBlockNotPlain<T>(m, tile.begin, blocksize, leastPlain, [&](u64 block) { slowBlock<T>(op, block); });
}

/* Everything from a block's first tile on, which has been loaded. */
template <typename T, bool SHIFTED, bool TABLE>
DEVICE void quantizeTiles(const QuantizeBlockwise& op, Tile<T>& tile, float offset, u32 leastPlain, const u32* search,
                          u32 (*partial)[WARPS]) {
  // Two sets of maxima by turns: warps that share a block are never more than a barrier apart.
  u32 parity = 0;
  while (tile.begin < op.n) {
    if (tile.whole) {
      quantizeTile<T, SHIFTED, TABLE>(op, tile, offset, leastPlain, search, partial[parity]);
      parity ^= 1;
    } else {
      eachBlockOf<T>(tile.begin, op.n, op.blocksize, [&](u64 block) { slowBlock<T>(op, block); });
    }
    tile.begin += (u64)gridDim.x * WARPS * Tile<T>::ELEMENTS;
    if (tile.begin < op.n) tile.load(op.x, op.n, op.blocksize, isAligned(op.q, 8));
  }
}

template <typename T, bool SHIFTED>
DEVICE void quantize(const QuantizeBlockwise& op) {
  __shared__ u32 entries[2 * BINS];
  __shared__ u32 partial[2][WARPS];
  const float offset = SHIFTED ? *(const float*)op.offset : 0;
  const float floor = op.table ? *(const float*)op.table : 0;
  // The first tile is under way while the table comes.
  Tile<T> tile;
  tile.begin = ((u64)blockIdx.x * WARPS + warpId()) * Tile<T>::ELEMENTS;
  tile.load(op.x, op.n, op.blocksize, isAligned(op.q, 8));
  if (floor > LEAST_BINNED) {
    loadTable(entries, op.table);
    __syncthreads();
    // Below this absmax, a denormal x can get to where the codebook has a boundary.
    u32 leastPlain = larger(LEAST_PLAIN, bitsOf(1.001f * (SMALLEST_NORMAL / floor)));
    quantizeTiles<T, SHIFTED, true>(op, tile, offset, leastPlain, entries, partial);
  } else {
    for (u32 i = threadIdx.x; i < 256; i += THREADS) entries[i] = ((const u32*)op.code)[i];
    __syncthreads();
    quantizeTiles<T, SHIFTED, false>(op, tile, offset, LEAST_PLAIN, entries, partial);
  }
}

#define QUANTIZE(T, dtype)                                                                                   \
  KERNEL __launch_bounds__(THREADS, 2) quantizeBlockwise_##dtype(QuantizeBlockwise op) { \
    quantize<T, false>(op);                                                                                  \
  }                                                                                                          \
  KERNEL __launch_bounds__(THREADS, 2)                                                                          \
      quantizeBlockwise_##dtype##_offset(QuantizeBlockwise op) {                     \
    quantize<T, true>(op);                                                                                   \
  }
QUANTIZE(F32, f32)
QUANTIZE(F16, f16)
QUANTIZE(BF16, bf16)

// Decoding: y[i] = code[q[i]] * absmax(block) (+ offset), rounded after each step.

constexpr u32 DECODERS = BLOCKWISE_DECODERS;
/* Copies of the codebook in shared memory, against conflicts: of 1, 4, 8 and 32 copies, 4 was the fastest on an H200. */
constexpr u32 COPIES = 4;
static_assert(COPIES * sizeof(float) == 16, "a code's values are 16 bytes");

template <typename T>
DEVICE void dequantize(const DequantizeBlockwise& op) {
  constexpr u32 VECTOR = Lanes<T>::COUNT;
  constexpr u32 WARP_TILE = Tile<T>::ELEMENTS;
  // Value v of copy c is at v * COPIES + c: lanes of different copies never want the same bank.
  __shared__ float values[256 * COPIES];
  for (u32 i = threadIdx.x; i < 256 * COPIES; i += DECODERS) values[i] = ((const float*)op.code)[i / COPIES];
  __syncthreads();
  const bool shifted = op.offset != 0;
  const float offset = shifted ? *(const float*)op.offset : 0;
  const bool aligned = isAligned(op.y, 16) && isAligned(op.q, 8);
  const u32 shift = blockShift(op.blocksize);
  const u32 lane = laneId();
  const u32 copy = lane % COPIES * 4;
  const u64 begin = (u64)blockIdx.x * (DECODERS / WARP * WARP_TILE) + warpId() * WARP_TILE;
  if (begin >= op.n) return;
  const float* absmax = (const float*)op.absmax + (begin >> shift);
  const u32 at = (u32)begin & (op.blocksize - 1);
  if (begin + WARP_TILE > op.n || !aligned) {
    u32 count = begin + WARP_TILE < op.n ? WARP_TILE : (u32)(op.n - begin);
    for (u32 i = lane; i < count; i += WARP) {
      float v = values[((const u8*)op.q)[begin + i] * COPIES] * absmax[(at + i) >> shift];
      store<T>(op.y, begin + i, shifted ? v + offset : v);
    }
    return;
  }
  const void* from = advance(op.q, begin + lane * VECTOR);
  uint2 q[VECTORS];
  float scale[VECTORS];
#pragma unroll
  for (u32 u = 0; u < VECTORS; u++) {
    if constexpr (VECTOR == 8) q[u] = loadStream8(advance(from, u * WARP * 8));
    else q[u] = make_uint2(loadStream4(advance(from, u * WARP * 4)), 0);
    scale[u] = absmax[(at + lane * VECTOR + u * WARP * VECTOR) >> shift];
  }
  void* y = advance(op.y, (begin + lane * VECTOR) * T::BYTES);
#pragma unroll
  for (u32 u = 0; u < VECTORS; u++) {
    float v[VECTOR];
#pragma unroll
    for (u32 k = 0; k < VECTOR; k++) {
      u32 word = k < 4 ? q[u].x : q[u].y;
      u32 code = k % 4 == 0 ? word << 4 : word >> (k % 4 * 8 - 4);
      v[k] = *(const float*)((const u8*)values + ((code & 0xff0) | copy)) * scale[u];
      if (shifted) v[k] += offset;
    }
    void* to = advance(y, u * WARP * 16);
    // A value is finite, so only such a scale or offset makes a NaN.
    if ((bitsOf(scale[u]) & ABS) < INFINITY_BITS && (bitsOf(offset) & ABS) < INFINITY_BITS) {
      storeStream16(to, encodeVector<T>(v));
    } else {
#pragma unroll
      for (u32 k = 0; k < VECTOR; k++) store<T>(to, k, v[k]);
    }
  }
}

#define DEQUANTIZE(T, dtype)                                                                                     \
  KERNEL __launch_bounds__(DECODERS) dequantizeBlockwise_##dtype(DequantizeBlockwise op) { \
    dequantize<T>(op);                                                                                           \
  }
DEQUANTIZE(F32, f32)
DEQUANTIZE(F16, f16)
DEQUANTIZE(BF16, bf16)
