/** Integer products and what is made of them (LLM.int8()). Numerics: docs/numerics.md, "int8 products". */
import type { Backend } from "../core/backend.js";
import { DTYPE_BYTES, DTYPE_ID, FLOAT_DTYPES, type FloatDType } from "../core/dtype.js";
import { ArgumentError, ShapeError } from "../core/errors.js";
import type { Address } from "../core/kernels.js";
import { tidy } from "../core/scope.js";
import { formatShape, type Shape } from "../core/shape.js";
import { Tensor } from "../core/tensor.js";
import {
  checkBias,
  checkChoice,
  checkFlag,
  checkFloat,
  checkTensor,
  checkVector,
  output,
  rowsOf,
  withLast,
} from "./check.js";
import { gemmShape } from "./gemm-shape.js";
import { checkThreshold, OutlierColumns, quantizeRows } from "./int8.js";
import { fillRows } from "./rows.js";

const GONE = {
  none: "deprecated upstream and without golden vectors; exact, checked against a scalar product",
} as const;

export const igemmPrimitives = {
  int8LinearMatmul: {
    upstream: "int8_linear_matmul",
    family: "igemm",
    kernels: ["igemm"],
    dtypes: ["i8"],
    golden: "int8",
    summary: "int8 activations times an int8 weight: exact int32",
  },
  int8MmDequant: {
    upstream: "int8_mm_dequant",
    family: "igemm",
    kernels: ["int8MmDequant"],
    dtypes: ["i32"],
    golden: "int8",
    summary: "int32 products times row and column scales, with bias",
  },
  int8ScaledMm: {
    upstream: "int8_scaled_mm",
    family: "igemm",
    kernels: ["igemm", "int8MmDequant"],
    dtypes: ["i8"],
    golden: "int8",
    summary: "both in one call",
  },
  int8MixedScaledMm: {
    upstream: "int8_mixed_scaled_mm",
    family: "igemm",
    kernels: ["igemm", "int8MmDequant"],
    dtypes: FLOAT_DTYPES,
    golden: "int8",
    summary: "the same with outlier columns in floating point",
  },
  matmul8bit: {
    upstream: "matmul",
    family: "igemm",
    kernels: ["convert", "int8VectorwiseQuant", "int8OutlierColumns", "int8ZeroColumns", "igemm", "int8MmDequant"],
    dtypes: FLOAT_DTYPES,
    golden: "int8",
    summary: "activations times an int8 weight, outliers apart (LLM.int8())",
  },
  igemm: {
    upstream: "igemm",
    family: "igemm",
    kernels: ["igemm", "transpose"],
    dtypes: ["i8"],
    golden: GONE,
    summary: "int8 product to int32, either operand transposed",
  },
  batchedIgemm: {
    upstream: "batched_igemm",
    family: "igemm",
    kernels: ["igemm", "transpose"],
    dtypes: ["i8"],
    golden: GONE,
    summary: "one int8 product per batch",
  },
} as const;

const MATMUL8BIT = { op: "matmul8bit", operand: "A", unit: "row" } as const;

export interface IntegerOptions {
  /** An i32 tensor for the result. */
  readonly out?: Tensor | null | undefined;
}

/**
 * y[..., n] = sum over k of A[..., k] * B[n, k] (bitsandbytes' `int8_linear_matmul`). Exact; a sum that leaves int32, which takes a
 * K above 131,071, wraps round.
 *
 * @param A i8 `[..., K]`
 * @param B i8 `[N, K]`
 * @returns i32 `[..., N]`
 * @throws DTypeError, ShapeError, ArgumentError (out shares memory with an operand), DisposedError, DeviceError, OutOfMemoryError
 */
export function int8LinearMatmul(A: Tensor, B: Tensor, options: IntegerOptions = {}): Tensor<"i32"> {
  const op = "int8LinearMatmul";
  const { m, n, k, shape } = checkCodes(op, "A", A, "B", B);
  return tidy(() => {
    const y = output(op, "out", options.out, A.backend, "i32", shape, { A, B });
    launchIgemm(A.backend, A, B, y, m, n, k, 1);
    return y;
  });
}

interface CodesShape {
  readonly m: number;
  readonly n: number;
  readonly k: number;
  readonly shape: Shape;
}

/** Codes A [..., K] and B [N, K]. @throws as `int8LinearMatmul` */
function checkCodes(op: string, nameA: string, A: Tensor, nameB: string, B: Tensor): CodesShape {
  checkTensor(op, nameA, A, ["i8"]);
  checkTensor(op, nameB, B, ["i8"], A.backend);
  const [m, k] = rowsOf(op, nameA, A);
  const n = checkColumns(op, nameB, B, k, nameA);
  return { m, n, k, shape: withLast(A.shape, n) };
}

