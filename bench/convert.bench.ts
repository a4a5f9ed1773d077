import { DTYPE_BYTES, DTYPE_ID } from "#halfbyte/core/dtype.js";
import { Tensor } from "#halfbyte/core/tensor.js";
import { type Bench, operand, outputs } from "./harness.js";

const PAIRS = [
  ["f32", "bf16"],
  ["f32", "f16"],
  ["bf16", "f32"],
  ["f16", "f32"],
] as const;

export const convertBenches = (elements: number): Bench[] =>
  PAIRS.map(([from, to]) => ({
    name: `convert ${from} to ${to}`,
    elements,
    bytes: elements * (DTYPE_BYTES[from] + DTYPE_BYTES[to]),
    peer: `convert_${from}_${to}`,
    setup(backend, work) {
      const x = operand(backend, from, work);
      const y = Tensor.allocate(backend, to, [work.elements]);
      const operands = { x, y, n: work.elements, from: DTYPE_ID[from], to: DTYPE_ID[to] };
      return outputs(() => backend.launch("convert", operands), y);
    },
  }));
