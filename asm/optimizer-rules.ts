/**
 * The update rules on float32 memory, in place: n elements, a multiple of 4, of parameters, gradients and states. Every
 * operation is rounded by itself. `row` is the step's row of scalars, `step` what the update is multiplied by, `decay`
 * the factor of a float32 parameter (1 where the caller rounds parameters and multiplies them).
 *
 * Each answers whether it may have written a NaN, whose bits differ from machine to machine: the caller makes them the
 * one NaN. A NaN in a new state reaches the parameter, so that one comparison sees both; only lion's does not always.
 *
 * The order of a second moment's factors is upstream's, which in two rules differs between states in float32 and in 8
 * bits (`Eight`).
 */
import {
  FAMILY_ADAGRAD,
  FAMILY_ADAM,
  FAMILY_ADEMAMIX,
  FAMILY_LION,
  FAMILY_MOMENTUM,
  FAMILY_RMSPROP,
  SCALAR_ALPHA,
  SCALAR_BETA1,
  SCALAR_BETA2,
  SCALAR_BETA3,
  SCALAR_EPS,
  SCALAR_FIRST,
  SCALAR_REST1,
  SCALAR_REST2,
  SCALAR_REST3,
  SCALAR_SCALE1,
  SCALAR_SCALE2,
} from "./generated/constants";
import { isOn } from "./kernel";

/** A scalar of a row. */
export function scalar(row: usize, position: u32): f32 {
  return load<f32>(row + position * 4);
}

function splat(row: usize, position: u32): v128 {
  return f32x4.splat(scalar(row, position));
}

/** One step of a family. m: the first or only state; m2: ademamix's second row; v: the second moment. */
export function update<Eight>(
  family: u32,
  row: usize,
  gnormScale: f32,
  step: f32,
  decay: f32,
  p: usize,
  g: usize,
  m: usize,
  m2: usize,
  v: usize,
  n: u32,
): bool {
  if (family == FAMILY_ADAM) return adam<Eight>(row, gnormScale, step, decay, p, g, m, v, n);
  if (family == FAMILY_ADEMAMIX) return ademamix(row, gnormScale, step, decay, p, g, m, m2, v, n);
  if (family == FAMILY_MOMENTUM) return momentum(row, gnormScale, step, p, g, m, n);
  if (family == FAMILY_RMSPROP) {
    return rootOfSquares<Eight>(
      scalar(row, SCALAR_BETA1),
      scalar(row, SCALAR_REST1),
      row,
      gnormScale,
      step,
      p,
      g,
      m,
      n,
    );
  }
  // A product with 1 is exact: v + g * g.
  if (family == FAMILY_ADAGRAD) return rootOfSquares<Eight>(1, 1, row, gnormScale, step, p, g, m, n);
  if (family != FAMILY_LION) unreachable();
  return lion(row, gnormScale, step, decay, p, g, m, n);
}

/** 1 / (root + eps) */
function reciprocal(root: v128, eps: v128): v128 {
  return f32x4.div(f32x4.splat(1), f32x4.add(root, eps));
}

/** What there is of NaN in x, beside what there was. */
function withNaN(seen: v128, x: v128): v128 {
  return v128.or(seen, f32x4.ne(x, x));
}

function adam<Eight>(
  row: usize,
  gnormScale: f32,
  step: f32,
  decay: f32,
  p: usize,
  g: usize,
  m: usize,
  v: usize,
  n: u32,
): bool {
  const scale = f32x4.splat(gnormScale);
  const beta1 = splat(row, SCALAR_BETA1);
  const rest1 = splat(row, SCALAR_REST1);
  const beta2 = splat(row, SCALAR_BETA2);
  const rest2 = splat(row, SCALAR_REST2);
  const eps = splat(row, SCALAR_EPS);
  const by = f32x4.splat(step);
  const kept = f32x4.splat(decay);
  let seen = i32x4.splat(0);
  for (let i: u32 = 0, end = n * 4; i < end; i += 16) {
    const grad = f32x4.mul(v128.load(g + i), scale);
    const square = isOn<Eight>() ? f32x4.mul(f32x4.mul(rest2, grad), grad) : f32x4.mul(rest2, f32x4.mul(grad, grad));
    const second = f32x4.add(f32x4.mul(v128.load(v + i), beta2), square);
    v128.store(v + i, second);
    const first = f32x4.add(f32x4.mul(v128.load(m + i), beta1), f32x4.mul(rest1, grad));
    v128.store(m + i, first);
    const move = f32x4.mul(by, f32x4.mul(first, reciprocal(f32x4.sqrt(second), eps)));
    const moved = f32x4.mul(f32x4.sub(v128.load(p + i), move), kept);
    v128.store(p + i, moved);
    seen = withNaN(seen, moved);
  }
  return v128.any_true(seen);
}

