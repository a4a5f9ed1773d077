/** Steps of the optimizers' classes. What they are measured with and beside: optimizers.ts. */
import type { Backend } from "#halfbyte/core/backend.js";
import { DTYPE_BYTES } from "#halfbyte/core/dtype.js";
import { Tensor } from "#halfbyte/core/tensor.js";
import * as classes from "#halfbyte/optim/classes.js";
import type { Optimizer } from "#halfbyte/optim/optimizer.js";
import { checkFirstStep } from "./first-step.js";
import { type Bench, operand, PERIOD, type Work } from "./harness.js";

type Options = Readonly<Record<string, unknown>>;
interface Setting {
  /** What bench/peer_optimizers.py calls it. */
  readonly peer: string;
  /** Moments per parameter. */
  readonly moments: 1 | 2 | 3;
  /** Norms of parameters and updates come first: everything is read twice. */
  readonly norms?: true;
  readonly options: Options & { readonly lr: number };
}

/** A learning rate that every dtype has: 8-bit Lion rounds it to that of the parameters. */
const LR = 2 ** -10;

/** Settings as in bench/first-step.ts; defaults for the rest. Learning rates are such that bf16 parameters move, and stay finite. */
export const SETTINGS = {
  Adam: { peer: "adam", moments: 2, options: { lr: LR } },
  AdamW: { peer: "adamw", moments: 2, options: { lr: LR, weightDecay: 0.01 } },
  AdEMAMix: { peer: "ademamix", moments: 3, options: { lr: LR, weightDecay: 0 } },
  Lion: { peer: "lion", moments: 1, options: { lr: LR } },
  SGD: { peer: "sgd", moments: 1, options: { lr: 2 ** -5, momentum: 0.9 } },
  RMSprop: { peer: "rmsprop", moments: 1, options: { lr: LR } },
  Adagrad: { peer: "adagrad", moments: 1, options: { lr: LR, eps: 1e-8 } },
  LAMB: { peer: "lamb", moments: 2, norms: true, options: { lr: LR } },
  LARS: { peer: "lars", moments: 1, norms: true, options: { lr: 0.25, momentum: 0.9 } },
} as const satisfies Record<string, Setting>;
export type SettingName = keyof typeof SETTINGS;
export const SETTING_NAMES = Object.keys(SETTINGS) as SettingName[];

export type Bits = 8 | 32;
type BenchDType = "f32" | "bf16";

export interface StepOptions {
  /** With the check for non-finite gradients, as by default; else with `allowNonFinite`. */
  readonly checked?: boolean;
  /** A model's tensors instead of one, with the name of the model. */
  readonly model?: { readonly name: string; readonly shapes: readonly (readonly number[])[] };
  /** What sets it apart from others of the same rule. */
  readonly label?: string;
  readonly peer?: string;
}

const sizeOf = (shape: readonly number[]): number => shape.reduce((a, b) => a * b, 1);

/** Bytes that a step reads and writes. */
function stepBytes(
  { moments, norms }: Setting,
  bits: Bits,
  dtype: BenchDType,
  elements: number,
  checked: boolean,
): number {
  const element = DTYPE_BYTES[dtype];
  const states = moments * (bits === 8 ? 1 + 4 / 256 : 4);
  const update = 3 * element + 2 * states;
  return elements * (update + (norms ? 2 * element + states : 0) + (checked ? element : 0));
}

