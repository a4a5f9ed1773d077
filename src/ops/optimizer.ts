/** Optimizer updates of one tensor. Numerics: docs/numerics.md, "Optimizers"; optimizers of many tensors: src/optim. */
import type { LaunchContext } from "../core/backend.js";
import { type DType, FLOAT_DTYPES, gradientDTypes } from "../core/dtype.js";
import { ArgumentError, ShapeError } from "../core/errors.js";
import { OPTIMIZER_BLOCK, type OptimizerFamily } from "../core/optimizers.js";
import { ceilDiv, formatShape } from "../core/shape.js";
import type { Tensor } from "../core/tensor.js";
import { checkChoice, checkFlag, checkTensor } from "./check.js";
import { GuardWords } from "./optimizer-guard.js";
import { checkHyper, type StateBits, type StepHyper } from "./optimizer-scalars.js";
import { hasTwoStates, launchStep, type StepTensors, UpdateList } from "./optimizer-step.js";

const SHARED_KERNELS = ["optimizerRatios", "tensorNorms", "gradientCheck", "gradientVerdict"] as const;

export const optimizerPrimitives = {
  optimizerUpdate32bit: {
    upstream: "optimizer_update_32bit",
    family: "optimizer",
    kernels: ["optimizerUpdate32bit", "optimizerNorms32bit", ...SHARED_KERNELS],
    dtypes: FLOAT_DTYPES,
    golden: "optimizer",
    summary: "one optimizer step in place, states in f32: Adam, AdEMAMix, momentum, RMSprop, Adagrad, Lion, LAMB, LARS",
  },
  optimizerUpdate8bitBlockwise: {
    upstream: "optimizer_update_8bit_blockwise",
    family: "optimizer",
    kernels: ["optimizerUpdate8bitBlockwise", "optimizerNorms8bitBlockwise", ...SHARED_KERNELS],
    dtypes: FLOAT_DTYPES,
    golden: "optimizer",
    summary: "one optimizer step in place, states as 8-bit codes in blocks of 256 with a scale each",
  },
} as const;

/** The optimizers, by the family of update rules that serves each. */
export const OPTIMIZER_NAMES = {
  adam: "adam",
  adamw: "adam",
  ademamix: "ademamix",
  momentum: "momentum",
  rmsprop: "rmsprop",
  adagrad: "adagrad",
  lion: "lion",
  lamb: "adam",
  lars: "momentum",
} as const satisfies Record<string, OptimizerFamily>;
export type OptimizerName = keyof typeof OPTIMIZER_NAMES;

/** Numbers of a step, as bitsandbytes' functions take them. Those that an optimizer does not have are ignored. */
export interface OptimizerUpdateOptions {
  readonly lr: number;
  /** The number of the step, from 1: bias corrections and schedules depend on it, and momentum's first step. */
  readonly step: number;
  /** Momentum and LARS: the momentum; RMSprop: alpha. */
  readonly beta1: number;
  /** Default 0. */
  readonly beta2?: number;
  /** AdEMAMix: of its slow average. Default 0. */
  readonly beta3?: number;
  /** AdEMAMix: the weight of its slow average. Default 0. */
  readonly alpha?: number;
  readonly eps: number;
  /** Adam, AdamW, LAMB, AdEMAMix, Lion: p is multiplied by 1 - lr * weightDecay; others: weightDecay * p is added to g. Default 0. */
  readonly weightDecay?: number;
  /** What g is multiplied by. Default 1. */
  readonly gnormScale?: number;
  /** Above 0, the update is scaled down so that its norm is at most this many times p's (LAMB: 1, LARS: 0.02). Default 0. */
  readonly maxUnorm?: number;
  /** Leave elements alone (and their states) whose gradient is 0. Default false. */
  readonly skipZeros?: boolean;
  /** Update with NaN and infinity as bitsandbytes does, without a look at g first. Default false. */
  readonly allowNonFinite?: boolean;
}

const CONTEXT_32: LaunchContext = { op: "optimizerUpdate32bit", operand: "g", unit: "parameter" };
const CONTEXT_8: LaunchContext = { op: "optimizerUpdate8bitBlockwise", operand: "g", unit: "parameter" };

/**
 * One step of an optimizer with float32 states, in place (bitsandbytes' `optimizer_update_32bit`).
 *
 * A gradient that holds NaN or infinity leaves everything as it is, and a later read rejects with NonFiniteError.
 * @param g f32, f16 or bf16; f32 or p's dtype where p is not f32
 * @param p f32, f16 or bf16, as many elements as g: written
 * @param state1 f32, as many elements (AdEMAMix: two of them after one another, the fast and the slow average): written
 * @param state2 f32, the second moment of adam, adamw, lamb and ademamix, else null: written
 * @throws ArgumentError (an option, operands that share memory, a state too many or missing), ShapeError, DTypeError, DeviceError,
 *   DisposedError, OutOfMemoryError
 */
