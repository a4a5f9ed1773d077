import { appendFileSync, mkdirSync, readdirSync, rmSync, symlinkSync, truncateSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeEach, describe, expect, it } from "vitest";
import { ArgumentError, DisposedError, FormatError } from "#halfbyte/core/errors.js";
import { openHfFolder } from "#halfbyte/formats/hf-folder.js";
import { dumpPyJson } from "#halfbyte/quant/pyjson.js";
import {
  dataOf,
  rejection,
  safetensorsBytes,
  type TestTensor,
  temporaryFolder,
  writeJson,
} from "../helpers/checkpoint.js";

let folder = temporaryFolder();
beforeEach(() => {
  folder.remove();
  folder = temporaryFolder();
});
afterAll(() => folder.remove());

const TENSORS: Record<string, TestTensor> = {
  "model.embed_tokens.weight": { dtype: "BF16", shape: [6, 4] },
  "model.norm.weight": { dtype: "F32", shape: [5] },
  scale: { dtype: "F64", shape: [] },
  packed: { dtype: "F4", shape: [4, 3] },
  none: { dtype: "I8", shape: [0, 3] },
};

function writeModel(tensors: Record<string, TestTensor> = TENSORS, config: unknown = { model_type: "llama" }) {
  writeJson(folder.file("config.json"), config);
  writeFileSync(folder.file("model.safetensors"), safetensorsBytes(tensors));
}

/** One shard per entry of `shards`, and the index that `map` gives (default: the truth). */
function writeShards(shards: Record<string, Record<string, TestTensor>>, map?: Record<string, unknown>) {
  writeJson(folder.file("config.json"), {});
  for (const [file, tensors] of Object.entries(shards)) writeFileSync(folder.file(file), safetensorsBytes(tensors));
  const truth = Object.entries(shards).flatMap(([file, tensors]) => Object.keys(tensors).map((name) => [name, file]));
  const weight_map = map ?? Object.fromEntries(truth);
  writeJson(folder.file("model.safetensors.index.json"), { metadata: { total_size: 1 }, weight_map });
}

const open = () => openHfFolder(folder.path);
async function problem(): Promise<string> {
  const error = await rejection(open());
  expect(error).toBeInstanceOf(FormatError);
  return (error as FormatError).message;
}

