/** Overrides of hyper-parameters for single parameters, whatever optimizer has them. */
import { ArgumentError } from "../core/errors.js";
import { Tensor } from "../core/tensor.js";
import { list } from "./groups.js";
import { checkHyperValue, HYPER_NAMES, type Hyper, type HyperName, type NamedParam, show } from "./options.js";

/** Hyper-parameters that differ for one parameter. */
export type Override = Readonly<Partial<Hyper>>;

interface ModuleOverride {
  readonly module: WeakRef<object>;
  readonly name: string;
  readonly config: Override;
  /** The parameters that it was found to mean. */
  readonly applied: WeakSet<Tensor>;
}

/**
 * Which parameters have hyper-parameters of their own, for all optimizers of the process: embeddings with 32-bit states, say.
 *
 * ```ts
 * GlobalOptimManager.getInstance().overrideConfig(model.embedding.weight, "optimBits", 32);
 * const optimizer = new Adam8bit(model.parameters(), { lr: 1e-4 });
 * ```
 * An override wins over the parameter's group as long as it stands; `optimBits` and `min8bitSize` count when the parameter
 * gets its state, at its first step. It belongs to the tensor: it goes with it, and a copy has none.
 */
export class GlobalOptimManager {
  private static instance: GlobalOptimManager | undefined;
  private configs = new WeakMap<Tensor, Override>();
  private modules: ModuleOverride[] = [];
  /** Modules by their parameters, which keep them: one that was made for the call stays as long as its parameter. */
  private holders = new WeakMap<Tensor, object[]>();
  /** @internal Grows with every change: what an optimizer looked up is up to date while it stays. */
  version = 0;

  private constructor() {}

  /** The one manager. */
  static getInstance(): GlobalOptimManager {
    GlobalOptimManager.instance ??= new GlobalOptimManager();
    return GlobalOptimManager.instance;
  }

  /** Forgets all overrides. */
  initialize(): void {
    this.configs = new WeakMap();
    this.modules = [];
    this.holders = new WeakMap();
    this.version++;
  }

  /**
   * Upstream's first step, which is not needed here: overrides are found by the parameter itself, set before or after.
   * @throws ArgumentError for what is no list of parameters or groups
   */
  registerParameters(
    params: Iterable<NamedParam> | Iterable<{ readonly params: Tensor | Iterable<NamedParam> }>,
  ): void {
    const op = "registerParameters";
    for (const [i, entry] of list(op, "params", params).entries()) {
      const group = isObject(entry) && !(entry instanceof Tensor) && "params" in entry ? entry.params : undefined;
      if (group === undefined) parameterOf(op, `params[${i}]`, entry);
      else parameters(op, group, `params[${i}].params`);
    }
  }

  /**
   * Overrides hyper-parameters of one or more parameters; what was overridden before stays.
   * @param key a hyper-parameter (`optimBits`, `lr`, `betas` ...) with its `value`, or an object of several
   * @throws ArgumentError for an unknown hyper-parameter or a value that no optimizer takes; nothing is changed then. An optimizer that
   *   does not have the hyper-parameter throws at its next step.
   */
  overrideConfig<K extends HyperName>(params: Tensor | Iterable<NamedParam>, key: K, value: Hyper[K]): void;
  overrideConfig(params: Tensor | Iterable<NamedParam>, config: Override): void;
  overrideConfig(params: Tensor | Iterable<NamedParam>, key: HyperName | Override, value?: unknown): void {
    const op = "overrideConfig";
    const config = checked(op, typeof key === "string" ? { [key]: value } : key);
    for (const p of parameters(op, params)) this.set(p, { ...this.configs.get(p), ...config });
  }

  /**
   * Overrides the parameter that `module[name]` is when it gets its states (at its first step, or as they are loaded), whatever the
   * property is until then; replaces what was overridden for it before. The module is not kept from the collector, and a property that is no
   * tensor is passed over.
   * @throws ArgumentError as `overrideConfig`
   */
  registerModuleOverride(module: object, name: string, config: Override): void {
    const op = "registerModuleOverride";
    if (!isObject(module)) {
      throw new ArgumentError(op, "module", "an object", show(module));
    }
    if (typeof name !== "string" || !(name in module)) {
      throw new ArgumentError(op, "name", "the name of a property of module", show(name));
    }
    this.modules.push({ module: new WeakRef(module), name, config: checked(op, config), applied: new WeakSet() });
    const now = module[name];
    if (now instanceof Tensor) this.holders.set(now, [...(this.holders.get(now) ?? []), module]);
  }

  /** @internal Applies the module overrides of these parameters, each once. */
  resolveModules(owns: (p: Tensor) => boolean): void {
    let gone = false;
    for (const { module, name, config, applied } of this.modules) {
      const held = module.deref() as Record<string, unknown> | undefined;
      gone ||= held === undefined;
      const value = held?.[name];
      if (!(value instanceof Tensor) || applied.has(value) || !owns(value)) continue;
      applied.add(value);
      this.set(value, config);
    }
    if (gone) this.modules = this.modules.filter(({ module }) => module.deref() !== undefined);
  }

  /** @internal */
  overrideOf(p: Tensor): Override | undefined {
    return this.configs.get(p);
  }

  private set(p: Tensor, config: Override): void {
    this.configs.set(p, Object.freeze(config));
    this.version++;
  }
}

function checked(op: string, config: unknown): Override {
  if (typeof config !== "object" || config === null) {
    throw new ArgumentError(op, "config", "an object of hyper-parameters", show(config));
  }
  const own: Record<string, unknown> = {};
  const names = Object.keys(config) as HyperName[];
  for (const name of names) {
    if (!HYPER_NAMES.includes(name)) {
      throw new ArgumentError(op, "key", `a hyper-parameter (${HYPER_NAMES.join(", ")})`, show(name));
    }
    // The caller's arrays may change later.
    const value = (config as Hyper)[name];
    own[name] = Array.isArray(value) ? Object.freeze([...value]) : value;
    checkHyperValue(op, name, name, own[name]);
  }
  return Object.freeze(own) as Override;
}

function isObject(value: unknown): value is Record<string, unknown> {
  return (typeof value === "object" || typeof value === "function") && value !== null;
}

/** @throws ArgumentError unless every entry is a tensor or a name with one */
function parameters(op: string, params: unknown, operand = "params"): Tensor[] {
  if (params instanceof Tensor) return [params];
  return list(op, operand, params).map((entry, i) => parameterOf(op, `${operand}[${i}]`, entry));
}

function parameterOf(op: string, operand: string, entry: unknown): Tensor {
  const p = Array.isArray(entry) ? (entry as readonly unknown[])[1] : entry;
  if (p instanceof Tensor) return p;
  throw new ArgumentError(op, operand, "a Tensor or a name with one", show(p));
}
