/**
 * Products with 4-bit weights in integers: activations are rounded to int8 per ACTIVATION_BLOCK columns of a row, codes are 16-bit
 * integers. Sums over a block of columns are exact; with s its scale and T = (f32(sum) * s) * absmax in float32, the blocks i, i + 4,
 * i + 8 ... are added in order to U[i], and
 *
 *     y = ((U[0] + U[1]) + (U[2] + U[3])) * unit + bias
 *
 * so a result depends neither on the order within a block nor on how the work is split. Where K is no multiple of 32, a block of
 * columns may have codes of two blocks of the weight: of each DEPTH columns first come the sums with the first, then those with the
 * second.
 */
import {
  ACTIVATION_BLOCK,
  BF16,
  F16,
  F32,
  FP4_INTEGERS_HIGH,
  FP4_INTEGERS_LOW,
  FP4_INTEGERS_UNIT,
  INT8_TINY,
  NF4,
  NF4_INTEGERS_HIGH,
  NF4_INTEGERS_LOW,
  NF4_INTEGERS_UNIT,
  PRODUCT_COLUMNS,
  PRODUCT_ROWS,
} from "./generated/constants";
import { Matmul4bitFast as P, QuantizeActivations as Q } from "./generated/operands";
import { absmaxBits, bf16, f16, INFINITY, load1, load4, NAN, store1, store8 } from "./kernel";
import { alignCodes, highBytes, highDwords, highNibbles, lowBytes, lowDwords, lowNibbles } from "./nibbles";
import { scratch } from "./stream";

// Activations. r = 127 / absmax, q = rint(x * r), scale = absmax / 127, each rounded once. The scale of a block that is not finite
// is NaN, and so are the products with it.

/** Unit: row. */
export function quantizeActivations(op: usize, begin: u32, end: u32): void {
  const dtype = load<u32>(op, Q.dtype);
  if (dtype == F32) quantizeRows<f32>(op, begin, end);
  else if (dtype == F16) quantizeRows<f16>(op, begin, end);
  else if (dtype == BF16) quantizeRows<bf16>(op, begin, end);
  else unreachable();
}

function quantizeRows<T>(op: usize, begin: u32, end: u32): void {
  const cols = load<u32>(op, Q.cols);
  const blocks = (cols + ACTIVATION_BLOCK - 1) / ACTIVATION_BLOCK;
  for (let row = begin; row < end; row++) {
    const x = load<usize>(op, Q.x) + row * cols * sizeof<T>();
    const q = load<usize>(op, Q.q) + row * blocks * ACTIVATION_BLOCK;
    const scale = load<usize>(op, Q.scale) + row * blocks * 4;
    for (let block: u32 = 0; block < blocks; block++) {
      const i = block * ACTIVATION_BLOCK;
      quantizeBlock<T>(x + i * sizeof<T>(), q + i, min(ACTIVATION_BLOCK, cols - i), scale + block * 4);
    }
  }
}

function quantizeBlock<T>(x: usize, q: usize, count: u32, scale: usize): void {
  const bits = absmaxBits<T>(x, count);
  const absmax = reinterpret<f32>(bits);
  if (bits == 0 || bits >= INFINITY) {
    store<u32>(scale, bits == 0 ? 0 : NAN);
    memory.fill(q, 0, ACTIVATION_BLOCK);
    return;
  }
  store<f32>(scale, absmax / 127);
  // 127 / absmax must not overflow.
  const lift: f32 = absmax < INT8_TINY ? 18446744073709551616.0 : 1;
  const r: f32 = 127 / (absmax * lift);
  let i: u32 = 0;
  if (count == ACTIVATION_BLOCK) {
    const up = f32x4.splat(lift);
    const factor = f32x4.splat(r);
    for (; i < ACTIVATION_BLOCK; i += 16) {
      const p = x + i * sizeof<T>();
      const a = i16x8.narrow_i32x4_s(rounded(load4<T>(p), up, factor), rounded(load4<T>(p + 4 * sizeof<T>()), up, factor));
      const p8 = p + 8 * sizeof<T>();
      const b = i16x8.narrow_i32x4_s(rounded(load4<T>(p8), up, factor), rounded(load4<T>(p8 + 4 * sizeof<T>()), up, factor));
      v128.store(q + i, i8x16.narrow_i16x8_s(a, b));
    }
    return;
  }
  for (; i < count; i++) store<i8>(q + i, <i8>nearest(load1<T>(x + i * sizeof<T>()) * lift * r));
  memory.fill(q + count, 0, ACTIVATION_BLOCK - count);
}

