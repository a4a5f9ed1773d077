/**
 * int8 quantization (LLM.int8() weights and activations), by rows and by columns.
 *
 * Per row: scale = absmax = max |x|, q = rint(x * (127 * (1 / absmax))), half to even, each operation rounded once
 * (PyTorch computes 127 / tensor so; weights in bf16 fall on halves often enough for the difference to show). A row of
 * zeros gives 0 and scale 0. Where non-finite input is allowed, NaN does not count for the maximum and gives 0. Denormals
 * are kept; where absmax is below 1e-30, x and absmax are both taken times 2^64, so that nothing overflows.
 *
 * Decoding is (q * scale) * f32(1 / 127), rounded after each step, as bitsandbytes orders it.
 */
import { BF16, F16, F32, INT8_TINY } from "./generated/constants";
import {
  Int8ColumnQuant as C,
  Int8ColumnStats as S,
  Int8OutlierColumns as O,
  Int8VectorwiseDequant as D,
  Int8VectorwiseQuant as Q,
  Int8ZeroColumns as Z,
} from "./generated/operands";
import {
  absmaxBits,
  absmaxIgnoringNaN,
  bf16,
  f16,
  INFINITY,
  load1,
  load4,
  maxFinite,
  minScaled,
  scale4,
  scaleFactor,
  store1,
  store8,
  storeFinite8,
  storeInt1,
  storeInt8,
} from "./kernel";
import { fault, scratch } from "./stream";

export const INVERSE_127: f32 = 0.007874015718698502;

/**
 * q[r, c] = rint(x[r, c] * (127 * (1 / absmax(row r)))), scale[r] = absmax(row r). With `outliers`, what is not below the
 * threshold does not count for absmax, gets code 0, and its column's byte becomes 1. Unit: row.
 */
export function int8VectorwiseQuant(op: usize, begin: u32, end: u32): void {
  const dtype = load<u32>(op, Q.dtype);
  if (dtype == F32) quantizeRows<f32>(op, begin, end);
  else if (dtype == F16) quantizeRows<f16>(op, begin, end);
  else if (dtype == BF16) quantizeRows<bf16>(op, begin, end);
  else unreachable();
}

function quantizeRows<T>(op: usize, begin: u32, end: u32): void {
  const cols = load<u32>(op, Q.cols);
  const outliers = load<usize>(op, Q.outliers);
  const threshold = load<f32>(op, Q.threshold);
  for (let row = begin; row < end; row++) {
    const x = load<usize>(op, Q.x) + row * cols * sizeof<T>();
    const q = load<usize>(op, Q.q) + row * cols;
    const bits = absmaxBits<T>(x, cols);
    let absmax = reinterpret<f32>(bits);
    if (bits >= INFINITY) {
      if (!load<u32>(op, Q.allowNonFinite)) fault(op, row);
      absmax = absmaxIgnoringNaN<T>(x, cols, 0);
    }
    const hasOutliers = outliers != 0 && bits >= reinterpret<u32>(threshold);
    if (hasOutliers) absmax = absmaxBelow<T>(x, cols, threshold);
    store<f32>(load<usize>(op, Q.scale) + row * 4, absmax);
    let done: u32 = 0;
    if (absmax >= leastFast<T>() && absmax <= 1e30 && bits < INFINITY) {
      done = cols & -16;
      if (done) quantizeFast<T>(x, q, done, <f32>127 * (<f32>1 / absmax));
    }
    for (let i = done; i < cols; i++) {
      const v = load1<T>(x + i * sizeof<T>());
      store<i8>(q + i, hasOutliers && !(abs(v) < threshold) ? 0 : quantize1(v, absmax));
    }
    if (hasOutliers) dropOutliers<T>(x, q, cols, threshold, outliers);
  }
}

