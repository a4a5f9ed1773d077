import { readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { afterAll, beforeEach, describe, expect, it } from "vitest";
import { ArgumentError, DisposedError } from "#halfbyte/core/errors.js";
import { bytesOfShape, SafetensorsFile } from "#halfbyte/formats/safetensors.js";
import { CheckpointWriter, isWeightFile, parseSize, shardFileName } from "#halfbyte/formats/safetensors-shards.js";
import { SafetensorsWriter, type TensorDeclaration } from "#halfbyte/formats/safetensors-writer.js";
import { SAFETENSORS_DTYPES } from "#halfbyte/formats/source.js";
import { randomBytes, rejection, temporaryFolder } from "../helpers/checkpoint.js";
import { random } from "../helpers/random.js";

let folder = temporaryFolder();
beforeEach(() => {
  folder.remove();
  folder = temporaryFolder();
});
afterAll(() => folder.remove());

const files = () => readdirSync(folder.path).sort();
const declare = (name: string, bytes: number): TensorDeclaration => ({ name, dtype: "U8", shape: [bytes] });

// The Python package safetensors 0.8 wrote this: save(tensors, {"format": "pt"}).
const REFERENCE =
  "iAEAAAAAAAB7Il9fbWV0YWRhdGFfXyI6eyJmb3JtYXQiOiJwdCJ9LCLvv78iOnsiZHR5cGUiOiJJNjQiLCJzaGFwZSI6WzAsNV0sImRhdGFfb2Zmc2V0" +
  "cyI6WzAsMF19LCLwnZKzIjp7ImR0eXBlIjoiSTY0Iiwic2hhcGUiOltdLCJkYXRhX29mZnNldHMiOlswLDhdfSwiYi53ZWlnaHQiOnsiZHR5cGUiOiJG" +
  "MzIiLCJzaGFwZSI6WzIsM10sImRhdGFfb2Zmc2V0cyI6WzgsMzJdfSwiYS53ZWlnaHQiOnsiZHR5cGUiOiJCRjE2Iiwic2hhcGUiOlsyLDJdLCJkYXRh" +
  "X29mZnNldHMiOlszMiw0MF19LCLDqSI6eyJkdHlwZSI6IlU4Iiwic2hhcGUiOlszXSwiZGF0YV9vZmZzZXRzIjpbNDAsNDNdfSwicVwiXFxcbiI6eyJk" +
  "dHlwZSI6IkJPT0wiLCJzaGFwZSI6WzJdLCJkYXRhX29mZnNldHMiOls0Myw0NV19fSAgIAcAAAAAAAAAAAAAAAAAgD8AAABAAABAQAAAgEAAAKBAAACA" +
  "PwBAQEABAgMBAA==";

describe("SafetensorsWriter", () => {
  it("writes the bytes that the reference serializer writes", async () => {
    const writer = new SafetensorsWriter(folder.file("x.safetensors"), [
      { name: "b.weight", dtype: "F32", shape: [2, 3] },
      { name: "a.weight", dtype: "BF16", shape: [2, 2] },
      { name: "é", dtype: "U8", shape: [3] },
      { name: "𝒳", dtype: "I64", shape: [] },
      { name: "\uffff", dtype: "I64", shape: [0, 5] },
      { name: 'q"\\\n', dtype: "BOOL", shape: [2] },
    ]);
    expect(writer.complete).toBe(false);
    await writer.write("b.weight", new Uint8Array(Float32Array.of(0, 1, 2, 3, 4, 5).buffer));
    await writer.write("a.weight", Uint8Array.of(0, 0, 0x80, 0x3f, 0, 0x40, 0x40, 0x40));
    await writer.write("é", Uint8Array.of(1, 2, 3));
    await writer.write("𝒳", Uint8Array.of(7, 0, 0, 0, 0, 0, 0, 0));
    await writer.write('q"\\\n', Uint8Array.of(1, 0));
    expect(writer.complete).toBe(true);
    expect(files()).toHaveLength(1);
    expect(files()[0]).toMatch(/^\.x\.safetensors\..*\.tmp$/);
    await writer.commit();
    await writer.commit();
    expect(files()).toEqual(["x.safetensors"]);
    expect(readFileSync(writer.path).equals(Buffer.from(REFERENCE, "base64"))).toBe(true);
  });

  it("takes data in any chunks and any order of tensors", async () => {
    for (let seed = 0; seed < 30; seed++) {
      const next = random(seed);
      const declarations = Array.from({ length: 1 + (next() % 12) }, (_, i): TensorDeclaration => {
        const dtype = SAFETENSORS_DTYPES[next() % SAFETENSORS_DTYPES.length]!;
        return { name: `${next() % 100}.${i}`, dtype, shape: [next() % 5, 4 * (next() % 40)] };
      });
      const data = new Map(
        declarations.map(({ name, dtype, shape }) => [
          name,
          randomBytes(bytesOfShape(dtype, shape as number[])!, name),
        ]),
      );
      const path = folder.file(`${seed}.safetensors`);
      const writer = new SafetensorsWriter(path, declarations, {});
      const left = [...data].map(([name, bytes]) => ({ name, bytes, done: 0 }));
      const pending: Promise<void>[] = [];
      while (left.length > 0) {
        const at = next() % left.length;
        const { name, bytes, done } = left[at]!;
        const size = Math.min(bytes.length - done, next() % 200);
        pending.push(writer.write(name, bytes.subarray(done, done + size)));
        left[at]!.done += size;
        if (left[at]!.done === bytes.length) left.splice(at, 1);
      }
      await Promise.all(pending);
      await writer.commit();
      await using file = await SafetensorsFile.open(path);
      expect(file.tensors.size).toBe(declarations.length);
      expect(file.metadata.size).toBe(0);
      for (const { name, dtype, shape } of declarations) {
        expect(file.tensors.get(name)).toMatchObject({ dtype, shape });
        expect(Buffer.from(await file.read(name)).equals(data.get(name)!)).toBe(true);
      }
      expect(readFileSync(path).readUInt32LE(0) % 8).toBe(0);
    }
    expect(files()).toHaveLength(30);
  });

  it("places tensors whose length comes late", async () => {
    const path = folder.file("late.safetensors");
    const writer = new SafetensorsWriter(path, [
      { name: "z.state", dtype: "U8", shape: { atMost: 1000 } },
      { name: "a.state", dtype: "U8", shape: { atMost: 1000 } },
      { name: "w", dtype: "U8", shape: [9] },
      { name: "s", dtype: "F32", shape: [2] },
    ]);
    await writer.write("z.state", Buffer.from("short"));
    expect(writer.complete).toBe(false);
    expect(await rejection(writer.write("z.state", Buffer.from("x")))).toBeInstanceOf(ArgumentError);
    expect(await rejection(writer.write("a.state", new Uint8Array(1001)))).toBeInstanceOf(ArgumentError);
    await writer.write("a.state", new Uint8Array(0));
    await writer.write("w", Buffer.from("123456789"));
    await writer.write("s", new Uint8Array(8));
    expect(writer.complete).toBe(true);
    await writer.commit();
    await using file = await SafetensorsFile.open(path);
    expect([...file.tensors.values()].map(({ name, shape }) => [name, shape])).toEqual([
      ["s", [2]],
      ["w", [9]],
      ["a.state", [0]],
      ["z.state", [5]],
    ]);
    expect(Buffer.from(await file.read("z.state")).toString()).toBe("short");
    expect(Buffer.from(await file.read("w")).toString()).toBe("123456789");
    expect(writer.dataBytes).toBe(22);
  });

  it("insists on exactly the declared bytes, and leaves nothing otherwise", async () => {
    const writer = new SafetensorsWriter(folder.file("x"), [declare("a", 4), declare("b", 4)]);
    expect(await rejection(writer.write("a", new Uint8Array(5)))).toMatchObject({
      operand: "a",
      expected: "4 bytes in all",
    });
    await writer.write("a", new Uint8Array(3));
    expect(await rejection(writer.write("a", new Uint8Array(2)))).toBeInstanceOf(ArgumentError);
    expect(await rejection(writer.write("c", new Uint8Array(1)))).toBeInstanceOf(ArgumentError);
    await writer.write("a", new Uint8Array(1));
    await writer.write("b", new Uint8Array(2));
    expect(files()).toHaveLength(1);
    expect(await rejection(writer.commit())).toMatchObject({ operand: "b", expected: "4 bytes" });
    expect(files()).toEqual([]);
    expect(await rejection(writer.write("b", new Uint8Array(2)))).toBeInstanceOf(DisposedError);
    await writer.abort();

    const late = new SafetensorsWriter(folder.file("x"), [{ name: "a", dtype: "U8", shape: { atMost: 4 } }]);
    expect(await rejection(late.seal())).toMatchObject({ operand: "a", received: "none" });
    expect(files()).toEqual([]);
  });

  it("aborts without a trace, even under way", async () => {
    writeFileSync(folder.file("x"), "old");
    {
      await using writer = new SafetensorsWriter(folder.file("x"), [declare("a", 1 << 20)]);
      const write = writer.write("a", new Uint8Array(1 << 19)).catch((error: unknown) => error);
      await writer.abort();
      const result = await write;
      expect(result === undefined || result instanceof DisposedError).toBe(true);
    }
    expect(files()).toEqual(["x"]);
    {
      await using unused = new SafetensorsWriter(folder.file("y"), [declare("a", 1)]);
      expect(unused.complete).toBe(false);
    }
    expect(files()).toEqual(["x"]);
    expect(readFileSync(folder.file("x"), "utf8")).toBe("old");
  });

  it("replaces an older file only at the end", async () => {
    writeFileSync(folder.file("x"), "old");
    await using writer = new SafetensorsWriter(folder.file("x"), [declare("a", 1)], { who: "me" });
    await writer.write("a", Uint8Array.of(42));
    await writer.seal();
    expect(readFileSync(folder.file("x"), "utf8")).toBe("old");
    await writer.commit();
    await using file = await SafetensorsFile.open(folder.file("x"));
    expect(file.metadata.get("who")).toBe("me");
    expect(await file.read("a")).toEqual(Uint8Array.of(42));
  });

  it("checks declarations", async () => {
    const make =
      (...declarations: unknown[]) =>
      () =>
        new SafetensorsWriter(folder.file("x"), declarations as TensorDeclaration[]);
    for (const bad of [
      make(declare("a", 1), declare("a", 1)),
      make(declare("__metadata__", 1)),
      make(declare("\ud800", 1)),
      make({ name: "a", dtype: "U7", shape: [1] }),
      make({ name: "a", dtype: "U8", shape: [-1] }),
      make({ name: "a", dtype: "U8", shape: [1.5] }),
      make({ name: "a", dtype: "F4", shape: [3] }),
      make({ name: "a", dtype: "F64", shape: [2 ** 30, 2 ** 30] }),
      make({ name: "a", dtype: "F32", shape: { atMost: 3 } }),
      make({ name: "a", dtype: "U8", shape: { atMost: Number.NaN } }),
    ]) {
      expect(bad).toThrow(ArgumentError);
    }
    const nowhere = new SafetensorsWriter(folder.file("no/such/folder"), [declare("a", 1)]);
    expect(await rejection(nowhere.write("a", new Uint8Array(1)))).toBeInstanceOf(ArgumentError);
    await nowhere.abort();
    expect(files()).toEqual([]);
  });
});

describe("CheckpointWriter", () => {
  const read = (file: string) => readFileSync(join(folder.path, file), "utf8");
  async function writeAll(writer: CheckpointWriter, declarations: readonly TensorDeclaration[]) {
    for (const { name, shape } of declarations) await writer.write(name, randomBytes((shape as number[])[0]!, name));
    return writer.finish();
  }

  it("writes one file without an index when everything fits", async () => {
    const declarations = [declare("b", 5), declare("a", 5)];
    const writer = new CheckpointWriter(folder.path, declarations, { maxShardSize: 10 });
    expect(await writeAll(writer, declarations)).toEqual({ files: ["model.safetensors"], totalBytes: 10 });
    expect(files()).toEqual(["model.safetensors"]);
    expect(await rejection(writer.finish())).toBeInstanceOf(DisposedError);
  });

  it("splits as transformers does: in order, large tensors alone and before the shard they interrupt", async () => {
    const declarations = [declare("b", 6), declare("big", 11), declare("a", 3), declare("c", 2), declare("é", 9)];
    const writer = new CheckpointWriter(folder.path, declarations, { maxShardSize: "10", totalParameters: 31 });
    const { files: written, totalBytes } = await writeAll(writer, declarations);
    expect(totalBytes).toBe(31);
    expect(written).toEqual([
      "model-00001-of-00004.safetensors",
      "model-00002-of-00004.safetensors",
      "model-00003-of-00004.safetensors",
      "model-00004-of-00004.safetensors",
      "model.safetensors.index.json",
    ]);
    expect(files()).toEqual(written);
    expect(read("model.safetensors.index.json")).toBe(`{
  "metadata": {
    "total_parameters": 31,
    "total_size": 31
  },
  "weight_map": {
    "a": "model-00002-of-00004.safetensors",
    "b": "model-00002-of-00004.safetensors",
    "big": "model-00001-of-00004.safetensors",
    "c": "model-00003-of-00004.safetensors",
    "\\u00e9": "model-00004-of-00004.safetensors"
  }
}
`);
    await using shard = await SafetensorsFile.open(folder.file("model-00002-of-00004.safetensors"));
    expect([...shard.tensors.keys()]).toEqual(["a", "b"]);
    expect(shard.metadata.get("format")).toBe("pt");
  });

  it("removes what an earlier checkpoint left, and nothing else", async () => {
    const stale = ["model.safetensors", "model-00001-of-00007.safetensors", "model-00007-of-00007.safetensors"];
    const others = ["config.json", "model-foo.safetensors", "adapter_model.safetensors"];
    for (const file of [...stale, ...others]) writeFileSync(folder.file(file), "old");
    const declarations = [declare("a", 6), declare("b", 6)];
    await writeAll(new CheckpointWriter(folder.path, declarations, { maxShardSize: 10 }), declarations);
    expect(files()).toEqual(
      [
        ...others,
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
      ].sort(),
    );
    await writeAll(new CheckpointWriter(folder.path, declarations), declarations);
    expect(files()).toEqual([...others, "model.safetensors"].sort());
  });

  it("leaves the folder as it was when data are missing or it is aborted", async () => {
    writeFileSync(folder.file("model.safetensors"), "old");
    const declarations = [declare("a", 6), declare("b", 6), declare("c", 6)];
    const incomplete = new CheckpointWriter(folder.path, declarations, { maxShardSize: 10 });
    await incomplete.write("a", new Uint8Array(6));
    await incomplete.write("b", new Uint8Array(5));
    expect(files()).toHaveLength(3);
    expect(await rejection(incomplete.finish())).toMatchObject({ operand: "b" });
    expect(files()).toEqual(["model.safetensors"]);

    {
      await using aborted = new CheckpointWriter(folder.path, declarations);
      await aborted.write("a", new Uint8Array(6));
      expect(files()).toHaveLength(2);
    }
    expect(files()).toEqual(["model.safetensors"]);
    expect(read("model.safetensors")).toBe("old");
  });

  it("undoes what it renamed when the index cannot be put in place", async () => {
    // A folder where the index belongs makes the last rename fail.
    const { mkdirSync, rmdirSync } = await import("node:fs");
    mkdirSync(folder.file("model.safetensors.index.json"));
    const declarations = [declare("a", 6), declare("b", 6)];
    const writer = new CheckpointWriter(folder.path, declarations, { maxShardSize: 10 });
    expect(await rejection(writeAll(writer, declarations))).toBeInstanceOf(Error);
    expect(files()).toEqual(["model.safetensors.index.json"]);
    rmdirSync(folder.file("model.safetensors.index.json"));
  });

  it("checks declarations across shards", async () => {
    const twice = [declare("a", 6), declare("b", 6), declare("a", 6)];
    expect(() => new CheckpointWriter(folder.path, twice, { maxShardSize: 10 })).toThrow(ArgumentError);
    expect(() => new CheckpointWriter(folder.path, [], { maxShardSize: "a lot" })).toThrow(ArgumentError);
    const empty = new CheckpointWriter(folder.path, []);
    expect(await empty.finish()).toEqual({ files: ["model.safetensors"], totalBytes: 0 });
    const writer = new CheckpointWriter(folder.path, [declare("a", 1)]);
    expect(await rejection(writer.write("b", new Uint8Array(1)))).toBeInstanceOf(ArgumentError);
  });

  it.skipIf(process.platform !== "linux")("keeps few files open while it writes many shards", async () => {
    const declarations = Array.from({ length: 300 }, (_, i) => declare(`t${i}`, 8));
    const writer = new CheckpointWriter(folder.path, declarations, { maxShardSize: 8 });
    const open = () => readdirSync("/proc/self/fd").length;
    const before = open();
    let most = 0;
    for (const { name } of declarations) {
      await writer.write(name, new Uint8Array(8));
      most = Math.max(most, open());
    }
    expect(most - before).toBeLessThan(20);
    expect((await writer.finish()).files).toHaveLength(301);
  });
});

describe("parseSize", () => {
  it.each([
    ["5GB", 5e9],
    ["500MB", 5e8],
    ["1.5gb", 1.5e9],
    [" 10 KB ", 1e4],
    ["2TB", 2e12],
    ["1GiB", 2 ** 30],
    ["1.5 KiB", 1536],
    ["1000", 1000],
    ["7b", 7],
    [4096, 4096],
  ])("%s", (text, bytes) => expect(parseSize(text)).toBe(bytes));

  it.each(["", "GB", "-1GB", "5XB", "5G", "1e3", "0", "0.1", "0x10", "NaN", Number.NaN, -1, 0, "99999999TB"])(
    "refuses %j",
    (text) => expect(() => parseSize(text, "--max-shard-size")).toThrow(ArgumentError),
  );

  it("names files", () => {
    expect(shardFileName(0, 1)).toBe("model.safetensors");
    expect(shardFileName(2, 12)).toBe("model-00003-of-00012.safetensors");
    expect(
      ["model.safetensors", "model.safetensors.index.json", "model-00003-of-00012.safetensors"].every(isWeightFile),
    ).toBe(true);
    expect(["adapter_model.safetensors", "model-1-of-2.safetensors", "config.json"].some(isWeightFile)).toBe(false);
  });
});