/** x * up * factor to integers, nearest even: the sum's last bit is worth 1. */
// @ts-expect-error: decorator
@inline
function rounded(x: v128, up: v128, factor: v128): v128 {
  const magic = f32x4.splat(12582912);
  return i32x4.sub(f32x4.add(f32x4.mul(f32x4.mul(x, up), factor), magic), magic);
}

// Products. A group is a block of the activations: 32 columns, as 16-bit integers, 0 2 .. 30 before 1 3 .. 31.

const GROUP: u32 = ACTIVATION_BLOCK;
/** Columns decoded at once. */
const DEPTH: u32 = 512;
const GROUPS: u32 = DEPTH / GROUP;
/** Columns of the output that a step works on, and the bytes of their codes in a group: 16 pairs of each. */
const WIDTH: u32 = 8;
const GROUP_BYTES: u32 = 16 * WIDTH * 4;
/** Bytes from one row of activations to the next: not a power of two, so that rows do not compete for cache lines. */
const STRIDE: u32 = DEPTH * 2 + 64;
/** So few rows of activations are multiplied one by one. */
const VECTOR_ROWS: u32 = 3;
/** Activations of a single row that are brought into order at once. */
const VECTOR_DEPTH: u32 = 16384;

/** Bytes of a tile's sums. */
const SUMS: u32 = PRODUCT_ROWS * PRODUCT_COLUMNS * 4;

// Offsets in scratch memory.
const A: usize = 0;
const A_SCALES: usize = A + PRODUCT_ROWS * STRIDE;
const W: usize = A_SCALES + PRODUCT_ROWS * GROUPS * 4;
const W_SCALES: usize = W + PRODUCT_COLUMNS * DEPTH * 2;
const TOTALS: usize = W_SCALES + PRODUCT_COLUMNS * GROUPS * 4;
const WORK: usize = TOTALS + 4 * SUMS;

const VECTOR_A: usize = 0;
const VECTOR_SCALES: usize = VECTOR_A + VECTOR_DEPTH * 2;
const VECTOR_SUMS: usize = VECTOR_SCALES + (VECTOR_DEPTH / GROUP) * 4;
const VECTOR_TOTALS: usize = VECTOR_SUMS + (VECTOR_DEPTH / GROUP) * 16;

/** y = a W^T + bias. Unit: PRODUCT_COLUMNS outputs of a block of at most PRODUCT_ROWS rows. */
export function matmul4bitFast(op: usize, begin: u32, end: u32): void {
  const dtype = load<u32>(op, P.dtype);
  if (dtype == F32) product<f32>(op, begin, end);
  else if (dtype == F16) product<f16>(op, begin, end);
  else if (dtype == BF16) product<bf16>(op, begin, end);
  else unreachable();
}

function product<T>(op: usize, begin: u32, end: u32): void {
  const m = load<u32>(op, P.m);
  const n = load<u32>(op, P.n);
  if (m <= VECTOR_ROWS && load<u32>(op, P.k) % load<u32>(op, P.blocksize) == 0) {
    const from = begin * PRODUCT_COLUMNS;
    const to = min(n, end * PRODUCT_COLUMNS);
    for (let row: u32 = 0; row < m; row++) {
      vector(op, row, from, to);
      finishRow<T>(op, row, from, to - from, scratch() + VECTOR_TOTALS, 4, 16);
    }
    return;
  }
  const tiles = (n + PRODUCT_COLUMNS - 1) / PRODUCT_COLUMNS;
  const blocks = (m + PRODUCT_ROWS - 1) / PRODUCT_ROWS;
  const rows = ((m + blocks - 1) / blocks + 3) & -4;
  for (let unit = begin; unit < end; unit++) {
    const row = (unit / tiles) * rows;
    const column = (unit % tiles) * PRODUCT_COLUMNS;
    const count = min(rows, m - row);
    const columns = min(PRODUCT_COLUMNS, n - column);
    tile(op, row, count, column, columns);
    let totals = scratch() + TOTALS;
    for (let i: u32 = 0; i < count; i++) {
      finishRow<T>(op, row + i, column, columns, totals, SUMS, 4);
      totals += PRODUCT_COLUMNS * 4;
    }
  }
}

