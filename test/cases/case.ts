/**
 * The case list: primitive x dtype x shape x options. Tests run every case on every backend against the scalar reference;
 * benches and records iterate the same list. A case's id says everything: `HALFBYTE_CASE=<id> npx vitest run test/ops` runs
 * just that one.
 */
import type { Backend, DeviceName } from "#halfbyte/core/backend.js";
import { DTYPE_BYTES, type DType, type FloatDType } from "#halfbyte/core/dtype.js";
import { Tensor } from "#halfbyte/core/tensor.js";
import type { PrimitiveName } from "#halfbyte/ops/registry.js";
import { normals, random } from "../helpers/random.js";
import { decode, encode, f32FromBits, round } from "../helpers/scalar.js";

/** Elements on the host: numbers for float dtypes (already representable in it), codes for integer ones. */
export interface Host {
  readonly dtype: DType;
  readonly shape: readonly number[];
  readonly values: ArrayLike<number>;
  /** Instead of `values`: the bytes as they are, for NaN payloads and for what is too large to go through numbers. */
  readonly bytes?: Uint8Array<ArrayBuffer>;
  /**
   * Of what is expected: how far each element may be from `values`, which are in float64 then and rounded to nothing. Where there
   * is none, every bit counts.
   */
  readonly bound?: ArrayLike<number>;
}

/** What a case is about: a primitive, or what tensors do by themselves. */
export type Subject = PrimitiveName | "copy" | "fill" | "convert";

export interface Case {
  readonly id: string;
  readonly primitive: Subject;
  readonly dtype: DType;
  /** Elements that lie before an operand in its allocation: the operand is a view that begins behind them. */
  readonly lead?: Readonly<Record<string, number>>;
  /** Takes seconds on an emulated machine. */
  readonly large?: boolean;
  /**
   * Some of its outputs are held to a bound: each backend sums in an order of its own, so that their bits differ. Those of one
   * backend do not: not by the number of workers, not from run to run.
   */
  readonly bounded?: boolean;
  /** What goes in, the same on every machine. */
  inputs(): Record<string, Host>;
  /** Calls the primitive; everything it returns is compared. */
  run(inputs: Record<string, Tensor>, backend: Backend): Record<string, Tensor>;
  /** The same from the scalar reference; bounds depend on what `device` does. */
  expected(inputs: Record<string, Host>, device: DeviceName): Record<string, Host>;
}

/** Lengths round lanes, bytes, blocks and parts (65,536 elements). */
export const LENGTHS = [0, 1, 2, 3, 15, 16, 17, 31, 33, 63, 64, 65, 255, 257, 1000, 4095, 4096, 4097, 65535, 131077];
/** Fewer, for the second dimension of a sweep. */
export const SHORT_LENGTHS = [1, 63, 64, 65, 300, 4097];
/** Lengths round what a block of threads takes (2,048, 4,096 and 8,192 elements). */
export const TILE_LENGTHS = [2047, 2049, 8191, 8193, 12289, 20000];
/** Lengths and block sizes for the extreme kinds. */
export const EXTREME_SIZES = [
  [4097, 64],
  [1000, 32],
  [12289, 4096],
] as const;
/** Elements before a view, and block sizes to try them with. */
export const VIEWS = [
  [1, 64],
  [2, 32],
  [3, 256],
  [7, 64],
  [8, 4096],
] as const;
export const FLOATS = ["f32", "f16", "bf16"] as const satisfies readonly FloatDType[];

/**
 * `normal`: like weights. `edge`: what is awkward and ordinary. `huge`: up to the largest finite value, so that 1/absmax is a
 * denormal. `denormal`: round the smallest normal number. `wild`: any finite bit pattern. `nonfinite`: `edge` with NaN and
 * infinities, for `allowNonFinite`.
 */
export type Kind = "normal" | "edge" | "huge" | "denormal" | "wild" | "nonfinite";
/** The kinds that only a wide exponent range brings out. */
export const EXTREMES = ["huge", "denormal", "wild", "nonfinite"] as const satisfies readonly Kind[];

/** Values that `dtype` holds, finite except for `nonfinite`. */
export function floats(dtype: FloatDType, n: number, kind: Kind, seed: string): Host {
  const values = normals(n, seed, 0.05);
  const next = random(seed + "edge");
  const extreme = kind === "huge" || kind === "denormal" || kind === "wild";
  for (let i = 0; i < n && kind !== "normal"; ) {
    const end = Math.min(n, i + 8 + (next() % 193));
    const style = next() % 8;
    const constant = values[i]!;
    for (; i < end; i++)
      values[i] = extreme ? extremeValue(dtype, kind, style, next) : edge(style, constant, values[i]!, next);
  }
  for (let i = 0; i < n && kind === "nonfinite"; i += 1 + (next() % 97)) {
    values[i] = [Number.NaN, Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY][next() % 3]!;
  }
  return { dtype, shape: [n], values: values.map((v) => round(dtype, v)) };
}

/**
 * Runs of zeros, constants, -0, denormals, tiny and huge values, ones and values that are exact fractions of the block's
 * maximum (so that they fall on codes and midpoints).
 */
function edge(style: number, constant: number, value: number, next: () => number): number {
  const sign = next() & 1 ? -1 : 1;
  if (style === 0) return 0;
  if (style === 1) return constant;
  if (style === 2) return -0;
  if (style === 3) return f32FromBits(next() % 0x800000) * sign;
  if (style === 4) return sign * 1e-30 * value;
  if (style === 5) return sign * (next() % 2 ? 3e4 : 1e-7);
  if (style === 6) return (sign * (next() % 4097)) / 4096;
  return value;
}

