import { DTYPE_BYTES } from "#halfbyte/core/dtype.js";
import { int8VectorwiseDequant, int8VectorwiseQuant } from "#halfbyte/ops/int8.js";
import { type Bench, operand, outputs, type Work } from "./harness.js";

const COLS = 4096;
const shape = ({ elements }: Work): [number, number] => [elements / COLS, COLS];

export function int8Benches(elements: number): Bench[] {
  const benches: Bench[] = [];
  for (const dtype of ["f32", "bf16", "f16"] as const) {
    const bytes = elements * DTYPE_BYTES[dtype] + elements + (elements / COLS) * 4;
    benches.push({
      name: `quantize int8 rows of ${COLS} ${dtype}`,
      elements,
      bytes,
      peer: `int8_vectorwise_quant_${dtype}`,
      setup(backend, work) {
        const A = operand(backend, dtype, work).reshape(shape(work));
        const quantize = () => int8VectorwiseQuant(A).slice(0, 2);
        return {
          run: () => {
            for (const t of quantize()) t?.dispose();
          },
          outputs: () => quantize().map((t) => t!),
        };
      },
    });
    benches.push({
      name: `dequantize int8 rows of ${COLS} ${dtype}`,
      elements,
      bytes,
      setup(backend, work) {
        const A = operand(backend, dtype, work).reshape(shape(work));
        const [q, scale] = int8VectorwiseQuant(A);
        return outputs(() => void int8VectorwiseDequant(q, scale, { dtype, out: A }), A);
      },
    });
  }
  return benches;
}