/** U[i] of column j is at totals + i * nextU + j * nextColumn. */
// @ts-expect-error: decorator
@inline
function finishRow<T>(
  op: usize,
  row: u32,
  column: u32,
  columns: u32,
  totals: usize,
  nextU: u32,
  nextColumn: u32,
): void {
  const unit = load<u32>(op, P.quantType) == NF4 ? NF4_INTEGERS_UNIT : FP4_INTEGERS_UNIT;
  const bias = load<usize>(op, P.bias);
  const y = load<usize>(op, P.y) + (row * load<u32>(op, P.n) + column) * sizeof<T>();
  const whole = columns & -8;
  for (let j: u32 = 0; j < whole; j += 8) {
    const p = totals + j * nextColumn;
    let low = f32x4.mul(fourTotals(p, nextU), f32x4.splat(unit));
    let high = f32x4.mul(fourTotals(p + 4 * nextColumn, nextU), f32x4.splat(unit));
    if (bias) {
      low = f32x4.add(low, load4<T>(bias + (column + j) * sizeof<T>()));
      high = f32x4.add(high, load4<T>(bias + (column + j + 4) * sizeof<T>()));
    }
    store8<T>(y + j * sizeof<T>(), low, high);
  }
  for (let j = whole; j < columns; j++) {
    const p = totals + j * nextColumn;
    let sum = (load<f32>(p) + load<f32>(p + nextU) + (load<f32>(p + 2 * nextU) + load<f32>(p + 3 * nextU))) * unit;
    if (bias) sum += load1<T>(bias + (column + j) * sizeof<T>());
    store1<T>(y + j * sizeof<T>(), sum);
  }
}

/** (U[0] + U[1]) + (U[2] + U[3]) of four columns, whose U lie together where `nextU` is 4, and else apart. */
// @ts-expect-error: decorator
@inline
function fourTotals(p: usize, nextU: u32): v128 {
  const a = v128.load(p);
  if (nextU != 4) {
    return f32x4.add(
      f32x4.add(a, v128.load(p + nextU)),
      f32x4.add(v128.load(p + 2 * nextU), v128.load(p + 3 * nextU)),
    );
  }
  const b = v128.load(p, 16);
  const c = v128.load(p, 32);
  const d = v128.load(p, 48);
  const lowAB = lowDwords(a, b);
  const lowCD = lowDwords(c, d);
  const highAB = highDwords(a, b);
  const highCD = highDwords(c, d);
  return f32x4.add(
    f32x4.add(i64x2.shuffle(lowAB, lowCD, 0, 2), i64x2.shuffle(lowAB, lowCD, 1, 3)),
    f32x4.add(i64x2.shuffle(highAB, highCD, 0, 2), i64x2.shuffle(highAB, highCD, 1, 3)),
  );
}

/** int8 of whole groups to 16 bits, in the groups' order. */
function widen(q: usize, to: usize, count: u32): void {
  for (const end = q + count; q < end; q += 32) {
    const a = v128.load(q);
    const b = v128.load(q, 16);
    v128.store(to, i16x8.shr_s(i16x8.shl(a, 8), 8));
    v128.store(to, i16x8.shr_s(i16x8.shl(b, 8), 8), 16);
    v128.store(to, i16x8.shr_s(a, 8), 32);
    v128.store(to, i16x8.shr_s(b, 8), 48);
    to += 64;
  }
}

function lowTable(quantType: u32): v128 {
  return quantType == NF4 ? NF4_INTEGERS_LOW : FP4_INTEGERS_LOW;
}

function highTable(quantType: u32): v128 {
  return quantType == NF4 ? NF4_INTEGERS_HIGH : FP4_INTEGERS_HIGH;
}

// Few rows of activations, one by one, and weights whose rows begin with a block.

