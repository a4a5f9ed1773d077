/** State dicts: what an optimizer's states and groups look like outside of it, and the checks of one that comes in. */
import { ArgumentError, DTypeError, ShapeError } from "../core/errors.js";
import { formatShape, type Shape, sameShape } from "../core/shape.js";
import { Tensor } from "../core/tensor.js";
import { bytesOf } from "../core/typedarray.js";
import type { StateBits } from "../ops/optimizer-scalars.js";
import { hasTwoStates } from "../ops/optimizer-step.js";
import { CODEBOOK_SIZE, Codebook } from "../quant/codebook.js";
import { copyHyper, type Group } from "./groups.js";
import type { Slot } from "./lists.js";
import { checkHyper, HYPER_NAMES, type Hyper, show } from "./options.js";
import type { Rule } from "./rules.js";
import {
  allocateParts,
  disposeTensors,
  type ParameterState,
  STATE_KEYS,
  type StateKey,
  type StatePart,
  stateParts,
} from "./state.js";

/** The codebooks of 8-bit states, beside them in a dict. */
export const MAP_KEYS = ["qmap1", "qmap2"] as const;
export type MapKey = (typeof MAP_KEYS)[number];
export const ENTRY_KEYS = [...STATE_KEYS, ...MAP_KEYS] as const;
export type EntryKey = (typeof ENTRY_KEYS)[number];

/** The states of one parameter. */
export type ParameterStateDict = {
  /** Steps that it has taken. */
  readonly step: number;
} & { readonly [K in EntryKey]?: Tensor };

/** A group with the numbers of its parameters. */
export interface SavedGroup extends Hyper {
  readonly params: readonly number[];
  readonly names?: readonly string[];
}

/** What `stateDict` gives, in the shape of torch's. */
export interface OptimizerStateDict {
  /** The class without `Paged` and bits: `Adam`, `LAMB` ... */
  readonly optimizer: string;
  /** By number of the parameter; those that have not made a step are missing. */
  readonly state: Readonly<Record<number, ParameterStateDict>>;
  readonly paramGroups: readonly SavedGroup[];
}

/** The codebook that belongs to a key. */
export function mapOf(key: MapKey): Codebook {
  return key === "qmap1" ? Codebook.dynamic() : Codebook.dynamicUnsigned();
}

/** The codebooks beside 8-bit states. */
export function mapKeys(rule: Rule, bits: StateBits): readonly MapKey[] {
  if (bits === 32) return [];
  return hasTwoStates(rule.family) ? MAP_KEYS : ["qmap1"];
}

export function savedGroups(rule: Rule, groups: readonly Group[], slots: readonly Slot[]): SavedGroup[] {
  return groups.map(({ entry }, i) => ({
    ...copyHyper(rule, entry),
    params: slots.filter(({ group }) => group === i).map(({ index }) => index),
    ...(entry.names && { names: entry.names }),
  }));
}

export function dictOf(rule: Rule, groups: readonly Group[], slots: readonly Slot[]): OptimizerStateDict {
  const made: Tensor[] = [];
  const hold = (tensor: Tensor): Tensor => {
    made.push(tensor);
    return tensor;
  };
  try {
    const maps = new Map<MapKey, Tensor>();
    const state: Record<number, ParameterStateDict> = {};
    for (const { index, p, state: own } of slots) {
      if (!own) continue;
      const entries: { [K in EntryKey]?: Tensor } = {};
      for (const key of STATE_KEYS) {
        const tensor = own.tensors[key];
        if (tensor) entries[key] = hold(tensor.reshape(tensor.shape));
      }
      for (const key of mapKeys(rule, own.bits)) {
        const map = maps.get(key) ?? hold(Tensor.allocate(p.backend, "f32", [CODEBOOK_SIZE]));
        if (!maps.has(key)) maps.set(key, map.copyFrom(mapOf(key).values));
        entries[key] = map;
      }
      state[index] = { step: own.step, ...entries };
    }
    return { optimizer: rule.name, state, paramGroups: savedGroups(rule, groups, slots) };
  } catch (error) {
    for (const tensor of made) tensor.dispose();
    throw error;
  }
}

/** A tensor of a dict or file, as far as checks look at it. */
export interface Described<T> {
  readonly dtype: string;
  readonly shape: Shape;
  readonly source: T;
}

/** A dict, wherever it came from. */
export interface Incoming<T> {
  readonly groups: readonly {
    readonly hyper: Hyper;
    readonly params: readonly number[];
    readonly names?: readonly string[];
  }[];
  readonly state: ReadonlyMap<number, { readonly step: unknown; readonly entries: ReadonlyMap<string, Described<T>> }>;
}

