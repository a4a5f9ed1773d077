import { mean } from "#halfbyte/ops/sum.js";
import { type Bench, ELEMENTS, operand } from "./harness.js";

export const sumBenches: Bench[] = [
  {
    name: "mean f32 (float64 tree)",
    elements: ELEMENTS,
    bytes: ELEMENTS * 4,
    setup(backend) {
      const A = operand(backend, "f32");
      return () => mean(A).dispose();
    },
  },
];