export function optimizerUpdate32bit(
  optimizerName: OptimizerName,
  g: Tensor,
  p: Tensor,
  state1: Tensor,
  state2: Tensor | null,
  options: OptimizerUpdateOptions,
): void {
  update(CONTEXT_32, optimizerName, 32, { g, p, state1, state2, absmax1: null, absmax2: null }, options);
}

/**
 * The same with 8-bit states (bitsandbytes' `optimizer_update_8bit_blockwise`): u8 codes of the dynamic maps, signed for state1 and unsigned
 * for state2, with one scale per block of 256. The new values update p before they are quantized.
 * @param state1 u8, elements as for `optimizerUpdate32bit`
 * @param state2 u8, or null
 * @param absmax1 f32 `[ceil(p.size / 256)]`; AdEMAMix: twice that, the scales of each average for themselves
 * @param absmax2 f32 `[ceil(p.size / 256)]`, or null where state2 is
 * @throws as `optimizerUpdate32bit`
 */
export function optimizerUpdate8bitBlockwise(
  optimizerName: OptimizerName,
  g: Tensor,
  p: Tensor,
  state1: Tensor,
  state2: Tensor | null,
  absmax1: Tensor,
  absmax2: Tensor | null,
  options: OptimizerUpdateOptions,
): void {
  update(CONTEXT_8, optimizerName, 8, { g, p, state1, state2, absmax1, absmax2 }, options);
}

/** The tensors of an update; null is as good as undefined. */
interface UpdateOperands {
  readonly g: Tensor;
  readonly p: Tensor;
  readonly state1: Tensor;
  readonly state2: Tensor | null | undefined;
  readonly absmax1: Tensor | null | undefined;
  readonly absmax2: Tensor | null | undefined;
}

function update(
  context: LaunchContext,
  name: OptimizerName,
  bits: StateBits,
  operands: UpdateOperands,
  options: OptimizerUpdateOptions,
): void {
  const { op } = context;
  checkChoice(op, "optimizerName", name, Object.keys(OPTIMIZER_NAMES) as OptimizerName[]);
  const family = OPTIMIZER_NAMES[name];
  if (typeof options !== "object" || options === null) {
    throw new ArgumentError(op, "options", "lr, step, beta1 and eps", String(options));
  }
  const { beta2 = 0, weightDecay = 0, allowNonFinite = false } = options;
  const hyper: StepHyper = { ...options, beta2, weightDecay };
  checkHyper(op, family, hyper);
  checkFlag(op, "allowNonFinite", allowNonFinite);
  const tensors = checkUpdate(op, family, bits, operands);
  const { p, g } = tensors;
  const { backend } = p;
  const list = new UpdateList(backend, { family, bits, dtype: p.dtype, gradDtype: g.dtype });
  const guard = allowNonFinite ? null : new GuardWords(backend, true, context);
  try {
    launchStep([{ list, tensors: [tensors], hyper }], guard, context);
  } finally {
    guard?.dispose();
    list.dispose();
  }
}

/**
 * Checks the tensors of an update against each other.
 * @returns them as part of a list, under index 0
 * @throws as `optimizerUpdate32bit`
 */
function checkUpdate(
  op: string,
  family: OptimizerFamily,
  bits: StateBits,
  { g, p, state1, state2, absmax1, absmax2 }: UpdateOperands,
): StepTensors {
  checkTensor(op, "p", p, FLOAT_DTYPES);
  const { backend, size: n } = p;
  checkTensor(op, "g", g, gradientDTypes(p.dtype), backend);
  if (g.size !== n) throw new ShapeError(op, "g", `${n} elements as in p`, formatShape(g.shape));
  const rows = family === "ademamix" ? 2 : 1;
  const blocks = ceilDiv(n, OPTIMIZER_BLOCK);
  const two = hasTwoStates(family);
  const part = <D extends DType>(operand: string, tensor: unknown, dtype: D, size: number): Tensor<D> => {
    checkTensor(op, operand, tensor, [dtype], backend);
    if (tensor.size !== size) throw new ShapeError(op, operand, `${size} elements`, formatShape(tensor.shape));
    return tensor;
  };
  const none = (operand: string, tensor: unknown): void => {
    if (tensor !== null && tensor !== undefined) {
      throw new ArgumentError(op, operand, `null: ${family} has no second moment`, typeof tensor);
    }
  };
  const dtype = bits === 8 ? "u8" : "f32";
  const parts: Record<string, Tensor> = { p, g, state1: part("state1", state1, dtype, rows * n) };
  if (two) parts.state2 = part("state2", state2, dtype, n);
  else none("state2", state2);
  if (bits === 8) {
    parts.absmax1 = part("absmax1", absmax1, "f32", rows * blocks);
    if (two) parts.absmax2 = part("absmax2", absmax2, "f32", blocks);
    else none("absmax2", absmax2);
  }
  const names = Object.keys(parts);
  for (const [i, name] of names.entries()) {
    for (const other of names.slice(0, i)) {
      if (parts[name]!.overlaps(parts[other]!)) {
        throw new ArgumentError(op, name, `memory apart from ${other}`, `a tensor that shares bytes with ${other}`);
      }
    }
  }
  return { index: 0, ...parts } as unknown as StepTensors;
}
