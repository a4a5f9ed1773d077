/**
 * How each kernel is launched: the entry of its family's image, and the grid. The twin of src/backend/cpu/kernels.ts: sizes
 * and addresses alone decide, so results do not depend on the GPU. Entry names are `kernel_variant...`; the kernels are in
 * csrc/kernels/FAMILY.cu.
 */
import { DTYPE_BYTES, DTYPES } from "../../core/dtype.js";
import { type KernelName, type Operands, QUANT_TYPE_ID, SUM_CHUNK } from "../../core/kernels.js";
import { ceilDiv } from "../../core/shape.js";

/** One launch. Blocks are one-dimensional. */
export interface Launch {
  readonly entry: string;
  readonly grid: number;
  /** Threads of a block. */
  readonly block: number;
  /** Bytes of dynamic shared memory. */
  readonly shared: number;
  /** The blocks walk over the work of the whole grid: no more of them are launched than run at once. */
  readonly walks: boolean;
}

/** `undefined`: nothing to do. `"driver"`: the driver's own copy or fill serves. */
export type Plan<K extends KernelName> = (o: Operands<K>) => Launch | "driver" | undefined;

const launch = (entry: string, grid: number, block: number, walks = false): Launch | undefined =>
  grid === 0 ? undefined : { entry, grid, block, shared: 0, walks };

const dtypeName = (o: { dtype: number }): string => DTYPES[o.dtype]!;
const fourbitName = (o: { quantType: number }): string => (o.quantType === QUANT_TYPE_ID.nf4 ? "nf4" : "fp4");

/** A thread of the blockwise and 4-bit kernels takes this many bytes of the floating-point operand: four vectors of 16. */
const THREAD_BYTES = 64;
const blocksOf = (o: { n: number; dtype: number }, threads: number): number =>
  ceilDiv(o.n, (threads * THREAD_BYTES) / DTYPE_BYTES[DTYPES[o.dtype]!]);

/** Rows of up to this many elements get a warp each, longer ones a block of threads. */
const SHORT_ROW = 1024;
function rows(entry: string, o: { rows: number; cols: number; dtype: number }): Launch | undefined {
  const name = `${entry}_${dtypeName(o)}`;
  return o.cols > SHORT_ROW ? launch(`${name}_block`, o.rows, 256) : launch(`${name}_warp`, ceilDiv(o.rows, 8), 256);
}

export const CUDA_KERNELS: { readonly [K in KernelName]: Plan<K> } = {
  copy: (o) => (o.bytes === 0 ? undefined : "driver"),
  fill: (o) => (o.bytes === 0 ? undefined : "driver"),
  convert: (o) => launch("convert", ceilDiv(o.n, 2048), 256),
  sumChunks: (o) => launch("sumChunks", ceilDiv(ceilDiv(o.n, SUM_CHUNK), 8), 256),
  meanOfSums: () => launch("meanOfSums", 1, 1024),
  quantizeBlockwise: (o) =>
    launch(`quantizeBlockwise_${dtypeName(o)}${o.offset ? "_offset" : ""}`, blocksOf(o, 512), 512, true),
  dequantizeBlockwise: (o) => launch(`dequantizeBlockwise_${dtypeName(o)}`, blocksOf(o, 256), 256),
  quantize4bit: (o) => launch(`quantize4bit_${dtypeName(o)}_${fourbitName(o)}`, blocksOf(o, 256), 256),
  dequantize4bit: (o) => launch(`dequantize4bit_${dtypeName(o)}_${fourbitName(o)}`, blocksOf(o, 256), 256),
  int8VectorwiseQuant: (o) => rows("int8VectorwiseQuant", o),
  int8VectorwiseDequant: (o) => rows("int8VectorwiseDequant", o),
};
