/**
 * One step of an optimizer on the tensors of a list, chunk by chunk; see src/core/optimizers.ts for lists, rows and the
 * guard, and asm/optimizer-rules.ts for the rules.
 *
 * A chunk is done in blocks of 256. The rules work on float32: on a tensor's own memory where it is that, else on
 * buffers in thread-private memory, which stay in the first cache. The end of a tensor that fills no vector goes
 * through buffers too, so nothing reads or writes past it.
 */
import {
  F32,
  FAMILY_ADAM,
  FAMILY_ADAGRAD,
  FAMILY_ADEMAMIX,
  FAMILY_LION,
  FAMILY_MOMENTUM,
  GUARD_SKIP,
  GUARD_SKIPPED,
  LIST_ABSMAX1,
  LIST_ABSMAX2,
  LIST_FIRST,
  LIST_G,
  LIST_N,
  LIST_P,
  LIST_RECORD_BYTES,
  LIST_STATE1,
  LIST_STATE2,
  OPTIMIZER_BLOCK,
  OPTIMIZER_CHUNK,
  SCALAR_DECAY,
  SCALAR_GNORM_SCALE,
  SCALAR_L2,
  SCALAR_STEP,
  SCALAR_UNIT,
  STEP_ROW,
  ZERO_CODE_FIRST,
  ZERO_CODE_SECOND,
} from "./generated/constants";
import {
  OptimizerNorms8bitBlockwise as N8,
  OptimizerNorms32bit as N32,
  OptimizerUpdate8bitBlockwise as Q,
  OptimizerRatios as R,
} from "./generated/operands";
import { isOn, Off, On, store1 } from "./kernel";
import {
  addDecay,
  BUFFER_BYTES,
  bytesOf,
  decodeState,
  encodeState,
  pack,
  putBack,
  scaleRounded,
  tidyNaN,
  unpack,
} from "./optimizer-blocks";
import { scalar, update } from "./optimizer-rules";
import { addRow, clearLanes, LANES_BYTES, sumOfLanes } from "./squares";
import { scratch } from "./stream";

/** One step, states in float32. Unit: chunk. */
export function optimizerUpdate32bit(op: usize, begin: u32, end: u32): void {
  updateChunks<Off>(op, begin, end);
}

/** One step, states in 8 bits. Unit: chunk. */
export function optimizerUpdate8bitBlockwise(op: usize, begin: u32, end: u32): void {
  updateChunks<On>(op, begin, end);
}

/** Sums of squares of parameters and of what a step would do to them. Unit: chunk. */
export function optimizerNorms32bit(op: usize, begin: u32, end: u32): void {
  normsOfChunks<Off>(op, begin, end, load<usize>(op, N32.partial));
}

export function optimizerNorms8bitBlockwise(op: usize, begin: u32, end: u32): void {
  normsOfChunks<On>(op, begin, end, load<usize>(op, N8.partial));
}

/** The row of scalars that holds for this step, or 0 when it is skipped. */
function rowOf(scalars: usize, guard: usize, known: u32): usize {
  if (!guard) return scalars;
  if (load<u32>(guard + GUARD_SKIP * 4)) return 0;
  return scalars + (load<u32>(guard + GUARD_SKIPPED * 4) - known) * (STEP_ROW * 4);
}

// Buffers, by number.
const P: u32 = 0;
const G: u32 = 1;
const M: u32 = 2;
const M2: u32 = 3;
const V: u32 = 4;
/** The gradient with decay. */
const REGULAR: u32 = 5;
/** What `skipZeros` may put back, or the update whose norm is asked for. */
const KEPT_P: u32 = 6;
const KEPT_M: u32 = 7;
const KEPT_M2: u32 = 8;
const KEPT_V: u32 = 9;
const UPDATE: u32 = 6;
const P_LANES: u32 = 7;
const U_LANES: u32 = 8;
const ZEROS: u32 = 9;