/** The largest magnitude below the threshold. */
function absmaxBelow<T>(p: usize, n: u32, threshold: f32): f32 {
  const limit = f32x4.splat(threshold);
  let a = f32x4.splat(0);
  let b = a;
  for (const end = p + (n & -8) * sizeof<T>(); p < end; p += 8 * sizeof<T>()) {
    a = f32x4.pmax(a, below(load4<T>(p), limit));
    b = f32x4.pmax(b, below(load4<T>(p + 4 * sizeof<T>()), limit));
  }
  for (const end = p + (n & 7) * sizeof<T>(); p < end; p += sizeof<T>()) {
    a = f32x4.pmax(a, below(f32x4.splat(load1<T>(p)), limit));
  }
  a = f32x4.pmax(a, b);
  a = f32x4.pmax(a, i64x2.shuffle(a, a, 1, 0));
  return max(f32x4.extract_lane(a, 0), f32x4.extract_lane(a, 1));
}

/** |x| where it is below the limit, else (and for NaN) 0. */
function below(x: v128, limit: v128): v128 {
  const magnitude = f32x4.abs(x);
  return v128.and(magnitude, f32x4.lt(magnitude, limit));
}

/** Marks the columns of a row's outliers, and sets their codes to 0. Other threads may mark the same columns. */
function dropOutliers<T>(x: usize, q: usize, n: u32, threshold: f32, outliers: usize): void {
  const limit = f32x4.splat(threshold);
  const whole = n & -8;
  for (let i: u32 = 0; i < n; ) {
    let count: u32 = 1;
    if (i < whole) {
      const a = f32x4.ge(f32x4.abs(load4<T>(x + i * sizeof<T>())), limit);
      const b = f32x4.ge(f32x4.abs(load4<T>(x + (i + 4) * sizeof<T>())), limit);
      if (!v128.any_true(v128.or(a, b))) {
        i += 8;
        continue;
      }
      count = 8;
    }
    for (const end = i + count; i < end; i++) {
      if (abs(load1<T>(x + i * sizeof<T>())) >= threshold) {
        store<u8>(outliers + i, 1);
        store<i8>(q + i, 0);
      }
    }
  }
}

/** Where neither 127 * (1 / absmax) overflows nor `scaleFactor` of it. */
function leastFast<T>(): f32 {
  return max<f32>(minScaled<T>(), INT8_TINY);
}

function quantizeFast<T>(x: usize, q: usize, n: u32, r: f32): void {
  // A power of two less: exact, and f16 admits a larger r.
  const factor = scaleFactor<T>(r / 128);
  const end = q + n;
  do {
    const a = rint8(scale4<T>(x, factor), scale4<T>(x + 4 * sizeof<T>(), factor));
    const b = rint8(scale4<T>(x + 8 * sizeof<T>(), factor), scale4<T>(x + 12 * sizeof<T>(), factor));
    v128.store(q, i8x16.narrow_i16x8_s(a, b));
    x += 16 * sizeof<T>();
    q += 16;
  } while (q < end);
}

/** rint(128 v) of eight |v| <= 1, nearest even: 1.5 * 2^16 has its last bit at 1 / 128. */
function rint8(v: v128, w: v128): v128 {
  const magic = f32x4.splat(98304);
  return i16x8.narrow_i32x4_s(i32x4.sub(f32x4.add(v, magic), magic), i32x4.sub(f32x4.add(w, magic), magic));
}

/** The code of any x. NaN, also that of infinity times zero, gives 0. */
function quantize1(x: f32, absmax: f32): i8 {
  if (absmax == 0) return 0;
  const up: f32 = absmax < INT8_TINY ? 18446744073709551616.0 : 1;
  const v = x * up * (<f32>127 * (<f32>1 / (absmax * up)));
  return v == v ? <i8>nearest(v) : 0;
}

/** y[r, c] = (q[r, c] * scale[r]) * f32(1 / 127). Unit: row. */
export function int8VectorwiseDequant(op: usize, begin: u32, end: u32): void {
  const dtype = load<u32>(op, D.dtype);
  if (dtype == F32) dequantizeRows<f32>(op, begin, end);
  else if (dtype == F16) dequantizeRows<f16>(op, begin, end);
  else if (dtype == BF16) dequantizeRows<bf16>(op, begin, end);
  else unreachable();
}

