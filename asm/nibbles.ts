/**
 * What the 4-bit products share: weights decoded to float32, and activations beside them.
 *
 * Both are kept in groups of 32 columns; what is behind the end of a row is 0. For f32 a group's columns are in order: a look-up
 * gives the two values of a byte. For f16 and bf16 the 16 even ones come before the 16 odd ones: a look-up gives one byte of 16
 * values, whose codes are the high nibbles of 16 bytes or the low ones.
 */
import { FP4_PAIRS, FP4_VALUES, NF4, NF4_PAIRS, NF4_VALUES } from "./generated/constants";
import { INFINITY, isF16, load1, load4, maxFinite, store1, toFiniteHalves } from "./kernel";

/** Columns of a group. */
export const GROUP: u32 = 32;

// The 4-bit type as a compile-time switch.
export type Nf4 = u8;
export type Fp4 = u16;
export function isNf4<Type>(): bool {
  return sizeof<Type>() == sizeof<Nf4>();
}

export function valuesOf(quantType: u32): usize {
  return quantType == NF4 ? NF4_VALUES : FP4_VALUES;
}

/** Where column i of a row lies in its groups. */
export function place<T>(i: u32): u32 {
  if (isFloat<T>()) return i;
  return (i & ~31) | ((i & 1) << 4) | ((i & 31) >> 1);
}

// @ts-expect-error: decorator
@inline
export function highNibbles(bytes: v128): v128 {
  return v128.and(i16x8.shr_u(bytes, 4), i8x16.splat(15));
}

// @ts-expect-error: decorator
@inline
export function lowNibbles(bytes: v128): v128 {
  return v128.and(bytes, i8x16.splat(15));
}

