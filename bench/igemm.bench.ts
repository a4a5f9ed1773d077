import type { Backend } from "#halfbyte/core/backend.js";
import { Tensor } from "#halfbyte/core/tensor.js";
import { igemm, int8LinearMatmul, int8MmDequant, matmul8bit } from "#halfbyte/ops/igemm.js";
import { int8VectorwiseQuant } from "#halfbyte/ops/int8.js";
import { type Bench, input, operand, outputs } from "./harness.js";

const SIDE = 4096;
const ROWS = [1, 64];
const OUTLIERS_EVERY = 512;

/** Rates are multiply-adds per second, of the dequantization results per second. */
export function igemmBenches(): Bench[] {
  const benches: Bench[] = [];
  for (const rows of ROWS) {
    benches.push({
      name: `int8 product ${rows}x${SIDE}x${SIDE}`,
      elements: rows * SIDE * SIDE,
      bytes: SIDE * SIDE + rows * SIDE * 5,
      peer: `igemm_m${rows}`,
      whole: true,
      setup(backend) {
        const { A, B } = operands(backend, rows);
        const out = Tensor.allocate(backend, "i32", [rows, SIDE]);
        return outputs(() => void int8LinearMatmul(A.codes, B.codes, { out }), out);
      },
    });
    for (const threshold of [0, 6]) {
      benches.push({
        name: `LLM.int8() f16 ${rows}x${SIDE}x${SIDE}, threshold ${threshold}`,
        elements: rows * SIDE * SIDE,
        bytes: SIDE * SIDE + rows * SIDE * 4,
        peer: `matmul8bit_f16_m${rows}_threshold${threshold}`,
        whole: true,
        setup(backend) {
          const { B } = operands(backend, rows);
          const A = withOutliers(backend, rows);
          const out = Tensor.allocate(backend, "f16", [rows, SIDE]);
          return outputs(() => void matmul8bit(A, B.codes, B.scales, { threshold, out }), out);
        },
      });
    }
  }
  const rows = 64;
  benches.push({
    name: `int8 product ${rows}x${SIDE}x${SIDE}, B not transposed`,
    elements: rows * SIDE * SIDE,
    bytes: SIDE * SIDE * 3 + rows * SIDE * 5,
    whole: true,
    setup(backend) {
      const { A, B } = operands(backend, rows);
      const out = Tensor.allocate(backend, "i32", [rows, SIDE]);
      return outputs(() => void igemm(A.codes, B.codes, { out }), out);
    },
  });
  benches.push({
    name: `dequantize int32 ${rows}x${SIDE} to f16, with bias`,
    elements: rows * SIDE,
    bytes: rows * SIDE * 6,
    whole: true,
    setup(backend) {
      const { A, B } = operands(backend, rows);
      const sums = int8LinearMatmul(A.codes, B.codes);
      const bias = operand(backend, "f16", { elements: SIDE, begin: 0 });
      const out = Tensor.allocate(backend, "f16", [rows, SIDE]);
      return outputs(() => void int8MmDequant(sums, A.scales, B.scales, { bias, dtype: "f16", out }), out);
    },
  });
  return benches;
}

/** Activations with eight outlier columns, as bench/peer.py has them. */
function withOutliers(backend: Backend, rows: number): Tensor {
  const values = input()
    .subarray(0, rows * SIDE)
    .map((value, i) => value * (i % OUTLIERS_EVERY === 7 ? 400 : 20));
  return Tensor.allocate(backend, "f16", [rows, SIDE]).copyFrom(values);
}

function operands(backend: Backend, rows: number) {
  const quantized = (count: number) => {
    const values = operand(backend, "f16", { elements: count * SIDE, begin: 0 }).reshape([count, SIDE]);
    const [codes, scales] = int8VectorwiseQuant(values);
    return { values, codes, scales };
  };
  return { A: quantized(rows), B: quantized(SIDE) };
}
