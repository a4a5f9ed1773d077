/** Host arrays for each dtype, and which arrays may fill which tensors. */
import type { DType } from "./dtype.js";

// Node has Float16Array from version 24 on; the library uses it where it is and never needs it.
interface Float16Like extends ArrayLike<number> {
  readonly buffer: ArrayBufferLike;
  readonly byteOffset: number;
  readonly byteLength: number;
  [index: number]: number;
}
interface Float16Constructor {
  new (buffer: ArrayBufferLike, byteOffset?: number, length?: number): Float16Like;
}
const Float16: Float16Constructor | undefined = (globalThis as { Float16Array?: Float16Constructor }).Float16Array;

/** True when this runtime has Float16Array: then `data()` of an f16 tensor is one, else a Uint16Array of bit patterns. */
export const HAS_FLOAT16_ARRAY = Float16 !== undefined;

/** What `data()` returns: f16 is a Float16Array where the runtime has it, else its bit patterns; bf16 is bit patterns. */
export interface DataTypes {
  f32: Float32Array<ArrayBuffer>;
  f16: Float16Like | Uint16Array<ArrayBuffer>;
  bf16: Uint16Array<ArrayBuffer>;
  i8: Int8Array<ArrayBuffer>;
  u8: Uint8Array<ArrayBuffer>;
  i32: Int32Array<ArrayBuffer>;
}
export type DataOf<D extends DType> = DataTypes[D];

/** Anything that can fill a tensor. A Uint16Array holds the bit patterns of f16 or bf16 elements. */
export type TensorLike =
  | readonly number[]
  | Float32Array
  | Float64Array
  | Float16Like
  | Uint16Array
  | Int8Array
  | Uint8Array
  | Int32Array;

/** The bytes of `dtype` elements as their host array. `bytes` is freshly allocated, so that every alignment holds. */
export function viewBytes<D extends DType>(dtype: D, bytes: Uint8Array<ArrayBuffer>): DataOf<D> {
  const { buffer, byteOffset, byteLength } = bytes;
  const make = (): DataTypes[DType] => {
    switch (dtype as DType) {
      case "f32":
        return new Float32Array(buffer, byteOffset, byteLength / 4);
      case "f16":
        return Float16
          ? new Float16(buffer, byteOffset, byteLength / 2)
          : new Uint16Array(buffer, byteOffset, byteLength / 2);
      case "bf16":
        return new Uint16Array(buffer, byteOffset, byteLength / 2);
      case "i8":
        return new Int8Array(buffer, byteOffset, byteLength);
      case "u8":
        return bytes;
      case "i32":
        return new Int32Array(buffer, byteOffset, byteLength / 4);
    }
  };
  return make() as DataOf<D>;
}

/** The bytes behind a typed array. */
export function bytesOf(array: ArrayBufferView): Uint8Array {
  return new Uint8Array(array.buffer, array.byteOffset, array.byteLength);
}

export function isFloat16Array(value: unknown): value is Float16Like & ArrayBufferView {
  return Float16 !== undefined && value instanceof Float16;
}

/** The dtype that an array fills when none is asked for, or undefined where it is ambiguous (Uint16Array) or unknown. */
export function naturalDType(data: unknown): DType | undefined {
  if (Array.isArray(data) || data instanceof Float32Array || data instanceof Float64Array) return "f32";
  if (isFloat16Array(data)) return "f16";
  if (data instanceof Int8Array) return "i8";
  if (data instanceof Uint8Array) return "u8";
  if (data instanceof Int32Array) return "i32";
  return undefined;
}

/** A short name for messages: `Float32Array(3)`. */
export function describeArray(data: unknown): string {
  if (Array.isArray(data)) return `Array(${data.length})`;
  if (ArrayBuffer.isView(data)) return `${data.constructor.name}(${(data as unknown as { length: number }).length})`;
  return data === null ? "null" : typeof data;
}
