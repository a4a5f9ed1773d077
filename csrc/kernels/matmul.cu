/*
 * Dense products, where no library makes them. 16-bit types on tensor cores, float32 on lanes (all 24 bits of it); on sm_72, which
 * lacks half of what the former need, all on lanes. y[m, n] = sum over k, in its order or in levels, plus bias, rounded once.
 */
#include "lanes.cuh"

extern __shared__ uint4 shared[];

/* Rows of y, each a few vectors of neighbouring threads, from where their sums are. */
template <typename T, u32 THREADS>
struct RowStore {
  static constexpr u32 VECTOR = Lanes<T>::COUNT;
  const Matmul& op;
  const Place& place;

  template <typename From, typename RowOf>
  DEVICE void operator()(From from, RowOf rowOf) const {
    constexpr u32 ACROSS = From::COLS / VECTOR;
    const u32 at = threadIdx.x % ACROSS * VECTOR;
    const u64 col = place.col + at;
    if (col >= op.n) return;
    u8* y = (u8*)advance(op.y, place.batch * op.m * op.ldy * T::BYTES);
    const bool whole = isAligned(y, 16) && op.ldy % VECTOR == 0 && col + VECTOR <= op.n;
    float bias[VECTOR];
#pragma unroll
    for (u32 e = 0; e < VECTOR; e++) bias[e] = op.bias && col + e < op.n ? load<T>(op.bias, col + e) : 0.0f;
#pragma unroll 1
    for (u32 r = threadIdx.x / ACROSS; r < From::ROWS; r += THREADS / ACROSS) {
      const u64 row = place.row + rowOf(r);
      if (row >= op.m) continue;
      float v[VECTOR];
#pragma unroll
      for (u32 e = 0; e < VECTOR; e += 4) load4(from.sums + r * From::PITCH + at + e, v + e);
#pragma unroll
      for (u32 e = 0; e < VECTOR; e++) v[e] += bias[e];
      void* to = y + (row * op.ldy + col) * T::BYTES;
      if (whole) {
        *(uint4*)to = encodeAnyVector<T>(v);
      } else {
#pragma unroll
        for (u32 e = 0; e < VECTOR; e++)
          if (col + e < op.n) store<T>(to, e, v[e]);
      }
    }
  }
};

template <typename T, typename S, bool ALONG_A, bool ALONG_B>
DEVICE void multiplyOnLanes(const Matmul& op) {
  typedef FloatWord<T> W;
  typedef LaneOperand<W, S::ROWS, S::THREADS, ALONG_A> A;
  typedef LaneOperand<W, S::COLS, S::THREADS, ALONG_B> B;
  const Place place = placeOfBlock<S::ROWS, S::COLS>(op.m, op.n);
  A a(advance(op.a, place.batch * op.m * op.k * T::BYTES), place.row, op.m, op.k);
  B b(advance(op.b, op.sharedB ? 0 : place.batch * op.k * op.n * T::BYTES), place.col, op.n, op.k);
  float sums[S::DOWN][S::ACROSS] = {};
  const u32 steps = (u32)((op.k + LANE_STEP - 1) / LANE_STEP);
  if constexpr (T::BYTES == 4)
    multiplyByLevels<W, S, A, B>(a, b, steps, (float*)shared, sums);
  else
    multiplyByLanes<W, S, A, B>(a, b, steps, (float*)shared, sums);
  stageLanes<S>(sums, shared, RowStore<T, S::THREADS>{op, place});
}

#if HAS_SM80

template <u32 EXTENT, u32 THREADS, bool ALONG>
struct HalvesOf {
  typedef AlongK<2, EXTENT, THREADS> Type;
};
template <u32 EXTENT, u32 THREADS>
struct HalvesOf<EXTENT, THREADS, false> {
  typedef AcrossK<2, EXTENT, THREADS> Type;
};

template <typename T, typename S, typename Lanes, bool ALONG_A, bool ALONG_B>
DEVICE void multiply(const Matmul& op) {
  typedef typename HalvesOf<S::ROWS, S::THREADS, ALONG_A>::Type A;
  typedef typename HalvesOf<S::COLS, S::THREADS, ALONG_B>::Type B;
  const Place place = placeOfBlock<S::ROWS, S::COLS>(op.m, op.n);
  A a(advance(op.a, place.batch * op.m * op.k * T::BYTES), place.row, op.m, op.k);
  B b(advance(op.b, op.sharedB ? 0 : place.batch * op.k * op.n * T::BYTES), place.col, op.n, op.k);
  constexpr u32 LENGTH = STEP / T::BYTES;
  float sums[S::DOWN][S::ACROSS][4] = {};
  multiplyTile<MmaHalves<T>, S, A, B>(a, b, (u32)((op.k + LENGTH - 1) / LENGTH), sharedAddress(shared), sums);
  stageTile<S>(sums, shared, RowStore<T, S::THREADS>{op, place});
}

#else

template <typename T, typename S, typename Lanes, bool ALONG_A, bool ALONG_B>
DEVICE void multiply(const Matmul& op) {
  multiplyOnLanes<T, Lanes, ALONG_A, ALONG_B>(op);
}

#endif

typedef LaneShape<LARGE_TILE, LARGE_TILE, 8, 8> LargeFloats;
typedef SmallLanes SmallFloats;
static_assert(LargeFloats::THREADS == FLOAT_THREADS && SmallFloats::THREADS == TILE_THREADS, "");

// By layout: a as it is (n) or transposed (t), then b; b runs along k where it is transposed.
#define HALVES(T, dtype, layout, alongA, alongB)                                                      \
  KERNEL __launch_bounds__(TILE_THREADS, 2) matmul_##dtype##_##layout##_large(Matmul op) {            \
    multiply<T, LargeShape, LargeLanes, alongA, alongB>(op);                                          \
  }                                                                                                   \
  KERNEL __launch_bounds__(TILE_THREADS, 4) matmul_##dtype##_##layout##_small(Matmul op) {            \
    multiply<T, SmallShape, SmallLanes, alongA, alongB>(op);                                          \
  }
#define FLOATS(layout, alongA, alongB)                                                                \
  KERNEL __launch_bounds__(FLOAT_THREADS, 1) matmul_f32_##layout##_large(Matmul op) {                 \
    multiplyOnLanes<F32, LargeFloats, alongA, alongB>(op);                                            \
  }                                                                                                   \
  KERNEL __launch_bounds__(TILE_THREADS, 3) matmul_f32_##layout##_small(Matmul op) {                  \
    multiplyOnLanes<F32, SmallFloats, alongA, alongB>(op);                                            \
  }
#define LAYOUT(layout, alongA, alongB)      \
  FLOATS(layout, alongA, alongB)            \
  HALVES(F16, f16, layout, alongA, alongB)  \
  HALVES(BF16, bf16, layout, alongA, alongB)
LAYOUT(nn, true, false)
LAYOUT(nt, true, true)
LAYOUT(tn, false, false)
LAYOUT(tt, false, true)
