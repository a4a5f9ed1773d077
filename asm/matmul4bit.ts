/**
 * Products with 4-bit weights, exact: every weight is what dequantize4bit gives for the activations' type, sums are float32.
 *
 * The order of a sum depends on K alone, so a row of activations gives the same bits by itself, in a batch, and from any number of
 * workers. Products are added up in four lanes: those of a group of 32 columns from 0 (nibbles.ts has their order; product i is in
 * lane i mod 4), the groups of a segment of 64 columns from 0, and of a segment then (lane 0 + lane 1) + (lane 2 + lane 3). Segments
 * are added by twos, these sums by twos, and so on; an odd last one waits for the next round.
 */
import { BF16, F16, F32, NF4, PRODUCT_COLUMNS, PRODUCT_ROWS } from "./generated/constants";
import { Matmul4bit as P } from "./generated/operands";
import { ABS, bf16, f16, load1, load4, maxFinite, store1, store8 } from "./kernel";
import {
  decodeScaled,
  dot16,
  dotPairs,
  Fp4,
  GROUP,
  groupRow,
  highDwords,
  highNibbles,
  lowDwords,
  lowNibbles,
  Nf4,
  PLANES,
  valuesOf,
  writePlanes,
} from "./nibbles";
import { scratch } from "./stream";

export { matmul4bitFast, quantizeActivations } from "./matmul4bit-fast";
export { matmul4bitTransposed } from "./matmul4bit-transposed";

const SEGMENT: u32 = 64;
/** Sums of 2^i segments of a tile wait at level i: enough for 2^32 columns. */
const LEVELS: u32 = 27;

/** Columns decoded at once. */
const DEPTH: u32 = 8 * SEGMENT;
/** Bytes from one row of decoded columns to the next: not a power of two, so that rows do not compete for cache lines. */
const STRIDE: u32 = DEPTH * 4 + 64;
/** Bytes of a tile's sums. */
const SUMS: u32 = PRODUCT_ROWS * PRODUCT_COLUMNS * 4;

// Offsets in scratch memory.
const A: usize = 0;
const W: usize = A + PRODUCT_ROWS * STRIDE;
const LEVEL_0: usize = W + PRODUCT_COLUMNS * STRIDE;
const SEGMENT_SUMS: usize = LEVEL_0 + LEVELS * SUMS;
const LANES: usize = SEGMENT_SUMS + SUMS;
const WORK: usize = LANES + 8 * 16;

/** Columns of a single row of activations that are used at once, and the segments in them. */
const VECTOR_DEPTH: u32 = 256 * SEGMENT;
const VECTOR_SEGMENTS: u32 = VECTOR_DEPTH / SEGMENT;
/** More columns would need more scratch memory. */
const VECTOR_MOST: u32 = 1 << 25;
const VECTOR_A: usize = 0;
const VECTOR_LANES: usize = VECTOR_A + VECTOR_DEPTH * 4;
const VECTOR_PLANES: usize = VECTOR_LANES + VECTOR_SEGMENTS * 16;
/** Sums of VECTOR_DEPTH columns, of each of a part's rows of the weight; they take what is left. */
const VECTOR_SUMS: usize = VECTOR_PLANES + (VECTOR_DEPTH / 32 + 1) * PLANES;

/** y = a W^T + bias. Unit: PRODUCT_COLUMNS outputs of a block of at most PRODUCT_ROWS rows. */
export function matmul4bit(op: usize, begin: u32, end: u32): void {
  const dtype = load<u32>(op, P.dtype);
  if (dtype == F32) product<f32>(op, begin, end);
  else if (dtype == F16) product<f16>(op, begin, end);
  else if (dtype == BF16) product<bf16>(op, begin, end);
  else unreachable();
}

function product<T>(op: usize, begin: u32, end: u32): void {
  const m = load<u32>(op, P.m);
  const n = load<u32>(op, P.n);
  const k = load<u32>(op, P.k);
  const tiles = (n + PRODUCT_COLUMNS - 1) / PRODUCT_COLUMNS;
  if (m == 1 && k % GROUP == 0 && k <= VECTOR_MOST) {
    const from = begin * PRODUCT_COLUMNS;
    const to = min(n, end * PRODUCT_COLUMNS);
    if (isFloat<T>() || finiteScales<T>(op, from, to)) {
      vector<T>(op, from, to);
      return;
    }
  }
  const blocks = (m + PRODUCT_ROWS - 1) / PRODUCT_ROWS;
  const rows = ((m + blocks - 1) / blocks + 3) & -4;
  for (let unit = begin; unit < end; unit++) {
    const row = (unit / tiles) * rows;
    const column = (unit % tiles) * PRODUCT_COLUMNS;
    tile<T>(op, row, min(rows, m - row), column, min(PRODUCT_COLUMNS, n - column));
  }
}

