/** The states of one parameter: which tensors there are, and their zeros at the beginning. */
import type { Backend } from "../core/backend.js";
import { OPTIMIZER_BLOCK, type OptimizerFamily } from "../core/optimizers.js";
import { keep } from "../core/scope.js";
import { ceilDiv, type Shape } from "../core/shape.js";
import { Tensor } from "../core/tensor.js";
import type { StateBits } from "../ops/optimizer-scalars.js";
import { hasTwoStates } from "../ops/optimizer-step.js";
import type { Hyper } from "./options.js";

/** The names under which upstream's state dict has the tensors of a parameter. */
export const STATE_KEYS = ["state1", "state2", "absmax1", "absmax2"] as const;
export type StateKey = (typeof STATE_KEYS)[number];

/** Parameters with fewer elements keep plain states in a paged optimizer, as upstream. */
export const LEAST_PAGED = 100_000;

export interface StatePart {
  readonly key: StateKey;
  readonly dtype: "f32" | "u8";
  readonly shape: Shape;
  readonly paged: boolean;
}

export type StateTensors = { readonly state1: Tensor } & { readonly [K in StateKey]?: Tensor };

/** The states of a parameter that has made a step. */
export interface ParameterState {
  /** Steps it took part in, less those known to be skipped. */
  step: number;
  readonly bits: StateBits;
  readonly tensors: StateTensors;
}

/** The bits that a parameter's states get: small ones 32 in any case. */
export function bitsOf(size: number, hyper: Hyper): StateBits {
  return hyper.optimBits === 8 && size >= hyper.min8bitSize ? 8 : 32;
}

/**
 * The tensors of a parameter's states. State1 and state2 have the parameter's shape; AdEMAMix's state1 holds two moments, (2, ...shape). With
 * 8 bits there is a scale per block of 256 elements of each moment.
 */
export function stateParts(family: OptimizerFamily, p: Tensor, bits: StateBits, paged: boolean): StatePart[] {
  const dtype = bits === 8 ? "u8" : "f32";
  const two = hasTwoStates(family);
  const pages = paged && p.size >= LEAST_PAGED;
  const blocks = [ceilDiv(p.size, OPTIMIZER_BLOCK)];
  const stacked = (shape: Shape): Shape => (family === "ademamix" ? [2, ...shape] : shape);
  const parts: StatePart[] = [{ key: "state1", dtype, shape: stacked(p.shape), paged: pages }];
  if (two) parts.push({ key: "state2", dtype, shape: p.shape, paged: pages });
  if (bits === 32) return parts;
  parts.push({ key: "absmax1", dtype: "f32", shape: stacked(blocks), paged: false });
  if (two) parts.push({ key: "absmax2", dtype: "f32", shape: blocks, paged: false });
  return parts;
}

/** Tensors for `parts` with undefined contents, outside of every `tidy`; all or none. @throws OutOfMemoryError */
export function allocateParts(backend: Backend, parts: readonly StatePart[]): StateTensors {
  const tensors: { [K in StateKey]?: Tensor } = {};
  try {
    for (const { key, dtype, shape, paged } of parts) {
      tensors[key] = keep(Tensor.allocate<"f32" | "u8">(backend, dtype, shape, paged));
    }
  } catch (error) {
    disposeTensors(tensors);
    throw error;
  }
  return tensors as StateTensors;
}

/** States of a parameter before its first step: zeros in 32 bits; codes 0 with scales of 0, as upstream, which decode to zeros. */
export function zeroState(backend: Backend, parts: readonly StatePart[], bits: StateBits): ParameterState {
  const tensors = allocateParts(backend, parts);
  for (const tensor of tensorsOf(tensors)) {
    backend.launch("fill", { dst: tensor, bytes: tensor.byteLength, value: 0 });
  }
  return { step: 0, bits, tensors };
}

export function tensorsOf(tensors: Partial<StateTensors>): Tensor[] {
  return STATE_KEYS.flatMap((key) => tensors[key] ?? []);
}

export function disposeTensors(tensors: Partial<StateTensors>): void {
  for (const tensor of tensorsOf(tensors)) tensor.dispose();
}
