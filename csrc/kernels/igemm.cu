/*
 * Products of int8, exact in int32; transposition; and what makes numbers of such products, outlier columns included (LLM.int8()).
 */
#include "lanes.cuh"

extern __shared__ uint4 shared[];

// igemm

/* Rows of y, each a few vectors of neighbouring threads, from where their sums are. */
struct RowStore {
  const Igemm& op;
  const Place& place;

  template <typename From, typename RowOf>
  DEVICE void operator()(From from, RowOf rowOf) const {
    constexpr u32 ACROSS = From::COLS / 4;
    const u32 at = threadIdx.x % ACROSS * 4;
    const u64 col = place.col + at;
    if (col >= op.n) return;
    i32* y = (i32*)op.y + place.batch * op.m * op.n + col;
    const bool whole = isAligned(op.y, 16) && op.n % 4 == 0;
#pragma unroll 1
    for (u32 r = threadIdx.x / ACROSS; r < From::ROWS; r += TILE_THREADS / ACROSS) {
      const u64 row = place.row + rowOf(r);
      if (row >= op.m) continue;
      const uint4 v = *(const uint4*)(from.sums + r * From::PITCH + at);
      i32* to = y + row * op.n;
      if (whole) {
        *(uint4*)to = v;
      } else {
        to[0] = (i32)v.x;
        if (col + 1 < op.n) to[1] = (i32)v.y;
        if (col + 2 < op.n) to[2] = (i32)v.z;
        if (col + 3 < op.n) to[3] = (i32)v.w;
      }
    }
  }
};

#if HAS_SM80

template <typename S, typename Lanes>
DEVICE void multiply(const Igemm& op) {
  typedef AlongK<1, S::ROWS, S::THREADS> A;
  typedef AlongK<1, S::COLS, S::THREADS> B;
  const Place place = placeOfBlock<S::ROWS, S::COLS>(op.m, op.n);
  A a(advance(op.a, place.batch * op.m * op.k), place.row, op.m, op.k);
  B b(advance(op.b, place.batch * op.n * op.k), place.col, op.n, op.k);
  i32 sums[S::DOWN][S::ACROSS][4] = {};
  multiplyTile<MmaBytes, S, A, B>(a, b, (u32)((op.k + STEP - 1) / STEP), sharedAddress(shared), sums);
  stageTile<S>(sums, shared, RowStore{op, place});
}

#else

template <typename, typename S>
DEVICE void multiply(const Igemm& op) {
  typedef LaneOperand<BytesWord, S::ROWS, S::THREADS, true> A;
  typedef LaneOperand<BytesWord, S::COLS, S::THREADS, true> B;
  const Place place = placeOfBlock<S::ROWS, S::COLS>(op.m, op.n);
  A a(advance(op.a, place.batch * op.m * op.k), place.row, op.m, op.k);
  B b(advance(op.b, place.batch * op.n * op.k), place.col, op.n, op.k);
  constexpr u32 LENGTH = LANE_STEP * BytesWord::COUNT;
  i32 sums[S::DOWN][S::ACROSS] = {};
  multiplyByLanes<BytesWord, S, A, B>(a, b, (u32)((op.k + LENGTH - 1) / LENGTH), (u32*)shared, sums);
  stageLanes<S>(sums, shared, RowStore{op, place});
}

#endif

KERNEL __launch_bounds__(TILE_THREADS, 2) igemm_large(Igemm op) { multiply<LargeShape, LargeLanes>(op); }
KERNEL __launch_bounds__(TILE_THREADS, 4) igemm_small(Igemm op) { multiply<SmallShape, SmallLanes>(op); }

// transpose: a thread turns squares of as many elements as a word has, and words change places in shared memory

/* words[e] = element e of each of the words. */
template <u32 PER>
DEVICE void transposeWords(u32 (&words)[PER]) {
  if constexpr (PER == 2) {
    const u32 low = __byte_perm(words[0], words[1], 0x5410);
    words[1] = __byte_perm(words[0], words[1], 0x7632);
    words[0] = low;
  } else if constexpr (PER == 4) {
    const u32 a = __byte_perm(words[0], words[1], 0x5140), b = __byte_perm(words[2], words[3], 0x5140);
    const u32 c = __byte_perm(words[0], words[1], 0x7362), d = __byte_perm(words[2], words[3], 0x7362);
    words[0] = __byte_perm(a, b, 0x5410);
    words[1] = __byte_perm(a, b, 0x7632);
    words[2] = __byte_perm(c, d, 0x5410);
    words[3] = __byte_perm(c, d, 0x7632);
  }
}

