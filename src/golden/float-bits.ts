/** Floats as bit patterns: comparing them, measuring them in units of the last place, printing them. */
import { DTYPE_BYTES, type DType, isFloat } from "../core/dtype.js";
import { dequantizeGguf } from "../formats/gguf-dequant.js";

const word = new DataView(new ArrayBuffer(4));

/** The bit pattern of a float32. */
export function f32Bits(value: number): number {
  word.setFloat32(0, value);
  return word.getUint32(0);
}

/** The float32 of a bit pattern. */
export function f32FromBits(bits: number): number {
  word.setUint32(0, bits);
  return word.getFloat32(0);
}

/** The spacing of float32 values of this magnitude: 2^(exponent - 23), 2^-149 for denormals. */
export function f32Ulp(value: number): number {
  const exponent = (f32Bits(value) >>> 23) & 0xff;
  return 2 ** (Math.max(exponent, 1) - 150);
}

/** An integer that grows by one from each float to the next; 0 for both zeros. `bytes` is the width of the pattern. */
function ordinal(bits: number, bytes: number): number {
  const sign = 2 ** (8 * bytes - 1);
  return bits >= sign ? sign - bits : bits;
}

/** The float32 that lies `steps` representable values away. */
export function f32Step(value: number, steps: number): number {
  const target = ordinal(f32Bits(value), 4) + steps;
  return target < 0 ? -f32FromBits(-target) : f32FromBits(target);
}

/** How many representable values two bit patterns of a float dtype lie apart; infinite if either is a NaN. */
export function ulpsApart(dtype: DType, a: number, b: number): number {
  const bytes = DTYPE_BYTES[dtype];
  if (Number.isNaN(numberOf(dtype, a)) || Number.isNaN(numberOf(dtype, b))) return Number.POSITIVE_INFINITY;
  return Math.abs(ordinal(a, bytes) - ordinal(b, bytes));
}

/** Bit pattern of element `index`. */
export function bitsAt(dtype: DType, bytes: Uint8Array, index: number): number {
  const width = DTYPE_BYTES[dtype];
  let bits = 0;
  for (let i = width - 1; i >= 0; i--) bits = bits * 256 + bytes[index * width + i]!;
  return bits;
}

/** The number that a bit pattern stands for. */
export function numberOf(dtype: DType, bits: number): number {
  if (dtype === "f32") return f32FromBits(bits);
  if (dtype === "i32") return bits | 0;
  if (dtype === "i8") return (bits << 24) >> 24;
  if (dtype === "u8") return bits;
  return floatsOf(dtype, Uint8Array.of(bits & 255, bits >> 8))[0]!;
}

/** `0x3f800000`. */
export function hex(dtype: DType, bits: number): string {
  return `0x${bits.toString(16).padStart(2 * DTYPE_BYTES[dtype], "0")}`;
}

/** Little-endian elements of a float dtype as float32 values. */
export function floatsOf(dtype: "f32" | "f16" | "bf16", bytes: Uint8Array): Float32Array<ArrayBuffer> {
  return dequantizeGguf(({ f32: "F32", f16: "F16", bf16: "BF16" } as const)[dtype], bytes);
}

/** |x| of every element: the sign bits cleared. */
export function withoutSigns(dtype: DType, bytes: Uint8Array<ArrayBuffer>): Uint8Array<ArrayBuffer> {
  if (!isFloat(dtype)) return bytes;
  const width = DTYPE_BYTES[dtype];
  return bytes.map((byte, i) => (i % width === width - 1 ? byte & 0x7f : byte));
}
