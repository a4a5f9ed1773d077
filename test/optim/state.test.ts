import { mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, expect, test } from "vitest";
import { ArgumentError, DisposedError, DTypeError, FormatError, ShapeError } from "#halfbyte/core/errors.js";
import { liveTensors, Tensor } from "#halfbyte/core/tensor.js";
import {
  Adam,
  Adam8bit,
  Adam32bit,
  AdamW,
  createDynamicMap,
  GlobalOptimManager,
  type Optimizer,
  type OptimizerStateDict,
  PagedAdam8bit,
  SafetensorsFile,
  SafetensorsWriter,
} from "#halfbyte/index.js";
import { expectNothingLeft, type GuardedBackend, makeBackend } from "../helpers/backends.js";
import {
  type AnyOptions,
  bitsOf,
  CLASSES,
  classOf,
  dispose,
  disposeDict,
  dropGradients,
  needed,
  numbers,
  onDevices,
  parameter,
  setGradients,
} from "./scene.js";

let backend: GuardedBackend;
const folder = mkdtempSync(join(tmpdir(), "halfbyte-optim-"));
const at = (name: string): string => join(folder, name);
const use = (made: GuardedBackend): void => {
  backend = made;
};
afterAll(() => rmSync(folder, { recursive: true }));

const make = () => [
  parameter(backend, [50, 90], 1),
  parameter(backend, [300], 2),
  parameter(backend, [4096], 3, "bf16"),
];

/** Mutable, for tests that spoil a dict. */
type Loose = {
  optimizer: unknown;
  state: Record<string, Record<string, unknown>>;
  paramGroups: Record<string, unknown>[];
};

async function nothingChanged(
  optimizer: { stateBytes: number },
  params: Tensor[],
  body: () => unknown,
): Promise<unknown> {
  const before = [bitsOf(params), liveTensors(backend), optimizer.stateBytes];
  let error: unknown;
  try {
    await body();
  } catch (reason) {
    error = reason;
  }
  expect([bitsOf(params), liveTensors(backend), optimizer.stateBytes]).toEqual(before);
  return error ?? expect.fail("nothing was thrown");
}

