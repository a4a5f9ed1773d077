import { blockwiseCases } from "./blockwise.js";
import type { Case } from "./case.js";
import { codebookCases } from "./codebooks.js";
import { convertCases } from "./convert.js";
import { fourbitCases } from "./fourbit.js";
import { gradientCases } from "./gradient.js";
import { igemmCases } from "./igemm.js";
import { int8Cases } from "./int8.js";
import { matmulCases } from "./matmul.js";
import { matmul4bitCases } from "./matmul4bit.js";
import { memoryCases } from "./memory.js";
import { optimizerCases } from "./optimizer.js";
import { sparseCases } from "./sparse.js";
import { sumCases } from "./sum.js";

/** All cases by family: those of the registry, and what tensors do by themselves (`memory`, `convert`). */
export const CASES: Readonly<Record<string, () => Iterable<Case>>> = {
  blockwise: blockwiseCases,
  codebooks: codebookCases,
  convert: convertCases,
  fourbit: fourbitCases,
  gradient: gradientCases,
  igemm: igemmCases,
  int8: int8Cases,
  matmul: matmulCases,
  matmul4bit: matmul4bitCases,
  memory: memoryCases,
  optimizer: optimizerCases,
  sparse: sparseCases,
  sum: sumCases,
};

export function* allCases(): Generator<Case> {
  for (const cases of Object.values(CASES)) yield* cases();
}
