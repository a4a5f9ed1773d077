import type { FloatDType } from "#halfbyte/core/dtype.js";
import { Tensor } from "#halfbyte/core/tensor.js";
import { COOSparseTensor, spmmCoo } from "#halfbyte/ops/sparse.js";
import { type Bench, operand, outputs } from "./harness.js";

const SIDE = 4096;
const ROWS = 64;
/** Entries of a row: one in 32. */
const ENTRIES = SIDE / 32;

/** Rates are multiply-adds per second. */
export function sparseBenches(): Bench[] {
  const nnz = ROWS * ENTRIES;
  return (["f32", "f16", "bf16"] as const).map((dtype) => ({
    name: `spmm ${dtype} ${ROWS}x${SIDE}x${SIDE}, ${nnz} entries`,
    elements: nnz * SIDE,
    bytes: nnz * SIDE * (dtype === "f32" ? 4 : 2),
    whole: true,
    setup(backend) {
      const rowidx = indices(backend, nnz, (i) => Math.floor(i / ENTRIES));
      const colidx = indices(backend, nnz, (i) => ((i % ENTRIES) * 32 + ((i * 7) % 32)) % SIDE);
      const values = operand(backend, dtype, { elements: nnz, begin: 0 }) as Tensor<FloatDType>;
      const A = new COOSparseTensor(ROWS, SIDE, rowidx, colidx, values);
      const B = operand(backend, dtype, { elements: SIDE * SIDE, begin: 0 }).reshape([SIDE, SIDE]);
      const out = Tensor.allocate(backend, dtype, [ROWS, SIDE]);
      return outputs(() => void spmmCoo(A, B, { out }), out);
    },
  }));
}

function indices(backend: Parameters<typeof operand>[0], count: number, at: (i: number) => number): Tensor<"i32"> {
  const tensor = Tensor.allocate(backend, "i32", [count]);
  const words = Int32Array.from({ length: count }, (_, i) => at(i));
  backend.write(tensor.storage, tensor.byteOffset, new Uint8Array(words.buffer));
  return tensor;
}
