/**
 * Products of int8 matrices in exact int32 sums (they wrap), and what belongs to them.
 *
 * A unit of `igemm` is a panel of IGEMM_PANEL rows of b times a block of at most IGEMM_ROWS rows of a: the panel stays in the
 * first cache, the block in the second. Both operands run along k, so nothing is packed: bytes are widened as they are
 * loaded, and a tile of sums in registers uses each several times.
 */
import {
  BF16,
  DEQUANT_TILE,
  F16,
  F32,
  IGEMM_PANEL,
  IGEMM_ROWS,
  INT8_INVERSE,
  TRANSPOSE_TILE,
} from "./generated/constants";
import { Int8MmDequant as D, Igemm, Transpose } from "./generated/operands";
import { INVERSE_127 } from "./int8";
import { bf16, f16, load1, load4, store1, store8 } from "./kernel";
import { scratch } from "./stream";

/** y[b, m, n] = sum over k of a[b, m, k] * b[b, n, k]. Unit: tile, panels innermost. */
export function igemm(op: usize, begin: u32, end: u32): void {
  const m = load<u32>(op, Igemm.m);
  const n = load<u32>(op, Igemm.n);
  const k = load<u32>(op, Igemm.k);
  const panels = (n + IGEMM_PANEL - 1) / IGEMM_PANEL;
  const blocks = (m + IGEMM_ROWS - 1) / IGEMM_ROWS;
  const height = ((m + blocks - 1) / blocks + 3) & -4;
  for (let unit = begin; unit < end; unit++) {
    const column = (unit % panels) * IGEMM_PANEL;
    const row = ((unit / panels) % blocks) * height;
    const batch = unit / panels / blocks;
    multiplyPanel(
      load<usize>(op, Igemm.a) + (batch * m + row) * k,
      load<usize>(op, Igemm.b) + (batch * n + column) * k,
      load<usize>(op, Igemm.y) + ((batch * m + row) * n + column) * 4,
      min<u32>(height, m - row),
      min<u32>(IGEMM_PANEL, n - column),
      k,
      n * 4,
    );
  }
}

function multiplyPanel(a: usize, b: usize, y: usize, rows: u32, columns: u32, k: usize, stride: usize): void {
  // Three rows that are left over go as four.
  const tall = (rows + 1) & -4;
  for (let j: u32 = 0; j < columns && tall > 0; j += 2) {
    for (let i: u32 = 0; i < tall; i += 4) {
      tile4x2(a + k * i, b + k * j, y + stride * i + j * 4, min<u32>(4, rows - i), min<u32>(2, columns - j), k, stride);
    }
  }
  const i = min(tall, rows);
  if (rows - i == 2) {
    for (let j: u32 = 0; j < columns; j += 4) {
      tile2x4(a + k * i, b + k * j, y + stride * i + j * 4, min<u32>(4, columns - j), k, stride);
    }
  } else if (rows - i == 1) {
    for (let j: u32 = 0; j < columns; j += 4) {
      tile1x4(a + k * i, b + k * j, y + stride * i + j * 4, min<u32>(4, columns - j), k);
    }
  }
}

// A tile computes its last row or column several times where others are missing, and stores it once.

