/**
 * Dense products with float32 sums.
 *
 * The order of a sum depends on k alone: lane l of four takes the elements l, l + 4, l + 8 ...; it adds up those of each block
 * of k (`blockOf`), starting from 0, and adds the blocks' sums, from 0 again; at the end the lanes meet as (0 + 2) + (1 + 3).
 * Products are rounded (those of halves are exact).
 *
 * A unit is a panel of MATMUL_PANEL columns of y in a block of at most MATMUL_ROWS rows; adjacent panels are taken together. f32
 * operands that run along k are read in place; others are widened, and transposed where needed, chunk by chunk into the
 * thread's scratch memory. For few rows that would cost more than the product itself: there b is read in place in every form.
 */
import {
  BF16,
  F16,
  F32,
  MATMUL_PANEL,
  MATMUL_ROWS,
  MATMUL_WIDE,
  MATMUL_WIDEST,
  MATMUL_WIDTH,
} from "./generated/constants";
import { Matmul } from "./generated/operands";
import { absmaxBits, bf16, f16, INFINITY, isF16, isOn, load1, load4, Off, On, store1, store8 } from "./kernel";
import { scratch } from "./stream";

/** Elements of a chunk along k, and those that keep the rows of a chunk in different sets of the cache. */
const CHUNK: u32 = 256;
const GAP: u32 = 16;
const STEP: usize = (CHUNK + GAP) * 4;
/** The same for the rows of a where there are at most two and b is in place. */
const LONG: u32 = 2048;
const LONG_STEP: usize = (LONG + GAP) * 4;

/** Scratch memory: four lanes for every sum of a tile, then its chunks of a and of b. */
const SUMS: usize = MATMUL_ROWS * MATMUL_WIDTH * 16;
const PACKED_A: usize = STEP * MATMUL_ROWS;

/** 2^112: an f16 as `loadScaled4` reads it, times this, is its value. */
const F16_SCALE: f32 = 5.192296858534828e33;

/** y[b, m, n] = sum over k of A[b, m, k] * B[b, k, n] + bias[n]. Unit: tile, panels innermost. */
export function matmul(op: usize, begin: u32, end: u32): void {
  const dtype = load<u32>(op, Matmul.dtype);
  if (dtype == F32) multiply<f32>(op, begin, end);
  else if (dtype == F16) multiply<f16>(op, begin, end);
  else if (dtype == BF16) multiply<bf16>(op, begin, end);
  else unreachable();
}

function multiply<T>(op: usize, begin: u32, end: u32): void {
  const m = load<u32>(op, Matmul.m);
  const n = load<u32>(op, Matmul.n);
  const panels = (n + MATMUL_PANEL - 1) / MATMUL_PANEL;
  const blocks = (m + MATMUL_ROWS - 1) / MATMUL_ROWS;
  const height = ((m + blocks - 1) / blocks + 3) & -4;
  const transposeB = load<u32>(op, Matmul.transposeB) != 0;
  const few = m <= 2 && !transposeB;
  // Long pieces of b's rows, where there are sums enough for them.
  const width = transposeB || m > 16 ? MATMUL_WIDTH : few ? MATMUL_WIDEST : MATMUL_WIDE;
  for (let unit = begin; unit < end; ) {
    const panel = unit % panels;
    const count = min<u32>(min<u32>(end - unit, panels - panel), width / MATMUL_PANEL);
    const row = ((unit / panels) % blocks) * height;
    const column = panel * MATMUL_PANEL;
    const columns = min<u32>(count * MATMUL_PANEL, n - column);
    const batch = unit / panels / blocks;
    if (few) multiplyFew<T>(op, batch, column, columns);
    else multiplyTile<T>(op, batch, row, min<u32>(height, m - row), column, columns);
    unit += count;
  }
}

/** Elements that a lane adds up at a time, times four: rounding errors are least near 2 * sqrt(k). */
function blockOf(k: u32): u32 {
  let block: u32 = 16;
  while (block < CHUNK && block * block < 4 * k) block *= 2;
  return block;
}

/** Where A's row `row` of a batch begins. */
function rowOfA<T>(op: usize, batch: u32, row: u32): usize {
  const k = load<u32>(op, Matmul.k);
  const stride = load<u32>(op, Matmul.transposeA) ? 1 : k;
  return load<usize>(op, Matmul.a) + (batch * load<u32>(op, Matmul.m) * k + row * stride) * sizeof<T>();
}

