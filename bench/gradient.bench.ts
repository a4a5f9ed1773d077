import { DTYPE_BYTES } from "#halfbyte/core/dtype.js";
import type { Tensor } from "#halfbyte/core/tensor.js";
import { clipGradNorm } from "#halfbyte/ops/gradient.js";
import type { Bench } from "./harness.js";
import { gradient } from "./optimizer.bench.js";

export function gradientBenches(elements: number, dtypes: readonly ("f32" | "bf16")[] = ["f32", "bf16"]): Bench[] {
  return dtypes.flatMap((dtype) =>
    [
      { name: "norm of gradients", peer: "norm", maxNorm: Number.POSITIVE_INFINITY, passes: 1 },
      { name: "gradients held to a norm", peer: "clip", maxNorm: 1, passes: 3 },
    ].map(
      ({ name, peer, maxNorm, passes }): Bench => ({
        name: `${name} ${dtype}`,
        elements,
        bytes: passes * elements * DTYPE_BYTES[dtype],
        peer: `${peer}_${dtype}`,
        whole: true,
        setup(backend, work) {
          const g = gradient(backend, dtype, work);
          // Ever less, so that there is always something to scale.
          let limit = maxNorm;
          const clip = (): Tensor => {
            limit *= 0.999;
            return clipGradNorm([g], limit);
          };
          return { run: () => clip().dispose(), outputs: () => [clip(), g] };
        },
      }),
    ),
  );
}
