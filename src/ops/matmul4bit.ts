/** Products with a 4-bit weight. Numerics: docs/numerics.md, "4-bit products"; which path runs: docs/products.md. */
import { DTYPE_BYTES, DTYPE_ID, DTYPES, FLOAT_DTYPES, type FloatDType } from "../core/dtype.js";
import { ShapeError } from "../core/errors.js";
import { ACTIVATION_BLOCK, QUANT_TYPE_ID } from "../core/kernels.js";
import { DENSE_SLICE_BYTES, type ProductMode, productPath, tileSplits } from "../core/product-paths.js";
import { tidy } from "../core/scope.js";
import { ceilDiv, formatShape } from "../core/shape.js";
import { Tensor } from "../core/tensor.js";
import type { QuantState } from "../quant/state.js";
import { decodeScales, type NestedState } from "./blockwise.js";
import { checkBias, checkChoice, checkFloat, checkTensor, output, rowsOf, withLast } from "./check.js";
import { checkPacked } from "./fourbit.js";
import { fillRows } from "./rows.js";

export const matmul4bitPrimitives = {
  matmul4bit: {
    upstream: "matmul_4bit",
    family: "matmul4bit",
    kernels: [
      "matmul4bit",
      "sumPartials",
      "quantizeActivations",
      "matmul4bitFast",
      "dequantizeBlockwise",
      "dequantize4bit",
      "matmul",
    ],
    dtypes: FLOAT_DTYPES,
    golden: "gemm_4bit",
    summary: "activations times a 4-bit weight, with bias; on the cpu exact or in int8",
  },
  gemv4bit: {
    upstream: "gemv_4bit",
    family: "matmul4bit",
    kernels: ["matmul4bit", "dequantizeBlockwise"],
    dtypes: FLOAT_DTYPES,
    golden: "gemm_4bit",
    summary: "the same for one row of activations",
  },
  matmul4bitBackward: {
    upstream: "matmul_4bit (backward)",
    family: "matmul4bit",
    kernels: ["matmul4bitTransposed", "dequantizeBlockwise", "dequantize4bit", "matmul"],
    dtypes: FLOAT_DTYPES,
    golden: { none: "the golden products go forward; checked against float64" },
    summary: "a gradient times a 4-bit weight, without a transposed copy of it",
  },
} as const;

const MODES = ["exact", "fast"] as const satisfies readonly ProductMode[];

export interface Gemv4bitOptions {
  /** A tensor of A's dtype for the result. */
  readonly out?: Tensor | null;
}

export interface Matmul4bitOptions extends Gemv4bitOptions {
  /** `[N]` of A's dtype, added in float32 before the one rounding. */
  readonly bias?: Tensor | null;
  /**
   * `fast`, on the cpu: activations are rounded to int8 in blocks of 32 and multiplied in integers; less exact, and with large
   * weights 1.5 to 3 times as fast (docs/products.md). On cuda the same as `exact`. Default `exact`.
   */
  readonly mode?: ProductMode;
}

/**
 * y[..., n] = sum over k of A[..., k] * W[n, k] (+ bias[n]), W = code(nibble) * absmax(block) rounded to A's dtype, whatever the
 * state's own dtype is: float32 sums, rounded once to A's dtype (bitsandbytes' `matmul_4bit`, forward).
 *
 * On cuda the path `vector` (f16 and bf16, few rows) does not round W: it multiplies with the codes' values, rounded to A's dtype times
 * a common factor, and applies a block's scale to the float32 sum of 32 or 64 products. So a W that overflows f16 gives a finite
 * result there, and a sum that is not scaled yet may overflow float32 where the scaled one would not (activations near 3e37).
 *
 * @param A f32, f16 or bf16 `[..., K]`
 * @param B packed codes as `quantize4bit` returns them, of any dtype
 * @param state of a weight `[N, K]`, with plain or nested scales
 * @returns `[..., N]` of A's dtype; the bias or zeros where K is 0
 * @throws DTypeError, ShapeError (A, bias or out that do not fit the weight; codes that do not fit the state), ArgumentError (a
 *   blockwise state, scales that are missing or do not fit, an unknown mode, out that shares memory with an operand),
 *   DisposedError, DeviceError, OutOfMemoryError. All of it before anything is launched.
 */
