/**
 * The numbers of one optimizer step: checked hyper-parameters, and the row of float32 that kernels read (STEP_SCALARS). Formulas:
 * docs/numerics.md, "Optimizers"; those of AdEMAMix's schedules are bitsandbytes'.
 */
import type { FloatDType } from "../core/dtype.js";
import { ArgumentError } from "../core/errors.js";
import { type OptimizerFamily, STEP_ROW, STEP_SCALARS } from "../core/optimizers.js";

/** Bits of a state's element. */
export type StateBits = 8 | 32;

/** The hyper-parameters of one step, as the user gives them. */
export interface StepHyper {
  readonly lr: number;
  readonly beta1: number;
  readonly beta2: number;
  readonly beta3?: number;
  readonly eps: number;
  readonly weightDecay: number;
  readonly alpha?: number;
  /** Steps in which `alpha` grows from 0, and `beta3` from beta1, to what they are; 0: at once. */
  readonly tAlpha?: number;
  readonly tBeta3?: number;
  /** The number of the step, from 1. */
  readonly step: number;
  readonly gnormScale?: number;
  /** Above 0, the norm of an update is held to this many times that of its parameter. */
  readonly maxUnorm?: number;
  readonly skipZeros?: boolean;
}

/** The greatest step: one more could not be counted in 32 bits. */
const MOST_STEPS = 2 ** 32 - 1;

const f32 = Math.fround;

/**
 * @throws ArgumentError, naming the hyper-parameter, for what is not a finite number of its range once it is rounded to float32, where
 *   kernels have it: 0 <= beta < 1; lr, eps, weightDecay, alpha and maxUnorm not negative
 */
export function checkHyper(op: string, family: OptimizerFamily, hyper: StepHyper): void {
  const { lr, beta1, beta2, beta3 = 0, eps, weightDecay, alpha = 0, tAlpha = 0, tBeta3 = 0 } = hyper;
  const { step, gnormScale = 1, maxUnorm = 0, skipZeros = false } = hyper;
  if (!Number.isInteger(step) || step < 1 || step > MOST_STEPS) {
    throw new ArgumentError(op, "step", "an integer from 1 to 2^32 - 1", String(step));
  }
  const positive = (name: string, value: number): void => {
    // NaN and numbers beyond float32 too.
    if (typeof value !== "number" || !(value >= 0 && f32(value) < Number.POSITIVE_INFINITY)) {
      throw new ArgumentError(op, name, "a finite float32 that is not negative", String(value));
    }
  };
  positive("lr", lr);
  positive("eps", eps);
  positive("weightDecay", weightDecay);
  positive("alpha", alpha);
  positive("maxUnorm", maxUnorm);
  for (const [name, value] of [
    ["beta1", beta1],
    ["beta2", beta2],
    ["beta3", beta3],
  ] as const) {
    if (typeof value !== "number" || !(value >= 0 && f32(value) < 1)) {
      throw new ArgumentError(op, name, "a number from 0 to below 1 in float32", String(value));
    }
  }
  if (typeof gnormScale !== "number" || !Number.isFinite(f32(gnormScale))) {
    throw new ArgumentError(op, "gnormScale", "a finite float32", String(gnormScale));
  }
  if (typeof skipZeros !== "boolean") throw new ArgumentError(op, "skipZeros", "true or false", String(skipZeros));
  for (const [name, value] of [
    ["tAlpha", tAlpha],
    ["tBeta3", tBeta3],
  ] as const) {
    if (!Number.isFinite(value) || value < 0) throw new ArgumentError(op, name, "a number of steps", String(value));
  }
  if (family === "ademamix" && tBeta3 > 0) {
    // Their logarithms.
    for (const [name, value] of [
      ["beta1", beta1],
      ["beta3", beta3],
    ] as const) {
      if (value === 0) throw new ArgumentError(op, name, "above 0 together with tBeta3", "0");
    }
  }
}

/**
 * Writes the row of a step: hyper-parameters are rounded to float32 first (of AdEMAMix's, what its schedules make of them), everything
 * else is computed in float64 and rounded once.
 * @param dtype the parameters': 8-bit Lion rounds what it multiplies the sign by to it, as upstream does
 */
