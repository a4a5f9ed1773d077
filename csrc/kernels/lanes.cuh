/*
 * Products by tiles without tensor cores: a thread makes DOWN x ACROSS results, a warp 8 x 4 threads' of them. The order of a sum
 * depends on k alone, whatever the tile.
 */
#pragma once
#include "tiles.cuh"

/*
 * A word is what one multiplication takes of k. Each kind has COUNT elements of BYTES in memory, and copies the first `count` of
 * them, zeros behind.
 */
template <typename T>
struct FloatWord {
  typedef float Word;
  typedef float Sum;
  static constexpr u32 COUNT = 1, BYTES = T::BYTES;
  static DEVICE void copy(Word* to, const u8* from, u32 count) {
#if HAS_SM80
    if constexpr (T::BYTES == 4) {
      copyAsync4(sharedAddress(to), from, count * 4);
      return;
    }
#endif
    *to = count ? load<T>(from, 0) : 0.0f;
  }
  static DEVICE Sum add(Sum sum, Word a, Word b) { return __fmaf_rn(a, b, sum); }
};

/* Four signed bytes, multiplied exactly. */
struct BytesWord {
  typedef u32 Word;
  typedef i32 Sum;
  static constexpr u32 COUNT = 4, BYTES = 1;
  static DEVICE void copy(Word* to, const u8* from, u32 count) {
    if (count == 4 && isAligned(from, 4)) {
      *to = *(const u32*)from;
      return;
    }
    u32 word = 0;
#pragma unroll
    for (u32 e = 0; e < 4; e++)
      if (e < count) word |= (u32)from[e] << (8 * e);
    *to = word;
  }
  static DEVICE Sum add(Sum sum, Word a, Word b) {
    asm("dp4a.s32.s32 %0, %1, %2, %0;" : "+r"(sum) : "r"(a), "r"(b));
    return sum;
  }
};

template <u32 ROWS_, u32 COLS_, u32 DOWN_, u32 ACROSS_>
struct LaneShape {
  static constexpr u32 ROWS = ROWS_, COLS = COLS_, DOWN = DOWN_, ACROSS = ACROSS_;
  /* Threads across and down, in warps of 8 x 4. */
  static constexpr u32 X = COLS / ACROSS, Y = ROWS / DOWN;
  static constexpr u32 THREADS = X * Y;
  static_assert(X % 8 == 0 && Y % 4 == 0 && DOWN % 4 == 0 && ACROSS % 4 == 0, "");

  static DEVICE u32 x() { return warpId() % (X / 8) * 8 + laneId() % 8; }
  static DEVICE u32 y() { return warpId() / (X / 8) * 4 + laneId() / 8; }
  /* The tile's row or column of a thread's i-th: fours of neighbours, so that eight lanes read 128 bytes in a row. */
  static DEVICE u32 row(u32 i) { return (i / 4 * Y + y()) * 4 + i % 4; }
  static DEVICE u32 col(u32 j) { return (j / 4 * X + x()) * 4 + j % 4; }
};

/* Where tensor cores are missing, these make what LargeShape and SmallShape would, with as many threads. */
typedef LaneShape<LARGE_TILE, LARGE_TILE, 16, 8> LargeLanes;
typedef LaneShape<SMALL_TILE, SMALL_TILE, 8, 4> SmallLanes;
static_assert(LargeLanes::THREADS == TILE_THREADS && SmallLanes::THREADS == TILE_THREADS, "");

/* EXTENT rows or columns by a step of k, in shared memory as lines of one k; ALONG: k runs fastest in memory. */
template <typename W, u32 EXTENT, u32 THREADS, bool ALONG>
struct LaneOperand {
  typedef typename W::Word Word;
  /* So padded that a step's words of four rows lie in different banks. */
  static constexpr u32 PITCH = EXTENT + 4;
  static constexpr u32 STAGE = LANE_STEP * PITCH;
  static constexpr u32 AT_ONCE = ALONG ? THREADS / LANE_STEP : THREADS / EXTENT;
  static constexpr u32 COPIES = (ALONG ? EXTENT : LANE_STEP) / AT_ONCE;
  /* What is copied asynchronously needs no registers to be under way. */
  static constexpr u32 UNROLLED = HAS_SM80 ? 1 : 2;
  static_assert(AT_ONCE * COPIES == (ALONG ? EXTENT : LANE_STEP), "");

