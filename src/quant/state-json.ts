/** The JSON text inside a 4-bit checkpoint that says how a weight was quantized. */
import { dtypeFromTorch, type FloatDType, isFloat, TORCH_NAME } from "../core/dtype.js";
import { FormatError } from "../core/errors.js";
import { type Shape, sizeOf } from "../core/shape.js";
import { dumpPyJson, isPyObject, PyFloat, type PyJson, type PyObject, parsePyJsonBytes, pyFloat } from "./pyjson.js";
import { BLOCKSIZES, type QuantType } from "./types.js";

/** A state is about 200 bytes; nobody's shape needs this many. */
export const MAX_STATE_BYTES = 1 << 16;

/** The content of a quant state's JSON. */
export interface FourBitMeta {
  readonly quantType: QuantType;
  readonly blocksize: number;
  /** dtype and shape of the weight before it was quantized. */
  readonly dtype: FloatDType;
  readonly shape: Shape;
  /** Double quantization. */
  readonly nested?: {
    readonly blocksize: number;
    /**
     * dtype of the scales that were quantized. Default f32. (bitsandbytes 0.50 writes the weight's dtype when a model
     * is saved after a forward pass on a CPU; it then rounds decoded scales to that.)
     */
    readonly dtype?: FloatDType;
    /** The mean that was taken off absmax. */
    readonly offset: number;
  };
}

const NESTED_KEYS = ["nested_blocksize", "nested_dtype", "nested_offset"] as const;
const STATE_KEYS: readonly string[] = ["quant_type", "blocksize", "dtype", "shape", ...NESTED_KEYS];

/**
 * Reads the JSON of a quant state.
 * @param quantType the type that the tensor's name ends with; the text must say the same
 * @param where the tensor's name, for messages
 * @throws FormatError for anything but a complete, consistent state
 */
export function parseQuantState(json: Uint8Array, quantType: QuantType, where: string): FourBitMeta {
  const fail = (problem: string): never => {
    throw new FormatError("quant_state", where, problem);
  };
  if (json.length > MAX_STATE_BYTES) return fail(`has ${json.length} bytes, more than ${MAX_STATE_BYTES}`);
  const state = parsePyJsonBytes(json, "quant_state", where);
  if (!isPyObject(state)) return fail("is not a JSON object");
  const unknown = [...state.keys()].find((key) => !STATE_KEYS.includes(key));
  if (unknown !== undefined) return fail(`has an unknown key ${JSON.stringify(unknown)}`);
  if (state.get("quant_type") !== quantType) {
    return fail(`quant_type is ${show(state.get("quant_type"))}, but the tensor's name says ${quantType}`);
  }
  const blocksize = readBlocksize(state, "blocksize", fail);
  const dtype = readDType(state, "dtype", fail);
  const shape = state.get("shape");
  if (!isCounts(shape) || shape.length === 0) {
    return fail(`shape is ${show(shape)}: expected a list of sizes`);
  }
  if (!Number.isSafeInteger(sizeOf(shape))) return fail(`shape ${show(shape)} has more elements than can be counted`);
  const meta = { quantType, blocksize, dtype, shape: Object.freeze([...shape]) };

  const present = NESTED_KEYS.filter((key) => state.has(key));
  if (present.length === 0) return meta;
  const missing = NESTED_KEYS.find((key) => !state.has(key));
  if (missing !== undefined) return fail(`has ${present.join(", ")}, but no ${missing}`);
  const offset = state.get("nested_offset");
  const value = offset instanceof PyFloat ? offset.value : offset;
  if (typeof value !== "number" || !Number.isFinite(value)) {
    return fail(`nested_offset is ${show(offset)}: expected a finite number`);
  }
  const nested = {
    blocksize: readBlocksize(state, "nested_blocksize", fail),
    dtype: readDType(state, "nested_dtype", fail),
    offset: value,
  };
  return { ...meta, nested };
}

function isCounts(value: PyJson | undefined): value is readonly number[] {
  return Array.isArray(value) && value.every((n) => typeof n === "number" && n >= 0);
}

function readBlocksize(state: PyObject, key: string, fail: (problem: string) => never): number {
  const value = state.get(key);
  const known = BLOCKSIZES.find((size) => size === value);
  return known ?? fail(`${key} is ${show(value)}: expected one of ${BLOCKSIZES.join(", ")}`);
}

function readDType(state: PyObject, key: string, fail: (problem: string) => never): FloatDType {
  const value = state.get(key);
  const dtype = typeof value === "string" ? dtypeFromTorch(value) : undefined;
  if (dtype !== undefined && isFloat(dtype)) return dtype;
  return fail(`${key} is ${show(value)}: expected float32, float16 or bfloat16`);
}

function show(value: PyJson | undefined): string {
  const text = value === undefined ? "missing" : dumpPyJson(value);
  return text.length > 100 ? `${text.slice(0, 100)}...` : text;
}

/** The JSON of a quant state, byte for byte as Python's json.dumps gives it. */
export function formatQuantState(meta: FourBitMeta): Uint8Array<ArrayBuffer> {
  const state = new Map<string, PyJson>([
    ["quant_type", meta.quantType],
    ["blocksize", meta.blocksize],
    ["dtype", TORCH_NAME[meta.dtype]],
    ["shape", [...meta.shape]],
  ]);
  if (meta.nested) {
    state.set("nested_blocksize", meta.nested.blocksize);
    state.set("nested_dtype", TORCH_NAME[meta.nested.dtype ?? "f32"]);
    state.set("nested_offset", pyFloat(meta.nested.offset));
  }
  return new TextEncoder().encode(dumpPyJson(state));
}
