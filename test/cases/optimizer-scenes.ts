/** What a case of the optimizers is about: tensors with gradients and states, the numbers of a step, and what a step makes of them. */
import type { Backend } from "#halfbyte/core/backend.js";
import { DTYPE_ID, type FloatDType } from "#halfbyte/core/dtype.js";
import { OPTIMIZER_FAMILY_ID, type OptimizerFamily, STEP_ROW, STEP_SCALARS } from "#halfbyte/core/optimizers.js";
import type { Tensor } from "#halfbyte/core/tensor.js";
import { CONTEXT, type List, makeList, STATE_CODES, stateCodes } from "../helpers/optimizer-list.js";
import { random } from "../helpers/random.js";
import { f32FromBits } from "../helpers/scalar.js";
import {
  type Hyper,
  type Row,
  type ScalarStep,
  type ScalarTensor,
  stepRow,
  update,
} from "../helpers/scalar-optimizer.js";
import { floats, framed, framedHost, type Host, type Kind, oddScales } from "./case.js";

export type Bits = 8 | 32;
/**
 * `points`: gradients on the boundaries between codes, with states that become just these (see `points`). `scales`: the same with a scale
 * for each block, round those where multiplying by the inverse ends; and some with a NaN. `spread`: magnitudes from 2^-45
 * to 2^45, and their squares in second moments: roots and inverses of every exponent, and nothing that overflows.
 */
export type SceneKind = Kind | "points" | "scales" | "spread";

export interface Scene {
  readonly id: string;
  readonly family: OptimizerFamily;
  readonly bits: Bits;
  readonly dtype: FloatDType;
  readonly gradDtype: FloatDType;
  /** Elements of each tensor of the list. */
  readonly sizes: readonly number[];
  readonly kind: SceneKind;
  readonly hyper: Hyper;
  /** States are zeros, and whole blocks of the gradient are. */
  readonly cold?: boolean;
  readonly skipZeros?: boolean;
  /** A factor for each tensor. */
  readonly ratios?: boolean;
  /** Elements before each operand, more or less. */
  readonly lead?: number;
}

export const isTwoState = (family: OptimizerFamily): boolean => family === "adam" || family === "ademamix";
const rows = (family: OptimizerFamily): number => (family === "ademamix" ? 2 : 1);
const BLOCK = 256;

/** Ordinary numbers for a family; `step` 3 unless said otherwise. */
export function hyperOf(family: OptimizerFamily, some: Partial<Hyper> = {}): Hyper {
  const [lr, beta1, beta2, eps] = {
    adam: [1e-3, 0.9, 0.999, 1e-8],
    ademamix: [1e-3, 0.9, 0.999, 1e-8],
    momentum: [1e-2, 0.9, 0, 0],
    rmsprop: [1e-3, 0.99, 0, 1e-8],
    adagrad: [1e-2, 0, 0, 1e-10],
    lion: [1e-4, 0.9, 0.99, 0],
  }[family] as [number, number, number, number];
  return { lr, beta1, beta2, beta3: 0.9999, eps, weightDecay: 0.1, alpha: 5, step: 3, ...some };
}

/** The inputs of a scene: `p0`, `g0`, `state10`, ... `p1`, ... and `scalars`, `ratios`. */
export function sceneInputs(scene: Scene): Record<string, Host> {
  const { family, sizes, bits, dtype, hyper } = scene;
  const inputs: Record<string, Host> = { scalars: rowsHost([stepRow(family, hyper, bits, dtype)]) };
  if (scene.ratios) inputs.ratios = f32s(sizes.map((_, t) => [0.25, 1, 0.7310586, 3e-5][t % 4]!));
  sizes.forEach((n, t) => {
    const seed = `${scene.id} ${t}`;
    inputs[`p${t}`] = floats(dtype, n, plain(scene.kind), `${seed} p`);
    inputs[`g${t}`] = gradient(scene, n, `${seed} g`);
    for (const [name, host] of states(scene, n, seed)) inputs[`${name}${t}`] = host;
  });
  return inputs;
}

