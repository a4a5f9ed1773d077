/**
 * The primitives once more, as plain scalar JavaScript straight from docs/numerics.md: slow, obvious, and written without a
 * look at asm/. What the kernels give is held against this bit for bit.
 */
import type { DType, FloatDType } from "#halfbyte/core/dtype.js";

const f32 = Math.fround;
const word = new DataView(new ArrayBuffer(4));
const TINY = 2 ** -126;

export function f32Bits(x: number): number {
  word.setFloat32(0, x);
  return word.getUint32(0);
}

export function f32FromBits(bits: number): number {
  word.setUint32(0, bits);
  return word.getFloat32(0);
}

/** Nearest even; `mantissa` explicit bits, exponents down to `minExp` for normal numbers, `max` the largest finite value. */
function roundTo(x: number, mantissa: number, minExp: number, max: number): number {
  if (!Number.isFinite(x) || x === 0) return x;
  const exponent = Math.max(minExp, Math.floor(Math.log2(Math.abs(x))));
  // log2 may be off by one at powers of two: a step that is too fine there rounds to the same value.
  const adjusted = Math.abs(x) < 2 ** exponent && exponent > minExp ? exponent - 1 : exponent;
  const step = 2 ** (adjusted - mantissa);
  const q = Math.abs(x) / step;
  const floor = Math.floor(q);
  const rest = q - floor;
  const rounded = rest > 0.5 || (rest === 0.5 && floor % 2 === 1) ? floor + 1 : floor;
  const value = rounded * step;
  const signed = value > max ? Number.POSITIVE_INFINITY : value;
  return x < 0 ? -signed : signed;
}

/** The float32 `x` rounded to `dtype`. */
export function round(dtype: FloatDType, x: number): number {
  if (dtype === "f32") return f32(x);
  return dtype === "f16" ? roundTo(x, 10, -14, 65504) : roundTo(x, 7, -126, f32FromBits(0x7f7f0000));
}

/** Bit pattern of a value that `dtype` holds, NaN canonical. */
export function encode(dtype: FloatDType, x: number): number {
  if (dtype === "f32") return Number.isNaN(x) ? 0x7fc00000 : f32Bits(x);
  if (dtype === "bf16") return Number.isNaN(x) ? 0x7fc0 : f32Bits(x) >>> 16;
  if (Number.isNaN(x)) return 0x7e00;
  const sign = Object.is(x, -0) || x < 0 ? 0x8000 : 0;
  const a = Math.abs(x);
  if (a === Number.POSITIVE_INFINITY) return sign | 0x7c00;
  if (a < 2 ** -14) return sign | (a * 2 ** 24);
  const bits = f32Bits(a);
  return sign | (((bits >>> 23) - 112) << 10) | ((bits >>> 13) & 0x3ff);
}

export function decode(dtype: FloatDType, bits: number): number {
  if (dtype === "f32") return f32FromBits(bits);
  if (dtype === "bf16") return f32FromBits(bits << 16);
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >>> 10) & 31;
  const mantissa = bits & 0x3ff;
  if (exponent === 31) return mantissa ? Number.NaN : sign * Number.POSITIVE_INFINITY;
  return exponent === 0 ? sign * mantissa * 2 ** -24 : sign * (1024 + mantissa) * 2 ** (exponent - 25);
}

/** The value that `x` of dtype `from` has as `to`: by way of f32, except between integers. */
export function convert(from: DType, to: DType, x: number): number {
  if (to === "f32" || to === "f16" || to === "bf16") return round(to, f32(x));
  const [low, high] = INTEGERS[to];
  const v = from === "i32" || from === "i8" || from === "u8" ? x : f32(x);
  return Number.isNaN(v) ? 0 : Math.max(low, Math.min(high, Math.trunc(v))) + 0;
}

/** The least and the greatest value of each integer dtype. */
export const INTEGERS = {
  i8: [-128, 127],
  u8: [0, 255],
  i32: [-(2 ** 31), 2 ** 31 - 1],
} as const satisfies Partial<Record<DType, readonly [number, number]>>;

function flush(x: number): number {
  return Math.abs(x) < TINY ? (Object.is(x, -0) || x < 0 ? -0 : 0) : x;
}

/** Exact maximum of |x| without the NaNs; a denormal one counts as zero. */
export function absmaxOf(x: ArrayLike<number>, begin: number, end: number): number {
  let max = 0;
  for (let i = begin; i < end; i++) if (Math.abs(x[i]!) > max) max = Math.abs(x[i]!);
  return flush(max);
}

/** Index of the code nearest to s: ties to the even index, first duplicate for zero, last for tiny positives; NaN gives 0. */
export function searchCode(code: Float32Array, s: number): number {
  if (Number.isNaN(s)) return 0;
  let hi = 0;
  while (hi < code.length && !(code[hi]! >= s)) hi++;
  if (hi === code.length) return code.length - 1;
  if (hi === 0) return 0;
  const mid = f32((code[hi - 1]! + code[hi]!) * 0.5);
  if (s > mid) return hi;
  if (s < mid) return hi - 1;
  return hi % 2 === 0 ? hi : hi - 1;
}

