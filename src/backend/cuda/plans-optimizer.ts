/** The launches of the optimizer and gradient kernels: csrc/kernels/optimizer.cu and gradient.cu. */
import { DTYPES } from "../../core/dtype.js";
import type { KernelName } from "../../core/kernels.js";
import { OPTIMIZER_FAMILIES, type OptimizerFamily, TWO_STATE_FAMILIES } from "../../core/optimizers.js";
import { ceilDiv } from "../../core/shape.js";
import { type Launch, launch, type Plan, SHARED_BASE, WARP } from "./launch.js";

/** csrc/kernels gets these generated. */
export const OPTIMIZER_GEOMETRY = {
  /** Threads of a block that takes chunks of a list. */
  CHUNK_THREADS: 256,
  /** Of one that has the tables of 8-bit states in shared memory. */
  STATE_THREADS: 512,
  /** Its tables: search entries of two maps and the values of their codes. */
  STATE_TABLE_BYTES: 45056,
  /** Of a family that has no second moment: one map. */
  ONE_STATE_TABLE_BYTES: 32768,
  NORM_THREADS: 1024,
} as const;
const G = OPTIMIZER_GEOMETRY;

interface Step {
  readonly count: number;
  readonly family: number;
  readonly dtype: number;
  readonly gradDtype: number;
}

/** `optimizerUpdate32bit_adam_bf16`, or `..._mixed` where parameter and gradient differ in dtype. */
function step(kernel: string, o: Step, threads: number, shared = 0): Launch | undefined {
  const types = o.dtype === o.gradDtype ? DTYPES[o.dtype] : "mixed";
  // Tables are loaded once, so the grid that has them walks.
  return launch(`${kernel}_${OPTIMIZER_FAMILIES[o.family]}_${types}`, o.count, threads, shared > 0, shared);
}

const isTwoState = (o: Step): boolean =>
  (TWO_STATE_FAMILIES as readonly OptimizerFamily[]).includes(OPTIMIZER_FAMILIES[o.family]!);

/** Blocks of threads where a warp takes a chunk. */
const warps = (o: { readonly count: number }): number => ceilDiv(o.count, G.CHUNK_THREADS / WARP);
const norms = (kernel: string, o: Step): Launch | undefined =>
  launch(`${kernel}_${OPTIMIZER_FAMILIES[o.family]}`, warps(o), G.CHUNK_THREADS);

export const OPTIMIZER_PLANS = {
  optimizerUpdate32bit: (o) => step("optimizerUpdate32bit", o, G.CHUNK_THREADS),
  optimizerUpdate8bitBlockwise: (o) => {
    const tables = isTwoState(o) ? G.STATE_TABLE_BYTES : G.ONE_STATE_TABLE_BYTES;
    return step("optimizerUpdate8bitBlockwise", o, G.STATE_THREADS, SHARED_BASE + tables);
  },
  optimizerNorms32bit: (o) => norms("optimizerNorms32bit", o),
  optimizerNorms8bitBlockwise: (o) => norms("optimizerNorms8bitBlockwise", o),
  optimizerRatios: (o) => launch("optimizerRatios", ceilDiv(o.records, G.CHUNK_THREADS), G.CHUNK_THREADS),
  gradientCheck: (o) => launch("gradientCheck", warps(o), G.CHUNK_THREADS),
  gradientVerdict: () => launch("gradientVerdict", 1, 1),
  gradientSumSquares: (o) => launch("gradientSumSquares", warps(o), G.CHUNK_THREADS),
  tensorNorms: (o) => launch("tensorNorms", o.records, G.NORM_THREADS),
  clipCoefficient: () => launch("clipCoefficient", 1, G.NORM_THREADS),
  scaleGradients: (o) => launch("scaleGradients", warps(o), G.CHUNK_THREADS),
} as const satisfies { [K in KernelName]?: Plan<K> };