function dequantizeRows<T>(op: usize, begin: u32, end: u32): void {
  const cols = load<u32>(op, D.cols);
  for (let row = begin; row < end; row++) {
    const q = load<usize>(op, D.q) + row * cols;
    const y = load<usize>(op, D.y) + row * cols * sizeof<T>();
    const scale = load<f32>(load<usize>(op, D.scale) + row * 4);
    let done: u32 = 0;
    // q is at least -128, so nothing can get out of T's range.
    if (abs(scale) * 128 <= maxFinite<T>()) {
      done = cols & -8;
      if (done) dequantizeFast<T>(q, y, done, scale);
    }
    for (let i = done; i < cols; i++) {
      store1<T>(y + i * sizeof<T>(), <f32>load<i8>(q + i) * scale * INVERSE_127);
    }
  }
}

function dequantizeFast<T>(q: usize, y: usize, n: u32, scale: f32): void {
  const by = f32x4.splat(scale);
  const inverse = f32x4.splat(INVERSE_127);
  const end = q + n;
  do {
    const codes = v128.load8x8_s(q);
    const a = f32x4.convert_i32x4_s(i32x4.extend_low_i16x8_s(codes));
    const b = f32x4.convert_i32x4_s(i32x4.extend_high_i16x8_s(codes));
    storeFinite8<T>(y, f32x4.mul(f32x4.mul(a, by), inverse), f32x4.mul(f32x4.mul(b, by), inverse));
    q += 8;
    y += 8 * sizeof<T>();
  } while (q < end);
}

/** columns[0..count) = the columns marked in `outliers`, ascending; the rest of columns[0..cols) = -1. Unit: all of it. */
export function int8OutlierColumns(op: usize, begin: u32, end: u32): void {
  if (begin == end) return;
  const cols = load<u32>(op, O.cols);
  const outliers = load<usize>(op, O.outliers);
  const columns = load<usize>(op, O.columns);
  let count: u32 = 0;
  for (let c: u32 = 0; c < cols; ) {
    if (c + 16 <= cols && !v128.any_true(v128.load(outliers + c))) {
      c += 16;
      continue;
    }
    for (const last = min<u32>(c + 16, cols); c < last; c++) {
      if (load<u8>(outliers + c)) store<u32>(columns + 4 * count++, c);
    }
  }
  memory.fill(columns + 4 * count, 0xff, 4 * (cols - count));
  store<u32>(load<usize>(op, O.count), count);
}

/** q[r, columns[j]] = 0 for j < count. Unit: row. */
export function int8ZeroColumns(op: usize, begin: u32, end: u32): void {
  const cols = load<u32>(op, Z.cols);
  const columns = load<usize>(op, Z.columns);
  const count = min<u32>(max<i32>(load<i32>(load<usize>(op, Z.count)), 0), cols);
  for (let row = begin; row < end; row++) {
    const q = load<usize>(op, Z.q) + row * cols;
    for (let j: u32 = 0; j < count; j++) {
      const c = load<u32>(columns + 4 * j);
      if (c < cols) store<i8>(q + c, 0);
    }
  }
}

/** stats[c] = the largest |x[r, c]|; with threshold > 0 the largest below it. NaN does not count. Unit: column. */
export function int8ColumnStats(op: usize, begin: u32, end: u32): void {
  const dtype = load<u32>(op, S.dtype);
  if (dtype == F32) columnStats<f32>(op, begin, end);
  else if (dtype == F16) columnStats<f16>(op, begin, end);
  else if (dtype == BF16) columnStats<bf16>(op, begin, end);
  else unreachable();
}

