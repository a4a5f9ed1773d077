/*
 * Products by tiles on tensor cores: a block makes ROWS x COLS results. It walks along k in steps of STEP bytes, the next steps
 * coming into shared memory meanwhile, and a warp multiplies its part of the tile from there. Sums are made in the order of k,
 * whatever the tile, so a result depends on its row and column alone.
 */
#pragma once
#include "mma.cuh"

// Which tile a block makes

struct Place {
  u64 batch;
  u64 row;
  u64 col;
};

/* Neighbouring blocks make a square of tiles, so that what they read meets in the second cache. */
constexpr u32 PLACE_ROWS = 8;

template <u32 ROWS, u32 COLS>
DEVICE Place placeOfBlock(u64 m, u64 n) {
  const u32 rowTiles = (u32)((m + ROWS - 1) / ROWS);
  const u32 colTiles = (u32)((n + COLS - 1) / COLS);
  const u32 batch = blockIdx.x / (rowTiles * colTiles);
  const u32 index = blockIdx.x - batch * (rowTiles * colTiles);
  const u32 band = index / (PLACE_ROWS * colTiles);
  const u32 left = rowTiles - band * PLACE_ROWS;
  const u32 rows = left < PLACE_ROWS ? left : PLACE_ROWS;
  const u32 within = index - band * (PLACE_ROWS * colTiles);
  return {batch, (u64)(band * PLACE_ROWS + within % rows) * ROWS, (u64)(within / rows) * COLS};
}

DEVICE u32 leastOf(u64 a, u32 b) { return a < b ? (u32)a : b; }

/* Four bytes of elements of BYTES; those from `bytes` on are 0 and not read. */
template <u32 BYTES>
DEVICE u32 gatherWord(const u8* from, u32 at, u32 bytes) {
  u32 word = 0;
#pragma unroll
  for (u32 e = 0; e < 4; e += BYTES) {
    u32 element = 0;
    if (at + e < bytes) element = BYTES == 1 ? from[at + e] : *(const u16*)(from + at + e);
    word |= element << (8 * e);
  }
  return word;
}

/* The geometry of a tile and its warps. */
template <u32 ROWS_, u32 COLS_, u32 WARP_ROWS_, u32 WARP_COLS_>
struct Shape {
  static constexpr u32 ROWS = ROWS_, COLS = COLS_, WARP_ROWS = WARP_ROWS_, WARP_COLS = WARP_COLS_;
  static constexpr u32 WARPS_ACROSS = COLS / WARP_COLS;
  static constexpr u32 THREADS = ROWS / WARP_ROWS * WARPS_ACROSS * WARP;
  static constexpr u32 DOWN = WARP_ROWS / 16;
  static constexpr u32 ACROSS = WARP_COLS / 8;
  static_assert(ACROSS % 2 == 0, "ldmatrix4 brings two fragments of b");
  static_assert(THREADS == TILE_THREADS, "");
};
typedef Shape<LARGE_TILE, LARGE_TILE, LARGE_TILE / 2, LARGE_TILE / 2> LargeShape;
typedef Shape<SMALL_TILE, SMALL_TILE, SMALL_TILE / 2, SMALL_TILE / 2> SmallShape;

/* Four words of shared memory. */
template <typename Word>
DEVICE void load4(const Word* from, Word* to) {
  const uint4 v = *(const uint4*)from;
  if constexpr (Same<Word, float>::VALUE) {
    to[0] = floatOf(v.x), to[1] = floatOf(v.y), to[2] = floatOf(v.z), to[3] = floatOf(v.w);
  } else {
    to[0] = (Word)v.x, to[1] = (Word)v.y, to[2] = (Word)v.z, to[3] = (Word)v.w;
  }
}

/*
 * Finished sums go through shared memory, some rows of the tile at a time, so that a row is written by neighbouring threads and the
 * cases of that need no code for each sum. `row` says which row of the tile a row of shared memory is.
 */
template <typename Sum, u32 COLS_, u32 PITCH_, u32 ROWS_>
struct Staged {
  static constexpr u32 COLS = COLS_, PITCH = PITCH_, ROWS = ROWS_;
  const Sum* sums;
};