function buffer(which: u32): usize {
  return scratch() + which * BUFFER_BYTES;
}

/** Whether a block can be worked on where it lies: vectors of 8 elements fit. */
function fits(count: u32): bool {
  return (count & 7) == 0;
}

/** A block of elements as float32: where it is, or in a buffer. */
function floats(dtype: u32, at: usize, count: u32, which: u32): usize {
  if (dtype == F32 && fits(count)) return at;
  unpack(dtype, at, buffer(which), count);
  return buffer(which);
}

/** A block of a state as float32. Element `i` of the state, block `b` of its scales. */
function openState<Eight>(state: usize, absmax: usize, i: u32, b: u32, code: usize, count: u32, which: u32): usize {
  if (!isOn<Eight>()) return floats(F32, state + i * 4, count, which);
  decodeState(state + i, absmax + b * 4, code, buffer(which), count);
  return buffer(which);
}

function closeState<Eight>(
  x: usize,
  state: usize,
  absmax: usize,
  i: u32,
  b: u32,
  code: usize,
  table: usize,
  zeroCode: u32,
  count: u32,
): void {
  if (isOn<Eight>()) encodeState(x, state + i, absmax + b * 4, code, table, zeroCode, count);
  else if (x != state + i * 4) pack(F32, x, state + i * 4, count, 1);
}

function hasSecond(family: u32): bool {
  return family == FAMILY_ADAM || family == FAMILY_ADEMAMIX;
}

function updateChunks<Eight>(op: usize, begin: u32, end: u32): void {
  const row = rowOf(load<usize>(op, Q.scalars), load<usize>(op, Q.guard), load<u32>(op, Q.known));
  if (!row) return;
  const ratios = load<usize>(op, Q.ratios);
  for (let c = begin; c < end; c++) {
    const index = load<u32>(load<usize>(op, Q.chunks) + c * 4);
    const record = load<usize>(op, Q.list) + index * LIST_RECORD_BYTES;
    const step = scalar(row, SCALAR_STEP) * (ratios ? load<f32>(ratios + index * 4) : <f32>1);
    const first = (c - load<u32>(record + LIST_FIRST)) * OPTIMIZER_CHUNK;
    const last = first + min(OPTIMIZER_CHUNK, load<u32>(record + LIST_N) - first);
    for (let i = first; i < last; i += OPTIMIZER_BLOCK) {
      updateBlock<Eight>(op, record, row, step, i, min(OPTIMIZER_BLOCK, last - i));
    }
  }
}

function keep(x: usize, which: u32, n: u32): void {
  memory.copy(buffer(which), x, n * 4);
  tidyNaN(buffer(which), n);
}

