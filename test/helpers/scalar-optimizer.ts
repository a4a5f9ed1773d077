/**
 * The kernels of the families `optimizer` and `gradient` as plain scalar JavaScript, beside helpers/scalar.ts: slow, obvious, written
 * from docs/numerics.md ("Optimizers", "Norms") without a look at asm/ or csrc/. Every operation is rounded by itself.
 */
import type { FloatDType } from "#halfbyte/core/dtype.js";
import type { OptimizerFamily, StepScalar } from "#halfbyte/core/optimizers.js";
import { round, searchCode } from "./scalar.js";

const f32 = Math.fround;
const BLOCK = 256;
const CHUNK = 4096;

/** The numbers of one step, by name. */
export type Row = Readonly<Record<StepScalar, number>>;

export interface Hyper {
  readonly lr: number;
  readonly beta1: number;
  readonly beta2: number;
  readonly beta3?: number;
  readonly eps: number;
  readonly weightDecay: number;
  readonly alpha?: number;
  readonly tAlpha?: number;
  readonly tBeta3?: number;
  readonly step: number;
  readonly gnormScale?: number;
}

const COUPLED: readonly OptimizerFamily[] = ["momentum", "rmsprop", "adagrad"];

/** The row of a step: hyper-parameters rounded to float32, everything after that in float64, and rounded once. */
export function stepRow(family: OptimizerFamily, hyper: Hyper, bits: 8 | 32, dtype: FloatDType): Row {
  const { step: t } = hyper;
  const [b1, b2] = [f32(hyper.beta1), f32(hyper.beta2)];
  const [eps, decay] = [f32(hyper.eps), f32(hyper.weightDecay)];
  const lr = family === "lion" && bits === 8 ? round(dtype, f32(hyper.lr)) : f32(hyper.lr);
  let [alpha, b3] = [hyper.alpha ?? 0, hyper.beta3 ?? 0];
  if (hyper.tAlpha) alpha = Math.min((t * alpha) / hyper.tAlpha, alpha);
  if (hyper.tBeta3) {
    const [ln1, ln3] = [Math.log(hyper.beta1), Math.log(b3)];
    const part = t / hyper.tBeta3;
    b3 = Math.min(Math.exp((ln1 * ln3) / ((1 - part) * ln3 + part * ln1)), b3);
  }
  b3 = f32(b3);
  const [c1, c2] = [1 - b1 ** t, Math.sqrt(1 - b2 ** t)];
  const adam = family === "adam";
  const coupled = COUPLED.includes(family);
  return {
    gnormScale: f32(hyper.gnormScale ?? 1),
    beta1: b1,
    rest1: f32(1 - b1),
    beta2: b2,
    rest2: f32(1 - b2),
    beta3: b3,
    rest3: f32(1 - b3),
    step: adam ? f32((lr * c2) / c1) : lr,
    eps: adam ? f32(eps * c2) : eps,
    decay: coupled || decay === 0 ? 1 : f32(1 - lr * decay),
    l2: coupled ? decay : 0,
    alpha: f32(alpha),
    scale1: family === "ademamix" ? f32(1 / c1) : 1,
    scale2: family === "ademamix" ? f32(1 / c2) : 1,
    first: family === "momentum" && t === 1 ? 1 : 0,
    unit: adam ? f32(c2 / c1) : 1,
  };
}

/** A tensor with its gradient and states; AdEMAMix's `state1` and `absmax1` have two rows. Bytes are 8-bit states. */
export interface ScalarTensor {
  readonly p: ArrayLike<number>;
  readonly g: ArrayLike<number>;
  readonly state1: Float32Array | Uint8Array;
  readonly state2?: Float32Array | Uint8Array | undefined;
  readonly absmax1?: Float32Array | undefined;
  readonly absmax2?: Float32Array | undefined;
}

export interface ScalarStep {
  readonly family: OptimizerFamily;
  readonly dtype: FloatDType;
  readonly row: Row;
  readonly ratio?: number | undefined;
  readonly skipZeros?: boolean | undefined;
  /** The maps of 8-bit states. */
  readonly code1?: Float32Array | undefined;
  readonly code2?: Float32Array | undefined;
}

interface Advanced {
  readonly p: Float64Array;
  /** First moments (AdEMAMix: the fast and the slow one), then the second. One-state families have the first only. */
  readonly states: Float32Array[];
  /** What is multiplied by the step; for lion the new state. */
  readonly u: Float32Array;
}