describe("openHfFolder", () => {
  it("gives tensors, rows and configuration of a single file", async () => {
    writeModel(TENSORS, { model_type: "llama", rms_norm_eps: 1e-5, __proto__x: 1, list: [1.5, null] });
    const source = await open();
    expect(source).toMatchObject({ kind: "safetensors", path: folder.path });
    expect(source.config).toEqual({ model_type: "llama", rms_norm_eps: 1e-5, __proto__x: 1, list: [1.5, null] });
    expect([...source.tensors.keys()]).toEqual(Object.keys(TENSORS));
    for (const [name, tensor] of Object.entries(TENSORS)) {
      const data = dataOf(name, tensor);
      const rows = tensor.shape[0] ?? 1;
      expect(source.tensors.get(name)).toMatchObject({ name, dtype: tensor.dtype, shape: tensor.shape });
      expect(source.storedBytes(name)).toBe(data.length);
      expect(Buffer.from(await source.readRows(name, 0, rows)).equals(data)).toBe(true);
      expect(await source.readRows(name, rows, rows)).toHaveLength(0);
    }
    const embed = dataOf("model.embed_tokens.weight", TENSORS["model.embed_tokens.weight"]!);
    expect(Buffer.from(await source.readRows("model.embed_tokens.weight", 2, 5)).equals(embed.subarray(16, 40))).toBe(
      true,
    );
    const norm = dataOf("model.norm.weight", TENSORS["model.norm.weight"]!);
    expect(Buffer.from(await source.readRows("model.norm.weight", 1, 3)).equals(norm.subarray(4, 12))).toBe(true);
    await source.close();
    await source.close();
    expect(await rejection(source.readRows("scale", 0, 1))).toBeInstanceOf(DisposedError);
  });

  it("keeps Python's ints and floats apart in configTree", async () => {
    writeModel();
    const text = '{"a": 1.0, "b": 1, "c": 1e-05}';
    writeFileSync(folder.file("config.json"), text);
    const source = await open();
    expect(source.config).toEqual({ a: 1, b: 1, c: 1e-5 });
    expect(dumpPyJson(source.configTree!)).toBe(text);
    await source.close();
  });

  it("checks requests for rows", async () => {
    writeModel();
    const source = await open();
    for (const [name, begin, end] of [
      ["nobody", 0, 1],
      ["scale", 0, 2],
      ["scale", 1, 0],
      ["model.norm.weight", -1, 2],
      ["model.norm.weight", 0, 6],
      ["model.norm.weight", 0.5, 1],
      ["packed", 0, 1],
      ["packed", 1, 3],
    ] as const) {
      expect(await rejection(source.readRows(name, begin, end)), name).toBeInstanceOf(ArgumentError);
    }
    expect(await source.readRows("packed", 2, 4)).toHaveLength(3);
    expect(() => source.storedBytes("nobody")).toThrow(ArgumentError);
    await source.close();
  });

  it("reads shards, in subfolders and through links too, with tensors the index does not name", async () => {
    mkdirSync(folder.file("sub"));
    const store = temporaryFolder();
    const shards = {
      "model-00001-of-00002.safetensors": { b: { dtype: "U8", shape: [3] } },
      "sub/x.safetensors": { a: { dtype: "U8", shape: [2] }, extra: { dtype: "U8", shape: [1] } },
    } satisfies Record<string, Record<string, TestTensor>>;
    writeShards(shards, { a: "sub/../sub/x.safetensors", b: "model-00001-of-00002.safetensors" });
    const linked = safetensorsBytes({ b: { dtype: "U8", shape: [3] } });
    writeFileSync(store.file("blob"), linked);
    rmSync(folder.file("model-00001-of-00002.safetensors"));
    symlinkSync(store.file("blob"), folder.file("model-00001-of-00002.safetensors"));
    const source = await open();
    expect([...source.tensors.keys()]).toEqual(["b", "a", "extra"]);
    expect(Buffer.from(await source.readRows("b", 0, 3)).equals(dataOf("b", { dtype: "U8", shape: [3] }))).toBe(true);
    expect(await source.readRows("extra", 0, 1)).toHaveLength(1);
    await source.close();
    store.remove();
  });

  it("prefers model.safetensors to an index", async () => {
    writeShards({ "x.safetensors": { a: { dtype: "U8", shape: [1] } } });
    writeModel({ b: { dtype: "U8", shape: [1] } });
    const source = await open();
    expect([...source.tensors.keys()]).toEqual(["b"]);
    await source.close();
  });

  it.skipIf(process.platform !== "linux")("keeps few of many shards open, also under concurrent reads", async () => {
    const name = (i: number) => `model-${String(i).padStart(5, "0")}-of-00040.safetensors`;
    const shards = Object.fromEntries(
      Array.from({ length: 40 }, (_, i) => [name(i), { [`t${i}`]: { dtype: "U8", shape: [100] } as TestTensor }]),
    );
    writeShards(shards);
    const fds = () => readdirSync("/proc/self/fd").length;
    const before = fds();
    const source = await open();
    expect(fds() - before).toBeLessThan(16);
    for (let round = 0; round < 3; round++) {
      const reads = Array.from({ length: 200 }, (_, i) => source.readRows(`t${(i * 7) % 40}`, 0, 100));
      let most = 0;
      const watch = setInterval(() => {
        most = Math.max(most, fds());
      }, 0);
      const results = await Promise.all(reads);
      clearInterval(watch);
      expect(most - before).toBeLessThan(16);
      for (const [i, bytes] of results.entries()) {
        const tensor = `t${(i * 7) % 40}`;
        expect(Buffer.from(bytes).equals(dataOf(tensor, { dtype: "U8", shape: [100] }))).toBe(true);
      }
      expect(fds() - before).toBeLessThan(16);
    }
    const late = Array.from({ length: 40 }, (_, i) => rejection(source.readRows(`t${i}`, 0, 101)));
    for (const error of await Promise.all(late)) expect(error).toBeInstanceOf(ArgumentError);
    appendFileSync(folder.file(name(0)), "x");
    expect(await rejection(source.readRows("t0", 0, 1))).toBeInstanceOf(FormatError);
    const pending = Array.from({ length: 100 }, (_, i) =>
      source.readRows(`t${1 + (i % 39)}`, 0, 9).catch((e: unknown) => e),
    );
    await source.close();
    for (const result of await Promise.all(pending)) {
      expect(result instanceof Uint8Array || result instanceof DisposedError).toBe(true);
    }
    expect(fds()).toBe(before);
  });

  it("offers the files that travel with a model", async () => {
    writeModel();
    const wanted = [
      "tokenizer.json",
      "tokenizer_config.json",
      "special_tokens_map.json",
      "generation_config.json",
      "vocab.json",
      "merges.txt",
      "vocab.txt",
      "chat_template.jinja",
      "tokenizer.model",
      "spiece.model",
      "added_tokens.json",
      "preprocessor_config.json",
      "modeling_custom.py",
      "LICENSE",
      "qwen.tiktoken",
    ];
    const others = [
      "README.md",
      "pytorch_model.bin",
      "model.gguf",
      "training_args.bin",
      ".gitattributes",
      "other.json",
    ];
    for (const file of [...wanted, ...others]) writeFileSync(folder.file(file), `<${file}>`);
    mkdirSync(folder.file("vocab_folder.model"));
    const source = await open();
    expect([...source.sidecars.keys()].sort()).toEqual([...wanted].sort());
    const merges = await source.sidecars.get("merges.txt")!();
    expect(Buffer.from(merges).toString()).toBe("<merges.txt>");
    rmSync(folder.file("merges.txt"));
    expect(await rejection(source.sidecars.get("merges.txt")!())).toBeInstanceOf(FormatError);
    await source.close();
  });
});