  const u8* from;
  u64 stride;
  long long left;
  i32 extent;
  u32 to;

  DEVICE LaneOperand(const void* x, u64 first, u64 all, u64 k) {
    const u32 word = ALONG ? threadIdx.x % LANE_STEP : threadIdx.x / EXTENT;
    const u32 at = ALONG ? threadIdx.x / LANE_STEP : threadIdx.x % EXTENT;
    const u64 pitch = (ALONG ? k : all) * W::BYTES;
    from = (const u8*)x + (ALONG ? (first + at) * pitch + word * W::COUNT * W::BYTES : word * pitch + (first + at) * W::BYTES);
    stride = pitch * AT_ONCE;
    left = (long long)k - word * W::COUNT;
    extent = (i32)leastOf(all - first, EXTENT) - (i32)at;
    to = word * PITCH + at;
  }

  DEVICE void copy(Word* stage) {
#pragma unroll(UNROLLED)
    for (u32 i = 0; i < COPIES; i++) {
      const long long rest = ALONG ? left : left - (long long)(i * AT_ONCE);
      const bool there = extent > (ALONG ? (i32)(i * AT_ONCE) : 0) && rest > 0;
      W::copy(stage + to + i * AT_ONCE * (ALONG ? 1 : PITCH), from + i * stride, there ? leastOf((u64)rest, W::COUNT) : 0);
    }
    from += ALONG ? LANE_STEP * W::COUNT * W::BYTES : stride * COPIES;
    left -= LANE_STEP * W::COUNT;
  }
};

DEVICE void commitLaneCopies() {
#if HAS_SM80
  commitCopies();
#endif
}
DEVICE void waitForLaneCopies() {
#if HAS_SM80
  waitForCopies<LANE_STAGES - 2>();
#endif
}

/* Calls `multiply(step, fromA, fromB)` for each step of k, with where the thread's rows and columns begin in shared memory. */
template <typename S, typename A, typename B, typename Word, typename Multiply>
DEVICE void walkByLanes(A& a, B& b, u32 steps, Word* shared, Multiply multiply) {
  constexpr u32 STAGE = A::STAGE + B::STAGE;
  constexpr u32 AHEAD = LANE_STAGES - 1;
#pragma unroll 1
  for (u32 s = 0; s < AHEAD; s++) {
    if (s < steps) {
      a.copy(shared + s * STAGE);
      b.copy(shared + s * STAGE + A::STAGE);
    }
    commitLaneCopies();
  }
  u32 reading = 0, writing = AHEAD;
#pragma unroll 1
  for (u32 step = 0; step < steps; step++) {
    waitForLaneCopies();
    __syncthreads();
    if (step + AHEAD < steps) {
      a.copy(shared + writing * STAGE);
      b.copy(shared + writing * STAGE + A::STAGE);
    }
    commitLaneCopies();
    const Word* from = shared + reading * STAGE;
    writing = reading;
    reading = reading + 1 == LANE_STAGES ? 0 : reading + 1;
    multiply(step, from + S::row(0), from + A::STAGE + S::col(0));
  }
}

/* Calls `add(i, j, x, y)` for the words of line k of the thread's results, or of DOWN rows of them. */
template <typename S, u32 DOWN, typename A, typename B, typename Word, typename Add>
DEVICE void multiplyLine(const Word* fromA, const Word* fromB, u32 k, Add add) {
  Word x[DOWN], y[S::ACROSS];
#pragma unroll
  for (u32 i = 0; i < DOWN; i += 4) load4(fromA + k * A::PITCH + i * S::Y, x + i);
#pragma unroll
  for (u32 j = 0; j < S::ACROSS; j += 4) load4(fromB + k * B::PITCH + j * S::X, y + j);
#pragma unroll
  for (u32 i = 0; i < DOWN; i++)
#pragma unroll
    for (u32 j = 0; j < S::ACROSS; j++) add(i, j, x[i], y[j]);
}

