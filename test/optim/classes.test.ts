import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { ArgumentError, DeviceError, DisposedError, DTypeError } from "#halfbyte/core/errors.js";
import { Tensor } from "#halfbyte/core/tensor.js";
import { Adam, Adam8bit, LAMB8bit, Lion, Optimizer, PagedAdam8bit, RMSprop, SGD } from "#halfbyte/index.js";
import { expectNothingLeft, type GuardedBackend, makeBackend } from "../helpers/backends.js";
import { type AnyOptions, CLASSES, classOf, needed, parameter } from "./scene.js";

/** The signatures of bitsandbytes 0.50, written down by hand. */
const UPSTREAM: Readonly<Record<string, AnyOptions>> = {
  Adam: { lr: 1e-3, betas: [0.9, 0.999], eps: 1e-8, weightDecay: 0 },
  AdamW: { lr: 1e-3, betas: [0.9, 0.999], eps: 1e-8, weightDecay: 1e-2 },
  AdEMAMix: {
    lr: 1e-3,
    betas: [0.9, 0.999, 0.9999],
    alpha: 5.0,
    tAlpha: null,
    tBeta3: null,
    eps: 1e-8,
    weightDecay: 1e-2,
  },
  LAMB: { lr: 1e-3, betas: [0.9, 0.999], eps: 1e-8, weightDecay: 0, maxUnorm: 1.0 },
  // lr and momentum: what `needed` gives; upstream has no lr and refuses its own default of momentum.
  SGD: { lr: 0.05, momentum: 0.9, weightDecay: 0 },
  LARS: { lr: 0.05, momentum: 0.9, weightDecay: 0, maxUnorm: 0.02 },
  RMSprop: { lr: 1e-2, alpha: 0.99, eps: 1e-8, weightDecay: 0 },
  Adagrad: { lr: 1e-2, eps: 1e-10, weightDecay: 0 },
  Lion: { lr: 1e-4, betas: [0.9, 0.99], weightDecay: 0 },
};
const EVERYWHERE = { min8bitSize: 4096, maxUnorm: 0, skipZeros: false };

/** Accepted and ignored upstream: [option, its default, another value]. */
const WITHOUT_EFFECT: Readonly<Record<string, readonly (readonly [string, unknown, unknown])[]>> = {
  Adam: [["amsgrad", false, true]],
  AdamW: [["amsgrad", false, true]],
  LAMB: [
    ["amsgrad", false, true],
    ["biasCorrection", true, false],
    ["adamWMode", true, false],
  ],
  SGD: [
    ["dampening", 0, 0.1],
    ["nesterov", false, true],
  ],
  LARS: [
    ["dampening", 0, 0.1],
    ["nesterov", false, true],
  ],
  RMSprop: [
    ["momentum", 0, 0.9],
    ["centered", false, true],
  ],
  Adagrad: [
    ["lrDecay", 0, 0.1],
    ["initialAccumulatorValue", 0, 0.1],
  ],
};

let backend: GuardedBackend;
let p: Tensor<"f32">;
beforeAll(() => {
  backend = makeBackend("cpu");
  p = parameter(backend, [3, 2], 1);
});
afterAll(async () => {
  p.dispose();
  expectNothingLeft(backend);
  await backend.close();
});

/** The error's operand, after a check that the call throws one of these. */
function operandOf(call: () => unknown, kind: new (...args: never[]) => Error = ArgumentError): string {
  try {
    call();
  } catch (error) {
    expect(error).toBeInstanceOf(kind);
    return (error as ArgumentError).operand ?? "";
  }
  return expect.fail("nothing was thrown");
}

