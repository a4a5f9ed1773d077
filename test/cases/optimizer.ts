import type { FloatDType } from "#halfbyte/core/dtype.js";
import { OPTIMIZER_FAMILIES, type OptimizerFamily } from "#halfbyte/core/optimizers.js";
import type { Tensor } from "#halfbyte/core/tensor.js";
import { CONTEXT, type List } from "../helpers/optimizer-list.js";
import { type Hyper, norms, ratio, stepRow, tensorNorms, update } from "../helpers/scalar-optimizer.js";
import { type Case, caseId, EXTREMES, FLOATS, framed, framedHost, type Host } from "./case.js";
import {
  type Bits,
  expectedFrames,
  f32s,
  gradient,
  hyperOf,
  inputLeads,
  isTwoState,
  launchNorms,
  launchUpdate,
  rowsHost,
  type Scene,
  type SceneKind,
  scalarStep,
  scalarTensor,
  sceneInputs,
  stage,
} from "./optimizer-scenes.js";

/** Parameter and gradient. */
const DTYPES: readonly (readonly [FloatDType, FloatDType])[] = [
  ["f32", "f32"],
  ["f16", "f16"],
  ["bf16", "bf16"],
  ["f32", "f16"],
  ["f32", "bf16"],
  ["f16", "f32"],
  ["bf16", "f32"],
];
/** Lengths round blocks and chunks, in one list. */
const SIZES = [0, 1, 255, 256, 257, 0, 4095, 4096, 4097];
const FEW = [0, 700, 4097];

interface Options extends Partial<Omit<Scene, "id" | "hyper">> {
  readonly hyper?: Partial<Hyper>;
  /** What tells its id from others. */
  readonly tag?: string;
}

function sceneOf(name: string, family: OptimizerFamily, bits: Bits, options: Options): Scene {
  const { dtype = "f32", sizes = FEW, kind = "edge", tag, hyper, ...rest } = options;
  const gradDtype = options.gradDtype ?? dtype;
  const length = sizes.length > 3 ? `list=${sizes.length}` : `n=${sizes.join("+")}`;
  const types = dtype === gradDtype ? dtype : `${dtype}-${gradDtype}`;
  const parts = [family, types, length, kind, ...(options.cold ? ["first"] : []), ...(tag ? [tag] : [])];
  const id = caseId(name, ...parts);
  const step = options.cold ? { step: 1 } : {};
  return { ...rest, id, family, bits, dtype, gradDtype, sizes, kind, hyper: hyperOf(family, { ...step, ...hyper }) };
}

const primitiveOf = (bits: Bits) => (bits === 32 ? "optimizerUpdate32bit" : "optimizerUpdate8bitBlockwise");

function updateCase(family: OptimizerFamily, bits: Bits, options: Options): Case {
  const scene = sceneOf(primitiveOf(bits), family, bits, options);
  return {
    id: scene.id,
    primitive: primitiveOf(bits),
    dtype: scene.dtype,
    lead: inputLeads(scene),
    inputs: () => sceneInputs(scene),
    run: (inputs, backend) => {
      const [staged] = stage(scene, inputs, backend);
      launchUpdate(scene, staged!, backend, { scalars: inputs.scalars!, ratios: inputs.ratios });
      return staged!.outputs;
    },
    expected: (inputs) => expectedFrames(scene, inputs),
  };
}

