/**
 * 4-bit quantization to NF4 and FP4. Two codes a byte, the first element in the high nibble.
 *
 * Per block: absmax = max |x|, r = 1 / absmax, s = x * r (each rounded once). The NF4 code is the number of thresholds
 * (float32 midpoints) that s exceeds; the FP4 code goes by the number of thresholds that |s| exceeds (bitsandbytes' literals), with
 * 8 added where s < 0. Denormal x and s count as zero; a block with a denormal absmax is a zero block (absmax 0, codes
 * 0). An odd last nibble is filled up with NF4's 7 or FP4's 0. Where non-finite input is allowed, NaN does not count for
 * the maximum and gets code 0. bitsandbytes' CUDA kernels compute the same (with an approximate 1 / absmax).
 *
 * Decoding is code * absmax, rounded to the element type.
 */
import {
  BF16,
  F16,
  F32,
  FP4_CODES,
  FP4_CODES_HIGH,
  FP4_MAGNITUDE_HIGH,
  FP4_MAGNITUDE_LOW,
  FP4_PAIRS,
  FP4_VALUES,
  fp4Rank,
  NF4,
  NF4_NEGATIVE_HIGH,
  NF4_NEGATIVE_LOW,
  NF4_PAIRS,
  NF4_POSITIVE_HIGH,
  NF4_POSITIVE_LOW,
  NF4_VALUES,
  nf4Rank,
} from "./generated/constants";
import { Dequantize4bit as D, Quantize4bit as Q } from "./generated/operands";
import {
  absmaxIgnoringNaN,
  absmaxOfBlocks,
  allBetween,
  bf16,
  f16,
  flushed4,
  INFINITY,
  load1,
  load4,
  maxFinite,
  minScaled,
  SMALLEST_NORMAL,
  scale4,
  scaleEven4,
  scaleFactor,
  scaleOdd4,
  store1,
  toFiniteHalves,
} from "./kernel";
import { Fp4, highBytes, isNf4, lowBytes, Nf4 } from "./nibbles";
import { fault } from "./stream";

/** packed = codes of x / absmax(block). Unit: block. */
export function quantize4bit(op: usize, begin: u32, end: u32): void {
  const dtype = load<u32>(op, Q.dtype);
  const nf4 = load<u32>(op, Q.quantType) == NF4;
  if (dtype == F32) {
    if (nf4) quantizeBlocks<f32, Nf4>(op, begin, end);
    else quantizeBlocks<f32, Fp4>(op, begin, end);
  } else if (dtype == F16) {
    if (nf4) quantizeBlocks<f16, Nf4>(op, begin, end);
    else quantizeBlocks<f16, Fp4>(op, begin, end);
  } else if (dtype == BF16) {
    if (nf4) quantizeBlocks<bf16, Nf4>(op, begin, end);
    else quantizeBlocks<bf16, Fp4>(op, begin, end);
  } else unreachable();
}

/** Elements whose absmax are found before their codes: a block's chain of latencies hides behind other blocks. */
const RUN: u32 = 4096;

function quantizeBlocks<T, Type>(op: usize, begin: u32, end: u32): void {
  const blocksize = load<u32>(op, Q.blocksize);
  const n = load<u32>(op, Q.n);
  const least = reinterpret<u32>(leastFast<T>());
  const run = max<u32>(1, RUN / blocksize);
  for (let first = begin; first < end; first += run) {
    const blocks = min(run, end - first);
    const i = first * blocksize;
    const x = load<usize>(op, Q.x) + i * sizeof<T>();
    const packed = load<usize>(op, Q.packed) + (i >> 1);
    const absmax = load<usize>(op, Q.absmax) + first * 4;
    absmaxOfBlocks<T>(x, absmax, blocks, blocksize, n - i);
    if (blocksize % 32 == 0 && blocks * blocksize <= n - i && allBetween(absmax, blocks, least, INFINITY - 1)) {
      quantizeFast<T, Type>(x, packed, absmax, blocks, blocksize);
      continue;
    }
    for (let k: u32 = 0; k < blocks; k++) {
      const j = k * blocksize;
      quantizeBlock<T, Type>(op, first + k, x + j * sizeof<T>(), packed + (j >> 1), min(blocksize, n - i - j));
    }
  }
}

/** The least absmax for `quantizeFast`: no denormal x can get past the lowest threshold. */
function leastFast<T>(): f32 {
  return max<f32>(minScaled<T>(), 1e-30);
}

