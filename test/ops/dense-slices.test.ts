/** The dense path of a 4-bit product, which the cpu backend does not choose: its slices, with the cpu's kernels. */
import { describe, expect, test } from "vitest";
import type { FloatDType } from "#halfbyte/core/dtype.js";
import { Tensor } from "#halfbyte/core/tensor.js";
import { dequantize4bit, matmul, type QuantState, quantize4bit, tidy } from "#halfbyte/index.js";
import { checkWeight, multiplyDecoded } from "#halfbyte/ops/matmul4bit.js";
import { withBackend } from "../helpers/backends.js";
import { normals } from "../helpers/random.js";

const M = 3;
const CASES = [
  { dtype: "f32", n: 300, k: 64, blocksize: 64, nested: false },
  { dtype: "f16", n: 517, k: 48, blocksize: 32, nested: true },
  { dtype: "bf16", n: 259, k: 33, blocksize: 64, nested: false },
  { dtype: "f16", n: 1025, k: 5, blocksize: 4096, nested: true },
] as const;

describe("slices give what the whole weight gives", () => {
  test.each(CASES)(
    "$n x $k, blocks of $blocksize, $dtype, nested: $nested",
    async ({ dtype, n, k, blocksize, nested }) => {
      await withBackend({}, (backend) =>
        tidy(() => {
          const make = (shape: number[], seed: string): Tensor<FloatDType> =>
            Tensor.allocate(backend, "f32", shape)
              .copyFrom(Float32Array.from(normals(shape[0]! * (shape[1] ?? 1), seed, 1)))
              .to(dtype);
          const options = { quantType: "nf4", blocksize, compressStatistics: nested } as const;
          const [B, state]: [Tensor, QuantState] = quantize4bit(make([n, k], "weight"), options);
          const [A, bias] = [make([M, k], "A"), make([n], "bias")];
          const expected = matmul(A, dequantize4bit(B, state), { bias, transposeB: true }).bytesSync();
          const launch = backend.launch.bind(backend);
          let products = 0;
          backend.launch = (kernel, operands, context) => {
            if (kernel === "matmul") products++;
            launch(kernel, operands, context);
          };
          const slices: number[] = [];
          for (const bytes of [1, 200 * k * 4, 1 << 30]) {
            const y = Tensor.allocate(backend, dtype, [M, n]);
            products = 0;
            multiplyDecoded(A, checkWeight("test", B, state, A), bias, y, M, bytes);
            slices.push(products);
            expect(Buffer.compare(y.bytesSync(), expected), `${bytes} bytes`).toBe(0);
          }
          expect(slices.at(-1)).toBe(1);
          if (blocksize < 4096) expect(slices[0]).toBeGreaterThan(2);
        }),
      );
    },
  );
});