/** Sums of a row, with bias and rounded. */
function finishRow<T>(op: usize, row: u32, column: u32, columns: u32, sums: usize): void {
  const bias = load<usize>(op, P.bias);
  const y = load<usize>(op, P.y) + (row * load<u32>(op, P.n) + column) * sizeof<T>();
  const whole = columns & -8;
  for (let j: u32 = 0; j < whole; j += 8) {
    let low = v128.load(sums + j * 4);
    let high = v128.load(sums + j * 4, 16);
    if (bias) {
      low = f32x4.add(low, load4<T>(bias + (column + j) * sizeof<T>()));
      high = f32x4.add(high, load4<T>(bias + (column + j + 4) * sizeof<T>()));
    }
    store8<T>(y + j * sizeof<T>(), low, high);
  }
  for (let j = whole; j < columns; j++) {
    let sum = load<f32>(sums + j * 4);
    if (bias) sum += load1<T>(bias + (column + j) * sizeof<T>());
    store1<T>(y + j * sizeof<T>(), sum);
  }
}

// One row of activations: codes are decoded where they are used.

/** Whether all values of some rows of the weight are finite in T. */
function finiteScales<T>(op: usize, from: u32, to: u32): bool {
  const k: u64 = load<u32>(op, P.k);
  if (k == 0) return true;
  const blocksize = load<u32>(op, P.blocksize);
  const limit = reinterpret<u32>(maxFinite<T>());
  let p = load<usize>(op, P.absmax) + (<usize>((from * k) / blocksize) << 2);
  const end = load<usize>(op, P.absmax) + (<usize>((to * k - 1) / blocksize) << 2);
  let worst: u32 = 0;
  for (; p <= end; p += 4) worst = max(worst, load<u32>(p) & ABS);
  return worst <= limit;
}

function vector<T>(op: usize, from: u32, to: u32): void {
  const k = load<u32>(op, P.k);
  const blocksize = load<u32>(op, P.blocksize);
  const quantType = load<u32>(op, P.quantType);
  const packed = load<usize>(op, P.packed);
  const absmax = load<usize>(op, P.absmax);
  const base = scratch();
  const lanes = base + VECTOR_LANES;
  const rows = to - from;
  // One float per row; those of the next VECTOR_DEPTH columns come `rows` floats later.
  let sums = base + VECTOR_SUMS;
  for (let begin: u32 = 0; begin < k; begin += VECTOR_DEPTH) {
    const count = min(VECTOR_DEPTH, k - begin);
    let a = load<usize>(op, P.a) + begin * sizeof<T>();
    if (!isFloat<T>()) {
      groupRow<T>(a, base + VECTOR_A, count);
      a = base + VECTOR_A;
    }
    for (let i: u32 = 0; i < rows; i++) {
      const first = <u64>(from + i) * k + begin;
      const codes = packed + <usize>(first >> 1);
      const scale = absmax + (<usize>(first / blocksize) << 2);
      const left = blocksize - <u32>(first % blocksize);
      if (!isFloat<T>()) {
        const blocks = count > left ? (count - left + blocksize - 1) / blocksize + 1 : 1;
        planesOfBlocks<T>(base + VECTOR_PLANES, valuesOf(quantType), scale, blocks);
        lanesOfPlanes<T>(a, codes, base + VECTOR_PLANES, left, blocksize, count, lanes);
      } else if (quantType == NF4) lanesOfPairs<Nf4>(a, codes, scale, left, blocksize, count, lanes);
      else lanesOfPairs<Fp4>(a, codes, scale, left, blocksize, count, lanes);
      store<f32>(sums + i * 4, sumOfLanes(lanes, (count + SEGMENT - 1) / SEGMENT));
    }
    sums += rows * 4;
  }
  if (k == 0) memory.fill(sums, 0, rows * 4);
  const depths = (k + VECTOR_DEPTH - 1) / VECTOR_DEPTH;
  if (depths > 1) {
    sums = base + VECTOR_SUMS;
    for (let i: u32 = 0; i < rows; i++) store<f32>(sums + i * 4, sumByTwos(sums + i * 4, depths, rows * 4));
  }
  finishRow<T>(op, 0, from, rows, base + VECTOR_SUMS);
}

