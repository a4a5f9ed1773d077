/**
 * The gradient's product with a 4-bit weight: y[m, k] = sum over n of g[m, n] * W[n, k], weights as dequantize4bit gives them for the
 * gradient's type, float32 sums. DEPTH rows of the weight are added up in order, from 0; these sums are added in order.
 */
import { BF16, F16, F32, PRODUCT_ROWS, TRANSPOSED_COLUMNS } from "./generated/constants";
import { Matmul4bitTransposed as P } from "./generated/operands";
import { bf16, f16, load1, store1, store8 } from "./kernel";
import { decodeScaled, GROUP, highDwords, lowDwords, place, valuesOf } from "./nibbles";
import { scratch } from "./stream";

/** Rows of the weight decoded at once. */
const DEPTH: u32 = 32;
/** Bytes of a row of decoded columns, of sums, and of a row of gradients. */
const W_ROW: u32 = TRANSPOSED_COLUMNS * 4;
const G_ROW: u32 = DEPTH * 4;

// Offsets in scratch memory.
const G: usize = 0;
const W: usize = G + PRODUCT_ROWS * G_ROW;
const TOTALS: usize = W + DEPTH * W_ROW;
const WORK: usize = TOTALS + PRODUCT_ROWS * W_ROW;

/** Unit: TRANSPOSED_COLUMNS outputs of a block of at most PRODUCT_ROWS rows. */
export function matmul4bitTransposed(op: usize, begin: u32, end: u32): void {
  const m = load<u32>(op, P.m);
  const dtype = load<u32>(op, P.dtype);
  const tiles = (load<u32>(op, P.k) + TRANSPOSED_COLUMNS - 1) / TRANSPOSED_COLUMNS;
  const blocks = (m + PRODUCT_ROWS - 1) / PRODUCT_ROWS;
  const rows = ((m + blocks - 1) / blocks + 3) & -4;
  for (let unit = begin; unit < end; unit++) {
    const row = (unit / tiles) * rows;
    const column = (unit % tiles) * TRANSPOSED_COLUMNS;
    const count = min(rows, m - row);
    if (dtype == F32) tile<f32>(op, row, count, column);
    else if (dtype == F16) tile<f16>(op, row, count, column);
    else if (dtype == BF16) tile<bf16>(op, row, count, column);
    else unreachable();
  }
}

function tile<T>(op: usize, row: u32, rows: u32, column: u32): void {
  const n = load<u32>(op, P.n);
  const k = load<u32>(op, P.k);
  const columns = min(TRANSPOSED_COLUMNS, k - column);
  const packed = load<usize>(op, P.packed);
  const absmax = load<usize>(op, P.absmax);
  const blocksize = load<u32>(op, P.blocksize);
  const values = valuesOf(load<u32>(op, P.quantType));
  const base = scratch();
  memory.fill(base + TOTALS, 0, PRODUCT_ROWS * W_ROW);
  for (let begin: u32 = 0; begin < n; begin += DEPTH) {
    const count = min(DEPTH, n - begin);
    for (let i: u32 = 0; i < rows; i++) {
      const g = load<usize>(op, P.g) + ((row + i) * n + begin) * sizeof<T>();
      for (let j: u32 = 0; j < count; j++) store<f32>(base + G + i * G_ROW + j * 4, load1<T>(g + j * sizeof<T>()));
    }
    for (let j: u32 = 0; j < count; j++) {
      const first = <u64>(begin + j) * k + column;
      decodeScaled<T>(packed, absmax, first, columns, blocksize, values, base + W + j * W_ROW, base + WORK);
    }
    multiply(base, rows, (columns + GROUP - 1) & -GROUP, count);
  }
  for (let i: u32 = 0; i < rows; i++) {
    const y = load<usize>(op, P.y) + ((row + i) * k + column) * sizeof<T>();
    finish<T>(base + TOTALS + i * W_ROW, y, columns);
  }
}

