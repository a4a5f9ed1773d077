/** Int8 quantization by rows and columns (LLM.int8()). Numerics: docs/numerics.md, "int8". */
import type { LaunchContext } from "../core/backend.js";
import { DTYPE_ID, FLOAT_DTYPES, type FloatDType } from "../core/dtype.js";
import { ArgumentError, ShapeError } from "../core/errors.js";
import type { TensorHolder } from "../core/scope.js";
import { tidy } from "../core/scope.js";
import { Tensor } from "../core/tensor.js";
import { checkChoice, checkFlag, checkFloat, checkTensor, output, rowsOf } from "./check.js";

export const int8Primitives = {
  int8VectorwiseQuant: {
    upstream: "int8_vectorwise_quant",
    family: "int8",
    kernels: ["int8VectorwiseQuant", "int8OutlierColumns", "int8ZeroColumns"],
    dtypes: FLOAT_DTYPES,
    golden: "int8",
    summary: "int8 codes and one scale per row; with a threshold, outlier columns apart",
  },
  int8DoubleQuant: {
    upstream: "int8_double_quant",
    family: "int8",
    kernels: ["int8VectorwiseQuant", "int8OutlierColumns", "int8ZeroColumns", "int8ColumnStats", "int8ColumnQuant"],
    dtypes: FLOAT_DTYPES,
    golden: "int8",
    summary: "int8 codes by rows and by columns, with their scales",
  },
  int8VectorwiseDequant: {
    upstream: "int8_vectorwise_dequant",
    family: "int8",
    kernels: ["int8VectorwiseDequant"],
    dtypes: ["i8"],
    golden: { none: "upstream computes it with plain tensor operations; checked against them" },
    summary: "int8 codes and row scales back to f32, f16 or bf16",
  },
} as const;

const ROW_CONTEXT = { op: "int8VectorwiseQuant", operand: "A", unit: "row" } as const;
const DOUBLE_CONTEXT = { op: "int8DoubleQuant", operand: "A", unit: "row" } as const;

/**
 * The columns that hold an outlier, as they lie on the device: how many there are is known only there, so nothing waits for it.
 * It owns its tensors: dispose it when the codes go.
 */
export class OutlierColumns implements TensorHolder {
  /**
   * For columns that are known from elsewhere. `cols` is the length of a row, K. Both tensors lie on the device of the operands and
   * become this object's. Products check dtypes and shapes, not the contents: of the first `count` columns, those outside 0 to
   * cols - 1 are ignored, one that is there twice is added twice, and the codes of a column that is named must be 0 for it not
   * to count in int8 as well.
   */
  constructor(
    /** i32 `[cols]`: the columns in ascending order, then -1. */
    readonly columns: Tensor<"i32">,
    /** i32 `[1]`: how many there are. */
    readonly count: Tensor<"i32">,
  ) {}

  /** The columns, ascending. Waits for the device. Rejects as `Tensor.data`. */
  async indices(): Promise<Int32Array<ArrayBuffer>> {
    const [columns, count] = await Promise.all([this.columns.data(), this.count.data()]);
    return columns.slice(0, count[0]!) as Int32Array<ArrayBuffer>;
  }

  tensors(): Tensor[] {
    return [this.columns, this.count];
  }

  dispose(): void {
    this.columns.dispose();
    this.count.dispose();
  }

  [Symbol.dispose](): void {
    this.dispose();
  }
}

export interface Int8VectorwiseQuantOptions {
  /** Elements of this magnitude and more are outliers, compared as float32. 0, the default: there are none. */
  readonly threshold?: number;
  /** Quantize NaN and infinity without a word instead of reporting NonFiniteError. Default false. */
  readonly allowNonFinite?: boolean;
}

/**
 * Row-wise int8: q = rint(x * (127 * (1/absmax(row)))), half to even, and the rows' absmax (bitsandbytes'
 * `int8_vectorwise_quant`; x ~ q * absmax / 127). With a threshold, outliers do not count for absmax and get code 0; where A has
 * more than one row, so do all elements of the columns that hold one. The product adds those columns apart (`int8MixedScaledMm`).
 *
 * @param A f32, f16 or bf16 of at least one dimension; the last is the row. Upstream takes f16 only.
 * @returns i8 codes of A's shape, f32 absmax `[rows]`, and the outlier columns: null without a threshold
 * @throws DTypeError, ShapeError, ArgumentError (threshold, allowNonFinite), DisposedError, OutOfMemoryError. A later read rejects
 *   with NonFiniteError when A holds NaN or infinity.
 */
export function int8VectorwiseQuant(
  A: Tensor,
  options: Int8VectorwiseQuantOptions = {},
): [Tensor<"i8">, Tensor<"f32">, OutlierColumns | null] {
  const op = "int8VectorwiseQuant";
  const { allowNonFinite = false } = options;
  checkFloat(op, "A", A);
  rowsOf(op, "A", A);
  const threshold = checkThreshold(op, options.threshold);
  checkFlag(op, "allowNonFinite", allowNonFinite);
  return tidy(() => quantizeRows(A, threshold, allowNonFinite, ROW_CONTEXT));
}

/**
 * @returns the threshold as kernels compare with it, in float32
 * @throws ArgumentError, also for a threshold above 0 that is 0 or infinite in float32: the one would mean that everything is an
 *   outlier, but be taken for none
 */
export function checkThreshold(op: string, threshold: number = 0): number {
  const single = typeof threshold === "number" ? Math.fround(threshold) : Number.NaN;
  if (threshold === 0 || (single > 0 && single < Number.POSITIVE_INFINITY)) return single;
  throw new ArgumentError(op, "threshold", "0 or a finite float32 above it", String(threshold));
}

