/** What a launch is, and what the plans of the kernels share. */
import { DTYPES } from "../../core/dtype.js";
import { BackendError, UnsupportedError } from "../../core/errors.js";
import { type KernelName, type Operands, QUANT_TYPE_ID } from "../../core/kernels.js";

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
  /** What is launched instead on GPUs older than sm_80, and where a block may not have so much shared memory. */
  readonly fallback?: (() => Launch | undefined) | undefined;
}

/** `undefined`: nothing to do. `"driver"`: the driver's own copy or fill serves. */
export type Plan<K extends KernelName> = (o: Operands<K>) => Launch | "driver" | undefined;

/** The most blocks of one launch. */
const MOST_BLOCKS = 2 ** 31 - 1;

export function launch(
  entry: string,
  grid: number,
  block: number,
  walks = false,
  shared = 0,
  fallback?: () => Launch | undefined,
): Launch | undefined {
  if (grid === 0) return undefined;
  if (grid > MOST_BLOCKS)
    throw new BackendError("cuda", `${entry}: ${grid} blocks, and a launch has ${MOST_BLOCKS} at most`);
  return { entry, grid, block, shared, walks, fallback };
}

export const dtypeName = (o: { dtype: number }): string => DTYPES[o.dtype]!;
export const fourbitName = (o: { quantType: number }): string => (o.quantType === QUANT_TYPE_ID.nf4 ? "nf4" : "fp4");

/** The plan of a kernel that the cuda backend does not have. */
export function unsupported(kernel: KernelName, why: string): () => never {
  return () => {
    throw new UnsupportedError(`${kernel} on cuda`, why);
  };
}

/** Where dynamic shared memory begins that has fixed addresses: the driver may keep what lies before. csrc/kernels gets it generated. */
export const SHARED_BASE = 1024;

/** Threads of a warp. */
export const WARP = 32;
