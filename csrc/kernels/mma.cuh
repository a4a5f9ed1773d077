/*
 * Tensor cores and what feeds them: ldmatrix, mma.sync, cp.async. All of sm_80; where HAS_SM80 is 0 there is none of it.
 *
 * Fragments, by lane (g = lane / 4, t = lane % 4). A of 16 x 16 (16-bit) or 16 x 32 bytes: words a[0] = (g, t), a[1] = (g + 8, t),
 * a[2] = (g, t + 4), a[3] = (g + 8, t + 4), a word being 2 or 4 neighbours along k. B of k x 8: b[0] = (t, column g), b[1] =
 * (t + 4, column g). D of 16 x 8: d[0], d[1] = row g, columns 2t and 2t + 1; d[2], d[3] = row g + 8.
 */
#pragma once
#include "common.cuh"

#if HAS_SM80

/* An address in shared memory, as the instructions below take it. */
DEVICE u32 sharedAddress(const void* p) {
  u32 address;
  asm("{\n\t.reg .u64 t;\n\tcvta.to.shared.u64 t, %1;\n\tcvt.u32.u64 %0, t;\n\t}" : "=r"(address) : "l"(p));
  return address;
}

// Matrices of 8 rows of 16 bytes. Lanes 0 to 7 name the rows of the first, 8 to 15 of the second, and so on; every lane's address
// must be one of shared memory. Lane l gets of each matrix word l % 4 of row l / 4; transposed, elements 2 * (l % 4) and
// 2 * (l % 4) + 1 of column l / 4.

DEVICE void ldmatrix4(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

DEVICE void ldmatrix4Transposed(u32 (&r)[4], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

DEVICE void ldmatrix2(u32 (&r)[2], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "r"(address) : "memory");
}

DEVICE void ldmatrix2Transposed(u32 (&r)[2], u32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(address)
               : "memory");
}

/* d += a * b, of 16 x 16 and 16 x 8 elements of T (F16 or BF16), in float32. */
template <typename T>
DEVICE void mma16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  if constexpr (Same<T, BF16>::VALUE)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* d += a * b, of 16 x 32 and 32 x 8 signed bytes, exact in int32. */
DEVICE void mma32(i32 (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* Starts a copy of 16 bytes into shared memory, past the first cache; both addresses are aligned to 16. */
DEVICE void copyAsync16(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

/* The same of the first `bytes` (0 to 16), zeros behind them. Of `from` no more is read; with 0 it must still be an address. */
DEVICE void copyAsync16(u32 to, const void* from, u32 bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

/* Four bytes, through the first cache: `from` is aligned to 4; with `bytes` of 0, zeros. */
DEVICE void copyAsync4(u32 to, const void* from, u32 bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

/* Ends the group of copies started since the last one. */
DEVICE void commitCopies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

/* Waits until at most the last `PENDING` of this thread's groups are under way; a barrier shows them to the other threads. */
template <u32 PENDING>
DEVICE void waitForCopies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

#endif
