import { DTYPE_BYTES } from "#halfbyte/core/dtype.js";
import { Tensor } from "#halfbyte/core/tensor.js";
import { matmul } from "#halfbyte/ops/matmul.js";
import { type Bench, operand, outputs } from "./harness.js";

const SIDE = 4096;
const ROWS = [1, 64];

/** Rates are multiply-adds per second. */
export function matmulBenches(): Bench[] {
  const benches: Bench[] = [];
  for (const dtype of ["f32", "f16", "bf16"] as const) {
    for (const transposeB of [true, false]) {
      for (const rows of ROWS) {
        benches.push({
          name: `matmul ${dtype} ${rows}x${SIDE}x${SIDE}${transposeB ? "" : ", B not transposed"}`,
          elements: rows * SIDE * SIDE,
          bytes: (SIDE * SIDE + 2 * rows * SIDE) * DTYPE_BYTES[dtype],
          peer: transposeB ? `matmul_${dtype}_m${rows}` : undefined,
          whole: true,
          setup(backend) {
            const A = operand(backend, dtype, { elements: rows * SIDE, begin: 0 }).reshape([rows, SIDE]);
            const B = operand(backend, dtype, { elements: SIDE * SIDE, begin: 0 }).reshape([SIDE, SIDE]);
            const out = Tensor.allocate(backend, dtype, [rows, SIDE]);
            return outputs(() => void matmul(A, B, { transposeB, out }), out);
          },
        });
      }
    }
  }
  return benches;
}