function columnStats<T>(op: usize, begin: u32, end: u32): void {
  const rows = load<u32>(op, S.rows);
  const cols = load<u32>(op, S.cols);
  const threshold = load<f32>(op, S.threshold);
  const limit = f32x4.splat(threshold);
  const all = i32x4.splat(threshold > 0 ? 0 : -1);
  const stats = load<usize>(op, S.stats);
  const whole = begin + ((end - begin) & -4);
  memory.fill(stats + begin * 4, 0, (end - begin) * 4);
  for (let row: u32 = 0; row < rows; row++) {
    const x = load<usize>(op, S.x) + row * cols * sizeof<T>();
    for (let c = begin; c < whole; c += 4) {
      const max = v128.load(stats + c * 4);
      v128.store(stats + c * 4, f32x4.pmax(max, counted(load4<T>(x + c * sizeof<T>()), limit, all)));
    }
    for (let c = whole; c < end; c++) {
      const v = counted(f32x4.splat(load1<T>(x + c * sizeof<T>())), limit, all);
      const max = f32x4.splat(load<f32>(stats + c * 4));
      store<f32>(stats + c * 4, f32x4.extract_lane(f32x4.pmax(max, v), 0));
    }
  }
}

/** |x| where it is below the limit or all count, else 0. */
function counted(x: v128, limit: v128, all: v128): v128 {
  const magnitude = f32x4.abs(x);
  return v128.and(magnitude, v128.or(f32x4.lt(magnitude, limit), all));
}

/**
 * q[r, c] = rint(T(x[r, c] * 127) / stats[c]), T the dtype of x, within 127 (x * 127 may overflow f16); 0 for NaN, where
 * |x| >= threshold > 0, and where stats[c] is 0. Unit: row.
 */
export function int8ColumnQuant(op: usize, begin: u32, end: u32): void {
  const dtype = load<u32>(op, C.dtype);
  if (dtype == F32) quantizeColumns<f32>(op, begin, end);
  else if (dtype == F16) quantizeColumns<f16>(op, begin, end);
  else if (dtype == BF16) quantizeColumns<bf16>(op, begin, end);
  else unreachable();
}

function quantizeColumns<T>(op: usize, begin: u32, end: u32): void {
  const cols = load<u32>(op, C.cols);
  const threshold = load<f32>(op, C.threshold);
  const limit = f32x4.splat(threshold);
  const all = i32x4.splat(threshold > 0 ? 0 : -1);
  const factor = f32x4.splat(127);
  const stats = load<usize>(op, C.stats);
  const whole = cols & -8;
  for (let row = begin; row < end; row++) {
    const x = load<usize>(op, C.x) + row * cols * sizeof<T>();
    const q = load<usize>(op, C.q) + row * cols;
    for (let c: u32 = 0; c < whole; c += 8) {
      const p = x + c * sizeof<T>();
      const a = load4<T>(p);
      const b = load4<T>(p + 4 * sizeof<T>());
      store8<T>(scratch(), f32x4.mul(a, factor), f32x4.mul(b, factor));
      storeInt8<i8>(
        q + c,
        columnCodes(load4<T>(scratch()), v128.load(stats + c * 4), a, limit, all),
        columnCodes(load4<T>(scratch() + 4 * sizeof<T>()), v128.load(stats + c * 4, 16), b, limit, all),
      );
    }
    for (let c = whole; c < cols; c++) {
      const v = load1<T>(x + c * sizeof<T>());
      store1<T>(scratch(), v * 127);
      const stat = f32x4.splat(load<f32>(stats + c * 4));
      const code = columnCodes(f32x4.splat(load1<T>(scratch())), stat, f32x4.splat(v), limit, all);
      storeInt1<i8>(q + c, i32x4.extract_lane(code, 0));
    }
  }
}

/** rint(scaled / stats) as integers, 0 where x or stats say so. */
function columnCodes(scaled: v128, stats: v128, x: v128, limit: v128, all: v128): v128 {
  const zero = f32x4.splat(0);
  const used = v128.andnot(v128.or(f32x4.lt(f32x4.abs(x), limit), all), f32x4.eq(stats, zero));
  const code = i32x4.trunc_sat_f32x4_s(f32x4.nearest(f32x4.div(scaled, stats)));
  return v128.and(used, i32x4.min_s(i32x4.max_s(code, i32x4.splat(-127)), i32x4.splat(127)));
}