/** @param elements of all tensors together */
export function stepBench(
  name: SettingName,
  bits: Bits,
  dtype: BenchDType,
  elements: number,
  { checked = false, model, label, peer }: StepOptions = {},
): Bench {
  const setting: Setting = SETTINGS[name];
  const parts = model ? `${model.shapes.length} tensors of ${model.name}` : label;
  return {
    name: [`${name} ${bits}-bit ${dtype}`, ...(parts ? [parts] : []), ...(checked ? ["checked"] : [])].join(", "),
    elements,
    bytes: stepBytes(setting, bits, dtype, elements, checked),
    peer: peer ?? `${setting.peer}_${bits}_${dtype}`,
    // A norm is that of everything, and slices need not begin where a block does.
    whole: setting.norms !== undefined || model !== undefined || elements % PERIOD !== 0,
    setup(backend, work) {
      const shapes = model?.shapes ?? [[work.elements]];
      const [p, g] = [operand(backend, dtype, work), gradient(backend, dtype, work)];
      const parameters = shapes.length === 1 ? [p] : parted(p, shapes);
      const gradients = shapes.length === 1 ? [g] : parted(g, shapes);
      for (const [i, parameter] of parameters.entries()) parameter.grad = gradients[i]!;
      const optimizer = optimizerOf(name, bits, parameters, checked);
      return {
        run: () => optimizer.step(),
        // The second step reads the states that the first has written.
        outputs: () => {
          optimizer.step();
          optimizer.step();
          return [...parameters, ...states(optimizer, name, setting.norms !== undefined || model !== undefined)];
        },
        dispose: () => optimizer.dispose(),
        check: () =>
          model
            ? undefined
            : checkFirstStep(name, setting.options.lr, parameters[0]!, gradients[0]!, () => optimizer.step()),
      };
    },
  };
}

function optimizerOf(name: SettingName, bits: Bits, parameters: readonly Tensor[], checked: boolean): Optimizer {
  const make = (classes as unknown as Record<string, new (params: readonly Tensor[], options: Options) => Optimizer>)[
    `${name}${bits}bit`
  ]!;
  return new make(parameters, { ...SETTINGS[name].options, allowNonFinite: !checked });
}

/** The states, but those of which a slice of the parameters has no slice (AdEMAMix's two first moments, unless it is all of them). */
function states(optimizer: Optimizer, name: SettingName, whole: boolean): Tensor[] {
  const keys = ["state1", "absmax1", "state2", "absmax2"] as const;
  const sliced = name === "AdEMAMix" && !whole ? keys.slice(2) : keys;
  return Object.values(optimizer.stateDict().state).flatMap((own) => sliced.flatMap((key) => own[key] ?? []));
}

const SHIFT = PERIOD / 2;
/** Gradients: the common input, begun elsewhere, so that they are not the parameters. */
export function gradient(backend: Backend, dtype: BenchDType, { elements, begin }: Work): Tensor {
  const first = (begin + SHIFT) % PERIOD;
  if (first + elements <= PERIOD) return operand(backend, dtype, { elements, begin: first });
  const longer = operand(backend, dtype, { elements: elements + SHIFT, begin });
  const shifted = longer.slice(SHIFT, SHIFT + elements);
  const own = shifted.clone();
  shifted.dispose();
  longer.dispose();
  return own;
}

/** Tensors of these shapes, each with memory of its own, in place of one. */
function parted(all: Tensor, shapes: readonly (readonly number[])[]): Tensor[] {
  let at = 0;
  const tensors = shapes.map((shape) => {
    const part = all.slice(at, at + sizeOf(shape));
    at += part.size;
    const own = Tensor.allocate(all.backend, all.dtype, shape).copyFrom(part);
    part.dispose();
    return own;
  });
  all.dispose();
  return tensors;
}

/**
 * SmolLM2-135M: 272 tensors, 134,515,008 parameters. The shapes are of its configuration.
 * @param divisor makes layers and vocabulary so much fewer: for rehearsals
 */
export function smolLm2(divisor = 1): { name: string; shapes: readonly (readonly number[])[]; elements: number } {
  const [hidden, inner, heads, keyHeads] = [576, 1536, 9, 3];
  const [vocabulary, layers] = [49152 / divisor, Math.ceil(30 / divisor)];
  const narrow = (hidden / heads) * keyHeads;
  const layer = [
    [hidden],
    [hidden, hidden],
    [narrow, hidden],
    [narrow, hidden],
    [hidden, hidden],
    [hidden],
    [inner, hidden],
    [inner, hidden],
    [hidden, inner],
  ];
  // The output layer is the embedding.
  const shapes = [[vocabulary, hidden], ...Array.from({ length: layers }, () => layer).flat(), [hidden]];
  return { name: "SmolLM2", shapes, elements: shapes.reduce((sum, shape) => sum + sizeOf(shape), 0) };
}
