/** Options of the classes, parameter groups, and the checks of both. */
import { ArgumentError } from "../core/errors.js";
import type { Tensor } from "../core/tensor.js";
import type { StateBits } from "../ops/optimizer-scalars.js";
import type { Rule } from "./rules.js";

/** What every class takes. */
export interface CommonOptions {
  /** Factor of the update. */
  readonly lr?: number;
  readonly weightDecay?: number;
  /** Parameters with fewer elements have 32-bit states in any case. Default 4096. */
  readonly min8bitSize?: number;
  /** The update's norm is at most this times the parameter's norm, tensor by tensor; 0 (the default but for LAMB and LARS): any. */
  readonly maxUnorm?: number;
  /** Elements whose gradient is zero keep parameter and states. Default false. */
  readonly skipZeros?: boolean;
  /** A step whose gradients hold NaN or infinity does nothing and is counted (`skippedSteps()`). Default false: NonFiniteError. */
  readonly skipNonFinite?: boolean;
  /** Gradients are not checked: NaN and infinity spread, as in bitsandbytes. Default false. */
  readonly allowNonFinite?: boolean;
}

/** What the classes without `8bit` and `32bit` in their name take. */
export interface BitsOption {
  /** Bits of the states. Default 32. */
  readonly optimBits?: StateBits;
}

/** What the classes without `Paged` in their name take. */
export interface PagedOption {
  /** Large states in paged memory, as the class with `Paged` in its name has them. Default false. */
  readonly isPaged?: boolean;
}

interface BetasOption {
  /** Decay rates of the first and the second moment (Lion: of the update's direction and of the state), from 0 to below 1. */
  readonly betas?: readonly [number, number];
}
interface EpsOption {
  /** Added to the denominator. */
  readonly eps?: number;
}

/** lr 1e-3, betas [0.9, 0.999], eps 1e-8, weightDecay 0; AdamW: weightDecay 1e-2. */
export interface AdamOptions extends CommonOptions, BetasOption, EpsOption {
  /** Not supported. */
  readonly amsgrad?: false;
}

/** As Adam, with maxUnorm 1. */
export interface LambOptions extends AdamOptions {
  /** Always applied. */
  readonly biasCorrection?: true;
  /** Decay is always decoupled. */
  readonly adamWMode?: true;
}

/** lr 1e-3, betas [0.9, 0.999, 0.9999], alpha 5, eps 1e-8, weightDecay 1e-2; no schedules. */
export interface AdEMAMixOptions extends CommonOptions, EpsOption {
  /** Decay rates of the fast first moment, the second moment and the slow first moment. */
  readonly betas?: readonly [number, number, number];
  /** Weight of the slow moment. */
  readonly alpha?: number;
  /** Steps over which alpha grows from 0; null: none. */
  readonly tAlpha?: number | null;
  /** Steps over which the slow decay rate grows from betas[0]; null: none. */
  readonly tBeta3?: number | null;
}

/** lr and momentum have no default; weightDecay 0; LARS: maxUnorm 0.02. */
export interface SGDOptions extends CommonOptions {
  readonly lr: number;
  /** Above 0 and below 1. */
  readonly momentum: number;
  /** Not supported. */
  readonly dampening?: 0;
  /** Not supported. */
  readonly nesterov?: false;
}

/** lr 1e-2, alpha 0.99, eps 1e-8, weightDecay 0. */
export interface RMSpropOptions extends CommonOptions, EpsOption {
  /** Decay rate of the squared gradients, above 0 and below 1. */
  readonly alpha?: number;
  /** Not supported. */
  readonly momentum?: 0;
  /** Not supported. */
  readonly centered?: false;
}

/** lr 1e-2, eps 1e-10, weightDecay 0. */
export interface AdagradOptions extends CommonOptions, EpsOption {
  /** Not supported. */
  readonly lrDecay?: 0;
  /** Not supported. */
  readonly initialAccumulatorValue?: 0;
}

/** lr 1e-4, betas [0.9, 0.99], weightDecay 0. */
export interface LionOptions extends CommonOptions, BetasOption {}

/** The hyper-parameters of a group: each rule has those that its options name. */
export interface Hyper {
  lr: number;
  weightDecay: number;
  betas?: readonly number[];
  momentum?: number;
  /** RMSprop: the decay rate; AdEMAMix: the weight of the slow moment. */
  alpha?: number;
  tAlpha?: number | null;
  tBeta3?: number | null;
  eps?: number;
  /** Counts when a parameter gets its state, like `min8bitSize`. */
  optimBits: StateBits;
  min8bitSize: number;
  maxUnorm: number;
  skipZeros: boolean;
}
export type HyperName = keyof Hyper;
/** A group as an optimizer holds it. Hyper-parameters may be set between steps; `step` checks them. */
export interface ParamGroup extends Hyper {
  readonly params: readonly Tensor[];
  /** Where parameters were given with names. */
  readonly names?: readonly string[];
}

