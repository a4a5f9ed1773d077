/**
 * The codebooks: the values a code stands for, computed step by step as bitsandbytes 0.50 computes them (which steps are
 * float32 and which float64 decides about the last bit). The only place where the NF4 and FP4 tables are written down:
 * asm/ and csrc/ get theirs generated from here.
 */
import { ArgumentError } from "../core/errors.js";

/** Values of an 8-bit codebook. */
const SIZE = 256;

/** NF4, by code: quantiles of the normal distribution (QLoRA, arXiv 2305.14314), ascending. */
export const NF4_VALUES: Readonly<Float32Array<ArrayBuffer>> = Float32Array.of(
  -1.0,
  -0.6961928009986877,
  -0.5250730514526367,
  -0.39491748809814453,
  -0.28444138169288635,
  -0.18477343022823334,
  -0.09105003625154495,
  0.0,
  0.07958029955625534,
  0.16093020141124725,
  0.24611230194568634,
  0.33791524171829224,
  0.44070982933044434,
  0.5626170039176941,
  0.7229568362236023,
  1.0,
);

/** What a scaled value must exceed to get NF4 code i + 1: the float32 midpoints of the values. */
export const NF4_THRESHOLDS: Readonly<Float32Array<ArrayBuffer>> = NF4_VALUES.subarray(1).map((value, i) =>
  Math.fround(Math.fround(value + NF4_VALUES[i]!) * 0.5),
);

/** FP4, by code: a sign bit over eight magnitudes in twelfths. Code 8 decodes to -0. */
export const FP4_VALUES: Readonly<Float32Array<ArrayBuffer>> = Float32Array.from({ length: 16 }, (_, code) => {
  const magnitude = [0, 0.0625, 8, 12, 4, 6, 2, 3][code & 7]! / 12;
  return code < 8 ? magnitude : -magnitude;
});

/** The eight FP4 magnitude codes, smallest magnitude first. */
export const FP4_RANKS: readonly number[] = [0, 1, 6, 7, 4, 5, 2, 3];

/**
 * What a scaled magnitude must exceed to get FP4_RANKS[i + 1]. These are the decimal literals of bitsandbytes' CUDA
 * kernels; most are a few ulp beside the midpoints.
 */
export const FP4_THRESHOLDS: Readonly<Float32Array<ArrayBuffer>> = Float32Array.of(
  0.00260417,
  0.0859375,
  0.20833333,
  0.29166667,
  0.4166667,
  0.583333,
  0.8333333,
);

/** AF4 for blocks of 64, by code, ascending ("NF4 Isn't Information Theoretically Optimal", arXiv 2306.06965). */
const AF4_VALUES: readonly number[] = [
  -1.0, -0.69441008, -0.51243739, -0.3736951, -0.25607552, -0.14982478, -0.04934812, 0.0, 0.04273164, 0.12934483,
  0.21961274, 0.31675666, 0.42563882, 0.55496234, 0.72424863, 1.0,
];

/** `count` float32 values from start to end, both included: torch.linspace on the CPU, which fills in from both ends. */
function linspace(start: number, end: number, count: number): Float32Array<ArrayBuffer> {
  const first = Math.fround(start);
  const last = Math.fround(end);
  const step = count > 1 ? Math.fround(Math.fround(last - first) / (count - 1)) : 0;
  const half = Math.floor(count / 2);
  return Float32Array.from({ length: count }, (_, i) =>
    // The float64 product and sum are exact enough that one rounding remains, as with the fused multiply-add there.
    i < half ? first + step * i : count === 1 ? first : last - step * (count - i - 1),
  );
}

/** Ascending; equal values (0 and -0) keep their order, which the default sort of typed arrays would not. */
function sorted(values: number[]): Float32Array<ArrayBuffer> {
  return Float32Array.from(values.sort((a, b) => a - b));
}

function dividedByMax(values: Float32Array<ArrayBuffer>): Float32Array<ArrayBuffer> {
  const max = values.reduce((a, b) => Math.max(a, b));
  return values.map((value) => value / max);
}

function checkInteger(op: string, operand: string, value: number, low: number, high: number): void {
  if (!Number.isInteger(value) || value < low || value > high) {
    throw new ArgumentError(op, operand, `an integer from ${low} to ${high}`, `${value}`);
  }
}

/**
 * The dynamic data type (arXiv 1511.04561): decades from 10^-(maxExponentBits-1) to 1, each with twice as many evenly
 * spaced values as the one below it, and 0 and 1.
 * @param signed with the negative values too
 * @param maxExponentBits number of decades; an unsigned map needs totalBits - 1
 * @param totalBits 2 to 8: fewer bits are filled up with zeros
 * @returns 256 float32 values, ascending
 * @throws ArgumentError when the parts do not add up to 2^totalBits values
 */
