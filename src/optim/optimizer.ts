/** What all optimizers are: groups of parameters, their states, and one launch for what can be updated together. */
import type { Backend, LaunchContext } from "../core/backend.js";
import type { FloatDType } from "../core/dtype.js";
import { ArgumentError, BackendError, DisposedError } from "../core/errors.js";
import type { Storage } from "../core/kernels.js";
import type { Tensor } from "../core/tensor.js";
import { checkApart, checkFlag } from "../ops/check.js";
import { Guard } from "../ops/optimizer-guard.js";
import type { StateBits, StepHyper } from "../ops/optimizer-scalars.js";
import { type ListStep, launchStep } from "../ops/optimizer-step.js";
import { describe, type Group, groupOf, groupsOf, hyperOf, makeGroup, refresh } from "./groups.js";
import { Lists, type Slot } from "./lists.js";
import { GlobalOptimManager, type Override } from "./manager.js";
import {
  type CommonOptions,
  checkHyper,
  type Hyper,
  type ParamGroup,
  type ParamGroupOptions,
  type Params,
  ratesOf,
  show,
} from "./options.js";
import type { Rule } from "./rules.js";
import { bitsOf, disposeTensors, type ParameterState, stateParts, tensorsOf, zeroState } from "./state.js";
import { applyStates, type Checked, checkDict, dictOf, type OptimizerStateDict, type Target } from "./state-dict.js";
import { loadFile, saveFile } from "./state-file.js";

/** What a class fixes. */
export interface Variant {
  readonly bits?: StateBits;
  readonly paged?: boolean;
}

/** Options that are no hyper-parameters of a group. */
const MODES = ["skipNonFinite", "allowNonFinite", "isPaged"] as const;

/**
 * The base of all optimizers. Parameters are float tensors of one device with their gradients in `grad`; `step` updates them in place.
 *
 * ```ts
 * const optimizer = new Adam8bit(parameters, { lr: 1e-3 });
 * for (const batch of batches) {
 *   computeGradients(batch); // sets `grad` of the parameters
 *   optimizer.step();
 *   optimizer.zeroGrad();
 * }
 * ```
 *
 * Constructors throw ArgumentError for a bad, unknown or unsupported option, a parameter that comes twice or shares memory with another,
 * DTypeError, DisposedError and DeviceError for parameters.
 */
export abstract class Optimizer {
  /** The class's name. */
  readonly name: string;
  private readonly rule: Rule;
  private readonly paged: boolean;
  /** What groups leave out. */
  private readonly values: Hyper;
  private readonly reports: boolean;
  private readonly checks: boolean;
  private readonly context: LaunchContext;
  private groups: readonly Group[] = [];
  private slots: readonly Slot[] = [];
  private entries: readonly ParamGroup[] = [];
  private byStorage = new Map<Storage, Slot[]>();
  private readonly byTensor = new Map<Tensor, Slot>();
  /** Hyper-parameters of overridden parameters, by group and override: the parameters of one are updated together. */
  private overridden: ReadonlyMap<string, Hyper> = new Map();
  /** The manager's version that they are of; -1 after any other change. */
  private overrides = -1;
  private readonly lists: Lists;
  private guard: Guard | undefined;
  /** The parameters of the attempts that the guard has not heard of yet. */
  private attempted: readonly Slot[] = [];
  private started = false;
  private busy: string | undefined;
  private gone = false;