/** `int8VectorwiseQuant` for an op that has checked its operands and opened a scope. */
export function quantizeRows(
  A: Tensor<FloatDType>,
  threshold: number,
  allowNonFinite: boolean,
  context: LaunchContext,
): [Tensor<"i8">, Tensor<"f32">, OutlierColumns | null] {
  const { backend } = A;
  const [rows, cols] = rowsOf(context.op, "A", A);
  const q = Tensor.allocate(backend, "i8", A.shape);
  const scale = Tensor.allocate(backend, "f32", [rows]);
  const outliers = threshold > 0 ? Tensor.allocate(backend, "u8", [cols]) : null;
  if (outliers) backend.launch("fill", { dst: outliers, bytes: cols, value: 0 });
  const operands = {
    x: A,
    q,
    scale,
    outliers,
    rows,
    cols,
    threshold,
    dtype: DTYPE_ID[A.dtype],
    allowNonFinite: allowNonFinite ? 1 : 0,
  };
  backend.launch("int8VectorwiseQuant", operands, context);
  if (!outliers) return [q, scale, null];
  const columns = Tensor.allocate(backend, "i32", [cols]);
  const count = Tensor.allocate(backend, "i32", [1]);
  if (cols === 0) backend.launch("fill", { dst: count, bytes: count.byteLength, value: 0 });
  else backend.launch("int8OutlierColumns", { outliers, columns, count, cols });
  if (rows > 1 && cols > 0) backend.launch("int8ZeroColumns", { q, columns, count, rows, cols });
  return [q, scale, new OutlierColumns(columns, count)];
}

/**
 * Int8 by rows, as `int8VectorwiseQuant`, and by columns (bitsandbytes' `int8_double_quant`): colStats[c] = the largest magnitude
 * of column c, codes rint(T(x * 127) / colStats[c]) with T the dtype of A. With a threshold, outliers count for neither and get
 * code 0. In f16, x * 127 is infinite above 516: such codes are ±127 whatever they should be, as far as the threshold leaves them.
 *
 * @param A f32, f16 or bf16 of at least one dimension; the last is the row
 * @returns i8 codes by rows and by columns, both of A's shape, f32 absmax `[rows]` and `[cols]`, and the outlier columns: null
 *   without a threshold
 * @throws as `int8VectorwiseQuant`
 */
export function int8DoubleQuant(
  A: Tensor,
  options: Int8VectorwiseQuantOptions = {},
): [Tensor<"i8">, Tensor<"i8">, Tensor<"f32">, Tensor<"f32">, OutlierColumns | null] {
  const op = "int8DoubleQuant";
  const { allowNonFinite = false } = options;
  checkFloat(op, "A", A);
  const [rows, cols] = rowsOf(op, "A", A);
  const threshold = checkThreshold(op, options.threshold);
  checkFlag(op, "allowNonFinite", allowNonFinite);
  return tidy(() => {
    const { backend } = A;
    const dtype = DTYPE_ID[A.dtype];
    const [byRow, rowStats, outliers] = quantizeRows(A, threshold, allowNonFinite, DOUBLE_CONTEXT);
    const byColumn = Tensor.allocate(backend, "i8", A.shape);
    const colStats = Tensor.allocate(backend, "f32", [cols]);
    if (rows === 0) backend.launch("fill", { dst: colStats, bytes: colStats.byteLength, value: 0 });
    else if (cols > 0) {
      backend.launch("int8ColumnStats", { x: A, stats: colStats, rows, cols, threshold, dtype });
      backend.launch("int8ColumnQuant", { x: A, stats: colStats, q: byColumn, rows, cols, threshold, dtype });
    }
    return [byRow, byColumn, rowStats, colStats, outliers];
  });
}

export interface Int8VectorwiseDequantOptions {
  /** Of the result. Default f32. */
  readonly dtype?: FloatDType | undefined;
  /** A tensor of that dtype for the result. */
  readonly out?: Tensor | null | undefined;
}

/**
 * A[r, c] * stats[r] * 1/127, rounded to the result's dtype (bitsandbytes' `int8_vectorwise_dequant`).
 *
 * @param A i8 codes of at least one dimension
 * @param stats f32 absmax, one per row
 * @throws DTypeError, ShapeError, DisposedError, DeviceError, OutOfMemoryError
 */
export function int8VectorwiseDequant<D extends FloatDType>(
  A: Tensor,
  stats: Tensor,
  options: Int8VectorwiseDequantOptions & { readonly dtype: D },
): Tensor<D>;
export function int8VectorwiseDequant(
  A: Tensor,
  stats: Tensor,
  options?: Int8VectorwiseDequantOptions & { readonly dtype?: undefined },
): Tensor<"f32">;
export function int8VectorwiseDequant(
  A: Tensor,
  stats: Tensor,
  options?: Int8VectorwiseDequantOptions,
): Tensor<FloatDType>;
export function int8VectorwiseDequant(
  A: Tensor,
  stats: Tensor,
  options: Int8VectorwiseDequantOptions = {},
): Tensor<FloatDType> {
  const op = "int8VectorwiseDequant";
  const { dtype = "f32" } = options;
  checkTensor(op, "A", A, ["i8"]);
  checkTensor(op, "stats", stats, ["f32"], A.backend);
  checkChoice<FloatDType>(op, "dtype", dtype, FLOAT_DTYPES);
  const [rows, cols] = rowsOf(op, "A", A);
  if (stats.size !== rows) throw new ShapeError(op, "stats", `${rows} scales, one per row`, `${stats.size}`);
  return tidy(() => {
    const y = output(op, "out", options.out, A.backend, dtype, A.shape, { A, stats });
    A.backend.launch("int8VectorwiseDequant", { q: A, scale: stats, y, rows, cols, dtype: DTYPE_ID[dtype] });
    return y;
  });
}
