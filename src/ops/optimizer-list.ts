/**
 * Lists of tensors in device memory, as the optimizer and gradient kernels take them (LIST_RECORD): one launch serves all tensors of
 * a list. A list keeps what the device has and writes what has changed.
 */
import type { Backend } from "../core/backend.js";
import type { FloatDType } from "../core/dtype.js";
import type { Address } from "../core/kernels.js";
import { LIST_RECORD, LIST_RECORD_BYTES, OPTIMIZER_CHUNK } from "../core/optimizers.js";
import { keep } from "../core/scope.js";
import { ceilDiv } from "../core/shape.js";
import { Tensor } from "../core/tensor.js";

/** A tensor of a list: the gradient, and for an update what belongs to it. All on the list's backend; checked by the caller. */
export interface ListTensors {
  /** By which errors name it. */
  readonly index: number;
  readonly g: Tensor<FloatDType>;
  readonly p?: Tensor<FloatDType> | undefined;
  readonly state1?: Tensor | undefined;
  readonly state2?: Tensor | undefined;
  readonly absmax1?: Tensor<"f32"> | undefined;
  readonly absmax2?: Tensor<"f32"> | undefined;
}

/** Words of a record, and where in it its parts lie. */
const WORDS = LIST_RECORD_BYTES / 4;
const AT = {
  g: LIST_RECORD.g >> 2,
  n: LIST_RECORD.n >> 2,
  first: LIST_RECORD.first >> 2,
  index: LIST_RECORD.index >> 2,
} as const;
/** What an update writes. */
const WRITTEN = ["p", "state1", "state2", "absmax1", "absmax2"] as const;
const WRITTEN_AT = WRITTEN.map((name) => LIST_RECORD[name] >> 2);
const TWO_32 = 2 ** 32;
/** Records between two that have changed that are written again rather than in a write of their own. */
const GAP = 16;

/** A capacity that holds `need`: half as much again as there was, so that a list that grows is seldom made anew. */
const grown = (had: number, need: number): number => Math.max(need, Math.ceil(had * 1.5));

export class TensorList {
  /** Tensors, and chunks of them all. */
  records = 0;
  count = 0;
  /** Where kernels get to through this list: the gradients (until `forget`), and what else the last `update` was given. */
  readonly gradients: Tensor[] = [];
  readonly written: Tensor[] = [];

  /** Records on the host. */
  private mirror = new Uint32Array(0);
  /** By record, what is at WRITTEN_AT: a tensor does not move. */
  private readonly places: (Tensor | undefined)[] = [];
  /** Records and chunks that the device has as they are in `mirror`. */
  private validRecords = 0;
  private validChunks = 0;
  /** The backend's epoch in which that was so. */
  private epoch = 0;
  private recordMemory: Tensor | undefined;
  private chunkMemory: Tensor | undefined;

  constructor(readonly backend: Backend) {}

  /** The device's copies, kernels' `list` and `chunks`; there are none before the first `update`. */
  get list(): Address {
    return this.recordMemory!;
  }
  get chunks(): Address {
    return this.chunkMemory!;
  }

  /** Makes the device's list that of these tensors. @throws DisposedError, OutOfMemoryError, BackendError */
  update(tensors: readonly ListTensors[]): void {
    const { backend, gradients, places } = this;
    if (this.epoch !== backend.epoch) {
      // What was written before a restart may not have got there.
      this.validRecords = 0;
      this.validChunks = 0;
      this.epoch = backend.epoch;
    }
    const records = tensors.length;
    if (this.mirror.length < records * WORDS) {
      const larger = new Uint32Array(grown(this.mirror.length, records * WORDS));
      larger.set(this.mirror);
      this.mirror = larger;
    }
    const { mirror } = this;
    const valid = Math.min(this.validRecords, records);
    // Whatever throws below, the device then has nothing that `mirror` says.
    this.validRecords = 0;
    gradients.length = records;
    let moved = valid !== records || places.length !== records * WRITTEN.length;
    places.length = records * WRITTEN.length;
    /** Runs of records to be written: pairs of begin and end. */
    const dirty: number[] = [];
    let resized = records;
    let first = 0;
    for (let i = 0; i < records; i++) {
      const tensor = tensors[i]!;
      const { g } = tensor;
      const at = i * WORDS;
      gradients[i] = g;
      let changed = put(mirror, at + AT.g, backend.addressOf(g));
      for (let k = 0; k < WRITTEN.length; k++) {
        const place = tensor[WRITTEN[k]!];
        const slot = i * WRITTEN.length + k;
        // One that was disposed throws at its address.
        if (place === places[slot] && i < valid && !place?.isDisposed) continue;
        moved = true;
        changed = put(mirror, at + WRITTEN_AT[k]!, place ? backend.addressOf(place) : 0) || changed;
        places[slot] = place;
      }
      if (put(mirror, at + AT.n, g.size)) {
        changed = true;
        resized = Math.min(resized, i);
      }
      if (mirror[at + AT.first] !== first || mirror[at + AT.index] !== tensor.index) {
        mirror[at + AT.first] = first;
        mirror[at + AT.index] = tensor.index;
        changed = true;
      }
      first += ceilDiv(g.size, OPTIMIZER_CHUNK);
      if (changed || i >= valid) {
        if (i < dirty.at(-1)! + GAP) dirty[dirty.length - 1] = i + 1;
        else dirty.push(i, i + 1);
      }
    }
    if (moved) this.gather();
    this.records = records;
    this.count = first;
    this.writeChunks(Math.min(resized, valid));
    this.writeRecords(dirty);
    this.validRecords = records;
  }