  /** @internal */
  constructor(rule: Rule, variant: Variant, params: Params, options: CommonOptions = {}) {
    const name = `${variant.paged ? "Paged" : ""}${rule.name}${variant.bits ? `${variant.bits}bit` : ""}`;
    if (typeof options !== "object" || options === null) {
      throw new ArgumentError(name, "options", "an object", show(options));
    }
    this.name = name;
    this.rule = rule;
    const { modes, hyper } = splitOptions(name, rule, variant, options);
    this.paged = modes.isPaged;
    this.reports = !modes.skipNonFinite;
    this.checks = !modes.allowNonFinite;
    this.context = { op: `${name}.step`, operand: "grad", unit: "parameter" };
    this.values = { ...rule.defaults, ...(variant.bits && { optimBits: variant.bits }), ...hyper } as Hyper;
    this.lists = new Lists(rule.family, this.paged);
    const raw = groupsOf(name, params);
    const single = raw.length === 1 && Object.keys(raw[0]!.hyper).length === 0;
    raw.forEach((group, i) => {
      this.add(name, single ? "" : `params[${i}].`, group);
    });
  }

  /**
   * The groups with their hyper-parameters, which may be set: `optimizer.paramGroups[0].lr = 1e-4`. The next `step` checks and uses
   * them. `optimBits` and `min8bitSize` count for parameters that have not made a step yet.
   */
  get paramGroups(): readonly ParamGroup[] {
    return this.entries;
  }

  /** Bytes of the states, scales of 8-bit ones included: 2.03 per parameter for Adam with 8 bits, 8 with 32. */
  get stateBytes(): number {
    return this.states().reduce((sum, tensor) => sum + tensor.byteLength, 0);
  }

  get isDisposed(): boolean {
    return this.gone;
  }

  /**
   * Adds a group: `{ params, lr, ... }`; what it leaves out is as in the constructor's options. Its parameters are numbered after those
   * that are there.
   * @throws as the constructor; then the optimizer is as before
   */
  addParamGroup(group: ParamGroupOptions): void {
    this.usable("addParamGroup");
    this.add(`${this.name}.addParamGroup`, "", groupOf(`${this.name}.addParamGroup`, "group", group));
  }

  /**
   * Updates every parameter that has a gradient; the others stay as they are. Parameters are updated together that have the same group,
   * state bits, dtypes and number of steps: one launch serves them all. A parameter gets its states at its first step.
   *
   * Gradients are checked first, on the device: where one holds NaN or infinity, nothing is changed and no step is counted. The next
   * read then rejects with a NonFiniteError that names the parameter by its number; with `skipNonFinite` the step is only counted.
   * With `allowNonFinite` nothing is checked.
   *
   * Returns before the work is done, and throws before anything is launched: ArgumentError (no parameter has a gradient, a bad
   * hyper-parameter in `paramGroups` or an override, a gradient that shares memory with a parameter), DisposedError, OutOfMemoryError,
   * BackendError. Only a device that fails on the way throws later (BackendError): what was updated by then stays, and no step is counted.
   */
  step(): void {
    this.usable("step");
    const { op } = this.context;
    this.updateHyper(op);
    const active = this.withGradient(op);
    const { backend } = active[0]!.p;
    this.guard ??= this.checks ? new Guard(backend, this.reports, this.context) : undefined;
    this.guard?.settle();
    if (this.guard && this.guard.unresolved > 0 && !sameSlots(active, this.attempted)) this.guard.resolve();
    const created = this.createStates(backend, active);
    try {
      const parts = this.lists.of(backend, active).map(
        ({ hyper, list, tensors, slots, storages }): ListStep => ({
          list,
          tensors,
          hyper: this.scalarsOf(hyper, slots[0]!.state!.step + 1),
          paged: storages,
        }),
      );
      const onSkipped = (): void => {
        for (const { state } of active) if (state) state.step--;
      };
      launchStep(parts, this.guard ?? null, this.context, onSkipped);
    } catch (error) {
      // A backend that failed may have updated some: their states are theirs.
      if (!(error instanceof BackendError)) for (const slot of created) this.dropState(slot);
      throw error;
    } finally {
      this.lists.forget();
    }
    for (const { state } of active) state!.step++;
    this.attempted = active;
    this.started = true;
  }