describe("openHfFolder refuses", () => {
  it("what is no folder", async () => {
    writeModel();
    expect(await rejection(openHfFolder(folder.file("config.json")))).toMatchObject({
      problem: expect.stringMatching(/is not a folder/),
    });
    expect(await rejection(openHfFolder(folder.file("nothing")))).toMatchObject({ problem: "does not exist" });
  });

  it("an empty folder, and one without a model", async () => {
    expect(await problem()).toMatch(/is an empty folder/);
    writeFileSync(folder.file("README.md"), "");
    expect(await problem()).toMatch(/holds no model: no config.json and no weights/);
    writeJson(folder.file("config.json"), {});
    expect(await problem()).toMatch(/holds no weights/);
  });

  it.each([
    ["pytorch_model.bin", /convert them to safetensors first/],
    ["pytorch_model-00001-of-00002.bin", /convert them to safetensors first/],
    ["model-q4_0.gguf", /pass the .gguf file/],
    ["adapter_model.safetensors", /a PEFT adapter/],
    ["consolidated.safetensors", /their maker's own layout/],
    ["tf_model.h5", /TensorFlow/],
  ])("only %s", async (file, message) => {
    writeJson(folder.file("config.json"), {});
    writeFileSync(folder.file(file), "");
    expect(await problem()).toMatch(message);
  });

  it("a missing, broken or odd config.json", async () => {
    writeModel();
    rmSync(folder.file("config.json"));
    expect(await problem()).toMatch(/has no config.json/);
    for (const [text, message] of [
      ["", /invalid JSON/],
      ["[]", /is not a JSON object/],
      ['{"a": 1', /invalid JSON/],
      [Buffer.from([0xff]), /UTF-8/],
    ] as const) {
      writeFileSync(folder.file("config.json"), text);
      expect(await problem()).toMatch(message);
    }
    truncateSync(folder.file("config.json"), 8_000_001);
    expect(await problem()).toMatch(/has 8000001 bytes, more than/);
    rmSync(folder.file("config.json"));
    mkdirSync(folder.file("config.json"));
    expect(await problem()).toMatch(/config.json: is not a regular file/);
  });

  it("a broken model file", async () => {
    writeModel();
    writeFileSync(folder.file("model.safetensors"), "garbage");
    expect(await problem()).toMatch(/model.safetensors: is too short/);
    rmSync(folder.file("model.safetensors"));
    mkdirSync(folder.file("model.safetensors"));
    expect(await problem()).toMatch(/not a regular file/);
  });

  const one: Record<string, Record<string, TestTensor>> = { "x.safetensors": { a: { dtype: "U8", shape: [1] } } };
  it.each<[string, Record<string, unknown>, RegExp]>([
    ["an empty index", {}, /weight_map is empty/],
    ["a name its shard lacks", { a: "x.safetensors", b: "x.safetensors" }, /says that "b" is in x.safetensors, which/],
    ["a missing shard", { a: "y.safetensors" }, /y.safetensors: cannot be opened/],
    ["a parent folder", { a: "../x.safetensors" }, /"..\/x.safetensors": not a file inside/],
    ["a hidden parent folder", { a: "b/../../x.safetensors" }, /not a file inside the folder/],
    ["an absolute path", { a: "/etc/passwd" }, /not a file inside the folder/],
    ["a Windows path", { a: "C:\\x.safetensors" }, /not a file inside the folder/],
    ["a backslash", { a: "..\\x" }, /not a file inside the folder/],
    ["a NUL", { a: "x\0y" }, /not a file inside the folder/],
    ["an empty path", { a: "" }, /not a file inside the folder/],
    ["the folder itself", { a: "." }, /not a file inside the folder/],
    ["a folder", { a: "x/" }, /not a file inside the folder/],
    ["a number", { a: 1 }, /is not a string: not a file inside the folder/],
    ["a prototype", JSON.parse('{"__proto__": "x.safetensors"}'), /says that "__proto__" is in x.safetensors/],
  ])("an index with %s", async (_, map, message) => {
    writeShards(one, map);
    expect(await problem()).toMatch(message);
  });

  it("an index without a map, and a name in two shards", async () => {
    writeShards(one);
    writeJson(folder.file("model.safetensors.index.json"), { metadata: {} });
    expect(await problem()).toMatch(/has no weight_map object/);
    writeJson(folder.file("model.safetensors.index.json"), []);
    expect(await problem()).toMatch(/is not a JSON object/);
    const twice = { a: { dtype: "U8", shape: [1] } as TestTensor };
    const map = { a: "x.safetensors", c: "y.safetensors" };
    writeShards({ "x.safetensors": twice, "y.safetensors": { ...twice, c: { dtype: "U8", shape: [1] } } }, map);
    expect(await problem()).toMatch(/tensor "a" is in two shards: x.safetensors and y.safetensors/);
  });

  it.skipIf(process.platform !== "linux")("without leaving files open", async () => {
    const before = readdirSync("/proc/self/fd").length;
    for (let i = 0; i < 20; i++) {
      writeShards(one, { a: "x.safetensors", b: "x.safetensors" });
      await problem();
      writeFileSync(join(folder.path, "x.safetensors"), "garbage");
      await problem();
    }
    expect(readdirSync("/proc/self/fd").length).toBe(before);
  });
});
