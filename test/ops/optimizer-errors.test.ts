/** What optimizer updates and gradient clipping refuse: by class and operand, before anything is launched. */
import { describe, expect, test } from "vitest";
import { NonFiniteError } from "#halfbyte/core/errors.js";
import { Tensor } from "#halfbyte/core/tensor.js";
import { clipGradNorm } from "#halfbyte/ops/gradient.js";
import {
  type OptimizerName,
  type OptimizerUpdateOptions,
  optimizerUpdate8bitBlockwise,
  optimizerUpdate32bit,
} from "#halfbyte/ops/optimizer.js";
import { withBackend } from "../helpers/backends.js";
import { gone, type Make, type Refusal, refuse } from "./refuse.js";

const OPTIONS: OptimizerUpdateOptions = { lr: 1e-3, step: 1, beta1: 0.9, beta2: 0.999, eps: 1e-8 };
const N = 300;

type Operands = Partial<Record<"g" | "p" | "state1" | "state2" | "absmax1" | "absmax2", unknown>>;

/** A call with one thing that is wrong. */
function call(make: Make, bits: 8 | 32, name: string, wrong: Operands, options: object = {}): () => void {
  const mixed = name === "ademamix" ? 2 : 1;
  const two = ["adam", "adamw", "lamb", "ademamix"].includes(name);
  const dtype = bits === 8 ? "u8" : "f32";
  const t: Record<string, unknown> = {
    g: make("f32", [N]),
    p: make("f32", [N]),
    state1: make(dtype, [mixed * N]),
    state2: two ? make(dtype, [N]) : null,
    absmax1: make("f32", [mixed * 2]),
    absmax2: two ? make("f32", [2]) : null,
    ...wrong,
  };
  const all = { ...OPTIONS, ...options } as OptimizerUpdateOptions;
  const [g, p, s1, s2, a1, a2] = ["g", "p", "state1", "state2", "absmax1", "absmax2"].map((k) => t[k] as Tensor);
  return () =>
    bits === 8
      ? optimizerUpdate8bitBlockwise(name as OptimizerName, g!, p!, s1!, s2!, a1!, a2!, all)
      : optimizerUpdate32bit(name as OptimizerName, g!, p!, s1!, s2!, all);
}