export function createDynamicMap(signed = true, maxExponentBits = 7, totalBits = 8): Float32Array<ArrayBuffer> {
  const op = "createDynamicMap";
  checkInteger(op, "totalBits", totalBits, 2, 8);
  checkInteger(op, "maxExponentBits", maxExponentBits, 1, 8);
  const values: number[] = [0, 1];
  const decade = (exponent: number, count: number): void => {
    const bounds = linspace(0.1, 1, count + 1);
    const scale = Math.fround(Number(`1e${exponent}`));
    for (let j = 0; j < count; j++) {
      const mean = Math.fround(Math.fround(bounds[j]! + bounds[j + 1]!) / 2);
      const value = Math.fround(scale * mean);
      values.push(value);
      if (signed) values.push(-value);
    }
  };
  const spare = totalBits - 1 - maxExponentBits;
  for (let i = 0; i < maxExponentBits; i++) {
    decade(i - maxExponentBits + 1, Math.floor(2 ** (i + spare + (signed ? 0 : 1))));
  }
  if (spare > 0) decade(0, 2 ** spare - 1);
  if (values.length !== 2 ** totalBits) {
    const expected = signed ? `at most ${totalBits}` : `${totalBits - 1} for an unsigned map of ${totalBits} bits`;
    throw new ArgumentError(op, "maxExponentBits", expected, `${maxExponentBits}`);
  }
  while (values.length < SIZE) values.push(0);
  return sorted(values);
}

/**
 * Evenly spaced values from -1 (or 0 when unsigned) to 1.
 * @param totalBits 2 to 8; the unused codes of fewer bits are zeros in the middle
 * @param addZero give up one value of a signed map so that 0 is among them (always so below 8 bits)
 * @returns 256 float32 values, ascending
 * @throws ArgumentError on a totalBits out of range
 */
export function createLinearMap(signed = true, totalBits = 8, addZero = true): Float32Array<ArrayBuffer> {
  checkInteger("createLinearMap", "totalBits", totalBits, 2, 8);
  const count = 2 ** totalBits - (signed && (addZero || totalBits < 8) ? 1 : 0);
  const values = linspace(signed ? -1 : 0, 1, count);
  const code = new Float32Array(SIZE);
  const half = count === SIZE ? SIZE : Math.floor(count / 2);
  code.set(values.subarray(0, half));
  code.set(values.subarray(half), half + SIZE - count);
  return code;
}

/**
 * Every value of a small floating-point format without infinities, divided by the largest. The exponent field counts
 * downwards: the smallest non-zero one is the largest power of two.
 * @param exponentBits at least 1 (0 when unsigned)
 * @param precisionBits mantissa bits
 * @param totalBits 2 to 8, and equal to sign + exponentBits + precisionBits; fewer than 8 are filled up with zeros
 * @returns 256 float32 values, ascending; a signed map holds 0 and -0
 * @throws ArgumentError when the bits do not add up
 */
export function createFp8Map(
  signed = true,
  exponentBits = 5,
  precisionBits = 2,
  totalBits = 8,
): Float32Array<ArrayBuffer> {
  const op = "createFp8Map";
  checkInteger(op, "totalBits", totalBits, 2, 8);
  checkInteger(op, "exponentBits", exponentBits, signed ? 1 : 0, 8);
  const wanted = totalBits - (signed ? 1 : 0) - exponentBits;
  if (precisionBits !== wanted || wanted < 0) {
    const expected = `bits that add up with the sign to totalBits = ${totalBits}`;
    throw new ArgumentError(op, "exponentBits + precisionBits", expected, `${exponentBits} + ${precisionBits}`);
  }
  const bias = 2 ** (exponentBits - 1);
  const values: number[] = [];
  for (let exponent = 0; exponent < 2 ** exponentBits; exponent++) {
    for (let mantissa = 0; mantissa < 2 ** precisionBits; mantissa++) {
      const fraction = mantissa / 2 ** precisionBits;
      const value = exponent === 0 ? fraction * 2 ** -bias : (1 + fraction) * 2 ** -(exponent - bias - 1);
      values.push(value);
      if (signed) values.push(-value);
    }
  }
  values.sort((a, b) => a - b);
  while (values.length < SIZE) values.push(0);
  return dividedByMax(sorted(values));
}

