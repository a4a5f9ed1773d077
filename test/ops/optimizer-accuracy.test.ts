/**
 * What bitsandbytes has no kernel for, and so no golden case: LAMB and LARS with 8-bit states, and one-state optimizers of bf16 with
 * float32 states. Each step is held against the same formulas in float64 as papers and torch write them, from the states that the step
 * before left.
 */
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import type { FloatDType } from "#halfbyte/core/dtype.js";
import { liveTensors, Tensor } from "#halfbyte/core/tensor.js";
import {
  type OptimizerName,
  type OptimizerUpdateOptions,
  optimizerUpdate8bitBlockwise,
  optimizerUpdate32bit,
} from "#halfbyte/ops/optimizer.js";
import { DEVICES, type GuardedBackend, makeBackend } from "../helpers/backends.js";
import { STATE_CODES } from "../helpers/optimizer-list.js";
import { normals } from "../helpers/random.js";
import { decode, encode, round } from "../helpers/scalar.js";

const N = 5003;
const STEPS = 5;
const ROUNDING = 2 ** -24;

/** Numbers as the kernels have them. */
function rounded(options: OptimizerUpdateOptions): Required<OptimizerUpdateOptions> {
  const all = { beta2: 0, beta3: 0, alpha: 0, weightDecay: 0, gnormScale: 1, maxUnorm: 0, ...options };
  const numbers = Object.entries(all).map(([key, x]) => [
    key,
    typeof x === "number" && key !== "step" ? Math.fround(x) : x,
  ]);
  return { skipZeros: false, allowNonFinite: false, ...Object.fromEntries(numbers) };
}

interface Model {
  readonly p: Float64Array;
  readonly states: Float64Array[];
  /** Sums of the magnitudes of what a state was added up from. */
  readonly terms: Float64Array[];
  /** The same as an update of the parameter. */
  readonly updateTerms: Float64Array;
  /** Elements whose gradient lies where two roundings to the dtype are as good as each other. */
  readonly unsure: ReadonlySet<number>;
}

const norm = (x: Float64Array): number => Math.sqrt(x.reduce((sum, v) => sum + v * v, 0));

/** One step in float64; only the gradient with decay is rounded to the parameter's dtype, as the contract has it. */
function modelStep(
  name: OptimizerName,
  dtype: FloatDType,
  narrow: boolean,
  p: Float64Array,
  raw: Float64Array,
  old: readonly Float64Array[],
  o: Required<OptimizerUpdateOptions>,
): Model {
  const unsure = new Set<number>();
  const adam = name === "lamb";
  const g = raw.map((x, i) => {
    const moved = adam ? x : x + o.weightDecay * p[i]!;
    if (adam || narrow || o.weightDecay === 0) return moved;
    const off = 4 * ROUNDING * (Math.abs(x) + Math.abs(o.weightDecay * p[i]!));
    if (round(dtype, moved - off) !== round(dtype, moved + off)) unsure.add(i);
    return round(dtype, moved);
  });
  const magnitude = raw.map((x, i) => Math.abs(x) + (adam ? 0 : Math.abs(o.weightDecay * p[i]!)));
  const state = (k: number, beta: number, rest: number, squared: boolean) => {
    const kept = o.step === 1 ? 0 : beta;
    return {
      value: g.map((x, i) => kept * old[k]![i]! + rest * (squared ? x * x : x)),
      terms: magnitude.map((x, i) => Math.abs(kept * old[k]![i]!) + rest * (squared ? x * x : x)),
    };
  };
  const moments = adam
    ? [state(0, o.beta1, 1 - o.beta1, false), state(1, o.beta2, 1 - o.beta2, true)]
    : name === "rmsprop"
      ? [state(0, o.beta1, 1 - o.beta1, true)]
      : name === "adagrad"
        ? [state(0, 1, 1, true)]
        : [state(0, o.beta1, 1, false)];
  const [first, second] = moments.map(({ value }) => value) as [Float64Array, Float64Array];
  const terms = moments.map((moment) => moment.terms);
  const [c1, c2] = [1 - o.beta1 ** o.step, 1 - o.beta2 ** o.step];
  const divisor = (i: number): number =>
    adam
      ? c1 * (Math.sqrt(second[i]! / c2) + o.eps)
      : name === "momentum" || name === "lars"
        ? 1
        : Math.sqrt(first[i]!) + o.eps;
  const moved = adam || name === "momentum" || name === "lars" ? first : g;
  const update = moved.map((x, i) => x / divisor(i));
  // The norm is that of the update without decay.
  let ratio = 1;
  if (o.maxUnorm > 0) {
    const plain = update.map((u, i) => (adam ? u : (o.step === 1 ? 0 : o.beta1 * old[0]![i]!) + raw[i]!));
    ratio = Math.min(1, (o.maxUnorm * norm(p) + (adam ? 0 : o.eps)) / norm(plain));
  }
  const keeps = adam ? 1 - o.lr * o.weightDecay : 1;
  const size = moved === first ? terms[0]! : magnitude;
  return {
    p: p.map((x, i) => (x - o.lr * ratio * update[i]!) * keeps),
    states: moments.map(({ value }) => value),
    terms,
    updateTerms: size.map((x, i) => (o.lr * ratio * x) / divisor(i)),
    unsure,
  };
}

