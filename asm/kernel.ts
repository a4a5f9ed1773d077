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

/** Compile-time switches, given as type arguments. */
export type On = u8;
export type Off = u16;
export function isOn<Switch>(): bool {
  return sizeof<Switch>() == sizeof<On>();
}

export const ABS: u32 = 0x7fffffff;
/** 2^112, the value of a finite f16 over that of the float32 with its bits right after the sign. */
const F16_SCALE: f32 = 5.192296858534828e33;
/** Where those bits are. */
const F16_BITS: i32 = 0x8fffe000;
export const INFINITY: u32 = 0x7f800000;
export const NAN: u32 = 0x7fc00000;
/** The smallest normal float32. */
export const SMALLEST_NORMAL: f32 = 1.1754943508222875e-38;

/** Largest magnitude that `storeFinite8` rounds correctly: a T's largest finite value. */
export function maxFinite<T>(): f32 {
  if (isFloat<T>() || isSigned<T>()) return f32.MAX_VALUE;
  return 65504.0;
}

export function isF16<T>(): bool {
  return sizeof<T>() == 2 && !isSigned<T>();
}

/** Whether T is i8, u8 or i32. */
export function isIntegral<T>(): bool {
  return isInteger<T>() && sizeof<T>() != 2;
}

// Conversions. A half's bits are the lower 16 of a 32-bit lane, or a 16-bit lane.

/**
 * f16, sign-extended to 32 bits, to f32. The product is exact: it only moves the exponent, and makes subnormals normal.
 * A NaN keeps its payload.
 */
function fromF16(h: v128): v128 {
  const bits = v128.and(i32x4.shl(h, 13), i32x4.splat(F16_BITS));
  const special = i32x4.gt_s(v128.and(bits, i32x4.splat(ABS)), i32x4.splat(0x7bff << 13));
  return v128.or(f32x4.mul(bits, f32x4.splat(F16_SCALE)), v128.and(special, i32x4.splat(INFINITY)));
}

/**
 * |x| up to 65536 to f16, nearest even: the result plus 126 << 10 in the lower 16 bits, without its sign. Adding 2^13 times
 * the power of two of |x| (of the smallest normal f16 for what is below) leaves just f16's bits at the end of the
 * mantissa, rounded by the addition; the exponent is brought next to them.
 */
function roundF16(a: v128): v128 {
  const exponent = i32x4.max_s(v128.and(a, i32x4.splat(INFINITY)), i32x4.splat(113 << 23));
  const sum = f32x4.add(a, i32x4.add(exponent, i32x4.splat(13 << 23)));
  return v128.and(i32x4.add(sum, i32x4.shr_u(sum, 13)), i32x4.splat(0xffff));
}

/** The two vectors of `roundF16` as f16 bits, with the signs of a and b: as integers, floats saturate to their sign. */
function joinF16(roundedA: v128, roundedB: v128, a: v128, b: v128): v128 {
  const magnitude = i16x8.sub(i16x8.narrow_i32x4_u(roundedA, roundedB), i16x8.splat(<i16>(126 << 10)));
  return v128.or(magnitude, v128.and(i16x8.narrow_i32x4_s(a, b), i16x8.splat(<i16>0x8000)));
}

/** Eight f32 to f16 bits, nearest even; overflow to infinity. */
function toF16(a: v128, b: v128): v128 {
  const limit = i32x4.splat(0x47800000);
  const abs = i32x4.splat(ABS);
  const h = joinF16(
    roundF16(i32x4.min_s(v128.and(a, abs), limit)),
    roundF16(i32x4.min_s(v128.and(b, abs), limit)),
    a,
    b,
  );
  return v128.bitselect(h, i16x8.splat(0x7e00), i16x8.narrow_i32x4_s(f32x4.eq(a, a), f32x4.eq(b, b)));
}

/** Four f32, none of them NaN, to bf16 bits, nearest even; overflow to infinity. */
function roundBf16(v: v128): v128 {
  const odd = v128.and(i32x4.shr_u(v, 16), i32x4.splat(1));
  return i32x4.shr_u(i32x4.add(i32x4.add(v, i32x4.splat(0x7fff)), odd), 16);
}