  /** Lets go of the gradients, which the collector may then find. */
  forget(): void {
    this.gradients.length = 0;
  }

  /** Gives the device memory back, ordered with the stream. */
  dispose(): void {
    this.forget();
    this.places.length = 0;
    this.written.length = 0;
    this.recordMemory?.dispose();
    this.chunkMemory?.dispose();
    this.recordMemory = undefined;
    this.chunkMemory = undefined;
    this.validRecords = 0;
    this.validChunks = 0;
  }

  private gather(): void {
    this.written.length = 0;
    for (const place of this.places) if (place) this.written.push(place);
  }

  private writeRecords(dirty: readonly number[]): void {
    const { backend, mirror, records } = this;
    const had = this.recordMemory?.size ?? 0;
    let runs = dirty;
    if (had < records * LIST_RECORD_BYTES || !this.recordMemory) {
      this.recordMemory = replace(this.recordMemory, backend, grown(had, records * LIST_RECORD_BYTES));
      runs = records > 0 ? [0, records] : [];
    }
    const bytes = new Uint8Array(mirror.buffer);
    for (let i = 0; i < runs.length; i += 2) {
      const [begin, end] = [runs[i]! * LIST_RECORD_BYTES, runs[i + 1]! * LIST_RECORD_BYTES];
      backend.write(this.recordMemory.storage, begin, bytes.subarray(begin, end));
    }
  }

  /** Writes the chunks from those of record `from` on: the ones before it are as they were. */
  private writeChunks(from: number): void {
    const { backend, mirror, records, count } = this;
    const had = this.chunkMemory?.size ?? 0;
    let record = from;
    let begin = record < records ? mirror[record * WORDS + AT.first]! : count;
    // A list that lost its last records still has the chunks of those before.
    if (begin > this.validChunks) [record, begin] = [0, 0];
    this.validChunks = Math.min(this.validChunks, begin);
    if (had < count * 4 || !this.chunkMemory) {
      this.chunkMemory = replace(this.chunkMemory, backend, grown(had, count * 4));
      [record, begin, this.validChunks] = [0, 0, 0];
    }
    if (begin < count) {
      if (records === 1) {
        backend.launch("fill", { dst: this.chunkMemory, bytes: count * 4, value: 0 });
      } else {
        const names = new Uint32Array(count - begin);
        for (; record < records; record++) {
          const at = record * WORDS;
          const end = record + 1 < records ? mirror[at + WORDS + AT.first]! : count;
          names.fill(record, mirror[at + AT.first]! - begin, end - begin);
        }
        backend.write(this.chunkMemory.storage, begin * 4, new Uint8Array(names.buffer));
      }
    }
    this.validChunks = count;
  }
}

/** Device memory of the library; the collector finds it where nobody disposes a list. */
export function deviceBytes(backend: Backend, bytes: number): Tensor {
  return keep(Tensor.allocate(backend, "u8", [bytes]));
}

function replace(old: Tensor | undefined, backend: Backend, bytes: number): Tensor {
  const larger = deviceBytes(backend, bytes);
  old?.dispose();
  return larger;
}

/** Writes a number below 2^53 into two words; whether it was another. */
function put(words: Uint32Array, at: number, value: number): boolean {
  const low = value >>> 0;
  const high = (value - low) / TWO_32;
  if (words[at] === low && words[at + 1] === high) return false;
  words[at] = low;
  words[at + 1] = high;
  return true;
}