export const f32s = (values: ArrayLike<number>): Host => ({
  dtype: "f32",
  shape: [values.length],
  values: Float32Array.from(values),
});

/** Rows of scalars as the kernels take them. */
export function rowsHost(all: readonly Row[]): Host {
  const values = new Float32Array(all.length * STEP_ROW);
  all.forEach((row, r) => {
    for (const [name, at] of Object.entries(STEP_SCALARS)) values[r * STEP_ROW + at] = row[name as keyof Row];
  });
  return { dtype: "f32", shape: [all.length, STEP_ROW], values };
}

const plain = (kind: SceneKind): Kind =>
  kind === "points" || kind === "scales" || kind === "spread" ? "normal" : kind;

/** Both signs, every exponent up to `range` and down to minus that. */
function spread(n: number, range: number, seed: string): Float32Array<ArrayBuffer> {
  const next = random(`${seed} spread`);
  return Float32Array.from({ length: n }, () => {
    const value = 2 ** ((next() % (2 * range)) - range) * (1 + next() / 2 ** 32);
    return next() & 1 ? -value : value;
  });
}

export function gradient({ gradDtype, kind, cold, family }: Scene, n: number, seed: string): Host {
  if (kind === "points") return points(family, n, []);
  if (kind === "scales") return points(family, n, SCALES);
  if (kind === "spread") return { dtype: "f32", shape: [n], values: spread(n, 45, seed) };
  const host = floats(gradDtype, n, kind, seed);
  const values = Array.from(host.values);
  if (cold) for (let i = 0; i < n; i++) if (i % 2048 < BLOCK || i % 2048 >= 2000) values[i] = i % 3 ? 0 : -0;
  return { ...host, values };
}

const LEAST = Math.fround(1e-30);
const MOST = 2 ** 125;
const SCALES = [
  ...[step(LEAST, -1), LEAST, step(LEAST, 1), 0.7e-30, 3.3e-31, 1.4e-33, 1e-38, 7e-40, 1.1e-30],
  ...[step(MOST, -1), MOST, step(MOST, 1), 1.3 * MOST, 1.7 * MOST, 1.9 * 2 ** 126, 0.013],
];

/**
 * Gradients that are on, just below and just above the boundaries of the signed map times a scale (1 where there is none), which each block
 * holds. Of adam it is their squares, round boundaries of the unsigned map, in every second block. With beta 0 they, or their
 * squares, are the new states. Where there are scales, every fifth block has a NaN.
 */
function points(family: OptimizerFamily, n: number, scales: readonly number[]): Host {
  const values = new Float32Array(n);
  for (let i = 0; i < n; i++) {
    const [block, k] = [Math.floor(i / BLOCK), i % BLOCK];
    const squared = family === "adam" && block % 2 === 1;
    const code = squared ? STATE_CODES.code2 : STATE_CODES.code1;
    const scale = scales.length === 0 ? 1 : Math.fround(scales[block % scales.length]!);
    const middle = k === 255 ? 1 : Math.fround((code[k]! + code[k + 1]!) / 2);
    const value = Math.fround(squared ? Math.sqrt(middle * scale) : middle * scale);
    values[i] = k === 255 ? value : step(value, (Math.floor(block / 2) % 5) - 2);
    if (scales.length > 0 && block % 5 === 4 && k === 7) values[i] = Number.NaN;
  }
  return { dtype: "f32", shape: [n], values };
}

function step(value: number, by: number): number {
  const bits = new Uint32Array(Float32Array.of(value).buffer)[0]!;
  return value === 0 || (bits & 0x7fffffff) < 2 ? value : f32FromBits(bits + by);
}

