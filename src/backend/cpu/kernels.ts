/**
 * How each kernel's work is split on the cpu: what a unit is, how many there are, how many make a part. Sizes alone
 * decide, so results do not depend on the number of workers. A part is about 64k elements: long enough to hide the
 * claim, short enough to balance, and one WebAssembly call each so that optimised code is entered soon.
 */
import type { KernelName, Operands } from "../../core/kernels.js";
import { SUM_CHUNK } from "../../core/kernels.js";
import { ceilDiv } from "../../core/shape.js";

const PART_ELEMENTS = 65536;
const PART_BYTES = 1 << 20;

export interface Partition<K extends KernelName> {
  /** Work items of a launch; 0 launches nothing. */
  units(o: Operands<K>): number;
  /** Work items of a part. */
  per(o: Operands<K>): number;
}

const blocks = (o: { n: number; blocksize: number }): number => ceilDiv(o.n, o.blocksize);
const blocksPer = (o: { blocksize: number }): number => Math.max(1, Math.floor(PART_ELEMENTS / o.blocksize));
const rowsPer = (o: { cols: number }): number => Math.max(1, Math.floor(PART_ELEMENTS / Math.max(1, o.cols)));

export const CPU_KERNELS: { readonly [K in KernelName]: Partition<K> } = {
  copy: { units: (o) => o.bytes, per: () => PART_BYTES },
  fill: { units: (o) => o.bytes, per: () => PART_BYTES },
  convert: { units: (o) => o.n, per: () => PART_ELEMENTS },
  sumChunks: { units: (o) => ceilDiv(o.n, SUM_CHUNK), per: () => PART_ELEMENTS / SUM_CHUNK },
  meanOfSums: { units: () => 1, per: () => 1 },
  quantizeBlockwise: { units: blocks, per: blocksPer },
  dequantizeBlockwise: { units: blocks, per: blocksPer },
  quantize4bit: { units: blocks, per: blocksPer },
  dequantize4bit: { units: blocks, per: blocksPer },
  int8VectorwiseQuant: { units: (o) => o.rows, per: rowsPer },
  int8VectorwiseDequant: { units: (o) => o.rows, per: rowsPer },
};
