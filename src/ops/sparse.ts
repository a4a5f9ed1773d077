/** Products with sparse matrices: a list of entries (row, column, value). Numerics: docs/numerics.md, "Sparse products". */
import type { DeviceChoice } from "../backend/devices.js";
import { DTYPE_ID, FLOAT_DTYPES, type FloatDType } from "../core/dtype.js";
import { ArgumentError, ShapeError } from "../core/errors.js";
import { type TensorHolder, tidy } from "../core/scope.js";
import { formatShape } from "../core/shape.js";
import { checkShape, Tensor } from "../core/tensor.js";
import { checkChoice, checkFloat, checkTensor, checkVector, output } from "./check.js";
import { zeros } from "./create.js";
import { fillRows } from "./rows.js";

const GONE = { none: "gone from bitsandbytes 0.50; checked against float64" } as const;

export const sparsePrimitives = {
  spmmCoo: {
    upstream: "spmm_coo",
    family: "sparse",
    kernels: ["spmmCoo"],
    dtypes: FLOAT_DTYPES,
    golden: GONE,
    summary: "a sparse matrix times a dense one",
  },
  spmmCooVerySparse: {
    upstream: "spmm_coo_very_sparse",
    family: "sparse",
    kernels: ["convert", "fill", "int8MmDequant", "spmmCoo"],
    dtypes: ["f32", "f16", "bf16", "i8"],
    golden: GONE,
    summary: "the same, also times int8 codes with a scale per column",
  },
  cooZeros: {
    upstream: "coo_zeros",
    family: "sparse",
    kernels: ["fill"],
    dtypes: FLOAT_DTYPES,
    golden: GONE,
    summary: "a sparse matrix whose entries are all zero",
  },
} as const;

/** The bits of float32 127, the scale of an int8 code's largest magnitude. */
const CODE_MAX_BITS = 0x42fe0000;

type CooParts = [rowidx: Tensor<"i32">, colidx: Tensor<"i32">, values: Tensor<FloatDType>];

/**
 * A sparse matrix as a list of entries in the order of their rows (bitsandbytes' class of that name). It owns its tensors.
 *
 * The entries are the caller's to fill: `rowidx` from 0 to rows - 1 and not decreasing, `colidx` from 0 to cols - 1. They lie on
 * the device and are not checked: entries whose indices lie outside are ignored, and where `rowidx` decreases, it is not defined which
 * entries count.
 */
export class COOSparseTensor implements TensorHolder {
  readonly rows: number;
  readonly cols: number;
  readonly nnz: number;
  readonly rowidx: Tensor<"i32">;
  readonly colidx: Tensor<"i32">;
  readonly values: Tensor<FloatDType>;

  /**
   * From `rowidx` and `colidx`, i32 `[nnz]`, and `values`, f32, f16 or bf16 `[nnz]`.
   * @throws ArgumentError, ShapeError, DTypeError, DisposedError, DeviceError
   */
  constructor(rows: number, cols: number, ...parts: CooParts);
  /** With `nnz`, which the tensors must have, as upstream's constructor. @throws as without it */
  constructor(rows: number, cols: number, nnz: number, ...parts: CooParts);
  constructor(rows: number, cols: number, ...rest: CooParts | [nnz: number, ...parts: CooParts]) {
    const op = "COOSparseTensor";
    const counted = typeof rest[0] === "number";
    const [rowidx, colidx, values] = (counted ? rest.slice(1) : rest) as CooParts;
    checkShape(op, [rows, cols]);
    checkFloat(op, "values", values);
    const { backend } = values;
    const size = counted ? (rest[0] as number) : values.size;
    checkVector(op, "values", values, size);
    checkTensor(op, "rowidx", rowidx, ["i32"], backend);
    checkTensor(op, "colidx", colidx, ["i32"], backend);
    checkVector(op, "rowidx", rowidx, size);
    checkVector(op, "colidx", colidx, size);
    this.rows = rows;
    this.cols = cols;
    this.nnz = size;
    this.rowidx = rowidx;
    this.colidx = colidx;
    this.values = values;
  }

  tensors(): Tensor[] {
    return [this.rowidx, this.colidx, this.values];
  }

  dispose(): void {
    for (const tensor of this.tensors()) tensor.dispose();
  }

  [Symbol.dispose](): void {
    this.dispose();
  }
}

export interface CooZerosOptions {
  /** Of the values. Default f16, as upstream. */
  readonly dtype?: FloatDType;
  /** Default: as `tensor`. */
  readonly device?: DeviceChoice | undefined;
}

/**
 * A sparse `rows` x `cols` matrix with `nnz` entries, all of them zero and in row 0 and column 0 (bitsandbytes' `coo_zeros`); fill
 * them with `copyFrom`.
 * @throws ArgumentError, ShapeError (sizes), DeviceError, OutOfMemoryError
 */
export function cooZeros(rows: number, cols: number, nnz: number, options: CooZerosOptions = {}): COOSparseTensor {
  const op = "cooZeros";
  const { dtype = "f16", device } = options;
  checkShape(op, [rows, cols]);
  checkShape(op, [nnz]);
  if (nnz > 0 && rows * cols === 0) throw new ArgumentError(op, "nnz", "0 in a matrix without elements", String(nnz));
  checkChoice<FloatDType>(op, "dtype", dtype, FLOAT_DTYPES);
  return tidy(() => {
    const rowidx = zeros([nnz], { dtype: "i32", device });
    const colidx = zeros([nnz], { dtype: "i32", device });
    return new COOSparseTensor(rows, cols, rowidx, colidx, zeros([nnz], { dtype, device }));
  });
}