function states(scene: Scene, n: number, seed: string): [string, Host][] {
  const { family, bits, kind, cold } = scene;
  const blocks = Math.ceil(n / BLOCK);
  const shape = rows(family) === 2 ? [2, n] : [n];
  const second = isTwoState(family);
  const signed = kind === "wild" || kind === "nonfinite";
  const state = (count: number, of: readonly number[], name: string, positive: boolean): Host => {
    if (bits === 8) {
      const next = random(seed + name);
      const zero = positive ? 0 : 255;
      return { dtype: "u8", shape: of, values: Uint8Array.from({ length: count }, () => (cold ? zero : next() & 255)) };
    }
    const host =
      kind === "spread"
        ? f32s(spread(count, positive ? 90 : 45, seed + name))
        : floats("f32", count, plain(kind), seed + name);
    const values = Float32Array.from(host.values, (x) => (cold ? 0 : positive && !signed ? Math.abs(x) : x));
    return { ...host, shape: of, values };
  };
  const alone = family === "rmsprop" || family === "adagrad";
  const all: [string, Host][] = [["state1", state(rows(family) * n, shape, "state1", alone)]];
  if (second) all.push(["state2", state(n, [n], "state2", true)]);
  if (bits === 32) return all;
  const width = rows(family) * blocks;
  all.push([
    "absmax1",
    { ...scales(scene, width, `${seed} absmax1`), shape: rows(family) === 2 ? [2, blocks] : [blocks] },
  ]);
  if (second) all.push(["absmax2", scales(scene, blocks, `${seed} absmax2`)]);
  return all;
}

/** Scales of states, as far as anything finite goes: zero now and then. */
function scales({ kind, cold }: Scene, n: number, seed: string): Host {
  if (cold) return f32s(new Array<number>(n).fill(0));
  if (kind === "nonfinite") return { dtype: "f32", shape: [n], values: oddScales(n) };
  if (kind === "wild") return { ...floats("f32", n, "wild", seed), shape: [n] };
  if (kind === "spread") return f32s(spread(n, 45, seed).map(Math.abs));
  const next = random(seed);
  const size = kind === "huge" ? 3e38 : kind === "denormal" ? 2e-38 : 0.01;
  return f32s(Array.from({ length: n }, () => (next() % 7 === 0 ? 0 : ((next() % 10007) / 9973) * size)));
}

/** The leads of a scene's operands, those that are written in `frameOf`. */
export function inputLeads({ sizes, lead = 0 }: Scene): Record<string, number> {
  return Object.fromEntries(sizes.map((_, t) => [`g${t}`, lead === 0 ? 0 : (lead * 7 + t) % 9]));
}

const NAMES = ["p", "state1", "state2", "absmax1", "absmax2"] as const;
type Name = (typeof NAMES)[number];
const STRIDES: Readonly<Record<Name, number>> = { p: 1, state1: 3, state2: 5, absmax1: 7, absmax2: 2 };

/** Elements before what a step changes, in its allocation. */
function frameLead({ lead = 0 }: Scene, name: Name, t: number): number {
  return lead === 0 ? 0 : (lead * STRIDES[name] + t) % 9;
}

/** The tensors of a scene on a device: what a step changes lies among known bytes. */
export interface Staged {
  readonly list: List;
  readonly outputs: Record<string, Tensor>;
}

/** Copies what a step changes into frames, and lists it; the gradients are those named `grads`. */
export function stage(scene: Scene, inputs: Record<string, Tensor>, backend: Backend, grads = ["g"]): Staged[] {
  const outputs: Record<string, Tensor> = {};
  const views = scene.sizes.map((_, t) => {
    const own: Partial<Record<Name, Tensor>> = {};
    for (const name of NAMES) {
      const src = inputs[name + t];
      if (!src) continue;
      const { view, base } = framed(backend, src.dtype, src.shape, frameLead(scene, name, t));
      if (src.byteLength > 0) backend.launch("copy", { src, dst: view, bytes: src.byteLength });
      outputs[name + t] = base;
      own[name] = view;
    }
    return own;
  });
  return grads.map((grad) => ({
    list: makeList(
      backend,
      scene.sizes.map((n, t) => ({ n, index: 3 * t + 2, g: inputs[grad + t]!, ...views[t] })),
    ),
    outputs,
  }));
}