/** `count` steps in a row on the same states, each with its own row of scalars. */
function trainCase(family: OptimizerFamily, bits: Bits, dtype: FloatDType, hyper: Partial<Hyper>, count: number): Case {
  const scene = sceneOf(primitiveOf(bits), family, bits, {
    dtype,
    cold: true,
    kind: "normal",
    tag: `steps=${count}`,
    hyper,
  });
  const at = (k: number): Hyper => ({ ...scene.hyper, step: k + 1 });
  const steps = Array.from({ length: count }, (_, k) => k);
  return {
    id: scene.id,
    primitive: primitiveOf(bits),
    dtype,
    inputs: () => {
      const inputs = sceneInputs(scene);
      for (const k of steps) {
        inputs[`scalars${k}`] = rowsHost([stepRow(family, at(k), bits, dtype)]);
        scene.sizes.forEach((n, t) => {
          inputs[`h${k}_${t}`] = gradient(scene, n, `${scene.id} ${t} ${k}`);
        });
      }
      return inputs;
    },
    run: (inputs, backend) => {
      const staged = stage(
        scene,
        inputs,
        backend,
        steps.map((k) => `h${k}_`),
      );
      for (const k of steps) launchUpdate(scene, staged[k]!, backend, { scalars: inputs[`scalars${k}`]! });
      return staged[0]!.outputs;
    },
    expected: (inputs) =>
      expectedFrames(scene, inputs, (before, t) => {
        let tensor = before;
        for (const k of steps) {
          const g = inputs[`h${k}_${t}`]!.values;
          tensor = update({ ...tensor, g }, scalarStep(scene, undefined, at(k)));
        }
        return tensor;
      }),
  };
}

/**
 * Three steps under a guard; the gradients of the second hold a NaN or an infinity. It writes nothing, and the third has the numbers of
 * a second step, from the row that the device chooses. `known`: skips that the host has heard of before the first step.
 */
function guardCase(family: OptimizerFamily, bits: Bits, dtype: FloatDType, known: number): Case {
  const name = primitiveOf(bits);
  const scene = sceneOf(name, family, bits, { dtype, sizes: [300, 0, 4097, 17], cold: true, tag: `guard=${known}` });
  const at = (step: number): Hyper => ({ ...scene.hyper, step });
  const bad = [2, 4096] as const;
  return {
    id: scene.id,
    primitive: name,
    dtype,
    inputs: () => {
      const inputs = sceneInputs(scene);
      const rows = (...steps: number[]): Host => rowsHost(steps.map((k) => stepRow(family, at(k), bits, dtype)));
      // Every row but the one that has to be taken is of a step far off.
      inputs.scalars0 = rows(1, 77);
      inputs.scalars1 = rows(2, 88);
      inputs.scalars2 = rows(99, 2, 66);
      inputs.guard = { dtype: "i32", shape: [4], values: [-1, known, 0, 1234] };
      scene.sizes.forEach((n, t) => {
        inputs[`h${t}`] = gradient(scene, n, `${scene.id} ${t} h`);
        const broken = gradient(scene, n, `${scene.id} ${t} broken`);
        const values = Array.from(broken.values);
        if (t >= bad[0]) values[t === bad[0] ? bad[1] : 3] = t === bad[0] ? Number.NaN : Number.NEGATIVE_INFINITY;
        inputs[`broken${t}`] = { ...broken, values };
      });
      return inputs;
    },
    run: (inputs, backend) => {
      const guard = framed(backend, "i32", [4], 0);
      backend.launch("copy", { src: inputs.guard!, dst: guard.view, bytes: 16 });
      const staged = stage(scene, inputs, backend, ["g", "broken", "h"]);
      const seen: Record<string, Tensor> = {};
      staged.forEach((one, k) => {
        const { list, chunks, count } = one.list;
        const gradDtype = { f32: 0, f16: 1, bf16: 2 }[dtype];
        const operands = { list, chunks, guard: guard.view, count, gradDtype };
        backend.launch("gradientCheck", operands, CONTEXT, one.list.reached());
        backend.launch("gradientVerdict", { guard: guard.view, allowNonFinite: 1 }, CONTEXT);
        launchUpdate(scene, one, backend, { scalars: inputs[`scalars${k}`]!, guard: guard.view, known });
        const words = framed(backend, "i32", [4], 1);
        backend.launch("copy", { src: guard.view, dst: words.view, bytes: 16 });
        seen[`guard${k}`] = words.base;
      });
      return { ...staged[0]!.outputs, ...seen };
    },
    expected: (inputs) => {
      const words = (...values: number[]): Host => framedHost({ dtype: "i32", shape: [4], values }, 1);
      const index = 3 * bad[0] + 2;
      return {
        ...expectedFrames(scene, inputs, (tensor, t) => {
          const one = update(tensor, scalarStep(scene, undefined, at(1)));
          return update({ ...one, g: inputs[`h${t}`]!.values }, scalarStep(scene, undefined, at(2)));
        }),
        guard0: words(-1, known, 0, 1234),
        guard1: words(-1, known + 1, 1, index),
        guard2: words(-1, known + 1, 0, index),
      };
    },
  };
}

