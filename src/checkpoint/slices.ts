/** Tensors of any size in pieces: what is read, computed and written at a time. */

import { sizeOf } from "../core/shape.js";
import { type ModelSource, rowCount, SAFETENSORS_BITS, type SourceTensor } from "../formats/source.js";

/**
 * Elements of a slice. Large enough that a slice's fixed costs (a read, a few launches and reads back, a write) vanish
 * beside its work, small enough that the slices in flight stay far below a gigabyte.
 */
export const SLICE_ELEMENTS = 1 << 21;
/** A transposed tensor is read once per this many elements of the result. */
const TRANSPOSED_ELEMENTS = 8 * SLICE_ELEMENTS;

/** Consecutive elements of a tensor in row-major order. */
export interface Slice {
  /** Index of the first element. */
  readonly begin: number;
  readonly elements: number;
  /** Little-endian, of the tensor's dtype; aligned for typed arrays of it. */
  readonly bytes: Uint8Array<ArrayBuffer>;
}

export interface SliceOptions {
  /** Every slice but the last has a multiple of this many elements (a block, a row). */
  readonly multiple: number;
  /** Slices of the transposed matrix. */
  readonly transposed?: boolean;
  readonly signal?: AbortSignal | undefined;
}

/**
 * The tensor's elements in order, each exactly once. The next piece is read while the caller works on one.
 * @throws what `source.readRows` throws, the signal's reason
 */
export async function* readSlices(
  source: ModelSource,
  tensor: SourceTensor,
  options: SliceOptions,
): AsyncGenerator<Slice, void, void> {
  const { multiple, transposed = false, signal } = options;
  const itemBytes = SAFETENSORS_BITS[tensor.dtype] / 8;
  const pieces = transposed ? columnPieces(source, tensor, itemBytes) : rowPieces(source, tensor, multiple);
  const most = Math.max(multiple, SLICE_ELEMENTS - (SLICE_ELEMENTS % multiple));
  let begin = 0;
  let carry = new Uint8Array(0);
  const slice = (bytes: Uint8Array<ArrayBuffer>): Slice => {
    const elements = bytes.length / itemBytes;
    const at = begin;
    begin += elements;
    return { begin: at, elements, bytes };
  };
  for await (const piece of pieces) {
    signal?.throwIfAborted();
    const bytes = carry.length > 0 ? concat(carry, piece) : piece;
    const whole = bytes.length - (bytes.length % (multiple * itemBytes));
    for (let at = 0; at < whole; at += most * itemBytes) {
      yield slice(bytes.subarray(at, Math.min(at + most * itemBytes, whole)));
      signal?.throwIfAborted();
    }
    carry = bytes.slice(whole);
  }
  if (carry.length > 0) yield slice(carry);
}

/** The most elements that a reader of this tensor holds at a time, for whoever plans memory. */
export function elementsInFlight(tensor: SourceTensor, transposed = false): number {
  const piece = transposed ? TRANSPOSED_ELEMENTS : Math.max(SLICE_ELEMENTS, sizeOf(tensor.shape.slice(1)));
  return Math.min(sizeOf(tensor.shape), 4 * piece);
}

/** Row ranges of about a slice, one read ahead. */
async function* rowPieces(
  source: ModelSource,
  { name, shape }: SourceTensor,
  multiple: number,
): AsyncGenerator<Uint8Array<ArrayBuffer>, void, void> {
  const rows = rowCount(shape);
  const perRow = sizeOf(shape.slice(1));
  if (rows === 0 || perRow === 0) return;
  let step = Math.max(1, Math.floor(SLICE_ELEMENTS / perRow));
  // Where it costs little, pieces end on multiples, so that nothing has to be carried over.
  const period = multiple / gcd(multiple, perRow);
  if (period <= step) step -= step % period;
  const read = (begin: number): Promise<Uint8Array<ArrayBuffer>> => {
    const promise = source.readRows(name, begin, Math.min(begin + step, rows));
    // Nobody waits for it when the caller stops early; otherwise the await below throws.
    promise.catch(() => {});
    return promise;
  };
  let next = read(0);
  for (let row = 0; row < rows; row += step) {
    const piece = await next;
    if (row + step < rows) next = read(row + step);
    yield piece;
  }
}

/** Ranges of columns as rows of the transpose: every piece reads the whole matrix, so pieces are large. */
async function* columnPieces(
  source: ModelSource,
  tensor: SourceTensor,
  itemBytes: number,
): AsyncGenerator<Uint8Array<ArrayBuffer>, void, void> {
  const [rows, cols] = tensor.shape as readonly [number, number];
  const step = Math.max(1, Math.floor(TRANSPOSED_ELEMENTS / Math.max(1, rows)));
  for (let left = 0; left < cols; left += step) {
    const width = Math.min(step, cols - left);
    const out = words(itemBytes, new Uint8Array(width * rows * itemBytes));
    let row = 0;
    for await (const piece of rowPieces(source, tensor, 1)) {
      const values = words(itemBytes, piece);
      for (let at = left; at < values.length; at += cols, row++) {
        for (let c = 0; c < width; c++) out[c * rows + row] = values[at + c]!;
      }
    }
    yield new Uint8Array(out.buffer as ArrayBuffer);
  }
}

/** Float elements as words of their size: moving them about needs no more. */
function words(itemBytes: number, bytes: Uint8Array<ArrayBuffer>): Uint16Array | Uint32Array | Float64Array {
  const { buffer, byteOffset, byteLength } = bytes;
  if (itemBytes === 2) return new Uint16Array(buffer, byteOffset, byteLength / 2);
  if (itemBytes === 4) return new Uint32Array(buffer, byteOffset, byteLength / 4);
  return new Float64Array(buffer, byteOffset, byteLength / 8);
}

function concat(a: Uint8Array, b: Uint8Array): Uint8Array<ArrayBuffer> {
  const joined = new Uint8Array(a.length + b.length);
  joined.set(a);
  joined.set(b, a.length);
  return joined;
}

function gcd(a: number, b: number): number {
  return b === 0 ? a : gcd(b, a % b);
}

/**
 * Computes the slices and hands the results to `write` in order: while one slice is written the next one computes and
 * the one after that is read. `compute` launches before its first await.
 */
export async function pipeline<T>(
  slices: AsyncIterable<Slice>,
  compute: (slice: Slice) => Promise<T>,
  write: (result: T, slice: Slice) => Promise<void>,
): Promise<void> {
  let last: Promise<void> = Promise.resolve();
  try {
    for await (const slice of slices) {
      const before = last;
      const computed = compute(slice);
      // Settled, not only successful: after a failure nothing may be left running either.
      last = Promise.allSettled([computed, before]).then(async () => {
        await before;
        await write(await computed, slice);
      });
      // Its error is met by one of the awaits; until then it must not count as unhandled.
      last.catch(() => {});
      await before;
    }
  } finally {
    await last;
  }
}
