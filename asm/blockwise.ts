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
  bf16,
  f16,
  flushed,
  INFINITY,
  load1,
  load4,
  maxFinite,
  maxScale,
  SMALLEST_NORMAL,
  scale4,
  scaleFactor,
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

function quantizeBlocks<T>(op: usize, begin: u32, end: u32): void {
  const blocksize = load<u32>(op, Q.blocksize);
  const n = load<u32>(op, Q.n);
  const code = load<usize>(op, Q.code);
  const table = load<usize>(op, Q.table);
  const allowNonFinite = load<u32>(op, Q.allowNonFinite);
  const entries = table + SEARCH_HEADER;
  const floor: f32 = table ? load<f32>(table) : -1;
  for (let block = begin; block < end; block++) {
    const first = block * blocksize;
    const count = min(blocksize, n - first);
    const x = load<usize>(op, Q.x) + first * sizeof<T>();
    const q = load<usize>(op, Q.q) + first;
    const bits = absmaxBits<T>(x, count);
    let absmax = reinterpret<f32>(bits);
    if (bits >= INFINITY) {
      if (!allowNonFinite) fault(op, block);
      absmax = absmaxIgnoringNaN<T>(x, count);
    }
    absmax = flushed(absmax);
    store<f32>(load<usize>(op, Q.absmax) + block * 4, absmax);
    if (absmax == 0) {
      memory.fill(q, 0, count);
      continue;
    }
    const r: f32 = 1 / absmax;
    let done: u32 = 0;
    if (table != 0 && bits < INFINITY && r <= maxScale<T>()) {
      done = count & -16;
      if (done) quantizeFast<T>(x, q, done, r, entries);
    }
    for (let i = done; i < count; i++) {
      const s = flushed(flushed(load1<T>(x + i * sizeof<T>())) * r);
      store<u8>(q + i, nearest(code, s));
    }
  }
}

function quantizeFast<T>(x: usize, q: usize, n: u32, r: f32, entries: usize): void {
  const factor = scaleFactor<T>(r);
  const base = i32x4.splat(<i32>entries);
  const small = f32x4.splat(max(r, <f32>1) * SMALLEST_NORMAL);
  const end = q + n;
  do {
    const a = search4(scale4<T>(x, factor), base, small);
    const b = search4(scale4<T>(x + 4 * sizeof<T>(), factor), base, small);
    const c = search4(scale4<T>(x + 8 * sizeof<T>(), factor), base, small);
    const d = search4(scale4<T>(x + 12 * sizeof<T>(), factor), base, small);
    v128.store(q, i8x16.narrow_i16x8_u(i16x8.narrow_i32x4_s(a, b), i16x8.narrow_i32x4_s(c, d)));
    x += 16 * sizeof<T>();
    q += 16;
  } while (q < end);
}

/** Four codes by table, see src/quant/search-table.ts. */
function search4(s: v128, base: v128, small: v128): v128 {
  const i = v128.xor(s, i32x4.shr_s(s, 31));
  const at = i32x4.add(v128.and(i32x4.shr_u(i, SEARCH_SHIFT - 2), i32x4.splat(-4)), base);
  const lo = i64x2.extract_lane(at, 0);
  const hi = i64x2.extract_lane(at, 1);
  let e = v128.load32_zero(<usize>lo);
  e = v128.load32_lane(<usize>(lo >>> 32), e, 1);
  e = v128.load32_lane(<usize>hi, e, 2);
  e = v128.load32_lane(<usize>(hi >>> 32), e, 3);
  return i32x4.shr_u(i32x4.add(e, i), 24);
}

/** The exact search: the code of s, by halving. NaN gives 0. */
function nearest(code: usize, s: f32): u32 {
  let high: u32 = 0;
  for (let step: u32 = 128; step > 0; step >>= 1) {
    high += select<u32>(step, 0, load<f32>(code + (high + step - 1) * 4) < s);
  }
  if (high == 0) return 0;
  const low = high - 1;
  const middle = (load<f32>(code + low * 4) + load<f32>(code + high * 4)) * <f32>0.5;
  if (s == middle) return high & ~1;
  return s > middle ? high : low;
}

function dequantizeBlocks<T>(op: usize, begin: u32, end: u32): void {
  const blocksize = load<u32>(op, D.blocksize);
  const n = load<u32>(op, D.n);
  const code = load<usize>(op, D.code);
  const offsetAt = load<usize>(op, D.offset);
  const offset: f32 = offsetAt ? load<f32>(offsetAt) : 0;
  const codes = reinterpret<f32>(absmaxBits<f32>(code, 256));
  for (let block = begin; block < end; block++) {
    const first = block * blocksize;
    const count = min(blocksize, n - first);
    const q = load<usize>(op, D.q) + first;
    const y = load<usize>(op, D.y) + first * sizeof<T>();
    const absmax = load<f32>(load<usize>(op, D.absmax) + block * 4);
    let done: u32 = 0;
    // A sum of finite magnitudes below the limit cannot be NaN nor overflow.
    if (abs(absmax) * codes + abs(offset) <= maxFinite<T>()) {
      done = count & -8;
      const scale = f32x4.splat(absmax);
      const plus = f32x4.splat(offset);
      for (let i: u32 = 0; i < done; i += 8) {
        const a = f32x4.mul(decode4(code, q + i), scale);
        const b = f32x4.mul(decode4(code, q + i + 4), scale);
        storeFinite8<T>(y + i * sizeof<T>(), a, b);
      }
    }
    for (let i = done; i < count; i++) {
      const v = load<f32>(code + <usize>load<u8>(q + i) * 4) * absmax;
      store1<T>(y + i * sizeof<T>(), offsetAt ? v + offset : v);
    }
  }
}

function decode4(code: usize, q: usize): v128 {
  let v = v128.load32_zero(code + (<usize>load<u8>(q) << 2));
  v = v128.load32_lane(code + (<usize>load<u8>(q, 1) << 2), v, 1);
  v = v128.load32_lane(code + (<usize>load<u8>(q, 2) << 2), v, 2);
  return v128.load32_lane(code + (<usize>load<u8>(q, 3) << 2), v, 3);
}
