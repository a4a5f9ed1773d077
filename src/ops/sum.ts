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
    kernels: ["sumChunks", "meanOfSum"],
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
    let partial: Tensor = x;
    let wide = 0;
    for (let n = x.size; wide === 0 || n > 1; wide = 1) {
      const chunks = ceilDiv(n, SUM_CHUNK);
      const sums = float64(backend, chunks);
      backend.launch("sumChunks", { x: partial, y: sums, n, wide });
      partial = sums;
      n = chunks;
    }
    backend.launch("meanOfSum", { x: partial, y: result, n: x.size });
    return result;
  });
}

/** Scratch for float64 partial sums, which no tensor dtype names. */
function float64(backend: Backend, n: number): Tensor {
  return Tensor.allocate(backend, "u8", [8 * n]);
}
