import { expect, test, vi } from "vitest";
import { ArgumentError, BackendError, DisposedError, NonFiniteError } from "#halfbyte/core/errors.js";
import { liveTensors, Tensor } from "#halfbyte/core/tensor.js";
import {
  Adam,
  Adam8bit,
  clipGradNorm,
  type Optimizer,
  optimizerUpdate8bitBlockwise,
  optimizerUpdate32bit,
  PagedAdam8bit,
  SGD,
  tidy,
} from "#halfbyte/index.js";
import type { GuardedBackend } from "../helpers/backends.js";
import {
  type AnyOptions,
  bitsOf,
  CLASSES,
  classOf,
  dispose,
  disposeDict,
  dropGradients,
  numbers,
  onDevices,
  parameter,
  setGradients,
} from "./scene.js";

let backend: GuardedBackend;
const use = (made: GuardedBackend): void => {
  backend = made;
};

/** How often each kernel is launched while `body` runs. */
function launches(body: () => void): Record<string, number> {
  const counts: Record<string, number> = {};
  const spy = vi.spyOn(backend, "launch").mockImplementation(function (this: GuardedBackend, ...args) {
    counts[args[0]] = (counts[args[0]] ?? 0) + 1;
    return Object.getPrototypeOf(backend).launch.apply(backend, args);
  });
  try {
    body();
  } finally {
    spy.mockRestore();
  }
  return counts;
}

/** Runs `body` while launches of a kernel throw. */
function failing(kernel: string, body: () => void): void {
  const spy = vi.spyOn(backend, "launch").mockImplementation(function (this: GuardedBackend, ...args) {
    if (args[0] === kernel) throw new BackendError(backend.device, "boom");
    return Object.getPrototypeOf(backend).launch.apply(backend, args);
  });
  try {
    body();
  } finally {
    spy.mockRestore();
  }
}

/** Upstream's arguments for each rule, with odd values, and what the primitives take for them. */
const PRIMITIVE: Readonly<
  Record<string, { readonly name: string; readonly given: AnyOptions; readonly taken: AnyOptions }>
> = (() => {
  const pair = { betas: [0.8, 0.95], lr: 0.01, weightDecay: 0.1 };
  const beta = { beta1: 0.8, beta2: 0.95, lr: 0.01, weightDecay: 0.1 };
  const eps = { eps: 1e-5 };
  const triple = { alpha: 3, tAlpha: 4, tBeta3: 6 };
  return {
    Adam: { name: "adam", given: { ...pair, ...eps }, taken: { ...beta, ...eps } },
    AdamW: { name: "adamw", given: { ...pair, ...eps }, taken: { ...beta, ...eps } },
    AdEMAMix: {
      name: "ademamix",
      given: { ...pair, ...eps, ...triple, betas: [0.8, 0.95, 0.99] },
      taken: { ...beta, ...eps, ...triple, beta3: 0.99 },
    },
    LAMB: { name: "lamb", given: { ...pair, ...eps, maxUnorm: 0.5 }, taken: { ...beta, ...eps, maxUnorm: 0.5 } },
    SGD: {
      name: "momentum",
      given: { lr: 0.02, momentum: 0.7, weightDecay: 0.1 },
      taken: { lr: 0.02, beta1: 0.7, eps: 0, weightDecay: 0.1 },
    },
    LARS: {
      name: "lars",
      given: { lr: 0.02, momentum: 0.7, weightDecay: 0.1 },
      taken: { lr: 0.02, beta1: 0.7, eps: 0, weightDecay: 0.1, maxUnorm: 0.02 },
    },
    RMSprop: {
      name: "rmsprop",
      given: { lr: 0.02, alpha: 0.7, weightDecay: 0.1, ...eps },
      taken: { lr: 0.02, beta1: 0.7, weightDecay: 0.1, ...eps },
    },
    Adagrad: {
      name: "adagrad",
      given: { lr: 0.02, weightDecay: 0.1, ...eps },
      taken: { lr: 0.02, beta1: 0, weightDecay: 0.1, ...eps },
    },
    Lion: { name: "lion", given: pair, taken: { ...beta, eps: 0 } },
  };
})();

