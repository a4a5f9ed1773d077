/**
 * 8-bit blockwise quantization with any sorted codebook of 256 values.
 *
 * Per block: absmax = max |x|, r = 1 / absmax, s = x * r (each rounded once), and the code nearest to s: with the
 * neighbours low and high of s and their float32 midpoint m, high where s > m, low where s < m, and the even index where
 * they are equal. Denormal x and s count as zero, a block with a denormal absmax is a zero block (absmax 0, codes 0), and
 * zero gets the first of several zeros. Where non-finite input is allowed, NaN does not count for the maximum and gets
 * code 0. bitsandbytes' CUDA kernels compute the same (with an approximate 1 / absmax).
 *
 * Decoding is code[q] * absmax (+ offset), rounded after each step.
 */
import { BF16, F16, F32, SEARCH_HEADER, SEARCH_SHIFT } from "./generated/constants";
import { DequantizeBlockwise as D, QuantizeBlockwise as Q } from "./generated/operands";
import {
  absmaxBits,
  absmaxIgnoringNaN,
  absmaxOfBlocks,
  allBetween,
  bf16,
  f16,
  flushed4,
  INFINITY,
  isF16,
  isOn,
  load1,
  load4,
  maxFinite,
  minScaled,
  Off,
  On,
  SMALLEST_NORMAL,
  scale4,
  scaleFactor,
  shiftedAbsmaxOfBlocks,
  store1,
  storeFinite8,
} from "./kernel";
import { fault } from "./stream";

/** q[i] = code of (x[i] - offset) / absmax(block). Unit: block. */
export function quantizeBlockwise(op: usize, begin: u32, end: u32): void {
  const dtype = load<u32>(op, Q.dtype);
  if (dtype == F32) quantizeBlocks<f32>(op, begin, end);
  else if (dtype == F16) quantizeBlocks<f16>(op, begin, end);
  else if (dtype == BF16) quantizeBlocks<bf16>(op, begin, end);
  else unreachable();
}

/** y[i] = code[q[i]] * absmax(block) + offset. Unit: block. */
export function dequantizeBlockwise(op: usize, begin: u32, end: u32): void {
  const dtype = load<u32>(op, D.dtype);
  if (dtype == F32) dequantizeBlocks<f32>(op, begin, end);
  else if (dtype == F16) dequantizeBlocks<f16>(op, begin, end);
  else if (dtype == BF16) dequantizeBlocks<bf16>(op, begin, end);
  else unreachable();
}

/** Elements whose absmax are found before their codes: a block's chain of latencies hides behind other blocks. */
const RUN: u32 = 4096;

function quantizeBlocks<T>(op: usize, begin: u32, end: u32): void {
  const blocksize = load<u32>(op, Q.blocksize);
  const n = load<u32>(op, Q.n);
  const table = load<usize>(op, Q.table);
  const shift = load<usize>(op, Q.offset);
  const least = leastPlain<T>(table);
  const run = max<u32>(1, RUN / blocksize);
  for (let first = begin; first < end; first += run) {
    const blocks = min(run, end - first);
    const i = first * blocksize;
    const x = load<usize>(op, Q.x) + i * sizeof<T>();
    const q = load<usize>(op, Q.q) + i;
    const absmax = load<usize>(op, Q.absmax) + first * 4;
    if (shift) shiftedAbsmaxOfBlocks<T>(x, absmax, blocks, blocksize, n - i, load<f32>(shift));
    else absmaxOfBlocks<T>(x, absmax, blocks, blocksize, n - i);
    const whole = blocksize % 16 == 0 && blocks * blocksize <= n - i;
    if (table && !shift && whole && allBetween(absmax, blocks, reinterpret<u32>(least), INFINITY - 1)) {
      quantizeFast<T, Off, Off>(x, q, absmax, blocks, blocksize, table + SEARCH_HEADER, 0);
      continue;
    }
    for (let k: u32 = 0; k < blocks; k++) {
      const j = k * blocksize;
      quantizeBlock<T>(op, first + k, x + j * sizeof<T>(), q + j, min(blocksize, n - i - j), least);
    }
  }
}

/**
 * The least absmax at which nothing needs to be flushed: below it a denormal x can get to where this codebook has a
 * boundary (most have none near zero). f16 has no denormal x as f32.
 */