/** A dict that fits an optimizer. */
export interface Checked<T> {
  /** The new hyper-parameters of each group. */
  readonly hypers: readonly Hyper[];
  readonly states: readonly CheckedState<T>[];
}

export interface CheckedState<T> {
  readonly slot: Slot;
  /** The number by which the dict knows it. */
  readonly id: number;
  readonly step: number;
  readonly bits: StateBits;
  readonly parts: readonly (StatePart & { readonly source: T })[];
  readonly maps: readonly { readonly key: MapKey; readonly source: T }[];
}

/** Says what is wrong: throws the error of a dict or of a file. */
export type Fail = (kind: "value" | "shape" | "dtype", where: string, expected: string, received: string) => never;

/** What a dict must fit. */
export interface Target {
  readonly rule: Rule;
  readonly paged: boolean;
  readonly groups: readonly Group[];
  readonly slots: readonly Slot[];
}

/** Matches a dict's groups and states with an optimizer's, by position as torch does. */
export function checkIncoming<T>(op: string, target: Target, incoming: Incoming<T>, fail: Fail): Checked<T> {
  const { rule, groups, slots } = target;
  if (incoming.groups.length !== groups.length) {
    fail("value", "paramGroups", `${groups.length} groups`, `${incoming.groups.length}`);
  }
  const byId = new Map<number, Slot>();
  const hypers = incoming.groups.map(({ hyper, params, names }, i) => {
    const where = `paramGroups[${i}]`;
    const own = slots.filter(({ group }) => group === i);
    if (params.length !== own.length) fail("value", `${where}.params`, `${own.length} parameters`, `${params.length}`);
    const ownNames = groups[i]!.entry.names;
    own.forEach((slot, k) => {
      const id = params[k]!;
      if (!Number.isSafeInteger(id) || id < 0 || byId.has(id)) {
        fail("value", `${where}.params[${k}]`, "a number that no other parameter has", show(id));
      }
      byId.set(id, slot);
      if (names && ownNames && names[k] !== ownNames[k]) {
        fail("value", `${where}.names[${k}]`, show(ownNames[k]), show(names[k]));
      }
    });
    const { optimBits } = groups[i]!.entry;
    if (hyper.optimBits !== optimBits) fail("value", `${where}.optimBits`, `${optimBits}`, show(hyper.optimBits));
    checkHyper(op, rule, hyper, `${where}.`);
    return hyper;
  });
  const states = [...incoming.state].map(([id, { step, entries }]): CheckedState<T> => {
    const where = `state.${id}`;
    const slot = byId.get(id) ?? fail("value", where, "the number of a parameter in paramGroups", `${id}`);
    if (typeof step !== "number" || !Number.isSafeInteger(step) || step < 0 || step >= 2 ** 32) {
      fail("value", `${where}.step`, "a number of steps", show(step));
    }
    const bits = bitsIn(`${where}.state1`, entries.get("state1"), fail);
    const parts = stateParts(rule.family, slot.p, bits, target.paged).map((part) => {
      const key = `${where}.${part.key}`;
      const found = entries.get(part.key) ?? fail("value", key, `a tensor (${bits}-bit states)`, "none");
      if (found.dtype !== part.dtype) fail("dtype", key, `${part.dtype} (${bits}-bit states)`, found.dtype);
      if (!sameShape(found.shape, part.shape)) fail("shape", key, formatShape(part.shape), formatShape(found.shape));
      return { ...part, source: found.source };
    });
    const wanted = new Set<string>(parts.map(({ key }) => key));
    const allowed = mapKeys(rule, bits);
    const maps: { key: MapKey; source: T }[] = [];
    for (const [key, found] of entries) {
      if (wanted.has(key)) continue;
      const map = allowed.find((name) => name === key);
      if (!map) fail("value", `${where}.${key}`, `no such tensor for ${rule.name} with ${bits}-bit states`, "one");
      if (found.dtype !== "f32") fail("dtype", `${where}.${key}`, "f32", found.dtype);
      if (!sameShape(found.shape, [CODEBOOK_SIZE])) {
        fail("shape", `${where}.${key}`, formatShape([CODEBOOK_SIZE]), formatShape(found.shape));
      }
      maps.push({ key: map!, source: found.source });
    }
    return { slot, id, step: step as number, bits, parts, maps };
  });
  return { hypers, states };
}

