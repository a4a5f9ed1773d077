/** Lists of tensors for the kernels of the families `optimizer` and `gradient`, written by hand: independent of src/ops. */
import type { Backend, LaunchContext, Reached } from "#halfbyte/core/backend.js";
import type { Address } from "#halfbyte/core/kernels.js";
import { LIST_RECORD, LIST_RECORD_BYTES, OPTIMIZER_CHUNK } from "#halfbyte/core/optimizers.js";
import { Tensor } from "#halfbyte/core/tensor.js";
import { Codebook } from "#halfbyte/quant/codebook.js";

/** The places of a record; what is missing has address 0. */
export interface ListEntry {
  readonly n: number;
  /** By which errors name the parameter. */
  readonly index: number;
  readonly p?: Address | undefined;
  readonly g?: Address | undefined;
  readonly state1?: Address | undefined;
  readonly state2?: Address | undefined;
  readonly absmax1?: Address | undefined;
  readonly absmax2?: Address | undefined;
}

const PLACES = ["p", "g", "state1", "state2", "absmax1", "absmax2"] as const;
export const CONTEXT: LaunchContext = { op: "list", operand: "grad", unit: "parameter" };

export interface List {
  readonly list: Tensor<"u8">;
  readonly chunks: Tensor<"i32">;
  /** Chunks. */
  readonly count: number;
  readonly records: number;
  /** What a kernel reaches by way of the list: `writes` are the places that it may change. */
  reached(...writes: readonly (typeof PLACES)[number][]): Reached;
}

/** A list in device memory. */
export function makeList(backend: Backend, entries: readonly ListEntry[]): List {
  const bytes = new DataView(new ArrayBuffer(entries.length * LIST_RECORD_BYTES));
  const chunks: number[] = [];
  for (const [at, entry] of entries.entries()) {
    const base = at * LIST_RECORD_BYTES;
    for (const place of PLACES) {
      const address = entry[place] ? backend.addressOf(entry[place]) : 0;
      bytes.setBigUint64(base + LIST_RECORD[place], BigInt(address), true);
    }
    bytes.setBigUint64(base + LIST_RECORD.n, BigInt(entry.n), true);
    bytes.setUint32(base + LIST_RECORD.first, chunks.length, true);
    bytes.setUint32(base + LIST_RECORD.index, entry.index, true);
    for (let begin = 0; begin < entry.n; begin += OPTIMIZER_CHUNK) chunks.push(at);
  }
  const list = Tensor.allocate(backend, "u8", [bytes.byteLength]);
  backend.write(list.storage, list.byteOffset, new Uint8Array(bytes.buffer));
  const numbers = Tensor.allocate(backend, "i32", [chunks.length]).copyFrom(Int32Array.from(chunks));
  return {
    list,
    chunks: numbers,
    count: chunks.length,
    records: entries.length,
    reached(...writes) {
      const of = (wanted: boolean): Address[] =>
        entries.flatMap((entry) =>
          PLACES.flatMap((place) => (entry[place] && writes.includes(place) === wanted ? [entry[place]] : [])),
        );
      return { reads: of(false), writes: of(true) };
    },
  };
}

const UNSIGNED = Codebook.dynamicUnsigned();

/** The maps of 8-bit states as operands. */
export function stateCodes(backend: Backend, second: boolean) {
  const first = Codebook.dynamic();
  return {
    code1: first.on(backend),
    table1: first.stateTableOn(backend),
    code2: second ? UNSIGNED.on(backend) : null,
    table2: second ? UNSIGNED.tableOn(backend) : null,
  };
}
/** Their values. */
export const STATE_CODES = { code1: Codebook.dynamic().values, code2: UNSIGNED.values };