template <u32 BYTES>
DEVICE void transposeTile(const Transpose& op) {
  constexpr u32 PER = 4 / BYTES;
  constexpr u32 EDGE = TRANSPOSE_TILE * PER;
  constexpr u32 WARPS = TRANSPOSE_THREADS / WARP;
  static_assert(TRANSPOSE_TILE == WARP, "a lane for each word of a row");
  // Word w of line c is at w ^ (c / PER): neither the lines of a lane nor the words of a line share a bank.
  __shared__ u32 words[EDGE][TRANSPOSE_TILE];
  const Place place = placeOfBlock<EDGE, EDGE>(op.rows, op.cols);
  const u32 lane = laneId();
  const u32 rows = leastOf(op.rows - place.row, EDGE), cols = leastOf(op.cols - place.col, EDGE);
  const u64 matrix = place.batch * op.rows * op.cols * BYTES;
  const u8* x = (const u8*)op.x + matrix + (place.row * op.cols + place.col) * BYTES;
  u8* y = (u8*)op.y + matrix + (place.col * op.rows + place.row) * BYTES;

  const bool aligned = isAligned(x, 4) && op.cols * BYTES % 4 == 0;
  const u32 there = cols > lane * PER ? leastOf(cols - lane * PER, PER) * BYTES : 0;
#pragma unroll 2
  for (u32 r = warpId(); r < TRANSPOSE_TILE; r += WARPS) {
    u32 square[PER];
#pragma unroll
    for (u32 e = 0; e < PER; e++) {
      const u8* from = x + (r * PER + e) * op.cols * BYTES + lane * 4;
      const u32 bytes = r * PER + e < rows ? there : 0;
      square[e] = aligned && bytes == 4 ? *(const u32*)from : gatherWord<BYTES>(from, 0, bytes);
    }
    transposeWords(square);
#pragma unroll
    for (u32 e = 0; e < PER; e++) words[lane * PER + e][r ^ lane] = square[e];
  }
  __syncthreads();
  const bool whole = isAligned(y, 4) && op.rows * BYTES % 4 == 0 && (lane + 1) * PER <= rows;
  for (u32 c = warpId(); c < cols; c += WARPS) {
    const u32 word = words[c][lane ^ (c / PER)];
    u8* to = y + c * op.rows * BYTES + lane * 4;
    if (whole) {
      *(u32*)to = word;
    } else {
#pragma unroll
      for (u32 e = 0; e < PER; e++) {
        if (lane * PER + e >= rows) continue;
        if constexpr (BYTES == 1) to[e] = (u8)(word >> (8 * e));
        else if constexpr (BYTES == 2) ((u16*)to)[e] = (u16)(word >> (16 * e));
        else *(u32*)to = word;
      }
    }
  }
}

KERNEL __launch_bounds__(TRANSPOSE_THREADS) transpose_1(Transpose op) { transposeTile<1>(op); }
KERNEL __launch_bounds__(TRANSPOSE_THREADS) transpose_2(Transpose op) { transposeTile<2>(op); }
KERNEL __launch_bounds__(TRANSPOSE_THREADS) transpose_4(Transpose op) { transposeTile<4>(op); }

// int8MmDequant

constexpr float INVERSE_127 = 1.0f / 127.0f;

DEVICE float scaled(i32 x, float row, float col, float bias) {
  return __fmaf_rn((float)x * row * col, INT8_INVERSE, bias);
}

/* Vectors of x, y, stats and bias can be read and written at once. */
template <typename T>
DEVICE bool isVectorized(const Int8MmDequant& op) {
  return op.n % Lanes<T>::COUNT == 0 && isAligned(op.x, 16) && isAligned(op.y, 16) && isAligned(op.colStats, 16) &&
         isAligned(op.bias, 16);
}

/* What a column's results have in common, for COUNT neighbours; zeros beyond the last. */
template <typename T, u32 COUNT>
struct Columns {
  float stats[COUNT];
  float bias[COUNT];