function leastPlain<T>(table: usize): f32 {
  if (isF16<T>() || !table) return minScaled<T>();
  return max<f32>(minScaled<T>(), <f32>1.001 * (SMALLEST_NORMAL / load<f32>(table)));
}

/** Quantizes a block whose absmax has been found. */
function quantizeBlock<T>(op: usize, block: u32, x: usize, q: usize, count: u32, least: f32): void {
  const absmaxAt = load<usize>(op, Q.absmax) + block * 4;
  const shift = load<usize>(op, Q.offset);
  const offset: f32 = shift ? load<f32>(shift) : 0;
  const bits = load<u32>(absmaxAt);
  let absmax = reinterpret<f32>(bits);
  if (bits >= INFINITY) {
    if (!load<u32>(op, Q.allowNonFinite)) fault(op, block);
    absmax = absmaxIgnoringNaN<T>(x, count, offset);
    store<f32>(absmaxAt, absmax);
  }
  if (absmax < SMALLEST_NORMAL) {
    store<f32>(absmaxAt, 0);
    memory.fill(q, 0, count);
    return;
  }
  let done: u32 = 0;
  const table = load<usize>(op, Q.table);
  if (table != 0 && bits < INFINITY && absmax >= minScaled<T>() && count >= 16) {
    done = count & -16;
    const entries = table + SEARCH_HEADER;
    if (shift) quantizeFast<T, On, On>(x, q, absmaxAt, 1, done, entries, offset);
    else if (absmax < least) quantizeFast<T, Off, On>(x, q, absmaxAt, 1, done, entries, 0);
    else quantizeFast<T, Off, Off>(x, q, absmaxAt, 1, done, entries, 0);
  }
  quantizeExactly<T>(x, q, done, count, <f32>1 / absmax, load<usize>(op, Q.code), offset);
}

/** Elements from `begin` to `end`. */
function quantizeExactly<T>(x: usize, q: usize, begin: u32, end: u32, r: f32, code: usize, offset: f32): void {
  const factor = f32x4.splat(r);
  const shift = f32x4.splat(offset);
  let i = begin;
  for (; i + 4 <= end; i += 4) {
    const v = f32x4.sub(load4<T>(x + i * sizeof<T>()), shift);
    const words = nearest4(code, flushed4(f32x4.mul(flushed4(v), factor)));
    const halves = i16x8.narrow_i32x4_s(words, words);
    v128.store32_lane(q + i, i8x16.narrow_i16x8_u(halves, halves), 0);
  }
  for (; i < end; i++) {
    const v = f32x4.sub(f32x4.splat(load1<T>(x + i * sizeof<T>())), shift);
    v128.store8_lane(q + i, nearest4(code, flushed4(f32x4.mul(flushed4(v), factor))), 0);
  }
}

/** Whole blocks, 16 elements at a time. `Shift`: x - offset is quantized. `Flush`: denormals may matter. */
export function quantizeFast<T, Shift, Flush>(
  x: usize,
  q: usize,
  absmax: usize,
  blocks: u32,
  blocksize: u32,
  entries: usize,
  offset: f32,
): void {
  const shift = f32x4.splat(offset);
  const lastBlock = absmax + blocks * 4;
  do {
    const r: f32 = <f32>1 / load<f32>(absmax);
    const factor = isOn<Shift>() ? f32x4.splat(r) : scaleFactor<T>(r);
    // What a denormal x or s can reach.
    const small = f32x4.splat(max(r, <f32>1) * SMALLEST_NORMAL);
    const end = q + blocksize;
    do {
      const a = search4<T, Shift, Flush>(x, factor, entries, shift, small);
      const b = search4<T, Shift, Flush>(x + 4 * sizeof<T>(), factor, entries, shift, small);
      const c = search4<T, Shift, Flush>(x + 8 * sizeof<T>(), factor, entries, shift, small);
      const d = search4<T, Shift, Flush>(x + 12 * sizeof<T>(), factor, entries, shift, small);
      v128.store(q, i8x16.narrow_i16x8_u(i16x8.narrow_i32x4_s(a, b), i16x8.narrow_i32x4_s(c, d)));
      x += 16 * sizeof<T>();
      q += 16;
    } while (q < end);
    absmax += 4;
  } while (absmax < lastBlock);
}

