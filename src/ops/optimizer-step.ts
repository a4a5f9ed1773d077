/** One optimizer step on lists of tensors: check, verdict, norms, updates. What is checked and what is launched for optimizers of any kind. */
import type { Backend, LaunchContext } from "../core/backend.js";
import { DTYPE_ID, type FloatDType } from "../core/dtype.js";
import type { Address, Operands, Storage } from "../core/kernels.js";
import { OPTIMIZER_FAMILY_ID, type OptimizerFamily, STEP_ROW, TWO_STATE_FAMILIES } from "../core/optimizers.js";
import type { Tensor } from "../core/tensor.js";
import { bytesOf } from "../core/typedarray.js";
import { Codebook } from "../quant/codebook.js";
import { Guard, type GuardWords, MOST_UNRESOLVED } from "./optimizer-guard.js";
import { deviceBytes, type ListTensors, TensorList } from "./optimizer-list.js";
import { type StateBits, type StepHyper, stepScalars } from "./optimizer-scalars.js";

/** What is updated together: flat tensors of p's number of elements, AdEMAMix's `state1` and `absmax1` twice that. Checked by the caller. */
export interface StepTensors extends ListTensors {
  readonly p: Tensor<FloatDType>;
  readonly state1: Tensor;
}

/** What all tensors of a list have in common. */
export interface UpdateKind {
  readonly family: OptimizerFamily;
  readonly bits: StateBits;
  readonly dtype: FloatDType;
  readonly gradDtype: FloatDType;
}

/** One family, state type and pair of dtypes: the tensors that one launch updates, with the numbers of the step. */
export class UpdateList {
  readonly tensors: TensorList;
  private readonly rows = new Float32Array((MOST_UNRESOLVED + 1) * STEP_ROW);
  private rowMemory: Tensor | undefined;
  /** For norms: two sums per chunk, two norms per record, a ratio per record; f32. */
  private scratch: Tensor | undefined;
  private hyper: StepHyper | undefined;
  private codes: Codes | undefined;
  /** Which kernels were loaded: those of an update, and those of its norms too. */
  private loaded: "none" | "update" | "norms" = "none";

  constructor(
    readonly backend: Backend,
    readonly kind: UpdateKind,
  ) {
    this.tensors = new TensorList(backend);
  }

  /**
   * Gets everything that the launches need onto the device: from then on none of them takes memory.
   * @param rows how many rows of scalars: row k is that of step - k
   * @throws DisposedError, OutOfMemoryError, BackendError; nothing was launched for the step then
   */
  prepare(tensors: readonly StepTensors[], hyper: StepHyper, rows: number): void {
    const { backend, kind } = this;
    this.hyper = hyper;
    this.tensors.update(tensors);
    const { records, count } = this.tensors;
    if (normed(hyper)) {
      const bytes = 4 * (2 * count + 3 * records);
      if (!this.scratch || this.scratch.size < bytes) {
        this.scratch?.dispose();
        this.scratch = undefined;
        this.scratch = deviceBytes(backend, bytes);
      }
    }
    this.rowMemory ??= deviceBytes(backend, 4 * this.rows.length);
    for (let k = 0; k < rows; k++) {
      const row = this.rows.subarray(k * STEP_ROW, (k + 1) * STEP_ROW);
      // A row that no step can come to, where this list has taken fewer steps than attempts are unresolved.
      const step = Math.max(1, hyper.step - k);
      stepScalars(kind.family, k === 0 ? hyper : { ...hyper, step }, kind.bits, kind.dtype, row);
    }
    backend.write(this.rowMemory.storage, 0, bytesOf(this.rows.subarray(0, rows * STEP_ROW)));
    this.codes = kind.bits === 8 ? codesOn(backend, kind.family) : undefined;
    this.load();
  }

  /** Lets go of the gradients, which the collector may then find. */
  forget(): void {
    this.tensors.forget();
  }

  launchCheck(guard: Address): void {
    launchGradientCheck(this.tensors, this.kind.gradDtype, guard);
  }

  /** The step that was prepared. @param known steps that were skipped before row 0 */
  launchUpdate(guard: Address | null, known: number, context: LaunchContext): void {
    const { backend, codes } = this;
    const { count, gradients: reads, written: writes } = this.tensors;
    if (count === 0) return;
    const norms = normed(this.hyper!) ? this.norms(guard, known) : undefined;
    if (norms) {
      // The update reaches what these do, and comes next.
      if (codes) backend.launch("optimizerNorms8bitBlockwise", { ...norms.sums, ...codes }, context);
      else backend.launch("optimizerNorms32bit", norms.sums, context);
      backend.launch("tensorNorms", norms.norms, context);
      backend.launch("optimizerRatios", norms.ratios, context);
    }
    const step = { ...this.step(guard, known), ratios: norms?.ratios.ratios ?? null };
    const reached = { reads, writes };
    if (codes) backend.launch("optimizerUpdate8bitBlockwise", { ...step, ...codes }, context, reached);
    else backend.launch("optimizerUpdate32bit", step, context, reached);
  }

  /** Gives the device memory back, ordered with the stream: also right after a launch. */
  dispose(): void {
    this.tensors.dispose();
    this.rowMemory?.dispose();
    this.scratch?.dispose();
    this.rowMemory = undefined;
    this.scratch = undefined;
  }

