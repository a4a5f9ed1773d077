/**
 * How each kernel is launched: the entry of its family's image, and the grid. The twin of src/backend/cpu/kernels.ts: sizes
 * and addresses alone decide, so results do not depend on the GPU. Entry names are `kernel_variant...`; the kernels are in
 * csrc/kernels/FAMILY.cu.
 */

import { DTYPE_BYTES, DTYPES } from "../../core/dtype.js";
import { BackendError } from "../../core/errors.js";
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

/** The most blocks of one launch. */
const MOST_BLOCKS = 2 ** 31 - 1;

function launch(entry: string, grid: number, block: number, walks = false): Launch | undefined {
  if (grid === 0) return undefined;
  if (grid > MOST_BLOCKS)
    throw new BackendError("cuda", `${entry}: ${grid} blocks, and a launch has ${MOST_BLOCKS} at most`);
  return { entry, grid, block, shared: 0, walks };
}

const dtypeName = (o: { dtype: number }): string => DTYPES[o.dtype]!;
const fourbitName = (o: { quantType: number }): string => (o.quantType === QUANT_TYPE_ID.nf4 ? "nf4" : "fp4");

/** Threads of a block and what they take; csrc/kernels gets these generated. */
export const GEOMETRY = {
  CONVERT_THREADS: 256,
  /** Elements of a block. */
  CONVERT_TILE: 2048,
  SUM_THREADS: 256,
  MEAN_THREADS: 1024,
  FOURBIT_THREADS: 256,
  BLOCKWISE_THREADS: 512,
  BLOCKWISE_DECODERS: 256,
  ROW_THREADS: 256,
  /** 16-byte vectors of the floating-point operand that a thread of the blockwise and 4-bit kernels takes. */
  VECTORS: 4,
} as const;
const G = GEOMETRY;

const WARP = 32;
const VECTOR_BYTES = 16;
const tiles = (o: { n: number; dtype: number }, threads: number): number =>
  ceilDiv(o.n, (threads * G.VECTORS * VECTOR_BYTES) / DTYPE_BYTES[DTYPES[o.dtype]!]);

/** Rows of up to this many elements get a warp each, longer ones a block of threads. */
const SHORT_ROW = 1024;
function rows(entry: string, o: { rows: number; cols: number; dtype: number }): Launch | undefined {
  const name = `${entry}_${dtypeName(o)}`;
  if (o.cols > SHORT_ROW) return launch(`${name}_block`, o.rows, G.ROW_THREADS);
  return launch(`${name}_warp`, ceilDiv(o.rows, G.ROW_THREADS / WARP), G.ROW_THREADS);
}

export const CUDA_KERNELS: { readonly [K in KernelName]: Plan<K> } = {
  copy: (o) => (o.bytes === 0 ? undefined : "driver"),
  fill: (o) => (o.bytes === 0 ? undefined : "driver"),
  convert: (o) => launch("convert", ceilDiv(o.n, G.CONVERT_TILE), G.CONVERT_THREADS),
  sumChunks: (o) => launch("sumChunks", ceilDiv(ceilDiv(o.n, SUM_CHUNK), G.SUM_THREADS / WARP), G.SUM_THREADS),
  meanOfSums: () => launch("meanOfSums", 1, G.MEAN_THREADS),
  quantizeBlockwise: (o) => {
    const entry = `quantizeBlockwise_${dtypeName(o)}${o.offset ? "_offset" : ""}`;
    return launch(entry, tiles(o, G.BLOCKWISE_THREADS), G.BLOCKWISE_THREADS, true);
  },
  dequantizeBlockwise: (o) =>
    launch(`dequantizeBlockwise_${dtypeName(o)}`, tiles(o, G.BLOCKWISE_DECODERS), G.BLOCKWISE_DECODERS),
  quantize4bit: (o) =>
    launch(`quantize4bit_${dtypeName(o)}_${fourbitName(o)}`, tiles(o, G.FOURBIT_THREADS), G.FOURBIT_THREADS),
  dequantize4bit: (o) =>
    launch(`dequantize4bit_${dtypeName(o)}_${fourbitName(o)}`, tiles(o, G.FOURBIT_THREADS), G.FOURBIT_THREADS),
  int8VectorwiseQuant: (o) => rows("int8VectorwiseQuant", o),
  int8VectorwiseDequant: (o) => rows("int8VectorwiseDequant", o),
};
