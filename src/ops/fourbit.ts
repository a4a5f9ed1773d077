/** 4-bit quantization: NF4 and FP4. Numerics: docs/numerics.md, "4-bit". */
import { DTYPE_BYTES, DTYPE_ID, DTYPES, type DType, FLOAT_DTYPES, type FloatDType } from "../core/dtype.js";
import { ArgumentError, ShapeError } from "../core/errors.js";
import { QUANT_TYPE_ID } from "../core/kernels.js";
import { tidy } from "../core/scope.js";
import { ceilDiv, sizeOf } from "../core/shape.js";
import type { Tensor } from "../core/tensor.js";
import { QuantState } from "../quant/state.js";
import { NESTED_BLOCKSIZE, QUANT_TYPES, type QuantType } from "../quant/types.js";
import { checkScales, decodeScales, type NestedState, nest, type Scales, stateOf } from "./blockwise.js";
import { checkBlocksize, checkChoice, checkFloat, checkTensor, output } from "./check.js";

export const fourbitPrimitives = {
  quantize4bit: {
    upstream: "quantize_4bit",
    family: "fourbit",
    kernels: ["quantize4bit", "quantizeBlockwise", "sumChunks", "meanOfSums"],
    dtypes: FLOAT_DTYPES,
    golden: "quantize_4bit",
    summary: "NF4 or FP4 codes, two to a byte, and one scale per block, optionally nested",
  },
  dequantize4bit: {
    upstream: "dequantize_4bit",
    family: "fourbit",
    kernels: ["dequantize4bit", "dequantizeBlockwise"],
    dtypes: DTYPES,
    golden: "quantize_4bit",
    summary: "4-bit codes back to f32, f16 or bf16",
  },
} as const;

const CONTEXT = { op: "quantize4bit", operand: "A", unit: "block" } as const;

export interface Quantize4bitOptions {
  /** Elements that share a scale: 32, 64, ... 4096. Default 64. */
  readonly blocksize?: number;
  /** Default `fp4`, as upstream. */
  readonly quantType?: QuantType;
  /** Quantize the scales as well ("double quantization"). Default false. */
  readonly compressStatistics?: boolean;
  /** dtype of the tensor that carries the packed bytes. Default `u8`. */
  readonly quantStorage?: DType;
  /** A tensor of dtype `quantStorage` for the packed codes. */
  readonly out?: Tensor;
  /** An f32 tensor for the scales (not with `compressStatistics`). */
  readonly absmax?: Tensor;
  /** Quantize NaN and infinity as bitsandbytes does instead of reporting NonFiniteError. Default false. */
  readonly allowNonFinite?: boolean;
}

/**
 * 4-bit codes of `A` and the state that decodes them: per block, absmax = max|x| and the NF4 or FP4 code of
 * x * (1/absmax) (bitsandbytes' `quantize_4bit`). The first element of a byte sits in its high nibble; an odd length is padded
 * with the code of zero.
 *
 * @param A f32, f16 or bf16, any shape and length
 * @returns packed codes `[ceil(ceil(size/2)/itemsize), 1]` of dtype `quantStorage`, and the state
 * @throws DTypeError, ArgumentError, ShapeError, DisposedError, DeviceError, OutOfMemoryError. A later read rejects with
 *   NonFiniteError when A holds NaN or infinity.
 */
export function quantize4bit(A: Tensor, options: Quantize4bitOptions = {}): [Tensor, QuantState] {
  const op = "quantize4bit";
  const { blocksize = 64, quantType = "fp4", compressStatistics = false, quantStorage = "u8" } = options;
  checkFloat(op, "A", A);
  checkBlocksize(op, blocksize);
  checkChoice(op, "quantType", quantType, QUANT_TYPES);
  checkChoice(op, "quantStorage", quantStorage, DTYPES);
  if (compressStatistics && options.absmax) {
    throw new ArgumentError(op, "absmax", "no tensor together with compressStatistics", "one");
  }
  return tidy(() => {
    const { backend } = A;
    const bytes = ceilDiv(A.size, 2);
    const itemsize = DTYPE_BYTES[quantStorage];
    const packed = output(op, "out", options.out, backend, quantStorage, [ceilDiv(bytes, itemsize), 1], { A });
    const blocks = ceilDiv(A.size, blocksize);
    const absmax = output(op, "absmax", options.absmax, backend, "f32", [blocks], { A, out: packed });
    if (packed.byteLength > bytes) {
      const last = { storage: packed.storage, byteOffset: packed.byteOffset + packed.byteLength - itemsize };
      backend.launch("fill", { dst: last, bytes: itemsize, value: 0 });
    }
    // Objects are written out here and in the other ops: spreading one costs as much as half a launch.
    const operands = {
      x: A,
      packed,
      absmax,
      n: A.size,
      blocksize,
      dtype: DTYPE_ID[A.dtype],
      quantType: QUANT_TYPE_ID[quantType],
      allowNonFinite: options.allowNonFinite ? 1 : 0,
    };
    backend.launch("quantize4bit", operands, CONTEXT);
    const scales: Scales = compressStatistics ? nest(absmax, NESTED_BLOCKSIZE) : { absmax };
    return [packed, stateOf(A, scales, blocksize, quantType)];
  });
}

