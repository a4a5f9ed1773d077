/**
 * The device kernels, each declared once: its name and the fields of its operand struct. A backend packs the struct in
 * this order; asm/ and csrc/ get the offsets generated from here, so the three cannot disagree. A backend's kernel table
 * is a total mapped type over `KernelName`: a kernel that is missing on one backend does not compile.
 */

/**
 * `in` and `out` are device addresses (`out`: the kernel writes there, and may read); `size` is an element or byte count of
 * the device's address width; `u32` and `f32` are plain words.
 */
export type FieldType = "in" | "out" | "size" | "u32" | "f32";

/** What the optimizer kernels share: see src/core/optimizers.ts for the list, the row of scalars and the guard. */
const OPTIMIZER_STEP = {
  list: "in",
  chunks: "in",
  scalars: "in",
  guard: "in",
  ratios: "in",
  count: "size",
  known: "u32",
  family: "u32",
  dtype: "u32",
  gradDtype: "u32",
  skipZeros: "u32",
} as const;
const OPTIMIZER_CODES = { code1: "in", table1: "in", code2: "in", table2: "in" } as const;

export const KERNELS = {
  /** dst[0..bytes) = src[0..bytes); the ranges do not overlap. */
  copy: { src: "in", dst: "out", bytes: "size" },
  /** dst[0..bytes) = the four bytes of `value`, repeated. */
  fill: { dst: "out", bytes: "size", value: "u32" },
  /** y[i] = x[i] as dtype `to`: nearest even into f16/bf16, truncated and saturated into integers. */
  convert: { x: "in", y: "out", n: "size", from: "u32", to: "u32" },
  /** One level of the summation tree: y[c] = sum of the 1,024 elements of chunk c, in f64 (x is f32, or f64 partials). */
  sumChunks: { x: "in", y: "out", n: "size", wide: "u32" },
  /** y[0] = f32(the rest of the tree over the f64 x[0..sums) / n); at most SUM_CHUNK^2 sums. */
  meanOfSums: { x: "in", y: "out", sums: "size", n: "size" },
  /** y[r, c] = dtype(the sum of x[s, r, c] over s = 0, 1, ... splits - 1, in float32, + bias[c]); bias (of dtype) or null. */
  sumPartials: { x: "in", bias: "in", y: "out", rows: "size", cols: "size", splits: "u32", dtype: "u32" },
  /** q[i] = index of the code nearest to (x[i] - offset) / absmax(block). Unit: block. */
  quantizeBlockwise: {
    x: "in",
    q: "out",
    absmax: "out",
    code: "in",
    table: "in",
    offset: "in",
    n: "size",
    blocksize: "u32",
    dtype: "u32",
    allowNonFinite: "u32",
  },
  /** y[i] = code[q[i]] * absmax(block) + offset, rounded to dtype. Unit: block. */
  dequantizeBlockwise: {
    q: "in",
    absmax: "in",
    code: "in",
    offset: "in",
    y: "out",
    n: "size",
    blocksize: "u32",
    dtype: "u32",
  },
  /** packed nibbles (first element high) of the nearest NF4 or FP4 codes. Unit: block. */
  quantize4bit: {
    x: "in",
    packed: "out",
    absmax: "out",
    n: "size",
    blocksize: "u32",
    dtype: "u32",
    quantType: "u32",
    allowNonFinite: "u32",
  },
  /** y[i] = code(nibble i) * absmax(block), rounded to dtype. Unit: block. */
  dequantize4bit: {
    packed: "in",
    absmax: "in",
    y: "out",
    n: "size",
    blocksize: "u32",
    dtype: "u32",
    quantType: "u32",
  },
  /**
   * q[r, c] = rint(x[r, c] * (127 * (1 / absmax(row r)))), scale[r] = absmax(row r). With `outliers` (u8 per column, cleared
   * before), elements of magnitude `threshold` and more do not count for absmax, get code 0 and set their column's byte to 1.
   * Unit: row.
   */
  int8VectorwiseQuant: {
    x: "in",
    q: "out",
    scale: "out",
    outliers: "out",
    rows: "size",
    cols: "size",
    threshold: "f32",
    dtype: "u32",
    allowNonFinite: "u32",
  },
  /** y[r, c] = q[r, c] * scale[r] * f32(1/127), rounded to dtype. Unit: row. */
  int8VectorwiseDequant: { q: "in", scale: "in", y: "out", rows: "size", cols: "size", dtype: "u32" },
  /** columns[0..count) = the columns whose byte in `outliers` is not 0, ascending; the rest of columns[0..cols) = -1. i32. */
  int8OutlierColumns: { outliers: "in", columns: "out", count: "out", cols: "size" },
  /** q[r, columns[j]] = 0 for j < count. */
  int8ZeroColumns: { q: "out", columns: "in", count: "in", rows: "size", cols: "size" },
  /** stats[c] = the largest |x[r, c]| of column c; with threshold > 0 only of those below it. */
  int8ColumnStats: { x: "in", stats: "out", rows: "size", cols: "size", threshold: "f32", dtype: "u32" },
  /** q[r, c] = rint(T(x[r, c] * 127) / stats[c]), T the dtype of x; 0 where |x| >= threshold > 0, and where stats[c] is 0. */
  int8ColumnQuant: { x: "in", stats: "in", q: "out", rows: "size", cols: "size", threshold: "f32", dtype: "u32" },
  /** y[b, m, n] = sum over k of a[b, m, k] * b[b, n, k]: int8 in, exact int32 out. */
  igemm: { a: "in", b: "in", y: "out", m: "size", n: "size", k: "size", batch: "size" },
  /** y[b, c, r] = x[b, r, c]; elements of 1, 2 or 4 bytes. */
  transpose: { x: "in", y: "out", rows: "size", cols: "size", batch: "size", itemsize: "u32" },
  /**
   * y[m, n] = fma((x[m, n] * rowStats[m]) * colStats[n], INT8_INVERSE, bias[n]) rounded to dtype; x is int32, bias (or null)
   * has the dtype. With `columns`, before rounding plus the sum over j < count of
   * a[m, c] * dtype(b[n, c] * colStats[n] / 127), c = columns[j]; a has the dtype, b is int8, both with k columns.
   */
  int8MmDequant: {
    x: "in",
    rowStats: "in",
    colStats: "in",
    bias: "in",
    a: "in",
    b: "in",
    columns: "in",
    count: "in",
    y: "out",
    m: "size",
    n: "size",
    k: "size",
    dtype: "u32",
  },
  /**
   * y[m, n] = sum over k of a[m, k] * W[n, k] (+ bias[n]), W the 4-bit weight of n x k elements whose blocks run on over the ends of
   * rows. Nested scales (u8 codes in absmax) come with `code` (256 f32), `absmax2` and `offset`; null otherwise. bias or null.
   * With `splits` above 1, on cuda, partial[s, m, n] gets the float32 sums over the s-th part of k, and y and bias are left alone.
   */
  matmul4bit: {
    a: "in",
    packed: "in",
    absmax: "in",
    code: "in",
    absmax2: "in",
    offset: "in",
    bias: "in",
    y: "out",
    partial: "out",
    m: "size",
    n: "size",
    k: "size",
    blocksize: "u32",
    blocksize2: "u32",
    dtype: "u32",
    quantType: "u32",
    splits: "u32",
  },
  /** y[m, k] = sum over n of g[m, n] * W[n, k], W as for matmul4bit with plain scales. */
  matmul4bitTransposed: {
    g: "in",
    packed: "in",
    absmax: "in",
    y: "out",
    m: "size",
    n: "size",
    k: "size",
    blocksize: "u32",
    dtype: "u32",
    quantType: "u32",
  },
  /**
   * Activations for matmul4bitFast: rows of int8 codes and one f32 scale per ACTIVATION_BLOCK columns of a row; a row's codes are
   * padded with 0 to a whole block.
   */
  quantizeActivations: { x: "in", q: "out", scale: "out", rows: "size", cols: "size", dtype: "u32" },
  /** matmul4bit on activations from quantizeActivations, in integers. */
  matmul4bitFast: {
    q: "in",
    scale: "in",
    packed: "in",
    absmax: "in",
    bias: "in",
    y: "out",
    m: "size",
    n: "size",
    k: "size",
    blocksize: "u32",
    dtype: "u32",
    quantType: "u32",
  },
  /**
   * y[b, m, n] = sum over k of A[b, m, k] * B[b, k, n] (+ bias[n]), float32 sums rounded once to dtype. a holds A as m x k, or with
   * transposeA as k x m; b holds B as k x n, or with transposeB as n x k (as torch.nn.Linear has it); with sharedB one b serves
   * every batch. bias or null. The rows of y begin ldy elements apart (n, or more where y is a column slice: then batch is 1).
   */
  matmul: {
    a: "in",
    b: "in",
    bias: "in",
    y: "out",
    m: "size",
    n: "size",
    k: "size",
    batch: "size",
    ldy: "size",
    dtype: "u32",
    transposeA: "u32",
    transposeB: "u32",
    sharedB: "u32",
  },
  /** y[r, n] = sum over entries (r, c, v), in their order, of v * b[c, n]; entries are sorted by row. y has rows x n elements. */
  spmmCoo: {
    rowidx: "in",
    colidx: "in",
    values: "in",
    b: "in",
    y: "out",
    nnz: "size",
    rows: "size",
    cols: "size",
    n: "size",
    dtype: "u32",
  },
  /**
   * One step of a family on all tensors of a list, states in float32: the formulas are in docs/numerics.md, "Optimizers". `chunks`
   * has `count` entries. The row of scalars is number guard.skipped - known, or 0 without a guard; with guard.skip nothing is
   * written. `ratios` (f32 per record, or null) multiplies the step. Unit: chunk.
   */
  optimizerUpdate32bit: OPTIMIZER_STEP,
  /**
   * The same with 8-bit states in blocks of 256: code1 and table1 for first moments and one-state families (the signed map, its table
   * with the sign rule), code2 and table2 for second moments (null where there is none).
   */
  optimizerUpdate8bitBlockwise: { ...OPTIMIZER_STEP, ...OPTIMIZER_CODES },
  /** partial[2c] and partial[2c + 1] = sums of squares over chunk c of the parameter and of the update that the step would make. */
  optimizerNorms32bit: { ...OPTIMIZER_STEP, partial: "out" },
  optimizerNorms8bitBlockwise: { ...OPTIMIZER_STEP, ...OPTIMIZER_CODES, partial: "out" },
  /**
   * ratios[t] = min(1, (maxUnorm * |p| + eps) / |u|) of record t, from norms[2t] = |p| and norms[2t + 1] = |u| before it is
   * multiplied by the row's `unit`. Unit: record.
   */
  optimizerRatios: {
    norms: "in",
    scalars: "in",
    guard: "in",
    ratios: "out",
    records: "size",
    known: "u32",
    maxUnorm: "f32",
    eps: "f32",
  },
  /** guard.found = the least index of a record whose gradient holds NaN or infinity, if that is less. Unit: chunk. */
  gradientCheck: { list: "in", chunks: "in", guard: "out", count: "size", gradDtype: "u32" },
  /** Decides whether the step is skipped: guard.skip and, if so, guard.skipped and guard.last; then clears guard.found. */
  gradientVerdict: { guard: "out", allowNonFinite: "u32" },
  /** partial[c] = sum of squares of chunk c of the gradients. Unit: chunk. */
  gradientSumSquares: { list: "in", chunks: "in", partial: "out", count: "size", gradDtype: "u32" },
  /** norms[t * width + j] = f32(sqrt(sum over the chunks c of record t of partial[c * width + j])). Unit: record. */
  tensorNorms: { list: "in", partial: "in", norms: "out", records: "size", width: "u32" },
  /**
   * result[0] = the norm of `count` norms, result[1] = min(1, maxNorm / (result[0] + 1e-6)); with `errors`, 1 where the norm is not
   * finite, so that gradients which are reported keep their values.
   */
  clipCoefficient: { norms: "in", result: "out", count: "size", maxNorm: "f32", errors: "u32" },
  /** Multiplies the gradients of a list by factor[0]. Unit: chunk. */
  scaleGradients: { list: "in", chunks: "in", factor: "in", count: "size", gradDtype: "u32" },
} as const satisfies Record<string, Record<string, FieldType>>;

