/**
 * How far a product may be from the float64 value, and the products themselves in float64.
 *
 * A bound has a part for the last rounding (half an ulp of the result's dtype), a part for float32 sums in whatever order, and
 * what a path does beside that. Sums are bounded by the sum of their terms' magnitudes: a path that loses one term, reads
 * one wrong code or scale or leaves the bias out is off by more (test/helpers/bounds.test.ts plants all of these).
 */
import type { FloatDType } from "#halfbyte/core/dtype.js";
import { ACTIVATION_BLOCK } from "#halfbyte/core/kernels.js";
import type { ProductPath } from "#halfbyte/core/product-paths.js";
import { f32FromBits } from "./scalar.js";

/** Half an ulp of 1. */
export const UNIT: Readonly<Record<FloatDType, number>> = { f32: 2 ** -24, f16: 2 ** -11, bf16: 2 ** -8 };
/** The smallest number above 0. */
export const SMALLEST: Readonly<Record<FloatDType, number>> = { f32: 2 ** -149, f16: 2 ** -24, bf16: 2 ** -133 };
/** From here on numbers round to infinity. */
const OVERFLOW: Readonly<Record<FloatDType, number>> = {
  f32: 2 ** 128 - 2 ** 103,
  f16: 65520,
  bf16: f32FromBits(0x7f7f0000) + 2 ** 119,
};

/** Over the half ulp of the last rounding, for what is rounded is not the exact value. */
const LAST_ROUNDING = 1.01;
/** Of the magnitude of a float32 sum, in units of 2^-24, that all its roundings together may come to. */
const SUM_ROUNDINGS = 8;
/**
 * On path `vector` weights in f16 and bf16 are codes rounded to the dtype whose sum is scaled in float32, on path `fast` codes of 16
 * bits, while the reference rounds the scaled weight: two roundings apart, each of half an ulp of the weight ...
 */
const WEIGHT_ROUNDINGS = 2;
/** ... which are as good as independent where activations have random signs: this many standard deviations of their sum. */
const WEIGHT_DEVIATIONS = 4;

/** The same for the roundings of activations to int8. */
const ACTIVATION_DEVIATIONS = 5;
/** For the float32 operations that make the codes of activations on path `fast`, and for codes of weights rounded to 16 bits. */
const FAST_SLACK = 1.01;

/** What is known of one element of a product beside its value. */
export interface Terms {
  /** Its value in float64, bias included. */
  readonly value: number;
  /** The sum of the magnitudes of its terms, bias included, and of their squares. */
  readonly magnitude: number;
  readonly squares: number;
  /** The number of terms, and the sum of the activations' magnitudes. */
  readonly count: number;
  readonly activations: number;
}

/** How far an element of dtype `dtype` may be from its value when its terms are summed in float32 and rounded once. */
export function sumBound(dtype: FloatDType, t: Terms): number {
  if (!Number.isFinite(t.value)) return 0;
  const last = LAST_ROUNDING * UNIT[dtype] * Math.abs(t.value) + SMALLEST[dtype];
  return last + SUM_ROUNDINGS * UNIT.f32 * t.magnitude + t.count * SMALLEST.f32;
}

/** The same for a product with 4-bit weights, by the path that it takes. */
export function fourBitBound(path: ProductPath, dtype: FloatDType, t: Terms): number {
  const bound = sumBound(dtype, t);
  if ((path !== "vector" && path !== "fast") || dtype === "f32" || !Number.isFinite(t.value)) return bound;
  const most = WEIGHT_ROUNDINGS * UNIT[dtype] * t.magnitude;
  const likely = WEIGHT_DEVIATIONS * UNIT[dtype] * Math.sqrt(t.squares);
  return bound + Math.min(most, likely) + SMALLEST[dtype] * t.activations;
}

/**
 * Whether `got` is `value` within `bound`, or what rounding makes of that beyond the largest finite number of the dtype. With an
 * infinite bound, whether it is not finite.
 */
