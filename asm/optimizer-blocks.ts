/**
 * What the optimizers do with a block of at most 256 elements beside the update: 16-bit elements and 8-bit states
 * become float32 in thread-private memory, and go back.
 *
 * A buffer holds a block and zeros up to a multiple of ROUND elements, so that only what touches a tensor minds the
 * end.
 *
 * An 8-bit state is code[q] * absmax. Going back: A = max |s|, the nearest code to s * (1 / A), by table, or to s / A
 * where the reciprocal could lose bits. A block of zeros gets absmax 0 and a code of its own. With NaN or infinity
 * (where nobody checked the gradients) NaN does not count for A and gets code 0, and s / A is what counts.
 */
import { dequantizeFast, quantizeFast } from "./blockwise";
import {
  BF16,
  F16,
  F32,
  LEAST_STATE_SCALE,
  MOST_STATE_SCALE,
  OPTIMIZER_BLOCK,
  SEARCH_HEADER,
} from "./generated/constants";
import {
  absmaxBits,
  absmaxIgnoringNaN,
  bf16,
  f16,
  highHalves,
  INFINITY,
  load1,
  load4,
  lowHalves,
  Off,
  oneNaN,
  store1,
  toHalves,
  SMALLEST_NORMAL,
} from "./kernel";

/** Elements that buffers are filled up to a multiple of. */
export const ROUND: u32 = 16;
/** Bytes of a buffer: neighbours do not begin on the same lines of a cache. */
export const BUFFER_BYTES: u32 = OPTIMIZER_BLOCK * 4 + 64;

export function bytesOf(dtype: u32): u32 {
  return dtype == F32 ? 4 : 2;
}

/** Zeros from element `count` on, up to a multiple of ROUND. */
function pad(buffer: usize, count: u32): void {
  for (let i = count; i & (ROUND - 1); i++) store<f32>(buffer + i * 4, 0);
}

/** A tensor's elements into a buffer. */
export function unpack(dtype: u32, src: usize, buffer: usize, count: u32): void {
  if (dtype == F32) unpackAs<f32>(src, buffer, count);
  else if (dtype == F16) unpackAs<f16>(src, buffer, count);
  else if (dtype == BF16) unpackAs<bf16>(src, buffer, count);
  else unreachable();
}

function unpackAs<T>(src: usize, buffer: usize, count: u32): void {
  const whole = count & -8;
  for (let i: u32 = 0; i < whole; i += 8) {
    v128.store(buffer + i * 4, load4<T>(src + i * sizeof<T>()));
    v128.store(buffer + i * 4, load4<T>(src + (i + 4) * sizeof<T>()), 16);
  }
  for (let i = whole; i < count; i++) store<f32>(buffer + i * 4, load1<T>(src + i * sizeof<T>()));
  pad(buffer, count);
}

/** A buffer into a tensor: rounded, and where `decay` is not 1, times it and rounded again. */
export function pack(dtype: u32, buffer: usize, dst: usize, count: u32, decay: f32): void {
  if (dtype == F32) packWords(buffer, dst, count);
  else if (dtype == F16) packHalves<f16>(buffer, dst, count, decay);
  else if (dtype == BF16) packHalves<bf16>(buffer, dst, count, decay);
  else unreachable();
}

/** Float32 as it is: the update has seen to decay and NaN. */
function packWords(buffer: usize, dst: usize, count: u32): void {
  const whole = count & -4;
  for (let i: u32 = 0; i < whole; i += 4) v128.store(dst + i * 4, v128.load(buffer + i * 4));
  for (let i = whole; i < count; i++) store<u32>(dst + i * 4, load<u32>(buffer + i * 4));
}

function packHalves<T>(buffer: usize, dst: usize, count: u32, decay: f32): void {
  const whole = count & -8;
  const factor = f32x4.splat(decay);
  if (decay == 1) {
    for (let i: u32 = 0; i < whole; i += 8) v128.store(dst + i * 2, rounded8<T>(buffer + i * 4));
  } else {
    for (let i: u32 = 0; i < whole; i += 8) v128.store(dst + i * 2, scaled8<T>(rounded8<T>(buffer + i * 4), factor));
  }
  for (let i = whole; i < count; i++) {
    const p = dst + i * 2;
    store1<T>(p, load<f32>(buffer + i * 4));
    if (decay != 1) store1<T>(p, load1<T>(p) * decay);
  }
}

function rounded8<T>(p: usize): v128 {
  return toHalves<T>(v128.load(p), v128.load(p, 16));
}

function scaled8<T>(h: v128, factor: v128): v128 {
  return toHalves<T>(f32x4.mul(lowHalves<T>(h), factor), f32x4.mul(highHalves<T>(h), factor));
}

/** A buffer of elements of a 16-bit type, times `factor` and rounded. */
export function scaleRounded(dtype: u32, buffer: usize, n: u32, factor: f32): void {
  if (dtype == F16) scaleRoundedAs<f16>(buffer, n, factor);
  else scaleRoundedAs<bf16>(buffer, n, factor);
}

function scaleRoundedAs<T>(buffer: usize, n: u32, factor: f32): void {
  const by = f32x4.splat(factor);
  for (const end = buffer + n * 4; buffer < end; buffer += 32) {
    const h = toHalves<T>(f32x4.mul(v128.load(buffer), by), f32x4.mul(v128.load(buffer, 16), by));
    v128.store(buffer, lowHalves<T>(h));
    v128.store(buffer, highHalves<T>(h), 16);
  }
}

