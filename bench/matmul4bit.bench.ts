import { DTYPE_BYTES } from "#halfbyte/core/dtype.js";
import { Tensor } from "#halfbyte/core/tensor.js";
import { quantize4bit } from "#halfbyte/ops/fourbit.js";
import { matmul4bit, matmul4bitBackward } from "#halfbyte/ops/matmul4bit.js";
import { type Bench, operand, outputs } from "./harness.js";

const SIDE = 4096;
const PACKED_BYTES = (SIDE * SIDE) / 2 + (SIDE * SIDE) / 16;

/** The weights of SmolLM2-135M, and the rows of activations they are measured with. */
const SMALL = [
  [576, 576],
  [192, 576],
  [1536, 576],
  [576, 1536],
  [49152, 576],
] as const;
const SMALL_ROWS = [1, 37];

function smallBench(rows: number, n: number, k: number, mode: "exact" | "fast"): Bench {
  return {
    name: `nf4 ${mode} bf16 ${rows}x${n}x${k}`,
    elements: rows * n * k,
    bytes: (n * k) / 2 + (n * k) / 16 + 2 * rows * (n + k),
    whole: true,
    setup(backend) {
      const A = operand(backend, "bf16", { elements: rows * k, begin: 0 }).reshape([rows, k]);
      const weight = operand(backend, "bf16", { elements: n * k, begin: 0 }).reshape([n, k]);
      const [packed, state] = quantize4bit(weight, { quantType: "nf4" });
      weight.dispose();
      const out = Tensor.allocate(backend, "bf16", [rows, n]);
      return outputs(() => void matmul4bit(A, packed, state, { mode, out }), out);
    },
  };
}

/** Rates are multiply-adds per second. */
export function matmul4bitBenches(): Bench[] {
  const benches: Bench[] = [];
  for (const dtype of ["f32", "bf16", "f16"] as const) {
    for (const rows of dtype === "f16" ? [1, 64] : [1, 2, 4, 8, 16, 64]) {
      for (const mode of ["exact", "fast"] as const) {
        benches.push({
          name: `nf4 ${mode} ${dtype} ${rows}x${SIDE}x${SIDE}`,
          elements: rows * SIDE * SIDE,
          bytes: PACKED_BYTES + 2 * rows * SIDE * DTYPE_BYTES[dtype],
          peer: `matmul4bit_nf4_${dtype}_m${rows}`,
          whole: true,
          setup(backend) {
            const A = operand(backend, dtype, { elements: rows * SIDE, begin: 0 }).reshape([rows, SIDE]);
            const weight = operand(backend, dtype, { elements: SIDE * SIDE, begin: 0 }).reshape([SIDE, SIDE]);
            const [packed, state] = quantize4bit(weight, { quantType: "nf4" });
            weight.dispose();
            const out = Tensor.allocate(backend, dtype, [rows, SIDE]);
            return outputs(() => void matmul4bit(A, packed, state, { mode, out }), out);
          },
        });
      }
    }
  }
  for (const [n, k] of SMALL) {
    for (const rows of SMALL_ROWS) {
      for (const mode of ["exact", "fast"] as const) benches.push(smallBench(rows, n, k, mode));
    }
  }
  for (const rows of [1, 64]) {
    benches.push({
      name: `nf4 backward bf16 ${rows}x${SIDE}x${SIDE}`,
      elements: rows * SIDE * SIDE,
      bytes: PACKED_BYTES + 4 * rows * SIDE,
      whole: true,
      setup(backend) {
        const grad = operand(backend, "bf16", { elements: rows * SIDE, begin: 0 }).reshape([rows, SIDE]);
        const weight = operand(backend, "bf16", { elements: SIDE * SIDE, begin: 0 }).reshape([SIDE, SIDE]);
        const [packed, state] = quantize4bit(weight, { quantType: "nf4" });
        weight.dispose();
        const out = Tensor.allocate(backend, "bf16", [rows, SIDE]);
        return outputs(() => void matmul4bitBackward(grad, packed, state, { out }), out);
      },
    });
  }
  return benches;
}