/** Where B's column `column` of a batch begins. */
function columnOfB<T>(op: usize, batch: u32, column: u32): usize {
  const k = load<u32>(op, Matmul.k);
  const stride = load<u32>(op, Matmul.transposeB) ? k : 1;
  const matrix = load<u32>(op, Matmul.sharedB) ? 0 : batch;
  return load<usize>(op, Matmul.b) + (matrix * load<u32>(op, Matmul.n) * k + column * stride) * sizeof<T>();
}

/** Elements [from, from + count) of rows of A that begin at `a`, as f32. */
function packA<T>(op: usize, a: usize, rows: u32, from: u32, count: u32, to: usize, step: usize): void {
  const m = load<u32>(op, Matmul.m);
  if (load<u32>(op, Matmul.transposeA)) packColumns<T>(a + from * m * sizeof<T>(), m, to, step, rows, count);
  else packRows<T>(a + from * sizeof<T>(), load<u32>(op, Matmul.k), to, step, rows, count);
}

function multiplyTile<T>(op: usize, batch: u32, row: u32, rows: u32, column: u32, columns: u32): void {
  const n = load<u32>(op, Matmul.n);
  const k = load<u32>(op, Matmul.k);
  const transposeB = load<u32>(op, Matmul.transposeB) != 0;
  const a = rowOfA<T>(op, batch, row);
  const b = columnOfB<T>(op, batch, column);
  const block = blockOf(k);
  const sums = scratch();
  const packedA = sums + SUMS;
  const packedB = packedA + PACKED_A;
  memory.fill(sums, 0, ((rows + 3) & -4) * ((columns + 7) & -8) * 16);
  // In place only whole tiles and whole blocks: scratch memory may be read beyond what is packed.
  const inPlaceA = isFloat<T>() && !load<u32>(op, Matmul.transposeA) && (rows & 3) != 3;
  const inPlaceB = transposeB && (columns & 3) == 0 && (isFloat<T>() || rows <= 2);
  for (let from: u32 = 0; from < k; ) {
    const whole = (k - from) & -block;
    let count = min<u32>(k - from, CHUNK);
    if (whole && inPlaceB && !isFloat<T>()) {
      count = min<u32>(whole, LONG);
      packA<T>(op, a, rows, from, count, packedA, LONG_STEP);
      multiplyHalves<T>(packedA, rows, b + from * sizeof<T>(), k, columns, count, block, sums);
      from += count;
      continue;
    }
    if (whole && inPlaceA && inPlaceB) count = whole;
    else if (inPlaceA || inPlaceB) count = whole ? min<u32>(whole, CHUNK) : count;
    let chunkA = packedA;
    let stepA = STEP;
    if (whole && inPlaceA) {
      chunkA = a + from * sizeof<T>();
      stepA = k * sizeof<T>();
    } else packA<T>(op, a, rows, from, count, packedA, STEP);
    let chunkB = packedB;
    let stepB = STEP;
    if (whole && inPlaceB) {
      chunkB = b + from * sizeof<T>();
      stepB = k * sizeof<T>();
    } else if (transposeB) packRows<T>(b + from * sizeof<T>(), k, packedB, STEP, columns, count);
    else packColumns<T>(b + from * n * sizeof<T>(), n, packedB, STEP, columns, count);
    multiplyChunk(chunkA, stepA, rows, chunkB, stepB, columns, ((count + 3) & -4) * 4, block * 4, sums);
    from += count;
  }
  finishTile<T>(op, batch, row, rows, column, columns);
}

// Packing: rows of a chunk along k, `step` bytes apart, as f32, padded with 0 to a multiple of eight.

/** From rows that run along k, `stride` elements apart. */
function packRows<T>(x: usize, stride: u32, y: usize, step: usize, rows: u32, count: u32): void {
  const whole = count & -8;
  for (let r: u32 = 0; r < rows; r++) {
    let p = x + r * stride * sizeof<T>();
    let q = y + step * r;
    for (const end = q + whole * 4; q < end; q += 32) {
      v128.store(q, load4<T>(p));
      v128.store(q, load4<T>(p + 4 * sizeof<T>()), 16);
      p += 8 * sizeof<T>();
    }
    if (whole < count) {
      v128.store(q, i32x4.splat(0));
      v128.store(q, i32x4.splat(0), 16);
      for (let i = whole; i < count; i++) {
        store<f32>(q, load1<T>(p));
        p += sizeof<T>();
        q += 4;
      }
    }
  }
}