/** Leaves the four U of each of these rows of the weight in scratch memory. */
function vector(op: usize, activations: u32, from: u32, to: u32): void {
  const k = load<u32>(op, P.k);
  const blocksize = load<u32>(op, P.blocksize);
  const quantType = load<u32>(op, P.quantType);
  const packed = load<usize>(op, P.packed);
  const absmax = load<usize>(op, P.absmax);
  const base = scratch();
  const totals = base + VECTOR_TOTALS;
  memory.fill(totals, 0, (to - from) * 16);
  for (let begin: u32 = 0; begin < k; begin += VECTOR_DEPTH) {
    const count = min(VECTOR_DEPTH, k - begin);
    const at = activations * k + begin;
    widen(load<usize>(op, P.q) + at, base + VECTOR_A, count);
    memory.copy(base + VECTOR_SCALES, load<usize>(op, P.scale) + (at / GROUP) * 4, (count / GROUP) * 4);
    for (let row = from; row < to; row++) {
      const first = <u64>row * k + begin;
      const codes = packed + <usize>(first >> 1);
      const factors = absmax + (<usize>(first / blocksize) << 2);
      dotGroups(base + VECTOR_A, codes, count / GROUP, quantType, base + VECTOR_SUMS);
      addGroups(base + VECTOR_SUMS, count / GROUP, base + VECTOR_SCALES, factors, blocksize, totals + (row - from) * 16);
    }
  }
}

/** Sums of the products of groups, in four lanes each. */
function dotGroups(a: usize, codes: usize, groups: u32, quantType: u32, to: usize): void {
  const low = lowTable(quantType);
  const high = highTable(quantType);
  const end = a + groups * 64;
  do {
    v128.store(to, dotGroup(a, v128.load(codes), low, high));
    codes += 16;
    a += 64;
    to += 16;
  } while (a < end);
}

/** Adds groups, with their scales, to the four U. Blocks are whole, and the first group begins one. */
function addGroups(sums: usize, groups: u32, scales: usize, absmax: usize, blocksize: u32, totals: usize): void {
  let total = v128.load(totals);
  const end = sums + (groups & -4) * 16;
  let left = blocksize;
  for (; sums < end; sums += 64) {
    let factors: v128;
    if (blocksize == 64) {
      factors = v128.load64_zero(absmax);
      factors = i32x4.shuffle(factors, factors, 0, 0, 1, 1);
      absmax += 8;
    } else if (blocksize == 32) {
      factors = v128.load(absmax);
      absmax += 16;
    } else {
      factors = v128.load32_splat(absmax);
      left -= 4 * GROUP;
      if (left == 0) {
        left = blocksize;
        absmax += 4;
      }
    }
    const scaled = f32x4.mul(f32x4.convert_i32x4_s(sumOfLanes(sums)), v128.load(scales));
    total = f32x4.add(total, f32x4.mul(scaled, factors));
    scales += 16;
  }
  v128.store(totals, total);
  // The last one to three are of blocks that are not longer than 64.
  for (let i: u32 = 0; i < (groups & 3); i++) {
    const v = v128.load(sums + i * 16);
    const pairs = i32x4.add(v, i32x4.shuffle(v, v, 1, 0, 3, 2));
    const sum = i32x4.extract_lane(i32x4.add(pairs, i32x4.shuffle(pairs, pairs, 2, 3, 0, 1)), 0);
    const factor = load<f32>(absmax + ((i * GROUP) / blocksize) * 4);
    const u = totals + i * 4;
    store<f32>(u, load<f32>(u) + <f32>sum * load<f32>(scales + i * 4) * factor);
  }
}

/** Of four groups. */
// @ts-expect-error: decorator
@inline
function sumOfLanes(p: usize): v128 {
  const s0 = v128.load(p);
  const s1 = v128.load(p, 16);
  const s2 = v128.load(p, 32);
  const s3 = v128.load(p, 48);
  const t0 = i32x4.add(lowDwords(s0, s1), highDwords(s0, s1));
  const t1 = i32x4.add(lowDwords(s2, s3), highDwords(s2, s3));
  return i32x4.add(i64x2.shuffle(t0, t1, 0, 2), i64x2.shuffle(t0, t1, 1, 3));
}

/** The products of a group, in four lanes. */
// @ts-expect-error: decorator
@inline
function dotGroup(a: usize, bytes: v128, low: v128, high: v128): v128 {
  const even = highNibbles(bytes);
  const odd = lowNibbles(bytes);
  const evenLow = i8x16.swizzle(low, even);
  const evenHigh = i8x16.swizzle(high, even);
  const oddLow = i8x16.swizzle(low, odd);
  const oddHigh = i8x16.swizzle(high, odd);
  let sum = i32x4.dot_i16x8_s(v128.load(a), lowBytes(evenLow, evenHigh));
  sum = i32x4.add(sum, i32x4.dot_i16x8_s(v128.load(a, 16), highBytes(evenLow, evenHigh)));
  sum = i32x4.add(sum, i32x4.dot_i16x8_s(v128.load(a, 32), lowBytes(oddLow, oddHigh)));
  return i32x4.add(sum, i32x4.dot_i16x8_s(v128.load(a, 48), highBytes(oddLow, oddHigh)));
}

