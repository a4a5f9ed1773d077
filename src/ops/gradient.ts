/** Norms of gradients, and gradients held to one. Numerics: docs/numerics.md, "Norms". */
import type { Backend, LaunchContext } from "../core/backend.js";
import { DTYPE_ID, FLOAT_DTYPES, type FloatDType } from "../core/dtype.js";
import { ArgumentError } from "../core/errors.js";
import type { Address } from "../core/kernels.js";
import { Tensor } from "../core/tensor.js";
import { checkApart, checkFlag, checkTensor } from "./check.js";
import { zeros } from "./create.js";
import { GuardWords } from "./optimizer-guard.js";
import { deviceBytes, type ListTensors, TensorList } from "./optimizer-list.js";
import { launchGradientCheck } from "./optimizer-step.js";

export const gradientPrimitives = {
  clipGradNorm: {
    upstream: "torch.nn.utils.clip_grad_norm_",
    family: "gradient",
    kernels: [
      "gradientSumSquares",
      "tensorNorms",
      "clipCoefficient",
      "scaleGradients",
      "gradientCheck",
      "gradientVerdict",
    ],
    dtypes: FLOAT_DTYPES,
    golden: { none: "bitsandbytes has no norm of its own: torch's function is what programs call" },
    summary: "the 2-norm of all gradients together in one fixed order, and gradients scaled to a greatest norm",
  },
} as const;

export interface ClipGradNormOptions {
  /** Only the 2-norm. Default 2. */
  readonly normType?: 2;
  /**
   * When a gradient holds NaN or infinity, leave all of them alone and have the next read reject with NonFiniteError, which names the first
   * such by its number. Default false.
   */
  readonly errorIfNonfinite?: boolean;
}

const CONTEXT: LaunchContext = { op: "clipGradNorm", operand: "tensors", unit: "parameter" };
const OF_PARAMETERS: LaunchContext = { op: "clipGradNorm", operand: "grad", unit: "parameter" };

/** Of which parameters tensors are the gradients. */
export interface GradientsOf {
  /** Where the result is when there are no gradients. */
  readonly backend: Backend;
  /** By place in the list: the parameter's number, and how errors name the gradient. */
  readonly indices: readonly number[];
  readonly nameOf: (i: number) => string;
}

/**
 * The 2-norm of gradients as if they were one vector; multiplies them by min(1, maxNorm / (norm + 1e-6)) in place (torch's
 * `clip_grad_norm_`).
 *
 * Squares are added in float32 over chunks of 4,096 elements and in float64 above, in an order that the sizes alone decide: f32 gradients come
 * first, then f16, then bf16, each in the order given. As in torch, a norm that is NaN makes every gradient NaN, an infinite one
 * makes them 0 or NaN.
 * @param tensors the gradients, f32, f16 or bf16, on one device: written
 * @param maxNorm not negative; Infinity measures and changes nothing
 * @param of the parameters, where errors should name those
 * @returns the norm before clipping, an f32 scalar; 0 for no tensors
 * @throws ArgumentError, naming `tensors[i]`, for what is no tensor or shares memory with another; DTypeError, DeviceError, DisposedError,
 *   OutOfMemoryError
 */
export function clipGradNorm(
  tensors: readonly Tensor[],
  maxNorm: number,
  options: ClipGradNormOptions = {},
  of?: GradientsOf,
): Tensor<"f32"> {
  const { op } = CONTEXT;
  const { normType = 2, errorIfNonfinite = false } = options;
  if (typeof maxNorm !== "number" || !(maxNorm >= 0)) {
    throw new ArgumentError(op, "maxNorm", "a number that is not negative", String(maxNorm));
  }
  if (normType !== 2) throw new ArgumentError(op, "normType", "2", String(normType));
  checkFlag(op, "errorIfNonfinite", errorIfNonfinite);
  if (!Array.isArray(tensors)) throw new ArgumentError(op, "tensors", "an array of tensors", typeof tensors);
  const nameOf = of?.nameOf ?? ((i: number): string => `tensors[${i}]`);
  for (const [i, tensor] of tensors.entries()) {
    checkTensor(op, nameOf(i), tensor, FLOAT_DTYPES, i > 0 ? tensors[0]!.backend : of?.backend);
  }
  checkApart(op, tensors, nameOf);
  if (tensors.length === 0) return of ? zero(of.backend) : zeros([]);
  return clip(tensors as readonly Tensor<FloatDType>[], maxNorm, errorIfNonfinite, of?.indices);
}