  /**
   * Takes the gradients away, or with `setToNone = false` fills them with zeros.
   * @param dispose whether gradients that are taken away are disposed as well; false where something else still reads them
   */
  zeroGrad(setToNone = true, dispose = true): void {
    this.alive("zeroGrad");
    checkFlag(`${this.name}.zeroGrad`, "setToNone", setToNone);
    checkFlag(`${this.name}.zeroGrad`, "dispose", dispose);
    for (const { p } of this.slots) {
      const { grad } = p;
      if (grad === null) continue;
      if (!setToNone && !grad.isDisposed) {
        if (grad.size > 0) grad.backend.launch("fill", { dst: grad, bytes: grad.byteLength, value: 0 });
        continue;
      }
      p.grad = null;
      if (dispose) grad.dispose();
    }
  }

  /** Steps that were skipped so far because of a non-finite gradient: waits for those under way. Rejects like `Tensor.data`. */
  async skippedSteps(): Promise<number> {
    this.alive("skippedSteps");
    return (await this.guard?.skipped()) ?? 0;
  }

  /**
   * The states in the shape of a torch state dict: by number of the parameter, under upstream's names. The tensors are views, which later
   * steps change, and the caller's to dispose (as `tidy` does). Waits for steps under way, unless `allowNonFinite` was given: whether
   * they count is known only then. @throws DisposedError, BackendError
   */
  stateDict(): OptimizerStateDict {
    this.usable("stateDict");
    this.guard?.resolve();
    return dictOf(this.rule, this.groups, this.slots);
  }

  /**
   * Puts copies of a dict's states in place of what there is, and its hyper-parameters into the groups. The dict may be of the same class,
   * paged or not, on any device; states have the bits that they have there. Everything is checked before anything changes.
   * @throws ArgumentError, ShapeError, DTypeError for a dict of another optimizer, of other groups, parameters or bits; OutOfMemoryError;
   *   NonFiniteError of a step before, as every read
   */
  loadStateDict(dict: OptimizerStateDict): void {
    this.usable("loadStateDict");
    const op = `${this.name}.loadStateDict`;
    const checked = checkDict(op, this.target(op), dict);
    this.guard?.resolve();
    this.replace(
      checked,
      applyStates(checked, (tensor, source) => tensor.copyFrom(source)),
    );
  }

  /**
   * Writes states and hyper-parameters to a safetensors file, under a temporary name until it is complete. Meanwhile only gradients may
   * be worked on (`zeroGrad`). docs/optimizers.md describes the file.
   * @throws ArgumentError (no such folder), NonFiniteError, BackendError, DisposedError
   */
  async save(path: string): Promise<void> {
    this.usable("save");
    this.guard?.resolve();
    await this.exclusively("save", () => saveFile(path, this.rule, this.groups, this.slots));
  }

  /**
   * Takes the states and hyper-parameters of a file that `save` wrote, or of a bitsandbytes state dict in such a file; training goes on
   * bit for bit. Everything is checked before anything changes.
   * @throws FormatError for a file that is malformed, changed or cut off, or of another optimizer, other groups, parameters or bits
   */
  async load(path: string): Promise<void> {
    this.usable("load");
    const op = `${this.name}.load`;
    const target = this.target(op);
    this.guard?.resolve();
    await this.exclusively("load", async () => {
      const { checked, states } = await loadFile(path, op, target);
      if (this.gone) {
        for (const { tensors } of states.values()) disposeTensors(tensors);
        throw new DisposedError(this.name, "load");
      }
      this.replace(checked, states);
    });
  }

  /**
   * Gives the states back; parameters and gradients stay. Every later use throws DisposedError, and a `save` or `load` under way rejects
   * with it. Calling it twice is allowed.
   */
  dispose(): void {
    if (this.gone) return;
    this.gone = true;
    for (const slot of this.slots) this.dropState(slot);
    this.lists.dispose();
    this.guard?.dispose();
    this.guard = undefined;
  }

