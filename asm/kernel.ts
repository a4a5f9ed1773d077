/**
 * What the kernels share: element types, conversions, vector loads and stores.
 *
 * A kernel is written once, generic over its element type, and branches on it at compile time. f16 and bf16 have no type
 * of their own: an integer of their size stands for each, and nothing else uses those two.
 * Everything is strict SIMD: the same bits on every machine. NaN is written in one form per type, because machines
 * differ in the NaN that they produce.
 */

/** IEEE binary16 */
export type f16 = u16;
/** bfloat16: the upper half of a binary32 */
export type bf16 = i16;

export const ABS: u32 = 0x7fffffff;
export const INFINITY: u32 = 0x7f800000;
export const NAN: u32 = 0x7fc00000;
/** The smallest normal float32. */
export const SMALLEST_NORMAL: f32 = 1.1754943508222875e-38;

/** Largest magnitude that `storeFinite8` rounds correctly: a T's largest finite value. */
export function maxFinite<T>(): f32 {
  if (isFloat<T>() || isSigned<T>()) return f32.MAX_VALUE;
  return 65504.0;
}

/** Whether T is i8, u8 or i32. */
export function isIntegral<T>(): bool {
  return isInteger<T>() && sizeof<T>() != 2;
}

// Conversions of four lanes. A half's bits are the lower 16 of a 32-bit lane.

/** f16 bits to f32. The product is exact: it only moves the exponent, and makes subnormals normal. */
export function fromF16(h: v128): v128 {
  const m = v128.and(h, i32x4.splat(0x7fff));
  const sign = i32x4.shl(v128.xor(h, m), 16);
  const finite = f32x4.mul(i32x4.shl(m, 13), f32x4.splat(5.192296858534828e33));
  const orInfinity = v128.bitselect(i32x4.splat(INFINITY), finite, i32x4.eq(m, i32x4.splat(0x7c00)));
  return v128.bitselect(i32x4.splat(NAN), v128.or(orInfinity, sign), i32x4.gt_s(m, i32x4.splat(0x7c00)));
}

/**
 * |x| up to 65536 to f16 bits without the sign, nearest even. Adding 2^13 times the power of two of |x| (of the smallest
 * normal f16 for what is below) leaves just f16's bits at the end of the mantissa, rounded by the addition.
 */
function roundF16(a: v128): v128 {
  const exponent = i32x4.max_s(v128.and(a, i32x4.splat(INFINITY)), i32x4.splat(113 << 23));
  const magic = i32x4.add(exponent, i32x4.splat(13 << 23));
  const mantissa = i32x4.sub(f32x4.add(a, magic), magic);
  return i32x4.add(mantissa, i32x4.sub(i32x4.shr_u(exponent, 13), i32x4.splat(113 << 10)));
}

/** f32 to f16 bits, nearest even; overflow to infinity. */
export function toF16(v: v128): v128 {
  const a = v128.and(v, i32x4.splat(ABS));
  const h = roundF16(i32x4.min_s(a, i32x4.splat(0x47800000)));
  const signed = v128.or(h, v128.and(i32x4.shr_u(v, 16), i32x4.splat(0x8000)));
  return v128.bitselect(i32x4.splat(0x7e00), signed, i32x4.gt_s(a, i32x4.splat(INFINITY)));
}

/** `toF16` of magnitudes below 65520. */
function toF16Finite(v: v128): v128 {
  const h = roundF16(v128.and(v, i32x4.splat(ABS)));
  return v128.or(h, v128.and(i32x4.shr_u(v, 16), i32x4.splat(0x8000)));
}

/** f32 to bf16 bits, nearest even, of anything but NaN. */
function toBf16Finite(v: v128): v128 {
  const odd = v128.and(i32x4.shr_u(v, 16), i32x4.splat(1));
  return i32x4.shr_u(i32x4.add(i32x4.add(v, i32x4.splat(0x7fff)), odd), 16);
}

/** f32 to bf16 bits, nearest even; overflow to infinity. */
export function toBf16(v: v128): v128 {
  return v128.bitselect(toBf16Finite(v), i32x4.splat(NAN >> 16), f32x4.eq(v, v));
}