/* Sums in the order of k: enough where they are exact, or rounded to 16 bits in the end. */
template <typename W, typename S, typename A, typename B>
DEVICE void multiplyByLanes(A& a, B& b, u32 steps, typename W::Word* shared, typename W::Sum (&sums)[S::DOWN][S::ACROSS]) {
  typedef typename W::Word Word;
  walkByLanes<S>(a, b, steps, shared, [&](u32, const Word* fromA, const Word* fromB) {
#pragma unroll
    for (u32 k = 0; k < LANE_STEP; k++)
      multiplyLine<S, S::DOWN, A, B>(fromA, fromB, k, [&](u32 i, u32 j, Word x, Word y) { sums[i][j] = W::add(sums[i][j], x, y); });
  });
}

/* Steps whose sums are added up at a time: rounding errors are least near the root of their number. */
DEVICE u32 stepsAtOnce(u32 steps) {
  u32 some = 1;
  while ((u64)some * some < steps) some *= 2;
  return some;
}

/*
 * Float32 sums of three levels, lest rounding errors grow with k: a step's own, those of some steps, and all. That takes three
 * times the registers, so that a multiprocessor holds fewer threads.
 */
template <typename W, typename S, typename A, typename B>
DEVICE void multiplyByLevels(A& a, B& b, u32 steps, float* shared, float (&sums)[S::DOWN][S::ACROSS]) {
  // Rows at a time: a step of more than 32 sums at once makes registers spill.
  constexpr u32 DOWN = S::DOWN * S::ACROSS > 32 ? 4 : S::DOWN;
  const u32 last = stepsAtOnce(steps) - 1;
  float some[S::DOWN][S::ACROSS] = {};
  const auto collect = [&] {
#pragma unroll
    for (u32 i = 0; i < S::DOWN; i++)
#pragma unroll
      for (u32 j = 0; j < S::ACROSS; j++) {
        sums[i][j] += some[i][j];
        some[i][j] = 0.0f;
      }
  };
  walkByLanes<S>(a, b, steps, shared, [&](u32 step, const float* fromA, const float* fromB) {
#pragma unroll
    for (u32 part = 0; part < S::DOWN; part += DOWN) {
      const float* rows = fromA + part * S::Y;
      float one[DOWN][S::ACROSS];
      multiplyLine<S, DOWN, A, B>(rows, fromB, 0, [&](u32 i, u32 j, float x, float y) { one[i][j] = x * y; });
#pragma unroll
      for (u32 k = 1; k < LANE_STEP; k++)
        multiplyLine<S, DOWN, A, B>(rows, fromB, k,
                                    [&](u32 i, u32 j, float x, float y) { one[i][j] = W::add(one[i][j], x, y); });
#pragma unroll
      for (u32 i = 0; i < DOWN; i++)
#pragma unroll
        for (u32 j = 0; j < S::ACROSS; j++) some[part + i][j] += one[i][j];
    }
    if ((step & last) == last) collect();
  });
  collect();
}

/* `stageTile` for sums on lanes. */
template <typename S, typename Sum, typename Store>
DEVICE void stageLanes(const Sum (&sums)[S::DOWN][S::ACROSS], void* shared, Store store) {
  constexpr u32 PITCH = S::COLS + 4;
  constexpr u32 ROWS = S::Y * 4;
  static_assert(ROWS * PITCH <= LANE_STAGES * LANE_STEP * (S::ROWS + S::COLS + 8), "");
  Sum* to = (Sum*)shared + S::row(0) * PITCH + S::col(0);
#pragma unroll
  for (u32 i = 0; i < S::DOWN; i += 4) {
    __syncthreads();
#pragma unroll
    for (u32 r = 0; r < 4; r++)
#pragma unroll
      for (u32 j = 0; j < S::ACROSS; j++) to[r * PITCH + j / 4 * 4 * S::X + j % 4] = sums[i + r][j];
    __syncthreads();
    store(Staged<Sum, S::COLS, PITCH, ROWS>{(const Sum*)shared}, [i](u32 r) { return i * S::Y + r; });
  }
}