function zerosLike(shape: readonly number[], dtype: "f32" | "u8"): Tensor {
  return Tensor.allocate(backend, dtype, shape).copyFrom(
    dtype === "u8"
      ? new Uint8Array(shape.reduce((a, b) => a * b, 1))
      : new Float32Array(shape.reduce((a, b) => a * b, 1)),
  );
}

onDevices("step", use, () => {
  test.each(CLASSES)("$name does what the primitive does", ({ name, rule, bits }) => {
    const { name: primitive, given, taken } = PRIMITIVE[rule]!;
    const n = 4500;
    const p = parameter(backend, [50, 90], 7);
    const expected = p.clone();
    const optimizer = new (classOf(name))([p], given);
    const two = ["Adam", "AdamW", "AdEMAMix", "LAMB"].includes(rule);
    const mix = rule === "AdEMAMix" ? [2] : [];
    const dtype = bits === "8bit" ? "u8" : "f32";
    const state1 = zerosLike([...mix, n], dtype);
    const state2 = two ? zerosLike([n], dtype) : null;
    const absmax1 = zerosLike([...mix, 18], "f32");
    const absmax2 = two ? zerosLike([18], "f32") : null;
    for (let step = 1; step <= 4; step++) {
      setGradients([p], step);
      const options = { ...(taken as unknown as Parameters<typeof optimizerUpdate32bit>[5]), step };
      const args = [primitive as "adam", p.grad!, expected, state1, state2] as const;
      if (dtype === "u8") optimizerUpdate8bitBlockwise(...args, absmax1, absmax2, options);
      else optimizerUpdate32bit(...args, options);
      optimizer.step();
    }
    expect(bitsOf([p])).toEqual(bitsOf([expected]));
    const dict = optimizer.stateDict();
    expect(dict.state[0]!.step).toBe(4);
    expect(bitsOf([dict.state[0]!.state1!])).toEqual(bitsOf([state1]));
    if (state2) expect(bitsOf([dict.state[0]!.state2!])).toEqual(bitsOf([state2]));
    const start = numbers(n, 7);
    expect(p.dataSync().filter((x, i) => x !== start[i]).length).toBeGreaterThan(n / 2);
    disposeDict(dict);
    optimizer.dispose();
    dropGradients([p]);
    dispose([p, expected, state1, absmax1], state2 ? [state2, absmax2!] : []);
  });

  test("272 tensors take as many launches as there are kinds", () => {
    const params = Array.from({ length: 272 }, (_, i) => parameter(backend, [i % 3 === 0 ? 64 : 4100], i));
    const optimizer = new Adam8bit(params);
    setGradients(params, 1);
    const first = launches(() => optimizer.step());
    expect(first).toMatchObject({ optimizerUpdate8bitBlockwise: 1, optimizerUpdate32bit: 1, gradientCheck: 2 });
    expect(first.gradientVerdict).toBe(1);
    setGradients(params, 2);
    const second = launches(() => optimizer.step());
    expect(second.fill ?? 0).toBe(0);
    expect(second).toMatchObject({ optimizerUpdate8bitBlockwise: 1, optimizerUpdate32bit: 1 });
    optimizer.dispose();
    dropGradients(params);
    dispose(params);
  });

  test("groups, dtypes, gradient dtypes, bits and step numbers are launches of their own", () => {
    const params = [
      parameter(backend, [5000], 1),
      parameter(backend, [5000], 2),
      parameter(backend, [5000], 3, "bf16"),
      parameter(backend, [100], 4),
      parameter(backend, [5000], 5),
    ];
    const optimizer = new Adam8bit([{ params: params.slice(0, 4) }, { params: params[4]!, lr: 0.5 }]);
    setGradients(params, 1);
    expect(launches(() => optimizer.step()).optimizerUpdate8bitBlockwise).toBe(3);
    params[1]!.grad!.dispose();
    params[1]!.grad = null;
    const before = bitsOf([params[1]!]);
    expect(launches(() => optimizer.step()).optimizerUpdate8bitBlockwise).toBe(3);
    expect(bitsOf([params[1]!])).toEqual(before);
    setGradients(params, 3);
    params[0]!.grad!.dispose();
    params[0]!.grad = Tensor.allocate(backend, "bf16", [5000]).copyFrom(numbers(5000, 9));
    // 0 (f32, bf16 gradient), 1 (a step behind), 2 (bf16), 4 (group).
    const counts = launches(() => optimizer.step());
    expect(counts).toMatchObject({ optimizerUpdate8bitBlockwise: 4, optimizerUpdate32bit: 1, gradientVerdict: 1 });
    const dict = optimizer.stateDict();
    expect([0, 1, 2, 3, 4].map((i) => dict.state[i]!.step)).toEqual([3, 2, 3, 3, 3]);
    expect(dict.state[3]!.state1!.dtype).toBe("f32");
    disposeDict(dict);
    optimizer.dispose();
    dropGradients(params);
    dispose(params);
  });

  test("together is the same as alone", () => {
    const sizes = [4096, 5000, 257, 1, 0, 12_345];
    const make = () => sizes.map((n, i) => parameter(backend, [n], i));
    const [together, alone] = [make(), make()];
    const one = new Adam8bit(together, { lr: 0.1, weightDecay: 0.01 });
    const many = alone.map((p) => new Adam8bit([p], { lr: 0.1, weightDecay: 0.01 }));
    for (let step = 1; step <= 3; step++) {
      setGradients(together, step);
      setGradients(alone, step);
      one.step();
      for (const optimizer of many) optimizer.step();
    }
    expect(bitsOf(together)).toEqual(bitsOf(alone));
    dispose([one], many);
    dropGradients([...together, ...alone]);
    dispose(together, alone);
  });

  test("hyper-parameters set between steps count, and are checked", () => {
    const [p, q] = [parameter(backend, [10], 1), parameter(backend, [10], 1)];
    const options = { momentum: 0.5 };
    const optimizer = new SGD([p], { lr: 1, ...options });
    const other = new SGD([q], { lr: 0.25, ...options });
    setGradients([p], 1);
    setGradients([q], 1);
    const before = bitsOf([p]);
    optimizer.paramGroups[0]!.lr = -1;
    expect(() => optimizer.step()).toThrow("paramGroups[0].lr");
    optimizer.paramGroups[0]!.lr = 0.25;
    optimizer.paramGroups[0]!.momentum = 1;
    expect(() => optimizer.step()).toThrow("momentum");
    optimizer.paramGroups[0]!.momentum = 0.5;
    expect(bitsOf([p])).toEqual(before);
    expect(optimizer.stateBytes).toBe(0);
    optimizer.step();
    other.step();
    expect(bitsOf([p])).toEqual(bitsOf([q]));
    dispose([optimizer, other]);
    dropGradients([p, q]);
    dispose([p, q]);
  });

  test("an error leaves parameters and states as they are", () => {
    const params = [parameter(backend, [4096], 1), parameter(backend, [20], 2)];
    const optimizer = new Adam8bit(params);
    expect(() => optimizer.step()).toThrow(ArgumentError);
    setGradients(params, 1);
    const before = bitsOf(params);
    const live = liveTensors(backend);
    params[1]!.grad!.dispose();
    expect(() => optimizer.step()).toThrow(DisposedError);
    // A gradient that lies in another parameter.
    params[1]!.grad = null;
    const inside = params[0]!.slice(0, 20);
    params[1]!.grad = inside;
    expect(() => optimizer.step()).toThrow("a view of parameter 0");
    params[1]!.grad = null;
    inside.dispose();
    expect(liveTensors(backend)).toBe(live - 1);
    const allocate = vi
      .spyOn(backend, "allocate")
      .mockImplementationOnce((bytes) => Object.getPrototypeOf(backend).allocate.call(backend, bytes));
    allocate.mockImplementationOnce(() => {
      throw new Error("no memory");
    });
    expect(() => optimizer.step()).toThrow("no memory");
    allocate.mockRestore();
    expect(optimizer.stateBytes).toBe(0);
    expect(bitsOf(params)).toEqual(before);
    optimizer.step();
    expect(bitsOf(params)[0]).not.toBe(before[0]);
    optimizer.dispose();
    dropGradients(params);
    dispose(params);
  });

  test.each([false, true])(
    "a backend that fails in an update: states of what moved stay (allowNonFinite: %s)",
    (allowNonFinite) => {
      const [params, expected] = [0, 1].map(() => [parameter(backend, [300], 1), parameter(backend, [5000], 2)]);
      const optimizer = new Adam8bit(params!, { allowNonFinite });
      const reference = new Adam8bit(expected!);
      const first = (each: Optimizer): string[] => {
        const dict = each.stateDict();
        const { state1, state2 } = dict.state[0]!;
        const bits = bitsOf([each.paramGroups[0]!.params[0]!, state1!, state2!]);
        disposeDict(dict);
        return bits;
      };
      setGradients(params!, 1);
      setGradients(expected!, 1);
      reference.step();
      failing("optimizerUpdate8bitBlockwise", () => {
        expect(() => optimizer.step()).toThrow(BackendError);
      });
      expect(first(optimizer)).toEqual(first(reference));
      const moved = first(optimizer)[1];
      optimizer.step();
      // The second step goes on from them.
      expect(first(optimizer)[1]).not.toBe(moved);
      dispose([optimizer, reference]);
      dropGradients([...params!, ...expected!]);
      dispose(params!, expected!);
    },
  );

  test("an update that fails is no step, and none that was skipped", async () => {
    const p = parameter(backend, [5000], 1);
    const optimizer = new Adam8bit([p], { skipNonFinite: true });
    setGradients([p], 1);
    optimizer.step();
    p.grad!.copyFrom(new Float32Array(5000).fill(Number.NaN));
    failing("optimizerUpdate8bitBlockwise", () => {
      expect(() => optimizer.step()).toThrow(BackendError);
    });
    expect(await optimizer.skippedSteps()).toBe(0);
    optimizer.step();
    expect(await optimizer.skippedSteps()).toBe(1);
    const dict = optimizer.stateDict();
    expect(dict.state[0]!.step).toBe(1);
    disposeDict(dict);
    optimizer.dispose();
    dropGradients([p]);
    p.dispose();
  });

  test("an optimizer made in tidy leaves with its parameters and gradients", () => {
    const live = liveTensors(backend);
    const optimizer = tidy(() => {
      const p = parameter(backend, [10], 1);
      setGradients([p], 1);
      return new Adam([p]);
    });
    const [p] = optimizer.paramGroups[0]!.params;
    optimizer.step();
    expect(new Set(optimizer.tensors()).size).toBe(4);
    dropGradients([p!]);
    dispose([optimizer, p!]);
    expect(liveTensors(backend)).toBe(live);
  });

  test("states outlive tidy, and nothing leaks", () => {
    const live = liveTensors(backend);
    const params = [parameter(backend, [8192], 1), parameter(backend, [8], 2)];
    const optimizer = new Adam8bit(params);
    for (let step = 1; step <= 3; step++) {
      tidy(() => {
        for (const [i, p] of params.entries()) {
          p.grad = Tensor.allocate(backend, "f32", p.shape).copyFrom(numbers(p.size, step + i));
        }
        optimizer.step();
        optimizer.zeroGrad();
      });
    }
    expect(params.every((p) => p.grad === null)).toBe(true);
    // 8-bit: two bytes and two scales per 256; 32-bit: 8 bytes.
    expect(optimizer.stateBytes).toBe(8192 * 2 + (8192 / 256) * 8 + 8 * 8);
    const dict = optimizer.stateDict();
    expect(dict.state[0]!.step).toBe(3);
    disposeDict(dict);
    optimizer.dispose();
    dispose(params);
    expect(liveTensors(backend)).toBe(live);
  });

  test("zeroGrad", () => {
    const p = parameter(backend, [5], 1);
    const optimizer = new Adam([p]);
    setGradients([p], 1);
    const g = p.grad!;
    optimizer.zeroGrad(false);
    expect([...(g.dataSync() as Float32Array)]).toEqual([0, 0, 0, 0, 0]);
    optimizer.zeroGrad(true, false);
    expect([p.grad === null, g.isDisposed]).toEqual([true, false]);
    p.grad = g;
    optimizer.zeroGrad();
    expect([p.grad === null, g.isDisposed]).toEqual([true, true]);
    optimizer.dispose();
    p.dispose();
  });

  test("large states of a paged optimizer are asked for as paged, and brought in before their launch", () => {
    const params = [parameter(backend, [100_000], 1), parameter(backend, [5000], 2)];
    const optimizer = new PagedAdam8bit(params);
    setGradients(params, 1);
    const allocate = vi.spyOn(backend, "allocate");
    const prefetch = vi.spyOn(backend, "prefetch");
    optimizer.step();
    expect(allocate.mock.calls.filter(([, paged]) => paged).map(([bytes]) => bytes)).toEqual([100_000, 100_000]);
    expect(prefetch.mock.calls.map(([storages]) => storages.map(({ bytes }) => bytes))).toEqual([[100_000, 100_000]]);
    allocate.mockRestore();
    prefetch.mockRestore();
    optimizer.dispose();
    dropGradients(params);
    dispose(params);
  });
});

