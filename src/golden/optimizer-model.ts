/**
 * What a step of an optimizer comes to in float64, and how far two kernels may be apart. Formulas and bounds: docs/numerics.md,
 * "Optimizers"; the bounds leave room for one kernel that fuses and one that does not, not for another order of factors.
 */
import type { FloatDType } from "../core/dtype.js";
import type { OptimizerFamily } from "../core/optimizers.js";

/** Hyper-parameters of a step, each a float32. */
export interface ModelStep {
  readonly family: OptimizerFamily;
  readonly lr: number;
  readonly beta1: number;
  readonly beta2: number;
  readonly beta3: number;
  readonly eps: number;
  readonly weightDecay: number;
  /** Momentum's first step. */
  readonly first: boolean;
}

/** A new state: each element's value, and how far from it one may be. */
export interface ModelState {
  readonly value: Float64Array;
  readonly bound: Float64Array;
}

/** Half a unit in the last place of a float32 near 1: what one rounding may change. */
const ROUNDING = 2 ** -24;
/** Roundings that two kernels may be apart, of the sum of the terms' magnitudes. */
const ROUNDINGS = 2;
/** Of results that are denormal the bound is absolute. */
const LEAST = 2 * 2 ** -149;

/** Explicit bits of a mantissa, and the least exponent of a normal number. */
const FORMATS = { f32: [23, -126], f16: [10, -14], bf16: [7, -126] } as const satisfies Record<
  FloatDType,
  readonly [number, number]
>;

/** The spacing of a dtype's values at this magnitude. */
function ulpOf(dtype: FloatDType, value: number): number {
  const [mantissa, least] = FORMATS[dtype];
  let exponent = least;
  while (2 ** (exponent + 1) <= Math.abs(value)) exponent++;
  return 2 ** (exponent - mantissa);
}

/** The states after a step, first moments before the second. Gradient scaling is not modelled: golden has none. */
export function modelStates(
  step: ModelStep,
  p: Float32Array,
  g: Float32Array,
  states: readonly Float32Array[],
): ModelState[] {
  const { family, beta1, beta2, beta3, weightDecay } = step;
  const coupled = isCoupled(family) ? weightDecay : 0;
  const betas = { adam: [beta1, beta2], ademamix: [beta1, beta3, beta2] }[family as string] ?? [
    family === "lion" ? beta2 : family === "adagrad" ? 1 : beta1,
  ];
  return states.map((old, k) => {
    const beta = step.first ? 0 : betas[k]!;
    const second = family === "rmsprop" || family === "adagrad" || (k === states.length - 1 && k > 0);
    const rest = family === "momentum" || family === "adagrad" ? 1 : Math.fround(1 - beta);
    const value = new Float64Array(old.length);
    const bound = new Float64Array(old.length);
    for (let i = 0; i < old.length; i++) {
      const moved = g[i]! + coupled * p[i]!;
      const terms = Math.abs(g[i]!) + Math.abs(coupled * p[i]!);
      // With decay in it the gradient is a sum too, whose own bound passes through.
      const off = coupled === 0 ? 0 : ROUNDINGS * ROUNDING * terms * (second ? 2 * Math.abs(moved) : 1);
      const kept = beta * old[i]!;
      value[i] = kept + rest * (second ? moved * moved : moved);
      const sum = Math.abs(kept) + rest * (second ? terms * terms : terms);
      bound[i] = ROUNDINGS * ROUNDING * sum + rest * off + LEAST;
    }
    return { value, bound };
  });
}

const isCoupled = (family: OptimizerFamily): boolean =>
  family === "momentum" || family === "rmsprop" || family === "adagrad";

/** How far two kernels' parameters may be apart: 4 ulp, and a part of the update, more where golden's bias corrections are rough. */
export function parameterBound(family: OptimizerFamily, dtype: FloatDType, before: number, after: number): number {
  const part = family === "adam" || family === "ademamix" ? 1e-4 : 2e-6;
  return 4 * ulpOf(dtype, Math.max(Math.abs(before), Math.abs(after))) + part * Math.abs(after - before);
}