onDevices("resuming", use, () => {
  test.each(CLASSES)("$name goes on bit for bit, from a dict and from a file", async ({ name, rule }) => {
    const options: AnyOptions = {
      ...needed(rule),
      weightDecay: 0.02,
      ...(rule === "AdEMAMix" && { tAlpha: 5, tBeta3: 7 }),
    };
    const [params, fromDict, fromFile] = [make(), make(), make()];
    const optimizer = new (classOf(name))([{ params: params.slice(0, 2) }, { params: params[2], lr: 0.03 }], options);
    for (let step = 1; step <= 3; step++) {
      setGradients(params, step);
      // The second parameter begins a step later.
      if (step === 1) dropGradients([params[1]!]);
      optimizer.step();
    }
    optimizer.paramGroups[0]!.lr = 0.015;
    const dict = optimizer.stateDict();
    const path = at(`${name}.safetensors`);
    await optimizer.save(path);
    const others = [fromDict, fromFile].map((copy) => {
      copy.forEach((p, i) => {
        p.copyFrom(params[i]!);
      });
      return new (classOf(name))([{ params: copy.slice(0, 2) }, { params: copy[2] }], needed(rule));
    });
    others[0]!.loadStateDict(dict);
    await others[1]!.load(path);
    disposeDict(dict);
    for (const other of others) {
      const groups = other.paramGroups.map(({ params: _, ...hyper }) => hyper);
      expect(groups).toEqual(optimizer.paramGroups.map(({ params: _, ...hyper }) => hyper));
      expect(other.stateBytes).toBe(optimizer.stateBytes);
    }
    for (let step = 4; step <= 6; step++) {
      for (const [o, p] of [
        [optimizer, params] as const,
        [others[0]!, fromDict] as const,
        [others[1]!, fromFile] as const,
      ]) {
        setGradients(p, step);
        o.step();
      }
    }
    expect(bitsOf(fromDict)).toEqual(bitsOf(params));
    expect(bitsOf(fromFile)).toEqual(bitsOf(params));
    dropGradients([...params, ...fromDict, ...fromFile]);
    dispose([optimizer], others, params, fromDict, fromFile);
  });

  test("a paged optimizer takes the state of one that is not, and one of another backend", async () => {
    const params = make();
    const optimizer = new Adam8bit(params);
    setGradients(params, 1);
    optimizer.step();
    const other = makeBackend("cpu");
    const copies = params.map((p) => Tensor.allocate(other, p.dtype, p.shape).copyFrom(p));
    const resumed = new PagedAdam8bit(copies);
    const dict = optimizer.stateDict();
    resumed.loadStateDict(dict);
    setGradients(params, 2);
    setGradients(copies, 2);
    optimizer.step();
    resumed.step();
    expect(bitsOf(copies)).toEqual(bitsOf(params));
    disposeDict(dict);
    dropGradients([...params, ...copies]);
    dispose([optimizer, resumed], params, copies);
    expectNothingLeft(other);
    await other.close();
  });

  test("an optimizer's own dict, and a dict in which a parameter has no state", () => {
    const params = make();
    const optimizer = new Adam8bit(params);
    setGradients(params, 1);
    optimizer.step();
    const dict = optimizer.stateDict();
    expect(Object.keys(dict.state)).toEqual(["0", "1", "2"]);
    expect(Object.keys(dict.state[0]!)).toEqual(["step", "state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2"]);
    expect(Object.keys(dict.state[1]!)).toEqual(["step", "state1", "state2"]);
    expect(dict.state[0]!.state1!.shape).toEqual([50, 90]);
    expect(dict.state[0]!.qmap2!.dataSync()).toEqual(createDynamicMap(false));
    const before = bitsOf([dict.state[0]!.state1!]);
    optimizer.loadStateDict(dict);
    const again = optimizer.stateDict();
    expect(bitsOf([again.state[0]!.state1!])).toEqual(before);
    const { 0: _, ...rest } = again.state;
    optimizer.loadStateDict({ ...again, state: rest });
    disposeDict(dict);
    disposeDict(again);
    const less = optimizer.stateDict();
    expect(Object.keys(less.state)).toEqual(["1", "2"]);
    disposeDict(less);
    dropGradients(params);
    dispose([optimizer], params);
  });
});

onDevices("states that differ from what the options say", use, () => {
  const manager = GlobalOptimManager.getInstance();
  const twins = () => [parameter(backend, [5000], 1), parameter(backend, [5000], 2)];

  /** Saves, loads into what `fresh` makes, by file and by dict, and goes on with all. */
  async function goesOn(optimizer: Optimizer, params: Tensor[], fresh: (params: Tensor[]) => Optimizer): Promise<void> {
    const path = at("differs.safetensors");
    await optimizer.save(path);
    const dict = optimizer.stateDict();
    const copies = [0, 1].map(() => params.map((p) => p.clone()));
    const others = copies.map(fresh);
    await others[0]!.load(path);
    others[1]!.loadStateDict(dict);
    disposeDict(dict);
    for (const each of [optimizer, ...others]) {
      setGradients(each.paramGroups[0]!.params, 9);
      each.step();
      expect(each.stateBytes).toBe(optimizer.stateBytes);
    }
    for (const copy of copies) {
      expect(bitsOf(copy)).toEqual(bitsOf(params));
      dropGradients(copy);
    }
    dropGradients(params);
    dispose([optimizer], others, params, ...copies);
  }

  test("bits of a module override", async () => {
    const params = twins();
    manager.registerModuleOverride({ weight: params[1] }, "weight", { optimBits: 32 });
    const optimizer = new Adam8bit(params);
    setGradients(params, 1);
    optimizer.step();
    expect(optimizer.stateBytes).toBe(5000 * 10 + 20 * 8);
    await goesOn(optimizer, params, (copy) => {
      manager.registerModuleOverride({ weight: copy[1] }, "weight", { optimBits: 32 });
      return new Adam8bit(copy);
    });
    manager.initialize();
  });

  test("an override that is not there any more", async () => {
    const params = twins();
    manager.overrideConfig(params[1]!, "optimBits", 32);
    const optimizer = new Adam8bit(params);
    setGradients(params, 1);
    optimizer.step();
    manager.initialize();
    await goesOn(optimizer, params, (copy) => new Adam8bit(copy));
  });

  test("bits and least size that were set between steps", async () => {
    const params = [...twins(), parameter(backend, [300], 3), parameter(backend, [300], 4)];
    const optimizer = new Adam8bit(params);
    setGradients(params, 1);
    for (const i of [1, 3]) dropGradients([params[i]!]);
    optimizer.step();
    Object.assign(optimizer.paramGroups[0]!, { optimBits: 32 });
    setGradients(params, 2);
    dropGradients([params[3]!]);
    optimizer.step();
    Object.assign(optimizer.paramGroups[0]!, { optimBits: 8, min8bitSize: 10 });
    setGradients(params, 3);
    optimizer.step();
    const dict = optimizer.stateDict();
    expect([0, 1, 2, 3].map((i) => dict.state[i]!.state1!.dtype)).toEqual(["u8", "f32", "f32", "u8"]);
    disposeDict(dict);
    await goesOn(optimizer, params, (copy) => new Adam8bit(copy));
  });

  test("a parameter that was disposed: steps, save, load and addParamGroup go on without it", async () => {
    const params = [...twins(), parameter(backend, [10], 3)];
    const optimizer = new Adam8bit(params);
    setGradients(params, 1);
    dropGradients([params[2]!]);
    optimizer.step();
    dropGradients(params);
    for (const i of [1, 2]) params[i]!.dispose();
    const path = at("disposed.safetensors");
    await optimizer.save(path);
    await optimizer.load(path);
    const dict = optimizer.stateDict();
    optimizer.loadStateDict(dict);
    disposeDict(dict);
    const more = parameter(backend, [10], 4);
    optimizer.addParamGroup({ params: more });
    setGradients([params[0]!, more], 2);
    optimizer.step();
    dropGradients([params[0]!, more]);
    dispose([optimizer, params[0]!, more]);
  });
});