#if HAS_SM80

/* Bytes of k in a step: 32 elements of 16 bits, 64 of 8. */
constexpr u32 STEP = TILE_STEP;
constexpr u32 CHUNK = 16;
/* What one mma takes of k. */
constexpr u32 MMA_BYTES = 32;
constexpr u32 MMAS = STEP / MMA_BYTES;
static_assert(MMAS == 2, "the two sets of fragments take turns");

DEVICE void storeShared16(u32 to, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

/* The first `bytes` of 16 at any address of elements of BYTES, element by element. */
template <u32 BYTES>
DEVICE void copySlowly(u32 to, const u8* from, u32 bytes) {
  storeShared16(to, make_uint4(gatherWord<BYTES>(from, 0, bytes), gatherWord<BYTES>(from, 4, bytes),
                               gatherWord<BYTES>(from, 8, bytes), gatherWord<BYTES>(from, 12, bytes)));
}

// Operands: EXTENT rows of a, or columns of b, by a step of k. What is beyond the operand's end is zero.

/*
 * In memory k runs fastest, as in shared memory: rows of STEP bytes, two of which fill the banks. Row r has chunk c at
 * c ^ (r / 2 % 4), so that eight rows' chunks lie in different banks.
 */
template <u32 BYTES, u32 EXTENT, u32 THREADS>
struct AlongK {
  static constexpr u32 STAGE = EXTENT * STEP;
  static constexpr u32 CHUNKS = STEP / CHUNK;
  /* Rows that all threads copy at once. */
  static constexpr u32 AT_ONCE = THREADS / CHUNKS;
  static_assert(EXTENT % AT_ONCE == 0 && AT_ONCE % 8 == 0, "");

  const u8* from;
  u64 stride;
  /* Bytes of k that are left, from this thread's chunk on; and rows. */
  long long left;
  i32 rows;
  u32 to;
  bool aligned;

  static DEVICE u32 place(u32 row, u32 chunk) { return row * STEP + ((chunk ^ (row / 2 & 3)) * CHUNK); }

  DEVICE AlongK(const void* x, u64 first, u64 extent, u64 k) {
    const u64 pitch = k * BYTES;
    const u32 row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
    aligned = isAligned(x, CHUNK) && pitch % CHUNK == 0;
    from = (const u8*)x + (first + row) * pitch + chunk * CHUNK;
    stride = pitch * AT_ONCE;
    left = (long long)pitch - chunk * CHUNK;
    rows = (i32)leastOf(extent - first, EXTENT) - (i32)row;
    to = place(row, chunk);
  }

  DEVICE void copy(u32 stage) {
    stage += to;
    const u32 bytes = left <= 0 ? 0 : leastOf((u64)left, CHUNK);
    if (aligned) {
#pragma unroll
      for (u32 i = 0; i < EXTENT / AT_ONCE; i++)
        copyAsync16(stage + i * AT_ONCE * STEP, from + i * stride, (i32)(i * AT_ONCE) < rows && bytes ? CHUNK : 0);
    } else {
#pragma unroll 1
      for (u32 i = 0; i < EXTENT / AT_ONCE; i++)
        copySlowly<BYTES>(stage + i * AT_ONCE * STEP, from + i * stride, (i32)(i * AT_ONCE) < rows ? bytes : 0);
    }
    from += STEP;
    left -= STEP;
  }

  /* Rows `row` to `row` + 15 as the fragment of a, from the second half of them from 8 on. */
  static DEVICE void loadA(u32 (&r)[4], u32 stage, u32 row, u32 part) {
    const u32 lane = laneId();
    ldmatrix4(r, stage + place(row + (lane & 15), part * 2 + lane / 16));
  }
  /* Columns `row` to `row` + 15: two fragments of b, of two words each. */
  static DEVICE void loadB(u32 (&r)[4], u32 stage, u32 row, u32 part) {
    const u32 lane = laneId();
    ldmatrix4(r, stage + place(row + (lane & 7) + lane / 16 * 8, part * 2 + (lane / 8 & 1)));
  }
};

/*
 * In memory, as in shared memory, rows or columns run fastest (16-bit elements): STEP / 2 lines of EXTENT elements. Line k has
 * chunk c at c ^ (k % 8).
 */
template <u32 BYTES, u32 EXTENT, u32 THREADS>
struct AcrossK {
  static_assert(BYTES == 2, "ldmatrix transposes elements of 16 bits");
  static constexpr u32 PITCH = EXTENT * BYTES;
  static constexpr u32 LINES = STEP / BYTES;
  static constexpr u32 STAGE = LINES * PITCH;
  static constexpr u32 CHUNKS = PITCH / CHUNK;
  static constexpr u32 AT_ONCE = THREADS / CHUNKS;
  static_assert(LINES % AT_ONCE == 0 && AT_ONCE % 8 == 0 && CHUNKS % 8 == 0, "");

  const u8* from;
  u64 stride;
  /* Lines that are left, from this thread's on; bytes of its chunk that are there. */
  long long left;
  u32 bytes;
  u32 to;
  bool aligned;

  static DEVICE u32 place(u32 line, u32 chunk) { return line * PITCH + ((chunk ^ (line & 7)) * CHUNK); }

  DEVICE AcrossK(const void* x, u64 first, u64 extent, u64 k) {
    const u64 pitch = extent * BYTES;
    const u32 line = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
    aligned = isAligned(x, CHUNK) && pitch % CHUNK == 0;
    from = (const u8*)x + line * pitch + first * BYTES + chunk * CHUNK;
    stride = pitch * AT_ONCE;
    left = (long long)k - line;
    const u64 end = (extent - first) * BYTES;
    bytes = end > chunk * CHUNK ? leastOf(end - chunk * CHUNK, CHUNK) : 0;
    to = place(line, chunk);
  }

  DEVICE void copy(u32 stage) {
    stage += to;
    if (aligned) {
#pragma unroll
      for (u32 i = 0; i < LINES / AT_ONCE; i++)
        copyAsync16(stage + i * AT_ONCE * PITCH, from + i * stride, (i32)(i * AT_ONCE) < left && bytes ? CHUNK : 0);
    } else {
#pragma unroll 1
      for (u32 i = 0; i < LINES / AT_ONCE; i++)
        copySlowly<BYTES>(stage + i * AT_ONCE * PITCH, from + i * stride, (i32)(i * AT_ONCE) < left ? bytes : 0);
    }
    from += stride * (LINES / AT_ONCE);
    left -= LINES;
  }

  static DEVICE void loadA(u32 (&r)[4], u32 stage, u32 row, u32 part) {
    const u32 lane = laneId();
    ldmatrix4Transposed(r, stage + place(part * 16 + (lane & 7) + lane / 16 * 8, row / 8 + (lane / 8 & 1)));
  }
  static DEVICE void loadB(u32 (&r)[4], u32 stage, u32 row, u32 part) {
    const u32 lane = laneId();
    ldmatrix4Transposed(r, stage + place(part * 16 + (lane & 15), row / 8 + lane / 16));
  }
};

// The product

template <typename T>
struct MmaHalves {
  typedef float Sum;
  static DEVICE void add(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) { mma16<T>(d, a, b0, b1); }
};
struct MmaBytes {
  typedef i32 Sum;
  static DEVICE void add(i32 (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) { mma32(d, a, b0, b1); }
};

/* What a warp multiplies at once. */
template <typename S, typename A, typename B>
struct Fragments {
  u32 a[S::DOWN][4];
  u32 b[S::ACROSS / 2][4];

  DEVICE void load(u32 stage, u32 row, u32 col, u32 part) {
#pragma unroll
    for (u32 i = 0; i < S::DOWN; i++) A::loadA(a[i], stage, row + i * 16, part);
#pragma unroll
    for (u32 j = 0; j < S::ACROSS / 2; j++) B::loadB(b[j], stage + A::STAGE, col + j * 16, part);
  }
};

/* sums[i][j] += the warp's 16 x 8 results i down and j across, over `steps` steps. */
template <typename Mma, typename S, typename A, typename B>
DEVICE void multiplyTile(A& a, B& b, u32 steps, u32 shared, typename Mma::Sum (&sums)[S::DOWN][S::ACROSS][4]) {
  constexpr u32 STAGE = A::STAGE + B::STAGE;
  constexpr u32 AHEAD = TILE_STAGES - 1;
  const u32 row = warpId() / S::WARPS_ACROSS * S::WARP_ROWS;
  const u32 col = warpId() % S::WARPS_ACROSS * S::WARP_COLS;
  if (steps == 0) return;
#pragma unroll 1
  for (u32 s = 0; s < AHEAD; s++) {
    if (s < steps) {
      a.copy(shared + s * STAGE);
      b.copy(shared + s * STAGE + A::STAGE);
    }
    commitCopies();
  }
  Fragments<S, A, B> fragments[MMAS];
  u32 reading = 0, writing = AHEAD;
  waitForCopies<AHEAD - 1>();
  __syncthreads();
  fragments[0].load(shared, row, col, 0);
#pragma unroll 1
  for (u32 step = 0; step < steps; step++) {
    fragments[1].load(shared + reading * STAGE, row, col, 1);
    // The stage before this one: behind the last barrier nobody reads it any more.
    if (step + AHEAD < steps) {
      a.copy(shared + writing * STAGE);
      b.copy(shared + writing * STAGE + A::STAGE);
    }
    commitCopies();
    writing = reading;
    reading = reading + 1 == TILE_STAGES ? 0 : reading + 1;
#pragma unroll
    for (u32 i = 0; i < S::DOWN; i++)
#pragma unroll
      for (u32 j = 0; j < S::ACROSS; j++)
        Mma::add(sums[i][j], fragments[0].a[i], fragments[0].b[j / 2][j % 2 * 2], fragments[0].b[j / 2][j % 2 * 2 + 1]);
    waitForCopies<AHEAD - 1>();
    __syncthreads();
    // After the last step, of a stage that nobody needs.
    fragments[0].load(shared + reading * STAGE, row, col, 0);
#pragma unroll
    for (u32 i = 0; i < S::DOWN; i++)
#pragma unroll
      for (u32 j = 0; j < S::ACROSS; j++)
        Mma::add(sums[i][j], fragments[1].a[i], fragments[1].b[j / 2][j % 2 * 2], fragments[1].b[j / 2][j % 2 * 2 + 1]);
  }
}

/* Calls `store(staged, row)` with some fragments of each warp at a time. So padded that the pairs of eight rows meet in no bank. */
template <typename S, typename Sum, typename Store>
DEVICE void stageTile(const Sum (&sums)[S::DOWN][S::ACROSS][4], void* shared, Store store) {
  constexpr u32 PITCH = S::COLS + 8;
  constexpr u32 FRAGMENTS = 2;
  constexpr u32 EACH = FRAGMENTS * 16;
  constexpr u32 ROWS = S::ROWS / S::WARP_ROWS * EACH;
  static_assert(ROWS * PITCH * 4 <= TILE_STAGES * (S::ROWS + S::COLS) * STEP && S::DOWN % FRAGMENTS == 0, "");
  Sum* to = (Sum*)shared + (warpId() / S::WARPS_ACROSS * EACH + laneId() / 4) * PITCH + warpId() % S::WARPS_ACROSS * S::WARP_COLS +
            laneId() % 4 * 2;
#pragma unroll
  for (u32 i = 0; i < S::DOWN; i += FRAGMENTS) {
    __syncthreads();
#pragma unroll
    for (u32 r = 0; r < 2 * FRAGMENTS; r++)
#pragma unroll
      for (u32 j = 0; j < S::ACROSS; j++)
#pragma unroll
        for (u32 e = 0; e < 2; e++) to[r * 8 * PITCH + j * 8 + e] = sums[i + r / 2][j][r % 2 * 2 + e];
    __syncthreads();
    store(Staged<Sum, S::COLS, PITCH, ROWS>{(const Sum*)shared},
          [i](u32 r) { return r / EACH * S::WARP_ROWS + i * 16 + r % EACH; });
  }
}

#endif
