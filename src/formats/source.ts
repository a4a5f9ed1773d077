/**
 * What every model source looks like to the rest of the project, whichever file format it comes from, and the element
 * types of safetensors, in whose terms sources speak.
 */
import { ArgumentError } from "../core/errors.js";
import { formatShape, type Shape, sizeOf } from "../core/shape.js";
import type { PyObject } from "../quant/pyjson.js";

/**
 * Bits per element of every dtype that safetensors 0.8 knows, in the order of its specification's enumeration: the
 * serializer sorts tensors by this order descending, so that wide elements come first and all stay aligned.
 */
export const SAFETENSORS_BITS = {
  BOOL: 8,
  F4: 4,
  F6_E2M3: 6,
  F6_E3M2: 6,
  U8: 8,
  I8: 8,
  F8_E5M2: 8,
  F8_E4M3: 8,
  F8_E8M0: 8,
  F8_E4M3FNUZ: 8,
  F8_E5M2FNUZ: 8,
  I16: 16,
  U16: 16,
  F16: 16,
  BF16: 16,
  I32: 32,
  U32: 32,
  F32: 32,
  C64: 64,
  F64: 64,
  I64: 64,
  U64: 64,
} as const;

/** An element type as safetensors headers spell it. */
export type SafetensorsDType = keyof typeof SAFETENSORS_BITS;

/** Every dtype in the specification's order. */
export const SAFETENSORS_DTYPES = Object.keys(SAFETENSORS_BITS) as readonly SafetensorsDType[];

export function isSafetensorsDType(value: unknown): value is SafetensorsDType {
  return typeof value === "string" && Object.hasOwn(SAFETENSORS_BITS, value);
}

/** Bytes that `elements` elements of `dtype` take; a fraction where a sub-byte dtype does not end on a byte. */
export function safetensorsBytes(dtype: SafetensorsDType, elements: number): number {
  return (elements * SAFETENSORS_BITS[dtype]) / 8;
}

/** A tensor of a model: what is known without reading its data. */
export interface SourceTensor {
  readonly name: string;
  readonly dtype: SafetensorsDType;
  readonly shape: readonly number[];
}

/** A model on disk: configuration, tensors under their Hugging Face names, and the files that travel with it. */
export interface ModelSource {
  /** The folder or file it was opened from. */
  readonly path: string;
  readonly kind: "safetensors" | "gguf";
  /** config.json as an object. */
  readonly config: Readonly<Record<string, unknown>>;
  /**
   * The same with Python's ints and floats told apart, where the source knows them: transformers refuses a config.json
   * whose 1.0 became 1, so a rewritten one starts from this (`fromPlain(config)` otherwise).
   */
  readonly configTree?: PyObject;
  /** Tensors by their Hugging Face names; insertion order is the order in the file(s). */
  readonly tensors: ReadonlyMap<string, SourceTensor>;
  /** generation_config.json, tokenizer files ...: file name to a loader of its bytes. */
  readonly sidecars: ReadonlyMap<string, () => Promise<Uint8Array>>;
  /** Bytes on disk of the tensor as stored. Throws ArgumentError for a name that is not in `tensors`. */
  storedBytes(name: string): number;
  /**
   * Rows [begin, end) of a tensor as little-endian elements of the tensor's dtype, in a fresh buffer that the caller
   * owns. A row is one index of the first dimension (see rowCount and rowBytes): of a 1-d tensor a row is one element,
   * and a 0-d tensor has exactly one row. begin = end gives an empty array.
   *
   * Throws ArgumentError for an unknown name or a range outside [0, rowCount], FormatError when the file is cut off or
   * was changed since it was opened. Calls may overlap.
   */
  readRows(name: string, begin: number, end: number): Promise<Uint8Array<ArrayBuffer>>;
  /** Closes every file. Pending reads reject; calling it again does nothing. */
  close(): Promise<void>;
}

/** Rows of a tensor as `ModelSource.readRows` counts them: the first dimension, or 1 for a 0-d tensor. */
export function rowCount(shape: Shape): number {
  return shape.length === 0 ? 1 : shape[0]!;
}

/** Bytes of one row as `ModelSource.readRows` counts rows; a fraction where a row of a sub-byte dtype is. */
export function rowBytes(dtype: SafetensorsDType, shape: Shape): number {
  return safetensorsBytes(dtype, sizeOf(shape.slice(1)));
}

/**
 * The bytes that rows [begin, end) take within a tensor's data: checks a `readRows` request.
 * Throws ArgumentError when the range is not inside the tensor or does not start and end on whole bytes.
 */
export function rowRange(tensor: SourceTensor, begin: number, end: number): { offset: number; bytes: number } {
  const rows = rowCount(tensor.shape);
  if (!Number.isInteger(begin) || !Number.isInteger(end) || begin < 0 || end < begin || end > rows) {
    throw new ArgumentError(
      "readRows",
      tensor.name,
      `a row range inside [0, ${rows}] of a tensor of shape ${formatShape(tensor.shape)}`,
      `[${begin}, ${end})`,
    );
  }
  const perRow = rowBytes(tensor.dtype, tensor.shape);
  const offset = begin * perRow;
  const bytes = (end - begin) * perRow;
  if (!Number.isInteger(offset) || !Number.isInteger(bytes)) {
    throw new ArgumentError(
      "readRows",
      tensor.name,
      `rows that begin and end on whole bytes (${tensor.dtype} has ${SAFETENSORS_BITS[tensor.dtype]} bits per element)`,
      `[${begin}, ${end}) of shape ${formatShape(tensor.shape)}`,
    );
  }
  return { offset, bytes };
}
