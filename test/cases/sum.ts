import { mean } from "#halfbyte/ops/sum.js";
import * as scalar from "../helpers/scalar.js";
import { type Case, caseId, floats, LENGTHS } from "./case.js";

export function* sumCases(): Generator<Case> {
  for (const n of [...LENGTHS, 1023, 1024, 1025, 1024 * 1024 + 1]) {
    const id = caseId("mean", "f32", `n=${n}`);
    yield {
      id,
      primitive: "mean",
      dtype: "f32",
      inputs: () => ({ x: floats("f32", n, "normal", id) }),
      run: ({ x }) => ({ y: mean(x!) }),
      expected: ({ x }) => ({ y: { dtype: "f32", shape: [], values: [scalar.mean(x!.values)] } }),
    };
  }
}