onDevices("a dict that does not fit changes nothing", use, () => {
  const spoilers: [string, (dict: Loose) => void, new (...args: never[]) => Error, string][] = [
    ["another optimizer", (d) => (d.optimizer = "AdamW"), ArgumentError, "optimizer"],
    ["no optimizer", (d) => delete (d as Partial<Loose>).optimizer, ArgumentError, "optimizer"],
    ["no groups", (d) => delete (d as Partial<Loose>).paramGroups, ArgumentError, "paramGroups"],
    ["a group more", (d) => d.paramGroups.push({ ...d.paramGroups[0] }), ArgumentError, "paramGroups"],
    ["a parameter less", (d) => (d.paramGroups[0]!.params = [0, 1]), ArgumentError, "paramGroups[0].params"],
    ["a number twice", (d) => (d.paramGroups[0]!.params = [0, 1, 1]), ArgumentError, "paramGroups[0].params[2]"],
    ["a bad lr", (d) => (d.paramGroups[0]!.lr = -1), ArgumentError, "paramGroups[0].lr"],
    ["no lr", (d) => delete d.paramGroups[0]!.lr, ArgumentError, "paramGroups[0].lr"],
    ["an unknown entry", (d) => (d.paramGroups[0]!.rate = 1), ArgumentError, "paramGroups[0].rate"],
    ["other bits", (d) => (d.paramGroups[0]!.optimBits = 32), ArgumentError, "paramGroups[0].optimBits"],
    ["an unknown parameter", (d) => (d.state[7] = d.state[0]!), ArgumentError, "state.7"],
    ["a bad step", (d) => (d.state[0]!.step = 1.5), ArgumentError, "state.0.step"],
    ["no state2", (d) => delete d.state[0]!.state2, ArgumentError, "state.0.state2"],
    ["no scales", (d) => delete d.state[0]!.absmax1, ArgumentError, "state.0.absmax1"],
    ["no tensor", (d) => (d.state[0]!.state1 = [1, 2]), ArgumentError, "state.0.state1"],
    ["scales of a 32-bit state", (d) => (d.state[1]!.absmax1 = d.state[0]!.absmax1), ArgumentError, "state.1.absmax1"],
    ["another map", (d) => (d.state[0]!.qmap1 = d.state[0]!.qmap2), ArgumentError, "state.0.qmap1"],
    ["one map for both", (d) => (d.state[0]!.qmap2 = d.state[0]!.qmap1), ArgumentError, "state.0.qmap2"],
    ["another shape", (d) => (d.state[0]!.state1 = d.state[2]!.state1), ShapeError, "state.0.state1"],
    ["another dtype", (d) => (d.state[0]!.absmax1 = d.state[0]!.state1), DTypeError, "state.0.absmax1"],
  ];
  test.each(spoilers)("%s", async (_, spoil, kind, operand) => {
    const params = make();
    const optimizer = new Adam8bit(params);
    setGradients(params, 1);
    optimizer.step();
    const dict = optimizer.stateDict();
    const state = Object.fromEntries(Object.entries(dict.state).map(([id, entries]) => [id, { ...entries }]));
    const spoiled: Loose = { optimizer: dict.optimizer, state, paramGroups: dict.paramGroups.map((g) => ({ ...g })) };
    spoil(spoiled);
    const load = () => optimizer.loadStateDict(spoiled as unknown as OptimizerStateDict);
    const error = await nothingChanged(optimizer, params, load);
    expect(error).toBeInstanceOf(kind);
    expect((error as ArgumentError).operand).toBe(operand);
    disposeDict(dict);
    dropGradients(params);
    dispose([optimizer], params);
  });

  test("groups of 32 bits for those of 8, and states of a dtype that is neither", async () => {
    const params = make();
    const optimizer = new Adam(params, { optimBits: 8 });
    const wide = new Adam32bit(params);
    setGradients(params, 1);
    wide.step();
    const dict = wide.stateDict();
    const error = await nothingChanged(optimizer, params, () => optimizer.loadStateDict(dict));
    expect((error as ArgumentError).operand).toBe("paramGroups[0].optimBits");
    const half = dict.state[0]!.state1!.to("f16");
    const loose = { ...dict, state: { ...dict.state, 0: { ...dict.state[0]!, state1: half } } };
    expect(await nothingChanged(wide, params, () => wide.loadStateDict(loose))).toMatchObject({
      message: expect.stringContaining(
        "state.0.state1: expected f32 (32-bit states) or u8 (8-bit states), received f16",
      ),
    });
    half.dispose();
    disposeDict(dict);
    dropGradients(params);
    dispose([optimizer, wide], params);
  });
});