onDevices("non-finite gradients", use, () => {
  const poison = (p: Tensor): void => {
    const values = numbers(p.size, 5);
    values[p.size - 1] = Number.NaN;
    p.grad?.dispose();
    p.grad = Tensor.allocate(p.backend, "f32", p.shape).copyFrom(values);
  };
  const pair = () => [parameter(backend, [5000], 1), parameter(backend, [30], 2)] as const;
  const stepOn = (optimizer: Optimizer, params: readonly Tensor[], step: number): void => {
    setGradients(params, step);
    optimizer.step();
  };

  test("are an error of the next read; nothing is changed or counted", async () => {
    const params = pair();
    const optimizer = new Adam8bit(params);
    stepOn(optimizer, params, 1);
    const before = bitsOf(params);
    setGradients(params, 2);
    poison(params[1]);
    optimizer.step();
    const error = await params[0].data().then(
      () => expect.fail("nothing was thrown"),
      (reason: unknown) => reason as NonFiniteError,
    );
    expect(error).toBeInstanceOf(NonFiniteError);
    expect(error).toMatchObject({ op: "Adam8bit.step", operand: "grad", unit: "parameter", index: 1 });
    expect(bitsOf(params)).toEqual(before);
    expect(await optimizer.skippedSteps()).toBe(1);
    const dict = optimizer.stateDict();
    expect(dict.state[0]!.step).toBe(1);
    disposeDict(dict);
    optimizer.dispose();
    dropGradients(params);
    dispose(params);
  });

  test.each([false, true])("skipped steps count for nothing (waited for between steps: %s)", async (wait) => {
    const [params, expected] = [pair(), pair()];
    const optimizer = new Adam8bit(params, { skipNonFinite: true, lr: 0.1 });
    const reference = new Adam8bit(expected, { lr: 0.1 });
    const bad = new Set([0, 1, 4, 5, 6, 9]);
    for (let i = 0; i < 12; i++) {
      setGradients(params, i);
      if (bad.has(i)) poison(params[i % 2]!);
      else stepOn(reference, expected, i);
      optimizer.step();
      if (wait) await backend.synchronize();
    }
    expect(await optimizer.skippedSteps()).toBe(bad.size);
    expect(bitsOf(params)).toEqual(bitsOf(expected));
    const [dict, other] = [optimizer.stateDict(), reference.stateDict()];
    expect(dict.state[0]!.step).toBe(6);
    expect(bitsOf([dict.state[0]!.state1!, dict.state[0]!.absmax2!])).toEqual(
      bitsOf([other.state[0]!.state1!, other.state[0]!.absmax2!]),
    );
    disposeDict(dict);
    disposeDict(other);
    dispose([optimizer, reference]);
    dropGradients([...params, ...expected]);
    dispose(params, expected);
  });

  test("a parameter that sat out keeps its own count", () => {
    const [params, expected] = [pair(), pair()];
    const optimizer = new Adam8bit(params, { skipNonFinite: true, lr: 0.1 });
    const reference = new Adam8bit(expected, { lr: 0.1 });
    // [parameters with a gradient, whether one of them is bad]
    const plan: [number[], boolean][] = [
      [[0, 1], false],
      [[0], true],
      [[0, 1], false],
      [[1], false],
      [[1], true],
      [[0], false],
      [[0, 1], false],
    ];
    for (const [i, [who, bad]] of plan.entries()) {
      setGradients(params, i);
      setGradients(expected, i);
      for (const k of [0, 1]) {
        if (who.includes(k)) continue;
        dropGradients([params[k]!, expected[k]!]);
      }
      if (bad) poison(params[who[0]!]!);
      else reference.step();
      optimizer.step();
    }
    expect(bitsOf(params)).toEqual(bitsOf(expected));
    const dict = optimizer.stateDict();
    expect([dict.state[0]!.step, dict.state[1]!.step]).toEqual([4, 4]);
    disposeDict(dict);
    dispose([optimizer, reference]);
    dropGradients([...params, ...expected]);
    dispose(params, expected);
  });

  test("spread with allowNonFinite, which launches no check", async () => {
    const params = pair();
    const optimizer = new Adam(params, { allowNonFinite: true });
    setGradients(params, 1);
    poison(params[1]);
    const counts = launches(() => optimizer.step());
    expect(counts).toEqual({ fill: expect.any(Number), optimizerUpdate32bit: 1 });
    expect(await optimizer.skippedSteps()).toBe(0);
    const values = await params[1].data();
    expect(values[29]).toBeNaN();
    expect(values[28]).not.toBeNaN();
    optimizer.dispose();
    dropGradients(params);
    dispose(params);
  });
});

