/** Blockwise 8-bit quantization with any sorted 256-entry codebook. Numerics: docs/numerics.md, "Blockwise". */
import type { Backend } from "../core/backend.js";
import { DTYPE_ID, FLOAT_DTYPES, type FloatDType } from "../core/dtype.js";
import { ArgumentError, ShapeError } from "../core/errors.js";
import type { Address } from "../core/kernels.js";
import { tidy } from "../core/scope.js";
import { ceilDiv } from "../core/shape.js";
import { Tensor } from "../core/tensor.js";
import { Codebook } from "../quant/codebook.js";
import { QuantState, type QuantStateFields } from "../quant/state.js";
import type { QuantType } from "../quant/types.js";
import { checkBlocksize, checkFloat, checkTensor, output } from "./check.js";
import { mean } from "./sum.js";

export const blockwisePrimitives = {
  quantizeBlockwise: {
    upstream: "quantize_blockwise",
    family: "blockwise",
    kernels: ["quantizeBlockwise", "sumChunks", "meanOfSums"],
    dtypes: FLOAT_DTYPES,
    golden: "quantize_blockwise",
    summary: "8-bit codes and one scale per block, any sorted 256-entry codebook, optionally nested",
  },
  dequantizeBlockwise: {
    upstream: "dequantize_blockwise",
    family: "blockwise",
    kernels: ["dequantizeBlockwise"],
    dtypes: ["u8"],
    golden: "quantize_blockwise",
    summary: "codes and scales back to f32, f16 or bf16",
  },
} as const;

/** How codes are searched: `exact` is the binary search, `table` the fast search that is proved equal to it. */
export type CodeSearch = "auto" | "exact" | "table";

export interface QuantizeBlockwiseOptions {
  /** 256 values in non-decreasing order. Default: `createDynamicMap()`. */
  readonly code?: Float32Array;
  /** Elements that share a scale: 32, 64, ... 4096. Default 4096. */
  readonly blocksize?: number;
  /** Quantize the scales as well (8-bit dynamic, same block size, their mean taken off first). Default false. */
  readonly nested?: boolean;
  /** A u8 tensor for the codes. */
  readonly out?: Tensor;
  /** An f32 tensor for the scales (not with `nested`). */
  readonly absmax?: Tensor;
  /** Quantize NaN and infinity as bitsandbytes does instead of reporting NonFiniteError. Default false. */
  readonly allowNonFinite?: boolean;
  /** Default `auto`: the fast search wherever the codebook allows it. */
  readonly search?: CodeSearch;
}

const CONTEXT = { op: "quantizeBlockwise", operand: "A", unit: "block" } as const;

/**
 * Codes of `A` and the state that decodes them: per block, absmax = max|x| and the index of the code nearest to
 * x * (1/absmax), ties to the even index (bitsandbytes' `quantize_blockwise`).
 *
 * @param A f32, f16 or bf16, any shape
 * @returns u8 codes of A's shape, and the state (absmax f32 `[ceil(size/blocksize)]`)
 * @throws DTypeError, ArgumentError (block size, unsorted code), ShapeError (out, absmax), DisposedError, DeviceError,
 *   OutOfMemoryError. A later read rejects with NonFiniteError when A holds NaN or infinity.
 */
export function quantizeBlockwise(A: Tensor, options: QuantizeBlockwiseOptions = {}): [Tensor<"u8">, QuantState] {
  const op = "quantizeBlockwise";
  const { blocksize = 4096, nested = false, allowNonFinite = false, search = "auto" } = options;
  checkFloat(op, "A", A);
  checkBlocksize(op, blocksize);
  const code = options.code === undefined ? Codebook.dynamic() : Codebook.of(op, options.code);
  if (nested && options.absmax) throw new ArgumentError(op, "absmax", "no tensor together with nested", "one");
  return tidy(() => {
    const { backend } = A;
    const out = output(op, "out", options.out, backend, "u8", A.shape, { A });
    const absmax = output(op, "absmax", options.absmax, backend, "f32", [ceilDiv(A.size, blocksize)], { A, out });
    launchQuantize(A, null, out, absmax, code, blocksize, allowNonFinite, search);
    return [out, stateOf(A, nested ? nest(absmax, blocksize) : { absmax }, blocksize, undefined, code)];
  });
}