export type KernelName = keyof typeof KERNELS;
export const KERNEL_NAMES = Object.keys(KERNELS) as KernelName[];

/** The file in asm/ and csrc/kernels/ that holds each kernel. */
export const KERNEL_FAMILY = {
  copy: "memory",
  fill: "memory",
  convert: "convert",
  sumChunks: "sum",
  meanOfSums: "sum",
  sumPartials: "sum",
  quantizeBlockwise: "blockwise",
  dequantizeBlockwise: "blockwise",
  quantize4bit: "fourbit",
  dequantize4bit: "fourbit",
  int8VectorwiseQuant: "int8",
  int8VectorwiseDequant: "int8",
  int8OutlierColumns: "int8",
  int8ZeroColumns: "int8",
  int8ColumnStats: "int8",
  int8ColumnQuant: "int8",
  igemm: "igemm",
  transpose: "igemm",
  int8MmDequant: "igemm",
  matmul4bit: "matmul4bit",
  matmul4bitTransposed: "matmul4bit",
  quantizeActivations: "matmul4bit",
  matmul4bitFast: "matmul4bit",
  matmul: "matmul",
  spmmCoo: "sparse",
  optimizerUpdate32bit: "optimizer",
  optimizerUpdate8bitBlockwise: "optimizer",
  optimizerNorms32bit: "optimizer",
  optimizerNorms8bitBlockwise: "optimizer",
  optimizerRatios: "optimizer",
  gradientCheck: "gradient",
  gradientVerdict: "gradient",
  gradientSumSquares: "gradient",
  tensorNorms: "gradient",
  clipCoefficient: "gradient",
  scaleGradients: "gradient",
} as const satisfies Record<KernelName, string>;
export type KernelFamily = (typeof KERNEL_FAMILY)[KernelName];