/** Four codes by table, see src/quant/search-table.ts. */
function search4<T, Shift, Flush>(x: usize, factor: v128, entries: usize, shift: v128, small: v128): v128 {
  let s = isOn<Shift>() ? f32x4.mul(f32x4.sub(load4<T>(x), shift), factor) : scale4<T>(x, factor);
  if (isOn<Flush>()) s = v128.and(s, f32x4.ge(f32x4.abs(s), small));
  const i = v128.xor(s, i32x4.shr_s(s, 31));
  const e = gather4(entries, i32x4.shr_u(i, SEARCH_SHIFT));
  return i32x4.shr_u(i32x4.add(e, i), 24);
}

/** The exact search: the codes of four s, by halving. NaN gives 0. */
function nearest4(code: usize, s: v128): v128 {
  let high = i32x4.splat(0);
  for (let step: i32 = 128; step > 0; step >>= 1) {
    const below = f32x4.lt(gather4(code, i32x4.add(high, i32x4.splat(step - 1))), s);
    high = i32x4.add(high, v128.and(below, i32x4.splat(step)));
  }
  const low = i32x4.max_s(i32x4.sub(high, i32x4.splat(1)), i32x4.splat(0));
  const middle = f32x4.mul(f32x4.add(gather4(code, low), gather4(code, high)), f32x4.splat(0.5));
  const even = v128.bitselect(v128.and(high, i32x4.splat(-2)), low, f32x4.eq(s, middle));
  return v128.bitselect(high, even, f32x4.gt(s, middle));
}

/** Four 32-bit values by index. Two 64-bit lanes cost less to extract than four. */
function gather4(values: usize, index: v128): v128 {
  const a = i64x2.extract_lane(index, 0);
  const b = i64x2.extract_lane(index, 1);
  let v = v128.load32_zero(values + ((<u32>a) << 2));
  v = v128.load32_lane(values + ((<u32>(a >>> 32)) << 2), v, 1);
  v = v128.load32_lane(values + ((<u32>b) << 2), v, 2);
  return v128.load32_lane(values + ((<u32>(b >>> 32)) << 2), v, 3);
}

function dequantizeBlocks<T>(op: usize, begin: u32, end: u32): void {
  const blocksize = load<u32>(op, D.blocksize);
  const n = load<u32>(op, D.n);
  const code = load<usize>(op, D.code);
  const shift = load<usize>(op, D.offset);
  const offset: f32 = shift ? load<f32>(shift) : 0;
  const codes = reinterpret<f32>(absmaxBits<f32>(code, 256));
  for (let block = begin; block < end; block++) {
    const first = block * blocksize;
    const count = min(blocksize, n - first);
    const q = load<usize>(op, D.q) + first;
    const y = load<usize>(op, D.y) + first * sizeof<T>();
    const absmax = load<f32>(load<usize>(op, D.absmax) + block * 4);
    let done: u32 = 0;
    // What is below the limit can be neither NaN nor out of T's range.
    if (count >= 8 && abs(absmax) * codes + abs(offset) <= maxFinite<T>()) {
      done = count & -8;
      if (shift) dequantizeFast<T, On>(q, y, done, code, absmax, offset);
      else dequantizeFast<T, Off>(q, y, done, code, absmax, 0);
    }
    for (let i = done; i < count; i++) {
      const v = load<f32>(code + ((<usize>load<u8>(q + i)) << 2)) * absmax;
      store1<T>(y + i * sizeof<T>(), shift ? v + offset : v);
    }
  }
}

export function dequantizeFast<T, Shift>(q: usize, y: usize, n: u32, code: usize, absmax: f32, offset: f32): void {
  const scale = f32x4.splat(absmax);
  const shift = f32x4.splat(offset);
  const end = q + n;
  do {
    let a = f32x4.mul(codes4(code, q), scale);
    let b = f32x4.mul(codes4(code, q + 4), scale);
    if (isOn<Shift>()) {
      a = f32x4.add(a, shift);
      b = f32x4.add(b, shift);
    }
    storeFinite8<T>(y, a, b);
    q += 8;
    y += 8 * sizeof<T>();
  } while (q < end);
}

/** The values of four codes. */
function codes4(code: usize, q: usize): v128 {
  let v = v128.load32_zero(code + ((<usize>load<u8>(q)) << 2));
  v = v128.load32_lane(code + ((<usize>load<u8>(q, 1)) << 2), v, 1);
  v = v128.load32_lane(code + ((<usize>load<u8>(q, 2)) << 2), v, 2);
  return v128.load32_lane(code + ((<usize>load<u8>(q, 3)) << 2), v, 3);
}