/** The norms of parameters and updates, alone and with all that follows from them: ratios, and a step. */
function normsCase(family: OptimizerFamily, bits: Bits, options: Options & { maxUnorm?: number }): Case {
  const { maxUnorm = 0.02, ...rest } = options;
  const scene = sceneOf(primitiveOf(bits), family, bits, { ...rest, tag: `norms${rest.tag ? `,${rest.tag}` : ""}` });
  const records = scene.sizes.length;
  const eps = isTwoState(family) ? 0 : Math.fround(scene.hyper.eps);
  return {
    id: scene.id,
    primitive: primitiveOf(bits),
    dtype: scene.dtype,
    lead: inputLeads(scene),
    inputs: () => sceneInputs(scene),
    run: (inputs, backend) => {
      const [staged] = stage(scene, inputs, backend);
      const { list, count, reached }: List = staged!.list;
      const partial = framed(backend, "f32", [2 * count], 1);
      const norm = framed(backend, "f32", [2 * records], 1);
      const ratios = framed(backend, "f32", [records], 3);
      const scalars = inputs.scalars!;
      launchNorms(scene, staged!, backend, { scalars, partial: partial.view });
      const sums = { list, partial: partial.view, norms: norm.view, records, width: 2 };
      backend.launch("tensorNorms", sums, CONTEXT, reached());
      const bound = { guard: null, known: 0, maxUnorm: Math.fround(maxUnorm), eps };
      backend.launch("optimizerRatios", { norms: norm.view, scalars, ratios: ratios.view, records, ...bound }, CONTEXT);
      launchUpdate(scene, staged!, backend, { scalars, ratios: ratios.view });
      return { ...staged!.outputs, partial: partial.base, norms: norm.base, ratios: ratios.base };
    },
    expected: (inputs) => {
      const step = scalarStep(scene);
      const partial: number[] = [];
      const norm: number[] = [];
      const ratios = scene.sizes.map((_, t) => {
        const sums = norms(scalarTensor(inputs, t), step);
        partial.push(...sums);
        const [ofP, ofU] = tensorNorms(sums, 2);
        norm.push(ofP!, ofU!);
        return ratio(ofP!, ofU!, step.row.unit, maxUnorm, eps);
      });
      return {
        ...expectedFrames(scene, inputs, (tensor, t) => update(tensor, scalarStep(scene, ratios[t]))),
        partial: framedHost(f32s(partial), 1),
        norms: framedHost(f32s(norm), 1),
        ratios: framedHost(f32s(ratios), 3),
      };
    },
  };
}