/** The bits of incoming states, which say it themselves: hyper-parameters and overrides count for new ones, and may have changed since. */
function bitsIn<T>(where: string, state1: Described<T> | undefined, fail: Fail): StateBits {
  if (!state1) return fail("value", where, "a tensor", "none");
  if (state1.dtype === "u8") return 8;
  return state1.dtype === "f32" ? 32 : fail("dtype", where, "f32 (32-bit states) or u8 (8-bit states)", state1.dtype);
}

/** @throws ArgumentError, ShapeError, DTypeError unless the dict fits the optimizer */
export function checkDict(op: string, target: Target, dict: unknown): Checked<Tensor> {
  const { rule } = target;
  const fail: Fail = (kind, where, expected, received) => {
    const errors = { value: ArgumentError, shape: ShapeError, dtype: DTypeError };
    throw new errors[kind](op, where, expected, received);
  };
  const { optimizer, state, paramGroups } = record(fail, "dict", dict);
  if (optimizer !== rule.name) fail("value", "optimizer", rule.name, show(optimizer));
  if (!Array.isArray(paramGroups)) fail("value", "paramGroups", "a list", show(paramGroups));
  const groups = (paramGroups as unknown[]).map((entry, i) => {
    const where = `paramGroups[${i}]`;
    const { params, names, ...hyper } = record(fail, where, entry);
    if (!Array.isArray(params)) fail("value", `${where}.params`, "a list of numbers", show(params));
    if (names !== undefined && !Array.isArray(names)) fail("value", `${where}.names`, "a list of names", show(names));
    const unknown = Object.keys(hyper).find((key) => !(HYPER_NAMES as readonly string[]).includes(key));
    if (unknown !== undefined) fail("value", `${where}.${unknown}`, "a hyper-parameter", "an unknown entry");
    checkHyper(op, rule, hyper as Partial<Hyper>, `${where}.`);
    const own = copyHyper(rule, hyper as Partial<Hyper>);
    return { hyper: own, params: params as number[], ...(names !== undefined && { names: names as string[] }) };
  });
  const states = new Map(
    Object.entries(record(fail, "state", state)).map(([id, value]) => {
      const { step, ...entries } = record(fail, `state.${id}`, value);
      return [Number(id), { step, entries: tensorsIn(op, fail, `state.${id}`, entries) }] as const;
    }),
  );
  const checked = checkIncoming(op, target, { groups, state: states }, fail);
  // Entries may share a map, each key its own.
  const seen: Record<MapKey, Set<Tensor>> = { qmap1: new Set(), qmap2: new Set() };
  for (const { id, maps } of checked.states) {
    for (const { key, source } of maps) {
      if (seen[key].has(source)) continue;
      seen[key].add(source);
      if (!isMap(key, source.bytesSync())) fail("value", `state.${id}.${key}`, "the dynamic map", "other values");
    }
  }
  return checked;
}

export function isMap(key: MapKey, bytes: Uint8Array): boolean {
  return Buffer.compare(bytes, bytesOf(mapOf(key).values)) === 0;
}

function record(fail: Fail, where: string, value: unknown): Record<string, unknown> {
  if (typeof value === "object" && value !== null && !Array.isArray(value)) return value as Record<string, unknown>;
  return fail("value", where, "an object", show(value));
}

function tensorsIn(
  op: string,
  fail: Fail,
  where: string,
  entries: Record<string, unknown>,
): Map<string, Described<Tensor>> {
  return new Map(
    Object.entries(entries).flatMap(([key, value]) => {
      if (value === undefined) return [];
      if (!(value instanceof Tensor)) return fail("value", `${where}.${key}`, "a Tensor", show(value));
      if (value.isDisposed) throw new ArgumentError(op, `${where}.${key}`, "a tensor that is not disposed", `${value}`);
      return [[key, { dtype: value.dtype, shape: value.shape, source: value }] as const];
    }),
  );
}

/**
 * New states with what `fill` puts into them; what the optimizer has is not touched.
 * @throws OutOfMemoryError, or what `fill` throws; then nothing is kept
 */
export function applyStates<T>(
  checked: Checked<T>,
  fill: (tensor: Tensor, source: T) => void,
): Map<Slot, ParameterState> {
  const states = new Map<Slot, ParameterState>();
  try {
    for (const { slot, step, bits, parts } of checked.states) {
      const tensors = allocateParts(slot.p.backend, parts);
      states.set(slot, { step, bits, tensors });
      for (const { key, source } of parts) fill(tensors[key as StateKey]!, source);
    }
    return states;
  } catch (error) {
    for (const { tensors } of states.values()) disposeTensors(tensors);
    throw error;
  }
}