/**
 * The normal-float data type in 256 entries: quantiles of the standard normal distribution divided by the largest, the
 * rest zeros.
 * @param offset the outermost quantile, between 0.5 and 1
 * @param useExtraValue 8 positive and 7 negative values instead of 7 and 7
 * @returns 256 float32 values, ascending
 * @throws ArgumentError on an offset out of range
 */
export function createNormalMap(offset = 0.9677083, useExtraValue = true): Float32Array<ArrayBuffer> {
  if (!(offset > 0.5 && offset < 1)) {
    throw new ArgumentError("createNormalMap", "offset", "a number between 0.5 and 1", `${offset}`);
  }
  const quantiles = (count: number): number[] =>
    Array.from(linspace(offset, 0.5, count + 1).subarray(0, count), probit);
  const values = [...quantiles(useExtraValue ? 8 : 7), ...quantiles(7).map((value) => -value)];
  while (values.length < SIZE) values.push(0);
  return dividedByMax(sorted(values));
}

export type FourBitTypeName = "nf4" | "fp4" | "int4" | "af4";

/**
 * The 16 values of a 4-bit type by code, as a checkpoint's `quant_map` holds them. (FP4's entry 8 is +0 there, although
 * the kernels decode code 8 to -0.)
 * @param blocksize matters for `af4` only, which is known for 64
 * @throws ArgumentError on an unknown name, or `af4` with another block size
 */
export function get4bitType(name: FourBitTypeName, blocksize = 64): Float32Array<ArrayBuffer> {
  const op = "get4bitType";
  switch (name) {
    case "nf4":
      return NF4_VALUES.slice();
    case "fp4":
      return FP4_VALUES.map((value) => value + 0);
    case "int4":
      return Float32Array.from({ length: 16 }, (_, code) => (code < 8 ? 7 - code : 8 - code) / 7);
    case "af4":
      if (blocksize !== 64) throw new ArgumentError(op, "blocksize", "64 for af4", `${blocksize}`);
      return Float32Array.from(AF4_VALUES).reverse();
    default:
      throw new ArgumentError(op, "name", "nf4, fp4, int4 or af4", `${String(name)}`);
  }
}

/**
 * The standard normal distribution's inverse: algorithm AS 241, routine PPND16 (M. J. Wichura, Applied Statistics 37,
 * 1988, 477-484), relative error about 1e-16 for 0 < p < 1.
 */
function probit(p: number): number {
  const q = p - 0.5;
  if (Math.abs(q) <= 0.425) {
    const r = 0.180625 - q * q;
    return (q * polynomial(PROBIT_CENTRE[0], r)) / polynomial(PROBIT_CENTRE[1], r);
  }
  const r = Math.sqrt(-Math.log(Math.min(p, 1 - p)));
  const [shift, [numerator, denominator]] = r <= 5 ? ([1.6, PROBIT_MIDDLE] as const) : ([5, PROBIT_TAIL] as const);
  const x = polynomial(numerator, r - shift) / polynomial(denominator, r - shift);
  return q < 0 ? -x : x;
}

/** Horner's rule, the highest power's coefficient first. */
function polynomial(coefficients: readonly number[], x: number): number {
  return coefficients.reduce((sum, c) => sum * x + c, 0);
}

const PROBIT_CENTRE = [
  [
    2509.0809287301227, 33430.57558358813, 67265.7709270087, 45921.95393154987, 13731.69376550946, 1971.5909503065513,
    133.14166789178438, 3.3871328727963665,
  ],
  [
    5226.495278852854, 28729.085735721943, 39307.89580009271, 21213.794301586597, 5394.196021424751, 687.1870074920579,
    42.31333070160091, 1,
  ],
] as const;
const PROBIT_MIDDLE = [
  [
    7.745450142783414e-4, 0.022723844989269184, 0.2417807251774506, 1.2704582524523684, 3.6478483247632045,
    5.769497221460691, 4.630337846156546, 1.4234371107496835,
  ],
  [
    1.0507500716444169e-9, 5.475938084995345e-4, 0.015198666563616457, 0.14810397642748008, 0.6897673349851,
    1.6763848301838038, 2.053191626637759, 1,
  ],
] as const;
const PROBIT_TAIL = [
  [
    2.0103343992922881e-7, 2.7115555687434876e-5, 0.0012426609473880784, 0.026532189526576124, 0.29656057182850487,
    1.7848265399172913, 5.463784911164114, 6.657904643501103,
  ],
  [
    2.0442631033899397e-15, 1.421511758316446e-7, 1.8463183175100548e-5, 7.868691311456133e-4, 0.014875361290850615,
    0.1369298809227358, 0.599832206555888, 1,
  ],
] as const;