function ulp(dtype: FloatDType, x: number): number {
  const [bits, least] = { f32: [23, -126], f16: [10, -14], bf16: [7, -126] }[dtype] as [number, number];
  return 2 ** (Math.max(least, Math.floor(Math.log2(Math.abs(x) || 2 ** least))) - bits);
}

const floats = (tensor: Tensor): Float64Array => {
  const { dtype } = tensor as Tensor<FloatDType>;
  const bytes = tensor.bytesSync();
  const array = dtype === "f32" ? Uint32Array : Uint16Array;
  return Float64Array.from(new array(bytes.buffer, 0, tensor.size), (bits) => decode(dtype, bits));
};

/** States as values, and how far the value of a code may be from what it was made of: half the way to its neighbours. */
function decoded(codes: Uint8Array, absmax: Float64Array, map: Float32Array) {
  const value = Float64Array.from(codes, (q, i) => map[q]! * absmax[i >> 8]!);
  const gap = Float64Array.from(codes, (q, i) => {
    const [below, above] = [map[q]! - (map[q - 1] ?? map[q]!), (map[q + 1] ?? map[q]!) - map[q]!];
    // A negative value that is nearer to zero than to the first negative code has that code still.
    const own = map[q + 1] === 0 ? 2 * above : above;
    return (Math.max(below, own) / 2) * absmax[i >> 8]!;
  });
  return { value, gap };
}

/**
 * Roundings of a step, of which each moves the update by at most 2^-24 of its terms: two each of states (and the gradient), the root, a
 * sum, an inverse, two products; and the ratio: 16 sums in a lane and 8 in the tree, halved by the root, of two norms, and 5.
 */
const UPDATE_ROUNDINGS = 2 * 4 + 5 + 24 + 5;
/** Those of a state with its gradient: of a square twice. */
const STATE_ROUNDINGS = 8;