/** The new tensor; the old one keeps its values. */
export function update(tensor: ScalarTensor, step: ScalarStep): Required<ScalarTensor> | ScalarTensor {
  const { p, states } = advance(tensor, step);
  const second = tensor.state2 ? states.pop()! : undefined;
  if (tensor.state1 instanceof Float32Array) {
    const state1 = new Float32Array(tensor.state1.length);
    for (const [i, moments] of states.entries()) state1.set(moments, i * p.length);
    return { ...tensor, p, state1, state2: second };
  }
  const first = states.map((moments) => quantize(moments, step.code1!, true));
  const two = second && quantize(second, step.code2!, false);
  return {
    ...tensor,
    p,
    state1: Uint8Array.from(first.flatMap(({ q }) => [...q])),
    absmax1: Float32Array.from(first.flatMap(({ absmax }) => [...absmax])),
    state2: two?.q,
    absmax2: two?.absmax,
  };
}

/** The squares' sums of each chunk: of the parameter, and of the update that the step would make without `l2`. */
export function norms(tensor: ScalarTensor, step: ScalarStep): Float32Array {
  const { u } = advance(tensor, { ...step, row: { ...step.row, l2: 0 } });
  const [ofP, ofU] = [sumSquares(tensor.p), sumSquares(u)];
  return Float32Array.from({ length: 2 * ofP.length }, (_, i) => (i % 2 ? ofU : ofP)[i >> 1]!);
}

function decoded(tensor: ScalarTensor, step: ScalarStep): Float32Array[] {
  const n = tensor.p.length;
  const one = (state: Float32Array | Uint8Array, begin: number, absmax?: Float32Array, code?: Float32Array) => {
    const part = state.slice(begin, begin + n);
    if (part instanceof Float32Array) return part;
    const scales = absmax!.subarray((begin / n) * Math.ceil(n / BLOCK) || 0);
    return Float32Array.from(part, (q, i) => code![q]! * scales[Math.floor(i / BLOCK)]!);
  };
  const states = [one(tensor.state1, 0, tensor.absmax1, step.code1)];
  if (step.family === "ademamix") states.push(one(tensor.state1, n, tensor.absmax1, step.code1));
  if (tensor.state2) states.push(one(tensor.state2, 0, tensor.absmax2, step.code2));
  return states;
}

function advance(tensor: ScalarTensor, step: ScalarStep): Advanced {
  const { family, dtype, row } = step;
  const states = decoded(tensor, step);
  const narrow = tensor.state1 instanceof Uint8Array;
  const n = tensor.p.length;
  const p = Float64Array.from(tensor.p);
  const u = new Float32Array(n);
  const s = f32(row.step * (step.ratio ?? 1));
  const R = (x: number): number => round(dtype, f32(x));
  const ema = (state: number, beta: number, term: number): number => f32(f32(state * beta) + term);
  const inverse = (x: number): number => f32(1 / x);
  const root = (x: number): number => f32(Math.sqrt(x));
  const decays = row.decay !== 1;
  for (let i = 0; i < n; i++) {
    if (step.skipZeros && tensor.g[i] === 0) continue;
    let g = f32(tensor.g[i]! * row.gnormScale);
    if (row.l2 !== 0) {
      g = f32(g + f32(row.l2 * p[i]!));
      if (!narrow) g = R(g);
    }
    const [a, b, c] = states as [Float32Array, Float32Array, Float32Array];
    if (family === "adam") {
      a[i] = ema(a[i]!, row.beta1, f32(row.rest1 * g));
      b[i] = ema(b[i]!, row.beta2, narrow ? f32(f32(row.rest2 * g) * g) : f32(row.rest2 * f32(g * g)));
      u[i] = a[i]! * inverse(f32(root(b[i]!) + row.eps));
    } else if (family === "ademamix") {
      a[i] = ema(a[i]!, row.beta1, f32(row.rest1 * g));
      b[i] = ema(b[i]!, row.beta3, f32(row.rest3 * g));
      c[i] = ema(c[i]!, row.beta2, f32(f32(row.rest2 * g) * g));
      const mixed = f32(f32(a[i]! * row.scale1) + f32(row.alpha * b[i]!));
      u[i] = mixed * inverse(f32(f32(root(c[i]!) * row.scale2) + row.eps));
    } else if (family === "momentum") {
      a[i] = row.first ? g : ema(a[i]!, row.beta1, g);
      u[i] = a[i]!;
    } else if (family === "lion") {
      if (decays) p[i] = R(p[i]! * row.decay);
      const mixed = ema(a[i]!, row.beta1, f32(row.rest1 * g));
      p[i] = R(p[i]! - f32(s * sign(mixed)));
      a[i] = ema(a[i]!, row.beta2, f32(row.rest2 * g));
      u[i] = a[i]!;
    } else {
      const squared = narrow ? f32(row.rest1 * f32(g * g)) : f32(f32(row.rest1 * g) * g);
      a[i] = family === "rmsprop" ? ema(a[i]!, row.beta1, squared) : f32(a[i]! + f32(g * g));
      u[i] = g * inverse(f32(root(a[i]!) + row.eps));
    }
    if (family === "lion") continue;
    p[i] = R(p[i]! - f32(s * u[i]!));
    if (decays && (family === "adam" || family === "ademamix")) p[i] = R(p[i]! * row.decay);
  }
  return { p, states, u };
}