export interface Dequantize4bitOptions {
  /** A tensor of the state's dtype for the result. */
  readonly out?: Tensor;
}

/**
 * code(nibble) * absmax(block), rounded to the state's dtype (bitsandbytes' `dequantize_4bit`).
 *
 * @param A packed codes as `quantize4bit` returns them, of any dtype
 * @returns a tensor of the state's shape and dtype
 * @throws DTypeError, ArgumentError, ShapeError (codes that do not fit the state), DisposedError, DeviceError,
 *   OutOfMemoryError
 */
export function dequantize4bit(A: Tensor, state: QuantState, options: Dequantize4bitOptions = {}): Tensor<FloatDType> {
  const op = "dequantize4bit";
  checkTensor(op, "A", A, DTYPES);
  const { quantType, nested } = checkPacked(op, "A", A, state);
  const { blocksize, dtype, shape } = state;
  return tidy(() => {
    const { backend } = A;
    const y = output(op, "out", options.out, backend, dtype, shape, {
      A,
      absmax: state.absmax,
      offset: nested?.offset,
      "state2.absmax": nested?.state2.absmax,
    });
    const absmax = nested ? decodeScales(nested) : state.absmax;
    const n = sizeOf(shape);
    const type = QUANT_TYPE_ID[quantType];
    backend.launch("dequantize4bit", { packed: A, absmax, y, n, blocksize, dtype: DTYPE_ID[dtype], quantType: type });
    return y;
  });
}

/**
 * Checks that packed codes and the state beside them belong together; for every op that decodes a 4-bit weight.
 * @returns the type, and the state where its scales are nested
 * @throws ArgumentError, ShapeError, and as `checkScales`
 */
export function checkPacked(
  op: string,
  operand: string,
  packed: Tensor,
  state: QuantState,
): { readonly quantType: QuantType; readonly nested: NestedState | undefined } {
  if (!(state instanceof QuantState)) throw new ArgumentError(op, "state", "a QuantState", typeof state);
  const { blocksize, quantType, shape } = state;
  if (!quantType) throw new ArgumentError(op, "state", "one of quantize4bit", "one of quantizeBlockwise");
  checkBlocksize(op, blocksize);
  const n = sizeOf(shape);
  const elements = ceilDiv(ceilDiv(n, 2), DTYPE_BYTES[packed.dtype]);
  if (packed.size !== elements) {
    throw new ShapeError(op, operand, `${elements} ${packed.dtype} elements that hold ${n} codes`, `${packed.size}`);
  }
  return { quantType, nested: checkScales(op, state, n, packed.backend) };
}

/** `quantize4bit` with `quantType: "nf4"`. */
export function quantizeNf4(A: Tensor, options: Omit<Quantize4bitOptions, "quantType"> = {}): [Tensor, QuantState] {
  return quantize4bit(A, { ...options, quantType: "nf4" });
}

/** `quantize4bit` with `quantType: "fp4"`. */
export function quantizeFp4(A: Tensor, options: Omit<Quantize4bitOptions, "quantType"> = {}): [Tensor, QuantState] {
  return quantize4bit(A, { ...options, quantType: "fp4" });
}

/** `dequantize4bit` of NF4 codes. @throws ArgumentError when the state is of another type, and as `dequantize4bit` */
export function dequantizeNf4(A: Tensor, state: QuantState, options: Dequantize4bitOptions = {}): Tensor<FloatDType> {
  return dequantizeAs("dequantizeNf4", "nf4", A, state, options);
}

/** `dequantize4bit` of FP4 codes. @throws ArgumentError when the state is of another type, and as `dequantize4bit` */
export function dequantizeFp4(A: Tensor, state: QuantState, options: Dequantize4bitOptions = {}): Tensor<FloatDType> {
  return dequantizeAs("dequantizeFp4", "fp4", A, state, options);
}

function dequantizeAs(op: string, type: QuantType, A: Tensor, state: QuantState, options: Dequantize4bitOptions) {
  if (state?.quantType !== type) {
    throw new ArgumentError(op, "state", `one of ${type}`, `one of ${state?.quantType ?? "another kind"}`);
  }
  return dequantize4bit(A, state, options);
}
