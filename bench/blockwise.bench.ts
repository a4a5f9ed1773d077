import { DTYPE_BYTES } from "#halfbyte/core/dtype.js";
import { Tensor } from "#halfbyte/core/tensor.js";
import { type CodeSearch, dequantizeBlockwise, quantizeBlockwise } from "#halfbyte/ops/blockwise.js";
import { type Bench, operand, outputs } from "./harness.js";

export function blockwiseBenches(elements: number): Bench[] {
  const state = elements + (elements / 256) * 4;
  const quantize = (name: string, dtype: "f32" | "bf16" | "f16", search: CodeSearch, peer?: string): Bench => ({
    name: `${name} ${dtype}`,
    elements,
    bytes: elements * DTYPE_BYTES[dtype] + state,
    peer,
    setup(backend, work) {
      const A = operand(backend, dtype, work);
      const out = Tensor.allocate(backend, "u8", [work.elements]);
      const absmax = Tensor.allocate(backend, "f32", [work.elements / 256]);
      return outputs(() => void quantizeBlockwise(A, { blocksize: 256, out, absmax, search }), out, absmax);
    },
  });
  const benches: Bench[] = [];
  for (const dtype of ["f32", "bf16", "f16"] as const) {
    benches.push(quantize("quantize 8-bit dynamic block 256", dtype, "auto", `quantize_blockwise_${dtype}`));
    benches.push({
      name: `dequantize 8-bit dynamic block 256 ${dtype}`,
      elements,
      bytes: elements * DTYPE_BYTES[dtype] + state,
      peer: `dequantize_blockwise_${dtype}`,
      setup(backend, work) {
        const A = operand(backend, dtype, work);
        const [codes, state] = quantizeBlockwise(A, { blocksize: 256 });
        return outputs(() => void dequantizeBlockwise(codes, state, { out: A }), A);
      },
    });
  }
  benches.push(quantize("quantize 8-bit, binary search,", "f32", "exact"));
  return benches;
}
