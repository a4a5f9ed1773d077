import { DTYPE_BYTES } from "#halfbyte/core/dtype.js";
import type { Tensor } from "#halfbyte/core/tensor.js";
import { int8DoubleQuant, int8VectorwiseDequant, int8VectorwiseQuant } from "#halfbyte/ops/int8.js";
import { type Bench, operand, outputs, type Work } from "./harness.js";

const COLS = 4096;
/** Rows of the input hold some magnitudes above it. */
const THRESHOLD = 0.09;
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
        const quantize = (): Tensor[] => {
          const [q, scale] = int8VectorwiseQuant(A);
          return [q, scale];
        };
        return {
          run: () => {
            for (const t of quantize()) t.dispose();
          },
          outputs: quantize,
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
  const rowsAndBytes = elements * 3 + (elements / COLS) * 4;
  benches.push({
    name: `quantize int8 rows of ${COLS} f16, outliers in every row`,
    elements,
    bytes: rowsAndBytes,
    whole: true,
    setup(backend, work) {
      const A = operand(backend, "f16", work).reshape(shape(work));
      const quantize = (): Tensor[] => {
        const [q, scale, outliers] = int8VectorwiseQuant(A, { threshold: THRESHOLD });
        outliers?.dispose();
        return [q, scale];
      };
      return { run: () => quantize().forEach((t) => void t.dispose()), outputs: quantize };
    },
  });
  benches.push({
    name: `quantize int8 rows of ${COLS} and columns f16`,
    elements,
    bytes: rowsAndBytes + elements * 5,
    whole: true,
    setup(backend, work) {
      const A = operand(backend, "f16", work).reshape(shape(work));
      const quantize = (): Tensor[] => {
        const [rowCodes, columnCodes, rowStats, columnStats] = int8DoubleQuant(A);
        return [rowCodes, columnCodes, rowStats, columnStats];
      };
      return { run: () => quantize().forEach((t) => void t.dispose()), outputs: quantize };
    },
  });
  return benches;
}