// Several rows: DEPTH columns of the weight are decoded, in pairs of columns, for WIDTH rows of it side by side; all rows use them.

function tile(op: usize, row: u32, rows: u32, column: u32, columns: u32): void {
  const k = load<u32>(op, P.k);
  const padded = (k + GROUP - 1) & -GROUP;
  const base = scratch();
  memory.fill(base + TOTALS, 0, 4 * SUMS);
  for (let begin: u32 = 0; begin < k; begin += DEPTH) {
    const count = min(DEPTH, k - begin);
    const groups = (count + GROUP - 1) / GROUP;
    for (let i: u32 = 0; i < rows; i++) {
      const at = (row + i) * padded + begin;
      widen(load<usize>(op, P.q) + at, base + A + i * STRIDE, groups * GROUP);
      memory.copy(base + A_SCALES + i * GROUPS * 4, load<usize>(op, P.scale) + (at / GROUP) * 4, groups * 4);
    }
    for (let second: u32 = 0; second < (k % GROUP == 0 ? <u32>1 : <u32>2); second++) {
      for (let j: u32 = 0; j < columns; j += 4) decodeFour(op, base, column, columns, j, begin, count, second);
      multiply(base, rows, columns, groups);
    }
  }
}

/** Rows j to j + 3 of the panel. Beyond the last of the weight there is the last once more. */
function decodeFour(
  op: usize,
  base: usize,
  column: u32,
  columns: u32,
  j: u32,
  begin: u32,
  count: u32,
  second: u32,
): void {
  const k = load<u32>(op, P.k);
  const blocksize = load<u32>(op, P.blocksize);
  const packed = load<usize>(op, P.packed);
  const absmax = load<usize>(op, P.absmax);
  const low = lowTable(load<u32>(op, P.quantType));
  const high = highTable(load<u32>(op, P.quantType));
  const aligned = k % GROUP == 0;
  const groups = (count + GROUP - 1) / GROUP;
  const work = base + WORK;
  const scales = base + W_SCALES + (j / WIDTH) * (GROUPS * WIDTH * 4) + (j % WIDTH) * 4;
  // Of each group: how many of its columns are the first block's.
  const splits = work + 4 * (DEPTH / 2);
  for (let r: u32 = 0; r < 4; r++) {
    const first = <u64>(column + min(j + r, columns - 1)) * k + begin;
    if (!aligned) alignCodes(packed + <usize>(first >> 1), work + r * (DEPTH / 2), <u32>first & 1, count);
    let scale = absmax + (<usize>(first / blocksize) << 2);
    let left = blocksize - <u32>(first % blocksize);
    for (let g: u32 = 0; g < groups; g++) {
      const columnsLeft = min(GROUP, count - g * GROUP);
      const split = min(left, columnsLeft);
      store<u16>(splits + (r * GROUPS + g) * 2, <u16>split);
      const to = scales + (g * WIDTH + r) * 4;
      if (!second) store<u32>(to, load<u32>(scale));
      else store<u32>(to, split < columnsLeft ? load<u32>(scale + 4) : 0);
      if (left <= columnsLeft) {
        scale += 4;
        left += blocksize;
      }
      left -= columnsLeft;
    }
  }
  const first = <u64>(column + min(j, columns - 1)) * k + begin;
  let p0 = work;
  let p1 = work + DEPTH / 2;
  let p2 = work + 2 * (DEPTH / 2);
  let p3 = work + 3 * (DEPTH / 2);
  if (aligned) {
    const rest = columns - 1 - j;
    p0 = packed + <usize>(first >> 1);
    p1 = p0 + min(rest, 1) * (k >> 1);
    p2 = p0 + min(rest, 2) * (k >> 1);
    p3 = p0 + min(rest, 3) * (k >> 1);
  }
  let y = base + W + (j / WIDTH) * (GROUPS * GROUP_BYTES) + (j % WIDTH) * 4;
  for (let g: u32 = 0; g < groups; g++) {
    const b0 = v128.load(p0 + g * 16);
    const b1 = v128.load(p1 + g * 16);
    const b2 = v128.load(p2 + g * 16);
    const b3 = v128.load(p3 + g * 16);
    eightPairs(y, highNibbles(b0), highNibbles(b1), highNibbles(b2), highNibbles(b3), low, high);
    eightPairs(y + 8 * WIDTH * 4, lowNibbles(b0), lowNibbles(b1), lowNibbles(b2), lowNibbles(b3), low, high);
    if (!aligned) {
      for (let r: u32 = 0; r < 4; r++) keepOneBlock(y + r * 4, load<u16>(splits + (r * GROUPS + g) * 2), second);
    }
    y += GROUP_BYTES;
  }
}

