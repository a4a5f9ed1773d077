import { DTYPE_BYTES } from "#halfbyte/core/dtype.js";
import { Tensor } from "#halfbyte/core/tensor.js";
import { dequantize4bit, quantize4bit } from "#halfbyte/ops/fourbit.js";
import { type Bench, operand, outputs } from "./harness.js";

export function fourbitBenches(elements: number): Bench[] {
  const state = elements / 2 + (elements / 64) * 4;
  const benches: Bench[] = [];
  for (const quantType of ["nf4", "fp4"] as const) {
    for (const dtype of ["f32", "bf16", "f16"] as const) {
      benches.push({
        name: `quantize ${quantType} block 64 ${dtype}`,
        elements,
        bytes: elements * DTYPE_BYTES[dtype] + state,
        peer: `quantize_${quantType}_${dtype}`,
        setup(backend, work) {
          const A = operand(backend, dtype, work);
          const out = Tensor.allocate(backend, "u8", [work.elements / 2]);
          const absmax = Tensor.allocate(backend, "f32", [work.elements / 64]);
          return outputs(() => void quantize4bit(A, { quantType, out, absmax }), out, absmax);
        },
      });
      benches.push({
        name: `dequantize ${quantType} block 64 ${dtype}`,
        elements,
        bytes: elements * DTYPE_BYTES[dtype] + state,
        peer: `dequantize_${quantType}_${dtype}`,
        setup(backend, work) {
          const A = operand(backend, dtype, work);
          const [packed, state] = quantize4bit(A, { quantType });
          return outputs(() => void dequantize4bit(packed, state, { out: A }), A);
        },
      });
    }
  }
  const double = { quantType: "nf4", compressStatistics: true } as const;
  benches.push({
    name: "quantize nf4 block 64 bf16, double",
    elements,
    bytes: elements * 2 + elements / 2 + elements / 64,
    peer: "quantize_nf4_bf16_double",
    whole: true,
    setup(backend, work) {
      const A = operand(backend, "bf16", work);
      const out = Tensor.allocate(backend, "u8", [work.elements / 2]);
      const quantize = () => quantize4bit(A, { ...double, out })[1];
      return { run: () => quantize().dispose(), outputs: () => [out, ...quantize().tensors()] };
    },
  });
  benches.push({
    name: "dequantize nf4 block 64 bf16, double",
    elements,
    bytes: elements * 2 + elements / 2 + elements / 64,
    peer: "dequantize_nf4_bf16_double",
    whole: true,
    setup(backend, work) {
      const A = operand(backend, "bf16", work);
      const [packed, state] = quantize4bit(A, double);
      return outputs(() => void dequantize4bit(packed, state, { out: A }), A);
    },
  });
  return benches;
}