/** f32 with its one NaN. */
function oneNaN(v: v128): v128 {
  return v128.bitselect(v, i32x4.splat(NAN), f32x4.eq(v, v));
}

// Loads and stores. T is f32, f16, bf16, i8, u8 or i32.

/** Four integers. */
export function loadInt4<T>(p: usize): v128 {
  if (sizeof<T>() == 4) return v128.load(p);
  const bytes = v128.load32_zero(p);
  if (isSigned<T>()) return i32x4.extend_low_i16x8_s(i16x8.extend_low_i8x16_s(bytes));
  return i32x4.extend_low_i16x8_u(i16x8.extend_low_i8x16_u(bytes));
}

/** Four elements as f32. */
export function load4<T>(p: usize): v128 {
  if (isFloat<T>()) return v128.load(p);
  if (sizeof<T>() == 2) {
    if (isSigned<T>()) return i32x4.shl(v128.load16x4_u(p), 16);
    return fromF16(v128.load16x4_u(p));
  }
  return f32x4.convert_i32x4_s(loadInt4<T>(p));
}

/** One element as f32. */
export function load1<T>(p: usize): f32 {
  if (isFloat<T>()) return load<f32>(p);
  if (sizeof<T>() == 2) {
    if (isSigned<T>()) return reinterpret<f32>((<u32>load<u16>(p)) << 16);
    return f32x4.extract_lane(fromF16(i32x4.splat(load<u16>(p))), 0);
  }
  return <f32>load<T>(p);
}

/** Eight integers of 32 bits, saturated. */
export function storeInt8<T>(p: usize, a: v128, b: v128): void {
  if (sizeof<T>() == 4) {
    v128.store(p, a);
    v128.store(p, b, 16);
    return;
  }
  const words = i16x8.narrow_i32x4_s(a, b);
  const bytes = isSigned<T>() ? i8x16.narrow_i16x8_s(words, words) : i8x16.narrow_i16x8_u(words, words);
  v128.store64_lane(p, bytes, 0);
}

/** Eight f32: halves rounded to nearest even, integers truncated and saturated (NaN gives 0). */
export function store8<T>(p: usize, a: v128, b: v128): void {
  if (isFloat<T>()) {
    v128.store(p, oneNaN(a));
    v128.store(p, oneNaN(b), 16);
  } else if (sizeof<T>() == 2) {
    if (isSigned<T>()) v128.store(p, i16x8.narrow_i32x4_u(toBf16(a), toBf16(b)));
    else v128.store(p, i16x8.narrow_i32x4_u(toF16(a), toF16(b)));
  } else {
    storeInt8<T>(p, i32x4.trunc_sat_f32x4_s(a), i32x4.trunc_sat_f32x4_s(b));
  }
}

/** `store8` into a floating-point type where |x| <= maxFinite<T>() is known. */
export function storeFinite8<T>(p: usize, a: v128, b: v128): void {
  if (isFloat<T>()) {
    v128.store(p, a);
    v128.store(p, b, 16);
  } else if (isSigned<T>()) {
    v128.store(p, i16x8.narrow_i32x4_u(toBf16Finite(a), toBf16Finite(b)));
  } else {
    v128.store(p, i16x8.narrow_i32x4_u(toF16Finite(a), toF16Finite(b)));
  }
}

/** One element of `store8`. */
export function store1<T>(p: usize, x: f32): void {
  const v = f32x4.splat(x);
  if (isFloat<T>()) store<f32>(p, x == x ? x : reinterpret<f32>(NAN));
  else if (sizeof<T>() != 2) storeInt1<T>(p, i32x4.extract_lane(i32x4.trunc_sat_f32x4_s(v), 0));
  else if (isSigned<T>()) store<u16>(p, <u16>i32x4.extract_lane(toBf16(v), 0));
  else store<u16>(p, <u16>i32x4.extract_lane(toF16(v), 0));
}

/** One element of `storeInt8`. */
export function storeInt1<T>(p: usize, x: i32): void {
  if (sizeof<T>() == 4) store<i32>(p, x);
  else store<T>(p, <T>(isSigned<T>() ? min(max(x, -128), 127) : min(max(x, 0), 255)));
}