/** Quantizes a block whose absmax has been found. */
function quantizeBlock<T, Type>(op: usize, block: u32, x: usize, packed: usize, count: u32): void {
  const absmaxAt = load<usize>(op, Q.absmax) + block * 4;
  const bits = load<u32>(absmaxAt);
  let absmax = reinterpret<f32>(bits);
  if (bits >= INFINITY) {
    if (!load<u32>(op, Q.allowNonFinite)) fault(op, block);
    absmax = absmaxIgnoringNaN<T>(x, count, 0);
    store<f32>(absmaxAt, absmax);
  }
  if (absmax < SMALLEST_NORMAL) {
    store<f32>(absmaxAt, 0);
    memory.fill(packed, 0, (count + 1) >> 1);
    if (count & 1) store<u8>(packed + (count >> 1), pad<Type>());
    return;
  }
  let done: u32 = 0;
  if (bits < INFINITY && absmax >= leastFast<T>()) {
    done = count & -32;
    if (done) quantizeFast<T, Type>(x, packed, absmaxAt, 1, done);
  }
  quantizeExactly<T, Type>(x, packed, done, count, <f32>1 / absmax);
}

function pad<Type>(): i32 {
  return isNf4<Type>() ? 7 : 0;
}

/** Elements from `begin`, an even number, to `end`. */
function quantizeExactly<T, Type>(x: usize, packed: usize, begin: u32, end: u32, r: f32): void {
  const factor = f32x4.splat(r);
  const whole = end & -8;
  for (; begin < whole; begin += 8) {
    const p = x + begin * sizeof<T>();
    const a = codes4<Type>(load4<T>(p), factor);
    const b = codes4<Type>(load4<T>(p + 4 * sizeof<T>()), factor);
    const pairs = packPairs(i16x8.narrow_i32x4_s(a, b));
    const words = i16x8.narrow_i32x4_s(pairs, pairs);
    v128.store32_lane(packed + (begin >> 1), i8x16.narrow_i16x8_u(words, words), 0);
  }
  for (; begin < end; begin += 2) {
    const p = x + begin * sizeof<T>();
    const high = codes4<Type>(f32x4.splat(load1<T>(p)), factor);
    let low: v128;
    if (begin + 1 < end) low = codes4<Type>(f32x4.splat(load1<T>(p + sizeof<T>())), factor);
    else low = i32x4.splat(pad<Type>());
    store<u8>(packed + (begin >> 1), (i32x4.extract_lane(high, 0) << 4) | i32x4.extract_lane(low, 0));
  }
}

/** The codes of four elements, by comparing with every threshold. */
function codes4<Type>(x: v128, factor: v128): v128 {
  const s = flushed4(f32x4.mul(flushed4(x), factor));
  if (isNf4<Type>()) return nf4Rank(s);
  const negative = f32x4.lt(s, f32x4.splat(0));
  const rank = v128.or(fp4Rank(f32x4.abs(s)), v128.and(negative, i32x4.splat(8)));
  return i8x16.swizzle(FP4_CODES, rank);
}

/** Of eight codes each two as a byte in 32 bits, the first in the high nibble. */
function packPairs(codes: v128): v128 {
  return i32x4.dot_i16x8_s(codes, i32x4.splat(0x0001_0010));
}

/**
 * 32 elements at a time, by the table of scripts/generate.mjs: the key of s in 16 bits selects an entry by its upper bits,
 * and the sum of key and entry has the number of exceeded thresholds on top. A sum that ends in twelve ones says that the
 * key is a threshold's own: then (once in some hundred groups) the group is compared exactly.
 */
function quantizeFast<T, Type>(x: usize, packed: usize, absmax: usize, blocks: u32, blocksize: u32): void {
  const lastBlock = absmax + blocks * 4;
  do {
    const r: f32 = <f32>1 / load<f32>(absmax);
    const factor = scaleFactor<T>(r);
    const least = f32x4.splat(-(max(r, <f32>1) * SMALLEST_NORMAL));
    const end = packed + (blocksize >> 1);
    do {
      const s0 = scaled<T>(x, 0, factor);
      const s1 = scaled<T>(x, 1, factor);
      const s2 = scaled<T>(x, 2, factor);
      const s3 = scaled<T>(x, 3, factor);
      const s4 = scaled<T>(x, 4, factor);
      const s5 = scaled<T>(x, 5, factor);
      const s6 = scaled<T>(x, 6, factor);
      const s7 = scaled<T>(x, 7, factor);
      let a = keys8<Type>(s0, s1);
      let b = keys8<Type>(s2, s3);
      let c = keys8<Type>(s4, s5);
      let d = keys8<Type>(s6, s7);
      const binsAB = i8x16.narrow_i16x8_s(i16x8.shr_s(a, 11), i16x8.shr_s(b, 11));
      const binsCD = i8x16.narrow_i16x8_s(i16x8.shr_s(c, 11), i16x8.shr_s(d, 11));
      const lowAB = entriesLow<Type>(binsAB);
      const lowCD = entriesLow<Type>(binsCD);
      const highAB = entriesHigh<Type>(binsAB);
      const highCD = entriesHigh<Type>(binsCD);
      a = i16x8.add(a, lowBytes(lowAB, highAB));
      b = i16x8.add(b, highBytes(lowAB, highAB));
      c = i16x8.add(c, lowBytes(lowCD, highCD));
      d = i16x8.add(d, highBytes(lowCD, highCD));
      if (!isNf4<Type>()) {
        a = v128.or(a, signs8(s0, s1, least));
        b = v128.or(b, signs8(s2, s3, least));
        c = v128.or(c, signs8(s4, s5, least));
        d = v128.or(d, signs8(s6, s7, least));
      }
      const ends = i16x8.max_u(
        i16x8.max_u(i16x8.shl(a, 4), i16x8.shl(b, 4)),
        i16x8.max_u(i16x8.shl(c, 4), i16x8.shl(d, 4)),
      );
      a = i16x8.shr_u(a, 12);
      b = i16x8.shr_u(b, 12);
      c = i16x8.shr_u(c, 12);
      d = i16x8.shr_u(d, 12);
      v128.store(packed, codesOfRanks<Type>(i8x16.narrow_i16x8_u(pack16<T>(a, b), pack16<T>(c, d))));
      if (v128.any_true(i16x8.eq(ends, i16x8.splat(-16)))) quantizeExactly<T, Type>(x, packed, 0, 32, r);
      x += 32 * sizeof<T>();
      packed += 16;
    } while (packed < end);
    absmax += 4;
  } while (absmax < lastBlock);
}