function extremeValue(dtype: FloatDType, kind: Kind, style: number, next: () => number): number {
  const sign = next() & 1 ? -1 : 1;
  const bits = next();
  if (kind === "wild") {
    return sign * decode(dtype, bits % (dtype === "f16" ? 0x7c00 : dtype === "bf16" ? 0x7f80 : 0x7f800000));
  }
  // Every f16 is far from float32's limits; its own largest and smallest values are as good as these get.
  if (dtype === "f16") return sign * decode("f16", kind === "huge" ? 0x7b00 + (bits % 0x100) : bits % 0x480);
  const [low, span] = kind === "huge" ? [0x7e000000, 0x1800000] : [0x00700000, 0x200000];
  // Whole runs at the limit itself, where a block turns into a zero block or 1/absmax into a denormal.
  const limit = kind === "huge" ? [0x7f7fffff, 0x7e800000][style & 1]! : [0x00800000, 0x007fffff][style & 1]!;
  const chosen = style >= 4 ? limit - (style >= 6 ? bits % 3 : 0) : low + (bits % span);
  // Without bf16's rounding, which could reach infinity.
  return sign * f32FromBits(dtype === "bf16" ? (chosen & 0xffff0000) >>> 0 : chosen);
}

/** Scales that are no scales: zeros, infinities, NaN, denormals, negative ones, in turn. */
export function oddScales(n: number): Float32Array<ArrayBuffer> {
  const odd = [
    0,
    -0,
    Number.POSITIVE_INFINITY,
    Number.NaN,
    2 ** -149,
    2 ** -127,
    -1.5,
    Number.NEGATIVE_INFINITY,
    3.4e38,
    1,
  ];
  return Float32Array.from({ length: n }, (_, i) => odd[i % odd.length]!);
}

/** Elements as the tensor's bytes. */
export function hostBytes({ dtype, values, bytes }: Host): Uint8Array<ArrayBuffer> {
  if (bytes) return bytes;
  if (dtype === "f32" || dtype === "f16" || dtype === "bf16") {
    const bits = Array.from(values, (v) => encode(dtype, v));
    return new Uint8Array((dtype === "f32" ? Uint32Array.from(bits) : Uint16Array.from(bits)).buffer);
  }
  const array = dtype === "i8" ? Int8Array : dtype === "u8" ? Uint8Array : Int32Array;
  return new Uint8Array(array.from(values).buffer as ArrayBuffer);
}

/** Element `i` of bytes that a tensor gave, for messages: its value and its bits. */
export function describeElement(dtype: DType, bytes: Uint8Array, i: number): string {
  const size = DTYPE_BYTES[dtype];
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if ((i + 1) * size > bytes.byteLength) return "nothing";
  const bits = size === 1 ? view.getUint8(i) : size === 2 ? view.getUint16(2 * i, true) : view.getUint32(4 * i, true);
  const value =
    dtype === "f32" || dtype === "f16" || dtype === "bf16"
      ? decode(dtype, bits)
      : dtype === "i8"
        ? view.getInt8(i)
        : dtype === "u8"
          ? bits
          : bits | 0;
  return `${Object.is(value, -0) ? "-0" : value} (0x${bits.toString(16).padStart(2 * size, "0")})`;
}

/** `count` elements of `bytes`, which repeat with a period. */
export function repeated(dtype: DType, period: Uint8Array, count: number): Uint8Array<ArrayBuffer> {
  const out = new Uint8Array(count * DTYPE_BYTES[dtype]);
  for (let at = 0; at < out.length; at += period.length) out.set(period.subarray(0, out.length - at), at);
  return out;
}

/** Elements before and behind a result that is a view: what a kernel may not touch. */
const TAIL = 21;
const FRAME_BYTE = 0xa5;

/** A result that begins `lead` elements into its allocation, with known bytes all round it. */
export function framed<D extends DType>(
  backend: Backend,
  dtype: D,
  shape: readonly number[],
  lead: number,
): { view: Tensor<D>; base: Tensor<D> } {
  const n = shape.reduce((a, b) => a * b, 1);
  const base = Tensor.allocate(backend, dtype, [lead + n + TAIL]);
  backend.write(base.storage, 0, new Uint8Array(base.byteLength).fill(FRAME_BYTE));
  return { view: base.slice(lead, lead + n).reshape(shape), base };
}

/** `framed` for what is held to a bound: the bytes round the result are outputs of their own. */
export function framedParts<D extends DType>(
  backend: Backend,
  dtype: D,
  shape: readonly number[],
  lead: number,
): { view: Tensor<D>; before: Tensor<D>; behind: Tensor<D> } {
  const { view, base } = framed(backend, dtype, shape, lead);
  const end = lead + view.size;
  return { view, before: base.slice(0, lead), behind: base.slice(end, end + TAIL) };
}

/** What `before` and `behind` of `framedParts` are afterwards. */
export function framedPartsHost(dtype: DType, lead: number): { before: Host; behind: Host } {
  const known = (n: number): Host => ({
    dtype,
    shape: [n],
    values: [],
    bytes: new Uint8Array(n * DTYPE_BYTES[dtype]).fill(FRAME_BYTE),
  });
  return { before: known(lead), behind: known(TAIL) };
}

/** What the `base` of `framed` is afterwards. */
export function framedHost(host: Host, lead: number): Host {
  const inside = hostBytes(host);
  const size = DTYPE_BYTES[host.dtype];
  const bytes = new Uint8Array(inside.length + (lead + TAIL) * size).fill(FRAME_BYTE);
  bytes.set(inside, lead * size);
  return { dtype: host.dtype, shape: [bytes.length / size], values: [], bytes };
}

/** The sum of a list of numbers or strings as an id: `quantize4bit:nf4:bf16:n=65:bs=64:edge`. */
export function caseId(primitive: string, ...parts: (string | number)[]): string {
  return [primitive, ...parts].join(":");
}
