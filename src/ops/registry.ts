/**
 * The primitives, each declared once: what it is called upstream, which kernels it launches, which dtypes it takes. Tests,
 * benches, the golden check and the support table iterate this list.
 */
import type { DType } from "../core/dtype.js";
import type { KernelName } from "../core/kernels.js";
import { blockwisePrimitives } from "./blockwise.js";
import { codebookPrimitives } from "./codebooks.js";
import { fourbitPrimitives } from "./fourbit.js";
import { gradientPrimitives } from "./gradient.js";
import { igemmPrimitives } from "./igemm.js";
import { int8Primitives } from "./int8.js";
import { matmulPrimitives } from "./matmul.js";
import { matmul4bitPrimitives } from "./matmul4bit.js";
import { optimizerPrimitives } from "./optimizer.js";
import { sparsePrimitives } from "./sparse.js";
import { sumPrimitives } from "./sum.js";

export interface Primitive {
  /** Name in bitsandbytes or PyTorch. */
  readonly upstream: string;
  /** asm/FAMILY.ts, src/ops/FAMILY.ts, test/ops/FAMILY.test.ts, bench/FAMILY.bench.ts */
  readonly family: string;
  /** Kernels it launches; none for what the host computes. */
  readonly kernels: readonly KernelName[];
  /** dtypes of its main operand. */
  readonly dtypes: readonly DType[];
  /** The `op` of the golden cases that cover it; null with the reason where there are none. */
  readonly golden: string | { readonly none: string };
  readonly summary: string;
}

export const PRIMITIVES = {
  ...codebookPrimitives,
  ...blockwisePrimitives,
  ...fourbitPrimitives,
  ...matmul4bitPrimitives,
  ...int8Primitives,
  ...igemmPrimitives,
  ...matmulPrimitives,
  ...sparsePrimitives,
  ...sumPrimitives,
  ...optimizerPrimitives,
  ...gradientPrimitives,
} as const satisfies Record<string, Primitive>;

export type PrimitiveName = keyof typeof PRIMITIVES;
export const PRIMITIVE_NAMES = Object.keys(PRIMITIVES) as PrimitiveName[];
