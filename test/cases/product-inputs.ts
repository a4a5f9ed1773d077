/** Operands of the products. */
import type { FloatDType } from "#halfbyte/core/dtype.js";
import { random } from "../helpers/random.js";
import { round } from "../helpers/scalar.js";
import type { Host } from "./case.js";

/**
 * `signs`: magnitudes in [0.5, 1.5) times `scale` with random signs, so that no term of a sum is too small to be missed.
 * `onehot`: one such number in each row and zeros round it: every product has one term, and must be exact but for the last
 * rounding. `nonfinite`: `signs` with NaN and infinities in some rows. `zeros`: `signs` with rows and runs of zeros.
 */
export type Fill = "signs" | "onehot" | "nonfinite" | "zeros";

export function matrix(
  dtype: FloatDType,
  [rows, cols]: readonly [number, number],
  seed: string,
  fill: Fill = "signs",
  scale = 1,
): Host {
  const next = random(seed);
  const values = Float64Array.from({ length: rows * cols }, () => {
    const bits = next();
    return round(dtype, scale * (0.5 + (bits >>> 8) / 2 ** 24) * (bits & 1 ? -1 : 1));
  });
  if (fill === "onehot") {
    for (let r = 0; r < rows; r++) {
      // The first and the last column first.
      const kept = r === 0 ? 0 : r === 1 ? cols - 1 : next() % cols;
      for (let c = 0; c < cols; c++) if (c !== kept) values[r * cols + c] = 0;
    }
  } else if (fill === "nonfinite") {
    const odd = [Number.NaN, Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY];
    // Every other row, so that what is odd in one would be seen in the next.
    for (let r = 0; r < rows; r += 2) {
      if (cols > 0) values[r * cols + (next() % cols)] = odd[(r / 2) % 3]!;
    }
  } else if (fill === "zeros") {
    for (let r = 0; r < rows; r++) {
      const end = r % 3 === 0 ? cols : Math.min(cols, 40);
      for (let c = 0; c < end; c++) values[r * cols + c] = r % 2 ? -0 : 0;
    }
  }
  return { dtype, shape: [rows, cols], values };
}

export function vector(dtype: FloatDType, n: number, seed: string, scale = 1): Host {
  return { ...matrix(dtype, [1, n], seed, "signs", scale), shape: [n] };
}

export function bytes(n: number, seed: string): Host & { readonly values: Uint8Array } {
  const next = random(seed);
  return { dtype: "u8", shape: [n], values: Uint8Array.from({ length: n }, () => next() >>> 24) };
}

/** int8 of all values, -128 among them. */
export function codes(shape: readonly number[], seed: string): Host & { readonly values: Int8Array } {
  const next = random(seed);
  const n = shape.reduce((a, b) => a * b, 1);
  return { dtype: "i8", shape, values: Int8Array.from({ length: n }, () => next() >>> 24) };
}

/** Positive f32 numbers in [0.5, 1.5) times `scale`. */
export function scales(n: number, seed: string, scale: number): Host & { readonly values: Float32Array } {
  const next = random(seed);
  const values = Float32Array.from({ length: n }, () => scale * (0.5 + (next() >>> 8) / 2 ** 24));
  return { dtype: "f32", shape: [n], values };
}

/** A magnitude in an id: `2^-90`. */
export function scaleName(scale: number): string {
  const exponent = Math.log2(scale);
  return Number.isInteger(exponent) && exponent !== 0 ? `2^${exponent}` : `${scale}`;
}