/** @returns the rows of B [N, K] */
function checkColumns(op: string, nameB: string, B: Tensor, k: number, nameA: string): number {
  const [n, columns] = B.shape;
  if (B.shape.length !== 2 || columns !== k) {
    throw new ShapeError(op, nameB, `[N, ${k}], as ${nameA} has rows of ${k}`, formatShape(B.shape));
  }
  return n!;
}

function launchIgemm(
  backend: Backend,
  a: Address,
  b: Address,
  y: Tensor<"i32">,
  m: number,
  n: number,
  k: number,
  batch: number,
): void {
  if (y.size === 0) return;
  if (k === 0) fillRows(y, undefined);
  else backend.launch("igemm", { a, b, y, m, n, k, batch });
}

/** Outlier columns of A, with both factors. */
interface Outliers {
  readonly a: Tensor;
  readonly b: Tensor;
  readonly columns: OutlierColumns;
  readonly k: number;
}

function launchDequant(
  x: Tensor,
  rowStats: Tensor,
  colStats: Tensor,
  bias: Tensor | null | undefined,
  y: Tensor<FloatDType>,
  m: number,
  n: number,
  outliers?: Outliers,
): void {
  if (y.size === 0) return;
  y.backend.launch("int8MmDequant", {
    x,
    rowStats,
    colStats,
    bias: bias ?? null,
    a: outliers ? outliers.a : null,
    b: outliers ? outliers.b : null,
    columns: outliers ? outliers.columns.columns : null,
    count: outliers ? outliers.columns.count : null,
    y,
    m,
    n,
    k: outliers ? outliers.k : 0,
    dtype: DTYPE_ID[y.dtype],
  });
}

export interface Int8MmDequantOptions {
  /** `[N]` of the result's dtype. */
  readonly bias?: Tensor | null | undefined;
  /** Of the result. Default f16, as upstream. */
  readonly dtype?: FloatDType | undefined;
  /** A tensor of that dtype for the result. */
  readonly out?: Tensor | null | undefined;
}

/**
 * y[m, n] = fma((A[m, n] * rowStats[m]) * colStats[n], 1/127^2, bias[n]) in float32, rounded once (bitsandbytes'
 * `int8_mm_dequant`).
 *
 * @param A i32 `[..., N]`, the product of int8 codes
 * @param rowStats f32 absmax, one per row of A
 * @param colStats f32 absmax, one per column of A
 * @returns A's shape
 * @throws DTypeError, ShapeError, ArgumentError (out shares memory with an operand), DisposedError, DeviceError, OutOfMemoryError
 */
export function int8MmDequant<D extends FloatDType>(
  A: Tensor,
  rowStats: Tensor,
  colStats: Tensor,
  options: Int8MmDequantOptions & { readonly dtype: D },
): Tensor<D>;
export function int8MmDequant(
  A: Tensor,
  rowStats: Tensor,
  colStats: Tensor,
  options?: Int8MmDequantOptions & { readonly dtype?: undefined },
): Tensor<"f16">;
export function int8MmDequant(
  A: Tensor,
  rowStats: Tensor,
  colStats: Tensor,
  options?: Int8MmDequantOptions,
): Tensor<FloatDType>;
export function int8MmDequant(
  A: Tensor,
  rowStats: Tensor,
  colStats: Tensor,
  options: Int8MmDequantOptions = {},
): Tensor<FloatDType> {
  const op = "int8MmDequant";
  const { bias, dtype = "f16" } = options;
  checkTensor(op, "A", A, ["i32"]);
  const { backend } = A;
  const [m, n] = rowsOf(op, "A", A);
  checkStats(op, "rowStats", rowStats, m, "row", backend);
  checkStats(op, "colStats", colStats, n, "column", backend);
  checkChoice<FloatDType>(op, "dtype", dtype, FLOAT_DTYPES);
  checkBias(op, bias, n, dtype, backend);
  return tidy(() => {
    const y = output(op, "out", options.out, backend, dtype, A.shape, { A, rowStats, colStats, bias });
    launchDequant(A, rowStats, colStats, bias, y, m, n);
    return y;
  });
}

function checkStats(op: string, operand: string, stats: Tensor, count: number, unit: string, backend: Backend): void {
  checkTensor(op, operand, stats, ["f32"], backend);
  if (stats.size !== count) throw new ShapeError(op, operand, `${count} scales, one per ${unit}`, `${stats.size}`);
}