function sign(x: number): number {
  return x > 0 ? 1 : x < 0 ? -1 : Number.isNaN(x) ? x : 0;
}

/** States as codes: `signed` ones follow the sign rule. */
export function quantize(states: Float32Array, code: Float32Array, signed: boolean) {
  const q = new Uint8Array(states.length);
  const absmax = new Float32Array(Math.ceil(states.length / BLOCK));
  for (let b = 0; b < absmax.length; b++) {
    const block = states.subarray(b * BLOCK, (b + 1) * BLOCK);
    let most = 0;
    for (const s of block) if (Math.abs(s) > most) most = Math.abs(s);
    if (most < 2 ** -126) most = 0;
    absmax[b] = most;
    const multiplies = most >= f32(1e-30) && most <= 2 ** 125 && block.every(Number.isFinite);
    const inverse = f32(1 / most);
    block.forEach((s, i) => {
      let index = signed ? 255 : 0;
      if (most > 0) {
        index = searchCode(code, f32(multiplies ? s * inverse : s / most));
        if (signed && (s < 0 || Object.is(s, -0)) && code[index] === 0) index--;
      }
      q[b * BLOCK + i] = index;
    });
  }
  return { q, absmax };
}

/** The sum of squares of each chunk, in 256 lanes. */
export function sumSquares(x: ArrayLike<number>): Float32Array {
  const sums = new Float32Array(Math.ceil(x.length / CHUNK));
  for (let c = 0; c < sums.length; c++) {
    const lanes = new Float32Array(256);
    const end = Math.min(x.length, (c + 1) * CHUNK);
    for (let i = c * CHUNK; i < end; i++) lanes[i % 256]! += f32(x[i]! * x[i]!);
    for (let h = 128; h >= 1; h >>= 1) for (let i = 0; i < h; i++) lanes[i]! += lanes[i + h]!;
    sums[c] = lanes[0]!;
  }
  return sums;
}

/** The float64 sum in 1,024 lanes. */
function sum(x: ArrayLike<number>): number {
  const lanes = new Float64Array(1024);
  for (let i = 0; i < x.length; i++) lanes[i % 1024]! += x[i]!;
  for (let h = 512; h >= 1; h >>= 1) for (let i = 0; i < h; i++) lanes[i]! += lanes[i + h]!;
  return lanes[0]!;
}

/** The norms of one tensor from its chunks' sums: `width` of them, which take turns. */
export function tensorNorms(partial: ArrayLike<number>, width: number): Float32Array {
  return Float32Array.from({ length: width }, (_, j) =>
    Math.sqrt(sum(Array.from({ length: partial.length / width }, (__, c) => partial[c * width + j]!))),
  );
}

/** The norm of norms, and what gradients are multiplied by. */
export function clip(norms: ArrayLike<number>, maxNorm: number, errors = false): Float32Array {
  const total = f32(Math.sqrt(sum(Array.from(norms, (norm) => norm * norm))));
  const coefficient = f32(f32(maxNorm) / f32(total + f32(1e-6)));
  return Float32Array.of(total, coefficient > 1 || (errors && !Number.isFinite(total)) ? 1 : coefficient);
}

/** What the step is multiplied by, from the norms of the parameter and of the update. */
export function ratio(ofP: number, ofU: number, unit: number, maxUnorm: number, eps: number): number {
  const update = f32(unit * ofU);
  const bound = f32(f32(f32(maxUnorm) * ofP) + f32(eps));
  return update > bound ? f32(bound / update) : 1;
}