function updateBlock<Eight>(op: usize, record: usize, row: usize, step: f32, i: u32, count: u32): void {
  const family = load<u32>(op, Q.family);
  const dtype = load<u32>(op, Q.dtype);
  const gradDtype = load<u32>(op, Q.gradDtype);
  const skipZeros = load<u32>(op, Q.skipZeros) != 0;
  const code1: usize = isOn<Eight>() ? load<usize>(op, Q.code1) : 0;
  const code2: usize = isOn<Eight>() ? load<usize>(op, Q.code2) : 0;
  const n = load<u32>(record + LIST_N);
  const state1 = load<usize>(record + LIST_STATE1);
  const state2 = load<usize>(record + LIST_STATE2);
  const absmax1 = load<usize>(record + LIST_ABSMAX1);
  const absmax2 = load<usize>(record + LIST_ABSMAX2);
  const block = i / OPTIMIZER_BLOCK;
  const block2 = (n + OPTIMIZER_BLOCK - 1) / OPTIMIZER_BLOCK + block;
  const whole = (count + 7) & -8;

  const pAt = load<usize>(record + LIST_P) + i * bytesOf(dtype);
  const g = floats(gradDtype, load<usize>(record + LIST_G) + i * bytesOf(gradDtype), count, G);
  const p = floats(dtype, pAt, count, P);
  const m = openState<Eight>(state1, absmax1, i, block, code1, count, M);
  const m2 = family == FAMILY_ADEMAMIX ? openState<Eight>(state1, absmax1, n + i, block2, code1, count, M2) : 0;
  const v = hasSecond(family) ? openState<Eight>(state2, absmax2, i, block, code2, count, V) : 0;
  if (skipZeros) {
    pack(dtype, p, buffer(KEPT_P), count, 1);
    if (dtype == F32) tidyNaN(buffer(KEPT_P), whole);
    keep(m, KEPT_M, whole);
    if (m2) keep(m2, KEPT_M2, whole);
    if (v) keep(v, KEPT_V, whole);
  }

  let decay: f32 = hasSecond(family) || family == FAMILY_LION ? scalar(row, SCALAR_DECAY) : 1;
  let gradient = g;
  let gnormScale = scalar(row, SCALAR_GNORM_SCALE);
  const l2 = scalar(row, SCALAR_L2);
  if (l2 != 0 && family >= FAMILY_MOMENTUM && family <= FAMILY_ADAGRAD) {
    gradient = buffer(REGULAR);
    addDecay(isOn<Eight>() ? F32 : dtype, g, gnormScale, p, l2, gradient, whole);
    gnormScale = 1;
  }
  if (family == FAMILY_LION && dtype != F32 && decay != 1) {
    scaleRounded(dtype, p, whole, decay);
    decay = 1;
  }
  const decayNow: f32 = dtype == F32 ? decay : 1;
  if (update<Eight>(family, row, gnormScale, step, decayNow, p, gradient, m, m2, v, whole)) {
    if (dtype == F32) tidyNaN(p, whole);
    if (!isOn<Eight>()) {
      tidyNaN(m, whole);
      if (m2) tidyNaN(m2, whole);
      if (v) tidyNaN(v, whole);
    }
  }

  if (p != pAt) pack(dtype, p, pAt, count, decay);
  if (skipZeros) {
    if (dtype == F32) putBack<u32>(pAt, buffer(KEPT_P), g, count);
    else putBack<u16>(pAt, buffer(KEPT_P), g, count);
    putBack<u32>(m, buffer(KEPT_M), g, count);
    if (m2) putBack<u32>(m2, buffer(KEPT_M2), g, count);
    if (v) putBack<u32>(v, buffer(KEPT_V), g, count);
  }
  const table1: usize = isOn<Eight>() ? load<usize>(op, Q.table1) : 0;
  const table2: usize = isOn<Eight>() ? load<usize>(op, Q.table2) : 0;
  closeState<Eight>(m, state1, absmax1, i, block, code1, table1, ZERO_CODE_FIRST, count);
  if (m2) closeState<Eight>(m2, state1, absmax1, n + i, block2, code1, table1, ZERO_CODE_FIRST, count);
  if (v) closeState<Eight>(v, state2, absmax2, i, block, code2, table2, ZERO_CODE_SECOND, count);
}

function normsOfChunks<Eight>(op: usize, begin: u32, end: u32, partial: usize): void {
  const row = rowOf(load<usize>(op, Q.scalars), load<usize>(op, Q.guard), load<u32>(op, Q.known));
  if (!row) return;
  for (let c = begin; c < end; c++) {
    const record = load<usize>(op, Q.list) + load<u32>(load<usize>(op, Q.chunks) + c * 4) * LIST_RECORD_BYTES;
    const first = (c - load<u32>(record + LIST_FIRST)) * OPTIMIZER_CHUNK;
    const last = first + min(OPTIMIZER_CHUNK, load<u32>(record + LIST_N) - first);
    clearLanes(buffer(P_LANES));
    clearLanes(buffer(U_LANES));
    for (let i = first; i < last; i += OPTIMIZER_BLOCK) {
      addBlock<Eight>(op, record, row, i, min(OPTIMIZER_BLOCK, last - i));
    }
    store1<f32>(partial + c * 8, sumOfLanes(buffer(P_LANES)));
    store1<f32>(partial + c * 8 + 4, sumOfLanes(buffer(U_LANES)));
  }
}

