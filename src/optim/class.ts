/** How a rule, with or without fixed bits and paging, becomes a class. */
import { Optimizer, type Variant } from "./optimizer.js";
import type { Params } from "./options.js";
import type { Rule } from "./rules.js";

/** Options may be left out where each of them may. */
type OptionalIfEmpty<O> = Record<never, never> extends O ? [options?: O] : [options: O];

/** The constructor of a class of `bitsandbytes.optim`; `Optimizer` says what it throws. */
export type OptimizerClass<O> = new (params: Params, ...options: OptionalIfEmpty<O>) => Optimizer;

export function optimizerClass<O extends object>(rule: Rule, variant: Variant = {}): OptimizerClass<O> {
  return class extends Optimizer {
    constructor(params: Params, ...options: OptionalIfEmpty<O>) {
      super(rule, variant, params, options[0]);
    }
  };
}