export function quantizeBlockwise(x: ArrayLike<number>, code: Float32Array, blocksize: number, offset?: number) {
  const n = x.length;
  const blocks = Math.ceil(n / blocksize);
  const shifted = offset === undefined ? x : Float32Array.from(x, (v) => f32(v - offset));
  const q = new Uint8Array(n);
  const absmax = new Float32Array(blocks);
  for (let b = 0; b < blocks; b++) {
    const end = Math.min(n, (b + 1) * blocksize);
    absmax[b] = absmaxOf(shifted, b * blocksize, end);
    if (absmax[b] === 0) continue;
    const r = f32(1 / absmax[b]!);
    for (let i = b * blocksize; i < end; i++) q[i] = searchCode(code, flush(f32(flush(shifted[i]!) * r)));
  }
  return { q, absmax };
}

export function dequantizeBlockwise(
  q: Uint8Array,
  absmax: Float32Array,
  code: Float32Array,
  blocksize: number,
  dtype: FloatDType,
  offset?: number,
): number[] {
  return Array.from(q, (index, i) => {
    const value = f32(code[index]! * absmax[Math.floor(i / blocksize)]!);
    return round(dtype, offset === undefined ? value : f32(value + offset));
  });
}

export interface FourBitTables {
  /** Decoded value of each of the 16 codes. */
  readonly values: ArrayLike<number>;
  /** NF4: 15 ascending thresholds, FP4: 7 ascending thresholds of |s|. */
  readonly thresholds: ArrayLike<number>;
  /** FP4: code of each of the 8 magnitudes in ascending order. */
  readonly magnitudes?: ArrayLike<number>;
}

function code4(s: number, { thresholds, magnitudes }: FourBitTables): number {
  let above = 0;
  const key = magnitudes ? Math.abs(s) : s;
  for (let i = 0; i < thresholds.length; i++) if (key > thresholds[i]!) above++;
  return magnitudes ? magnitudes[above]! + (s < 0 ? 8 : 0) : above;
}

export function quantize4bit(x: ArrayLike<number>, type: "nf4" | "fp4", tables: FourBitTables, blocksize: number) {
  const n = x.length;
  const blocks = Math.ceil(n / blocksize);
  const packed = new Uint8Array(Math.ceil(n / 2)).fill(n % 2 ? 0 : 0);
  const absmax = new Float32Array(blocks);
  const codes = new Uint8Array(packed.length * 2).fill(type === "nf4" ? 7 : 0);
  for (let b = 0; b < blocks; b++) {
    const end = Math.min(n, (b + 1) * blocksize);
    absmax[b] = absmaxOf(x, b * blocksize, end);
    const r = f32(1 / absmax[b]!);
    for (let i = b * blocksize; i < end; i++) {
      codes[i] = absmax[b] === 0 ? 0 : code4(flush(f32(flush(x[i]!) * r)), tables);
    }
  }
  for (let i = 0; i < packed.length; i++) packed[i] = (codes[2 * i]! << 4) | codes[2 * i + 1]!;
  return { packed, absmax };
}

export function dequantize4bit(
  packed: Uint8Array,
  absmax: Float32Array,
  n: number,
  values: ArrayLike<number>,
  blocksize: number,
  dtype: FloatDType,
): number[] {
  return Array.from({ length: n }, (_, i) => {
    const code = i % 2 ? packed[i >> 1]! & 15 : packed[i >> 1]! >> 4;
    return round(dtype, f32(values[code]! * absmax[Math.floor(i / blocksize)]!));
  });
}

/** `dequantize4bit` by the 16 values of each block: for the weights of products. */
export function weights4bit(
  packed: Uint8Array,
  absmax: ArrayLike<number>,
  n: number,
  values: ArrayLike<number>,
  blocksize: number,
  dtype: FloatDType,
): Float64Array {
  const weights = new Float64Array(n);
  for (let begin = 0; begin < n; begin += blocksize) {
    const scale = absmax[begin / blocksize]!;
    const decoded = Array.from(values, (value) => round(dtype, f32(value * scale)));
    const end = Math.min(n, begin + blocksize);
    for (let i = begin; i < end; i++) weights[i] = decoded[i % 2 ? packed[i >> 1]! & 15 : packed[i >> 1]! >> 4]!;
  }
  return weights;
}

/** Half to even. */
export function rint(x: number): number {
  const floor = Math.floor(x);
  const rest = x - floor;
  return rest > 0.5 || (rest === 0.5 && floor % 2 !== 0) ? floor + 1 : floor;
}

/** One level of the summation tree of docs/architecture.md. */
export function chunkSums(values: ArrayLike<number>): number[] {
  const sums: number[] = [];
  for (let begin = 0; begin < values.length; begin += 1024) {
    const lanes = new Array<number>(32).fill(0);
    for (let i = begin; i < Math.min(values.length, begin + 1024); i++) lanes[(i - begin) % 32]! += values[i]!;
    for (let h = 16; h >= 1; h >>= 1) for (let i = 0; i < h; i++) lanes[i]! += lanes[i + h]!;
    sums.push(lanes[0]!);
  }
  return sums;
}

/** The summation tree, then one division and one rounding. */
export function mean(x: ArrayLike<number>): number {
  if (x.length === 0) return 0;
  let level = chunkSums(x);
  while (level.length > 1) level = chunkSums(level);
  return f32(level[0]! / x.length);
}
