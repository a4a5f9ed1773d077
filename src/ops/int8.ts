/** Row-wise int8 quantization (LLM.int8()). Numerics: docs/numerics.md, "int8". */
import { DTYPE_ID, FLOAT_DTYPES, type FloatDType } from "../core/dtype.js";
import { ArgumentError, ShapeError, UnsupportedError } from "../core/errors.js";
import { tidy } from "../core/scope.js";
import { formatShape, sizeOf } from "../core/shape.js";
import { Tensor } from "../core/tensor.js";
import { checkChoice, checkFloat, checkTensor, output } from "./check.js";

export const int8Primitives = {
  int8VectorwiseQuant: {
    upstream: "int8_vectorwise_quant",
    family: "int8",
    kernels: ["int8VectorwiseQuant"],
    dtypes: FLOAT_DTYPES,
    golden: "int8",
    summary: "int8 codes and one scale per row",
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

const CONTEXT = { op: "int8VectorwiseQuant", operand: "A", unit: "row" } as const;

export interface Int8VectorwiseQuantOptions {
  /** Outlier threshold; only 0 (none) so far. */
  readonly threshold?: number;
  /** Quantize NaN and infinity without a word instead of reporting NonFiniteError. Default false. */
  readonly allowNonFinite?: boolean;
}

/**
 * Row-wise int8: q = rint(x * (127 * (1/absmax(row)))), half to even, and the rows' absmax (bitsandbytes'
 * `int8_vectorwise_quant`; x ~ q * absmax / 127).
 *
 * @param A f32, f16 or bf16 of at least one dimension; the last is the row. Upstream takes f16 only.
 * @returns i8 codes of A's shape, f32 absmax `[rows]`, and null (no outlier columns without a threshold)
 * @throws DTypeError, ShapeError, ArgumentError, DisposedError, OutOfMemoryError, UnsupportedError (threshold above 0). A later
 *   read rejects with NonFiniteError when A holds NaN or infinity.
 */
export function int8VectorwiseQuant(
  A: Tensor,
  options: Int8VectorwiseQuantOptions = {},
): [Tensor<"i8">, Tensor<"f32">, null] {
  const op = "int8VectorwiseQuant";
  const { threshold = 0, allowNonFinite = false } = options;
  checkFloat(op, "A", A);
  const [rows, cols] = rowsOf(op, "A", A);
  if (!(threshold >= 0)) throw new ArgumentError(op, "threshold", "a number not below 0", String(threshold));
  if (threshold > 0)
    throw new UnsupportedError(`[${op}] threshold ${threshold}`, "outlier columns come with the int8 products");
  return tidy(() => {
    const { backend } = A;
    const q = Tensor.allocate(backend, "i8", A.shape);
    const scale = Tensor.allocate(backend, "f32", [rows]);
    const operands = { x: A, q, scale, rows, cols, dtype: DTYPE_ID[A.dtype], allowNonFinite: allowNonFinite ? 1 : 0 };
    backend.launch("int8VectorwiseQuant", operands, CONTEXT);
    return [q, scale, null];
  });
}

/**
 * A[r, c] * stats[r] * 1/127, rounded to the result's dtype (bitsandbytes' `int8_vectorwise_dequant`).
 *
 * @param A i8 codes of at least one dimension
 * @param stats f32 absmax, one per row
 * @throws DTypeError, ShapeError, DisposedError, DeviceError, OutOfMemoryError
 */
export function int8VectorwiseDequant<D extends FloatDType = "f32">(
  A: Tensor,
  stats: Tensor,
  options: { readonly dtype?: D; readonly out?: Tensor } = {},
): Tensor<D> {
  const op = "int8VectorwiseDequant";
  const dtype = options.dtype ?? ("f32" as D);
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

function rowsOf(op: string, operand: string, A: Tensor): [number, number] {
  if (A.shape.length === 0) throw new ShapeError(op, operand, "at least one dimension", formatShape(A.shape));
  return [sizeOf(A.shape.slice(0, -1)), A.shape.at(-1)!];
}
