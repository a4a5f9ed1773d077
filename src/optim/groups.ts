/** Parameter groups: from what the caller gives to checked lists of parameters with hyper-parameters. */
import type { Backend } from "../core/backend.js";
import { FLOAT_DTYPES, type FloatDType } from "../core/dtype.js";
import { ArgumentError } from "../core/errors.js";
import { Tensor } from "../core/tensor.js";
import { checkTensor } from "../ops/check.js";
import {
  checkHyper,
  HYPER_NAMES,
  type Hyper,
  type NamedParam,
  type ParamGroup,
  type ParamGroupOptions,
  type Params,
  sameValue,
  show,
} from "./options.js";
import type { Rule } from "./rules.js";

/** A group as the caller gave it, its parameters still unchecked. */
interface RawGroup {
  readonly params: readonly unknown[];
  readonly names: readonly (string | undefined)[];
  readonly hyper: Readonly<Record<string, unknown>>;
}

/** A checked group, and the values that its hyper-parameters had when they were last checked. */
export interface Group {
  readonly rule: Rule;
  readonly entry: ParamGroup;
  readonly hyper: Hyper;
}

/** A parameter among others. */
export interface Parameter {
  /** Its number: in state dicts, and in errors. */
  readonly index: number;
  readonly p: Tensor<FloatDType>;
  readonly name: string | undefined;
}

/** How messages name a parameter. */
export function describe({ index, name }: Parameter): string {
  return name === undefined ? `parameter ${index}` : `parameter ${index} (${name})`;
}

/** @throws ArgumentError unless it is a list of parameters, of names with parameters, or of groups */
export function groupsOf(op: string, params: Params): RawGroup[] {
  const entries = list(op, "params", params);
  if (entries.length === 0) throw new ArgumentError(op, "params", "at least one parameter", "none");
  const groups = entries.filter(isGroup);
  if (groups.length === 0) return [{ ...split(op, "params", entries), hyper: {} }];
  if (groups.length < entries.length) {
    throw new ArgumentError(op, "params", "parameters or groups", "both");
  }
  return groups.map((group, i) => groupOf(op, `params[${i}]`, group));
}

/** @throws ArgumentError */
export function groupOf(op: string, operand: string, group: unknown): RawGroup {
  if (!isGroup(group)) throw new ArgumentError(op, operand, "a group: { params, lr, ... }", show(group));
  const { params, ...hyper } = group;
  const entries = params instanceof Tensor ? [params] : list(op, `${operand}.params`, params);
  return { ...split(op, `${operand}.params`, entries), hyper };
}

/** @throws ArgumentError */
export function list(op: string, operand: string, value: unknown): unknown[] {
  const iterable = typeof value === "object" && value !== null && Symbol.iterator in value;
  if (!iterable || value instanceof Tensor) {
    throw new ArgumentError(op, operand, "a list", value instanceof Tensor ? "a Tensor" : show(value));
  }
  return [...(value as Iterable<unknown>)];
}

function isGroup(entry: unknown): entry is ParamGroupOptions {
  return typeof entry === "object" && entry !== null && !(entry instanceof Tensor) && "params" in entry;
}

function split(op: string, operand: string, entries: readonly unknown[]): Pick<RawGroup, "params" | "names"> {
  const named = entries.map((entry, i) => {
    if (!Array.isArray(entry)) return [undefined, entry] as const;
    const [name, parameter] = entry as readonly unknown[];
    if (entry.length === 2 && typeof name === "string") return [name, parameter] as const;
    throw new ArgumentError(op, `${operand}[${i}]`, "a Tensor, or a name with one", show(entry));
  });
  return { params: named.map(([, parameter]) => parameter), names: named.map(([name]) => name) };
}

/**
 * A group with checked parameters and hyper-parameters; its object is what users see in `paramGroups`.
 * @param values what the group leaves out
 * @throws ArgumentError, DTypeError, DisposedError, DeviceError
 */
export function makeGroup(
  op: string,
  where: string,
  rule: Rule,
  raw: RawGroup,
  values: Readonly<Hyper>,
  backend: Backend | undefined,
): Group {
  const hyper: Partial<Hyper> = copyHyper(rule, { ...values, ...hyperOf(op, where, rule, raw.hyper) });
  checkHyper(op, rule, hyper, where);
  let device = backend;
  raw.params.forEach((p, i) => {
    checkTensor(op, `${where}params[${i}]`, p, FLOAT_DTYPES, device);
    device ??= p.backend;
  });
  const params = Object.freeze([...(raw.params as Tensor<FloatDType>[])]);
  const names = raw.names.some((name) => name !== undefined) ? raw.names.map((name) => name ?? "") : undefined;
  const fixed = {
    params: { value: params, enumerable: true },
    names: { value: names, enumerable: names !== undefined },
  };
  // Sealed: a misspelled hyper-parameter is an error at once.
  const entry = Object.seal(Object.defineProperties({ ...copyHyper(rule, hyper) }, fixed)) as unknown as ParamGroup;
  return { rule, entry, hyper };
}

/**
 * The hyper-parameters among what the caller gave, still unchecked. An option that is there but undefined is left out.
 * @throws ArgumentError for an unknown option, or one without effect that has not its default
 */
export function hyperOf(
  op: string,
  where: string,
  rule: Rule,
  given: Readonly<Record<string, unknown>>,
): Partial<Hyper> {
  const hyper: Record<string, unknown> = {};
  for (const [key, value] of Object.entries(given)) {
    if (value === undefined) continue;
    if (Object.hasOwn(rule.defaults, key)) hyper[key] = value;
    else if (!Object.hasOwn(rule.fixed, key)) {
      throw new ArgumentError(op, where + key, `one of ${Object.keys(rule.defaults).join(", ")}`, "an unknown option");
    } else if (!Object.is(value, rule.fixed[key])) {
      throw new ArgumentError(op, where + key, `${rule.fixed[key]}, all that ${rule.name} supports`, show(value));
    }
  }
  return hyper as Partial<Hyper>;
}

/** The hyper-parameters that a rule has, apart from their source. */
export function copyHyper(rule: Rule, source: Partial<Hyper>): Hyper {
  const copy: Record<string, unknown> = {};
  for (const name of HYPER_NAMES) {
    if (!(name in rule.defaults)) continue;
    const value = source[name];
    copy[name] = Array.isArray(value) ? [...value] : value;
  }
  return copy as unknown as Hyper;
}

/** Takes over what the user has changed in a group since the last time. @throws ArgumentError; then nothing is taken over */
export function refresh(op: string, where: string, { rule, entry, hyper }: Group): boolean {
  if (HYPER_NAMES.every((name) => sameValue(entry[name], hyper[name]))) return false;
  checkHyper(op, rule, entry, where);
  Object.assign(hyper, copyHyper(rule, entry));
  return true;
}

/** The parameters of what `clipGradNorm` and such take. @throws ArgumentError, DisposedError, DTypeError */
export function parametersOf(op: string, params: Tensor | Iterable<NamedParam>): Parameter[] {
  const entries = params instanceof Tensor ? [params] : list(op, "parameters", params);
  const { params: tensors, names } = split(op, "parameters", entries);
  return tensors.map((p, index) => {
    checkTensor(op, `parameters[${index}]`, p, FLOAT_DTYPES);
    return { index, p, name: names[index] || undefined };
  });
}