/** From columns: element i of row r lies at x[i * stride + r]. */
function packColumns<T>(x: usize, stride: u32, y: usize, step: usize, rows: u32, count: u32): void {
  const line: usize = stride * sizeof<T>();
  const wholeRows = rows & -4;
  for (let i: u32 = 0; i < count; i += 4) {
    const p0 = x + line * i;
    const q0 = y + i * 4;
    const missing = i + 4 - min<u32>(count, i + 4);
    const p1 = p0 + (missing < 3 ? line : 0);
    const p2 = p1 + (missing < 2 ? line : 0);
    const p3 = p2 + (missing < 1 ? line : 0);
    const there = i32x4.gt_s(i32x4.splat(4 - missing), i32x4(0, 1, 2, 3));
    for (let r: u32 = 0; r < wholeRows; r += 4) {
      const at = r * sizeof<T>();
      const v0 = load4<T>(p0 + at);
      const v1 = load4<T>(p1 + at);
      const v2 = load4<T>(p2 + at);
      const v3 = load4<T>(p3 + at);
      const low01 = i32x4.shuffle(v0, v1, 0, 4, 1, 5);
      const low23 = i32x4.shuffle(v2, v3, 0, 4, 1, 5);
      const high01 = i32x4.shuffle(v0, v1, 2, 6, 3, 7);
      const high23 = i32x4.shuffle(v2, v3, 2, 6, 3, 7);
      const q = q0 + step * r;
      v128.store(q, v128.and(there, i64x2.shuffle(low01, low23, 0, 2)));
      v128.store(q + step, v128.and(there, i64x2.shuffle(low01, low23, 1, 3)));
      v128.store(q + 2 * step, v128.and(there, i64x2.shuffle(high01, high23, 0, 2)));
      v128.store(q + 3 * step, v128.and(there, i64x2.shuffle(high01, high23, 1, 3)));
    }
    for (let r = wholeRows; r < rows; r++) {
      const at = r * sizeof<T>();
      const v = f32x4(load1<T>(p0 + at), load1<T>(p1 + at), load1<T>(p2 + at), load1<T>(p3 + at));
      v128.store(q0 + step * r, v128.and(there, v));
    }
  }
}

/**
 * Adds the products of a chunk of `bytes` to the sums. Their four lanes lie as the tiles have them: four rows times two columns, then
 * of two rows that are left over four columns times two rows, of one its columns.
 */
function multiplyChunk(
  a: usize,
  stepA: usize,
  rows: u32,
  b: usize,
  stepB: usize,
  columns: u32,
  bytes: usize,
  block: usize,
  sums: usize,
): void {
  // Three rows that are left over go as four.
  const tall = (rows + 1) & -4;
  const width = (columns + 7) & -8;
  for (let i: u32 = 0; i < tall; i += 4) {
    for (let j: u32 = 0; j < columns; j += 2) {
      tile4x2<f32, Off>(a + stepA * i, stepA, b + stepB * j, stepB, bytes, block, sums + (i * width + j * 4) * 16);
    }
  }
  if (tall >= rows) return;
  a += stepA * tall;
  sums += tall * width * 16;
  const pair = rows - tall == 2;
  for (let j: u32 = 0; j < columns; j += 4) {
    if (pair) tile4x2<f32, Off>(b + stepB * j, stepB, a, stepA, bytes, block, sums + j * 32);
    else tile4x1<f32, Off>(b + stepB * j, stepB, a, bytes, block, sums + j * 16);
  }
}

/**
 * `multiplyChunk` of one or two packed rows and columns of halves in place. Where those are finite f16, they are taken for the
 * float32 with their bits right after the sign, and the rows times what makes up for it: every product is the same.
 */
function multiplyHalves<T>(
  a: usize,
  rows: u32,
  b: usize,
  k: u32,
  columns: u32,
  count: u32,
  block: u32,
  sums: usize,
): void {
  const step: usize = k * sizeof<T>();
  const scaled = a + 2 * LONG_STEP;
  if (isF16<T>()) scaleRows(a, scaled, 2 * LONG_STEP);
  const bytes: usize = count * 4;
  for (let j: u32 = 0; j < columns; j += 4) {
    const p = b + step * j;
    if (rows == 2) {
      if (isF16<T>() && areFinite<T>(p, step, count)) {
        tile4x2<T, On>(p, step, scaled, LONG_STEP, bytes, block * 4, sums + j * 32);
      } else {
        tile4x2<T, Off>(p, step, a, LONG_STEP, bytes, block * 4, sums + j * 32);
      }
    } else if (!isF16<T>() || !tile4x1<T, On>(p, step, scaled, bytes, block * 4, sums + j * 16)) {
      tile4x1<T, Off>(p, step, a, bytes, block * 4, sums + j * 16);
    }
  }
}

