import { blockwiseCases } from "./blockwise.js";
import type { Case } from "./case.js";
import { fourbitCases } from "./fourbit.js";
import { int8Cases } from "./int8.js";
import { sumCases } from "./sum.js";

/** All cases by family: the families of the registry that launch kernels. */
export const CASES: Readonly<Record<string, () => Iterable<Case>>> = {
  blockwise: blockwiseCases,
  fourbit: fourbitCases,
  int8: int8Cases,
  sum: sumCases,
};

export function* allCases(): Generator<Case> {
  for (const cases of Object.values(CASES)) yield* cases();
}