export function stepScalars(
  family: OptimizerFamily,
  hyper: StepHyper,
  bits: StateBits,
  dtype: FloatDType,
  row: Float32Array = new Float32Array(STEP_ROW),
): Float32Array {
  const { step } = hyper;
  const beta1 = f32(hyper.beta1);
  const beta2 = f32(hyper.beta2);
  const lr = f32(hyper.lr);
  const eps = f32(hyper.eps);
  const weightDecay = f32(hyper.weightDecay);
  const adam = family === "adam";
  const mixed = family === "ademamix";
  const c1 = adam || mixed ? 1 - power(beta1, step) : 1;
  const c2 = adam || mixed ? Math.sqrt(1 - power(beta2, step)) : 1;
  const decoupled = adam || mixed || family === "lion";
  const S = STEP_SCALARS;
  row[S.gnormScale] = hyper.gnormScale ?? 1;
  row[S.beta1] = beta1;
  row[S.rest1] = 1 - beta1;
  row[S.beta2] = beta2;
  row[S.rest2] = 1 - beta2;
  const beta3 = f32(scheduledBeta3(hyper));
  row[S.beta3] = beta3;
  row[S.rest3] = 1 - beta3;
  row[S.step] = adam ? (lr * c2) / c1 : family === "lion" && bits === 8 ? roundTo(dtype, lr) : lr;
  row[S.eps] = adam ? eps * c2 : eps;
  row[S.decay] = decoupled ? 1 - lr * weightDecay : 1;
  row[S.l2] = decoupled ? 0 : weightDecay;
  row[S.alpha] = scheduledAlpha(hyper);
  row[S.scale1] = mixed ? 1 / c1 : 1;
  row[S.scale2] = mixed ? 1 / c2 : 1;
  row[S.first] = family === "momentum" && step === 1 ? 1 : 0;
  row[S.unit] = adam ? c2 / c1 : 1;
  return row;
}

/** Linear in the step until it is `alpha`. */
function scheduledAlpha({ alpha = 0, tAlpha = 0, step }: StepHyper): number {
  return tAlpha > 0 ? Math.min((step * alpha) / tAlpha, alpha) : alpha;
}

/** Between beta1 and beta3 as 1 / log(beta) runs linearly, which is how the half-life of the average does. */
function scheduledBeta3({ beta1, beta3 = 0, tBeta3 = 0, step }: StepHyper): number {
  if (tBeta3 <= 0) return beta3;
  const from = Math.log(beta1);
  const to = Math.log(beta3);
  const part = step / tBeta3;
  return Math.min(Math.exp((from * to) / ((1 - part) * to + part * from)), beta3);
}

/** base^n for an integer n >= 0 by squaring: products alone, the same on every machine. */
function power(base: number, n: number): number {
  let result = 1;
  for (let square = base, rest = n; rest > 0; square *= square, rest = Math.floor(rest / 2)) {
    if (rest % 2 === 1) result *= square;
  }
  return result;
}

const word = new DataView(new ArrayBuffer(4));

/** A non-negative float32 rounded to a dtype, nearest even. */
export function roundTo(dtype: FloatDType, value: number): number {
  if (dtype === "f32") return f32(value);
  if (dtype === "bf16") {
    word.setFloat32(0, value);
    const bits = word.getUint32(0);
    word.setUint32(0, ((bits + 0x7fff + ((bits >>> 16) & 1)) & 0xffff0000) >>> 0);
    return word.getFloat32(0);
  }
  // What is added takes the bits below f16's last place off, in float64 exactly; below 2^-14 that place stays where it is.
  const exponent = Math.max(-14, Math.floor(Math.log2(value)));
  const step = 2 ** (exponent - 10);
  const rounded = nearestEven(value / step) * step;
  return rounded >= 65520 ? Number.POSITIVE_INFINITY : rounded;
}

function nearestEven(x: number): number {
  const low = Math.floor(x);
  const part = x - low;
  return part > 0.5 || (part === 0.5 && low % 2 === 1) ? low + 1 : low;
}