/** y = x * F16_SCALE, whole vectors. */
function scaleRows(x: usize, y: usize, bytes: usize): void {
  for (const end = x + bytes; x < end; x += 16) {
    v128.store(y, f32x4.mul(v128.load(x), f32x4.splat(F16_SCALE)));
    y += 16;
  }
}

/** Of the first elements of four rows. */
function areFinite<T>(p: usize, step: usize, count: u32): bool {
  for (const end = p + 4 * step; p < end; p += step) if (absmaxBits<T>(p, count) >= INFINITY) return false;
  return true;
}

/** Four elements as f32; finite f16 with Scaled on divided by F16_SCALE. */
// @ts-expect-error: decorator
@inline
function loadFactors4<T, Scaled>(p: usize): v128 {
  if (!isOn<Scaled>()) return load4<T>(p);
  return v128.and(i32x4.shl(v128.load16x4_s(p), 13), i32x4.splat(0x8fffe000));
}

// Tiles: four rows of a times one or two of b, which are f32; `bytes` are those of b. All pointers would not fit the
// registers: rows are found from the first one.

function tile4x2<T, Scaled>(
  a: usize,
  stepA: usize,
  b: usize,
  stepB: usize,
  bytes: usize,
  block: usize,
  sums: usize,
): void {
  const end = b + bytes;
  do {
    const stop = min<usize>(b + block, end);
    let s00 = f32x4.splat(0);
    let s01 = s00;
    let s10 = s00;
    let s11 = s00;
    let s20 = s00;
    let s21 = s00;
    let s30 = s00;
    let s31 = s00;
    do {
      const x = v128.load(b);
      const y = v128.load(b + stepB);
      let v = loadFactors4<T, Scaled>(a);
      s00 = f32x4.add(s00, f32x4.mul(v, x));
      s01 = f32x4.add(s01, f32x4.mul(v, y));
      let row = a + stepA;
      v = loadFactors4<T, Scaled>(row);
      s10 = f32x4.add(s10, f32x4.mul(v, x));
      s11 = f32x4.add(s11, f32x4.mul(v, y));
      row += stepA;
      v = loadFactors4<T, Scaled>(row);
      s20 = f32x4.add(s20, f32x4.mul(v, x));
      s21 = f32x4.add(s21, f32x4.mul(v, y));
      row += stepA;
      v = loadFactors4<T, Scaled>(row);
      s30 = f32x4.add(s30, f32x4.mul(v, x));
      s31 = f32x4.add(s31, f32x4.mul(v, y));
      a += 4 * sizeof<T>();
      b += 16;
    } while (b < stop);
    v128.store(sums, f32x4.add(v128.load(sums), s00));
    v128.store(sums, f32x4.add(v128.load(sums, 16), s01), 16);
    v128.store(sums, f32x4.add(v128.load(sums, 32), s10), 32);
    v128.store(sums, f32x4.add(v128.load(sums, 48), s11), 48);
    v128.store(sums, f32x4.add(v128.load(sums, 64), s20), 64);
    v128.store(sums, f32x4.add(v128.load(sums, 80), s21), 80);
    v128.store(sums, f32x4.add(v128.load(sums, 96), s30), 96);
    v128.store(sums, f32x4.add(v128.load(sums, 112), s31), 112);
  } while (b < end);
}

