/**
 * How each kernel is launched: the entry of its family's image, and the grid. The twin of src/backend/cpu/kernels.ts: sizes
 * and addresses alone decide, so results do not depend on the GPU. Entry names are `kernel_variant...`; the kernels are in
 * csrc/kernels/FAMILY.cu.
 */
import { DTYPES } from "../../core/dtype.js";
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
}

/** What geometry may depend on. */
export interface LaunchDevice {
  readonly multiprocessors: number;
}

/** `undefined`: nothing to do. `"driver"`: the driver's own copy or fill serves. */
export type Plan<K extends KernelName> = (o: Operands<K>, device: LaunchDevice) => Launch | "driver" | undefined;

const launch = (entry: string, grid: number, block: number, shared = 0): Launch | undefined =>
  grid === 0 ? undefined : { entry, grid, block, shared };

const dtypeName = (o: { dtype: number }): string => DTYPES[o.dtype]!;

export const CUDA_KERNELS: { readonly [K in KernelName]: Plan<K> } = {
  copy: (o) => (o.bytes === 0 ? undefined : "driver"),
  fill: (o) => (o.bytes === 0 ? undefined : "driver"),
  convert: (o) => launch("convert", ceilDiv(o.n, 2048), 256),
  sumChunks: (o) => launch("sumChunks", ceilDiv(ceilDiv(o.n, SUM_CHUNK), 8), 256),
  meanOfSum: () => launch("meanOfSum", 1, 32),
  quantizeBlockwise: (o) => launch(`quantizeBlockwise_${dtypeName(o)}`, ceilDiv(o.n, 4096), 256),
  dequantizeBlockwise: (o) => launch(`dequantizeBlockwise_${dtypeName(o)}`, ceilDiv(o.n, 4096), 256),
  quantize4bit: (o) => launch(`quantize4bit_${dtypeName(o)}_${fourbitName(o)}`, ceilDiv(o.n, 4096), 256),
  dequantize4bit: (o) => launch(`dequantize4bit_${dtypeName(o)}_${fourbitName(o)}`, ceilDiv(o.n, 4096), 256),
  int8VectorwiseQuant: (o) => launch(`int8VectorwiseQuant_${dtypeName(o)}`, o.rows, 256),
  int8VectorwiseDequant: (o) => launch(`int8VectorwiseDequant_${dtypeName(o)}`, o.rows, 256),
};

function fourbitName(o: { quantType: number }): string {
  return o.quantType === QUANT_TYPE_ID.nf4 ? "nf4" : "fp4";
}
