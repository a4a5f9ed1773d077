/**
 * Sums of squares in a fixed order. Of a chunk, in float32: lane l of 256 adds the squares of elements l, l + 256, ...
 * in this order; then lane i takes in lane i + h for h = 128, 64, ... 1. Of what chunks gave, in float64 and 1,024
 * lanes, the same way.
 */
import { NORM_LANES, NORM_SUM_LANES } from "./generated/constants";
import { load1, load4 } from "./kernel";

/** Bytes of a chunk's lanes. */
export const LANES_BYTES: u32 = NORM_LANES * 4;

export function clearLanes(lanes: usize): void {
  const zero = i32x4.splat(0);
  for (const end = lanes + LANES_BYTES; lanes < end; lanes += 32) {
    v128.store(lanes, zero);
    v128.store(lanes, zero, 16);
  }
}

/** Takes in the squares of `count` <= 256 elements: the lanes' next row. */
export function addRow<T>(lanes: usize, x: usize, count: u32): void {
  const whole = count & -4;
  for (const end = lanes + whole * 4; lanes < end; lanes += 16, x += 4 * sizeof<T>()) {
    v128.store(lanes, addSquare<T>(v128.load(lanes), x));
  }
  for (let i = whole; i < count; i++, lanes += 4, x += sizeof<T>()) {
    const value = load1<T>(x);
    store<f32>(lanes, load<f32>(lanes) + value * value);
  }
}

/** Takes in `count` elements, row by row: several rows at a time would read memory by leaps, three times slower. */
export function addRows<T>(lanes: usize, x: usize, count: u32): void {
  for (; count > 0; x += NORM_LANES * sizeof<T>()) {
    const some = min(count, NORM_LANES);
    addRow<T>(lanes, x, some);
    count -= some;
  }
}

function addSquare<T>(sum: v128, x: usize): v128 {
  const value = load4<T>(x);
  return f32x4.add(sum, f32x4.mul(value, value));
}

/** The lanes' sum; they are used up. */
export function sumOfLanes(lanes: usize): f32 {
  for (let half: u32 = LANES_BYTES / 2; half >= 16; half >>= 1) {
    for (let at = lanes, end = lanes + half; at < end; at += 16) {
      v128.store(at, f32x4.add(v128.load(at), v128.load(at + half)));
    }
  }
  return load<f32>(lanes) + load<f32>(lanes, 8) + (load<f32>(lanes, 4) + load<f32>(lanes, 12));
}

/** Bytes that `sumWide` works in. */
export const WIDE_BYTES: u32 = NORM_SUM_LANES * 8;

/** The float64 sum of `count` float32, `stride` bytes apart, or of their squares. */
export function sumWide(x: usize, stride: u32, count: u32, square: bool, lanes: usize): f64 {
  if (count == 0) return 0;
  const used = min(count, NORM_SUM_LANES);
  for (let i: u32 = 0; i < count; i++, x += stride) {
    const value: f64 = load<f32>(x);
    const term = square ? value * value : value;
    const lane = lanes + (i % NORM_SUM_LANES) * 8;
    store<f64>(lane, i < NORM_SUM_LANES ? term : load<f64>(lane) + term);
  }
  // Lanes without an element hold 0, which changes no sum of squares.
  for (let half: u32 = NORM_SUM_LANES / 2; half > 0; half >>= 1) {
    for (let i: u32 = 0; i < half && i + half < used; i++) {
      const lane = lanes + i * 8;
      store<f64>(lane, load<f64>(lane) + load<f64>(lane + half * 8));
    }
  }
  return load<f64>(lanes);
}