onDevices("files", use, () => {
  /** A file of an 8-bit Adam after a step, and the optimizer. */
  async function saved(name: string) {
    const params = make();
    const optimizer = new Adam8bit(params);
    setGradients(params, 1);
    optimizer.step();
    const path = at(name);
    await optimizer.save(path);
    const done = () => {
      dropGradients(params);
      dispose([optimizer], params);
    };
    return { params, optimizer, path, bytes: readFileSync(path), done };
  }

  test("hold torch's names, and nothing else is left in the folder", async () => {
    const { path, done } = await saved("names.safetensors");
    expect(readdirSync(folder).filter((file) => file.endsWith(".tmp"))).toEqual([]);
    const file = await SafetensorsFile.open(path);
    expect([...file.tensors.keys()].sort()).toEqual(
      [
        "integrity",
        ...["state1", "state2"].map((key) => `state.1.${key}`),
        ...[0, 2].flatMap((i) =>
          ["state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2"].map((k) => `state.${i}.${k}`),
        ),
      ].sort(),
    );
    expect(JSON.parse(file.metadata.get("param_groups")!)).toEqual([
      {
        lr: 1e-3,
        betas: [0.9, 0.999],
        eps: 1e-8,
        weight_decay: 0,
        optim_bits: 8,
        min_8bit_size: 4096,
        max_unorm: 0,
        skip_zeros: false,
        params: [0, 1, 2],
      },
    ]);
    expect(JSON.parse(file.metadata.get("step")!)).toEqual({ 0: 1, 1: 1, 2: 1 });
    await file.close();
    done();
  });

  test("cut off, changed, or of something else", async () => {
    const { params, optimizer, path, bytes, done } = await saved("spoiled.safetensors");
    const load = () => optimizer.load(path);
    const changes: Buffer[] = [bytes.subarray(0, bytes.length - 1), bytes.subarray(0, 100), bytes.subarray(0, 0)];
    for (const place of [bytes.length - 1, bytes.length - 40, bytes.length - 5000, Math.floor(bytes.length / 2)]) {
      const changed = Buffer.from(bytes);
      changed[place]! ^= 1;
      changes.push(changed);
    }
    const text = bytes.toString("latin1");
    for (const [from, to] of [
      ['\\"lr\\":0.001', '\\"lr\\":0.002'],
      ['\\"lr\\":0.001', '\\"lr\\":-0.01'],
      ['{\\"0\\":1', '{\\"0\\":2'],
      ['"Adam"', '"Lion"'],
      ['"halfbyte":"1"', '"halfbyte":"2"'],
      ["state.1.state2", "state.1.state3"],
      ["state.0.state1", "state.9.state1"],
      ["[50,90]", "[90,50]"],
      ['[{\\"lr', '[(\\"lr'],
    ] as const) {
      expect(text).toContain(from);
      changes.push(Buffer.from(text.replaceAll(from, to), "latin1"));
    }
    for (const changed of changes) {
      writeFileSync(path, changed);
      expect(await nothingChanged(optimizer, params, load)).toBeInstanceOf(FormatError);
    }
    expect(await nothingChanged(optimizer, params, () => optimizer.load(at("missing")))).toBeInstanceOf(FormatError);
    writeFileSync(path, bytes);
    const others = [new AdamW(params, { optimBits: 8 }), new Adam(params), new Adam8bit(params.slice(0, 2))];
    for (const other of others) {
      expect(await nothingChanged(other, params, () => other.load(path))).toBeInstanceOf(FormatError);
    }
    await optimizer.load(path);
    dispose(others);
    done();
  });

  test("a folder that is not there; no step and no second call while a file is written or read", async () => {
    const { params, optimizer, path, done } = await saved("busy.safetensors");
    await expect(optimizer.save(at("none/x.safetensors"))).rejects.toThrow(ArgumentError);
    for (const call of [() => optimizer.save(path), () => optimizer.load(path)]) {
      const under = call();
      expect(() => optimizer.step()).toThrow(ArgumentError);
      await expect(optimizer.save(path)).rejects.toThrow(ArgumentError);
      // What touches no states goes on.
      optimizer.zeroGrad();
      expect(await optimizer.skippedSteps()).toBe(0);
      await under;
    }
    setGradients(params, 2);
    optimizer.step();
    done();
  });

  test("an optimizer that is disposed while a file is written or read", async () => {
    const { path, done } = await saved("gone.safetensors");
    for (const method of ["save", "load"] as const) {
      const params = make();
      const optimizer = new Adam8bit(params);
      setGradients(params, 1);
      optimizer.step();
      const under = optimizer[method](path);
      optimizer.dispose();
      await expect(under).rejects.toThrow(DisposedError);
      dropGradients(params);
      dispose(params);
    }
    expect(readdirSync(folder).filter((file) => file.endsWith(".tmp"))).toEqual([]);
    done();
  });
});