  [Symbol.dispose](): void {
    this.dispose();
  }

  /** For `tidy` and `keep`: what it holds, which is parameters, their gradients, and states. */
  tensors(): Tensor[] {
    return [...this.slots.flatMap(({ p }) => (p.grad ? [p, p.grad] : [p])), ...this.states()];
  }

  private alive(method: string): void {
    if (this.gone) throw new DisposedError(this.name, method);
  }

  private usable(method: string): void {
    this.alive(method);
    if (this.busy) {
      throw new ArgumentError(this.name, method, `the end of ${this.busy}() (await it first)`, "a call before");
    }
  }

  private async exclusively(method: string, body: () => Promise<void>): Promise<void> {
    this.busy = method;
    try {
      await body();
    } finally {
      this.busy = undefined;
    }
  }

  private add(op: string, where: string, raw: Parameters<typeof makeGroup>[3]): void {
    const { slots, groups } = this;
    const group = makeGroup(op, where, this.rule, raw, this.values, slots[0]?.p.backend);
    const added = group.entry.params.map((p, i): Slot => {
      const name = group.entry.names?.[i] || undefined;
      return { index: slots.length + i, p: p as Tensor<FloatDType>, name, group: groups.length, hyper: group.hyper };
    });
    const all = [...slots, ...added];
    const alive = all.filter(({ p }) => !p.isDisposed);
    checkApart(
      op,
      alive.map(({ p }) => p),
      (i) => describe(alive[i]!),
    );
    this.slots = all;
    this.groups = [...groups, group];
    this.entries = Object.freeze(this.groups.map(({ entry }) => entry));
    this.overrides = -1;
    for (const slot of added) {
      this.byTensor.set(slot.p, slot);
      const { storage } = slot.p;
      const others = this.byStorage.get(storage);
      if (others) others.push(slot);
      else this.byStorage.set(storage, [slot]);
    }
  }

  /** Takes over changed hyper-parameters and overrides. @throws ArgumentError */
  private updateHyper(op: string): void {
    const manager = GlobalOptimManager.getInstance();
    manager.resolveModules((p) => {
      const slot = this.byTensor.get(p);
      return slot !== undefined && !(this.started && slot.state);
    });
    // A group that is refused leaves those before it changed: the next call has to take that in.
    this.groups.forEach((group, i) => {
      if (refresh(op, `paramGroups[${i}].`, group)) this.overrides = -1;
    });
    if (this.overrides === manager.version) return;
    this.overrides = -1;
    const overridden = new Map<string, Hyper>();
    for (const slot of this.slots) {
      const override = manager.overrideOf(slot.p);
      slot.hyper = override ? this.merged(op, slot, override, overridden) : this.groups[slot.group]!.hyper;
    }
    this.overridden = overridden;
    this.overrides = manager.version;
  }

  private merged(op: string, slot: Slot, override: Override, overridden: Map<string, Hyper>): Hyper {
    const { hyper } = this.groups[slot.group]!;
    const merged = { ...hyper, ...override };
    checkHyper(op, this.rule, merged, `override of ${describe(slot)}: `);
    const key = `${slot.group} ${JSON.stringify(Object.entries(override).sort())}`;
    // The object stays, so that what is updated together does.
    const kept = Object.assign(overridden.get(key) ?? this.overridden.get(key) ?? {}, merged);
    overridden.set(key, kept);
    return kept;
  }

  /** The parameters of a step. @throws ArgumentError, DisposedError */
  private withGradient(op: string): Slot[] {
    const active: Slot[] = [];
    for (const slot of this.slots) {
      const { grad } = slot.p;
      // Shape, dtype and device were checked when it was set, and never change.
      if (grad === null) continue;
      if (slot.p.isDisposed) throw new DisposedError(`${describe(slot)} ${slot.p}`, op);
      if (grad.isDisposed) throw new DisposedError(`the gradient of ${describe(slot)}`, op);
      const other = this.byStorage.get(grad.storage)?.find(({ p }) => !p.isDisposed && p.overlaps(grad));
      if (other) {
        const expected = "memory apart from all parameters";
        throw new ArgumentError(op, `gradient of ${describe(slot)}`, expected, `a view of ${describe(other)}`);
      }
      active.push(slot);
    }
    if (active.length === 0) throw new ArgumentError(op, "grad", "a gradient of at least one parameter", "none");
    return active;
  }

