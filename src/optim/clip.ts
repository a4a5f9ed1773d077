/** Gradients of parameters held to a norm. */
import type { Tensor } from "../core/tensor.js";
import { type ClipGradNormOptions, clipGradNorm as clipGradients } from "../ops/gradient.js";
import { describe, parametersOf } from "./groups.js";
import type { NamedParam } from "./options.js";

/**
 * Multiplies the gradients of `parameters` by min(1, maxNorm / (norm + 1e-6)) in place, where norm is their 2-norm as if they were one vector
 * (torch's `clip_grad_norm_`). Parameters without a gradient are left out. Call it before `step`.
 *
 * The sum has one order, which sizes and dtypes decide: the same bits on every device and for any number of workers. One NaN makes the norm
 * and so every gradient NaN, and `step` then blames the first parameter; `errorIfNonfinite` names the one that had it, and leaves
 * all gradients as they are.
 * @param parameters a parameter or a list of them, with names or without
 * @param maxNorm not negative; Infinity measures and changes nothing
 * @returns the norm before clipping, an f32 scalar on the parameters' device; 0 where there is no gradient
 * @throws ArgumentError (also for gradients that share memory), DTypeError, DeviceError, DisposedError, OutOfMemoryError
 */
export function clipGradNorm(
  parameters: Tensor | Iterable<NamedParam>,
  maxNorm: number,
  options: ClipGradNormOptions = {},
): Tensor<"f32"> {
  const all = parametersOf("clipGradNorm", parameters);
  const own = all.filter(({ p }) => p.grad !== null);
  const backend = all[0]?.p.backend;
  const gradients = own.map(({ p }) => p.grad!);
  if (!backend) return clipGradients(gradients, maxNorm, options);
  const indices = own.map(({ index }) => index);
  const nameOf = (i: number): string => `gradient of ${describe(own[i]!)}`;
  return clipGradients(gradients, maxNorm, options, { backend, indices, nameOf });
}