onDevices("bitsandbytes state dicts in a file", use, () => {
  async function write(
    path: string,
    tensors: Record<string, Float32Array | Uint8Array | BigInt64Array>,
    shapes: Record<string, number[]>,
    metadata: Record<string, string>,
  ) {
    const dtypeOf = (data: unknown) =>
      data instanceof Uint8Array ? "U8" : data instanceof Float32Array ? "F32" : "I64";
    const writer = new SafetensorsWriter(
      path,
      Object.entries(tensors).map(([name, data]) => ({
        name,
        dtype: dtypeOf(data),
        shape: shapes[name] ?? [data.length],
      })),
      metadata,
    );
    for (const [name, data] of Object.entries(tensors)) {
      await writer.write(name, new Uint8Array(data.buffer, data.byteOffset, data.byteLength));
    }
    await writer.commit();
  }
  const group = {
    lr: 0.02,
    betas: [0.8, 0.95, 0.99],
    eps: 1e-7,
    weight_decay: 0.1,
    alpha: 2,
    t_alpha: null,
    t_beta3: 9,
    params: [0],
    initial_lr: 1,
  };

  test.each([
    // What the file has in its last place, and where the scales of the slow moment then begin.
    ["the CUDA kernel", 0, 19],
    ["the other backends", 40, 20],
  ])("AdEMAMix's scales as %s lays them out", async (_, last, from) => {
    const n = 5000;
    const blocks = 20;
    const p = parameter(backend, [n], 1);
    const absmax1 = Float32Array.from({ length: 2 * blocks }, (_, i) => i + 1);
    absmax1[2 * blocks - 1] = last;
    const tensors = {
      "state.0.step": BigInt64Array.of(12n),
      "state.0.state1": Uint8Array.from({ length: 2 * n }, (_, i) => i % 256),
      "state.0.state2": Uint8Array.from({ length: n }, (_, i) => (i * 7) % 256),
      "state.0.absmax1": absmax1,
      "state.0.absmax2": Float32Array.from({ length: blocks }, (_, i) => i + 100),
      "state.0.qmap1": createDynamicMap(),
      "state.0.qmap2": createDynamicMap(false),
    };
    const shapes = { "state.0.step": [], "state.0.state1": [2, n], "state.0.absmax1": [2, blocks] };
    const metadata = { format: "pt", param_groups: JSON.stringify([group]) };
    const path = at("ademamix.safetensors");
    await write(path, tensors, shapes, metadata);
    const optimizer = new (classOf("AdEMAMix8bit"))([p]);
    await optimizer.load(path);
    const { params: __, ...hyper } = optimizer.paramGroups[0]!;
    const rates = { betas: [0.8, 0.95, 0.99], alpha: 2, tAlpha: null, tBeta3: 9 };
    expect(hyper).toMatchObject({ lr: 0.02, eps: 1e-7, weightDecay: 0.1, ...rates });
    const dict = optimizer.stateDict();
    const { step, state1, absmax1: scales } = dict.state[0]!;
    expect(step).toBe(12);
    expect([...(scales!.dataSync() as Float32Array)]).toEqual([
      ...absmax1.subarray(0, blocks),
      ...absmax1.subarray(from, from + blocks),
    ]);
    expect(Buffer.compare(state1!.bytesSync(), tensors["state.0.state1"])).toBe(0);
    disposeDict(dict);
    // Zeros at both places do not say which it is.
    absmax1[blocks - 1] = 0;
    absmax1[2 * blocks - 1] = 0;
    await write(path, tensors, shapes, metadata);
    await expect(optimizer.load(path)).rejects.toThrow(FormatError);
    dispose([optimizer], [p]);
  });

  test("SGD's betas are its momentum; steps in the metadata; groups may be missing", async () => {
    const p = parameter(backend, [10], 1);
    const path = at("sgd.safetensors");
    const { params, ...own } = { lr: 0.5, betas: [0.75, 0], eps: 0, weight_decay: 0, params: [3] };
    const tensors = { "state.3.state1": numbers(10, 1), "state.3.unorm_vec": Float32Array.of(0) };
    await write(path, tensors, {}, { param_groups: JSON.stringify([{ ...own, params }]), step: '{"3":4}' });
    const optimizer = new (classOf("SGD"))([p], { lr: 1, momentum: 0.9 });
    await optimizer.load(path);
    const { params: _, ...hyper } = optimizer.paramGroups[0]!;
    expect(hyper).toMatchObject({ lr: 0.5, momentum: 0.75 });
    await write(path, { "state.0.state1": numbers(10, 2) }, {}, { step: '{"0":5}' });
    await optimizer.load(path);
    const dict = optimizer.stateDict();
    expect(dict.state[0]!.step).toBe(5);
    disposeDict(dict);
    for (const metadata of [
      {},
      { step: '{"0":-1}' },
      { step: "[" },
      { step: '{"0":5,"1":2}' },
      { step: '{"0":5}', optimizer: "Lion" },
    ]) {
      await write(path, { "state.0.state1": numbers(10, 2) }, {}, metadata as Record<string, string>);
      await expect(optimizer.load(path)).rejects.toThrow(FormatError);
    }
    dispose([optimizer], [p]);
  });
});