function zero(backend: Backend): Tensor<"f32"> {
  const result = Tensor.allocate(backend, "f32", []);
  backend.launch("fill", { dst: result, bytes: result.byteLength, value: 0 });
  return result;
}

interface DtypeList {
  readonly dtype: FloatDType;
  readonly list: TensorList;
}

function clip(
  tensors: readonly Tensor<FloatDType>[],
  maxNorm: number,
  errors: boolean,
  indices: readonly number[] | undefined,
): Tensor<"f32"> {
  const { backend } = tensors[0]!;
  const made: { dispose(): void }[] = [];
  const hold = <T extends { dispose(): void }>(value: T): T => {
    made.push(value);
    return value;
  };
  const total = Tensor.allocate(backend, "f32", []);
  try {
    const lists = FLOAT_DTYPES.flatMap((dtype): DtypeList[] => {
      const members = tensors.flatMap((g, i): ListTensors[] =>
        g.dtype === dtype ? [{ index: indices?.[i] ?? i, g }] : [],
      );
      if (members.length === 0) return [];
      const list = hold(new TensorList(backend));
      list.update(members);
      return [{ dtype, list }];
    });
    // The norms, the total and the coefficient, then the sums of one list after the other.
    const most = Math.max(...lists.map(({ list }) => list.count));
    const scratch = hold(deviceBytes(backend, 4 * (tensors.length + 2 + most)));
    const guard = errors ? hold(new GuardWords(backend, true, indices ? OF_PARAMETERS : CONTEXT)) : undefined;
    const at = (word: number): Address => ({ storage: scratch.storage, byteOffset: 4 * word });
    const result = tensors.length;
    if (guard) {
      for (const { list, dtype } of lists) launchGradientCheck(list, dtype, guard.words);
      guard.launchVerdict();
    }
    let from = 0;
    for (const { list, dtype } of lists) {
      launchNorms(backend, list, dtype, at(result + 2), at(from));
      from += list.records;
    }
    const sum = { norms: at(0), result: at(result), count: tensors.length, maxNorm, errors: errors ? 1 : 0 };
    backend.launch("clipCoefficient", sum, CONTEXT);
    backend.launch("copy", { src: at(result), dst: total, bytes: 4 }, CONTEXT);
    if (maxNorm < Number.POSITIVE_INFINITY) {
      for (const { list, dtype } of lists) launchScale(backend, list, dtype, at(result + 1));
    }
    return total;
  } catch (error) {
    total.dispose();
    throw error;
  } finally {
    for (const each of made) each.dispose();
  }
}

function launchNorms(backend: Backend, tensors: TensorList, dtype: FloatDType, partial: Address, norms: Address): void {
  const { list, chunks, count, records, gradients: reads } = tensors;
  if (count > 0) {
    const operands = { list, chunks, partial, count, gradDtype: DTYPE_ID[dtype] };
    backend.launch("gradientSumSquares", operands, CONTEXT, { reads, writes: [] });
  }
  backend.launch("tensorNorms", { list, partial, norms, records, width: 1 }, CONTEXT);
}

function launchScale(backend: Backend, tensors: TensorList, dtype: FloatDType, factor: Address): void {
  const { list, chunks, count, gradients: writes } = tensors;
  if (count === 0) return;
  const operands = { list, chunks, factor, count, gradDtype: DTYPE_ID[dtype] };
  backend.launch("scaleGradients", operands, CONTEXT, { reads: [], writes });
}
