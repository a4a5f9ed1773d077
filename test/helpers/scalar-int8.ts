/** The int8 primitives as plain scalar JavaScript, beside helpers/scalar.ts: slow, obvious, written without a look at asm/. */
import type { FloatDType } from "#halfbyte/core/dtype.js";
import { rint, round } from "./scalar.js";

const f32 = Math.fround;
/** 1 / 127^2 as upstream writes it. */
const INVERSE = f32(6.200012e-5);

export interface Outliers {
  /** i32 `[cols]`: the columns, then -1. */
  readonly columns: Int32Array;
  readonly count: number;
}

/** Rows without their outliers; the columns of those are 0 in all rows where there are several. */
export function int8VectorwiseQuant(x: ArrayLike<number>, rows: number, cols: number, threshold = 0) {
  const q = new Int8Array(rows * cols);
  const scale = new Float32Array(rows);
  const bad = new Set<number>();
  for (let r = 0; r < rows; r++) {
    const isOutlier = (c: number) => threshold > 0 && Math.abs(x[r * cols + c]!) >= f32(threshold);
    let max = 0;
    for (let c = 0; c < cols; c++) {
      const a = Math.abs(x[r * cols + c]!);
      if (isOutlier(c)) bad.add(c);
      else if (a > max) max = a;
    }
    scale[r] = max;
    const up = max < 1e-30 ? 2 ** 64 : 1;
    const inverse = f32(127 * f32(1 / (max * up)));
    for (let c = 0; c < cols; c++) {
      const v = f32(f32(x[r * cols + c]! * up) * inverse);
      q[r * cols + c] = max === 0 || isOutlier(c) || Number.isNaN(v) ? 0 : rint(v);
    }
  }
  const columns = new Int32Array(cols).fill(-1);
  columns.set([...bad].sort((a, b) => a - b));
  if (rows > 1) for (const c of bad) for (let r = 0; r < rows; r++) q[r * cols + c] = 0;
  return { q, scale, outliers: { columns, count: bad.size } satisfies Outliers };
}

/** Codes by columns: rint(T(x * 127) / the column's largest magnitude below the threshold). */
export function int8ColumnQuant(
  x: ArrayLike<number>,
  rows: number,
  cols: number,
  dtype: FloatDType,
  threshold: number,
): { q: Int8Array; stats: Float32Array } {
  const q = new Int8Array(rows * cols);
  const stats = new Float32Array(cols);
  for (let c = 0; c < cols; c++) {
    const isOutlier = (value: number) => threshold > 0 && Math.abs(value) >= f32(threshold);
    for (let r = 0; r < rows; r++) {
      const a = Math.abs(x[r * cols + c]!);
      if (a > stats[c]! && !isOutlier(a)) stats[c] = a;
    }
    for (let r = 0; r < rows; r++) {
      const value = x[r * cols + c]!;
      const v = f32(round(dtype, f32(value * 127)) / stats[c]!);
      if (stats[c] === 0 || isOutlier(value) || Number.isNaN(v)) continue;
      q[r * cols + c] = Math.abs(v) >= 127 ? 127 * Math.sign(v) : rint(v);
    }
  }
  return { q, stats };
}

/** int8 codes of rows in blocks, padded with zeros to whole blocks; a block that is not finite has codes 0 and scale NaN. */
export function quantizeActivations(x: ArrayLike<number>, rows: number, cols: number, block: number) {
  const blocks = Math.ceil(cols / block);
  const q = new Int8Array(rows * blocks * block);
  const scale = new Float32Array(rows * blocks);
  for (let r = 0; r < rows; r++) {
    for (let b = 0; b < blocks; b++) {
      const values = Array.from({ length: Math.min(block, cols - b * block) }, (_, i) => x[r * cols + b * block + i]!);
      const absmax = Math.max(...values.map(Math.abs));
      const at = r * blocks + b;
      scale[at] = Number.isFinite(absmax) ? absmax / 127 : Number.NaN;
      if (!Number.isFinite(absmax) || absmax === 0) continue;
      const up = absmax < 1e-30 ? 2 ** 64 : 1;
      const inverse = f32(127 / f32(absmax * up));
      values.forEach((v, i) => {
        q[at * block + i] = rint(f32(f32(v * up) * inverse));
      });
    }
  }
  return { q, scale };
}

/** y[m, n] = sum over k of a[m, k] * b[n, k], wrapped to int32. Each at `begin + row * rowStep + column * columnStep`. */
export function igemm(
  [rows, columns, depth]: readonly [m: number, n: number, k: number],
  a: ArrayLike<number>,
  b: ArrayLike<number>,
  { aBegin = 0, bBegin = 0, transposedA = false, transposedB = true } = {},
): Int32Array {
  const y = new Int32Array(rows * columns);
  const [aRow, aStep] = transposedA ? [1, rows] : [depth, 1];
  const [bColumn, bStep] = transposedB ? [depth, 1] : [1, columns];
  for (let m = 0; m < rows; m++) {
    for (let n = 0; n < columns; n++) {
      let sum = 0;
      for (let k = 0; k < depth; k++) {
        sum = (sum + Math.imul(a[aBegin + m * aRow + k * aStep]!, b[bBegin + n * bColumn + k * bStep]!)) | 0;
      }
      y[m * columns + n] = sum;
    }
  }
  return y;
}

const double = new Float64Array(1);
const bits = new BigInt64Array(double.buffer);

/**
 * a * b + c of float32 numbers, rounded once. In float64 the product is exact; the sum is rounded to odd, so that the second
 * rounding is the right one.
 */
export function fma32(a: number, b: number, c: number): number {
  const p = a * b;
  const sum = p + c;
  if (!Number.isFinite(sum)) return f32(sum);
  const back = sum - p;
  const error = p - (sum - back) + (c - back);
  double[0] = sum;
  if (error !== 0 && (bits[0]! & 1n) === 0n) {
    // One step towards the error: away from zero where it has the sign of the sum.
    bits[0]! += error > 0 === sum > 0 ? 1n : -1n;
  }
  return f32(double[0]!);
}

/** The int32 products times both scales, plus bias, in float32. Before the last rounding. */
export function int8Scaled(
  x: ArrayLike<number>,
  rowStats: ArrayLike<number>,
  colStats: ArrayLike<number>,
  bias: ArrayLike<number> | undefined,
): number[] {
  const n = colStats.length;
  return Array.from(x, (v, i) => {
    const scaled = f32(f32(f32(v) * rowStats[Math.floor(i / n)]!) * colStats[i % n]!);
    return fma32(scaled, INVERSE, bias ? bias[i % n]! : 0);
  });
}

export function int8MmDequant(
  x: ArrayLike<number>,
  rowStats: ArrayLike<number>,
  colStats: ArrayLike<number>,
  bias: ArrayLike<number> | undefined,
  dtype: FloatDType,
): number[] {
  return int8Scaled(x, rowStats, colStats, bias).map((v) => round(dtype, v));
}
