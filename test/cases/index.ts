import { blockwiseCases } from "./blockwise.js";
import type { Case } from "./case.js";
import { codebookCases } from "./codebooks.js";
import { convertCases } from "./convert.js";
import { fourbitCases } from "./fourbit.js";
import { int8Cases } from "./int8.js";
import { memoryCases } from "./memory.js";
import { sumCases } from "./sum.js";

/** All cases by family: those of the registry, and what tensors do by themselves (`memory`, `convert`). */
export const CASES: Readonly<Record<string, () => Iterable<Case>>> = {
  blockwise: blockwiseCases,
  codebooks: codebookCases,
  convert: convertCases,
  fourbit: fourbitCases,
  int8: int8Cases,
  memory: memoryCases,
  sum: sumCases,
};

export function* allCases(): Generator<Case> {
  for (const cases of Object.values(CASES)) yield* cases();
}
