/** Sparse matrices as coordinates. */
import { BF16, F16, F32, SPMM_WIDTH } from "./generated/constants";
import { SpmmCoo } from "./generated/operands";
import { bf16, f16, load1, load4, store1, store8 } from "./kernel";

/**
 * y[r, n] = sum over entries (r, c, v), in their order, of v * b[c, n], in float32, rounded once. Entries whose column b does not
 * have count as 0. Unit: SPMM_WIDTH columns of a row, those of a row innermost.
 */
export function spmmCoo(op: usize, begin: u32, end: u32): void {
  const dtype = load<u32>(op, SpmmCoo.dtype);
  if (dtype == F32) multiplyRows<f32>(op, begin, end);
  else if (dtype == F16) multiplyRows<f16>(op, begin, end);
  else if (dtype == BF16) multiplyRows<bf16>(op, begin, end);
  else unreachable();
}

function multiplyRows<T>(op: usize, begin: u32, end: u32): void {
  const n = load<u32>(op, SpmmCoo.n);
  const across = (n + SPMM_WIDTH - 1) / SPMM_WIDTH;
  for (let unit = begin; unit < end; unit++) {
    const row = unit / across;
    const first = firstEntry(op, row);
    const last = firstEntry(op, row + 1);
    let column = (unit % across) * SPMM_WIDTH;
    const stop = min<u32>(column + SPMM_WIDTH, n);
    for (; column + 16 <= stop; column += 16) multiply16<T>(op, row, first, last, column);
    for (; column < stop; column++) multiply1<T>(op, row, first, last, column);
  }
}

/** The first entry whose row is not below `row`. */
function firstEntry(op: usize, row: u32): u32 {
  const rowidx = load<usize>(op, SpmmCoo.rowidx);
  let low: u32 = 0;
  let high = load<u32>(op, SpmmCoo.nnz);
  while (low < high) {
    const middle = low + ((high - low) >> 1);
    if (load<i32>(rowidx + middle * 4) < <i32>row) low = middle + 1;
    else high = middle;
  }
  return low;
}

function multiply16<T>(op: usize, row: u32, first: u32, last: u32, column: u32): void {
  const n = load<u32>(op, SpmmCoo.n);
  const cols = load<u32>(op, SpmmCoo.cols);
  const b = load<usize>(op, SpmmCoo.b) + column * sizeof<T>();
  const colidx = load<usize>(op, SpmmCoo.colidx);
  const values = load<usize>(op, SpmmCoo.values);
  let s0 = f32x4.splat(0);
  let s1 = s0;
  let s2 = s0;
  let s3 = s0;
  for (let i = first; i < last; i++) {
    const c = load<u32>(colidx + i * 4);
    if (c >= cols) continue;
    const p = b + c * n * sizeof<T>();
    const v = f32x4.splat(load1<T>(values + i * sizeof<T>()));
    s0 = f32x4.add(s0, f32x4.mul(v, load4<T>(p)));
    s1 = f32x4.add(s1, f32x4.mul(v, load4<T>(p + 4 * sizeof<T>())));
    s2 = f32x4.add(s2, f32x4.mul(v, load4<T>(p + 8 * sizeof<T>())));
    s3 = f32x4.add(s3, f32x4.mul(v, load4<T>(p + 12 * sizeof<T>())));
  }
  const y = load<usize>(op, SpmmCoo.y) + (row * n + column) * sizeof<T>();
  store8<T>(y, s0, s1);
  store8<T>(y + 8 * sizeof<T>(), s2, s3);
}

function multiply1<T>(op: usize, row: u32, first: u32, last: u32, column: u32): void {
  const n = load<u32>(op, SpmmCoo.n);
  const cols = load<u32>(op, SpmmCoo.cols);
  const b = load<usize>(op, SpmmCoo.b) + column * sizeof<T>();
  let sum: f32 = 0;
  for (let i = first; i < last; i++) {
    const c = load<u32>(load<usize>(op, SpmmCoo.colidx) + i * 4);
    if (c >= cols) continue;
    sum += load1<T>(load<usize>(op, SpmmCoo.values) + i * sizeof<T>()) * load1<T>(b + c * n * sizeof<T>());
  }
  store1<T>(load<usize>(op, SpmmCoo.y) + (row * n + column) * sizeof<T>(), sum);
}