export function isWithin(dtype: FloatDType, value: number, bound: number, got: number): boolean {
  if (bound === Number.POSITIVE_INFINITY && !Number.isFinite(value)) return !Number.isFinite(got);
  if (!(bound >= 0 && bound < Number.POSITIVE_INFINITY)) throw new Error(`a bound of ${bound} for ${value}`);
  if (Number.isNaN(value)) return Number.isNaN(got);
  if (!Number.isFinite(value)) return got === value;
  if (Math.abs(got) === Number.POSITIVE_INFINITY) {
    return Math.sign(got) === Math.sign(value) && Math.abs(value) + bound >= OVERFLOW[dtype];
  }
  return Math.abs(got - value) <= bound;
}

/** Element i of a matrix is at `begin + row * rowStep + column * columnStep`. */
export interface Matrix {
  readonly values: ArrayLike<number>;
  readonly begin?: number;
  readonly rowStep: number;
  readonly columnStep: number;
}

/**
 * y[m, n] = sum over k of a[m, k] * b[k, n] (+ bias[n]) in float64, with the bound of each. Zeros do not hide a NaN or an infinity.
 */
export function product(
  [rows, columns, depth]: readonly [m: number, n: number, k: number],
  a: Matrix,
  b: Matrix,
  bias: ArrayLike<number> | undefined,
  bound: (terms: Terms) => number,
): { values: Float64Array; bound: Float64Array } {
  const values = new Float64Array(rows * columns);
  const bounds = new Float64Array(rows * columns);
  const [left, right] = [Float64Array.from(a.values), Float64Array.from(b.values)];
  const [aBegin, bBegin] = [a.begin ?? 0, b.begin ?? 0];
  for (let m = 0; m < rows; m++) {
    for (let n = 0; n < columns; n++) {
      let value = 0;
      let magnitude = 0;
      let squares = 0;
      let activations = 0;
      let i = aBegin + m * a.rowStep;
      let j = bBegin + n * b.columnStep;
      for (let k = 0; k < depth; k++, i += a.columnStep, j += b.rowStep) {
        const term = left[i]! * right[j]!;
        value += term;
        magnitude += Math.abs(term);
        squares += term * term;
        activations += Math.abs(left[i]!);
      }
      if (bias) {
        value += bias[n]!;
        magnitude += Math.abs(bias[n]!);
      }
      values[m * columns + n] = value;
      bounds[m * columns + n] = bound({ value, magnitude, squares, count: depth + 1, activations });
    }
  }
  return { values, bound: bounds };
}

/**
 * What path `fast` adds to the bounds of y = A W^T: each activation is off by half a step of its block's codes at most, and
 * those errors are as good as independent of the weights.
 */
export function fastBound(
  [rows, columns, depth]: readonly [m: number, n: number, k: number],
  a: ArrayLike<number>,
  weight: ArrayLike<number>,
): Float64Array {
  const blocks = Math.ceil(depth / ACTIVATION_BLOCK);
  const blockSums = (
    of: ArrayLike<number>,
    count: number,
    term: (v: number) => number,
    fold: (a: number, b: number) => number,
  ) => {
    const sums = new Float64Array(count * blocks);
    for (let r = 0; r < count; r++) {
      for (let k = 0; k < depth; k++) {
        const at = r * blocks + Math.floor(k / ACTIVATION_BLOCK);
        sums[at] = fold(sums[at]!, term(of[r * depth + k]!));
      }
    }
    return sums;
  };
  const add = (x: number, y: number): number => x + y;
  const steps = blockSums(a, rows, Math.abs, Math.max).map((absmax) => absmax / 127);
  const magnitudes = blockSums(weight, columns, Math.abs, add);
  const squares = blockSums(weight, columns, (w) => w * w, add);
  const bounds = new Float64Array(rows * columns);
  for (let m = 0; m < rows; m++) {
    for (let n = 0; n < columns; n++) {
      let most = 0;
      let variance = 0;
      for (let b = 0; b < blocks; b++) {
        const step = steps[m * blocks + b]!;
        most += (step / 2) * magnitudes[n * blocks + b]!;
        // Of an error that is anywhere within half a step.
        variance += ((step * step) / 12) * squares[n * blocks + b]!;
      }
      bounds[m * columns + n] = FAST_SLACK * Math.min(most, ACTIVATION_DEVIATIONS * Math.sqrt(variance));
    }
  }
  return bounds;
}