/** Eight f32 to bf16 bits. */
function toBf16(a: v128, b: v128): v128 {
  const h = i16x8.narrow_i32x4_u(roundBf16(a), roundBf16(b));
  return v128.bitselect(h, i16x8.splat(<i16>(NAN >> 16)), i16x8.narrow_i32x4_s(f32x4.eq(a, a), f32x4.eq(b, b)));
}

/** Eight f32 to the bits of a half type. */
export function toHalves<T>(a: v128, b: v128): v128 {
  return isF16<T>() ? toF16(a, b) : toBf16(a, b);
}

/** The lower four halves of a vector as f32. */
export function lowHalves<T>(h: v128): v128 {
  return isF16<T>() ? fromF16(i32x4.extend_low_i16x8_s(h)) : i32x4.shl(i32x4.extend_low_i16x8_u(h), 16);
}

/** The upper four. */
export function highHalves<T>(h: v128): v128 {
  return isF16<T>() ? fromF16(i32x4.extend_high_i16x8_s(h)) : i32x4.shl(i32x4.extend_high_i16x8_u(h), 16);
}

/** `toHalves` where |x| <= maxFinite<T>() is known. */
export function toFiniteHalves<T>(a: v128, b: v128): v128 {
  if (!isF16<T>()) return i16x8.narrow_i32x4_u(roundBf16(a), roundBf16(b));
  const abs = i32x4.splat(ABS);
  return joinF16(roundF16(v128.and(a, abs)), roundF16(v128.and(b, abs)), a, b);
}

/** f32 with its one NaN. */
export function oneNaN(v: v128): v128 {
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
    return fromF16(v128.load16x4_s(p));
  }
  return f32x4.convert_i32x4_s(loadInt4<T>(p));
}

/** One element as f32. */
export function load1<T>(p: usize): f32 {
  if (isFloat<T>()) return load<f32>(p);
  if (sizeof<T>() == 2) {
    if (isSigned<T>()) return reinterpret<f32>((<u32>load<u16>(p)) << 16);
    return f32x4.extract_lane(fromF16(i32x4.splat(load<i16>(p))), 0);
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
    v128.store(p, toHalves<T>(a, b));
  } else {
    storeInt8<T>(p, i32x4.trunc_sat_f32x4_s(a), i32x4.trunc_sat_f32x4_s(b));
  }
}

/** `store8` into a floating-point type where |x| <= maxFinite<T>() is known. */
export function storeFinite8<T>(p: usize, a: v128, b: v128): void {
  if (isFloat<T>()) {
    v128.store(p, a);
    v128.store(p, b, 16);
  } else {
    v128.store(p, toFiniteHalves<T>(a, b));
  }
}

/** One element of `store8`. */
export function store1<T>(p: usize, x: f32): void {
  const v = f32x4.splat(x);
  if (isFloat<T>()) store<f32>(p, x == x ? x : reinterpret<f32>(NAN));
  else if (sizeof<T>() != 2) storeInt1<T>(p, i32x4.extract_lane(i32x4.trunc_sat_f32x4_s(v), 0));
  else v128.store16_lane(p, toHalves<T>(v, v), 0);
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
  return f32x4.splat(r * F16_SCALE);
}

/** The least absmax whose reciprocal `scaleFactor` takes. */
export function minScaled<T>(): f32 {
  return isF16<T>() ? <f32>(1.0 / 32768) : SMALLEST_NORMAL;
}

/**
 * Four finite elements times a factor. An f16 is read as the float32 with its bits right after the sign; the factor makes
 * up for that, so the exact product is the same and is rounded once.
 */
export function scale4<T>(p: usize, factor: v128): v128 {
  if (isF16<T>()) return f32x4.mul(v128.and(i32x4.shl(v128.load16x4_s(p), 13), i32x4.splat(F16_BITS)), factor);
  return f32x4.mul(load4<T>(p), factor);
}

/** `scale4` of the elements 0, 2, 4, 6 (halves only). */
export function scaleEven4<T>(p: usize, factor: v128): v128 {
  const x = i32x4.shl(v128.load(p), 16);
  return f32x4.mul(isF16<T>() ? v128.and(i32x4.shr_s(x, 3), i32x4.splat(F16_BITS)) : x, factor);
}