/** Two ranks a byte to two codes a byte. NF4's ranks are its codes. */
function codesOfRanks<Type>(ranks: v128): v128 {
  if (isNf4<Type>()) return ranks;
  const nibble = i8x16.splat(15);
  return v128.or(
    i8x16.swizzle(FP4_CODES_HIGH, v128.and(i16x8.shr_u(ranks, 4), nibble)),
    i8x16.swizzle(FP4_CODES, v128.and(ranks, nibble)),
  );
}

/**
 * The k-th four of 32 scaled elements, in the order that is cheapest: f32 as they come; of halves the even and the odd
 * elements of 16 in turn (0 2 4 6, 8 10 12 14, 1 3 5 7, 9 11 13 15), which two neighbours in a 32-bit lane give at once.
 */
function scaled<T>(x: usize, k: i32, factor: v128): v128 {
  if (isFloat<T>()) return scale4<T>(x + k * 16, factor);
  const p = x + (k & 4) * 8 + (k & 1) * 16;
  return k & 2 ? scaleOdd4<T>(p, factor) : scaleEven4<T>(p, factor);
}

/** The bytes, in 16 bits each, of 16 codes that came from `scaled`. */
function pack16<T>(a: v128, b: v128): v128 {
  if (isFloat<T>()) return i16x8.narrow_i32x4_s(packPairs(a), packPairs(b));
  return v128.or(i16x8.shl(a, 4), b);
}

/** The keys of eight elements: rint(32768 s), for FP4 of |s|, saturated. 384 has its last bit at 2^-15. */
function keys8<Type>(s: v128, t: v128): v128 {
  const magic = f32x4.splat(384);
  const k = i16x8.narrow_i32x4_s(i32x4.sub(f32x4.add(s, magic), magic), i32x4.sub(f32x4.add(t, magic), magic));
  return isNf4<Type>() ? k : i16x8.max_s(k, i16x8.sub_sat_s(i16x8.splat(0), k));
}

/** The highest bit for each of eight elements with s <= least. */
function signs8(s: v128, t: v128, least: v128): v128 {
  return v128.and(i16x8.narrow_i32x4_s(f32x4.le(s, least), f32x4.le(t, least)), i16x8.splat(<i16>0x8000));
}

/** Lower bytes of the entries of 16 bins. NF4's bins are -16 to 15; a swizzle gives 0 for an index that is not 0 to 15. */
function entriesLow<Type>(bins: v128): v128 {
  if (!isNf4<Type>()) return i8x16.swizzle(FP4_MAGNITUDE_LOW, bins);
  const negative = v128.xor(bins, i8x16.splat(-16));
  return v128.or(i8x16.swizzle(NF4_POSITIVE_LOW, bins), i8x16.swizzle(NF4_NEGATIVE_LOW, negative));
}

function entriesHigh<Type>(bins: v128): v128 {
  if (!isNf4<Type>()) return i8x16.swizzle(FP4_MAGNITUDE_HIGH, bins);
  const negative = v128.xor(bins, i8x16.splat(-16));
  return v128.or(i8x16.swizzle(NF4_POSITIVE_HIGH, bins), i8x16.swizzle(NF4_NEGATIVE_HIGH, negative));
}