function ademamix(
  row: usize,
  gnormScale: f32,
  step: f32,
  decay: f32,
  p: usize,
  g: usize,
  m: usize,
  m2: usize,
  v: usize,
  n: u32,
): bool {
  const scale = f32x4.splat(gnormScale);
  const beta1 = splat(row, SCALAR_BETA1);
  const rest1 = splat(row, SCALAR_REST1);
  const beta2 = splat(row, SCALAR_BETA2);
  const rest2 = splat(row, SCALAR_REST2);
  const beta3 = splat(row, SCALAR_BETA3);
  const rest3 = splat(row, SCALAR_REST3);
  const alpha = splat(row, SCALAR_ALPHA);
  const scale1 = splat(row, SCALAR_SCALE1);
  const scale2 = splat(row, SCALAR_SCALE2);
  const eps = splat(row, SCALAR_EPS);
  const by = f32x4.splat(step);
  const kept = f32x4.splat(decay);
  let seen = i32x4.splat(0);
  for (let i: u32 = 0, end = n * 4; i < end; i += 16) {
    const grad = f32x4.mul(v128.load(g + i), scale);
    const second = f32x4.add(f32x4.mul(v128.load(v + i), beta2), f32x4.mul(f32x4.mul(rest2, grad), grad));
    v128.store(v + i, second);
    const slow = f32x4.add(f32x4.mul(v128.load(m2 + i), beta3), f32x4.mul(rest3, grad));
    v128.store(m2 + i, slow);
    const fast = f32x4.add(f32x4.mul(v128.load(m + i), beta1), f32x4.mul(rest1, grad));
    v128.store(m + i, fast);
    const mix = f32x4.add(f32x4.mul(fast, scale1), f32x4.mul(alpha, slow));
    const move = f32x4.mul(by, f32x4.mul(mix, reciprocal(f32x4.mul(f32x4.sqrt(second), scale2), eps)));
    const moved = f32x4.mul(f32x4.sub(v128.load(p + i), move), kept);
    v128.store(p + i, moved);
    seen = withNaN(seen, moved);
  }
  return v128.any_true(seen);
}

function momentum(row: usize, gnormScale: f32, step: f32, p: usize, g: usize, m: usize, n: u32): bool {
  const scale = f32x4.splat(gnormScale);
  const beta1 = splat(row, SCALAR_BETA1);
  const by = f32x4.splat(step);
  // At the first step nothing of the state counts, not even NaN.
  const counts = i32x4.splat(scalar(row, SCALAR_FIRST) != 0 ? 0 : -1);
  let seen = i32x4.splat(0);
  for (let i: u32 = 0, end = n * 4; i < end; i += 16) {
    const grad = f32x4.mul(v128.load(g + i), scale);
    const sum = f32x4.add(f32x4.mul(v128.load(m + i), beta1), grad);
    const state = v128.bitselect(sum, grad, counts);
    v128.store(m + i, state);
    const moved = f32x4.sub(v128.load(p + i), f32x4.mul(by, state));
    v128.store(p + i, moved);
    seen = withNaN(seen, moved);
  }
  return v128.any_true(seen);
}

/** rmsprop, and adagrad with beta = rest = 1. */
function rootOfSquares<Eight>(
  beta: f32,
  rest: f32,
  row: usize,
  gnormScale: f32,
  step: f32,
  p: usize,
  g: usize,
  v: usize,
  n: u32,
): bool {
  const scale = f32x4.splat(gnormScale);
  const beta1 = f32x4.splat(beta);
  const rest1 = f32x4.splat(rest);
  const eps = splat(row, SCALAR_EPS);
  const by = f32x4.splat(step);
  let seen = i32x4.splat(0);
  for (let i: u32 = 0, end = n * 4; i < end; i += 16) {
    const grad = f32x4.mul(v128.load(g + i), scale);
    const square = isOn<Eight>() ? f32x4.mul(rest1, f32x4.mul(grad, grad)) : f32x4.mul(f32x4.mul(rest1, grad), grad);
    const state = f32x4.add(f32x4.mul(v128.load(v + i), beta1), square);
    v128.store(v + i, state);
    const move = f32x4.mul(by, f32x4.mul(grad, reciprocal(f32x4.sqrt(state), eps)));
    const moved = f32x4.sub(v128.load(p + i), move);
    v128.store(p + i, moved);
    seen = withNaN(seen, moved);
  }
  return v128.any_true(seen);
}

function lion(row: usize, gnormScale: f32, step: f32, decay: f32, p: usize, g: usize, m: usize, n: u32): bool {
  const scale = f32x4.splat(gnormScale);
  const beta1 = splat(row, SCALAR_BETA1);
  const rest1 = splat(row, SCALAR_REST1);
  const beta2 = splat(row, SCALAR_BETA2);
  const rest2 = splat(row, SCALAR_REST2);
  const by = f32x4.splat(step);
  const kept = f32x4.splat(decay);
  let seen = i32x4.splat(0);
  for (let i: u32 = 0, end = n * 4; i < end; i += 16) {
    const grad = f32x4.mul(v128.load(g + i), scale);
    const old = v128.load(m + i);
    const state = f32x4.add(f32x4.mul(old, beta2), f32x4.mul(rest2, grad));
    v128.store(m + i, state);
    const direction = sign(f32x4.add(f32x4.mul(old, beta1), f32x4.mul(rest1, grad)));
    const moved = f32x4.sub(f32x4.mul(v128.load(p + i), kept), f32x4.mul(by, direction));
    v128.store(p + i, moved);
    // A NaN, too, where infinities meet: it costs a look.
    seen = withNaN(seen, f32x4.add(moved, state));
  }
  return v128.any_true(seen);
}

/** 1, -1, +0 for zeros, NaN for NaN. */
function sign(x: v128): v128 {
  const one = v128.or(v128.and(x, i32x4.splat(0x80000000)), f32x4.splat(1));
  return v128.or(v128.and(one, f32x4.ne(x, f32x4.splat(0))), f32x4.ne(x, x));
}
