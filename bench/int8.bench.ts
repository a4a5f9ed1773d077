import { DTYPE_BYTES } from "#halfbyte/core/dtype.js";
import { int8VectorwiseDequant, int8VectorwiseQuant } from "#halfbyte/ops/int8.js";
import { type Bench, ELEMENTS, operand } from "./harness.js";

const COLS = 4096;

export const int8Benches: Bench[] = [];
for (const dtype of ["f32", "bf16", "f16"] as const) {
  const bytes = ELEMENTS * DTYPE_BYTES[dtype] + ELEMENTS + (ELEMENTS / COLS) * 4;
  int8Benches.push({
    name: `quantize int8 rows of ${COLS} ${dtype}`,
    elements: ELEMENTS,
    bytes,
    peer: `int8_vectorwise_quant_${dtype}`,
    setup(backend) {
      const A = operand(backend, dtype).reshape([ELEMENTS / COLS, COLS]);
      return () => {
        const [q, scale] = int8VectorwiseQuant(A);
        q.dispose();
        scale.dispose();
      };
    },
  });
  int8Benches.push({
    name: `dequantize int8 rows of ${COLS} ${dtype}`,
    elements: ELEMENTS,
    bytes,
    setup(backend) {
      const A = operand(backend, dtype).reshape([ELEMENTS / COLS, COLS]);
      const [q, scale] = int8VectorwiseQuant(A);
      return () => void int8VectorwiseDequant(q, scale, { dtype, out: A });
    },
  });
}