  /** The operands of an update without `ratios`. */
  private step(guard: Address | null, known: number): Operands<"optimizerUpdate32bit"> {
    const { kind, hyper } = this;
    const { list, chunks, count } = this.tensors;
    return {
      list,
      chunks,
      scalars: this.rowMemory!,
      guard,
      ratios: null,
      count,
      known,
      family: OPTIMIZER_FAMILY_ID[kind.family],
      dtype: DTYPE_ID[kind.dtype],
      gradDtype: DTYPE_ID[kind.gradDtype],
      skipZeros: hyper!.skipZeros ? 1 : 0,
    };
  }

  /** Operands of what finds by how much each tensor's step is multiplied, so that the norm of its update stays within its bound. */
  private norms(guard: Address | null, known: number): NormOperands {
    const { kind } = this;
    const { records, count, list } = this.tensors;
    const { maxUnorm = 0, eps } = this.hyper!;
    const storage = this.scratch!.storage;
    const partial = { storage, byteOffset: 0 };
    const norms = { storage, byteOffset: 8 * count };
    const ratios = { storage, byteOffset: 8 * (count + records) };
    const slack = hasTwoStates(kind.family) ? 0 : eps;
    const scalars = this.rowMemory!;
    return {
      sums: { ...this.step(guard, known), partial },
      norms: { list, partial, norms, records, width: 2 },
      ratios: { norms, scalars, guard, ratios, records, known, maxUnorm, eps: slack },
    };
  }

  /** The kernels of the step: the same for every step of this list, but for those of the norms. */
  private load(): void {
    const { backend, codes } = this;
    const wanted = normed(this.hyper!) ? "norms" : "update";
    if (this.tensors.count === 0 || this.loaded === "norms" || this.loaded === wanted) return;
    const step = this.step(null, 0);
    if (codes) backend.load("optimizerUpdate8bitBlockwise", { ...step, ...codes });
    else backend.load("optimizerUpdate32bit", step);
    if (wanted === "norms") {
      const { sums, norms, ratios } = this.norms(null, 0);
      if (codes) backend.load("optimizerNorms8bitBlockwise", { ...sums, ...codes });
      else backend.load("optimizerNorms32bit", sums);
      backend.load("tensorNorms", norms);
      backend.load("optimizerRatios", ratios);
    }
    this.loaded = wanted;
  }
}

interface NormOperands {
  readonly sums: Operands<"optimizerNorms32bit">;
  readonly norms: Operands<"tensorNorms">;
  readonly ratios: Operands<"optimizerRatios">;
}

type Codes = Pick<Operands<"optimizerUpdate8bitBlockwise">, "code1" | "table1" | "code2" | "table2">;

/** The maps of 8-bit states, as kernels take them. */
function codesOn(backend: Backend, family: OptimizerFamily): Codes {
  const first = Codebook.dynamic();
  const second = hasTwoStates(family) ? Codebook.dynamicUnsigned() : undefined;
  return {
    code1: first.on(backend),
    table1: first.stateTableOn(backend),
    code2: second ? second.on(backend) : null,
    table2: second ? second.tableOn(backend) : null,
  };
}

export const hasTwoStates = (family: OptimizerFamily): boolean =>
  (TWO_STATE_FAMILIES as readonly OptimizerFamily[]).includes(family);

const normed = ({ maxUnorm = 0 }: StepHyper): boolean => maxUnorm > 0;

/** Has the guard name the first tensor of a list whose gradient is not finite. */
export function launchGradientCheck(tensors: TensorList, gradDtype: FloatDType, guard: Address): void {
  const { list, chunks, count, gradients: reads } = tensors;
  if (count === 0) return;
  const operands = { list, chunks, guard, count, gradDtype: DTYPE_ID[gradDtype] };
  tensors.backend.launch("gradientCheck", operands, undefined, { reads, writes: [] });
}

/** A part of a step: a list, what is in it, and its hyper-parameters. */
export interface ListStep {
  readonly list: UpdateList;
  readonly tensors: readonly StepTensors[];
  readonly hyper: StepHyper;
  /** States in paged memory, which are brought to the device ahead of the update. */
  readonly paged?: readonly Storage[] | undefined;
}

/**
 * One step on all the lists: under one verdict, where there is a guard. With a `Guard`, `settle` it before `hyper.step` is counted:
 * that is the number of this step if no unresolved attempt was skipped.
 * @param onSkipped as for `Guard.attempt`
 * @throws DisposedError, OutOfMemoryError, before anything of the step was launched; BackendError. The guard then knows nothing of the step,
 *   and `onSkipped` is never called for it
 */
export function launchStep(
  steps: readonly ListStep[],
  guard: GuardWords | null,
  context: LaunchContext,
  onSkipped: () => void = () => {},
): void {
  const [known, unresolved] = guard instanceof Guard ? [guard.known, guard.unresolved] : [0, 0];
  try {
    for (const { list, tensors, hyper } of steps) list.prepare(tensors, hyper, unresolved + 1);
    guard?.prepare();
    try {
      const words = guard?.words ?? null;
      if (words) for (const { list } of steps) list.launchCheck(words);
      if (guard instanceof Guard) guard.attempt(onSkipped);
      else guard?.launchVerdict();
      for (const { list, paged } of steps) {
        if (paged && paged.length > 0) list.backend.prefetch(paged);
        list.launchUpdate(words, known, context);
      }
    } catch (error) {
      if (guard instanceof Guard) guard.abandon(unresolved);
      throw error;
    }
  } finally {
    for (const { list } of steps) list.forget();
  }
}