/** y[i] = code * absmax(block). Unit: block. */
export function dequantize4bit(op: usize, begin: u32, end: u32): void {
  const dtype = load<u32>(op, D.dtype);
  if (dtype == F32) dequantizeBlocks<f32>(op, begin, end);
  else if (dtype == F16) dequantizeBlocks<f16>(op, begin, end);
  else if (dtype == BF16) dequantizeBlocks<bf16>(op, begin, end);
  else unreachable();
}

function dequantizeBlocks<T>(op: usize, begin: u32, end: u32): void {
  const blocksize = load<u32>(op, D.blocksize);
  const n = load<u32>(op, D.n);
  const nf4 = load<u32>(op, D.quantType) == NF4;
  const values = nf4 ? NF4_VALUES : FP4_VALUES;
  for (let block = begin; block < end; block++) {
    const first = block * blocksize;
    const count = min(blocksize, n - first);
    const packed = load<usize>(op, D.packed) + (first >> 1);
    const y = load<usize>(op, D.y) + first * sizeof<T>();
    const absmax = load<f32>(load<usize>(op, D.absmax) + block * 4);
    let done: u32 = 0;
    if (abs(absmax) <= maxFinite<T>()) {
      done = count & -32;
      if (done) {
        const scale = f32x4.splat(absmax);
        if (!isFloat<T>()) decodeHalves<T>(packed, y, done, scale, values);
        else if (nf4) decodePairs<Nf4>(packed, y, done, scale);
        else decodePairs<Fp4>(packed, y, done, scale);
      }
    }
    for (let i = done; i < count; i++) {
      const byte: u32 = load<u8>(packed + (i >> 1));
      const code = i & 1 ? byte & 15 : byte >> 4;
      store1<T>(y + i * sizeof<T>(), load<f32>(values + (code << 2)) * absmax);
    }
  }
}

/** f32: a look-up gives the two values of a byte. */
function decodePairs<Type>(packed: usize, y: usize, n: u32, scale: v128): void {
  const end = packed + (n >> 1);
  do {
    const w = load<u64>(packed);
    const lo = <u32>w;
    const hi = <u32>(w >> 32);
    v128.store(y, f32x4.mul(pairs2<Type>((lo << 3) & 0x7f8, (lo >> 5) & 0x7f8), scale));
    v128.store(y, f32x4.mul(pairs2<Type>((lo >> 13) & 0x7f8, (lo >> 21) & 0x7f8), scale), 16);
    v128.store(y, f32x4.mul(pairs2<Type>((hi << 3) & 0x7f8, (hi >> 5) & 0x7f8), scale), 32);
    v128.store(y, f32x4.mul(pairs2<Type>((hi >> 13) & 0x7f8, (hi >> 21) & 0x7f8), scale), 48);
    packed += 8;
    y += 64;
  } while (packed < end);
}

/** Two values each at byte offsets a and b of the type's table: a constant address costs no instruction. */
function pairs2<Type>(a: usize, b: usize): v128 {
  if (isNf4<Type>()) return v128.load64_lane(b, v128.load64_zero(a, NF4_PAIRS), 1, NF4_PAIRS);
  return v128.load64_lane(b, v128.load64_zero(a, FP4_PAIRS), 1, FP4_PAIRS);
}

/** Eight values of the block, rounded. */
function halves8<T>(values: usize, scale: v128): v128 {
  return toFiniteHalves<T>(f32x4.mul(v128.load(values), scale), f32x4.mul(v128.load(values, 16), scale));
}

/** f16 and bf16: the block's 16 values are rounded once; a swizzle per byte of the result looks them up. */
function decodeHalves<T>(packed: usize, y: usize, n: u32, scale: v128, values: usize): void {
  const a = halves8<T>(values, scale);
  const b = halves8<T>(values + 32, scale);
  const byte = i16x8.splat(255);
  const low = i8x16.narrow_i16x8_u(v128.and(a, byte), v128.and(b, byte));
  const high = i8x16.narrow_i16x8_u(i16x8.shr_u(a, 8), i16x8.shr_u(b, 8));
  const nibble = i8x16.splat(15);
  const end = packed + (n >> 1);
  do {
    const bytes = v128.load(packed);
    const odd = v128.and(bytes, nibble);
    const even = v128.and(i16x8.shr_u(bytes, 4), nibble);
    const first = lowBytes(even, odd);
    const second = highBytes(even, odd);
    const firstLow = i8x16.swizzle(low, first);
    const firstHigh = i8x16.swizzle(high, first);
    const secondLow = i8x16.swizzle(low, second);
    const secondHigh = i8x16.swizzle(high, second);
    v128.store(y, lowBytes(firstLow, firstHigh));
    v128.store(y, highBytes(firstLow, firstHigh), 16);
    v128.store(y, lowBytes(secondLow, secondHigh), 32);
    v128.store(y, highBytes(secondLow, secondHigh), 48);
    packed += 16;
    y += 64;
  } while (packed < end);
}
