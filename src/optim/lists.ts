/** Which parameters are updated by one launch, and the lists in device memory that are kept for it from step to step. */
import type { Backend } from "../core/backend.js";
import type { FloatDType } from "../core/dtype.js";
import type { Storage } from "../core/kernels.js";
import type { OptimizerFamily } from "../core/optimizers.js";
import type { Tensor } from "../core/tensor.js";
import type { StateBits } from "../ops/optimizer-scalars.js";
import { type StepTensors, UpdateList } from "../ops/optimizer-step.js";
import type { Parameter } from "./groups.js";
import type { Hyper } from "./options.js";
import { LEAST_PAGED, type ParameterState } from "./state.js";

/** Paged states that are brought to the device together, ahead of their launch: few enough that what comes next does not push them out. */
const PAGED_BYTES = 2 ** 28;

/** A parameter of an optimizer. */
export interface Slot extends Parameter {
  /** The number of its group. */
  readonly group: number;
  /** Its hyper-parameters; the same object for all that share them. */
  hyper: Hyper;
  state?: ParameterState | undefined;
  /** What a list takes; `g` is that of the step under way. */
  record?: (Omit<StepTensors, "g"> & { g: Tensor<FloatDType> }) | undefined;
}

/** Parameters that one launch updates. */
export interface Bucket {
  readonly hyper: Hyper;
  readonly slots: readonly Slot[];
  readonly tensors: readonly StepTensors[];
  readonly list: UpdateList;
  /** Paged states, to be brought to the device before. */
  readonly storages: readonly Storage[] | undefined;
}

interface Kind {
  readonly hyper: Hyper;
  readonly bits: StateBits;
  readonly dtype: FloatDType;
  readonly gradDtype: FloatDType;
  readonly step: number;
}

export class Lists {
  private buckets: readonly Bucket[] = [];
  /** What the buckets were made for. */
  private members: readonly Slot[] = [];
  private kinds: readonly Kind[] = [];

  constructor(
    private readonly family: OptimizerFamily,
    private readonly paged: boolean,
  ) {}

  /** The launches of a step on these parameters, in the order of each one's first. Every slot has a state and a gradient. */
  of(backend: Backend, active: readonly Slot[]): readonly Bucket[] {
    if (!this.stillFits(active)) this.rebuild(backend, active);
    for (const slot of active) slot.record!.g = slot.p.grad as Tensor<FloatDType>;
    return this.buckets;
  }

  /** Lets go of the gradients. */
  forget(): void {
    for (const { record, p } of this.members) if (record) record.g = p;
  }

  dispose(): void {
    for (const { list } of this.buckets) list.dispose();
    this.buckets = [];
    this.members = [];
    this.kinds = [];
  }

  private stillFits(active: readonly Slot[]): boolean {
    const { members, kinds } = this;
    if (active.length !== members.length) return false;
    // Those of one bucket had the same number of steps, and have taken the same steps since.
    const base = active[0]!.state!.step - kinds[0]!.step;
    for (let i = 0; i < active.length; i++) {
      const slot = active[i]!;
      const kind = kinds[i]!;
      if (slot !== members[i] || slot.record === undefined || slot.hyper !== kind.hyper) return false;
      if (slot.p.grad!.dtype !== kind.gradDtype || slot.state!.step - kind.step !== base) return false;
    }
    return true;
  }

  private rebuild(backend: Backend, active: readonly Slot[]): void {
    const spare = this.buckets.map(({ list }) => list);
    this.buckets = [];
    this.members = [];
    const kinds = active.map(kindOf);
    const sorted = new Map<Hyper, Map<string, number[]>>();
    active.forEach((_, i) => {
      const { hyper, bits, dtype, gradDtype, step } = kinds[i]!;
      const byKind = entry(sorted, hyper, () => new Map<string, number[]>());
      entry(byKind, `${bits} ${dtype} ${gradDtype} ${step}`, () => []).push(i);
    });
    const runs = [...sorted.values()]
      .flatMap((byKind) => [...byKind.values()])
      .flatMap((run) => this.slabs(active, run));
    this.buckets = runs.map((run): Bucket => {
      const kind = kinds[run[0]!]!;
      const slots = run.map((i) => active[i]!);
      const at = spare.findIndex(
        ({ kind: k }) => k.bits === kind.bits && k.dtype === kind.dtype && k.gradDtype === kind.gradDtype,
      );
      const list = at >= 0 ? spare.splice(at, 1)[0]! : new UpdateList(backend, { family: this.family, ...kind });
      const tensors = slots.map(recordOf);
      return { hyper: kind.hyper, slots, tensors, list, storages: this.storages(slots) };
    });
    for (const list of spare) list.dispose();
    this.members = active;
    this.kinds = kinds;
  }

  /** Cuts a run of parameters where their paged states become too many to be on the device together. */
  private slabs(active: readonly Slot[], run: readonly number[]): number[][] {
    if (!this.paged) return [[...run]];
    const slabs: number[][] = [];
    let bytes = 0;
    for (const i of run) {
      const own = (this.storages([active[i]!]) ?? []).reduce((sum, storage) => sum + storage.bytes, 0);
      if (slabs.length === 0 || bytes + own > PAGED_BYTES) {
        slabs.push([]);
        bytes = 0;
      }
      slabs.at(-1)!.push(i);
      bytes += own;
    }
    return slabs;
  }

  private storages(slots: readonly Slot[]): Storage[] | undefined {
    if (!this.paged) return undefined;
    return slots
      .filter(({ p }) => p.size >= LEAST_PAGED)
      .flatMap(({ state }) => [state!.tensors.state1, state!.tensors.state2])
      .flatMap((tensor) => tensor?.storage ?? []);
  }
}

function kindOf(slot: Slot): Kind {
  const { hyper, p, state } = slot;
  return { hyper, bits: state!.bits, dtype: p.dtype, gradDtype: p.grad!.dtype as FloatDType, step: state!.step };
}

function recordOf(slot: Slot): StepTensors {
  const { state1, state2, absmax1, absmax2 } = slot.state!.tensors;
  slot.record ??= { index: slot.index, p: slot.p, g: slot.p, state1, state2, absmax1, absmax2 } as NonNullable<
    Slot["record"]
  >;
  return slot.record;
}

function entry<K, V>(map: Map<K, V>, key: K, make: () => V): V {
  let value = map.get(key);
  if (value === undefined) {
    value = make();
    map.set(key, value);
  }
  return value;
}