/** The number that asm/ and csrc/ know a 4-bit type by. */
export const QUANT_TYPE_ID = { nf4: 0, fp4: 1 } as const;

/** Below this absmax, int8 rows are quantized with x and absmax both times 2^64, so that 127 / absmax does not overflow. */
export const INT8_TINY = 1e-30;

/** What int8MmDequant multiplies by, as float32: upstream's 1 / 127^2. */
export const INT8_INVERSE = 6.200012e-5;

/** Columns that share a scale in the activations of the fast 4-bit product. */
export const ACTIVATION_BLOCK = 32;

/** Elements of one chunk of the summation tree, and its lanes (see docs/architecture.md, "The summation tree"). */
export const SUM_CHUNK = 1024;
export const SUM_LANES = 32;

/** A place in device memory: a tensor is one, a raw allocation with an offset is one. */
export interface Address {
  readonly storage: Storage;
  readonly byteOffset: number;
}

/** A device allocation. `arena` and `offset` mean something to its backend only. */
export interface Storage {
  readonly bytes: number;
  readonly arena: number;
  readonly offset: number;
}

type FieldValue<F extends FieldType> = F extends "in" | "out" ? Address | null : number;
/** The operands of kernel K, by name. */
export type Operands<K extends KernelName> = {
  readonly [F in keyof (typeof KERNELS)[K]]: (typeof KERNELS)[K][F] extends FieldType
    ? FieldValue<(typeof KERNELS)[K][F]>
    : never;
};

const FIELD_BYTES = (address: 4 | 8): Record<FieldType, number> => ({
  in: address,
  out: address,
  size: address,
  u32: 4,
  f32: 4,
});

/** Byte offsets of a kernel's fields for a device with 4- or 8-byte addresses, each field on its natural alignment. */
export function operandLayout(kernel: KernelName, address: 4 | 8): { offsets: Record<string, number>; bytes: number } {
  const width = FIELD_BYTES(address);
  const offsets: Record<string, number> = {};
  let at = 0;
  for (const [field, type] of Object.entries(KERNELS[kernel]) as [string, FieldType][]) {
    const bytes = width[type];
    at = Math.ceil(at / bytes) * bytes;
    offsets[field] = at;
    at += bytes;
  }
  return { offsets, bytes: Math.ceil(at / address) * address };
}
