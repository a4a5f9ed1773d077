/**
 * The classes of `bitsandbytes.optim`, with paged ones for every rule. `8bit` and `32bit` in a name fix the bits of the states, `Paged` puts
 * large states into memory that may exceed the GPU's; all else is `Optimizer` and the rule's defaults.
 */
import { optimizerClass } from "./class.js";
import type {
  AdagradOptions,
  AdamOptions,
  AdEMAMixOptions,
  BitsOption,
  LambOptions,
  LionOptions,
  PagedOption,
  RMSpropOptions,
  SGDOptions,
} from "./options.js";
import { RULES } from "./rules.js";

/**
 * Adam (arXiv 1412.6980). As in bitsandbytes' kernels, `weightDecay` is decoupled: AdamW is the same with another default.
 *
 * ```ts
 * const optimizer = new Adam([weight, bias], { lr: 1e-3, optimBits: 8 });
 * ```
 */
export class Adam extends optimizerClass<AdamOptions & BitsOption & PagedOption>(RULES.Adam) {}
/** Adam with 8-bit states. */
export class Adam8bit extends optimizerClass<AdamOptions & PagedOption>(RULES.Adam, { bits: 8 }) {}
/** Adam with 32-bit states. */
export class Adam32bit extends optimizerClass<AdamOptions & PagedOption>(RULES.Adam, { bits: 32 }) {}
/** Adam with paged states. */
export class PagedAdam extends optimizerClass<AdamOptions & BitsOption>(RULES.Adam, { paged: true }) {}
/** Adam with paged 8-bit states. */
export class PagedAdam8bit extends optimizerClass<AdamOptions>(RULES.Adam, { bits: 8, paged: true }) {}
/** Adam with paged 32-bit states. */
export class PagedAdam32bit extends optimizerClass<AdamOptions>(RULES.Adam, { bits: 32, paged: true }) {}

/** AdamW (arXiv 1711.05101): Adam with decoupled decay. */
export class AdamW extends optimizerClass<AdamOptions & BitsOption & PagedOption>(RULES.AdamW) {}
/** AdamW with 8-bit states. */
export class AdamW8bit extends optimizerClass<AdamOptions & PagedOption>(RULES.AdamW, { bits: 8 }) {}
/** AdamW with 32-bit states. */
export class AdamW32bit extends optimizerClass<AdamOptions & PagedOption>(RULES.AdamW, { bits: 32 }) {}
/** AdamW with paged states. */
export class PagedAdamW extends optimizerClass<AdamOptions & BitsOption>(RULES.AdamW, { paged: true }) {}
/** AdamW with paged 8-bit states. */
export class PagedAdamW8bit extends optimizerClass<AdamOptions>(RULES.AdamW, { bits: 8, paged: true }) {}
/** AdamW with paged 32-bit states. */
export class PagedAdamW32bit extends optimizerClass<AdamOptions>(RULES.AdamW, { bits: 32, paged: true }) {}

/** AdEMAMix (arXiv 2409.03137): Adam with a second, slow first moment; half as much state again. Decay is decoupled. */
export class AdEMAMix extends optimizerClass<AdEMAMixOptions & BitsOption & PagedOption>(RULES.AdEMAMix) {}
/** AdEMAMix with 8-bit states. */
export class AdEMAMix8bit extends optimizerClass<AdEMAMixOptions & PagedOption>(RULES.AdEMAMix, { bits: 8 }) {}
/** AdEMAMix with 32-bit states. */
export class AdEMAMix32bit extends optimizerClass<AdEMAMixOptions & PagedOption>(RULES.AdEMAMix, { bits: 32 }) {}
/** AdEMAMix with paged states. */
export class PagedAdEMAMix extends optimizerClass<AdEMAMixOptions & BitsOption>(RULES.AdEMAMix, { paged: true }) {}
/** AdEMAMix with paged 8-bit states. */
export class PagedAdEMAMix8bit extends optimizerClass<AdEMAMixOptions>(RULES.AdEMAMix, { bits: 8, paged: true }) {}
/** AdEMAMix with paged 32-bit states. */
export class PagedAdEMAMix32bit extends optimizerClass<AdEMAMixOptions>(RULES.AdEMAMix, { bits: 32, paged: true }) {}

/** LAMB (arXiv 1904.00962): Adam whose update is held to the norm of the parameter, tensor by tensor. */
export class LAMB extends optimizerClass<LambOptions & BitsOption & PagedOption>(RULES.LAMB) {}
/** LAMB with 8-bit states. */
export class LAMB8bit extends optimizerClass<LambOptions & PagedOption>(RULES.LAMB, { bits: 8 }) {}
/** LAMB with 32-bit states. */
export class LAMB32bit extends optimizerClass<LambOptions & PagedOption>(RULES.LAMB, { bits: 32 }) {}
/** LAMB with paged states. */
export class PagedLAMB extends optimizerClass<LambOptions & BitsOption>(RULES.LAMB, { paged: true }) {}
/** LAMB with paged 8-bit states. */
export class PagedLAMB8bit extends optimizerClass<LambOptions>(RULES.LAMB, { bits: 8, paged: true }) {}
/** LAMB with paged 32-bit states. */
export class PagedLAMB32bit extends optimizerClass<LambOptions>(RULES.LAMB, { bits: 32, paged: true }) {}