/**
 * `int8LinearMatmul` and `int8MmDequant` in one call (bitsandbytes' `int8_scaled_mm`).
 *
 * @param A i8 `[..., K]`
 * @param B i8 `[N, K]`
 * @param rowStats f32 absmax, one per row of A
 * @param colStats f32 absmax, one per row of B
 * @returns `[..., N]`
 * @throws as `int8MmDequant`
 */
export function int8ScaledMm<D extends FloatDType>(
  A: Tensor,
  B: Tensor,
  rowStats: Tensor,
  colStats: Tensor,
  options: Int8MmDequantOptions & { readonly dtype: D },
): Tensor<D>;
export function int8ScaledMm(
  A: Tensor,
  B: Tensor,
  rowStats: Tensor,
  colStats: Tensor,
  options?: Int8MmDequantOptions & { readonly dtype?: undefined },
): Tensor<"f16">;
export function int8ScaledMm(
  A: Tensor,
  B: Tensor,
  rowStats: Tensor,
  colStats: Tensor,
  options?: Int8MmDequantOptions,
): Tensor<FloatDType>;
export function int8ScaledMm(
  A: Tensor,
  B: Tensor,
  rowStats: Tensor,
  colStats: Tensor,
  options: Int8MmDequantOptions = {},
): Tensor<FloatDType> {
  const op = "int8ScaledMm";
  const { bias, dtype = "f16" } = options;
  const { m, n, k, shape } = checkCodes(op, "A", A, "B", B);
  const { backend } = A;
  checkStats(op, "rowStats", rowStats, m, "row of A", backend);
  checkStats(op, "colStats", colStats, n, "row of B", backend);
  checkChoice<FloatDType>(op, "dtype", dtype, FLOAT_DTYPES);
  checkBias(op, bias, n, dtype, backend);
  return tidy(() => {
    const y = output(op, "out", options.out, backend, dtype, shape, { A, B, rowStats, colStats, bias });
    const products = Tensor.allocate(backend, "i32", [m, n]);
    launchIgemm(backend, A, B, products, m, n, k, 1);
    launchDequant(products, rowStats, colStats, bias, y, m, n);
    return y;
  });
}

export interface Int8MixedScaledMmOptions {
  /** As `int8VectorwiseQuant` found them in A; null or absent: none. */
  readonly outlierCols?: OutlierColumns | null | undefined;
  /** `[N]` of A's dtype. */
  readonly bias?: Tensor | null | undefined;
  /** A tensor of A's dtype for the result. */
  readonly out?: Tensor | null | undefined;
}

/**
 * The product of LLM.int8() (bitsandbytes' `int8_mixed_scaled_mm`): y[m, n] as `int8ScaledMm` gives it, plus the sum over the
 * outlier columns c of A[m, c] * T(CB[n, c] * SCB[n] / 127), T the dtype of A. All of it in float32, rounded once to T: upstream
 * rounds before it adds the outliers.
 *
 * @param A f32, f16 or bf16 `[..., K]`, what CA was quantized from
 * @param CA i8 codes of A's shape, with outlier columns zeroed
 * @param CB i8 codes of the weight, `[N, K]`
 * @param SCA f32 absmax, one per row of A
 * @param SCB f32 absmax `[N]`
 * @returns `[..., N]` of A's dtype
 * @throws DTypeError, ShapeError, ArgumentError (outlierCols; out shares memory with an operand), DisposedError, DeviceError,
 *   OutOfMemoryError
 */
export function int8MixedScaledMm<D extends FloatDType>(
  A: Tensor<D>,
  CA: Tensor,
  CB: Tensor,
  SCA: Tensor,
  SCB: Tensor,
  options?: Int8MixedScaledMmOptions,
): Tensor<D>;
export function int8MixedScaledMm(
  A: Tensor,
  CA: Tensor,
  CB: Tensor,
  SCA: Tensor,
  SCB: Tensor,
  options?: Int8MixedScaledMmOptions,
): Tensor<FloatDType>;
export function int8MixedScaledMm(
  A: Tensor,
  CA: Tensor,
  CB: Tensor,
  SCA: Tensor,
  SCB: Tensor,
  options: Int8MixedScaledMmOptions = {},
): Tensor<FloatDType> {
  const op = "int8MixedScaledMm";
  const { outlierCols, bias } = options;
  checkFloat(op, "A", A);
  const { backend, dtype } = A;
  checkTensor(op, "CA", CA, ["i8"], backend);
  const { m, n, k, shape } = checkCodes(op, "CA", CA, "CB", CB);
  const [rows, columns] = rowsOf(op, "A", A);
  if (rows !== m || columns !== k) {
    throw new ShapeError(op, "A", `${formatShape(CA.shape)}, as CA`, formatShape(A.shape));
  }
  checkStats(op, "SCA", SCA, m, "row of CA", backend);
  checkStats(op, "SCB", SCB, n, "row of CB", backend);
  if (outlierCols !== undefined && outlierCols !== null) checkOutliers(op, outlierCols, k, backend);
  checkBias(op, bias, n, dtype, backend);
  return tidy(() => {
    const others = { A, CA, CB, SCA, SCB, bias, outlierCols: outlierCols?.columns, count: outlierCols?.count };
    const y = output(op, "out", options.out, backend, dtype, shape, others);
    const products = Tensor.allocate(backend, "i32", [m, n]);
    launchIgemm(backend, CA, CB, products, m, n, k, 1);
    const outliers = outlierCols && k > 0 ? { a: A, b: CB, columns: outlierCols, k } : undefined;
    launchDequant(products, SCA, SCB, bias, y, m, n, outliers);
    return y;
  });
}

