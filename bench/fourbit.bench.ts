import { DTYPE_BYTES } from "#halfbyte/core/dtype.js";
import { Tensor } from "#halfbyte/core/tensor.js";
import { dequantize4bit, quantize4bit } from "#halfbyte/ops/fourbit.js";
import { type Bench, ELEMENTS, operand } from "./harness.js";

const STATE = ELEMENTS / 2 + (ELEMENTS / 64) * 4;

export const fourbitBenches: Bench[] = [];
for (const quantType of ["nf4", "fp4"] as const) {
  for (const dtype of ["f32", "bf16", "f16"] as const) {
    fourbitBenches.push({
      name: `quantize ${quantType} block 64 ${dtype}`,
      elements: ELEMENTS,
      bytes: ELEMENTS * DTYPE_BYTES[dtype] + STATE,
      peer: `quantize_${quantType}_${dtype}`,
      setup(backend) {
        const A = operand(backend, dtype);
        const out = Tensor.allocate(backend, "u8", [ELEMENTS / 2]);
        const absmax = Tensor.allocate(backend, "f32", [ELEMENTS / 64]);
        return () => void quantize4bit(A, { quantType, out, absmax });
      },
    });
    fourbitBenches.push({
      name: `dequantize ${quantType} block 64 ${dtype}`,
      elements: ELEMENTS,
      bytes: ELEMENTS * DTYPE_BYTES[dtype] + STATE,
      peer: `dequantize_${quantType}_${dtype}`,
      setup(backend) {
        const A = operand(backend, dtype);
        const [packed, state] = quantize4bit(A, { quantType });
        return () => void dequantize4bit(packed, state, { out: A });
      },
    });
  }
}
fourbitBenches.push({
  name: "quantize nf4 block 64 bf16, double",
  elements: ELEMENTS,
  bytes: ELEMENTS * 2 + ELEMENTS / 2 + ELEMENTS / 64,
  setup(backend) {
    const A = operand(backend, "bf16");
    const out = Tensor.allocate(backend, "u8", [ELEMENTS / 2]);
    return () => {
      const [, state] = quantize4bit(A, { quantType: "nf4", compressStatistics: true, out });
      state.dispose();
    };
  },
});