describe.each(DEVICES)("against float64 on $device", ({ device, missing }) => {
  let backend: GuardedBackend;
  beforeAll(() => {
    if (!missing) backend = makeBackend(device);
  });
  afterAll(async () => {
    backend?.checkGuards();
    await backend?.close();
  });

  const upload = (dtype: FloatDType, values: ArrayLike<number>): Tensor<FloatDType> => {
    const tensor = Tensor.allocate(backend, dtype, [values.length]);
    const bits = Array.from(values, (x) => encode(dtype, x));
    const bytes = dtype === "f32" ? Uint32Array.from(bits) : Uint16Array.from(bits);
    backend.write(tensor.storage, tensor.byteOffset, new Uint8Array(bytes.buffer));
    return tensor;
  };
  const zeros = (dtype: "f32" | "u8", n: number): Tensor =>
    Tensor.allocate(backend, dtype, [n]).copyFrom(dtype === "f32" ? new Float32Array(n) : new Uint8Array(n));

  function train(
    name: OptimizerName,
    bits: 8 | 32,
    dtype: FloatDType,
    gradDtype: FloatDType,
    options: Partial<OptimizerUpdateOptions>,
  ) {
    const two = name === "lamb";
    const blocks = Math.ceil(N / 256);
    const p = upload(
      dtype,
      normals(N, `${name} p`, 0.05).map((x) => round(dtype, x)),
    );
    const state1 = zeros(bits === 8 ? "u8" : "f32", N);
    const state2 = two ? zeros(bits === 8 ? "u8" : "f32", N) : null;
    const absmax1 = bits === 8 ? zeros("f32", blocks) : null;
    const absmax2 = bits === 8 && two ? zeros("f32", blocks) : null;
    const read = (state: Tensor, absmax: Tensor | null, map: Float32Array) => {
      if (!absmax) return { value: floats(state), gap: new Float64Array(N) };
      return decoded(state.bytesSync(), floats(absmax), map);
    };
    const states = () => [
      read(state1, absmax1, STATE_CODES.code1),
      ...(state2 ? [read(state2, absmax2, STATE_CODES.code2)] : []),
    ];
    let [unsure, moved] = [0, 0];
    for (let step = 1; step <= STEPS; step++) {
      const o = rounded({ lr: 0.01, beta1: 0.9, beta2: 0.99, eps: 1e-8, ...options, step });
      const raw = Float64Array.from(normals(N, `${name} ${step}`, 0.01), (x) => round(gradDtype, x));
      const [before, old] = [floats(p), states().map(({ value }) => value)];
      const model = modelStep(name, dtype, bits === 8, before, raw, old, o);
      const g = upload(gradDtype, raw);
      if (bits === 32) optimizerUpdate32bit(name, g, p, state1, state2, o);
      else optimizerUpdate8bitBlockwise(name, g, p, state1, state2, absmax1!, absmax2, o);
      g.dispose();
      const [after, now] = [floats(p), states()];
      unsure += model.unsure.size;
      for (let i = 0; i < N; i++) {
        if (model.unsure.has(i)) continue;
        // A parameter is rounded to the nearest at most twice; 1 - lr * weightDecay was rounded once.
        const size = ulp(dtype, Math.max(Math.abs(before[i]!), Math.abs(model.p[i]!)));
        const bound = 1.51 * size + UPDATE_ROUNDINGS * ROUNDING * model.updateTerms[i]!;
        if (!(Math.abs(after[i]! - model.p[i]!) <= bound)) {
          expect.fail(`step ${step}, p[${i}]: ${after[i]} is not ${model.p[i]} within ${bound}`);
        }
        for (const [k, { value, gap }] of now.entries()) {
          const slack = STATE_ROUNDINGS * ROUNDING * model.terms[k]![i]! + gap[i]! * (1 + 1e-6) + 1e-44;
          if (!(Math.abs(value[i]! - model.states[k]![i]!) <= slack)) {
            expect.fail(`step ${step}, state ${k}[${i}]: ${value[i]} is not ${model.states[k]![i]} within ${slack}`);
          }
        }
        if (after[i] !== before[i]) moved++;
      }
      for (const [k, absmax] of [absmax1, absmax2].entries()) {
        if (!absmax) continue;
        const scales = floats(absmax);
        const largest = (values: Float64Array, b: number) =>
          values.subarray(b * 256, (b + 1) * 256).reduce((most, x) => Math.max(most, Math.abs(x)), 0);
        for (let b = 0; b < blocks; b++) {
          const bound = STATE_ROUNDINGS * ROUNDING * largest(model.terms[k]!, b);
          expect(Math.abs(scales[b]! - largest(model.states[k]!, b))).toBeLessThanOrEqual(bound);
        }
      }
    }
    for (const tensor of [p, state1, state2, absmax1, absmax2]) tensor?.dispose();
    expect(unsure, "gradients on a boundary between two values of the dtype").toBeLessThan((STEPS * N) / 1000);
    expect(moved, "parameters that moved").toBeGreaterThan(N);
    expect(liveTensors(backend)).toBe(0);
  }

  const PAIRS = [
    ["f32", "f32"],
    ["f16", "f16"],
    ["bf16", "bf16"],
    ["f32", "bf16"],
    ["bf16", "f32"],
  ] as const;
  describe.skipIf(missing)(missing ? `(skipped: ${missing})` : "steps", () => {
    for (const [dtype, gradDtype] of PAIRS) {
      test.each([
        ["lamb", { maxUnorm: 1 }],
        ["lamb", { maxUnorm: 0.05, weightDecay: 0.1234, lr: 0.3 }],
        ["lars", { maxUnorm: 0.02, lr: 0.5, eps: 0 }],
        ["lars", { maxUnorm: 0.5, weightDecay: 0.1234, lr: 0.3, eps: 1e-3 }],
      ] as const)(`8-bit %s, ${dtype} with gradients of ${gradDtype}, %o`, (name, options) => {
        train(name, 8, dtype, gradDtype, options);
      });
    }
    for (const gradDtype of ["bf16", "f32"] as const) {
      test.each([
        ["momentum", { lr: 0.5 }],
        ["momentum", { lr: 0.5, weightDecay: 0.1234 }],
        ["rmsprop", { beta1: 0.95 }],
        ["rmsprop", { beta1: 0.95, weightDecay: 0.0567 }],
        ["adagrad", { eps: 1e-10 }],
        ["adagrad", { eps: 1e-10, weightDecay: 0.0567 }],
        ["lars", { maxUnorm: 0.02, lr: 5, eps: 0 }],
        ["lars", { maxUnorm: 0.5, weightDecay: 0.1234, lr: 0.3, eps: 1e-3 }],
      ] as const)(`32-bit %s, bf16 with gradients of ${gradDtype}, %o`, (name, options) => {
        train(name, 32, "bf16", gradDtype, options);
      });
    }
  });
});