/** The scales of a state: as they are, or quantized. */
export type Scales = Pick<QuantStateFields, "absmax" | "offset" | "state2">;

/** The state of what `A` was quantized to. */
export function stateOf(
  { shape, dtype }: Tensor<FloatDType>,
  { absmax, offset, state2 }: Scales,
  blocksize: number,
  quantType?: QuantType,
  code?: Codebook,
): QuantState {
  return new QuantState({ absmax, shape, dtype, blocksize, quantType, code, offset, state2 });
}

/**
 * Double quantization of scales: their mean (`offset`), and 8-bit dynamic codes of what is left.
 * For ops that offer it; the f32 `absmax` is used up. The golden check gives the offset that somebody else has computed.
 */
export function nest(absmax: Tensor<"f32">, blocksize: number, offset: Tensor<"f32"> = mean(absmax)): Required<Scales> {
  const { backend } = absmax;
  const code = Codebook.dynamic();
  const codes = Tensor.allocate(backend, "u8", absmax.shape);
  const scales = Tensor.allocate(backend, "f32", [ceilDiv(absmax.size, blocksize)]);
  // Where absmax is not finite, the first quantization has already said so or was told to let it pass.
  launchQuantize(absmax, offset, codes, scales, code, blocksize, true, "auto");
  absmax.dispose();
  return {
    absmax: codes,
    offset,
    state2: new QuantState({ absmax: scales, shape: codes.shape, dtype: "f32", blocksize, code }),
  };
}

function launchQuantize(
  x: Tensor<FloatDType>,
  offset: Address | null,
  q: Tensor,
  absmax: Tensor,
  code: Codebook,
  blocksize: number,
  allowNonFinite: boolean,
  search: CodeSearch,
): void {
  const { backend } = x;
  const table = search === "exact" ? null : code.tableOn(backend);
  if (search === "table" && table === null) {
    throw new ArgumentError("quantizeBlockwise", "search", "exact or auto: this code has no search table", search);
  }
  backend.launch(
    "quantizeBlockwise",
    {
      x,
      q,
      absmax,
      code: code.on(backend),
      table,
      offset,
      n: x.size,
      blocksize,
      dtype: DTYPE_ID[x.dtype],
      allowNonFinite: allowNonFinite ? 1 : 0,
    },
    CONTEXT,
  );
}

export interface DequantizeBlockwiseOptions {
  /** f32 scales, where no state is given. */
  readonly absmax?: Tensor;
  /** The codebook, where no state is given. Default: `createDynamicMap()`. */
  readonly code?: Float32Array;
  /** Where no state is given. Default 4096. */
  readonly blocksize?: number;
  /** dtype of the result. Default: the state's, else f32. */
  readonly dtype?: FloatDType;
  /** A tensor of that dtype for the result. */
  readonly out?: Tensor;
}

/**
 * code[A[i]] * absmax(block), rounded to the result's dtype (bitsandbytes' `dequantize_blockwise`): with `state`, or with
 * `absmax`, `code` and `blocksize`.
 *
 * @param A u8 codes
 * @returns A's shape, or the state's where it has as many elements
 * @throws as `quantizeBlockwise`
 */
