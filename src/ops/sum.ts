/** Reductions with one fixed order of summation on every backend. */
import type { Backend } from "../core/backend.js";
import { SUM_CHUNK } from "../core/kernels.js";
import { tidy } from "../core/scope.js";
import { ceilDiv } from "../core/shape.js";
import { Tensor } from "../core/tensor.js";
import { checkTensor } from "./check.js";

export const sumPrimitives = {
  mean: {
    upstream: "torch.mean",
    family: "sum",
    kernels: ["sumChunks", "meanOfSums"],
    dtypes: ["f32"],
    golden: { none: "covered by the nested offsets of quantize_4bit_nested" },
    summary: "mean in float64 over a fixed summation tree, rounded once",
  },
} as const;

/**
 * The mean of an f32 tensor as a scalar f32 tensor: summed in float64 over a tree of chunks of 1,024 elements (32 lanes each,
 * then pairwise; docs/architecture.md, "The summation tree"), divided in float64, rounded once. 0 for an empty tensor.
 * @throws DTypeError, DisposedError, OutOfMemoryError
 */
export function mean(x: Tensor): Tensor<"f32"> {
  checkTensor("mean", "x", x, ["f32"]);
  const { backend } = x;
  return tidy(() => {
    const result = Tensor.allocate(backend, "f32", []);
    if (x.size === 0) {
      backend.launch("fill", { dst: result, bytes: 4, value: 0 });
      return result;
    }
    let sums: Tensor = x;
    let count = x.size;
    for (let wide = 0; wide === 0 || count > SUM_CHUNK ** 2; wide = 1) {
      const chunks = ceilDiv(count, SUM_CHUNK);
      const level = float64(backend, chunks);
      backend.launch("sumChunks", { x: sums, y: level, n: count, wide });
      sums = level;
      count = chunks;
    }
    backend.launch("meanOfSums", { x: sums, y: result, sums: count, n: x.size });
    return result;
  });
}

/** Scratch for float64 partial sums, which no tensor dtype names. */
function float64(backend: Backend, n: number): Tensor {
  return Tensor.allocate(backend, "u8", [8 * n]);
}