/** The sum of some segments that have four lanes each; overwrites them. */
function sumOfLanes(lanes: usize, segments: u32): f32 {
  let to = lanes;
  for (let i: u32 = 0; i < segments; i += 4) {
    const p = lanes + i * 16;
    v128.store(to, fourSums(v128.load(p), v128.load(p, 16), v128.load(p, 32), v128.load(p, 48)));
    to += 16;
  }
  let n = segments;
  for (; n % 8 == 0; n >>= 1) {
    for (let i: u32 = 0; i < n; i += 8) {
      const a = v128.load(lanes + i * 4);
      const b = v128.load(lanes + i * 4, 16);
      v128.store(lanes + i * 2, f32x4.add(i32x4.shuffle(a, b, 0, 2, 4, 6), i32x4.shuffle(a, b, 1, 3, 5, 7)));
    }
  }
  return sumByTwos(lanes, n, 4);
}

/** Adds n floats by twos, these sums by twos, and so on; overwrites them. */
function sumByTwos(p: usize, n: u32, stride: u32): f32 {
  while (n > 1) {
    const half = n >> 1;
    for (let i: u32 = 0; i < half; i++) {
      store<f32>(p + i * stride, load<f32>(p + 2 * i * stride) + load<f32>(p + (2 * i + 1) * stride));
    }
    if (n & 1) store<f32>(p + half * stride, load<f32>(p + (n - 1) * stride));
    n = (n + 1) >> 1;
  }
  return load<f32>(p);
}

/** Sums of the segments of one row of the weight times f32 activations. `left` is what remains of the first block. */
function lanesOfPairs<Type>(
  a: usize,
  codes: usize,
  scale: usize,
  left: u32,
  blocksize: u32,
  count: u32,
  to: usize,
): void {
  let lanes = i32x4.splat(0);
  let until = a + SEGMENT * 4;
  const last = a + count * 4;
  do {
    const factor = v128.load32_splat(scale);
    const end = min(last, a + left * 4);
    do {
      let sum = dotPairs<Type>(i32x4.splat(0), a, codes, factor);
      sum = dotPairs<Type>(sum, a + 64, codes + 8, factor);
      lanes = f32x4.add(lanes, sum);
      codes += 16;
      a += 128;
      if (a == until) {
        v128.store(to, lanes);
        lanes = i32x4.splat(0);
        to += 16;
        until += SEGMENT * 4;
      }
    } while (a < end);
    left = blocksize;
    scale += 4;
  } while (a < last);
  v128.store(to, lanes);
}

/** `writePlanes` of blocks: by themselves, because sums that wait for planes would wait long. */
function planesOfBlocks<T>(planes: usize, values: usize, scale: usize, blocks: u32): void {
  for (const end = scale + blocks * 4; scale < end; scale += 4) {
    writePlanes<T>(planes, values, load<f32>(scale));
    planes += PLANES;
  }
}

/** `lanesOfPairs` for f16 and bf16, with the values of each block. */
function lanesOfPlanes<T>(
  a: usize,
  codes: usize,
  planes: usize,
  left: u32,
  blocksize: u32,
  count: u32,
  to: usize,
): void {
  let lanes = i32x4.splat(0);
  let until = a + SEGMENT * 4;
  const last = a + count * 4;
  do {
    const t1 = v128.load(planes);
    const t2 = v128.load(planes, 16);
    const t3 = v128.load(planes, 32);
    const end = min(last, a + left * 4);
    do {
      const bytes = v128.load(codes);
      let sum = dot16<T>(i32x4.splat(0), highNibbles(bytes), a, t1, t2, t3);
      sum = dot16<T>(sum, lowNibbles(bytes), a + 64, t1, t2, t3);
      lanes = f32x4.add(lanes, sum);
      codes += 16;
      a += 128;
      if (a == until) {
        v128.store(to, lanes);
        lanes = i32x4.splat(0);
        to += 16;
        until += SEGMENT * 4;
      }
    } while (a < end);
    left = blocksize;
    planes += PLANES;
  } while (a < last);
  v128.store(to, lanes);
}