function tile4x2(a0: usize, b0: usize, y: usize, rows: u32, columns: u32, k: usize, stride: usize): void {
  let a1 = a0 + (rows > 1 ? k : 0);
  let a2 = a1 + (rows > 2 ? k : 0);
  let a3 = a2 + (rows > 3 ? k : 0);
  let b1 = b0 + (columns > 1 ? k : 0);
  let s00 = i32x4.splat(0);
  let s01 = s00;
  let s10 = s00;
  let s11 = s00;
  let s20 = s00;
  let s21 = s00;
  let s30 = s00;
  let s31 = s00;
  for (const end = b0 + (k & -8); b0 < end; b0 += 8) {
    const x = v128.load8x8_s(b0);
    const z = v128.load8x8_s(b1);
    let v = v128.load8x8_s(a0);
    s00 = dot(s00, v, x);
    s01 = dot(s01, v, z);
    v = v128.load8x8_s(a1);
    s10 = dot(s10, v, x);
    s11 = dot(s11, v, z);
    v = v128.load8x8_s(a2);
    s20 = dot(s20, v, x);
    s21 = dot(s21, v, z);
    v = v128.load8x8_s(a3);
    s30 = dot(s30, v, x);
    s31 = dot(s31, v, z);
    a0 += 8;
    a1 += 8;
    a2 += 8;
    a3 += 8;
    b1 += 8;
  }
  const tail = <u32>k & 7;
  if (tail) {
    const x = loadLast(b0, tail);
    const z = loadLast(b1, tail);
    let v = loadLast(a0, tail);
    s00 = dot(s00, v, x);
    s01 = dot(s01, v, z);
    v = loadLast(a1, tail);
    s10 = dot(s10, v, x);
    s11 = dot(s11, v, z);
    v = loadLast(a2, tail);
    s20 = dot(s20, v, x);
    s21 = dot(s21, v, z);
    v = loadLast(a3, tail);
    s30 = dot(s30, v, x);
    s31 = dot(s31, v, z);
  }
  const top = sums(s00, s01, s10, s11);
  const bottom = sums(s20, s21, s30, s31);
  if (columns == 2) {
    v128.store64_lane(y, top, 0);
    if (rows > 1) v128.store64_lane(y + stride, top, 1);
    if (rows > 2) v128.store64_lane(y + 2 * stride, bottom, 0);
    if (rows > 3) v128.store64_lane(y + 3 * stride, bottom, 1);
  } else {
    v128.store32_lane(y, top, 0);
    if (rows > 1) v128.store32_lane(y + stride, top, 2);
    if (rows > 2) v128.store32_lane(y + 2 * stride, bottom, 0);
    if (rows > 3) v128.store32_lane(y + 3 * stride, bottom, 2);
  }
}

function tile2x4(a0: usize, b0: usize, y: usize, columns: u32, k: usize, stride: usize): void {
  let a1 = a0 + k;
  let b1 = b0 + (columns > 1 ? k : 0);
  let b2 = b1 + (columns > 2 ? k : 0);
  let b3 = b2 + (columns > 3 ? k : 0);
  let s00 = i32x4.splat(0);
  let s01 = s00;
  let s02 = s00;
  let s03 = s00;
  let s10 = s00;
  let s11 = s00;
  let s12 = s00;
  let s13 = s00;
  for (const end = a0 + (k & -8); a0 < end; a0 += 8) {
    const v = v128.load8x8_s(a0);
    const w = v128.load8x8_s(a1);
    let x = v128.load8x8_s(b0);
    s00 = dot(s00, v, x);
    s10 = dot(s10, w, x);
    x = v128.load8x8_s(b1);
    s01 = dot(s01, v, x);
    s11 = dot(s11, w, x);
    x = v128.load8x8_s(b2);
    s02 = dot(s02, v, x);
    s12 = dot(s12, w, x);
    x = v128.load8x8_s(b3);
    s03 = dot(s03, v, x);
    s13 = dot(s13, w, x);
    a1 += 8;
    b0 += 8;
    b1 += 8;
    b2 += 8;
    b3 += 8;
  }
  const tail = <u32>k & 7;
  if (tail) {
    const v = loadLast(a0, tail);
    const w = loadLast(a1, tail);
    let x = loadLast(b0, tail);
    s00 = dot(s00, v, x);
    s10 = dot(s10, w, x);
    x = loadLast(b1, tail);
    s01 = dot(s01, v, x);
    s11 = dot(s11, w, x);
    x = loadLast(b2, tail);
    s02 = dot(s02, v, x);
    s12 = dot(s12, w, x);
    x = loadLast(b3, tail);
    s03 = dot(s03, v, x);
    s13 = dot(s13, w, x);
  }
  store4(y, sums(s00, s01, s02, s03), columns);
  store4(y + stride, sums(s10, s11, s12, s13), columns);
}

function tile1x4(a: usize, b0: usize, y: usize, columns: u32, k: usize): void {
  let b1 = b0 + (columns > 1 ? k : 0);
  let b2 = b1 + (columns > 2 ? k : 0);
  let b3 = b2 + (columns > 3 ? k : 0);
  let s0 = i32x4.splat(0);
  let s1 = s0;
  let s2 = s0;
  let s3 = s0;
  for (const end = a + (k & -8); a < end; a += 8) {
    const v = v128.load8x8_s(a);
    s0 = dot(s0, v, v128.load8x8_s(b0));
    s1 = dot(s1, v, v128.load8x8_s(b1));
    s2 = dot(s2, v, v128.load8x8_s(b2));
    s3 = dot(s3, v, v128.load8x8_s(b3));
    b0 += 8;
    b1 += 8;
    b2 += 8;
    b3 += 8;
  }
  const tail = <u32>k & 7;
  if (tail) {
    const v = loadLast(a, tail);
    s0 = dot(s0, v, loadLast(b0, tail));
    s1 = dot(s1, v, loadLast(b1, tail));
    s2 = dot(s2, v, loadLast(b2, tail));
    s3 = dot(s3, v, loadLast(b3, tail));
  }
  store4(y, sums(s0, s1, s2, s3), columns);
}