export function matmul4bit<D extends FloatDType>(
  A: Tensor<D>,
  B: Tensor,
  state: QuantState,
  options?: Matmul4bitOptions,
): Tensor<D>;
export function matmul4bit(A: Tensor, B: Tensor, state: QuantState, options?: Matmul4bitOptions): Tensor<FloatDType>;
export function matmul4bit(
  A: Tensor,
  B: Tensor,
  state: QuantState,
  options: Matmul4bitOptions = {},
): Tensor<FloatDType> {
  return product("matmul4bit", A, B, state, options);
}

/**
 * `matmul4bit` for one row of activations (bitsandbytes' `gemv_4bit`).
 *
 * @param A f32, f16 or bf16 of K elements, `[K]` or `[..., 1, K]`
 * @returns `[..., N]` of A's dtype
 * @throws as `matmul4bit`, ShapeError (several rows)
 */
export function gemv4bit<D extends FloatDType>(
  A: Tensor<D>,
  B: Tensor,
  state: QuantState,
  options?: Gemv4bitOptions,
): Tensor<D>;
export function gemv4bit(A: Tensor, B: Tensor, state: QuantState, options?: Gemv4bitOptions): Tensor<FloatDType>;
export function gemv4bit(A: Tensor, B: Tensor, state: QuantState, options: Gemv4bitOptions = {}): Tensor<FloatDType> {
  const op = "gemv4bit";
  checkFloat(op, "A", A);
  const [rows] = rowsOf(op, "A", A);
  if (rows !== 1) throw new ShapeError(op, "A", "one row", formatShape(A.shape));
  return product(op, A, B, state, { out: options.out });
}

function product(
  op: string,
  A: Tensor,
  B: Tensor,
  state: QuantState,
  { bias, out, mode = "exact" }: Matmul4bitOptions,
): Tensor<FloatDType> {
  checkFloat(op, "A", A);
  const { backend, dtype } = A;
  const weight = checkWeight(op, B, state, A);
  const { n, k, nested } = weight;
  const [m, cols] = rowsOf(op, "A", A);
  if (cols !== k) throw new ShapeError(op, "A", `${k} columns, as the weight [${n}, ${k}]`, formatShape(A.shape));
  if (bias !== undefined) checkBias(op, bias, n, dtype, backend);
  checkChoice<ProductMode>(op, "mode", mode, MODES);
  return tidy(() => {
    const y = output(op, "out", out, backend, dtype, withLast(A.shape, n), {
      A,
      B,
      bias,
      "state.absmax": state.absmax,
      "state.offset": nested?.offset,
      "state.state2.absmax": nested?.state2.absmax,
    });
    if (y.size === 0) return y;
    if (k === 0) {
      fillRows(y, bias ?? undefined);
      return y;
    }
    const aligned = A.byteOffset % ALIGNMENT === 0 && B.byteOffset % ALIGNMENT === 0;
    const path = productPath(backend.device, { m, n, k, dtype, blocksize: weight.blocksize, aligned }, mode);
    if (path === "dense") multiplyDecoded(A, weight, bias, y, m);
    else if (path === "fast") multiplyFast(A, weight, bias, y, m);
    else if (path === "tiles") multiplySplit(A, weight, bias, y, m);
    else multiplyPacked(A, weight, bias, y, m, path !== "exact");
    return y;
  });
}

/** A 4-bit weight of n x k elements that was checked. */
export interface PackedWeight {
  readonly packed: Tensor;
  readonly n: number;
  readonly k: number;
  readonly absmax: Tensor;
  readonly nested: NestedState | undefined;
  readonly blocksize: number;
  /** As kernels know it. */
  readonly quantType: number;
}

/** @throws as `matmul4bit` about B and state; `A` says on which backend they must be */
export function checkWeight(op: string, B: Tensor, state: QuantState, A: Tensor): PackedWeight {
  checkTensor(op, "B", B, DTYPES, A.backend);
  const { quantType, nested } = checkPacked(op, "B", B, state);
  const { shape, absmax, blocksize } = state;
  const [n, k] = shape;
  if (shape.length !== 2 || !isCount(n) || !isCount(k)) {
    throw new ShapeError(op, "state.shape", "that of a weight, [N, K]", formatShape(shape));
  }
  return { packed: B, n, k, absmax, nested, blocksize, quantType: QUANT_TYPE_ID[quantType] };
}

function isCount(size: number | undefined): size is number {
  return Number.isInteger(size) && size! >= 0;
}

/** Tensor cores' paths load this many bytes at a time. */
const ALIGNMENT = 16;

