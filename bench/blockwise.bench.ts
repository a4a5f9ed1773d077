import { DTYPE_BYTES } from "#halfbyte/core/dtype.js";
import { Tensor } from "#halfbyte/core/tensor.js";
import { dequantizeBlockwise, quantizeBlockwise } from "#halfbyte/ops/blockwise.js";
import { type Bench, ELEMENTS, operand } from "./harness.js";

const STATE = ELEMENTS + (ELEMENTS / 256) * 4;

export const blockwiseBenches: Bench[] = [];
for (const dtype of ["f32", "bf16", "f16"] as const) {
  blockwiseBenches.push({
    name: `quantize 8-bit dynamic block 256 ${dtype}`,
    elements: ELEMENTS,
    bytes: ELEMENTS * DTYPE_BYTES[dtype] + STATE,
    peer: `quantize_blockwise_${dtype}`,
    setup(backend) {
      const A = operand(backend, dtype);
      const out = Tensor.allocate(backend, "u8", [ELEMENTS]);
      const absmax = Tensor.allocate(backend, "f32", [ELEMENTS / 256]);
      return () => void quantizeBlockwise(A, { blocksize: 256, out, absmax });
    },
  });
  blockwiseBenches.push({
    name: `dequantize 8-bit dynamic block 256 ${dtype}`,
    elements: ELEMENTS,
    bytes: ELEMENTS * DTYPE_BYTES[dtype] + STATE,
    peer: `dequantize_blockwise_${dtype}`,
    setup(backend) {
      const A = operand(backend, dtype);
      const [codes, state] = quantizeBlockwise(A, { blocksize: 256 });
      return () => void dequantizeBlockwise(codes, state, { out: A });
    },
  });
}
blockwiseBenches.push({
  name: "quantize 8-bit, binary search, f32",
  elements: ELEMENTS,
  bytes: ELEMENTS * 4 + STATE,
  setup(backend) {
    const A = operand(backend, "f32");
    const out = Tensor.allocate(backend, "u8", [ELEMENTS]);
    const absmax = Tensor.allocate(backend, "f32", [ELEMENTS / 256]);
    return () => void quantizeBlockwise(A, { blocksize: 256, out, absmax, search: "exact" });
  },
});