export function dequantizeBlockwise(
  A: Tensor,
  state?: QuantState,
  options: DequantizeBlockwiseOptions = {},
): Tensor<FloatDType> {
  const op = "dequantizeBlockwise";
  checkTensor(op, "A", A, ["u8"]);
  const blocksize = state?.blocksize ?? options.blocksize ?? 4096;
  checkBlocksize(op, blocksize);
  if (state?.quantType) throw new ArgumentError(op, "state", "one of quantizeBlockwise", `one of ${state.quantType}`);
  const given = state?.absmax ?? options.absmax;
  if (!given) throw new ArgumentError(op, "state", "a QuantState, or absmax", "neither");
  const code = state?.code ?? (options.code ? Codebook.of(op, options.code) : Codebook.dynamic());
  const dtype = options.dtype ?? state?.dtype ?? "f32";
  const nested = state?.state2 && checkNested(op, state, A.backend);
  return tidy(() => {
    const { backend } = A;
    const absmax = nested ? decodeScales(nested) : given;
    checkTensor(op, "absmax", absmax, ["f32"], backend);
    checkBlocks(op, absmax, A.size, blocksize);
    const shape = state && A.size === state.shape.reduce((a, b) => a * b, 1) ? state.shape : A.shape;
    const y = output(op, "out", options.out, backend, dtype, shape, { A, absmax });
    backend.launch("dequantizeBlockwise", {
      q: A,
      absmax,
      code: code.on(backend),
      offset: null,
      y,
      n: A.size,
      blocksize,
      dtype: DTYPE_ID[dtype],
    });
    return y;
  });
}

/** A nested state whose parts were checked. */
export interface NestedState {
  readonly absmax: Tensor<"u8">;
  readonly offset: Tensor<"f32">;
  readonly state2: { readonly absmax: Tensor<"f32">; readonly code: Codebook; readonly blocksize: number };
}

/**
 * Checks the scales, plain or nested, of a state for `n` elements.
 * @returns the state where it is nested
 * @throws as `checkTensor`, ArgumentError (a part is missing, a wrong number of scales)
 */
export function checkScales(op: string, state: QuantState, n: number, backend: Backend): NestedState | undefined {
  const { absmax, offset, state2, blocksize } = state;
  if (!state2 && !offset) {
    checkTensor(op, "state.absmax", absmax, ["f32"], backend);
    checkBlocks(op, absmax, n, blocksize);
    return undefined;
  }
  const nested = checkNested(op, state, backend);
  checkBlocks(op, absmax, n, blocksize);
  return nested;
}

function checkNested(op: string, { absmax, offset, state2 }: QuantState, backend: Backend): NestedState {
  if (!state2 || !offset || !state2.code) {
    throw new ArgumentError(op, "state", "a nested state with offset, state2 and its code", "one without");
  }
  checkTensor(op, "state.absmax", absmax, ["u8"], backend);
  checkTensor(op, "state.offset", offset, ["f32"], backend);
  if (offset.size !== 1) throw new ShapeError(op, "state.offset", "one element", `${offset.size}`);
  checkTensor(op, "state.state2.absmax", state2.absmax, ["f32"], backend);
  checkBlocksize(op, state2.blocksize);
  checkBlocks(op, state2.absmax, absmax.size, state2.blocksize);
  return { absmax, offset, state2 } as NestedState;
}

/** `decodeScales` of a state that nobody has checked. @throws as `checkScales` */
export function unnest(op: string, state: QuantState): Tensor<"f32"> {
  return decodeScales(checkNested(op, state, state.absmax.backend));
}

/** The f32 scales of a nested state: code2[absmax] * absmax2 + offset. A new tensor. */
export function decodeScales({ absmax, offset, state2 }: NestedState): Tensor<"f32"> {
  const { backend } = absmax;
  const y = Tensor.allocate(backend, "f32", absmax.shape);
  backend.launch("dequantizeBlockwise", {
    q: absmax,
    absmax: state2.absmax,
    code: state2.code.on(backend),
    offset,
    y,
    n: absmax.size,
    blocksize: state2.blocksize,
    dtype: DTYPE_ID.f32,
  });
  return y;
}

/** @throws ArgumentError unless there is one scale per block */
export function checkBlocks(op: string, absmax: Tensor, n: number, blocksize: number): void {
  const blocks = ceilDiv(n, blocksize);
  if (absmax.size !== blocks) {
    throw new ArgumentError(
      op,
      "absmax",
      `${blocks} scales for ${n} elements in blocks of ${blocksize}`,
      `${absmax.size}`,
    );
  }
}