/** `scale4` of the elements 1, 3, 5, 7 (halves only). */
export function scaleOdd4<T>(p: usize, factor: v128): v128 {
  const x = v128.load(p);
  const bits = isF16<T>() ? v128.and(i32x4.shr_s(x, 3), i32x4.splat(F16_BITS)) : v128.and(x, i32x4.splat(0xffff0000));
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
  if (isFloat<T>()) return maxOfLanes(a);
  a = i16x8.max_s(a, i32x4.shuffle(a, a, 2, 3, 0, 1));
  a = i16x8.max_s(a, i32x4.shuffle(a, a, 1, 0, 3, 2));
  a = i16x8.max_s(a, i16x8.shuffle(a, a, 1, 0, 3, 2, 5, 4, 7, 6));
  const bits: u32 = i16x8.extract_lane_u(a, 0);
  if (isSigned<T>()) return bits << 16;
  if (bits >= 0x7c00) return INFINITY + (bits & 0x3ff);
  return reinterpret<u32>(reinterpret<f32>(bits << 13) * F16_SCALE);
}

function maxMagnitude<T>(max: v128, x: v128): v128 {
  if (isFloat<T>()) return i32x4.max_s(max, v128.and(x, i32x4.splat(ABS)));
  return i16x8.max_s(max, v128.and(x, i16x8.splat(0x7fff)));
}

function maxLanes<T>(a: v128, b: v128): v128 {
  return isFloat<T>() ? i32x4.max_s(a, b) : i16x8.max_s(a, b);
}

/** `absmaxBits` of consecutive blocks, of which the last may be short. */
export function absmaxOfBlocks<T>(x: usize, absmax: usize, blocks: u32, blocksize: u32, n: u32): void {
  for (let k: u32 = 0; k < blocks; k++) {
    const i = k * blocksize;
    store<u32>(absmax + k * 4, absmaxBits<T>(x + i * sizeof<T>(), min(blocksize, n - i)));
  }
}

/** Whether n words lie between two bounds, both included. */
export function allBetween(p: usize, n: u32, low: u32, high: u32): bool {
  let outside: u32 = 0;
  for (const end = p + n * 4; p < end; p += 4) outside |= u32(load<u32>(p) - low > high - low);
  return !outside;
}

/** `absmaxOfBlocks` of x - offset. */
export function shiftedAbsmaxOfBlocks<T>(
  x: usize,
  absmax: usize,
  blocks: u32,
  blocksize: u32,
  n: u32,
  offset: f32,
): void {
  for (let k: u32 = 0; k < blocks; k++) {
    const i = k * blocksize;
    store<u32>(absmax + k * 4, shiftedAbsmaxBits<T>(x + i * sizeof<T>(), min(blocksize, n - i), offset));
  }
}

function shiftedAbsmaxBits<T>(p: usize, n: u32, offset: f32): u32 {
  const shift = f32x4.splat(offset);
  const whole = n & -4;
  let a = i32x4.splat(0);
  for (const end = p + whole * sizeof<T>(); p < end; p += 4 * sizeof<T>()) {
    a = maxMagnitude<f32>(a, f32x4.sub(load4<T>(p), shift));
  }
  for (const end = p + (n - whole) * sizeof<T>(); p < end; p += sizeof<T>()) {
    a = maxMagnitude<f32>(a, f32x4.splat(load1<T>(p) - offset));
  }
  return maxOfLanes(a);
}

function maxOfLanes(a: v128): u32 {
  a = i32x4.max_s(a, i32x4.shuffle(a, a, 2, 3, 0, 1));
  a = i32x4.max_s(a, i32x4.shuffle(a, a, 1, 0, 3, 2));
  return i32x4.extract_lane(a, 0);
}

/** The largest |x - offset| of n elements, with NaN ignored. */
export function absmaxIgnoringNaN<T>(p: usize, n: u32, offset: f32): f32 {
  let max: f32 = 0;
  for (const end = p + n * sizeof<T>(); p < end; p += sizeof<T>()) {
    const x = abs(load1<T>(p) - offset);
    if (x > max) max = x;
  }
  return max;
}

/** x with denormals flushed to zero. NaN stays: it exceeds no threshold. */
export function flushed4(x: v128): v128 {
  return v128.andnot(x, f32x4.lt(f32x4.abs(x), f32x4.splat(SMALLEST_NORMAL)));
}