// @ts-expect-error: decorator
@inline
function dot(sum: v128, a: v128, b: v128): v128 {
  return i32x4.add(sum, i32x4.dot_i16x8_s(a, b));
}

/** Fewer than eight int8 as int16, the others 0. */
function loadLast(p: usize, count: u32): v128 {
  let bits: u64 = 0;
  if (count & 1) bits = load<u8>(p + (count & 6));
  if (count & 2) bits = (bits << 16) | load<u16>(p + (count & 4));
  if (count & 4) bits = (bits << 32) | load<u32>(p);
  return i16x8.extend_low_i8x16_s(i64x2.splat(bits));
}

/** The sum of the lanes of each. */
function sums(a: v128, b: v128, c: v128, d: v128): v128 {
  const ab = i32x4.add(i32x4.shuffle(a, b, 0, 4, 1, 5), i32x4.shuffle(a, b, 2, 6, 3, 7));
  const cd = i32x4.add(i32x4.shuffle(c, d, 0, 4, 1, 5), i32x4.shuffle(c, d, 2, 6, 3, 7));
  return i32x4.add(i64x2.shuffle(ab, cd, 0, 2), i64x2.shuffle(ab, cd, 1, 3));
}

/** The first `count` of four words. */
function store4(p: usize, v: v128, count: u32): void {
  if (count == 4) {
    v128.store(p, v);
    return;
  }
  v128.store32_lane(p, v, 0);
  if (count > 1) v128.store32_lane(p, v, 1, 4);
  if (count > 2) v128.store32_lane(p, v, 2, 8);
}

/** y[b, c, r] = x[b, r, c]. Unit: square of TRANSPOSE_TILE elements a side, those along a row innermost. */
export function transpose(op: usize, begin: u32, end: u32): void {
  const itemsize = load<u32>(op, Transpose.itemsize);
  if (itemsize == 1) transposeTiles<u8>(op, begin, end);
  else if (itemsize == 2) transposeTiles<u16>(op, begin, end);
  else if (itemsize == 4) transposeTiles<u32>(op, begin, end);
  else unreachable();
}

function transposeTiles<T>(op: usize, begin: u32, end: u32): void {
  const rows = load<u32>(op, Transpose.rows);
  const cols = load<u32>(op, Transpose.cols);
  const across = (cols + TRANSPOSE_TILE - 1) / TRANSPOSE_TILE;
  const down = (rows + TRANSPOSE_TILE - 1) / TRANSPOSE_TILE;
  const side: u32 = sizeof<T>() == 4 ? 4 : 8;
  for (let unit = begin; unit < end; unit++) {
    const first = (unit % across) * TRANSPOSE_TILE;
    const top = ((unit / across) % down) * TRANSPOSE_TILE;
    const matrix = (unit / across / down) * rows * cols;
    const bottom = min<u32>(top + TRANSPOSE_TILE, rows);
    const last = min<u32>(first + TRANSPOSE_TILE, cols);
    for (let c = first; c < last; c += side) {
      for (let r = top; r < bottom; r += side) {
        const x = load<usize>(op, Transpose.x) + (matrix + r * cols + c) * sizeof<T>();
        const y = load<usize>(op, Transpose.y) + (matrix + c * rows + r) * sizeof<T>();
        if (r + side <= bottom && c + side <= last) {
          transposeSquare<T>(x, cols * sizeof<T>(), y, rows * sizeof<T>());
          continue;
        }
        const height = min<u32>(side, bottom - r);
        const width = min<u32>(side, last - c);
        for (let i: u32 = 0; i < height; i++) {
          for (let j: u32 = 0; j < width; j++) {
            store<T>(y + (j * rows + i) * sizeof<T>(), load<T>(x + (i * cols + j) * sizeof<T>()));
          }
        }
      }
    }
  }
}