/** SGD with momentum: the state is the first gradient, then momentum * state + gradient. `weightDecay` is added to the gradient. */
export class SGD extends optimizerClass<SGDOptions & BitsOption & PagedOption>(RULES.SGD) {}
/** SGD with 8-bit states. */
export class SGD8bit extends optimizerClass<SGDOptions & PagedOption>(RULES.SGD, { bits: 8 }) {}
/** SGD with 32-bit states. */
export class SGD32bit extends optimizerClass<SGDOptions & PagedOption>(RULES.SGD, { bits: 32 }) {}
/** SGD with paged states. */
export class PagedSGD extends optimizerClass<SGDOptions & BitsOption>(RULES.SGD, { paged: true }) {}
/** SGD with paged 8-bit states. */
export class PagedSGD8bit extends optimizerClass<SGDOptions>(RULES.SGD, { bits: 8, paged: true }) {}
/** SGD with paged 32-bit states. */
export class PagedSGD32bit extends optimizerClass<SGDOptions>(RULES.SGD, { bits: 32, paged: true }) {}

/** LARS (arXiv 1708.03888): SGD with momentum whose update is held to the norm of the parameter, tensor by tensor. */
export class LARS extends optimizerClass<SGDOptions & BitsOption & PagedOption>(RULES.LARS) {}
/** LARS with 8-bit states. */
export class LARS8bit extends optimizerClass<SGDOptions & PagedOption>(RULES.LARS, { bits: 8 }) {}
/** LARS with 32-bit states. */
export class LARS32bit extends optimizerClass<SGDOptions & PagedOption>(RULES.LARS, { bits: 32 }) {}
/** LARS with paged states. */
export class PagedLARS extends optimizerClass<SGDOptions & BitsOption>(RULES.LARS, { paged: true }) {}
/** LARS with paged 8-bit states. */
export class PagedLARS8bit extends optimizerClass<SGDOptions>(RULES.LARS, { bits: 8, paged: true }) {}
/** LARS with paged 32-bit states. */
export class PagedLARS32bit extends optimizerClass<SGDOptions>(RULES.LARS, { bits: 32, paged: true }) {}

/** RMSprop: the gradient over the root of a moving average of its square. `weightDecay` is added to the gradient. */
export class RMSprop extends optimizerClass<RMSpropOptions & BitsOption & PagedOption>(RULES.RMSprop) {}
/** RMSprop with 8-bit states. */
export class RMSprop8bit extends optimizerClass<RMSpropOptions & PagedOption>(RULES.RMSprop, { bits: 8 }) {}
/** RMSprop with 32-bit states. */
export class RMSprop32bit extends optimizerClass<RMSpropOptions & PagedOption>(RULES.RMSprop, { bits: 32 }) {}
/** RMSprop with paged states. */
export class PagedRMSprop extends optimizerClass<RMSpropOptions & BitsOption>(RULES.RMSprop, { paged: true }) {}
/** RMSprop with paged 8-bit states. */
export class PagedRMSprop8bit extends optimizerClass<RMSpropOptions>(RULES.RMSprop, { bits: 8, paged: true }) {}
/** RMSprop with paged 32-bit states. */
export class PagedRMSprop32bit extends optimizerClass<RMSpropOptions>(RULES.RMSprop, { bits: 32, paged: true }) {}

/** Adagrad (JMLR 12, 2011): the gradient over the root of the sum of its squares. `weightDecay` is added to the gradient. */
export class Adagrad extends optimizerClass<AdagradOptions & BitsOption & PagedOption>(RULES.Adagrad) {}
/** Adagrad with 8-bit states. */
export class Adagrad8bit extends optimizerClass<AdagradOptions & PagedOption>(RULES.Adagrad, { bits: 8 }) {}
/** Adagrad with 32-bit states. */
export class Adagrad32bit extends optimizerClass<AdagradOptions & PagedOption>(RULES.Adagrad, { bits: 32 }) {}
/** Adagrad with paged states. */
export class PagedAdagrad extends optimizerClass<AdagradOptions & BitsOption>(RULES.Adagrad, { paged: true }) {}
/** Adagrad with paged 8-bit states. */
export class PagedAdagrad8bit extends optimizerClass<AdagradOptions>(RULES.Adagrad, { bits: 8, paged: true }) {}
/** Adagrad with paged 32-bit states. */
export class PagedAdagrad32bit extends optimizerClass<AdagradOptions>(RULES.Adagrad, { bits: 32, paged: true }) {}

/** Lion (arXiv 2302.06675): steps by the sign of a moving average; one state. Decay is decoupled. */
export class Lion extends optimizerClass<LionOptions & BitsOption & PagedOption>(RULES.Lion) {}
/** Lion with 8-bit states. */
export class Lion8bit extends optimizerClass<LionOptions & PagedOption>(RULES.Lion, { bits: 8 }) {}
/** Lion with 32-bit states. */
export class Lion32bit extends optimizerClass<LionOptions & PagedOption>(RULES.Lion, { bits: 32 }) {}
/** Lion with paged states. */
export class PagedLion extends optimizerClass<LionOptions & BitsOption>(RULES.Lion, { paged: true }) {}
/** Lion with paged 8-bit states. */
export class PagedLion8bit extends optimizerClass<LionOptions>(RULES.Lion, { bits: 8, paged: true }) {}
/** Lion with paged 32-bit states. */
export class PagedLion32bit extends optimizerClass<LionOptions>(RULES.Lion, { bits: 32, paged: true }) {}