function checkOutliers(op: string, columns: OutlierColumns, k: number, backend: Backend): void {
  if (!(columns instanceof OutlierColumns)) {
    throw new ArgumentError(op, "outlierCols", "OutlierColumns, as int8VectorwiseQuant returns them", typeof columns);
  }
  checkTensor(op, "outlierCols.columns", columns.columns, ["i32"], backend);
  checkTensor(op, "outlierCols.count", columns.count, ["i32"], backend);
  checkVector(op, "outlierCols.columns", columns.columns, k);
  checkVector(op, "outlierCols.count", columns.count, 1);
}

export interface Matmul8bitOptions {
  /**
   * Elements of A of this magnitude and more are multiplied in floating point, compared as float32. 0, the default: none.
   * LLM.int8() uses 6.
   */
  readonly threshold?: number;
  /** Multiply NaN and infinity as bitsandbytes does instead of reporting NonFiniteError. Default false. */
  readonly allowNonFinite?: boolean;
  /** `[N]` of A's dtype. */
  readonly bias?: Tensor | null | undefined;
  /** A tensor of A's dtype for the result. */
  readonly out?: Tensor | null | undefined;
}

/**
 * Activations times an int8 weight (bitsandbytes' `matmul`, forward): A rounded to f16 and quantized by rows, the integer
 * product, and `int8MixedScaledMm` of it with A as it is.
 *
 * @param A f32, f16 or bf16 `[..., K]`
 * @param CB i8 codes of the weight, `[N, K]`, from `int8VectorwiseQuant` without a threshold
 * @param SCB f32 absmax of the weight's rows, `[N]`
 * @returns `[..., N]` of A's dtype
 * @throws DTypeError, ShapeError, ArgumentError (threshold; allowNonFinite; out shares memory with an operand), DisposedError,
 *   DeviceError, OutOfMemoryError. A later read rejects with NonFiniteError when A holds NaN, infinity, or what rounds to infinity in f16.
 */
export function matmul8bit<D extends FloatDType>(
  A: Tensor<D>,
  CB: Tensor,
  SCB: Tensor,
  options?: Matmul8bitOptions,
): Tensor<D>;
export function matmul8bit(A: Tensor, CB: Tensor, SCB: Tensor, options?: Matmul8bitOptions): Tensor<FloatDType>;
export function matmul8bit(A: Tensor, CB: Tensor, SCB: Tensor, options: Matmul8bitOptions = {}): Tensor<FloatDType> {
  const op = "matmul8bit";
  const { allowNonFinite = false, bias } = options;
  checkFloat(op, "A", A);
  const { backend, dtype } = A;
  const [m, k] = rowsOf(op, "A", A);
  checkTensor(op, "CB", CB, ["i8"], backend);
  const n = checkColumns(op, "CB", CB, k, "A");
  checkStats(op, "SCB", SCB, n, "row of CB", backend);
  const threshold = checkThreshold(op, options.threshold);
  checkFlag(op, "allowNonFinite", allowNonFinite);
  checkBias(op, bias, n, dtype, backend);
  return tidy(() => {
    const y = output(op, "out", options.out, backend, dtype, withLast(A.shape, n), { A, CB, SCB, bias });
    const half = dtype === "f16" ? A : A.to("f16");
    const [codes, scale, columns] = quantizeRows(half, threshold, allowNonFinite, MATMUL8BIT);
    const products = Tensor.allocate(backend, "i32", [m, n]);
    launchIgemm(backend, codes, CB, products, m, n, k, 1);
    const outliers = columns && k > 0 ? { a: A, b: CB, columns, k } : undefined;
    launchDequant(products, scale, SCB, bias, y, m, n, outliers);
    return y;
  });
}