/** 16 codes of four rows each: four rows side by side, eight pairs one after the other. */
// @ts-expect-error: decorator
@inline
function eightPairs(y: usize, c0: v128, c1: v128, c2: v128, c3: v128, low: v128, high: v128): void {
  const l0 = i8x16.swizzle(low, c0);
  const h0 = i8x16.swizzle(high, c0);
  const l1 = i8x16.swizzle(low, c1);
  const h1 = i8x16.swizzle(high, c1);
  const l2 = i8x16.swizzle(low, c2);
  const h2 = i8x16.swizzle(high, c2);
  const l3 = i8x16.swizzle(low, c3);
  const h3 = i8x16.swizzle(high, c3);
  fourPairs(y, lowBytes(l0, h0), lowBytes(l1, h1), lowBytes(l2, h2), lowBytes(l3, h3));
  fourPairs(y + 4 * WIDTH * 4, highBytes(l0, h0), highBytes(l1, h1), highBytes(l2, h2), highBytes(l3, h3));
}

// @ts-expect-error: decorator
@inline
function fourPairs(y: usize, r0: v128, r1: v128, r2: v128, r3: v128): void {
  const low01 = lowDwords(r0, r1);
  const low23 = lowDwords(r2, r3);
  const high01 = highDwords(r0, r1);
  const high23 = highDwords(r2, r3);
  v128.store(y, i64x2.shuffle(low01, low23, 0, 2));
  v128.store(y, i64x2.shuffle(low01, low23, 1, 3), WIDTH * 4);
  v128.store(y, i64x2.shuffle(high01, high23, 0, 2), 2 * WIDTH * 4);
  v128.store(y, i64x2.shuffle(high01, high23, 1, 3), 3 * WIDTH * 4);
}

/** Clears what is not of the first block (of the second: `second`) in one row's group. */
function keepOneBlock(y: usize, split: u32, second: u32): void {
  if (split == GROUP && !second) return;
  for (let i: u32 = 0; i < GROUP; i++) {
    // The order of a group, as in `widen`.
    const slot = ((i & 1) << 4) | (i >> 1);
    if ((i >= split ? 1 : 0) != second) store<i16>(y + (slot >> 1) * (WIDTH * 4) + (slot & 1) * 2, 0);
  }
}

function multiply(base: usize, rows: u32, columns: u32, groups: u32): void {
  let i: u32 = 0;
  for (; i + 4 <= rows; i += 4) {
    const a = base + A + i * STRIDE;
    const scales = base + A_SCALES + i * GROUPS * 4;
    const totals = base + TOTALS + i * PRODUCT_COLUMNS * 4;
    for (let j: u32 = 0; j < columns; j += WIDTH) {
      const panel = j / WIDTH;
      fourByEight(
        a,
        base + W + panel * (GROUPS * GROUP_BYTES),
        groups,
        scales,
        base + W_SCALES + panel * (GROUPS * WIDTH * 4),
        totals + j * 4,
      );
    }
  }
  for (; i < rows; i++) {
    const a = base + A + i * STRIDE;
    const scales = base + A_SCALES + i * GROUPS * 4;
    const totals = base + TOTALS + i * PRODUCT_COLUMNS * 4;
    for (let j: u32 = 0; j < columns; j += WIDTH) {
      const panel = j / WIDTH;
      oneByEight(
        a,
        base + W + panel * (GROUPS * GROUP_BYTES),
        groups,
        scales,
        base + W_SCALES + panel * (GROUPS * WIDTH * 4),
        totals + j * 4,
      );
    }
  }
}

