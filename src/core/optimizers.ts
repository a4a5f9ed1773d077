/**
 * What the optimizer kernels of both backends, the ops that launch them and the tests agree on: families, how a list of tensors
 * lies in device memory, and the numbers of one step. asm/ and csrc/ get all of it generated.
 */

/** The update rules. Adam serves AdamW and LAMB too, momentum SGD and LARS. */
export const OPTIMIZER_FAMILY_ID = { adam: 0, ademamix: 1, momentum: 2, rmsprop: 3, adagrad: 4, lion: 5 } as const;
export type OptimizerFamily = keyof typeof OPTIMIZER_FAMILY_ID;
export const OPTIMIZER_FAMILIES = Object.keys(OPTIMIZER_FAMILY_ID) as OptimizerFamily[];

/** Families with a second moment; AdEMAMix's `state1` holds two first moments, one after the other. */
export const TWO_STATE_FAMILIES = ["adam", "ademamix"] as const satisfies readonly OptimizerFamily[];

/** Elements of an 8-bit state that share a scale. */
export const OPTIMIZER_BLOCK = 256;
/** Elements of a work item: a list's tensors are cut into chunks, the last of each being what is left. */
export const OPTIMIZER_CHUNK = 4096;
/** Lanes of the float32 sum of squares of a chunk, and of the float64 sum of its chunks (see docs/numerics.md, "Norms"). */
export const NORM_LANES = 256;
export const NORM_SUM_LANES = 1024;

/**
 * A record of a list, in bytes: 64-bit device addresses of the parameter, its gradient, the states and their scales (0 where there is
 * none), elements (64 bits), the number of the first chunk in the list, and the number by which errors name the parameter.
 * A list's `chunks` has for each chunk the number of its record (u32).
 */
export const LIST_RECORD = {
  p: 0,
  g: 8,
  state1: 16,
  state2: 24,
  absmax1: 32,
  absmax2: 40,
  n: 48,
  first: 56,
  index: 60,
} as const;
export const LIST_RECORD_BYTES = 64;

/**
 * The numbers of one step, float32 in a row of device memory: positions. c1 = 1 - beta1^t and c2 = sqrt(1 - beta2^t), in float64 before
 * they are rounded.
 *
 * `step`: what the update is multiplied by: lr * c2 / c1 for adam, else lr. `eps`: eps * c2 for adam, else eps. `decay`: 1 - lr *
 * weightDecay where decay is decoupled, 1 where there is none. `l2`: weightDecay where it is added to the gradient, else 0.
 * `scale1`, `scale2`: 1 / c1 and 1 / c2, for ademamix. `first`: 1 at momentum's first step, else 0. `unit`: what the norm of an update
 * is multiplied by, c2 / c1 for adam, else 1. `rest...` is 1 - beta... in float32.
 */
export const STEP_SCALARS = {
  gnormScale: 0,
  beta1: 1,
  rest1: 2,
  beta2: 3,
  rest2: 4,
  beta3: 5,
  rest3: 6,
  step: 7,
  eps: 8,
  decay: 9,
  l2: 10,
  alpha: 11,
  scale1: 12,
  scale2: 13,
  first: 14,
  unit: 15,
} as const;
export type StepScalar = keyof typeof STEP_SCALARS;
export const STEP_ROW = 16;

/**
 * The guard against non-finite gradients, u32 words. `found`: the least index of a parameter whose gradient is not finite, all ones
 * while there is none; `skipped`: steps skipped so far; `skip`: 1 while the step under way is skipped; `last`: the parameter
 * that made the last skipped step one. All ones in `found` and zeros elsewhere at the beginning.
 */
export const GUARD = { found: 0, skipped: 1, skip: 2, last: 3 } as const;
export const GUARD_BYTES = 16;
export const NONE_FOUND = 0xffffffff;

/** Scales outside these are divided by instead of multiplied with their reciprocal: 1e-30 and 2^125. */
export const LEAST_STATE_SCALE = 1e-30;
export const MOST_STATE_SCALE = 2 ** 125;
/** No boundary between two codes of the maps of states lies at a magnitude below this, but that at zero. */
export const LEAST_STATE_BIN = 2 ** -23;
/** The codes of a block of zeros, as upstream writes them: of a first moment and of a second. */
export const ZERO_CODE_FIRST = 255;
export const ZERO_CODE_SECOND = 0;