// Several rows, or a weight whose rows are no whole groups: DEPTH columns are decoded, then used by all rows.

function tile<T>(op: usize, row: u32, rows: u32, column: u32, columns: u32): void {
  const k = load<u32>(op, P.k);
  const blocksize = load<u32>(op, P.blocksize);
  const packed = load<usize>(op, P.packed);
  const absmax = load<usize>(op, P.absmax);
  const values = valuesOf(load<u32>(op, P.quantType));
  const base = scratch();
  let segment: u32 = 0;
  for (let begin: u32 = 0; begin < k; begin += DEPTH) {
    const count = min(DEPTH, k - begin);
    const x = load<usize>(op, P.a) + (row * k + begin) * sizeof<T>();
    for (let i: u32 = 0; i < rows; i++) groupRow<T>(x + i * k * sizeof<T>(), base + A + i * STRIDE, count);
    for (let j: u32 = 0; j < columns; j++) {
      const first = <u64>(column + j) * k + begin;
      decodeScaled<T>(packed, absmax, first, count, blocksize, values, base + W + j * STRIDE, base + WORK);
    }
    for (let at: u32 = 0; at < count; at += SEGMENT) {
      const groups = (min(SEGMENT, count - at) + GROUP - 1) / GROUP;
      const sums = base + (segment & 1 ? SEGMENT_SUMS : LEVEL_0);
      multiply(base + at * 4, base + LANES, rows, columns, groups, sums);
      carryTile(base, rows, segment++);
    }
  }
  let sums = base + SEGMENT_SUMS;
  memory.fill(sums, 0, SUMS);
  let some = false;
  for (let level = base + LEVEL_0; segment; segment >>= 1) {
    if (segment & 1) {
      if (some) addSums(level, sums, level, rows);
      sums = level;
      some = true;
    }
    level += SUMS;
  }
  for (let i: u32 = 0; i < rows; i++) {
    finishRow<T>(op, row + i, column, columns, sums + i * PRODUCT_COLUMNS * 4);
  }
}

/**
 * Adds the sums of segment number `segment`: of two sums of as many segments one waits at its level for the other. Those of a
 * segment with an even number are at their level already.
 */
function carryTile(base: usize, rows: u32, segment: u32): void {
  for (let level = base + LEVEL_0; segment & 1; level += SUMS) {
    segment >>= 1;
    addSums(level, base + SEGMENT_SUMS, segment & 1 ? base + SEGMENT_SUMS : level + SUMS, rows);
  }
}

/** to = a + b */
function addSums(a: usize, b: usize, to: usize, rows: u32): void {
  for (const end = a + rows * PRODUCT_COLUMNS * 4; a < end; a += 32) {
    v128.store(to, f32x4.add(v128.load(a), v128.load(b)));
    v128.store(to, f32x4.add(v128.load(a, 16), v128.load(b, 16)), 16);
    b += 32;
    to += 32;
  }
}

/** Sums of a segment, of one or two groups. Columns beyond the last have whatever the panel held; nobody looks at their sums. */
function multiply(panels: usize, lanes: usize, rows: u32, columns: u32, groups: u32, sums: usize): void {
  let i: u32 = 0;
  for (; i + 2 <= rows; i += 2) {
    for (let j: u32 = 0; j < columns; j += 4) {
      twoByFour(panels + A + i * STRIDE, panels + W + j * STRIDE, groups, lanes, sums + j * 4);
    }
    sums += 2 * PRODUCT_COLUMNS * 4;
  }
  if (i == rows) return;
  for (let j: u32 = 0; j < columns; j += 4) {
    oneByFour(panels + A + i * STRIDE, panels + W + j * STRIDE, groups, sums + j * 4);
  }
}