/**
 * `multiplyPacked` in parts of k, which a second launch adds up, where the weight's rows alone would not fill a GPU. `m`, `n` and `k`
 * are not 0.
 */
export function multiplySplit(
  A: Tensor<FloatDType>,
  weight: PackedWeight,
  bias: Tensor | null | undefined,
  y: Tensor,
  m: number,
): void {
  const { backend } = A;
  const { n, k } = weight;
  const splits = tileSplits({ m, n, k });
  if (splits === 1) {
    multiplyPacked(A, weight, bias, y, m, false);
    return;
  }
  const partial = Tensor.allocate(backend, "f32", [splits, m, n]);
  multiplyPacked(A, weight, bias, y, m, false, partial);
  backend.launch("sumPartials", {
    x: partial,
    bias: bias ?? null,
    y,
    rows: m,
    cols: n,
    splits,
    dtype: DTYPE_ID[A.dtype],
  });
}

/** Decodes inside the product; nested scales too where the kernel can. With `partial` the sums of its parts of k go there. */
function multiplyPacked(
  A: Tensor<FloatDType>,
  { packed, n, k, absmax, nested, blocksize, quantType }: PackedWeight,
  bias: Tensor | null | undefined,
  y: Tensor,
  m: number,
  decodesNested: boolean,
  partial?: Tensor,
): void {
  const { backend } = A;
  const inside = decodesNested ? nested : undefined;
  backend.launch("matmul4bit", {
    a: A,
    packed,
    absmax: nested && !inside ? decodeScales(nested) : absmax,
    code: inside ? inside.state2.code.on(backend) : null,
    absmax2: inside ? inside.state2.absmax : null,
    offset: inside ? inside.offset : null,
    bias: bias ?? null,
    y,
    partial: partial ?? null,
    m,
    n,
    k,
    blocksize,
    blocksize2: inside ? inside.state2.blocksize : 0,
    dtype: DTYPE_ID[A.dtype],
    quantType,
    splits: partial ? partial.shape[0]! : 1,
  });
}

/** Activations in int8, products in integers. */
function multiplyFast(
  A: Tensor<FloatDType>,
  { packed, n, k, absmax, nested, blocksize, quantType }: PackedWeight,
  bias: Tensor | null | undefined,
  y: Tensor,
  m: number,
): void {
  const { backend } = A;
  const dtype = DTYPE_ID[A.dtype];
  const blocks = ceilDiv(k, ACTIVATION_BLOCK);
  const q = Tensor.allocate(backend, "i8", [m, blocks * ACTIVATION_BLOCK]);
  const scale = Tensor.allocate(backend, "f32", [m, blocks]);
  const scales = nested ? decodeScales(nested) : absmax;
  backend.launch("quantizeActivations", { x: A, q, scale, rows: m, cols: k, dtype });
  backend.launch("matmul4bitFast", {
    q,
    scale,
    packed,
    absmax: scales,
    bias: bias ?? null,
    y,
    m,
    n,
    k,
    blocksize,
    dtype,
    quantType,
  });
}

/**
 * Decodes the weight into scratch memory, `sliceBytes` at a time, and multiplies densely: each slice gives some columns of y.
 * `m`, `n` and `k` are not 0.
 */
export function multiplyDecoded(
  A: Tensor<FloatDType>,
  { packed, n, k, absmax, nested, blocksize, quantType }: PackedWeight,
  bias: Tensor | null | undefined,
  y: Tensor,
  m: number,
  sliceBytes = DENSE_SLICE_BYTES,
): void {
  const { backend } = A;
  const dtype = DTYPE_ID[A.dtype];
  const itemsize = DTYPE_BYTES[A.dtype];
  const slice = sliceRows(n, k, blocksize, Math.floor(sliceBytes / (k * itemsize)));
  const scales = nested ? decodeScales(nested) : absmax;
  const rows = Tensor.allocate(backend, A.dtype, [slice, k]);
  for (let begin = 0; begin < n; begin += slice) {
    const count = Math.min(slice, n - begin);
    const first = begin * k;
    backend.launch("dequantize4bit", {
      packed: behind(packed, first / 2),
      absmax: behind(scales, (first / blocksize) * DTYPE_BYTES.f32),
      y: rows,
      n: count * k,
      blocksize,
      dtype,
      quantType,
    });
    backend.launch("matmul", {
      a: A,
      b: rows,
      bias: bias ? behind(bias, begin * itemsize) : null,
      y: behind(y, begin * itemsize),
      m,
      n: count,
      k,
      batch: 1,
      ldy: n,
      dtype,
      transposeA: 0,
      transposeB: 1,
      sharedB: 0,
    });
  }
}