describe("classes", () => {
  test.each(CLASSES)("$name has upstream's defaults", ({ name, rule, bits }) => {
    const optimizer = new (classOf(name))([p], needed(rule));
    expect(optimizer).toBeInstanceOf(Optimizer);
    expect(optimizer.name).toBe(name);
    expect(optimizer.constructor.name).toBe(name);
    const { params, ...hyper } = optimizer.paramGroups[0]!;
    expect(params.length === 1 && params[0] === p).toBe(true);
    expect(hyper).toEqual({ ...EVERYWHERE, optimBits: bits === "8bit" ? 8 : 32, ...UPSTREAM[rule] });
    optimizer.dispose();
  });

  test.each(CLASSES)("$name takes what has no effect with its default only", ({ name, rule }) => {
    const make = classOf(name);
    for (const [option, value, other] of WITHOUT_EFFECT[rule] ?? []) {
      new make([p], { ...needed(rule), [option]: value }).dispose();
      expect(operandOf(() => new make([p], { ...needed(rule), [option]: other }))).toBe(option);
      expect(operandOf(() => new make([{ params: [p], [option]: other }], needed(rule)))).toBe(`params[0].${option}`);
    }
    expect(operandOf(() => new make([p], { ...needed(rule), learningRate: 1 }))).toBe("learningRate");
    expect(operandOf(() => new make([p], { ...needed(rule), args: {} }))).toBe("args");
  });

  test("bits and paging that a name fixes cannot be set", () => {
    new Adam8bit([p], { optimBits: 8 } as object).dispose();
    expect(operandOf(() => new Adam8bit([p], { optimBits: 32 } as object))).toBe("optimBits");
    expect(operandOf(() => new Adam([p], { optimBits: 16 as 8 }))).toBe("optimBits");
    expect(operandOf(() => new PagedAdam8bit([p], { isPaged: false } as object))).toBe("isPaged");
    new LAMB8bit([p], { maxUnorm: 0.5, isPaged: true }).dispose();
    // A group may: that is how embeddings are kept in 32 bits.
    const optimizer = new Adam8bit([{ params: p, optimBits: 32 }]);
    expect(optimizer.paramGroups[0]!.optimBits).toBe(32);
    optimizer.dispose();
  });

  test.each<[string, () => unknown]>([
    ["lr", () => new Adam([p], { lr: -1 })],
    ["lr", () => new Adam([p], { lr: 1e39 })],
    ["lr", () => new Adam([p], { lr: "1" as unknown as number })],
    ["lr", () => new SGD([p], { momentum: 0.9 } as never)],
    ["momentum", () => new SGD([p], { lr: 1 } as never)],
    ["momentum", () => new SGD([p], { lr: 1, momentum: 0 })],
    ["alpha", () => new RMSprop([p], { alpha: 0 })],
    ["betas", () => new Adam([p], { betas: [0.9, 1] })],
    ["betas", () => new Adam([p], { betas: [0.9, 1 - 1e-9] })],
    ["betas", () => new Adam([p], { betas: [0.9, 0.99, 0.999] as never })],
    ["betas", () => new (classOf("AdEMAMix"))([p], { betas: [0, 0.9, 0.99], tBeta3: 5 })],
    ["tAlpha", () => new (classOf("AdEMAMix"))([p], { tAlpha: 0 })],
    ["eps", () => new Adam([p], { eps: Number.NaN })],
    ["eps", () => new Lion([p], { eps: 1e-8 } as object)],
    ["weightDecay", () => new Adam([p], { weightDecay: -1e-3 })],
    ["min8bitSize", () => new Adam([p], { min8bitSize: 1.5 })],
    ["maxUnorm", () => new Adam([p], { maxUnorm: -1 })],
    ["skipZeros", () => new Adam([p], { skipZeros: 1 as unknown as boolean })],
    ["allowNonFinite", () => new Adam([p], { allowNonFinite: 1 as unknown as boolean })],
    ["skipNonFinite, allowNonFinite", () => new Adam([p], { skipNonFinite: true, allowNonFinite: true })],
    ["options", () => new Adam([p], null as never)],
    ["params", () => new Adam([])],
    ["params", () => new Adam(p as never)],
    ["params", () => new Adam(5 as never)],
    ["params", () => new Adam([p, { params: [p] }] as never)],
    ["params[0]", () => new Adam([["a", p, 1]] as never)],
    ["params[1]", () => new Adam([p, null] as never)],
    ["params[1].params", () => new Adam([{ params: [p] }, { params: 3 }] as never)],
    ["params[0].lr", () => new Adam([{ params: [p], lr: -1 }])],
    ["params[0].rate", () => new Adam([{ params: [p], rate: 1 } as never])],
  ])("a bad %s is named", (operand, call) => {
    expect(operandOf(call)).toBe(operand);
  });

  test("parameters are float tensors of one device, once each, with memory of their own", async () => {
    const codes = Tensor.allocate(backend, "u8", [4]);
    expect(operandOf(() => new Adam([p, codes]), DTypeError)).toBe("params[1]");
    codes.dispose();
    expect(() => new Adam([codes])).toThrow(DisposedError);
    expect(
      operandOf(
        () =>
          new Adam([
            ["a", p],
            ["b", p],
          ]),
      ),
    ).toBe("parameter 1 (b)");
    const view = p.slice(1, 3);
    expect(operandOf(() => new Adam([view, p]))).toBe("parameter 1");
    view.dispose();
    const [head, tail] = [p.slice(0, 1), p.slice(1, 3)];
    new Adam([head, tail]).dispose();
    head.dispose();
    tail.dispose();
    const other = makeBackend("cpu");
    const far = parameter(other, [2], 2);
    expect(operandOf(() => new Adam([p, far]), DeviceError)).toBe("params[1]");
    expect(operandOf(() => new Adam([{ params: [p] }, { params: [far] }]), DeviceError)).toBe("params[1].params[0]");
    far.dispose();
    await other.close();
  });

  test("groups", () => {
    const q = parameter(backend, [4], 2);
    const optimizer = new Adam([{ params: [["w", p]], lr: 0.1 }], { eps: 1e-6, weightDecay: undefined });
    // Tensors are compared by hand: the backend behind them is a large tree.
    const { params: _, ...first } = optimizer.paramGroups[0]!;
    expect(first).toMatchObject({ lr: 0.1, eps: 1e-6, weightDecay: 0, names: ["w"] });
    expect(operandOf(() => optimizer.addParamGroup({ params: p }))).toBe("parameter 1");
    expect(operandOf(() => optimizer.addParamGroup({ params: q, lr: Number.NaN }))).toBe("lr");
    expect(operandOf(() => optimizer.addParamGroup([q] as never))).toBe("group");
    expect(optimizer.paramGroups.length).toBe(1);
    optimizer.addParamGroup({ params: q, betas: [0.5, 0.6] });
    const { params: added, ...second } = optimizer.paramGroups[1]!;
    expect(second).toMatchObject({ lr: 1e-3, betas: [0.5, 0.6] });
    expect(added[0] === q).toBe(true);
    const group = optimizer.paramGroups[0]! as unknown as Record<string, unknown>;
    expect(() => {
      group.learningRate = 1;
    }).toThrow(TypeError);
    expect(() => {
      group.params = [q];
    }).toThrow(TypeError);
    optimizer.dispose();
    optimizer.dispose();
    expect(() => optimizer.step()).toThrow(DisposedError);
    expect(() => optimizer.stateDict()).toThrow(DisposedError);
    q.dispose();
  });
});