  DEVICE void load(const Int8MmDequant& op, u64 col, bool vectorized) {
    const float* from = (const float*)op.colStats + col;
    if (vectorized) {
#pragma unroll
      for (u32 e = 0; e < COUNT; e += 4) decodeVector(*(const uint4*)(from + e), stats + e);
    } else {
#pragma unroll
      for (u32 e = 0; e < COUNT; e++) stats[e] = col + e < op.n ? from[e] : 0.0f;
    }
#pragma unroll
    for (u32 e = 0; e < COUNT; e++) bias[e] = op.bias && col + e < op.n ? ::load<T>(op.bias, col + e) : 0.0f;
  }

 private:
  static DEVICE void decodeVector(uint4 v, float* to) {
    to[0] = floatOf(v.x), to[1] = floatOf(v.y), to[2] = floatOf(v.z), to[3] = floatOf(v.w);
  }
};

/* Without outliers: a thread has a vector of columns in a few rows. */
template <typename T>
DEVICE void dequantizeVectors(const Int8MmDequant& op) {
  constexpr u32 VECTOR = Lanes<T>::COUNT;
  constexpr u32 ROWS = MM_DEQUANT_ROWS;
  // No memory holds 16 times 2^32 words of x.
  const u32 vectors = (u32)((op.n + VECTOR - 1) / VECTOR);
  const u32 thread = blockIdx.x * MM_DEQUANT_THREADS + threadIdx.x;
  const u32 band = thread / vectors;
  const u64 col = (u64)(thread - band * vectors) * VECTOR;
  const u64 row = (u64)band * ROWS;
  if (row >= op.m) return;
  const i32* x = (const i32*)op.x + row * op.n + col;
  void* y = advance(op.y, (row * op.n + col) * T::BYTES);
  const float* rowStats = (const float*)op.rowStats + row;
  const bool vectorized = isVectorized<T>(op);
  Columns<T, VECTOR> columns;
  if (vectorized && row + ROWS <= op.m) {
    uint4 words[ROWS][VECTOR / 4];
#pragma unroll
    for (u32 r = 0; r < ROWS; r++)
#pragma unroll
      for (u32 e = 0; e < VECTOR / 4; e++) words[r][e] = loadStream16(x + r * op.n + e * 4);
    columns.load(op, col, true);
#pragma unroll
    for (u32 r = 0; r < ROWS; r++) {
      const float stat = rowStats[r];
      float v[VECTOR];
#pragma unroll
      for (u32 e = 0; e < VECTOR; e += 4) {
        const uint4 w = words[r][e / 4];
        v[e] = scaled((i32)w.x, stat, columns.stats[e], columns.bias[e]);
        v[e + 1] = scaled((i32)w.y, stat, columns.stats[e + 1], columns.bias[e + 1]);
        v[e + 2] = scaled((i32)w.z, stat, columns.stats[e + 2], columns.bias[e + 2]);
        v[e + 3] = scaled((i32)w.w, stat, columns.stats[e + 3], columns.bias[e + 3]);
      }
      storeStream16(advance(y, r * op.n * T::BYTES), encodeAnyVector<T>(v));
    }
    return;
  }
  columns.load(op, col, false);
#pragma unroll 1
  for (u32 r = 0; r < ROWS && row + r < op.m; r++) {
#pragma unroll
    for (u32 e = 0; e < VECTOR; e++)
      if (col + e < op.n)
        store<T>(y, r * op.n + e, scaled(x[r * op.n + e], rowStats[r], columns.stats[e], columns.bias[e]));
  }
}

/*
 * With outliers: a block makes a tile, for which it gathers the outlier columns of a and b, some at a time. Their sums, in the order of
 * the columns, are of 8 x 8 results a thread; what the integers give is added in the end.
 */
template <typename T>
struct OutlierTile {
  static constexpr u32 EDGE = OUTLIER_TILE;
  static constexpr u32 EACH = 8;
  /* Column c of the tile is at c / 8 * 4 + c % 4, in the second half where c % 8 is 4 or more: no two lanes meet in a bank. */
  static constexpr u32 HALF = EDGE / 2 + 16;
  static_assert(EDGE * EDGE == EACH * EACH * MM_DEQUANT_THREADS && 2 * EDGE == MM_DEQUANT_THREADS, "");

  struct Gathered {
    float a[OUTLIER_COLUMNS][EDGE];
    float b[OUTLIER_COLUMNS][2 * HALF];
  };