export interface IgemmOptions extends IntegerOptions {
  /** A holds [..., K, M]. Default false. */
  readonly transposedA?: boolean;
  /** B holds [..., N, K]. Default false. */
  readonly transposedB?: boolean;
}

/**
 * y[..., m, n] = sum over k of A[..., m, k] * B[..., k, n] (bitsandbytes' `igemm`). Exact; wraps round as `int8LinearMatmul` does.
 * Two operands `[b, s, I]` and `[b, s, O]`, neither transposed, that do not fit so (I is not s) are contracted over b and s to
 * `[I, O]`, as upstream does for gradients of weights. Operands alone decide: the shape of `out` does not. Where I may be s, ask for
 * the contraction by reshaping to `[b * s, I]` and `[b * s, O]`, with `transposedA`.
 *
 * @param A i8 `[..., M, K]`, or with `transposedA` `[..., K, M]`
 * @param B i8 `[..., K, N]` with A's leading dimensions or `[K, N]` for all of A; with `transposedB` `[..., N, K]` or `[N, K]`
 * @returns i32 `[..., M, N]`, or the contraction `[I, O]`
 * @throws DTypeError, ShapeError, ArgumentError (out shares memory with an operand), DisposedError, DeviceError, OutOfMemoryError
 */
export function igemm(A: Tensor, B: Tensor, options: IgemmOptions = {}): Tensor<"i32"> {
  const op = "igemm";
  checkTensor(op, "A", A, ["i8"]);
  checkTensor(op, "B", B, ["i8"], A.backend);
  const { transposedA = false, transposedB = false, out } = options;
  checkFlag(op, "transposedA", transposedA);
  checkFlag(op, "transposedB", transposedB);
  if (transposedA || transposedB || !contracts(A.shape, B.shape)) {
    return integers(op, A, B, out, transposedA, transposedB);
  }
  const [b, s, i] = A.shape as [number, number, number];
  return tidy(() => {
    const [tall, wide] = [A.reshape([b * s, i]), B.reshape([b * s, B.shape[2]!])];
    return integers(op, tall, wide, out, true, false);
  });
}

/** Whether [b, s, I] and [b, s, O] have a contraction only, and no product per batch. */
function contracts(a: Shape, b: Shape): boolean {
  return a.length === 3 && b.length === 3 && a[0] === b[0] && a[1] === b[1] && a[2] !== b[1];
}

/**
 * `igemm` of two three-dimensional operands with the same number of batches (bitsandbytes' `batched_igemm`).
 * @throws as `igemm`
 */
export function batchedIgemm(A: Tensor, B: Tensor, options: IgemmOptions = {}): Tensor<"i32"> {
  const op = "batchedIgemm";
  checkTensor(op, "A", A, ["i8"]);
  checkTensor(op, "B", B, ["i8"], A.backend);
  for (const [operand, { shape }] of [["A", A] as const, ["B", B] as const]) {
    if (shape.length !== 3) throw new ShapeError(op, operand, "three dimensions", formatShape(shape));
  }
  const { transposedA = false, transposedB = false, out } = options;
  checkFlag(op, "transposedA", transposedA);
  checkFlag(op, "transposedB", transposedB);
  return integers(op, A, B, out, transposedA, transposedB);
}

function integers(
  op: string,
  A: Tensor,
  B: Tensor,
  out: Tensor | null | undefined,
  transposedA: boolean,
  transposedB: boolean,
): Tensor<"i32"> {
  const { m, n, k, batch, shared, shape } = gemmShape(op, A, B, transposedA, transposedB);
  const { backend } = A;
  return tidy(() => {
    const y = output(op, "out", out, backend, "i32", shape, { A, B });
    if (y.size === 0 || k === 0) {
      fillRows(y, undefined);
      return y;
    }
    // The kernel wants rows of k on both sides.
    const a = transposedA ? transposed(A, k, m, batch) : A;
    const b = transposedB ? B : transposed(B, k, n, shared ? 1 : batch);
    // What was transposed lies one batch behind the other: with one B they are one product.
    if (shared) launchIgemm(backend, a, b, y, batch * m, n, k, 1);
    else launchIgemm(backend, a, b, y, m, n, k, batch);
    return y;
  });
}

/** Scratch with every `rows` x `cols` matrix of x transposed. */
function transposed(x: Tensor, rows: number, cols: number, batch: number): Tensor {
  const y = Tensor.allocate(x.backend, x.dtype, [batch, cols, rows]);
  x.backend.launch("transpose", { x, y, rows, cols, batch, itemsize: DTYPE_BYTES[x.dtype] });
  return y;
}