/** One step on a staged list. */
export function launchUpdate(
  scene: Scene,
  { list }: Staged,
  backend: Backend,
  more: { scalars: Tensor; guard?: Tensor; known?: number; ratios?: Tensor | undefined },
): void {
  const operands = stepOperands(scene, list, more);
  const reached = list.reached("p", "state1", "state2", "absmax1", "absmax2");
  if (scene.bits === 32) {
    backend.launch("optimizerUpdate32bit", operands, CONTEXT, reached);
  } else {
    const codes = stateCodes(backend, isTwoState(scene.family));
    backend.launch("optimizerUpdate8bitBlockwise", { ...operands, ...codes }, CONTEXT, reached);
  }
}

/** The norms' sums of a staged list. */
export function launchNorms(
  scene: Scene,
  { list }: Staged,
  backend: Backend,
  more: { scalars: Tensor; partial: Tensor },
): void {
  const operands = { ...stepOperands(scene, list, more), partial: more.partial };
  if (scene.bits === 32) {
    backend.launch("optimizerNorms32bit", operands, CONTEXT, list.reached());
  } else {
    const codes = stateCodes(backend, isTwoState(scene.family));
    backend.launch("optimizerNorms8bitBlockwise", { ...operands, ...codes }, CONTEXT, list.reached());
  }
}

function stepOperands(
  scene: Scene,
  { list, chunks, count }: List,
  more: { scalars: Tensor; guard?: Tensor; known?: number; ratios?: Tensor | undefined },
) {
  return {
    list,
    chunks,
    scalars: more.scalars,
    guard: more.guard ?? null,
    ratios: more.ratios ?? null,
    count,
    known: more.known ?? 0,
    family: OPTIMIZER_FAMILY_ID[scene.family],
    dtype: DTYPE_ID[scene.dtype],
    gradDtype: DTYPE_ID[scene.gradDtype],
    skipZeros: scene.skipZeros ? 1 : 0,
  };
}

/** Tensor `t` of a scene for the scalar reference. */
export function scalarTensor(inputs: Record<string, Host>, t: number): ScalarTensor {
  const of = (name: Name): ArrayLike<number> | undefined => inputs[name + t]?.values;
  return {
    p: of("p")!,
    g: inputs[`g${t}`]!.values,
    state1: of("state1") as Float32Array,
    state2: of("state2") as Float32Array,
    absmax1: of("absmax1") as Float32Array,
    absmax2: of("absmax2") as Float32Array,
  };
}

export function scalarStep(scene: Scene, ratio?: number, hyper = scene.hyper): ScalarStep {
  const { family, bits, dtype, skipZeros } = scene;
  return { family, dtype, row: stepRow(family, hyper, bits, dtype), ratio, skipZeros, ...STATE_CODES };
}

/** What a step leaves in the frames; `steps` gives the tensor after it. */
export function expectedFrames(
  scene: Scene,
  inputs: Record<string, Host>,
  steps = (tensor: ScalarTensor, t: number): ScalarTensor =>
    update(tensor, scalarStep(scene, scene.ratios ? inputs.ratios!.values[t]! : undefined)),
): Record<string, Host> {
  const frames: Record<string, Host> = {};
  scene.sizes.forEach((_, t) => {
    const after = steps(scalarTensor(inputs, t), t);
    for (const name of NAMES) {
      const before = inputs[name + t];
      if (before) frames[name + t] = framedHost({ ...before, values: after[name]! }, frameLead(scene, name, t));
    }
  });
  return frames;
}
