/**
 * The case list: primitive x dtype x shape x options. Tests run every case on every backend against the scalar reference;
 * benches and records iterate the same list. A case's id says everything: `HALFBYTE_CASE=<id> npx vitest run test/ops` runs
 * just that one.
 */
import type { DType, FloatDType } from "#halfbyte/core/dtype.js";
import type { Tensor } from "#halfbyte/core/tensor.js";
import type { PrimitiveName } from "#halfbyte/ops/registry.js";
import { normals, random } from "../helpers/random.js";
import { decode, encode, f32FromBits, round } from "../helpers/scalar.js";

/** Elements on the host: numbers for float dtypes (already representable in it), codes for integer ones. */
export interface Host {
  readonly dtype: DType;
  readonly shape: readonly number[];
  readonly values: ArrayLike<number>;
}

export interface Case {
  readonly id: string;
  readonly primitive: PrimitiveName;
  readonly dtype: DType;
  /** What goes in, the same on every machine. */
  inputs(): Record<string, Host>;
  /** Calls the primitive; everything it returns is compared. */
  run(inputs: Record<string, Tensor>): Record<string, Tensor>;
  /** The same from the scalar reference. */
  expected(inputs: Record<string, Host>): Record<string, Host>;
}

/** Lengths round lanes, bytes, blocks and parts (65,536 elements). */
export const LENGTHS = [0, 1, 2, 3, 15, 16, 17, 31, 33, 63, 64, 65, 255, 257, 1000, 4095, 4096, 4097, 65535, 131077];
/** Fewer, for the second dimension of a sweep. */
export const SHORT_LENGTHS = [1, 63, 64, 65, 300, 4097];
export const FLOATS = ["f32", "f16", "bf16"] as const satisfies readonly FloatDType[];

export type Kind = "normal" | "edge";

/**
 * Finite values that `dtype` holds. `edge`: runs of zeros, constants, -0, denormals, tiny and huge values, ones and values that
 * are exact fractions of the block's maximum (so that they fall on codes and midpoints), in runs of 8 to 200.
 */
export function floats(dtype: FloatDType, n: number, kind: Kind, seed: string): Host {
  const values = normals(n, seed, 0.05);
  if (kind === "edge") {
    const next = random(seed + "edge");
    for (let i = 0; i < n; ) {
      const end = Math.min(n, i + 8 + (next() % 193));
      const style = next() % 8;
      const constant = values[i]!;
      for (; i < end; i++) {
        const sign = next() & 1 ? -1 : 1;
        if (style === 0) values[i] = 0;
        else if (style === 1) values[i] = constant;
        else if (style === 2) values[i] = -0;
        else if (style === 3) values[i] = f32FromBits(next() % 0x800000) * sign;
        else if (style === 4) values[i] = sign * 1e-30 * values[i]!;
        else if (style === 5) values[i] = sign * (next() % 2 ? 3e4 : 1e-7);
        else if (style === 6) values[i] = (sign * (next() % 4097)) / 4096;
      }
    }
  }
  return { dtype, shape: [n], values: values.map((v) => round(dtype, v)) };
}

/** Elements as the tensor's bytes. */
export function hostBytes({ dtype, values }: Host): Uint8Array<ArrayBuffer> {
  if (dtype === "f32" || dtype === "f16" || dtype === "bf16") {
    const bits = Array.from(values, (v) => encode(dtype, v));
    return new Uint8Array((dtype === "f32" ? Uint32Array.from(bits) : Uint16Array.from(bits)).buffer);
  }
  const array = dtype === "i8" ? Int8Array : dtype === "u8" ? Uint8Array : Int32Array;
  return new Uint8Array(array.from(values).buffer as ArrayBuffer);
}

/** The elements of bytes that a tensor gave. */
export function fromHostBytes(dtype: DType, bytes: Uint8Array<ArrayBuffer>): number[] {
  if (dtype === "f32") return [...new Uint32Array(bytes.buffer)].map((b) => decode("f32", b));
  if (dtype === "f16" || dtype === "bf16") return [...new Uint16Array(bytes.buffer)].map((b) => decode(dtype, b));
  return [...(dtype === "i8" ? new Int8Array(bytes.buffer) : dtype === "u8" ? bytes : new Int32Array(bytes.buffer))];
}

/** The sum of a list of numbers or strings as an id: `quantize4bit:nf4:bf16:n=65:bs=64:edge`. */
export function caseId(primitive: string, ...parts: (string | number)[]): string {
  return [primitive, ...parts].join(":");
}
