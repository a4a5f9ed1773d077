/**
 * How each kernel is launched: the entry of its family's image, and the grid. The twin of src/backend/cpu/kernels.ts: sizes
 * and addresses alone decide, so results do not depend on the GPU. Entry names are `kernel_variant...`; the kernels are in
 * csrc/kernels/FAMILY.cu.
 */

import { DTYPE_BYTES, DTYPES } from "../../core/dtype.js";
import { type KernelName, SUM_CHUNK } from "../../core/kernels.js";
import { ceilDiv } from "../../core/shape.js";
import { dtypeName, fourbitName, type Launch, launch, type Plan, SHARED_BASE, WARP } from "./launch.js";
import { DENSE_GEOMETRY, DENSE_PLANS } from "./plans-dense.js";
import { INT8_PLANS } from "./plans-int8.js";
import { MATMUL4BIT_GEOMETRY, MATMUL4BIT_PLANS } from "./plans-matmul4bit.js";
import { OPTIMIZER_GEOMETRY, OPTIMIZER_PLANS } from "./plans-optimizer.js";

/** Threads of a block and what they take; csrc/kernels gets these generated. */
export const GEOMETRY = {
  SHARED_BASE,
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
  ...MATMUL4BIT_GEOMETRY,
  ...DENSE_GEOMETRY,
  ...OPTIMIZER_GEOMETRY,
} as const;
const G = GEOMETRY;

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
  sumPartials: (o) => launch(`sumPartials_${dtypeName(o)}`, ceilDiv(o.rows * o.cols, G.SUM_THREADS), G.SUM_THREADS),
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
  int8VectorwiseQuant: (o) => rows(`int8VectorwiseQuant${o.outliers ? "_outliers" : ""}`, o),
  int8VectorwiseDequant: (o) => rows("int8VectorwiseDequant", o),
  ...INT8_PLANS,
  ...MATMUL4BIT_PLANS,
  ...DENSE_PLANS,
  ...OPTIMIZER_PLANS,
};
