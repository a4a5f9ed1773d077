/**
 * Ties: where two codes for the same value are both right.
 *
 * bitsandbytes' kernels scale by an approximate reciprocal, so its code may be the neighbour's where the scaled value lies
 * within TIE_ULPS of a decision boundary. The proof takes the exact ratio of value and scale and every float32 no more
 * than TIE_ULPS away from it, and asks the contract (docs/numerics.md) for the code of each: a difference is a tie when
 * both codes are among them. A code that is wrong anywhere else is not.
 */
import { FP4_RANKS, FP4_THRESHOLDS, FP4_VALUES, NF4_THRESHOLDS, NF4_VALUES } from "../quant/codebooks.js";
import { searchCode } from "../quant/search-table.js";
import type { QuantType } from "../quant/types.js";
import { f32Step, f32Ulp } from "./float-bits.js";

/** How far from the exact scaled value a kernel may have decided, in units of the last place of a float32. */
export const TIE_ULPS = 2;

const SMALLEST_NORMAL = 2 ** -126;
/** The largest magnitude of an int8 code. */
const INT8_MAX = 127;

/** A set of codes: what the contract says about them. */
export interface CodeRule {
  /** The code of a scaled value, a float32. */
  readonly decide: (scaled: number) => number;
  /** What a code stands for, for measuring how wrong one is. */
  readonly decode: (code: number) => number;
  /** The scaled value is x * factor / absmax. */
  readonly factor: number;
  /** Whether a denormal x counts as zero. */
  readonly flush: boolean;
}

const countAbove = (thresholds: Readonly<Float32Array>, value: number): number =>
  thresholds.reduce((count, threshold) => count + (value > threshold ? 1 : 0), 0);

const FOUR_BIT: Readonly<Record<QuantType, CodeRule>> = {
  nf4: {
    decide: (s) => countAbove(NF4_THRESHOLDS, s),
    decode: (code) => NF4_VALUES[code]!,
    factor: 1,
    flush: true,
  },
  fp4: {
    decide: (s) => FP4_RANKS[countAbove(FP4_THRESHOLDS, Math.abs(s))]! + (s <= -SMALLEST_NORMAL ? 8 : 0),
    decode: (code) => FP4_VALUES[code]!,
    factor: 1,
    flush: true,
  },
};

export function fourBitRule(quantType: QuantType): CodeRule {
  return FOUR_BIT[quantType];
}

export function blockwiseRule(code: Float32Array): CodeRule {
  return { decide: (s) => searchCode(code, s), decode: (index) => code[index]!, factor: 1, flush: true };
}

export const INT8_RULE: CodeRule = { decide: rint, decode: (code) => code, factor: INT8_MAX, flush: false };

/** Half to even. */
function rint(x: number): number {
  const below = Math.floor(x);
  const rest = x - below;
  return rest > 0.5 || (rest === 0.5 && below % 2 !== 0) ? below + 1 : below;
}

/**
 * Every code that a kernel may give to `x` in a block with this scale.
 * @param x the float32 that is quantized
 * @param absmax the block's scale; 0 (or a denormal, where they are flushed) makes it a zero block, whose code is 0
 */
export function allowedCodes(rule: CodeRule, x: number, absmax: number): ReadonlySet<number> {
  const zero = rule.flush ? SMALLEST_NORMAL : Number.MIN_VALUE;
  if (!(absmax >= zero)) return new Set([0]);
  const numerator = rule.flush && Math.abs(x) < SMALLEST_NORMAL ? 0 : x * rule.factor;
  const codes = new Set<number>();
  const nearest = Math.fround(numerator / absmax);
  for (let step = -TIE_ULPS - 1; step <= TIE_ULPS + 1; step++) {
    const scaled = f32Step(nearest, step);
    // Exact in float64: products of 24-bit significands, and a difference of two numbers close to each other.
    if (Math.abs(scaled * absmax - numerator) <= TIE_ULPS * f32Ulp(scaled) * absmax) codes.add(rule.decide(scaled));
  }
  return codes;
}