/** With Scaled on, false and nothing is added where not all of a is finite. */
function tile4x1<T, Scaled>(a: usize, stepA: usize, b: usize, bytes: usize, block: usize, sums: usize): bool {
  const end = b + bytes;
  let t0 = v128.load(sums);
  let t1 = v128.load(sums, 16);
  let t2 = v128.load(sums, 32);
  let t3 = v128.load(sums, 48);
  let most = i32x4.splat(0);
  do {
    const stop = min<usize>(b + block, end);
    let s0 = f32x4.splat(0);
    let s1 = s0;
    let s2 = s0;
    let s3 = s0;
    do {
      const x = v128.load(b);
      let v = loadFactors4<T, Scaled>(a);
      s0 = f32x4.add(s0, f32x4.mul(v, x));
      if (isOn<Scaled>()) most = larger(most, v);
      let row = a + stepA;
      v = loadFactors4<T, Scaled>(row);
      s1 = f32x4.add(s1, f32x4.mul(v, x));
      if (isOn<Scaled>()) most = larger(most, v);
      row += stepA;
      v = loadFactors4<T, Scaled>(row);
      s2 = f32x4.add(s2, f32x4.mul(v, x));
      if (isOn<Scaled>()) most = larger(most, v);
      row += stepA;
      v = loadFactors4<T, Scaled>(row);
      s3 = f32x4.add(s3, f32x4.mul(v, x));
      if (isOn<Scaled>()) most = larger(most, v);
      a += 4 * sizeof<T>();
      b += 16;
    } while (b < stop);
    t0 = f32x4.add(t0, s0);
    t1 = f32x4.add(t1, s1);
    t2 = f32x4.add(t2, s2);
    t3 = f32x4.add(t3, s3);
  } while (b < end);
  if (isOn<Scaled>() && v128.any_true(i32x4.gt_u(most, i32x4.splat(0x7bff << 14)))) return false;
  v128.store(sums, t0);
  v128.store(sums, t1, 16);
  v128.store(sums, t2, 32);
  v128.store(sums, t3, 48);
  return true;
}

/** The larger of a magnitude's bits, times two, and those of x. */
// @ts-expect-error: decorator
@inline
function larger(most: v128, x: v128): v128 {
  return i32x4.max_u(most, i32x4.shl(x, 1));
}

/** Adds up the lanes and the bias, and stores the tile. */
function finishTile<T>(op: usize, batch: u32, row: u32, rows: u32, column: u32, columns: u32): void {
  const width = (columns + 7) & -8;
  const tall = (rows + 1) & -4;
  for (let r: u32 = 0; r < rows; r++) {
    let s = scratch();
    let pair: usize = 128;
    let single: usize = 16;
    if (r < tall) {
      s += ((r & -4) * width + (r & 3) * 2) * 16;
    } else if (rows - tall == 2) {
      s += (tall * width + r - tall) * 16;
      pair = 64;
      single = 32;
    } else {
      s += tall * width * 16;
      pair = 32;
    }
    for (let j: u32 = 0; j < columns; j += 8) {
      const low = sumLanes(s, s + single, s + pair, s + pair + single);
      s += 2 * pair;
      const high = sumLanes(s, s + single, s + pair, s + pair + single);
      s += 2 * pair;
      storeSums<T>(op, batch, row + r, column + j, low, high, columns - j);
    }
  }
}

function sumLanes(a: usize, b: usize, c: usize, d: usize): v128 {
  const ab = sumPairs(v128.load(a), v128.load(b));
  const cd = sumPairs(v128.load(c), v128.load(d));
  return f32x4.add(i64x2.shuffle(ab, cd, 0, 2), i64x2.shuffle(ab, cd, 1, 3));
}

/** a0 + a2, b0 + b2, a1 + a3, b1 + b3 */
function sumPairs(a: v128, b: v128): v128 {
  return f32x4.add(i32x4.shuffle(a, b, 0, 4, 1, 5), i32x4.shuffle(a, b, 2, 6, 3, 7));
}

/** Eight sums, of which the first `count` are stored. */
function storeSums<T>(op: usize, batch: u32, row: u32, column: u32, low: v128, high: v128, count: u32): void {
  const line = (batch * load<u32>(op, Matmul.m) + row) * load<u32>(op, Matmul.ldy);
  let y = load<usize>(op, Matmul.y) + (line + column) * sizeof<T>();
  let bias = load<usize>(op, Matmul.bias);
  if (bias) bias += column * sizeof<T>();
  if (count >= 8) {
    if (bias) {
      low = f32x4.add(low, load4<T>(bias));
      high = f32x4.add(high, load4<T>(bias + 4 * sizeof<T>()));
    }
    store8<T>(y, low, high);
    return;
  }
  for (let i: u32 = 0; i < count; i++) {
    const x = f32x4.extract_lane(low, 0);
    store1<T>(y, bias ? x + load1<T>(bias + i * sizeof<T>()) : x);
    low = i8x16.shuffle(low, high, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19);
    high = i32x4.shuffle(high, high, 1, 2, 3, 0);
    y += sizeof<T>();
  }
}

// At most two rows and a b of k x n: multiples of b's rows are added up, in vectors of four columns for each lane.