function finish<T>(totals: usize, y: usize, columns: u32): void {
  const whole = columns & -8;
  for (let j: u32 = 0; j < whole; j += 8) {
    const even = v128.load(totals + place<T>(j) * 4);
    const odd = v128.load(totals + place<T>(j) * 4, isFloat<T>() ? 16 : 64);
    if (isFloat<T>()) store8<T>(y + j * sizeof<T>(), even, odd);
    else store8<T>(y + j * sizeof<T>(), lowDwords(even, odd), highDwords(even, odd));
  }
  for (let j = whole; j < columns; j++) store1<T>(y + j * sizeof<T>(), load<f32>(totals + place<T>(j) * 4));
}

function multiply(base: usize, rows: u32, columns: u32, count: u32): void {
  let i: u32 = 0;
  for (; i + 4 <= rows; i += 4) {
    const g = base + G + i * G_ROW;
    const totals = base + TOTALS + i * W_ROW;
    for (let j: u32 = 0; j < columns; j += 8) fourByEight(g, base + W + j * 4, count, totals + j * 4);
  }
  for (; i < rows; i++) {
    const g = base + G + i * G_ROW;
    const totals = base + TOTALS + i * W_ROW;
    for (let j: u32 = 0; j < columns; j += 32) oneByThirtyTwo(g, base + W + j * 4, count, totals + j * 4);
  }
}

function fourByEight(g: usize, w: usize, count: u32, totals: usize): void {
  let s00 = i32x4.splat(0);
  let s01 = s00;
  let s10 = s00;
  let s11 = s00;
  let s20 = s00;
  let s21 = s00;
  let s30 = s00;
  let s31 = s00;
  const end = g + count * 4;
  do {
    const w0 = v128.load(w);
    const w1 = v128.load(w, 16);
    let x = v128.load32_splat(g);
    s00 = f32x4.add(s00, f32x4.mul(x, w0));
    s01 = f32x4.add(s01, f32x4.mul(x, w1));
    x = v128.load32_splat(g, G_ROW);
    s10 = f32x4.add(s10, f32x4.mul(x, w0));
    s11 = f32x4.add(s11, f32x4.mul(x, w1));
    x = v128.load32_splat(g, 2 * G_ROW);
    s20 = f32x4.add(s20, f32x4.mul(x, w0));
    s21 = f32x4.add(s21, f32x4.mul(x, w1));
    x = v128.load32_splat(g, 3 * G_ROW);
    s30 = f32x4.add(s30, f32x4.mul(x, w0));
    s31 = f32x4.add(s31, f32x4.mul(x, w1));
    w += W_ROW;
    g += 4;
  } while (g < end);
  addTo(totals, s00, s01);
  addTo(totals + W_ROW, s10, s11);
  addTo(totals + 2 * W_ROW, s20, s21);
  addTo(totals + 3 * W_ROW, s30, s31);
}

// @ts-expect-error: decorator
@inline
function addTo(totals: usize, a: v128, b: v128): void {
  v128.store(totals, f32x4.add(v128.load(totals), a));
  v128.store(totals, f32x4.add(v128.load(totals, 16), b), 16);
}

function oneByThirtyTwo(g: usize, w: usize, count: u32, totals: usize): void {
  let s0 = i32x4.splat(0);
  let s1 = s0;
  let s2 = s0;
  let s3 = s0;
  let s4 = s0;
  let s5 = s0;
  let s6 = s0;
  let s7 = s0;
  const end = g + count * 4;
  do {
    const x = v128.load32_splat(g);
    s0 = f32x4.add(s0, f32x4.mul(x, v128.load(w)));
    s1 = f32x4.add(s1, f32x4.mul(x, v128.load(w, 16)));
    s2 = f32x4.add(s2, f32x4.mul(x, v128.load(w, 32)));
    s3 = f32x4.add(s3, f32x4.mul(x, v128.load(w, 48)));
    s4 = f32x4.add(s4, f32x4.mul(x, v128.load(w, 64)));
    s5 = f32x4.add(s5, f32x4.mul(x, v128.load(w, 80)));
    s6 = f32x4.add(s6, f32x4.mul(x, v128.load(w, 96)));
    s7 = f32x4.add(s7, f32x4.mul(x, v128.load(w, 112)));
    w += W_ROW;
    g += 4;
  } while (g < end);
  addTo(totals, s0, s1);
  addTo(totals + 32, s2, s3);
  addTo(totals + 64, s4, s5);
  addTo(totals + 96, s6, s7);
}
