/**
 * Row-wise int8 quantization (LLM.int8() weights and activations).
 *
 * Per row: scale = absmax = max |x|, q = rint(x * (127 * (1 / absmax))), half to even, each operation rounded once
 * (PyTorch computes 127 / tensor so; weights in bf16 fall on halves often enough for the difference to show). A row of
 * zeros gives 0 and scale 0. Where non-finite input is allowed, NaN does not count for the maximum and gives 0. Denormals
 * are kept; where absmax is below 1e-30, x and absmax are both taken times 2^64, so that nothing overflows.
 *
 * Decoding is (q * scale) * f32(1 / 127), rounded after each step, as bitsandbytes orders it.
 */
import { BF16, F16, F32, INT8_TINY } from "./generated/constants";
import { Int8VectorwiseDequant as D, Int8VectorwiseQuant as Q } from "./generated/operands";
import {
  absmaxBits,
  absmaxIgnoringNaN,
  bf16,
  f16,
  INFINITY,
  load1,
  maxFinite,
  minScaled,
  scale4,
  scaleFactor,
  store1,
  storeFinite8,
} from "./kernel";
import { fault } from "./stream";

const INVERSE_127: f32 = 0.007874015718698502;

/** q[r, c] = rint(x[r, c] * (127 * (1 / absmax(row r)))), scale[r] = absmax(row r). Unit: row. */
export function int8VectorwiseQuant(op: usize, begin: u32, end: u32): void {
  const dtype = load<u32>(op, Q.dtype);
  if (dtype == F32) quantizeRows<f32>(op, begin, end);
  else if (dtype == F16) quantizeRows<f16>(op, begin, end);
  else if (dtype == BF16) quantizeRows<bf16>(op, begin, end);
  else unreachable();
}

function quantizeRows<T>(op: usize, begin: u32, end: u32): void {
  const cols = load<u32>(op, Q.cols);
  for (let row = begin; row < end; row++) {
    const x = load<usize>(op, Q.x) + row * cols * sizeof<T>();
    const q = load<usize>(op, Q.q) + row * cols;
    const bits = absmaxBits<T>(x, cols);
    let absmax = reinterpret<f32>(bits);
    if (bits >= INFINITY) {
      if (!load<u32>(op, Q.allowNonFinite)) fault(op, row);
      absmax = absmaxIgnoringNaN<T>(x, cols, 0);
    }
    store<f32>(load<usize>(op, Q.scale) + row * 4, absmax);
    let done: u32 = 0;
    if (absmax >= leastFast<T>() && absmax <= 1e30 && bits < INFINITY) {
      done = cols & -16;
      if (done) quantizeFast<T>(x, q, done, <f32>127 * (<f32>1 / absmax));
    }
    for (let i = done; i < cols; i++) store<i8>(q + i, quantize1(load1<T>(x + i * sizeof<T>()), absmax));
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
