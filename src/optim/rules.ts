/**
 * The update rules behind the classes, one row each: defaults as bitsandbytes 0.50 has them, and the options that it accepts and ignores,
 * which must keep their default here.
 */
import type { OptimizerFamily } from "../core/optimizers.js";
import type { StateBits } from "../ops/optimizer-scalars.js";

/** What every rule has. */
const COMMON = { optimBits: 32 as StateBits, min8bitSize: 4096, maxUnorm: 0, skipZeros: false };

/** Defaults of a rule by hyper-parameter; `undefined` where the caller has to say. */
export type RuleDefaults = Readonly<Record<string, unknown>>;

export interface Rule {
  /** The class without `Paged` and bits. */
  readonly name: string;
  readonly family: OptimizerFamily;
  /** Every hyper-parameter that a group of this rule has. */
  readonly defaults: RuleDefaults;
  /** Upstream's options without effect, with the only value that is accepted. */
  readonly fixed: Readonly<Record<string, unknown>>;
  /** The decay rates by position, as upstream's groups hold them in `betas`: names of hyper-parameters, or `betas` itself. */
  readonly betas: "betas" | "momentum" | "alpha" | "none";
  /** How many `betas` there are. */
  readonly betaCount: 2 | 3;
}

type RuleRow = Pick<Rule, "name" | "family"> & Partial<Pick<Rule, "betas" | "betaCount" | "fixed">>;
function rule(row: RuleRow, defaults: RuleDefaults): Rule {
  const all = { ...COMMON, ...defaults };
  return { betas: "betas", betaCount: 2, fixed: {}, ...row, defaults: Object.freeze(all) };
}

const ADAM_VALUES = { lr: 1e-3, betas: [0.9, 0.999], eps: 1e-8, weightDecay: 0 };
const MOMENTUM_VALUES = { lr: undefined, momentum: undefined, weightDecay: 0 };
const IGNORED_BY_SGD = { dampening: 0, nesterov: false };

export const RULES = {
  Adam: rule({ name: "Adam", family: "adam", fixed: { amsgrad: false } }, ADAM_VALUES),
  AdamW: rule({ name: "AdamW", family: "adam", fixed: { amsgrad: false } }, { ...ADAM_VALUES, weightDecay: 1e-2 }),
  LAMB: rule(
    { name: "LAMB", family: "adam", fixed: { amsgrad: false, biasCorrection: true, adamWMode: true } },
    { ...ADAM_VALUES, maxUnorm: 1 },
  ),
  AdEMAMix: rule(
    { name: "AdEMAMix", family: "ademamix", betaCount: 3 },
    { lr: 1e-3, betas: [0.9, 0.999, 0.9999], alpha: 5, tAlpha: null, tBeta3: null, eps: 1e-8, weightDecay: 1e-2 },
  ),
  SGD: rule({ name: "SGD", family: "momentum", betas: "momentum", fixed: IGNORED_BY_SGD }, MOMENTUM_VALUES),
  LARS: rule(
    { name: "LARS", family: "momentum", betas: "momentum", fixed: IGNORED_BY_SGD },
    { ...MOMENTUM_VALUES, maxUnorm: 0.02 },
  ),
  RMSprop: rule(
    { name: "RMSprop", family: "rmsprop", betas: "alpha", fixed: { momentum: 0, centered: false } },
    { lr: 1e-2, alpha: 0.99, eps: 1e-8, weightDecay: 0 },
  ),
  Adagrad: rule(
    { name: "Adagrad", family: "adagrad", betas: "none", fixed: { lrDecay: 0, initialAccumulatorValue: 0 } },
    { lr: 1e-2, eps: 1e-10, weightDecay: 0 },
  ),
  Lion: rule({ name: "Lion", family: "lion" }, { lr: 1e-4, betas: [0.9, 0.99], weightDecay: 0 }),
} as const satisfies Record<string, Rule>;
