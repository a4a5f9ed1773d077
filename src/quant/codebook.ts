/** Codebooks as operands: a checked, immutable list of values with its device copy and its search table. */
import type { Backend } from "../core/backend.js";
import { ArgumentError } from "../core/errors.js";
import type { Address } from "../core/kernels.js";
import { bytesOf } from "../core/typedarray.js";
import { createDynamicMap } from "./codebooks.js";
import { buildSearchTable } from "./search-table.js";

/** The number of values of a blockwise codebook: a code is a byte. */
export const CODEBOOK_SIZE = 256;

const byArray = new WeakMap<Float32Array, Codebook>();
let dynamicSigned: Codebook | undefined;
let dynamicUnsigned: Codebook | undefined;

export class Codebook {
  private table: Uint8Array | null | undefined;
  private readonly tableKey = {};
  private stateTable: Uint8Array | null | undefined;
  private readonly stateTableKey = {};

  private constructor(readonly values: Float32Array<ArrayBuffer>) {}

  /** The default of blockwise quantization: the signed dynamic map. */
  static dynamic(): Codebook {
    dynamicSigned ??= new Codebook(createDynamicMap());
    return dynamicSigned;
  }

  /** What second moments of optimizers are kept in: the unsigned dynamic map. */
  static dynamicUnsigned(): Codebook {
    dynamicUnsigned ??= new Codebook(createDynamicMap(false));
    return dynamicUnsigned;
  }

  /**
   * The codebook with these values; the same array gives the same object as long as its values stay the same.
   * @throws ArgumentError unless there are 256 finite values in non-decreasing order
   */
  static of(op: string, values: Float32Array): Codebook {
    if (!(values instanceof Float32Array)) throw new ArgumentError(op, "code", "a Float32Array", typeof values);
    const known = byArray.get(values);
    if (known && equal(known.values, values)) return known;
    if (values.length !== CODEBOOK_SIZE) {
      throw new ArgumentError(op, "code", `${CODEBOOK_SIZE} values`, `${values.length}`);
    }
    for (let i = 0; i < CODEBOOK_SIZE; i++) {
      const value = values[i]!;
      if (!Number.isFinite(value)) throw new ArgumentError(op, `code[${i}]`, "a finite value", `${value}`);
      if (i > 0 && value < values[i - 1]!) {
        const expected = `a value not below code[${i - 1}] = ${values[i - 1]} (codes must be sorted)`;
        throw new ArgumentError(op, `code[${i}]`, expected, `${value}`);
      }
    }
    // Checkpoints carry the default map once per weight: they share one table.
    const dynamic = Codebook.dynamic();
    const codebook = equal(dynamic.values, values) ? dynamic : new Codebook(Float32Array.from(values));
    byArray.set(values, codebook);
    return codebook;
  }

  /** The values on a device, as a kernel operand. */
  on(backend: Backend): Address {
    return { storage: backend.constant(this, () => bytesOf(this.values)), byteOffset: 0 };
  }

  /** The fast search's table on a device, or null when this codebook needs the exact search. */
  tableOn(backend: Backend): Address | null {
    const table = this.table === undefined ? buildSearchTable(this.values) : this.table;
    this.table = table;
    return table === null ? null : { storage: backend.constant(this.tableKey, () => table), byteOffset: 0 };
  }

  /**
   * The table with the sign rule of optimizer states (`stateCode`), or null when this codebook has none. The signed dynamic map has: it
   * is for first moments. Second moments are never negative and take `tableOn`.
   */
  stateTableOn(backend: Backend): Address | null {
    const table = this.stateTable === undefined ? buildSearchTable(this.values, { state: true }) : this.stateTable;
    this.stateTable = table;
    return table === null ? null : { storage: backend.constant(this.stateTableKey, () => table), byteOffset: 0 };
  }
}

// Bit patterns, so that -0 and +0 differ.
function equal(a: Float32Array, b: Float32Array): boolean {
  return a.length === b.length && a.every((value, i) => Object.is(value, b[i]));
}