/** A parameter, alone or with a name. */
export type NamedParam = Tensor | readonly [name: string, parameter: Tensor];
/** A group as the caller gives it; what it leaves out is as in the options. */
export interface ParamGroupOptions extends Partial<Hyper> {
  readonly params: Tensor | Iterable<NamedParam>;
}
export type Params = Iterable<NamedParam> | Iterable<ParamGroupOptions>;

type Check = (value: unknown) => boolean;
interface Demand {
  readonly check: Check;
  readonly expected: string;
}
// Values are rounded to float32 before they are used: what overflows there is no number.
const isNumber: Check = (value) => typeof value === "number" && Number.isFinite(Math.fround(value));
const atLeastZero: Demand = { check: (v) => isNumber(v) && (v as number) >= 0, expected: "a finite number >= 0" };
const rate = (value: unknown) => isNumber(value) && (value as number) >= 0 && Math.fround(value as number) < 1;
const aboveZero: Demand = {
  check: (v) => rate(v) && (v as number) > 0,
  expected: "a number above 0 and below 1 (in float32)",
};
const steps: Demand = {
  check: (v) => v === null || (Number.isSafeInteger(v) && (v as number) > 0),
  expected: "a number of steps above 0, or null",
};

const DEMANDS: Readonly<Record<HyperName, Demand>> = {
  lr: atLeastZero,
  weightDecay: atLeastZero,
  betas: {
    check: (v) => Array.isArray(v) && v.every(rate),
    expected: "decay rates from 0 to below 1 (in float32)",
  },
  momentum: aboveZero,
  alpha: atLeastZero,
  tAlpha: steps,
  tBeta3: steps,
  eps: atLeastZero,
  optimBits: { check: (v) => v === 8 || v === 32, expected: "8 or 32" },
  min8bitSize: { check: (v) => Number.isSafeInteger(v) && (v as number) >= 0, expected: "a number of elements" },
  maxUnorm: atLeastZero,
  skipZeros: { check: (v) => typeof v === "boolean", expected: "true or false" },
};
export const HYPER_NAMES = Object.keys(DEMANDS) as HyperName[];

export function show(value: unknown): string {
  if (typeof value === "string") return JSON.stringify(value.slice(0, 100));
  if (Array.isArray(value)) return `[${value.map(String).join(", ").slice(0, 100)}]`;
  return typeof value === "object" && value !== null ? "an object" : String(value);
}

/** @throws ArgumentError unless a hyper-parameter has a value that some rule takes */
export function checkHyperValue(op: string, operand: string, name: HyperName, value: unknown): void {
  const { check, expected } = DEMANDS[name];
  if (!check(value)) throw new ArgumentError(op, operand, expected, show(value));
}

/**
 * Checks all hyper-parameters of a group or of an override of one.
 * @param where what is put before the names in messages (`paramGroups[0].`)
 * @throws ArgumentError
 */
export function checkHyper(op: string, rule: Rule, hyper: Partial<Hyper>, where: string): asserts hyper is Hyper {
  for (const name of HYPER_NAMES) {
    const value = hyper[name];
    if (!(name in rule.defaults)) {
      if (value !== undefined)
        throw new ArgumentError(op, where + name, `no ${name}: ${rule.name} has none`, show(value));
      continue;
    }
    checkHyperValue(op, where + name, name, value);
  }
  const { betas, alpha, tBeta3 } = hyper;
  if (betas && betas.length !== rule.betaCount) {
    throw new ArgumentError(op, `${where}betas`, `${rule.betaCount} decay rates`, show(betas));
  }
  if (rule.betas === "alpha" && !aboveZero.check(alpha)) {
    throw new ArgumentError(op, `${where}alpha`, aboveZero.expected, show(alpha));
  }
  if (typeof tBeta3 === "number" && betas && !(betas[0]! > 0 && betas[2]! > 0)) {
    throw new ArgumentError(op, `${where}betas`, "betas[0] and betas[2] above 0 for tBeta3", show(betas));
  }
}

/** Whether two values of a hyper-parameter are the same. */
export function sameValue(a: unknown, b: unknown): boolean {
  if (Object.is(a, b)) return true;
  return Array.isArray(a) && Array.isArray(b) && a.length === b.length && a.every((x, i) => Object.is(x, b[i]));
}

/** The numbers of a group as the update takes them. */
export interface Rates {
  readonly beta1: number;
  readonly beta2: number;
  readonly beta3: number;
  readonly alpha: number;
}

/** The decay rates in upstream's order. */
export function ratesOf(rule: Rule, hyper: Hyper): Rates {
  const [beta1, beta2, beta3] = betasOf(rule, hyper);
  const alpha = rule.family === "ademamix" ? hyper.alpha! : 0;
  return { beta1: beta1!, beta2: beta2!, beta3: beta3 ?? 0, alpha };
}

/** `betas` as upstream's groups have them: SGD's are (momentum, dampening), RMSprop's (alpha, momentum), Adagrad's zeros. */
export function betasOf(rule: Rule, hyper: Hyper): readonly number[] {
  switch (rule.betas) {
    case "betas":
      return hyper.betas!;
    case "momentum":
      return [hyper.momentum!, 0];
    case "alpha":
      return [hyper.alpha!, 0];
    case "none":
      return [0, 0];
  }
}
