import { DTYPE_BYTES, DTYPE_ID } from "#halfbyte/core/dtype.js";
import { Tensor } from "#halfbyte/core/tensor.js";
import { type Bench, ELEMENTS, operand } from "./harness.js";

const PAIRS = [
  ["f32", "bf16"],
  ["f32", "f16"],
  ["bf16", "f32"],
  ["f16", "f32"],
] as const;

export const convertBenches: Bench[] = PAIRS.map(([from, to]) => ({
  name: `convert ${from} to ${to}`,
  elements: ELEMENTS,
  bytes: ELEMENTS * (DTYPE_BYTES[from] + DTYPE_BYTES[to]),
  setup(backend) {
    const x = operand(backend, from);
    const y = Tensor.allocate(backend, to, [ELEMENTS]);
    return () => backend.launch("convert", { x, y, n: ELEMENTS, from: DTYPE_ID[from], to: DTYPE_ID[to] });
  },
}));