/** Four elements a side of 4 bytes, eight of 1 or 2; strides in bytes. */
function transposeSquare<T>(x: usize, strideX: usize, y: usize, strideY: usize): void {
  if (sizeof<T>() == 4) {
    const r0 = v128.load(x);
    const r1 = v128.load((x += strideX));
    const r2 = v128.load((x += strideX));
    const r3 = v128.load((x += strideX));
    const low01 = i32x4.shuffle(r0, r1, 0, 4, 1, 5);
    const low23 = i32x4.shuffle(r2, r3, 0, 4, 1, 5);
    const high01 = i32x4.shuffle(r0, r1, 2, 6, 3, 7);
    const high23 = i32x4.shuffle(r2, r3, 2, 6, 3, 7);
    v128.store(y, i64x2.shuffle(low01, low23, 0, 2));
    v128.store((y += strideY), i64x2.shuffle(low01, low23, 1, 3));
    v128.store((y += strideY), i64x2.shuffle(high01, high23, 0, 2));
    v128.store((y += strideY), i64x2.shuffle(high01, high23, 1, 3));
  } else if (sizeof<T>() == 2) {
    const half = strideX * 4;
    transposeHalf(x, strideX, y, strideY);
    transposeHalf(x + half, strideX, y + 8, strideY);
  } else {
    const r0 = v128.load64_zero(x);
    const r1 = v128.load64_zero((x += strideX));
    const r2 = v128.load64_zero((x += strideX));
    const r3 = v128.load64_zero((x += strideX));
    const r4 = v128.load64_zero((x += strideX));
    const r5 = v128.load64_zero((x += strideX));
    const r6 = v128.load64_zero((x += strideX));
    const r7 = v128.load64_zero((x += strideX));
    const r01 = i8x16.shuffle(r0, r1, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const r23 = i8x16.shuffle(r2, r3, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const r45 = i8x16.shuffle(r4, r5, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const r67 = i8x16.shuffle(r6, r7, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const low0 = i16x8.shuffle(r01, r23, 0, 8, 1, 9, 2, 10, 3, 11);
    const low4 = i16x8.shuffle(r45, r67, 0, 8, 1, 9, 2, 10, 3, 11);
    const high0 = i16x8.shuffle(r01, r23, 4, 12, 5, 13, 6, 14, 7, 15);
    const high4 = i16x8.shuffle(r45, r67, 4, 12, 5, 13, 6, 14, 7, 15);
    store64Pair(y, strideY, i32x4.shuffle(low0, low4, 0, 4, 1, 5));
    store64Pair(y + 2 * strideY, strideY, i32x4.shuffle(low0, low4, 2, 6, 3, 7));
    store64Pair(y + 4 * strideY, strideY, i32x4.shuffle(high0, high4, 0, 4, 1, 5));
    store64Pair(y + 6 * strideY, strideY, i32x4.shuffle(high0, high4, 2, 6, 3, 7));
  }
}

/** Four rows of eight elements of 2 bytes. */
function transposeHalf(x: usize, strideX: usize, y: usize, strideY: usize): void {
  const r0 = v128.load(x);
  const r1 = v128.load((x += strideX));
  const r2 = v128.load((x += strideX));
  const r3 = v128.load((x += strideX));
  const low01 = i16x8.shuffle(r0, r1, 0, 8, 1, 9, 2, 10, 3, 11);
  const low23 = i16x8.shuffle(r2, r3, 0, 8, 1, 9, 2, 10, 3, 11);
  const high01 = i16x8.shuffle(r0, r1, 4, 12, 5, 13, 6, 14, 7, 15);
  const high23 = i16x8.shuffle(r2, r3, 4, 12, 5, 13, 6, 14, 7, 15);
  store64Pair(y, strideY, i32x4.shuffle(low01, low23, 0, 4, 1, 5));
  store64Pair(y + 2 * strideY, strideY, i32x4.shuffle(low01, low23, 2, 6, 3, 7));
  store64Pair(y + 4 * strideY, strideY, i32x4.shuffle(high01, high23, 0, 4, 1, 5));
  store64Pair(y + 6 * strideY, strideY, i32x4.shuffle(high01, high23, 2, 6, 3, 7));
}

function store64Pair(y: usize, stride: usize, v: v128): void {
  v128.store64_lane(y, v, 0);
  v128.store64_lane(y + stride, v, 1);
}

/**
 * y[m, n] = fma((x[m, n] * rowStats[m]) * colStats[n], INT8_INVERSE, bias[n]), each step rounded once; with `columns` plus the
 * float32 sum over them, in their order, of a[m, c] * dtype((b[n, c] * colStats[n]) * f32(1 / 127)). Columns that a does not
 * have count as 0. Unit: tile, those along a row innermost.
 */
export function int8MmDequant(op: usize, begin: u32, end: u32): void {
  const dtype = load<u32>(op, D.dtype);
  if (dtype == F32) dequantizeTiles<f32>(op, begin, end);
  else if (dtype == F16) dequantizeTiles<f16>(op, begin, end);
  else if (dtype == BF16) dequantizeTiles<bf16>(op, begin, end);
  else unreachable();
}

/** Outlier columns that are unpacked together. */
const OUTLIERS: u32 = 64;
/** Scratch memory: a tile's sums over the outlier columns, unpacked columns of a (by row) and of b (by column). */
const OUTLIER_A: usize = DEQUANT_TILE * DEQUANT_TILE * 4;
const OUTLIER_B: usize = OUTLIER_A + DEQUANT_TILE * OUTLIERS * 4;
const HALVES: usize = OUTLIER_B + DEQUANT_TILE * OUTLIERS * 4;

function dequantizeTiles<T>(op: usize, begin: u32, end: u32): void {
  const m = load<u32>(op, D.m);
  const n = load<u32>(op, D.n);
  const across = (n + DEQUANT_TILE - 1) / DEQUANT_TILE;
  const found = load<usize>(op, D.columns) ? load<i32>(load<usize>(op, D.count)) : 0;
  const count = min<u32>(max<i32>(found, 0), load<u32>(op, D.k));
  for (let unit = begin; unit < end; unit++) {
    const column = (unit % across) * DEQUANT_TILE;
    const row = (unit / across) * DEQUANT_TILE;
    const rows = min<u32>(DEQUANT_TILE, m - row);
    const columns = min<u32>(DEQUANT_TILE, n - column);
    const bias = load<usize>(op, D.bias);
    const colStats = load<usize>(op, D.colStats) + column * 4;
    if (count) addOutliers<T>(op, row, rows, column, columns, count);
    for (let r: u32 = 0; r < rows; r++) {
      const at = (row + r) * n + column;
      dequantizeRow<T>(
        load<usize>(op, D.x) + at * 4,
        load<f32>(load<usize>(op, D.rowStats) + (row + r) * 4),
        colStats,
        bias ? bias + column * sizeof<T>() : 0,
        count ? scratch() + r * DEQUANT_TILE * 4 : 0,
        load<usize>(op, D.y) + at * sizeof<T>(),
        columns,
      );
    }
  }
}

function dequantizeRow<T>(
  x: usize,
  rowStat: f32,
  colStats: usize,
  bias: usize,
  added: usize,
  y: usize,
  columns: u32,
): void {
  const scale = f32x4.splat(rowStat);
  const whole = columns & -8;
  for (let i: u32 = 0; i < whole; i += 8) {
    const p = x + i * 4;
    let low = f32x4.mul(f32x4.mul(f32x4.convert_i32x4_s(v128.load(p)), scale), v128.load(colStats + i * 4));
    let high = f32x4.mul(f32x4.mul(f32x4.convert_i32x4_s(v128.load(p, 16)), scale), v128.load(colStats + i * 4, 16));
    if (bias) {
      low = multiplyAdd(low, load4<T>(bias + i * sizeof<T>()));
      high = multiplyAdd(high, load4<T>(bias + (i + 4) * sizeof<T>()));
    } else {
      low = multiply(low);
      high = multiply(high);
    }
    if (added) {
      low = f32x4.add(low, v128.load(added + i * 4));
      high = f32x4.add(high, v128.load(added + i * 4, 16));
    }
    store8<T>(y + i * sizeof<T>(), low, high);
  }
  for (let i = whole; i < columns; i++) {
    const product = f32x4.splat(<f32>load<i32>(x + i * 4) * rowStat * load<f32>(colStats + i * 4));
    const v = bias ? multiplyAdd(product, f32x4.splat(load1<T>(bias + i * sizeof<T>()))) : multiply(product);
    const z = f32x4.extract_lane(v, 0);
    store1<T>(y + i * sizeof<T>(), added ? z + load<f32>(added + i * 4) : z);
  }
}

/** x * INT8_INVERSE + 0 */
function multiply(x: v128): v128 {
  return v128.andnot(f32x4.mul(x, f32x4.splat(INT8_INVERSE)), f32x4.eq(x, f32x4.splat(0)));
}

/** x * INT8_INVERSE + y, rounded once. */
function multiplyAdd(x: v128, y: v128): v128 {
  const low = multiplyAdd2(f64x2.promote_low_f32x4(x), f64x2.promote_low_f32x4(y));
  const high = multiplyAdd2(
    f64x2.promote_low_f32x4(i64x2.shuffle(x, x, 1, 0)),
    f64x2.promote_low_f32x4(i64x2.shuffle(y, y, 1, 0)),
  );
  return i64x2.shuffle(f32x4.demote_f64x2_zero(low), f32x4.demote_f64x2_zero(high), 0, 2);
}

/**
 * In float64 the product is exact. A sum that is not takes the neighbour with an odd last bit on the other side of the exact
 * value, if its own is even: then it is no tie of float32 unless the exact value is one, and rounding it again rounds once.
 */
function multiplyAdd2(x: v128, y: v128): v128 {
  const product = f64x2.mul(x, f64x2.splat(<f64>INT8_INVERSE));
  const sum = f64x2.add(product, y);
  const part = f64x2.sub(sum, product);
  const error = f64x2.add(f64x2.sub(product, f64x2.sub(sum, part)), f64x2.sub(y, part));
  const inexact = f64x2.gt(f64x2.abs(error), f64x2.splat(0));
  const one = i64x2.splat(1);
  const even = v128.andnot(one, sum);
  // Away from zero where the error has the sum's sign, else towards it.
  const sign = i64x2.shr_u(v128.xor(sum, error), 63);
  const step = i64x2.sub(one, i64x2.add(sign, sign));
  return i64x2.add(sum, v128.and(v128.and(step, inexact), i64x2.sub(i64x2.splat(0), even)));
}

/** The tile's sums over the outlier columns, into scratch memory. */
function addOutliers<T>(op: usize, row: u32, rows: u32, column: u32, columns: u32, count: u32): void {
  const sums = scratch();
  const packedA = sums + OUTLIER_A;
  const packedB = sums + OUTLIER_B;
  const k = load<u32>(op, D.k);
  const a = load<usize>(op, D.a) + row * k * sizeof<T>();
  const b = load<usize>(op, D.b) + column * k;
  const colStats = load<usize>(op, D.colStats) + column * 4;
  memory.fill(sums, 0, rows * DEQUANT_TILE * 4);
  for (let from: u32 = 0; from < count; from += OUTLIERS) {
    const chunk = min<u32>(OUTLIERS, count - from);
    for (let j: u32 = 0; j < chunk; j++) {
      const c = load<u32>(load<usize>(op, D.columns) + (from + j) * 4);
      const w = packedB + j * DEQUANT_TILE * 4;
      if (c >= k) {
        for (let r: u32 = 0; r < rows; r++) store<f32>(packedA + (r * OUTLIERS + j) * 4, 0);
        memory.fill(w, 0, DEQUANT_TILE * 4);
        continue;
      }
      for (let r: u32 = 0; r < rows; r++) {
        store<f32>(packedA + (r * OUTLIERS + j) * 4, load1<T>(a + (r * k + c) * sizeof<T>()));
      }
      for (let i: u32 = 0; i < columns; i++) {
        store<f32>(w + i * 4, <f32>load<i8>(b + i * k + c) * load<f32>(colStats + i * 4) * INVERSE_127);
      }
      if (!isFloat<T>()) {
        for (let i: u32 = 0; i < columns; i += 8) {
          store8<T>(sums + HALVES, v128.load(w + i * 4), v128.load(w + i * 4, 16));
          v128.store(w + i * 4, load4<T>(sums + HALVES));
          v128.store(w + i * 4, load4<T>(sums + HALVES + 8), 16);
        }
      }
    }
    for (let r: u32 = 0; r < rows; r++) {
      for (let i: u32 = 0; i < columns; i += 16) {
        const s = sums + (r * DEQUANT_TILE + i) * 4;
        let s0 = v128.load(s);
        let s1 = v128.load(s, 16);
        let s2 = v128.load(s, 32);
        let s3 = v128.load(s, 48);
        let p = packedA + r * OUTLIERS * 4;
        let q = packedB + i * 4;
        for (const end = p + chunk * 4; p < end; p += 4) {
          const v = v128.load32_splat(p);
          s0 = f32x4.add(s0, f32x4.mul(v, v128.load(q)));
          s1 = f32x4.add(s1, f32x4.mul(v, v128.load(q, 16)));
          s2 = f32x4.add(s2, f32x4.mul(v, v128.load(q, 32)));
          s3 = f32x4.add(s3, f32x4.mul(v, v128.load(q, 48)));
          q += DEQUANT_TILE * 4;
        }
        v128.store(s, s0);
        v128.store(s, s1, 16);
        v128.store(s, s2, 32);
        v128.store(s, s3, 48);
      }
    }
  }
}