/** Columns beyond the last are whatever the panel held before, and nobody looks at their totals. */
function fourByEight(a: usize, w: usize, groups: u32, scales: usize, factors: usize, totals: usize): void {
  const first = totals;
  for (const last = a + groups * 64; a < last; ) {
    let s00 = i32x4.splat(0);
    let s01 = s00;
    let s10 = s00;
    let s11 = s00;
    let s20 = s00;
    let s21 = s00;
    let s30 = s00;
    let s31 = s00;
    const end = a + 64;
    do {
      const w0 = v128.load(w);
      const w1 = v128.load(w, 16);
      let x = v128.load32_splat(a);
      s00 = i32x4.add(s00, i32x4.dot_i16x8_s(x, w0));
      s01 = i32x4.add(s01, i32x4.dot_i16x8_s(x, w1));
      x = v128.load32_splat(a, STRIDE);
      s10 = i32x4.add(s10, i32x4.dot_i16x8_s(x, w0));
      s11 = i32x4.add(s11, i32x4.dot_i16x8_s(x, w1));
      x = v128.load32_splat(a, 2 * STRIDE);
      s20 = i32x4.add(s20, i32x4.dot_i16x8_s(x, w0));
      s21 = i32x4.add(s21, i32x4.dot_i16x8_s(x, w1));
      x = v128.load32_splat(a, 3 * STRIDE);
      s30 = i32x4.add(s30, i32x4.dot_i16x8_s(x, w0));
      s31 = i32x4.add(s31, i32x4.dot_i16x8_s(x, w1));
      w += WIDTH * 4;
      a += 4;
    } while (a < end);
    const f0 = v128.load(factors);
    const f1 = v128.load(factors, 16);
    addScaled(totals, s00, s01, v128.load32_splat(scales), f0, f1);
    addScaled(totals + PRODUCT_COLUMNS * 4, s10, s11, v128.load32_splat(scales, GROUPS * 4), f0, f1);
    addScaled(totals + 2 * PRODUCT_COLUMNS * 4, s20, s21, v128.load32_splat(scales, 2 * GROUPS * 4), f0, f1);
    addScaled(totals + 3 * PRODUCT_COLUMNS * 4, s30, s31, v128.load32_splat(scales, 3 * GROUPS * 4), f0, f1);
    totals = totals == first + 3 * SUMS ? first : totals + SUMS;
    factors += WIDTH * 4;
    scales += 4;
  }
}

function oneByEight(a: usize, w: usize, groups: u32, scales: usize, factors: usize, totals: usize): void {
  const first = totals;
  for (const last = a + groups * 64; a < last; ) {
    let s0 = i32x4.splat(0);
    let s1 = s0;
    let s2 = s0;
    let s3 = s0;
    const end = a + 64;
    do {
      const x = v128.load32_splat(a);
      const y = v128.load32_splat(a, 4);
      s0 = i32x4.add(s0, i32x4.dot_i16x8_s(x, v128.load(w)));
      s1 = i32x4.add(s1, i32x4.dot_i16x8_s(x, v128.load(w, 16)));
      s2 = i32x4.add(s2, i32x4.dot_i16x8_s(y, v128.load(w, WIDTH * 4)));
      s3 = i32x4.add(s3, i32x4.dot_i16x8_s(y, v128.load(w, WIDTH * 4 + 16)));
      w += 2 * WIDTH * 4;
      a += 8;
    } while (a < end);
    const f0 = v128.load(factors);
    const f1 = v128.load(factors, 16);
    addScaled(totals, i32x4.add(s0, s2), i32x4.add(s1, s3), v128.load32_splat(scales), f0, f1);
    totals = totals == first + 3 * SUMS ? first : totals + SUMS;
    factors += WIDTH * 4;
    scales += 4;
  }
}

// @ts-expect-error: decorator
@inline
function addScaled(totals: usize, s0: v128, s1: v128, scale: v128, f0: v128, f1: v128): void {
  const t0 = f32x4.mul(f32x4.mul(f32x4.convert_i32x4_s(s0), scale), f0);
  const t1 = f32x4.mul(f32x4.mul(f32x4.convert_i32x4_s(s1), scale), f1);
  v128.store(totals, f32x4.add(v128.load(totals), t0));
  v128.store(totals, f32x4.add(v128.load(totals, 16), t1), 16);
}