/** All rows of y at once. Scratch memory: the sums by row, four columns and lane; those of a block likewise; the rows of a. */
function multiplyFew<T>(op: usize, batch: u32, column: u32, columns: u32): void {
  const m = load<u32>(op, Matmul.m);
  const k = load<u32>(op, Matmul.k);
  const line: usize = load<u32>(op, Matmul.n) * sizeof<T>();
  const a = rowOfA<T>(op, batch, 0);
  let b = columnOfB<T>(op, batch, column);
  const width = (columns + 7) & -8;
  const bytes: usize = m * width * 16;
  const sums = scratch();
  const blockSums = sums + bytes;
  const packedA = sums + SUMS;
  const block = blockOf(k);
  memory.fill(sums, 0, 2 * bytes);
  for (let from: u32 = 0; from < k; from += CHUNK) {
    const count = min<u32>(CHUNK, k - from);
    packA<T>(op, a, m, from, count, packedA, STEP);
    if (isF16<T>()) scaleRows(packedA, packedA + 2 * STEP, 2 * STEP);
    for (let i: u32 = 0; i < count; ) {
      for (const stop = min<u32>(i + block, count); i < stop; i += 4) {
        const there = min<u32>(4, stop - i);
        const scaled = isF16<T>() && there == 4 && areFinite<T>(b, line, columns);
        for (let r: u32 = 0; r < m; r++) {
          const s = blockSums + r * width * 16;
          const factors = packedA + STEP * r + i * 4;
          if (scaled) addRows<T, On>(b, line, columns, factors + 2 * STEP, s);
          else if (there == 4) addRows<T, Off>(b, line, columns, factors, s);
          else for (let l: u32 = 0; l < there; l++) addRow<T>(b + line * l, columns, factors + l * 4, s + l * 16, 1);
        }
        b += line * there;
      }
      for (let s = sums; s < blockSums; s += 16) {
        v128.store(s, f32x4.add(v128.load(s), v128.load(s + bytes)));
        v128.store(s + bytes, i32x4.splat(0));
      }
    }
  }
  for (let r: u32 = 0; r < m; r++) {
    let s = sums + r * width * 16;
    for (let j: u32 = 0; j < columns; j += 8) {
      storeSums<T>(op, batch, r, column + j, sumOfLanes(s), sumOfLanes(s + 64), columns - j);
      s += 128;
    }
  }
}

function sumOfLanes(s: usize): v128 {
  return f32x4.add(
    f32x4.add(v128.load(s), v128.load(s, 32)),
    f32x4.add(v128.load(s, 16), v128.load(s, 48)),
  );
}

/** Four rows of b, each into its lane. */
function addRows<T, Scaled>(b: usize, line: usize, columns: u32, factors: usize, s: usize): void {
  const f0 = v128.load32_splat(factors);
  const f1 = v128.load32_splat(factors, 4);
  const f2 = v128.load32_splat(factors, 8);
  const f3 = v128.load32_splat(factors, 12);
  const whole = columns & -4;
  let p = b;
  for (const end = b + whole * sizeof<T>(); p < end; p += 4 * sizeof<T>()) {
    let q = p;
    v128.store(s, f32x4.add(v128.load(s), f32x4.mul(f0, loadFactors4<T, Scaled>(q))));
    q += line;
    v128.store(s, f32x4.add(v128.load(s, 16), f32x4.mul(f1, loadFactors4<T, Scaled>(q))), 16);
    q += line;
    v128.store(s, f32x4.add(v128.load(s, 32), f32x4.mul(f2, loadFactors4<T, Scaled>(q))), 32);
    q += line;
    v128.store(s, f32x4.add(v128.load(s, 48), f32x4.mul(f3, loadFactors4<T, Scaled>(q))), 48);
    s += 64;
  }
  for (let l: u32 = 0; l < 4 && whole < columns; l++) {
    addRow<T>(p + line * l, columns - whole, factors + l * 4, s + l * 16, isOn<Scaled>() ? 1 / F16_SCALE : 1);
  }
}

/** One row of b into its lane, its factor times `scale`. */
function addRow<T>(b: usize, columns: u32, factor: usize, s: usize, scale: f32): void {
  const f = load<f32>(factor) * scale;
  for (let j: u32 = 0; j < columns; j++) {
    const at = s + (j >> 2) * 64 + (j & 3) * 4;
    store<f32>(at, load<f32>(at) + f * load1<T>(b + j * sizeof<T>()));
  }
}