  /** Gives states to the parameters that have none, all or none. */
  private createStates(backend: Backend, active: readonly Slot[]): Slot[] {
    const created: Slot[] = [];
    try {
      for (const slot of active) {
        if (slot.state) continue;
        const bits = bitsOf(slot.p.size, slot.hyper);
        slot.state = zeroState(backend, stateParts(this.rule.family, slot.p, bits, this.paged), bits);
        created.push(slot);
      }
    } catch (error) {
      for (const slot of created) this.dropState(slot);
      throw error;
    }
    return created;
  }

  private dropState(slot: Slot): void {
    if (slot.state) disposeTensors(slot.state.tensors);
    slot.state = undefined;
    slot.record = undefined;
  }

  private states(): Tensor[] {
    return this.slots.flatMap(({ state }) => (state ? tensorsOf(state.tensors) : []));
  }

  private scalarsOf(hyper: Hyper, step: number): StepHyper {
    const { lr, weightDecay, eps = 0, tAlpha, tBeta3, maxUnorm, skipZeros } = hyper;
    const rates = ratesOf(this.rule, hyper);
    return { ...rates, lr, weightDecay, eps, maxUnorm, skipZeros, step, tAlpha: tAlpha ?? 0, tBeta3: tBeta3 ?? 0 };
  }

  /** The parameters that a state dict is checked against, with hyper-parameters up to date. */
  private target(op: string): Target {
    this.updateHyper(op);
    const { rule, paged, groups, slots } = this;
    return { rule, paged, groups, slots };
  }

  private replace(checked: Checked<unknown>, states: ReadonlyMap<Slot, ParameterState>): void {
    checked.hypers.forEach((hyper, i) => {
      const group = this.groups[i]!;
      Object.assign(group.entry, hyper);
      refresh(`${this.name}.load`, "", group);
    });
    this.overrides = -1;
    for (const slot of this.slots) {
      this.dropState(slot);
      slot.state = states.get(slot);
    }
    this.attempted = [];
  }
}

function sameSlots(a: readonly Slot[], b: readonly Slot[]): boolean {
  return a.length === b.length && a.every((slot, i) => slot === b[i]);
}

type Modes = Record<(typeof MODES)[number], boolean>;

/** @throws ArgumentError */
function splitOptions(
  op: string,
  rule: Rule,
  { bits, paged = false }: Variant,
  options: object,
): { modes: Modes; hyper: Partial<Hyper> } {
  const modes: Modes = { skipNonFinite: false, allowNonFinite: false, isPaged: paged };
  const rest: Record<string, unknown> = { ...options };
  for (const mode of MODES) {
    const value = rest[mode];
    delete rest[mode];
    if (value === undefined) continue;
    checkFlag(op, mode, value as boolean);
    modes[mode] = value as boolean;
  }
  if (paged && !modes.isPaged) throw new ArgumentError(op, "isPaged", "true, for a paged class", "false");
  if (modes.skipNonFinite && modes.allowNonFinite) {
    throw new ArgumentError(op, "skipNonFinite, allowNonFinite", "one of them", "both");
  }
  const hyper = hyperOf(op, "", rule, rest);
  const { optimBits } = hyper;
  if (bits !== undefined && optimBits !== undefined && optimBits !== bits) {
    throw new ArgumentError(op, "optimBits", `${bits}, as the class says`, show(optimBits));
  }
  return { modes, hyper };
}
