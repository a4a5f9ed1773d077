/**
 * The summation tree: float64 sums of chunks of 1,024 elements, level upon level. In a chunk, lane l of 32 adds up the
 * elements l, l + 32, l + 64 ... in this order; then lane i takes in lane i + h for h = 16, 8, 4, 2, 1. Both backends add
 * in this order, whatever the number of threads.
 */
import { BF16, F16, F32, SUM_CHUNK, SUM_LANES } from "./generated/constants";
import { MeanOfSums, SumChunks, SumPartials as P } from "./generated/operands";
import { bf16, f16, load1, load4, store1, store8 } from "./kernel";

/** y[c] = sum of chunk c. Unit: chunk. */
export function sumChunks(op: usize, begin: u32, end: u32): void {
  if (load<u32>(op, SumChunks.wide)) chunks<f64>(op, begin, end);
  else chunks<f32>(op, begin, end);
}

/** y[0] = f32(the rest of the tree over x / n). Unit: the one result. */
export function meanOfSums(op: usize, begin: u32, end: u32): void {
  if (begin == end) return;
  const x = load<usize>(op, MeanOfSums.x);
  const sums = load<u32>(op, MeanOfSums.sums);
  const sum = sums <= SUM_CHUNK ? node<f64>(x, sums, 0, 1) : nodeOfChunks(x, sums, 0, 1);
  store1<f32>(load<usize>(op, MeanOfSums.y), <f32>(sum / <f64>load<u32>(op, MeanOfSums.n)));
}

function chunks<T>(op: usize, begin: u32, end: u32): void {
  const x = load<usize>(op, SumChunks.x);
  const y = load<usize>(op, SumChunks.y);
  const n = load<u32>(op, SumChunks.n);
  for (let c = begin; c < end; c++) {
    const first = c * SUM_CHUNK;
    const count = min(SUM_CHUNK, n - first);
    const p = x + first * sizeof<T>();
    store<f64>(y + c * 8, count == SUM_CHUNK ? wholeChunk<T>(p) : node<T>(p, count, 0, 1));
  }
}

/** Two lanes at a time: they and those 8, 16 and 24 further meet in the tree's first two steps. */
function wholeChunk<T>(p: usize): f64 {
  const s = f64x2.add(
    f64x2.add(lanePairs<T>(p), lanePairs<T>(p + 4 * sizeof<T>())),
    f64x2.add(lanePairs<T>(p + 2 * sizeof<T>()), lanePairs<T>(p + 6 * sizeof<T>())),
  );
  return f64x2.extract_lane(s, 0) + f64x2.extract_lane(s, 1);
}

function lanePairs<T>(p: usize): v128 {
  let a = f64x2.splat(0);
  let b = a;
  let c = a;
  let d = a;
  for (const end = p + SUM_CHUNK * sizeof<T>(); p < end; p += SUM_LANES * sizeof<T>()) {
    a = f64x2.add(a, load2<T>(p));
    b = f64x2.add(b, load2<T>(p + 8 * sizeof<T>()));
    c = f64x2.add(c, load2<T>(p + 16 * sizeof<T>()));
    d = f64x2.add(d, load2<T>(p + 24 * sizeof<T>()));
  }
  return f64x2.add(f64x2.add(a, c), f64x2.add(b, d));
}

function load2<T>(p: usize): v128 {
  return sizeof<T>() == 8 ? v128.load(p) : f64x2.promote_low_f32x4(v128.load64_zero(p));
}

/** What lane i holds after the steps of the tree down to `step`, in a chunk of `count` elements. */
function node<T>(p: usize, count: u32, i: u32, step: u32): f64 {
  if (step < SUM_LANES) return node<T>(p, count, i, 2 * step) + node<T>(p, count, i + step, 2 * step);
  let sum: f64 = 0;
  for (; i < count; i += SUM_LANES) sum += <f64>load<T>(p + i * sizeof<T>());
  return sum;
}

/** `node` of a chunk whose elements are the sums of chunks of `count` f64. */
function nodeOfChunks(p: usize, count: u32, i: u32, step: u32): f64 {
  if (step < SUM_LANES) return nodeOfChunks(p, count, i, 2 * step) + nodeOfChunks(p, count, i + step, 2 * step);
  let sum: f64 = 0;
  for (; i * SUM_CHUNK < count; i += SUM_LANES) {
    const first = i * SUM_CHUNK;
    sum += node<f64>(p + first * 8, min(SUM_CHUNK, count - first), 0, 1);
  }
  return sum;
}

/** y[r, c] = the sum of x[s, r, c] over s, in order, + bias[c]. Unit: row. */
export function sumPartials(op: usize, begin: u32, end: u32): void {
  const dtype = load<u32>(op, P.dtype);
  if (dtype == F32) partials<f32>(op, begin, end);
  else if (dtype == F16) partials<f16>(op, begin, end);
  else if (dtype == BF16) partials<bf16>(op, begin, end);
  else unreachable();
}

function partials<T>(op: usize, begin: u32, end: u32): void {
  const cols = load<u32>(op, P.cols);
  const splits = load<u32>(op, P.splits);
  const bias = load<usize>(op, P.bias);
  const step: usize = load<usize>(op, P.rows) * cols * 4;
  for (let row = begin; row < end; row++) {
    const first: usize = <usize>row * cols;
    const x = load<usize>(op, P.x) + first * 4;
    const y = load<usize>(op, P.y) + first * sizeof<T>();
    const whole = cols & -8;
    for (let c: u32 = 0; c < whole; c += 8) {
      let p = x + c * 4;
      let a = f32x4.splat(0);
      let b = a;
      for (let s: u32 = 0; s < splits; s++, p += step) {
        a = f32x4.add(a, v128.load(p));
        b = f32x4.add(b, v128.load(p, 16));
      }
      if (bias) {
        a = f32x4.add(a, load4<T>(bias + c * sizeof<T>()));
        b = f32x4.add(b, load4<T>(bias + (c + 4) * sizeof<T>()));
      }
      store8<T>(y + c * sizeof<T>(), a, b);
    }
    for (let c = whole; c < cols; c++) {
      let p = x + c * 4;
      let sum: f32 = 0;
      for (let s: u32 = 0; s < splits; s++, p += step) sum += load<f32>(p);
      if (bias) sum += load1<T>(bias + c * sizeof<T>());
      store1<T>(y + c * sizeof<T>(), sum);
    }
  }
}
