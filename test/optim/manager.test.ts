import { setFlagsFromString } from "node:v8";
import { runInNewContext } from "node:vm";
import { afterAll, afterEach, beforeAll, describe, expect, test } from "vitest";
import { ArgumentError, DeviceError, DisposedError, DTypeError, ShapeError } from "#halfbyte/core/errors.js";
import { Tensor } from "#halfbyte/core/tensor.js";
import { Adam8bit, GlobalOptimManager, SGD } from "#halfbyte/index.js";
import { expectNothingLeft, type GuardedBackend, makeBackend } from "../helpers/backends.js";
import { bitsOf, dispose, dropGradients, parameter, setGradients } from "./scene.js";

setFlagsFromString("--expose-gc");
const collect = runInNewContext("gc") as () => void;

let backend: GuardedBackend;
const manager = GlobalOptimManager.getInstance();
beforeAll(() => {
  backend = makeBackend("cpu");
});
afterEach(() => {
  manager.initialize();
});
afterAll(async () => {
  await backend.synchronize();
  expectNothingLeft(backend);
  await backend.close();
});

describe("GlobalOptimManager", () => {
  const make = () => [parameter(backend, [5000], 1), parameter(backend, [5000], 2), parameter(backend, [5000], 3)];

  test("keeps embeddings in 32 bits, by parameter and by module", () => {
    expect(GlobalOptimManager.getInstance() === manager).toBe(true);
    const params = make();
    manager.registerParameters(params);
    manager.overrideConfig(params[0]!, "optimBits", 32);
    manager.registerModuleOverride({ weight: params[1] }, "weight", { optimBits: 32, lr: 0.5 });
    const optimizer = new Adam8bit(params);
    setGradients(params, 1);
    optimizer.step();
    expect(optimizer.stateBytes).toBe(5000 * 16 + 5000 * 2 + 20 * 8);
    dropGradients(params);
    dispose([optimizer], params);
  });

  test("an override counts for its parameter alone, also when it is set between steps", () => {
    const [params, expected] = [make(), make()];
    const options = { lr: 0.1, momentum: 0.5 };
    const optimizer = new SGD(params, options);
    const others = expected.map((p) => new SGD([p], options));
    for (let step = 1; step <= 3; step++) {
      setGradients(params, step);
      setGradients(expected, step);
      if (step === 2) {
        manager.overrideConfig([params[0]!, ["b", params[2]!]], { lr: 0.7, momentum: 0.25 });
        for (const i of [0, 2]) Object.assign(others[i]!.paramGroups[0]!, { lr: 0.7, momentum: 0.25 });
      }
      if (step === 3) {
        manager.overrideConfig(params[0]!, "lr", 0.9);
        others[0]!.paramGroups[0]!.lr = 0.9;
        // The group changes below an override.
        optimizer.paramGroups[0]!.weightDecay = 0.01;
        for (const other of others) other.paramGroups[0]!.weightDecay = 0.01;
      }
      optimizer.step();
      for (const other of others) other.step();
    }
    expect(bitsOf(params)).toEqual(bitsOf(expected));
    dropGradients([...params, ...expected]);
    dispose([optimizer], others, params, expected);
  });

  test("a module override reaches a parameter that is added later, and one that the module gets later", () => {
    const params = make();
    const module: { weight: Tensor | null; bias: Tensor | null } = { weight: params[1]!, bias: params[0]! };
    manager.registerModuleOverride(module, "weight", { optimBits: 32 });
    manager.registerModuleOverride(module, "bias", { optimBits: 32 });
    // What is no parameter any more is of no interest, to this optimizer or another.
    module.bias = null;
    const optimizer = new Adam8bit([params[0]!]);
    setGradients(params, 1);
    optimizer.step();
    optimizer.addParamGroup({ params: params[1]! });
    optimizer.addParamGroup({ params: params[2]! });
    dropGradients([params[2]!]);
    optimizer.step();
    expect(optimizer.stateBytes).toBe(5000 * 2 + 20 * 8 + 5000 * 8);
    module.bias = params[2]!;
    setGradients(params, 2);
    optimizer.step();
    expect(optimizer.stateBytes).toBe(5000 * 2 + 20 * 8 + 2 * 5000 * 8);
    // Resolved once: what comes later stays, also for one that has no states elsewhere yet.
    manager.overrideConfig(params[2]!, "optimBits", 8);
    const other = new Adam8bit([params[2]!]);
    other.step();
    expect(other.stateBytes).toBe(5000 * 2 + 20 * 8);
    dropGradients(params);
    dispose([optimizer, other], params);
  });

  test("a module is not kept from the collector; one made for the call stays with its parameter", async () => {
    const params = make();
    let module: object | undefined = { weight: null };
    const gone = new WeakRef(module);
    manager.registerModuleOverride(module, "weight", { lr: 0.5 });
    manager.registerModuleOverride({ weight: params[0] }, "weight", { optimBits: 32 });
    module = undefined;
    for (let i = 0; i < 20 && gone.deref(); i++) {
      await new Promise((resolve) => setTimeout(resolve, 5));
      collect();
    }
    expect(gone.deref()).toBe(undefined);
    const optimizer = new Adam8bit(params.slice(0, 1));
    setGradients(params, 1);
    optimizer.step();
    expect(optimizer.stateBytes).toBe(5000 * 8);
    dropGradients(params);
    dispose([optimizer], params);
  });

  test("an override's arrays are its own", () => {
    const [params, expected] = [make(), make()];
    const betas = [0.5, 0.75];
    manager.overrideConfig(params[0]!, "betas", betas);
    const optimizer = new Adam8bit(params);
    const reference = new Adam8bit([{ params: expected[0]!, betas: [0.5, 0.75] }, { params: expected.slice(1) }]);
    for (let step = 1; step <= 2; step++) {
      setGradients(params, step);
      setGradients(expected, step);
      optimizer.step();
      reference.step();
      betas[1] = 7;
    }
    expect(bitsOf(params)).toEqual(bitsOf(expected));
    dropGradients([...params, ...expected]);
    dispose([optimizer, reference], params, expected);
  });

  test("a learning rate that was set before a rejected step counts for overridden parameters too", () => {
    const [params, expected] = [make(), make()];
    manager.overrideConfig([params[0]!, expected[0]!], "weightDecay", 0.5);
    const groups = (list: Tensor[]) => [{ params: list.slice(0, 2) }, { params: list[2]! }];
    const [optimizer, reference] = [params, expected].map(
      (list) => new SGD(groups(list), { lr: 0.001, momentum: 0.5 }),
    ) as [SGD, SGD];
    for (const [o, list] of [[optimizer, params] as const, [reference, expected] as const]) {
      setGradients(list, 1);
      o.step();
      o.paramGroups[0]!.lr = 0.5;
    }
    optimizer.paramGroups[1]!.lr = -1;
    expect(() => optimizer.step()).toThrow("paramGroups[1].lr");
    optimizer.paramGroups[1]!.lr = 0.001;
    optimizer.step();
    reference.step();
    expect(bitsOf(params)).toEqual(bitsOf(expected));
    dropGradients([...params, ...expected]);
    dispose([optimizer, reference], params, expected);
  });

  test("bad overrides", () => {
    const params = make();
    const operandOf = (call: () => void): string => {
      try {
        call();
      } catch (error) {
        expect(error).toBeInstanceOf(ArgumentError);
        return (error as ArgumentError).operand;
      }
      return expect.fail("nothing was thrown");
    };
    expect(operandOf(() => manager.overrideConfig(params, "bits" as "lr", 32))).toBe("key");
    expect(operandOf(() => manager.overrideConfig(params, "optimBits", 16 as 8))).toBe("optimBits");
    expect(operandOf(() => manager.overrideConfig(params, null as never))).toBe("config");
    expect(operandOf(() => manager.overrideConfig([params[0]!, 3] as never, "lr", 1))).toBe("params[1]");
    expect(operandOf(() => manager.registerParameters([3] as never))).toBe("params[0]");
    expect(operandOf(() => manager.registerParameters([params[0], null] as never))).toBe("params[1]");
    expect(operandOf(() => manager.registerParameters([{ params: [params[0], 1] }] as never))).toBe(
      "params[0].params[1]",
    );
    expect(operandOf(() => manager.registerParameters([{ params: null }] as never))).toBe("params[0].params");
    for (const bad of [5, null, undefined, "weight", {}, params[0]]) {
      expect(operandOf(() => manager.registerParameters(bad as never))).toBe("params");
    }
    expect(operandOf(() => manager.registerModuleOverride({}, "weight", { lr: 1 }))).toBe("name");
    expect(operandOf(() => manager.registerModuleOverride(null as never, "weight", { lr: 1 }))).toBe("module");
    manager.overrideConfig(params[1]!, "betas", [0.5, 0.5]);
    const optimizer = new SGD(
      [
        ["a", params[0]!],
        ["b", params[1]!],
      ],
      { lr: 1, momentum: 0.5 },
    );
    setGradients(params, 1);
    const before = bitsOf(params);
    expect(operandOf(() => optimizer.step())).toBe("override of parameter 1 (b): betas");
    expect(bitsOf(params)).toEqual(before);
    manager.initialize();
    optimizer.step();
    dropGradients(params);
    dispose([optimizer], params);
  });
});