describe("optimizer updates refuse", () => {
  for (const bits of [32, 8] as const) {
    const op = bits === 32 ? "optimizerUpdate32bit" : "optimizerUpdate8bitBlockwise";
    const state = bits === 8 ? "u8" : "f32";
    test(`${op}: operands`, () =>
      refuse(op, (make, other, keep) => {
        const shared = make("f32", [2 * N]);
        const part = (begin: number) => keep(shared.slice(begin, begin + N));
        return [
          [call(make, bits, "sgd", {}), "ArgumentError", "optimizerName", "momentum"],
          [call(make, bits, "adam", { p: [1, 2] }), "ArgumentError", "p", "a Tensor"],
          [call(make, bits, "adam", { p: make("i32", [N]) }), "DTypeError", "p"],
          [call(make, bits, "adam", { p: gone(make, "f32", [N]) }), "DisposedError", "p"],
          [call(make, bits, "adam", { g: null }), "ArgumentError", "g", "null"],
          [call(make, bits, "adam", { g: make("u8", [N]) }), "DTypeError", "g", "f32 or f16 or bf16"],
          [call(make, bits, "adam", { p: make("f16", [N]), g: make("bf16", [N]) }), "DTypeError", "g", "f32 or f16"],
          [call(make, bits, "adam", { p: make("bf16", [N]), g: make("f16", [N]) }), "DTypeError", "g", "f32 or bf16"],
          [call(make, bits, "adam", { g: make("f32", [N - 1]) }), "ShapeError", "g", "300 elements"],
          [call(make, bits, "adam", { g: other("f32", [N]) }), "DeviceError", "g"],
          [call(make, bits, "adam", { g: gone(make, "f32", [N]) }), "DisposedError", "g"],
          [call(make, bits, "adam", { state1: make("f16", [N]) }), "DTypeError", "state1", state],
          [call(make, bits, "adam", { state1: make(state, [N + 1]) }), "ShapeError", "state1", "300 elements"],
          [call(make, bits, "ademamix", { state1: make(state, [N]) }), "ShapeError", "state1", "600 elements"],
          [call(make, bits, "adam", { state1: other(state, [N]) }), "DeviceError", "state1"],
          [call(make, bits, "adam", { state2: null }), "ArgumentError", "state2", "a Tensor"],
          [call(make, bits, "lamb", { state2: make(state, [1]) }), "ShapeError", "state2"],
          [call(make, bits, "lion", { state2: make(state, [N]) }), "ArgumentError", "state2", "null"],
          [call(make, bits, "adam", { g: part(0), p: part(N - 1) }), "ArgumentError", "g"],
        ] satisfies Refusal[];
      }));

    test(`${op}: options`, () =>
      refuse(op, (make) => {
        const option = (name: string, value: unknown, family = "adam"): (() => void) =>
          call(make, bits, family, {}, { [name]: value });
        const bad: [string, unknown, string?][] = [
          ["lr", Number.NaN],
          ["lr", -1],
          ["lr", 1e39],
          ["lr", undefined],
          ["step", 0],
          ["step", 1.5],
          ["step", 2 ** 32],
          ["beta1", 1],
          ["beta1", undefined],
          ["beta2", 0.9999999999],
          ["beta2", -0.1],
          ["beta3", Number.NaN, "ademamix"],
          ["alpha", Number.POSITIVE_INFINITY, "ademamix"],
          ["eps", Number.NaN],
          ["weightDecay", "0.1"],
          ["weightDecay", -1e-2],
          ["gnormScale", Number.NaN],
          ["maxUnorm", Number.POSITIVE_INFINITY],
          ["skipZeros", 1],
          ["allowNonFinite", "yes"],
        ];
        return bad.map(([name, value, family]): Refusal => [option(name, value, family), "ArgumentError", name]);
      }));
  }

  test("optimizerUpdate8bitBlockwise: scales", () =>
    refuse("optimizerUpdate8bitBlockwise", (make, _, keep) => {
      const codes = make("u8", [2 * N]);
      const part = (begin: number) => keep(codes.slice(begin, begin + N));
      return [
        [call(make, 8, "adam", { absmax1: make("f32", [1]) }), "ShapeError", "absmax1", "2 elements"],
        [call(make, 8, "ademamix", { absmax1: make("f32", [2]) }), "ShapeError", "absmax1", "4 elements"],
        [call(make, 8, "adam", { absmax1: null }), "ArgumentError", "absmax1"],
        [call(make, 8, "adam", { absmax2: make("f16", [2]) }), "DTypeError", "absmax2"],
        [call(make, 8, "momentum", { absmax2: make("f32", [2]) }), "ArgumentError", "absmax2", "null"],
        [call(make, 8, "adam", { state1: part(0), state2: part(N - 1) }), "ArgumentError", "state2", "state1"],
      ] satisfies Refusal[];
    }));
});

test("clipGradNorm refuses", () =>
  refuse("clipGradNorm", (make, other, keep) => {
    const a = make("f32", [10]);
    const b = make("bf16", [10]);
    return [
      [() => clipGradNorm([a, b], Number.NaN), "ArgumentError", "maxNorm"],
      [() => clipGradNorm([a], -1), "ArgumentError", "maxNorm"],
      [() => clipGradNorm([a], 1, { normType: 1 as never }), "ArgumentError", "normType"],
      [() => clipGradNorm([a], 1, { errorIfNonfinite: 1 as never }), "ArgumentError", "errorIfNonfinite"],
      [() => clipGradNorm(a as never, 1), "ArgumentError", "tensors"],
      [() => clipGradNorm([a, null as never], 1), "ArgumentError", "tensors[1]"],
      [() => clipGradNorm([null as never], 1), "ArgumentError", "tensors[0]"],
      [() => clipGradNorm([a, make("i32", [3])], 1), "DTypeError", "tensors[1]"],
      [() => clipGradNorm([a, other("f32", [3])], 1), "DeviceError", "tensors[1]"],
      [() => clipGradNorm([gone(make, "f32", [4])], 1), "DisposedError", "tensors[0]"],
      [() => clipGradNorm([a, b, a], 1), "ArgumentError", "tensors[2]", "tensors[0]"],
      [
        () => clipGradNorm([b, keep(a.slice(3, 6)), keep(a.slice(5, 7))], 1),
        "ArgumentError",
        "tensors[2]",
        "tensors[1]",
      ],
    ] satisfies Refusal[];
  }));