/** Decodes the whole weight into scratch memory: its rows are what is summed over. */
function multiplyDecodedTransposed(
  grad: Tensor<FloatDType>,
  { packed, n, k, absmax, nested, blocksize, quantType }: PackedWeight,
  y: Tensor,
  m: number,
): void {
  const { backend } = grad;
  const dtype = DTYPE_ID[grad.dtype];
  const scales = nested ? decodeScales(nested) : absmax;
  const weight = Tensor.allocate(backend, grad.dtype, [n, k]);
  backend.launch("dequantize4bit", { packed, absmax: scales, y: weight, n: n * k, blocksize, dtype, quantType });
  backend.launch("matmul", {
    a: grad,
    b: weight,
    bias: null,
    y,
    m,
    n: k,
    k: n,
    batch: 1,
    ldy: k,
    dtype,
    transposeA: 0,
    transposeB: 0,
    sharedB: 0,
  });
}

const behind = ({ storage, byteOffset }: Tensor, bytes: number) => ({ storage, byteOffset: byteOffset + bytes });

/** Slices begin at multiples of this many rows, so that their columns of y begin as well aligned as y does. */
const SLICE_ROWS = 128;

/**
 * Rows of a slice, about `most`, so that every slice but the last is as long as the others and begins with a block: a multiple
 * of blocksize / gcd(k, blocksize), which is a power of two, and of SLICE_ROWS.
 */
export function sliceRows(n: number, k: number, blocksize: number, most: number): number {
  let whole = blocksize;
  while (whole > 1 && (k * (whole / 2)) % blocksize === 0) whole /= 2;
  const step = Math.max(whole, SLICE_ROWS);
  if (n <= Math.max(most, step)) return n;
  const slices = ceilDiv(n, Math.max(step, Math.floor(most / step) * step));
  return ceilDiv(ceilDiv(n, slices), step) * step;
}

/**
 * y[..., k] = sum over n of grad[..., n] * W[n, k], W decoded as `matmul4bit` does and rounded to the gradient's dtype: float32
 * sums, rounded once (what bitsandbytes' `matmul_4bit` computes for the gradient of A).
 *
 * @param grad f32, f16 or bf16 `[..., N]`
 * @param B packed codes as `quantize4bit` returns them, of any dtype
 * @param state of the weight `[N, K]`
 * @returns `[..., K]` of grad's dtype; zeros where N is 0
 * @throws as `matmul4bit`
 */
export function matmul4bitBackward<D extends FloatDType>(
  grad: Tensor<D>,
  B: Tensor,
  state: QuantState,
  options?: Gemv4bitOptions,
): Tensor<D>;
export function matmul4bitBackward(
  grad: Tensor,
  B: Tensor,
  state: QuantState,
  options?: Gemv4bitOptions,
): Tensor<FloatDType>;
export function matmul4bitBackward(
  grad: Tensor,
  B: Tensor,
  state: QuantState,
  options: Gemv4bitOptions = {},
): Tensor<FloatDType> {
  const op = "matmul4bitBackward";
  checkFloat(op, "grad", grad);
  const { backend, dtype } = grad;
  const { n, k, absmax, nested, blocksize, quantType } = checkWeight(op, B, state, grad);
  const [m, cols] = rowsOf(op, "grad", grad);
  if (cols !== n) {
    throw new ShapeError(op, "grad", `${n} columns, the rows of the weight [${n}, ${k}]`, formatShape(grad.shape));
  }
  return tidy(() => {
    const y = output(op, "out", options.out, backend, dtype, withLast(grad.shape, k), {
      grad,
      B,
      "state.absmax": absmax,
      "state.offset": nested?.offset,
      "state.state2.absmax": nested?.state2.absmax,
    });
    if (y.size === 0) return y;
    if (n === 0) {
      fillRows(y, undefined);
      return y;
    }
    if (backend.device === "cuda") {
      multiplyDecodedTransposed(grad, { packed: B, n, k, absmax, nested, blocksize, quantType }, y, m);
      return y;
    }
    backend.launch("matmul4bitTransposed", {
      g: grad,
      packed: B,
      absmax: nested ? decodeScales(nested) : absmax,
      y,
      m,
      n,
      k,
      blocksize,
      dtype: DTYPE_ID[dtype],
      quantType,
    });
    return y;
  });
}
