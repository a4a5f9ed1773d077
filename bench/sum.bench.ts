import { mean } from "#halfbyte/ops/sum.js";
import { type Bench, operand } from "./harness.js";

export const sumBenches = (elements: number): Bench[] => [
  {
    name: "mean f32 (float64 tree)",
    elements,
    bytes: elements * 4,
    peer: "mean_f32",
    whole: true,
    setup(backend, work) {
      const A = operand(backend, "f32", work);
      return { run: () => mean(A).dispose(), outputs: () => [mean(A)] };
    },
  },
];