describe("non-finite gradients", () => {
  const run = (allowNonFinite: boolean) =>
    withBackend({}, async (backend) => {
      const filled = (value: number) => Tensor.allocate(backend, "f32", [N]).copyFrom(new Float32Array(N).fill(value));
      const [g, p, s1, s2] = [filled(1), filled(2), filled(0), filled(0)];
      g.copyFrom(Float32Array.from({ length: N }, (_, i) => (i === 299 ? Number.POSITIVE_INFINITY : 1)));
      optimizerUpdate32bit("adam", g, p, s1, s2, { ...OPTIONS, allowNonFinite });
      const names = { name: "NonFiniteError", op: "optimizerUpdate32bit", operand: "g", unit: "parameter", index: 0 };
      if (allowNonFinite) {
        expect((await p.data())[299]).toBeNaN();
        expect((await p.data())[0]).toBeCloseTo(2 - 1e-3, 6);
      } else {
        const reading = p.data();
        await expect(reading).rejects.toMatchObject(names);
        await expect(reading).rejects.toThrow(/skipNonFinite.*allowNonFinite/);
        expect(await p.data()).toEqual(new Float32Array(N).fill(2));
        expect(await s1.data()).toEqual(new Float32Array(N));
        expect(await s2.data()).toEqual(new Float32Array(N));
      }
      for (const t of [g, p, s1, s2]) t.dispose();
    });
  test("are reported, and nothing is written", () => run(false));
  test("are let through on request", () => run(true));

  test("clipGradNorm reports them on request, by tensor", () =>
    withBackend({}, async (backend) => {
      const make = (values: number[]) => Tensor.allocate(backend, "f32", [values.length]).copyFrom(values);
      const tensors = [make([1, 2]), make([3]), make([4, Number.NaN])];
      const norm = clipGradNorm(tensors, 1, { errorIfNonfinite: true });
      const error: unknown = await norm.data().catch((e: unknown) => e);
      expect(error).toBeInstanceOf(NonFiniteError);
      expect(error).toMatchObject({ op: "clipGradNorm", operand: "tensors", index: 2 });
      expect((error as Error).message).toContain("All gradients keep their values");
      expect((error as Error).message).not.toMatch(/optimizer|skipNonFinite/);
      const kept = [[1, 2], [3], [4, Number.NaN]];
      for (const [i, t] of tensors.entries()) expect([...(await t.data())]).toEqual(kept[i]);
      for (const t of [norm, ...tensors]) t.dispose();
      const quiet = [make([1, Number.NaN])];
      const total = clipGradNorm(quiet, 1);
      expect((await total.data())[0]).toBeNaN();
      expect(await quiet[0]!.data()).toEqual(Float32Array.of(Number.NaN, Number.NaN));
      for (const t of [total, ...quiet]) t.dispose();
    }));

  test("clipGradNorm names parameters where the tensors are their gradients, and stays on their backend", () =>
    withBackend({}, async (backend) => {
      const make = (values: number[]) => Tensor.allocate(backend, "f32", [values.length]).copyFrom(values);
      const tensors = [make([1]), make([Number.POSITIVE_INFINITY])];
      const of = { backend, indices: [3, 7], nameOf: (i: number) => `parameters[${[3, 7][i]}].grad` };
      const norm = clipGradNorm(tensors, 1, { errorIfNonfinite: true }, of);
      await expect(norm.data()).rejects.toMatchObject({ op: "clipGradNorm", operand: "grad", index: 7 });
      expect((await tensors[0]!.data())[0]).toBe(1);
      const bad = Tensor.allocate(backend, "i32", [1]);
      expect(() => clipGradNorm([tensors[0]!, bad], 1, {}, of)).toThrow(
        "[clipGradNorm] parameters[7].grad: expected f32",
      );
      expect(() => clipGradNorm([tensors[0]!, tensors[0]!], 1, {}, of)).toThrow(
        "the same tensor as parameters[3].grad",
      );
      const none = clipGradNorm([], 1, {}, { ...of, indices: [] });
      expect(none.backend).toBe(backend);
      expect((await none.data())[0]).toBe(0);
      for (const t of [norm, none, bad, ...tensors]) t.dispose();
    }));
});