/**
 * A block's squares into the lanes. A step of -1 from parameters of zero makes them what is multiplied by the step:
 * 0 - -1 * u = u. Lion's norm is that of its new state. Elements that `skipZeros` leaves alone count as 0.
 */
function addBlock<Eight>(op: usize, record: usize, row: usize, i: u32, count: u32): void {
  const family = load<u32>(op, Q.family);
  const dtype = load<u32>(op, Q.dtype);
  const gradDtype = load<u32>(op, Q.gradDtype);
  const code1: usize = isOn<Eight>() ? load<usize>(op, Q.code1) : 0;
  const code2: usize = isOn<Eight>() ? load<usize>(op, Q.code2) : 0;
  const n = load<u32>(record + LIST_N);
  const state1 = load<usize>(record + LIST_STATE1);
  const absmax1 = load<usize>(record + LIST_ABSMAX1);
  const block = i / OPTIMIZER_BLOCK;

  const p = floats(dtype, load<usize>(record + LIST_P) + i * bytesOf(dtype), count, P);
  addRow<f32>(buffer(P_LANES), p, count);
  const g = floats(gradDtype, load<usize>(record + LIST_G) + i * bytesOf(gradDtype), count, G);
  copyState<Eight>(state1, absmax1, i, block, code1, count, M);
  if (family == FAMILY_ADEMAMIX) {
    const blocks = (n + OPTIMIZER_BLOCK - 1) / OPTIMIZER_BLOCK;
    copyState<Eight>(state1, absmax1, n + i, blocks + block, code1, count, M2);
  }
  if (hasSecond(family)) {
    copyState<Eight>(load<usize>(record + LIST_STATE2), load<usize>(record + LIST_ABSMAX2), i, block, code2, count, V);
  }
  memory.fill(buffer(UPDATE), 0, LANES_BYTES);
  const gnormScale = scalar(row, SCALAR_GNORM_SCALE);
  update<Eight>(family, row, gnormScale, -1, 1, buffer(UPDATE), g, buffer(M), buffer(M2), buffer(V), (count + 7) & -8);
  const u = buffer(family == FAMILY_LION ? M : UPDATE);
  if (load<u32>(op, Q.skipZeros)) {
    memory.fill(buffer(ZEROS), 0, BUFFER_BYTES);
    putBack<u32>(u, buffer(ZEROS), g, count);
  }
  addRow<f32>(buffer(U_LANES), u, count);
}

/** A block of a state into a buffer, whatever it is. */
function copyState<Eight>(state: usize, absmax: usize, i: u32, b: u32, code: usize, count: u32, which: u32): void {
  if (isOn<Eight>()) decodeState(state + i, absmax + b * 4, code, buffer(which), count);
  else unpack(F32, state + i * 4, buffer(which), count);
}

/** ratios[t] = min(1, (maxUnorm * |p| + eps) / |u|). Unit: record. */
export function optimizerRatios(op: usize, begin: u32, end: u32): void {
  const row = rowOf(load<usize>(op, R.scalars), load<usize>(op, R.guard), load<u32>(op, R.known));
  if (!row) return;
  const maxUnorm = load<f32>(op, R.maxUnorm);
  const eps = load<f32>(op, R.eps);
  const unit = scalar(row, SCALAR_UNIT);
  for (let t = begin; t < end; t++) {
    const norms = load<usize>(op, R.norms) + t * 8;
    const moved = unit * load<f32>(norms, 4);
    const bound = maxUnorm * load<f32>(norms) + eps;
    store1<f32>(load<usize>(op, R.ratios) + t * 4, moved > bound ? bound / moved : <f32>1);
  }
}