function* familyCases(family: OptimizerFamily, bits: Bits): Generator<Case> {
  const make = (options: Options): Case => updateCase(family, bits, options);
  for (const [dtype, gradDtype] of DTYPES) {
    const types = { dtype, gradDtype };
    yield make({ ...types, sizes: SIZES });
    yield make({ ...types, kind: "nonfinite" });
    yield make({ ...types, sizes: [5003, 33], kind: "edge", skipZeros: true, tag: "skip-zeros" });
  }
  for (const dtype of FLOATS) {
    for (const kind of EXTREMES.filter((name) => name !== "nonfinite") as SceneKind[]) yield make({ dtype, kind });
    yield make({ dtype, sizes: [300, 4096], cold: true, hyper: { weightDecay: 0 } });
    yield make({ dtype, ratios: true, sizes: [257, 4097, 0, 31, 512], tag: "ratios" });
    yield make({ dtype, kind: "normal", hyper: { gnormScale: 0.37, step: 1000 }, tag: "gnorm" });
    yield trainCase(family, bits, dtype, family === "ademamix" ? { tAlpha: 4, tBeta3: 5 } : {}, 4);
    yield normsCase(family, bits, { dtype, kind: "normal", sizes: SIZES });
  }
  for (const [i, lead] of [1, 2, 3, 4, 6, 8].entries()) {
    const [dtype, gradDtype] = DTYPES[i % DTYPES.length]!;
    yield make({ dtype, gradDtype, lead, sizes: [4096, 1000, 8200], tag: `view=${lead}` });
  }
  yield make({ dtype: "f16", kind: "wild", cold: true, hyper: { weightDecay: 0 } });
  yield normsCase(family, bits, { maxUnorm: 10, hyper: { step: 1 }, tag: "wide" });
  yield make({ kind: "spread", sizes: [8192, 300] });
  yield make({
    kind: "spread",
    sizes: [8192, 300],
    hyper: { eps: 1e-20, gnormScale: 1.3, weightDecay: 0 },
    tag: "eps",
  });
  yield make({ hyper: { beta1: 0.25, beta2: 0.3, eps: 1e-3, lr: 0.5 }, tag: "other" });
  yield make({ dtype: "f16", kind: "nonfinite", skipZeros: true, tag: "skip-zeros" });
  yield normsCase(family, bits, { dtype: "bf16", gradDtype: "f32", lead: 1, tag: "view=1" });
  yield normsCase(family, bits, { dtype: "f32", gradDtype: "f16", kind: "wild" });
  yield normsCase(family, bits, { kind: "nonfinite" });
  yield normsCase(family, bits, { kind: "edge", skipZeros: true, tag: "skip-zeros" });
  yield guardCase(family, bits, "f32", 0);
  yield guardCase(family, bits, "bf16", 5);
  const length = OPTIMIZER_FAMILIES.indexOf(family) + (bits === 8 ? 1 : 0);
  const [dtype, gradDtype] = DTYPES[length % DTYPES.length]!;
  yield { ...make({ dtype, gradDtype, sizes: [100_003], kind: "normal" }), large: true };
  yield { ...make({ sizes: Array.from({ length: 300 }, (_, t) => t), kind: "normal", dtype }), large: true };
}

export function* optimizerCases(): Generator<Case> {
  for (const bits of [32, 8] as const) for (const family of OPTIMIZER_FAMILIES) yield* familyCases(family, bits);
  // Every code and every boundary of the maps, through states that are just those.
  const points = { kind: "points", sizes: [256 * 20], cold: false } as const;
  yield updateCase("momentum", 8, { ...points, hyper: { step: 1, weightDecay: 0 } });
  yield updateCase("adam", 8, { ...points, hyper: { beta1: 0, beta2: 0 } });
  yield updateCase("lion", 8, { ...points, hyper: { beta1: 0, beta2: 0 } });
  const limits = { ...points, kind: "scales", sizes: [256 * 80] } as const;
  yield updateCase("momentum", 8, { ...limits, hyper: { step: 1, weightDecay: 0 } });
  yield updateCase("adam", 8, { ...limits, hyper: { beta1: 0, beta2: 0 } });
  yield updateCase("lion", 8, { ...limits, hyper: { beta1: 0, beta2: 0 } });
  for (const bits of [32, 8] as const) {
    for (const step of [1, 3, 4, 5, 9]) {
      const hyper = { step, tAlpha: 4, tBeta3: 5, gnormScale: 1.7 };
      yield updateCase("ademamix", bits, { kind: "normal", hyper, tag: `schedule=${step}` });
    }
  }
}