// @ts-expect-error: decorator
@inline
export function lowBytes(a: v128, b: v128): v128 {
  return i8x16.shuffle(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
}

// @ts-expect-error: decorator
@inline
export function highBytes(a: v128, b: v128): v128 {
  return i8x16.shuffle(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}

// @ts-expect-error: decorator
@inline
export function lowWords(a: v128, b: v128): v128 {
  return i16x8.shuffle(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
}

// @ts-expect-error: decorator
@inline
export function highWords(a: v128, b: v128): v128 {
  return i16x8.shuffle(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
}

// @ts-expect-error: decorator
@inline
export function lowDwords(a: v128, b: v128): v128 {
  return i32x4.shuffle(a, b, 0, 4, 1, 5);
}

// @ts-expect-error: decorator
@inline
export function highDwords(a: v128, b: v128): v128 {
  return i32x4.shuffle(a, b, 2, 6, 3, 7);
}

// f32: code * absmax.

/** Two values each of the bytes at bits `a` and `b` of w: a table at a constant address costs no instruction. */
// @ts-expect-error: decorator
@inline
function pairs2<Type>(w: u32, a: i32, b: i32): v128 {
  const x = (a < 3 ? w << (3 - a) : w >> (a - 3)) & 0x7f8;
  const y = (w >> (b - 3)) & 0x7f8;
  if (isNf4<Type>()) return v128.load64_lane(y, v128.load64_zero(x, NF4_PAIRS), 1, NF4_PAIRS);
  return v128.load64_lane(y, v128.load64_zero(x, FP4_PAIRS), 1, FP4_PAIRS);
}

/** sum + a * values of 16 codes, in four lanes. */
// @ts-expect-error: decorator
@inline
export function dotPairs<Type>(sum: v128, a: usize, codes: usize, scale: v128): v128 {
  const w = load<u64>(codes);
  const low = <u32>w;
  const high = <u32>(w >> 32);
  sum = f32x4.add(sum, f32x4.mul(v128.load(a), f32x4.mul(pairs2<Type>(low, 0, 8), scale)));
  sum = f32x4.add(sum, f32x4.mul(v128.load(a, 16), f32x4.mul(pairs2<Type>(low, 16, 24), scale)));
  sum = f32x4.add(sum, f32x4.mul(v128.load(a, 32), f32x4.mul(pairs2<Type>(high, 0, 8), scale)));
  return f32x4.add(sum, f32x4.mul(v128.load(a, 48), f32x4.mul(pairs2<Type>(high, 16, 24), scale)));
}

/** Decodes whole groups of f32. */
function decodePairs<Type>(codes: usize, y: usize, groups: u32, factor: f32): void {
  const scale = f32x4.splat(factor);
  for (const end = codes + groups * 16; codes < end; codes += 8) {
    const w = load<u64>(codes);
    const low = <u32>w;
    const high = <u32>(w >> 32);
    v128.store(y, f32x4.mul(pairs2<Type>(low, 0, 8), scale));
    v128.store(y, f32x4.mul(pairs2<Type>(low, 16, 24), scale), 16);
    v128.store(y, f32x4.mul(pairs2<Type>(high, 0, 8), scale), 32);
    v128.store(y, f32x4.mul(pairs2<Type>(high, 16, 24), scale), 48);
    y += 64;
  }
}

// f16 and bf16: a block's 16 values are rounded once; then they are looked up. All are exact as float32.

/** Four finite values to the nearest f16, as float32: the sum's last bit is worth the last bit of an f16 like x. */
// @ts-expect-error: decorator
@inline
function roundedToF16(x: v128): v128 {
  const exponent = i32x4.max_s(v128.and(x, i32x4.splat(INFINITY)), i32x4.splat(113 << 23));
  const magic = i32x4.add(exponent, i32x4.splat((13 << 23) | 0x400000));
  return f32x4.sub(f32x4.add(x, magic), magic);
}

/** Whether a block with this absmax has only finite values of type T. */
export function isFiniteScale<T>(absmax: f32): bool {
  return abs(absmax) <= maxFinite<T>();
}

/** The bytes 0 of four lanes, then their bytes 1, 2 and 3. */
const BYTES: v128 = i8x16(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);

/** Bytes of what `writePlanes` writes, and a little more. */
export const PLANES: u32 = 64;

/** Writes bytes 1, 2 and 3 of 16 values code * absmax, rounded to T; bytes 0 are 0. So are bytes 1 of bf16, which are left out. */
// @ts-expect-error: decorator
@inline
export function writePlanes<T>(planes: usize, values: usize, absmax: f32): void {
  const scale = f32x4.splat(absmax);
  let v0 = f32x4.mul(v128.load(values), scale);
  let v1 = f32x4.mul(v128.load(values, 16), scale);
  let v2 = f32x4.mul(v128.load(values, 32), scale);
  let v3 = f32x4.mul(v128.load(values, 48), scale);
  if (!isF16<T>()) {
    const a = toFiniteHalves<T>(v0, v1);
    const b = toFiniteHalves<T>(v2, v3);
    const byte = i16x8.splat(255);
    v128.store(planes, i8x16.narrow_i16x8_u(v128.and(a, byte), v128.and(b, byte)), 16);
    v128.store(planes, i8x16.narrow_i16x8_u(i16x8.shr_u(a, 8), i16x8.shr_u(b, 8)), 32);
    return;
  }
  v0 = roundedToF16(v0);
  v1 = roundedToF16(v1);
  v2 = roundedToF16(v2);
  v3 = roundedToF16(v3);
  v0 = i8x16.swizzle(v0, BYTES);
  v1 = i8x16.swizzle(v1, BYTES);
  v2 = i8x16.swizzle(v2, BYTES);
  v3 = i8x16.swizzle(v3, BYTES);
  const low01 = lowDwords(v0, v1);
  const low23 = lowDwords(v2, v3);
  const high01 = highDwords(v0, v1);
  const high23 = highDwords(v2, v3);
  v128.store(planes, i64x2.shuffle(low01, low23, 1, 3));
  v128.store(planes, i64x2.shuffle(high01, high23, 0, 2), 16);
  v128.store(planes, i64x2.shuffle(high01, high23, 1, 3), 32);
}

/** sum + a * values of 16 codes, one a byte, in four lanes: a look-up per byte of the values, then their bytes are put together. */
// @ts-expect-error: decorator
@inline
export function dot16<T>(sum: v128, codes: v128, a: usize, t1: v128, t2: v128, t3: v128): v128 {
  const low = lowHalves<T>(codes, t1);
  const high = highHalves<T>(codes, t1);
  const b2 = i8x16.swizzle(t2, codes);
  const b3 = i8x16.swizzle(t3, codes);
  const lowUpper = lowBytes(b2, b3);
  const highUpper = highBytes(b2, b3);
  sum = f32x4.add(sum, f32x4.mul(v128.load(a), lowWords(low, lowUpper)));
  sum = f32x4.add(sum, f32x4.mul(v128.load(a, 16), highWords(low, lowUpper)));
  sum = f32x4.add(sum, f32x4.mul(v128.load(a, 32), lowWords(high, highUpper)));
  return f32x4.add(sum, f32x4.mul(v128.load(a, 48), highWords(high, highUpper)));
}

/** The lower 16 bits of the values of the first eight codes. */
// @ts-expect-error: decorator
@inline
function lowHalves<T>(codes: v128, t1: v128): v128 {
  if (isF16<T>()) return lowBytes(i8x16.splat(0), i8x16.swizzle(t1, codes));
  return i8x16.splat(0);
}

// @ts-expect-error: decorator
@inline
function highHalves<T>(codes: v128, t1: v128): v128 {
  if (isF16<T>()) return highBytes(i8x16.splat(0), i8x16.swizzle(t1, codes));
  return i8x16.splat(0);
}

/** y[0..16) = the values of 16 codes. */
// @ts-expect-error: decorator
@inline
function decode16<T>(y: usize, codes: v128, t1: v128, t2: v128, t3: v128): void {
  const low = lowHalves<T>(codes, t1);
  const high = highHalves<T>(codes, t1);
  const b2 = i8x16.swizzle(t2, codes);
  const b3 = i8x16.swizzle(t3, codes);
  const lowUpper = lowBytes(b2, b3);
  const highUpper = highBytes(b2, b3);
  v128.store(y, lowWords(low, lowUpper));
  v128.store(y, highWords(low, lowUpper), 16);
  v128.store(y, lowWords(high, highUpper), 32);
  v128.store(y, highWords(high, highUpper), 48);
}

/** Decodes whole groups of f16 or bf16. */
function decodePlanes<T>(packed: usize, y: usize, groups: u32, planes: usize): void {
  const t1 = v128.load(planes);
  const t2 = v128.load(planes, 16);
  const t3 = v128.load(planes, 32);
  for (const end = packed + groups * 16; packed < end; packed += 16) {
    const bytes = v128.load(packed);
    decode16<T>(y, highNibbles(bytes), t1, t2, t3);
    decode16<T>(y + 64, lowNibbles(bytes), t1, t2, t3);
    y += 128;
  }
}

/**
 * Decodes `count` elements of a weight from element `first` on, code * absmax rounded to T, into whole groups. `work` has 64 bytes
 * for planes and count / 2 + 16 for codes.
 */
export function decodeScaled<T>(
  packed: usize,
  absmax: usize,
  first: u64,
  count: u32,
  blocksize: u32,
  values: usize,
  y: usize,
  work: usize,
): void {
  let codes = packed + <usize>(first >> 1);
  if (<u32>first & 1 || count % GROUP) {
    alignCodes(codes, work + 64, <u32>first & 1, count);
    codes = work + 64;
  }
  let scale = absmax + (<usize>(first / blocksize) << 2);
  let left = blocksize - <u32>(first % blocksize);
  for (let i: u32 = 0; i < count; ) {
    const run = min(left, count - i);
    const column = i;
    const end = i + run;
    const factor = load<f32>(scale);
    // The groups that lie within the block; what is beside them is done one by one.
    const firstWhole = min((i + GROUP - 1) & -GROUP, end);
    const whole = isFiniteScale<T>(factor) ? (end - firstWhole) & -GROUP : 0;
    if (whole) {
      const from = codes + (firstWhole >> 1);
      const to = y + firstWhole * 4;
      if (!isFloat<T>()) {
        writePlanes<T>(work, values, factor);
        decodePlanes<T>(from, to, whole / GROUP, work);
      } else if (values == NF4_VALUES) decodePairs<Nf4>(from, to, whole / GROUP, factor);
      else decodePairs<Fp4>(from, to, whole / GROUP, factor);
    }
    for (i = column; i < end; i++) {
      if (whole && i == firstWhole) i += whole;
      if (i == end) break;
      const byte: u32 = load<u8>(codes + (i >> 1));
      const value = load<f32>(values + ((i & 1 ? byte & 15 : byte >> 4) << 2)) * factor;
      store<f32>(y + place<T>(i) * 4, roundedTo<T>(value, work));
    }
    left -= run;
    if (left == 0) {
      left = blocksize;
      scale += 4;
    }
  }
  for (let i = count; i % GROUP; i++) store<f32>(y + place<T>(i) * 4, 0);
}

function roundedTo<T>(x: f32, work: usize): f32 {
  store1<T>(work, x);
  return load1<T>(work);
}

/** Codes from an odd nibble on, or up to an odd end, as a stream of their own; reads no byte that has none of them. */
export function alignCodes(from: usize, to: usize, odd: u32, count: u32): void {
  const bytes = (count + 1) >> 1;
  if (!odd) {
    memory.copy(to, from, bytes);
    return;
  }
  let i: u32 = 0;
  for (; i + 17 <= bytes; i += 16) {
    const high = v128.and(i16x8.shl(v128.load(from + i), 4), i8x16.splat(-16));
    v128.store(to + i, v128.or(high, highNibbles(v128.load(from + i, 1))));
  }
  for (; i < bytes; i++) {
    const next: u32 = i + 1 < bytes || count % 2 == 0 ? load<u8>(from + i, 1) >> 4 : 0;
    store<u8>(to + i, (load<u8>(from + i) << 4) | next);
  }
}

/** Activations as float32 in whole groups. */
export function groupRow<T>(x: usize, y: usize, count: u32): void {
  if (isFloat<T>()) {
    memory.copy(y, x, count * 4);
    memory.fill(y + count * 4, 0, (-count & (GROUP - 1)) * 4);
    return;
  }
  const whole = count & -GROUP;
  for (const end = x + whole * sizeof<T>(); x < end; x += 32 * sizeof<T>()) {
    group8<T>(x, y);
    group8<T>(x + 8 * sizeof<T>(), y + 16);
    group8<T>(x + 16 * sizeof<T>(), y + 32);
    group8<T>(x + 24 * sizeof<T>(), y + 48);
    y += 128;
  }
  const rest = count - whole;
  if (!rest) return;
  memory.fill(y, 0, 128);
  for (let i: u32 = 0; i < rest; i++) store<f32>(y + place<T>(i) * 4, load1<T>(x + i * sizeof<T>()));
}

// @ts-expect-error: decorator
@inline
function group8<T>(x: usize, y: usize): void {
  const a = load4<T>(x);
  const b = load4<T>(x + 4 * sizeof<T>());
  v128.store(y, i32x4.shuffle(a, b, 0, 2, 4, 6));
  v128.store(y, i32x4.shuffle(a, b, 1, 3, 5, 7), 64);
}