describe("Tensor.grad", () => {
  test("is checked when it is set", async () => {
    const p = parameter(backend, [2, 3], 1);
    const half = parameter(backend, [2, 3], 1, "f16");
    const g = parameter(backend, [2, 3], 2);
    const flat = parameter(backend, [6], 2);
    const bf16 = parameter(backend, [2, 3], 2, "bf16");
    const codes = Tensor.allocate(backend, "u8", [2, 3]);
    expect(p.grad === null).toBe(true);
    p.grad = g;
    p.grad = bf16;
    half.grad = g;
    expect(half.grad === g).toBe(true);
    const set = (tensor: Tensor, value: unknown) => () => {
      tensor.grad = value as Tensor;
    };
    expect(set(half, bf16)).toThrow(DTypeError);
    expect(set(p, codes)).toThrow(DTypeError);
    expect(set(codes, g)).toThrow(DTypeError);
    expect(set(p, flat)).toThrow(ShapeError);
    expect(set(p, undefined)).toThrow(ArgumentError);
    expect(set(p, [1])).toThrow(ArgumentError);
    expect(set(p, p)).toThrow(ArgumentError);
    const other = makeBackend("cpu");
    const far = parameter(other, [2, 3], 2);
    expect(set(p, far)).toThrow(DeviceError);
    far.dispose();
    expect(set(p, far)).toThrow(DisposedError);
    await other.close();
    expect(p.grad === bf16).toBe(true);
    p.dispose();
    expect(bf16.isDisposed).toBe(false);
    expect(set(p, g)).toThrow(DisposedError);
    p.grad = null;
    dispose([half, g, flat, bf16, codes]);
  });
});
