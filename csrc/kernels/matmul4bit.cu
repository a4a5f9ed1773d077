/*
 * Products with a 4-bit weight. Which of the three kinds serves is said in src/core/product-paths.ts; what they have in common is
 * that sums are float32 and that nothing depends on the number of blocks that run at once.
 */
#include "matmul4bit-plain.cuh"
#include "matmul4bit-tiles.cuh"
#include "matmul4bit-vector.cuh"

#define PLAIN(T, dtype) \
  KERNEL __launch_bounds__(MATMUL4BIT_PLAIN_THREADS) matmul4bit_plain_##dtype(Matmul4bit op) { PlainProduct<T>(op).run(); }
PLAIN(F32, f32)
PLAIN(F16, f16)
PLAIN(BF16, bf16)

#if HAS_SM80
extern __shared__ __align__(128) u8 dynamicShared[];

/* Where the fixed addresses of `tiles` and `vector` begin. A driver that kept more for itself would have to be noticed. */
DEVICE u8* sharedBase() {
  const u32 begin = sharedAddress(dynamicShared);
  if (begin > SHARED_BASE) __trap();
  return dynamicShared + (SHARED_BASE - begin);
}

#define VECTOR(T, dtype, SPLIT, kind, TILES, K_WARPS)                                                                    \
  KERNEL __launch_bounds__(MATMUL4BIT_VECTOR_THREADS, 2) matmul4bit_vector_##dtype##_##kind##_##TILES##_##K_WARPS(Matmul4bit op) { \
    sharedBase();                                                                                                        \
    VectorProduct<T, SPLIT, TILES, K_WARPS>(op).run();                                                                   \
  }
#define VECTORS_OF(T, dtype)        \
  VECTOR(T, dtype, 2, wide, 1, 16)  \
  VECTOR(T, dtype, 2, wide, 2, 16)  \
  VECTOR(T, dtype, 2, wide, 1, 4)   \
  VECTOR(T, dtype, 4, narrow, 1, 16) \
  VECTOR(T, dtype, 4, narrow, 2, 16)
VECTORS_OF(F16, f16)
VECTORS_OF(BF16, bf16)

#define TILES(T, dtype, most, FRAGMENTS, AHEAD)                                                                          \
  KERNEL __launch_bounds__(MATMUL4BIT_TILE##most##_ROWS / (16 * FRAGMENTS) * MATMUL4BIT_TILE##most##_GROUPS * WARP, 1)   \
      matmul4bit_tiles_##dtype##_##most(Matmul4bit op) {                                                                 \
    TileProduct<T, most / 8, FRAGMENTS, MATMUL4BIT_TILE##most##_ROWS, MATMUL4BIT_TILE##most##_GROUPS, AHEAD>(op, sharedBase()).run(); \
  }
TILES(F16, f16, 16, 2, true)
TILES(F16, f16, 32, 2, true)
TILES(F16, f16, 64, 4, false)
TILES(BF16, bf16, 16, 2, true)
TILES(BF16, bf16, 32, 2, true)
TILES(BF16, bf16, 64, 4, false)
#endif