function twoByFour(a: usize, w: usize, groups: u32, lanes: usize, sums: usize): void {
  const last = a + groups * GROUP * 4;
  let s00: v128;
  let s01: v128;
  let s02: v128;
  let s03: v128;
  let s10: v128;
  let s11: v128;
  let s12: v128;
  let s13: v128;
  for (;;) {
    s00 = i32x4.splat(0);
    s01 = s00;
    s02 = s00;
    s03 = s00;
    s10 = s00;
    s11 = s00;
    s12 = s00;
    s13 = s00;
    const end = a + GROUP * 4;
    do {
      const x0 = v128.load(a);
      const x1 = v128.load(a, STRIDE);
      let v = v128.load(w);
      s00 = f32x4.add(s00, f32x4.mul(x0, v));
      s10 = f32x4.add(s10, f32x4.mul(x1, v));
      v = v128.load(w, STRIDE);
      s01 = f32x4.add(s01, f32x4.mul(x0, v));
      s11 = f32x4.add(s11, f32x4.mul(x1, v));
      v = v128.load(w, 2 * STRIDE);
      s02 = f32x4.add(s02, f32x4.mul(x0, v));
      s12 = f32x4.add(s12, f32x4.mul(x1, v));
      v = v128.load(w, 3 * STRIDE);
      s03 = f32x4.add(s03, f32x4.mul(x0, v));
      s13 = f32x4.add(s13, f32x4.mul(x1, v));
      w += 16;
      a += 16;
    } while (a < end);
    if (a == last) break;
    v128.store(lanes, s00);
    v128.store(lanes, s01, 16);
    v128.store(lanes, s02, 32);
    v128.store(lanes, s03, 48);
    v128.store(lanes, s10, 64);
    v128.store(lanes, s11, 80);
    v128.store(lanes, s12, 96);
    v128.store(lanes, s13, 112);
  }
  if (groups > 1) {
    s00 = f32x4.add(v128.load(lanes), s00);
    s01 = f32x4.add(v128.load(lanes, 16), s01);
    s02 = f32x4.add(v128.load(lanes, 32), s02);
    s03 = f32x4.add(v128.load(lanes, 48), s03);
    s10 = f32x4.add(v128.load(lanes, 64), s10);
    s11 = f32x4.add(v128.load(lanes, 80), s11);
    s12 = f32x4.add(v128.load(lanes, 96), s12);
    s13 = f32x4.add(v128.load(lanes, 112), s13);
  }
  v128.store(sums, fourSums(s00, s01, s02, s03));
  v128.store(sums, fourSums(s10, s11, s12, s13), PRODUCT_COLUMNS * 4);
}

function oneByFour(a: usize, w: usize, groups: u32, sums: usize): void {
  let t0 = i32x4.splat(0);
  let t1 = t0;
  let t2 = t0;
  let t3 = t0;
  const last = a + groups * GROUP * 4;
  do {
    let s0 = i32x4.splat(0);
    let s1 = s0;
    let s2 = s0;
    let s3 = s0;
    const end = a + GROUP * 4;
    do {
      const x = v128.load(a);
      s0 = f32x4.add(s0, f32x4.mul(x, v128.load(w)));
      s1 = f32x4.add(s1, f32x4.mul(x, v128.load(w, STRIDE)));
      s2 = f32x4.add(s2, f32x4.mul(x, v128.load(w, 2 * STRIDE)));
      s3 = f32x4.add(s3, f32x4.mul(x, v128.load(w, 3 * STRIDE)));
      w += 16;
      a += 16;
    } while (a < end);
    t0 = f32x4.add(t0, s0);
    t1 = f32x4.add(t1, s1);
    t2 = f32x4.add(t2, s2);
    t3 = f32x4.add(t3, s3);
  } while (a < last);
  v128.store(sums, fourSums(t0, t1, t2, t3));
}

/** (lane 0 + lane 1) + (lane 2 + lane 3) of each. */
// @ts-expect-error: decorator
@inline
function fourSums(a: v128, b: v128, c: v128, d: v128): v128 {
  const lowAB = lowDwords(a, b);
  const lowCD = lowDwords(c, d);
  const highAB = highDwords(a, b);
  const highCD = highDwords(c, d);
  return f32x4.add(
    f32x4.add(i64x2.shuffle(lowAB, lowCD, 0, 2), i64x2.shuffle(lowAB, lowCD, 1, 3)),
    f32x4.add(i64x2.shuffle(highAB, highCD, 0, 2), i64x2.shuffle(highAB, highCD, 1, 3)),
  );
}