export interface SpmmCooOptions {
  /** A tensor for the result; overwritten. */
  readonly out?: Tensor | null | undefined;
}

/**
 * y[r, n] = sum over the entries (r, c, v) of row r, in their order, of v * B[c, n] (bitsandbytes' `spmm_coo`): float32 sums,
 * rounded once.
 *
 * @param cooA `[rows, cols]`
 * @param B of the dtype of cooA's values, `[cols, N]`
 * @returns `[rows, N]` of that dtype
 * @throws DTypeError, ShapeError, ArgumentError (out shares memory with an operand), DisposedError, DeviceError, OutOfMemoryError
 */
export function spmmCoo<D extends FloatDType>(cooA: COOSparseTensor, B: Tensor<D>, options?: SpmmCooOptions): Tensor<D>;
export function spmmCoo(cooA: COOSparseTensor, B: Tensor, options?: SpmmCooOptions): Tensor<FloatDType>;
export function spmmCoo(cooA: COOSparseTensor, B: Tensor, options: SpmmCooOptions = {}): Tensor<FloatDType> {
  const op = "spmmCoo";
  checkSparse(op, cooA);
  checkTensor(op, "B", B, [cooA.values.dtype], cooA.values.backend);
  checkDense(op, cooA, B);
  return multiply(op, cooA, B, undefined, options.out);
}

export interface SpmmCooVerySparseOptions extends SpmmCooOptions {
  /** f32 `[N]`, the absmax of B's columns: with i8 codes only, which stand for code * absmax / 127. */
  readonly dequantStats?: Tensor | null | undefined;
}

/**
 * `spmmCoo` that takes int8 codes too (bitsandbytes' `spmm_coo_very_sparse`, which was a faster way for few entries per row; here
 * there is one way). Codes are decoded and rounded to the dtype of the values first. Unlike upstream's, `out` is overwritten.
 *
 * @param cooA `[rows, cols]`
 * @param B of the dtype of cooA's values or i8, `[cols, N]`
 * @returns `[rows, N]` of the dtype of cooA's values
 * @throws as `spmmCoo`, ArgumentError (dequantStats without i8 codes, or codes without them)
 */
export function spmmCooVerySparse(
  cooA: COOSparseTensor,
  B: Tensor,
  options: SpmmCooVerySparseOptions = {},
): Tensor<FloatDType> {
  const op = "spmmCooVerySparse";
  const stats = options.dequantStats ?? undefined;
  checkSparse(op, cooA);
  const { backend, dtype } = cooA.values;
  checkTensor(op, "B", B, [dtype, "i8"], backend);
  const n = checkDense(op, cooA, B);
  if (B.dtype !== "i8") {
    if (stats !== undefined) throw new ArgumentError(op, "dequantStats", `nothing with B of ${B.dtype}`, "scales");
    return multiply(op, cooA, B, undefined, options.out);
  }
  if (stats === undefined) throw new ArgumentError(op, "dequantStats", "a scale per column of int8 codes", "nothing");
  checkTensor(op, "dequantStats", stats, ["f32"], backend);
  checkVector(op, "dequantStats", stats, n);
  return multiply(op, cooA, B, stats, options.out);
}

function checkSparse(op: string, cooA: COOSparseTensor): void {
  if (!(cooA instanceof COOSparseTensor)) throw new ArgumentError(op, "cooA", "a COOSparseTensor", typeof cooA);
  checkFloat(op, "cooA.values", cooA.values);
  checkTensor(op, "cooA.rowidx", cooA.rowidx, ["i32"]);
  checkTensor(op, "cooA.colidx", cooA.colidx, ["i32"]);
}

/** @returns the columns of B */
function checkDense(op: string, { cols }: COOSparseTensor, B: Tensor): number {
  const [rows, n] = B.shape;
  if (B.shape.length !== 2 || rows !== cols) {
    throw new ShapeError(op, "B", `[${cols}, N], the columns of cooA`, formatShape(B.shape));
  }
  return n!;
}

function multiply(
  op: string,
  { rows, cols, nnz, rowidx, colidx, values }: COOSparseTensor,
  B: Tensor,
  stats: Tensor | undefined,
  out: Tensor | null | undefined,
): Tensor<FloatDType> {
  const { backend, dtype } = values;
  const n = B.shape[1]!;
  return tidy(() => {
    const y = output(op, "out", out, backend, dtype, [rows, n], { B, rowidx, colidx, values, dequantStats: stats });
    if (y.size === 0 || nnz === 0) {
      fillRows(y, undefined);
      return y;
    }
    const b = stats ? decodeColumns(B, stats, dtype) : B;
    backend.launch("spmmCoo", { rowidx, colidx, values, b, y, nnz, rows, cols, n, dtype: DTYPE_ID[dtype] });
    return y;
  });
}

/** code * stats[column] / 127 of int8 codes: as int32 products they are those of rows whose scale is 127. */
function decodeColumns(codes: Tensor, stats: Tensor, dtype: FloatDType): Tensor<FloatDType> {
  const { backend } = codes;
  const [m, n] = codes.shape as [number, number];
  const rowStats = Tensor.allocate(backend, "f32", [m]);
  backend.launch("fill", { dst: rowStats, bytes: rowStats.byteLength, value: CODE_MAX_BITS });
  const y = Tensor.allocate(backend, dtype, [m, n]);
  backend.launch("int8MmDequant", {
    x: codes.to("i32"),
    rowStats,
    colStats: stats,
    bias: null,
    a: null,
    b: null,
    columns: null,
    count: null,
    y,
    m,
    n,
    k: 0,
    dtype: DTYPE_ID[dtype],
  });
  return y;
}