// Scaling finite floating-point elements by a factor, rounded once.

/** What `scale4` wants as factor. */
export function scaleFactor<T>(r: f32): v128 {
  if (isFloat<T>() || isSigned<T>()) return f32x4.splat(r);
  return f32x4.splat(r * 5.192296858534828e33);
}

/** Largest r that `scale4` takes. */
export function maxScale<T>(): f32 {
  if (isFloat<T>() || isSigned<T>()) return f32.MAX_VALUE;
  return 32768.0;
}

/**
 * Four finite elements times a factor. An f16 is read as the float32 with the same bits after the sign, which is 2^-112
 * times its value; the factor makes up for it, so the exact product is the same and is rounded once.
 */
export function scale4<T>(p: usize, factor: v128): v128 {
  if (isFloat<T>() || isSigned<T>()) return f32x4.mul(load4<T>(p), factor);
  const bits = v128.and(i32x4.shl(v128.load16x4_s(p), 13), i32x4.splat(0x8fffe000));
  return f32x4.mul(bits, factor);
}

/**
 * The largest magnitude of n elements as the bits of a float32, found among integers: a NaN counts as larger than
 * infinity, so that one comparison tells whether all are finite.
 */
export function absmaxBits<T>(p: usize, n: u32): u32 {
  const step: u32 = 64 / sizeof<T>();
  const vectors = n & -step;
  let a = i32x4.splat(0);
  let b = a;
  let c = a;
  let d = a;
  for (const end = p + vectors * sizeof<T>(); p < end; p += 64) {
    a = maxMagnitude<T>(a, v128.load(p));
    b = maxMagnitude<T>(b, v128.load(p, 16));
    c = maxMagnitude<T>(c, v128.load(p, 32));
    d = maxMagnitude<T>(d, v128.load(p, 48));
  }
  for (const end = p + (n - vectors) * sizeof<T>(); p < end; p += sizeof<T>()) {
    if (isFloat<T>()) a = maxMagnitude<T>(a, i32x4.splat(load<i32>(p)));
    else a = maxMagnitude<T>(a, i16x8.splat(load<i16>(p)));
  }
  a = maxLanes<T>(maxLanes<T>(a, b), maxLanes<T>(c, d));
  if (isFloat<T>()) {
    a = i32x4.max_s(a, i32x4.shuffle(a, a, 2, 3, 0, 1));
    a = i32x4.max_s(a, i32x4.shuffle(a, a, 1, 0, 3, 2));
    return i32x4.extract_lane(a, 0);
  }
  a = i16x8.max_s(a, i32x4.shuffle(a, a, 2, 3, 0, 1));
  a = i16x8.max_s(a, i32x4.shuffle(a, a, 1, 0, 3, 2));
  a = i16x8.max_s(a, i16x8.shuffle(a, a, 1, 0, 3, 2, 5, 4, 7, 6));
  const bits: u32 = i16x8.extract_lane_u(a, 0);
  if (isSigned<T>()) return bits << 16;
  return reinterpret<u32>(f32x4.extract_lane(fromF16(i32x4.splat(bits)), 0));
}

function maxMagnitude<T>(max: v128, x: v128): v128 {
  if (isFloat<T>()) return i32x4.max_s(max, v128.and(x, i32x4.splat(ABS)));
  return i16x8.max_s(max, v128.and(x, i16x8.splat(0x7fff)));
}

function maxLanes<T>(a: v128, b: v128): v128 {
  return isFloat<T>() ? i32x4.max_s(a, b) : i16x8.max_s(a, b);
}

/** The largest |x| of n elements, with NaN ignored. */
export function absmaxIgnoringNaN<T>(p: usize, n: u32): f32 {
  let max: f32 = 0;
  for (const end = p + n * sizeof<T>(); p < end; p += sizeof<T>()) {
    const x = abs(load1<T>(p));
    if (x > max) max = x;
  }
  return max;
}

/** x with denormals flushed to zero. */
export function flushed(x: f32): f32 {
  return abs(x) < SMALLEST_NORMAL ? 0 : x;
}