/** out = g * scale + l2 * p, rounded to dtype (F32: as it is). */
export function addDecay(dtype: u32, g: usize, scale: f32, p: usize, l2: f32, out: usize, n: u32): void {
  if (dtype == F32) addDecayAs<f32>(g, scale, p, l2, out, n);
  else if (dtype == F16) addDecayAs<f16>(g, scale, p, l2, out, n);
  else if (dtype == BF16) addDecayAs<bf16>(g, scale, p, l2, out, n);
  else unreachable();
}

function addDecayAs<T>(g: usize, scale: f32, p: usize, l2: f32, out: usize, n: u32): void {
  const by = f32x4.splat(scale);
  const decay = f32x4.splat(l2);
  for (const end = out + n * 4; out < end; out += 32, g += 32, p += 32) {
    const a = f32x4.add(f32x4.mul(v128.load(g), by), f32x4.mul(decay, v128.load(p)));
    const b = f32x4.add(f32x4.mul(v128.load(g, 16), by), f32x4.mul(decay, v128.load(p, 16)));
    if (isFloat<T>()) {
      v128.store(out, a);
      v128.store(out, b, 16);
    } else {
      const h = toHalves<T>(a, b);
      v128.store(out, lowHalves<T>(h));
      v128.store(out, highHalves<T>(h), 16);
    }
  }
}

/** Gives every NaN of n float32 its one form. */
export function tidyNaN(p: usize, n: u32): void {
  for (const end = p + n * 4; p < end; p += 16) v128.store(p, oneNaN(v128.load(p)));
}

/** Puts back what was kept where the gradient, float32, is zero: elements of 4 or 2 bytes. */
export function putBack<T>(p: usize, kept: usize, g: usize, count: u32): void {
  const zero = f32x4.splat(0);
  const whole = count & -8;
  for (let i: u32 = 0; i < whole; i += 8) {
    const a = f32x4.eq(v128.load(g + i * 4), zero);
    const b = f32x4.eq(v128.load(g + i * 4, 16), zero);
    const at = p + i * sizeof<T>();
    const from = kept + i * sizeof<T>();
    if (sizeof<T>() == 4) {
      v128.store(at, v128.bitselect(v128.load(from), v128.load(at), a));
      v128.store(at, v128.bitselect(v128.load(from, 16), v128.load(at, 16), b), 16);
    } else {
      v128.store(at, v128.bitselect(v128.load(from), v128.load(at), i16x8.narrow_i32x4_s(a, b)));
    }
  }
  for (let i = whole; i < count; i++) {
    if (load<f32>(g + i * 4) == 0) store<T>(p + i * sizeof<T>(), load<T>(kept + i * sizeof<T>()));
  }
}

/** A block of an 8-bit state into a buffer. */
export function decodeState(q: usize, absmaxAt: usize, code: usize, buffer: usize, count: u32): void {
  const absmax = load<f32>(absmaxAt);
  const whole = count & -8;
  if (whole) dequantizeFast<f32, Off>(q, buffer, whole, code, absmax, 0);
  for (let i = whole; i < count; i++) {
    store<f32>(buffer + i * 4, load<f32>(code + ((<usize>load<u8>(q + i)) << 2)) * absmax);
  }
  pad(buffer, count);
}

/** A buffer, which is used up, into a block of an 8-bit state. */
export function encodeState(
  buffer: usize,
  q: usize,
  absmaxAt: usize,
  code: usize,
  table: usize,
  zeroCode: u32,
  count: u32,
): void {
  // Codes beyond `count` are dropped; any bits have an entry in the table.
  const n = (count + ROUND - 1) & -ROUND;
  const bits = absmaxBits<f32>(buffer, count);
  let absmax = bits < INFINITY ? reinterpret<f32>(bits) : absmaxIgnoringNaN<f32>(buffer, count, 0);
  // Decaying, a denormal scale comes to rest before it is 0.
  if (absmax < SMALLEST_NORMAL) absmax = 0;
  store<f32>(absmaxAt, absmax);
  if (absmax == 0) {
    memory.fill(q, <u8>zeroCode, count);
    return;
  }
  let scaleAt = absmaxAt;
  if (bits >= INFINITY || absmax < LEAST_STATE_SCALE || absmax > MOST_STATE_SCALE) {
    divide(buffer, n, absmax, load<f32>(code));
    scaleAt = buffer + n * 4;
    store<f32>(scaleAt, 1);
  }
  const codes = count == n ? q : buffer;
  quantizeFast<f32, Off, Off>(buffer, codes, scaleAt, 1, n, table + SEARCH_HEADER, 0);
  if (codes != q) memory.copy(q, codes, count);
}

/** NaN becomes the value of code 0. */
function divide(p: usize, n: u32, by: f32, lowest: f32): void {
  const divisor = f32x4.splat(by);
  for (const end = p + n * 4; p < end; p += 16) {
    const s = f32x4.div(v128.load(p), divisor);
    v128.store(p, v128.bitselect(s, f32x4.splat(lowest), f32x4.eq(s, s)));
  }
}