  static DEVICE u32 x() { return warpId() % 2 * 8 + laneId() % 8; }
  static DEVICE u32 y() { return warpId() / 2 * 4 + laneId() / 8; }
  static DEVICE u32 row(u32 i) { return (i / 4 * (EDGE / EACH) + y()) * 4 + i % 4; }

  /* Whether a product with another such number is exact, so that one fused operation rounds as two do. */
  static DEVICE bool isModest(float v) {
    return (bitsOf(v) & ABS) == 0 || isBetween(bitsOf(v) & ABS, 0x21800000 /* 2^-60 */, 0x5d800000 /* 2^60 */);
  }

  /* Brings `count` outlier columns: half of the threads a row of a each, half a column of the results; false: do not fuse. */
  static DEVICE bool gather(const Int8MmDequant& op, const Place& place, const i32* columns, u32 count, Gathered& to) {
    const u32 at = threadIdx.x % EDGE;
    bool modest = true;
    if (threadIdx.x < EDGE) {
      const bool there = place.row + at < op.m;
      const typename T::Raw* from = (const typename T::Raw*)op.a + (there ? place.row + at : 0) * op.k;
#pragma unroll 8
      for (u32 j = 0; j < count; j++) {
        const u32 column = (u32)columns[j];
        const float v = there && column < op.k ? decode<T>(from[column]) : 0.0f;
        modest = modest && isModest(v);
        to.a[j][at] = v;
      }
    } else {
      const bool there = place.col + at < op.n;
      const i8* from = (const i8*)op.b + (there ? place.col + at : 0) * op.k;
      const float stat = there ? ((const float*)op.colStats)[place.col + at] : 0.0f;
      float* line = to.b[0] + (at / 4 % 2 * HALF + at / 8 * 4 + at % 4);
#pragma unroll 8
      for (u32 j = 0; j < count; j++) {
        const u32 column = (u32)columns[j];
        const float v = there && column < op.k ? rounded<T>((float)from[column] * stat * INVERSE_127) : 0.0f;
        modest = modest && isModest(v);
        line[j * 2 * HALF] = v;
      }
    }
    return modest;
  }

  template <bool FUSED>
  static DEVICE void add(const Gathered& from, u32 count, float (&sums)[EACH][EACH]) {
    const float* a = from.a[0] + row(0);
    const float* b = from.b[0] + x() * 4;
#pragma unroll 2
    for (u32 j = 0; j < count; j++) {
      float u[EACH], v[EACH];
      load4(a + j * EDGE, u);
      load4(a + j * EDGE + EDGE / 2, u + 4);
      load4(b + j * 2 * HALF, v);
      load4(b + j * 2 * HALF + HALF, v + 4);
#pragma unroll
      for (u32 i = 0; i < EACH; i++)
#pragma unroll
        for (u32 e = 0; e < EACH; e++)
          sums[i][e] = FUSED ? __fmaf_rn(u[i], v[e], sums[i][e]) : sums[i][e] + u[i] * v[e];
    }
  }

  static DEVICE void make(const Int8MmDequant& op) {
    __shared__ Gathered gathered;
    const Place place = placeOfBlock<EDGE, EDGE>(op.m, op.n);
    // The integers come nearer while the outliers are gathered: lines of 128 bytes.
    for (u32 i = threadIdx.x; i < EDGE * (EDGE / 32); i += MM_DEQUANT_THREADS) {
      const u64 r = place.row + i / (EDGE / 32), c = place.col + i % (EDGE / 32) * 32;
      const i32* line = (const i32*)op.x + r * op.n + c;
      if (r < op.m && c < op.n) asm volatile("prefetch.global.L2 [%0];" ::"l"(line));
    }
    const i32 found = *(const i32*)op.count;
    const u32 count = found > 0 ? leastOf(op.k, (u32)found) : 0;
    float sums[EACH][EACH] = {};
#pragma unroll 1
    for (u32 j = 0; j < count; j += OUTLIER_COLUMNS) {
      const u32 some = leastOf(count - j, OUTLIER_COLUMNS);
      if (j > 0) __syncthreads();
      const bool modest = gather(op, place, (const i32*)op.columns + j, some, gathered);
      if constexpr (Same<T, F16>::VALUE) {
        __syncthreads();
        add<true>(gathered, some, sums);
      } else if constexpr (Same<T, BF16>::VALUE) {
        if (__syncthreads_and(modest)) add<true>(gathered, some, sums);
        else add<false>(gathered, some, sums);
      } else {
        __syncthreads();
        add<false>(gathered, some, sums);
      }
    }
    finish(op, place, count > 0, gathered, sums);
  }