onDevices("clipGradNorm", use, () => {
  test("takes parameters and scales their gradients", () => {
    const params = [parameter(backend, [3], 1), parameter(backend, [2], 2), parameter(backend, [1], 3)];
    params[0]!.grad = Tensor.allocate(backend, "f32", [3]).copyFrom([3, 0, 0]);
    params[2]!.grad = Tensor.allocate(backend, "f32", [1]).copyFrom([4]);
    const before = bitsOf(params);
    const norm = clipGradNorm(params, 1);
    expect(norm.dataSync()[0]).toBe(5);
    expect((params[0]!.grad!.dataSync() as Float32Array)[0]).toBeCloseTo(0.6, 5);
    expect(bitsOf(params)).toEqual(before);
    const none = clipGradNorm(params[1]!, 1);
    expect(none.dataSync()[0]).toBe(0);
    expect(none.backend === backend).toBe(true);
    expect(() => clipGradNorm([3] as never, 1)).toThrow("parameters[0]");
    dropGradients(params);
    dispose(params, [norm, none]);
  });

  test("errors name parameters, by number and name", async () => {
    const params = [parameter(backend, [3], 1), parameter(backend, [2], 2), parameter(backend, [2], 3)];
    setGradients(params, 1);
    dropGradients([params[0]!]);
    const bad = params[2]!.grad!.copyFrom([1, Number.NaN]);
    const norm = clipGradNorm(params, 1, { errorIfNonfinite: true });
    await expect(norm.data()).rejects.toMatchObject({ op: "clipGradNorm", unit: "parameter", index: 2 });
    await expect(norm.data()).resolves.toHaveLength(1);
    const named = params.map((p, i) => [`layer${i}`, p] as const);
    const shared = params[1]!.grad!;
    params[2]!.grad = shared;
    expect(() => clipGradNorm(named, 1)).toThrow("gradient of parameter 2 (layer2)");
    expect(() => clipGradNorm(named, 1)).toThrow("gradient of parameter 1 (layer1)");
    params[2]!.grad = bad;
    bad.dispose();
    expect(() => clipGradNorm(named, 1)).toThrow("gradient of parameter 2 (layer2)");
    params[2]!.grad = null;
    dropGradients(params);
    dispose(params, [norm]);
  });
});
