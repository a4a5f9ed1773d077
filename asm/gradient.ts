/**
 * What is done with the gradients of a list: finite or not, norms, scaling. Lists and the guard:
 * src/core/optimizers.ts.
 */
import {
  BF16,
  F16,
  F32,
  GUARD_FOUND,
  GUARD_LAST,
  GUARD_SKIP,
  GUARD_SKIPPED,
  LIST_FIRST,
  LIST_G,
  LIST_INDEX,
  LIST_N,
  LIST_RECORD_BYTES,
  NONE_FOUND,
  OPTIMIZER_CHUNK,
} from "./generated/constants";
import {
  ClipCoefficient as C,
  GradientCheck as K,
  GradientSumSquares as S,
  GradientVerdict as V,
  ScaleGradients as M,
  TensorNorms as T,
} from "./generated/operands";
import { absmaxBits, bf16, f16, INFINITY, load1, load4, store1, store8 } from "./kernel";
import { addRows, clearLanes, sumOfLanes, sumWide } from "./squares";
import { fault, scratch } from "./stream";

/** The record that chunk c of a list belongs to. */
function recordOf(list: usize, chunks: usize, c: u32): usize {
  return list + load<u32>(chunks + c * 4) * LIST_RECORD_BYTES;
}

/** The first element of chunk c. */
function firstOf(record: usize, c: u32): u32 {
  return (c - load<u32>(record + LIST_FIRST)) * OPTIMIZER_CHUNK;
}

function countFrom(record: usize, first: u32): u32 {
  return min(OPTIMIZER_CHUNK, load<u32>(record + LIST_N) - first);
}

/** guard.found = the least index of a record whose gradient is not finite, if that is less. Unit: chunk. */
export function gradientCheck(op: usize, begin: u32, end: u32): void {
  const dtype = load<u32>(op, K.gradDtype);
  if (dtype == F32) check<f32>(op, begin, end);
  else if (dtype == F16) check<f16>(op, begin, end);
  else if (dtype == BF16) check<bf16>(op, begin, end);
  else unreachable();
}

function check<G>(op: usize, begin: u32, end: u32): void {
  const found = load<usize>(op, K.guard) + GUARD_FOUND * 4;
  for (let c = begin; c < end; c++) {
    const record = recordOf(load<usize>(op, K.list), load<usize>(op, K.chunks), c);
    const first = firstOf(record, c);
    const g = load<usize>(record + LIST_G) + first * sizeof<G>();
    if (absmaxBits<G>(g, countFrom(record, first)) < INFINITY) continue;
    const index = load<u32>(record + LIST_INDEX);
    let seen = atomic.load<u32>(found);
    while (index < seen) {
      const before = atomic.cmpxchg<u32>(found, seen, index);
      if (before == seen) break;
      seen = before;
    }
  }
}

/** Whether the step under way is skipped. Unit: the guard. */
export function gradientVerdict(op: usize, begin: u32, end: u32): void {
  if (begin == end) return;
  const guard = load<usize>(op, V.guard);
  const found = load<u32>(guard + GUARD_FOUND * 4);
  const skip = found != NONE_FOUND;
  store<u32>(guard + GUARD_SKIP * 4, u32(skip));
  if (!skip) return;
  store<u32>(guard + GUARD_SKIPPED * 4, load<u32>(guard + GUARD_SKIPPED * 4) + 1);
  store<u32>(guard + GUARD_LAST * 4, found);
  store<u32>(guard + GUARD_FOUND * 4, NONE_FOUND);
  if (!load<u32>(op, V.allowNonFinite)) fault(op, found);
}

/** partial[c] = sum of squares of chunk c. Unit: chunk. */
export function gradientSumSquares(op: usize, begin: u32, end: u32): void {
  const dtype = load<u32>(op, S.gradDtype);
  if (dtype == F32) sumSquares<f32>(op, begin, end);
  else if (dtype == F16) sumSquares<f16>(op, begin, end);
  else if (dtype == BF16) sumSquares<bf16>(op, begin, end);
  else unreachable();
}

function sumSquares<G>(op: usize, begin: u32, end: u32): void {
  const partial = load<usize>(op, S.partial);
  for (let c = begin; c < end; c++) {
    const record = recordOf(load<usize>(op, S.list), load<usize>(op, S.chunks), c);
    const first = firstOf(record, c);
    clearLanes(scratch());
    addRows<G>(scratch(), load<usize>(record + LIST_G) + first * sizeof<G>(), countFrom(record, first));
    store1<f32>(partial + c * 4, sumOfLanes(scratch()));
  }
}

/** norms[t * width + j] = f32(sqrt(sum over the chunks c of record t of partial[c * width + j])). Unit: record. */
export function tensorNorms(op: usize, begin: u32, end: u32): void {
  const width = load<u32>(op, T.width);
  for (let t = begin; t < end; t++) {
    const record = load<usize>(op, T.list) + t * LIST_RECORD_BYTES;
    const n = load<u32>(record + LIST_N);
    const chunks = n / OPTIMIZER_CHUNK + u32(n % OPTIMIZER_CHUNK != 0);
    const partial = load<usize>(op, T.partial) + load<u32>(record + LIST_FIRST) * width * 4;
    for (let j: u32 = 0; j < width; j++) {
      const sum = sumWide(partial + j * 4, width * 4, chunks, false, scratch());
      store1<f32>(load<usize>(op, T.norms) + (t * width + j) * 4, <f32>sqrt(sum));
    }
  }
}

/** result[0] = the norm of `count` norms, result[1] = min(1, maxNorm / (result[0] + 1e-6)). Unit: all of it. */
export function clipCoefficient(op: usize, begin: u32, end: u32): void {
  if (begin == end) return;
  const result = load<usize>(op, C.result);
  const norm = <f32>sqrt(sumWide(load<usize>(op, C.norms), 4, load<u32>(op, C.count), true, scratch()));
  store1<f32>(result, norm);
  const keeps = load<u32>(op, C.errors) != 0 && !isFinite(norm);
  store1<f32>(result + 4, keeps ? 1 : min<f32>(1, load<f32>(op, C.maxNorm) / (norm + <f32>1e-6)));
}

/** Multiplies the gradients by factor[0]; 1 leaves them alone. Unit: chunk. */
export function scaleGradients(op: usize, begin: u32, end: u32): void {
  const dtype = load<u32>(op, M.gradDtype);
  if (load<f32>(load<usize>(op, M.factor)) == 1) return;
  if (dtype == F32) scale<f32>(op, begin, end);
  else if (dtype == F16) scale<f16>(op, begin, end);
  else if (dtype == BF16) scale<bf16>(op, begin, end);
  else unreachable();
}

function scale<G>(op: usize, begin: u32, end: u32): void {
  const factor = load<f32>(load<usize>(op, M.factor));
  const by = f32x4.splat(factor);
  for (let c = begin; c < end; c++) {
    const record = recordOf(load<usize>(op, M.list), load<usize>(op, M.chunks), c);
    const first = firstOf(record, c);
    const count = countFrom(record, first);
    const g = load<usize>(record + LIST_G) + first * sizeof<G>();
    const whole = count & -8;
    for (let p = g, end = g + whole * sizeof<G>(); p < end; p += 8 * sizeof<G>()) {
      store8<G>(p, f32x4.mul(load4<G>(p), by), f32x4.mul(load4<G>(p + 4 * sizeof<G>()), by));
    }
    for (let i = whole; i < count; i++) {
      const p = g + i * sizeof<G>();
      store1<G>(p, load1<G>(p) * factor);
    }
  }
}