  /* Half of the tile's rows at a time: sums through shared memory, then rows by neighbouring threads. */
  static DEVICE void finish(const Int8MmDequant& op, const Place& place, bool some, Gathered& shared, float (&sums)[EACH][EACH]) {
    constexpr u32 VECTOR = Lanes<T>::COUNT;
    constexpr u32 ACROSS = EDGE / VECTOR;
    constexpr u32 AT_ONCE = MM_DEQUANT_THREADS / ACROSS;
    constexpr u32 PITCH = EDGE + 4;
    static_assert(EDGE / 2 * PITCH * 4 <= sizeof(Gathered), "");
    float* staged = shared.a[0];
    const u32 at = threadIdx.x % ACROSS * VECTOR;
    const u64 col = place.col + at;
    const bool vectorized = isVectorized<T>(op) && col < op.n;
    Columns<T, VECTOR> columns;
    columns.load(op, col, vectorized);
#pragma unroll 1
    for (u32 half = 0; half < 2; half++) {
      if (some) {
        __syncthreads();
#pragma unroll
        for (u32 i = 0; i < EACH / 2; i++)
#pragma unroll
          for (u32 e = 0; e < EACH; e++)
            staged[(y() * 4 + i) * PITCH + x() * EACH + e] = half == 0 ? sums[i][e] : sums[i + EACH / 2][e];
        __syncthreads();
      }
      const u64 first = place.row + half * EDGE / 2;
      const u32 rows = first < op.m ? leastOf(op.m - first, EDGE / 2) : 0;
      if (vectorized) {
#pragma unroll 4
        for (u32 r = threadIdx.x / ACROSS; r < rows; r += AT_ONCE) {
          const i32* x = (const i32*)op.x + (first + r) * op.n + col;
          const float stat = ((const float*)op.rowStats)[first + r];
          float v[VECTOR];
#pragma unroll
          for (u32 e = 0; e < VECTOR; e += 4) {
            const uint4 w = loadStream16(x + e);
            v[e] = scaled((i32)w.x, stat, columns.stats[e], columns.bias[e]);
            v[e + 1] = scaled((i32)w.y, stat, columns.stats[e + 1], columns.bias[e + 1]);
            v[e + 2] = scaled((i32)w.z, stat, columns.stats[e + 2], columns.bias[e + 2]);
            v[e + 3] = scaled((i32)w.w, stat, columns.stats[e + 3], columns.bias[e + 3]);
            if (some) {
              float sum[4];
              load4(staged + r * PITCH + at + e, sum);
#pragma unroll
              for (u32 i = 0; i < 4; i++) v[e + i] += sum[i];
            }
          }
          storeStream16(advance(op.y, ((first + r) * op.n + col) * T::BYTES), encodeAnyVector<T>(v));
        }
      } else {
#pragma unroll 1
        for (u32 r = threadIdx.x / ACROSS; r < rows; r += AT_ONCE) {
          const i32* x = (const i32*)op.x + (first + r) * op.n + col;
          const float stat = ((const float*)op.rowStats)[first + r];
#pragma unroll
          for (u32 e = 0; e < VECTOR; e++) {
            if (col + e >= op.n) continue;
            const float v = scaled(x[e], stat, columns.stats[e], columns.bias[e]);
            store<T>(op.y, (first + r) * op.n + col + e, some ? v + staged[r * PITCH + at + e] : v);
          }
        }
      }
    }
  }
};

#define MM_DEQUANT(T, dtype)                                                                                              \
  KERNEL __launch_bounds__(MM_DEQUANT_THREADS) int8MmDequant_##dtype(Int8MmDequant op) { dequantizeVectors<T>(op); }      \
  KERNEL __launch_bounds__(MM_DEQUANT_THREADS, 2) int8MmDequant_##dtype##_outliers(Int8MmDequant op) {                    \
    OutlierTile<T>::make(op);                                                                                             \
  }
MM_DEQUANT(F32, f32)
MM_DEQUANT(F16, f16)
MM_DEQUANT(BF16, bf16)
