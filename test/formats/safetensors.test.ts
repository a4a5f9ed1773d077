import { execFileSync } from "node:child_process";
import { appendFileSync, mkdirSync, truncateSync, utimesSync, writeFileSync } from "node:fs";
import { afterAll, describe, expect, it } from "vitest";
import { ArgumentError, DisposedError, FormatError } from "#halfbyte/core/errors.js";
import { MAX_HEADER_BYTES, parseSafetensorsHeader, SafetensorsFile } from "#halfbyte/formats/safetensors.js";
import { SAFETENSORS_BITS, SAFETENSORS_DTYPES, type SafetensorsDType } from "#halfbyte/formats/source.js";
import {
  dataOf,
  rawFile,
  rejection,
  safetensorsBytes,
  type TestTensor,
  temporaryFolder,
} from "../helpers/checkpoint.js";

const folder = temporaryFolder();
afterAll(folder.remove);

let count = 0;
function write(bytes: Uint8Array): string {
  const path = folder.file(`${count++}.safetensors`);
  writeFileSync(path, bytes);
  return path;
}

const U8 = (begin: number, end: number, shape: unknown = [end - begin]) => ({
  dtype: "U8",
  shape,
  data_offsets: [begin, end],
});

describe("SafetensorsFile", () => {
  it("reads every dtype, by tensor and by range", async () => {
    const tensors = Object.fromEntries(
      SAFETENSORS_DTYPES.map((dtype): [string, TestTensor] => [`t.${dtype}`, { dtype, shape: [3, 8] }]),
    );
    const path = write(safetensorsBytes(tensors, { format: "pt", note: "é" }));
    await using file = await SafetensorsFile.open(path);
    expect(file.path).toBe(path);
    expect([...file.metadata]).toEqual([
      ["format", "pt"],
      ["note", "é"],
    ]);
    expect([...file.tensors.keys()]).toEqual(Object.keys(tensors));
    for (const [name, tensor] of Object.entries(tensors)) {
      const data = dataOf(name, tensor);
      expect(data.length).toBe((24 * SAFETENSORS_BITS[tensor.dtype]) / 8);
      expect(file.tensors.get(name)).toMatchObject({ name, dtype: tensor.dtype, shape: [3, 8] });
      expect(Buffer.from(await file.read(name)).equals(data)).toBe(true);
      const part = new Uint8Array(5);
      await file.readRange(name, 2, part);
      expect(part).toEqual(new Uint8Array(data.subarray(2, 7)));
    }
  });

  it("reads scalars, empty tensors, awkward names and an empty file", async () => {
    const tensors: Record<string, TestTensor> = Object.fromEntries(
      ["__proto__", "constructor", "", 'a b\n"\\', "𝒳"].map((name) => [
        name,
        { dtype: "F32", shape: [] } as TestTensor,
      ]),
    );
    tensors.none = { dtype: "I64", shape: [0, 7] };
    await using file = await SafetensorsFile.open(write(safetensorsBytes(tensors)));
    expect([...file.tensors.keys()].sort()).toEqual(Object.keys(tensors).sort());
    for (const name of Object.keys(tensors)) {
      expect(Buffer.from(await file.read(name))).toEqual(Buffer.from(dataOf(name, tensors[name]!)));
    }
    expect(file.metadata.size).toBe(0);
    await using empty = await SafetensorsFile.open(write(rawFile("{}")));
    expect(empty.tensors.size).toBe(0);
  });

  it("orders tensors by their data and takes padding, unknown keys and null metadata", async () => {
    const header = { b: { ...U8(2, 4), extra: { deep: [1, {}] } }, a: U8(0, 2), e: U8(4, 4, [0]), __metadata__: null };
    const bytes = rawFile(`${JSON.stringify(header)}  \n\t`, Buffer.from([1, 2, 3, 4]));
    await using file = await SafetensorsFile.open(write(bytes));
    expect([...file.tensors.keys()]).toEqual(["a", "b", "e"]);
    expect(await file.read("b")).toEqual(Uint8Array.of(3, 4));
  });

  it("checks names and ranges", async () => {
    await using file = await SafetensorsFile.open(write(safetensorsBytes({ a: { dtype: "U8", shape: [4] } })));
    expect(await rejection(file.read("b"))).toBeInstanceOf(ArgumentError);
    expect(await rejection(file.readRange("toString", 0, new Uint8Array(1)))).toBeInstanceOf(ArgumentError);
    for (const [offset, length] of [
      [0, 5],
      [4, 1],
      [-1, 1],
      [0.5, 1],
      [Number.NaN, 0],
      [2 ** 53, 0],
    ] as const) {
      const error = await rejection(file.readRange("a", offset, new Uint8Array(length)));
      expect(error, `${offset}+${length}`).toBeInstanceOf(ArgumentError);
    }
    await file.readRange("a", 4, new Uint8Array(0));
  });

  it("refuses reads after close, and closes twice", async () => {
    const file = await SafetensorsFile.open(write(safetensorsBytes({ a: { dtype: "U8", shape: [4] } })));
    await file.close();
    await file.close();
    expect(await rejection(file.read("a"))).toBeInstanceOf(DisposedError);
  });

  it("settles reads that are under way when it is closed", async () => {
    const bytes = safetensorsBytes({ a: { dtype: "U8", shape: [1 << 20] } });
    for (let i = 0; i < 20; i++) {
      const file = await SafetensorsFile.open(write(bytes));
      const reads = Array.from({ length: 4 }, () => file.read("a").catch((error: unknown) => error));
      await file.close();
      for (const result of await Promise.all(reads)) {
        expect(result instanceof Uint8Array || result instanceof DisposedError).toBe(true);
      }
    }
  });

  it("notices a file that is cut off or changed while it is open", async () => {
    const bytes = safetensorsBytes({ a: { dtype: "U8", shape: [64] }, b: { dtype: "U8", shape: [64] } });
    const cut = write(bytes);
    await using one = await SafetensorsFile.open(cut);
    truncateSync(cut, bytes.length - 10);
    expect(await rejection(one.read("b"))).toMatchObject({
      problem: expect.stringMatching(/cut off while it was open/),
    });
    expect(await rejection(one.read("a"))).toBeInstanceOf(FormatError);

    for (const change of [(path: string) => appendFileSync(path, "x"), (path: string) => utimesSync(path, 1, 1)]) {
      const path = write(bytes);
      await using file = await SafetensorsFile.open(path);
      expect((await file.read("a")).length).toBe(64);
      change(path);
      expect(await rejection(file.read("a"))).toMatchObject({ problem: expect.stringMatching(/was changed/) });
    }
  });

  it("refuses what is no regular file", async () => {
    mkdirSync(folder.file("dir"));
    execFileSync("mkfifo", [folder.file("fifo")]);
    for (const [path, problem] of [
      ["dir", /not a regular file/],
      ["fifo", /not a regular file/],
      ["missing", /cannot be opened: ENOENT/],
    ] as const) {
      const error = await rejection(SafetensorsFile.open(folder.file(path)));
      expect(error).toBeInstanceOf(FormatError);
      expect(error).toMatchObject({
        format: "safetensors",
        where: folder.file(path),
        problem: expect.stringMatching(problem),
      });
    }
  });

  const good = { a: U8(0, 2), b: U8(2, 4) };
  it.each<[string, Uint8Array, RegExp]>([
    ["nothing", Buffer.alloc(0), /too short/],
    ["seven bytes", Buffer.alloc(7), /too short/],
    ["a header of no bytes", rawFile(""), /does not start with/],
    ["a header beyond the file", rawFile(good, 4, 4000), /cut off: a header of 4000 bytes/],
    ["a header above the limit", rawFile(good, 4, MAX_HEADER_BYTES + 1), /claims 100000001 bytes/],
    ["a huge header length", rawFile(good, 4, 0xffffffffffffffffn), /claims 18446744073709551615 bytes/],
    ["text", Buffer.from("version https://git-lfs.github.com/spec/v1\n"), /not a safetensors file/],
    ["a zip file", Buffer.from("PK\x03\x04aaaaaaaaaaaaaaaa", "latin1"), /not a safetensors file/],
    ["white space first", rawFile(` ${JSON.stringify(good)}`, 4), /does not start with/],
    ["a list", rawFile("[]", 0), /does not start with/],
    ["no JSON after all", rawFile('{"a":{"dtype":', 0), /its dtype is not a string/],
    ["an unfinished header", rawFile('{"a":{"dtype":"U8"', 0), /invalid JSON at 18: expected "," or "}"/],
    ["invalid JSON in an ignored key", rawFile('{"a":{"x":[1,{"y":tru}]}}', 0), /invalid JSON at 18/],
    ["deep nesting in an ignored key", rawFile(`{"a":{"x":${"[".repeat(200)}`, 0), /128 levels/],
    ["two shapes", rawFile('{"a":{"shape":[1],"shape":[1]}}', 0), /the key "shape" comes twice/],
    ["65 dimensions", rawFile({ a: U8(0, 1, Array(65).fill(1)) }, 1), /shape is not a list/],
    ["NUL padding", rawFile(`${JSON.stringify(good)}\0`, 4), /invalid JSON/],
    ["invalid UTF-8", rawFile(Buffer.from([0x7b, 0x22, 0xff, 0x22, 0x3a, 0x31, 0x7d])), /UTF-8/],
    [
      "duplicate names",
      rawFile(`{"a":${JSON.stringify(U8(0, 1))},"a":${JSON.stringify(U8(0, 1))}}`, 1),
      /the key "a" comes twice/,
    ],
    ["metadata that is no object", rawFile({ __metadata__: ["x"] }), /__metadata__ is not an object/],
    ["metadata that is no string", rawFile({ __metadata__: { x: 1 } }), /value of "x" is not a string/],
    ["a tensor that is no object", rawFile({ a: 1 }), /tensor "a": is not described/],
    ["no dtype", rawFile({ a: { shape: [], data_offsets: [0, 0] } }), /unknown dtype \(none given\)/],
    ["an unknown dtype", rawFile({ a: { ...U8(0, 1), dtype: "U7" } }, 1), /unknown dtype "U7"/],
    ["a dtype from the prototype", rawFile({ a: { ...U8(0, 1), dtype: "toString" } }, 1), /unknown dtype/],
    ["no shape", rawFile({ a: { dtype: "U8", data_offsets: [0, 1] } }, 1), /has no shape/],
    ["a negative size", rawFile({ a: U8(0, 1, [-1]) }, 1), /shape is not a list/],
    ["a float size", rawFile('{"a":{"dtype":"U8","shape":[1.0],"data_offsets":[0,1]}}', 1), /shape is not a list/],
    ["a size beyond 2^53", rawFile('{"a":{"dtype":"U8","shape":[9007199254740993],"data_offsets":[0,1]}}', 1), /shape/],
    ["a product beyond 2^53", rawFile({ a: U8(0, 1, [2 ** 40, 2 ** 40]) }, 1), /more bytes than can be counted/],
    ["a product that overflows before a zero", rawFile({ a: U8(0, 0, [2 ** 40, 2 ** 40, 0]) }), /than can be counted/],
    ["bits beyond 2^53", rawFile({ a: { ...U8(0, 1, [2 ** 50]), dtype: "F64" } }, 1), /more bytes than can be counted/],
    ["no offsets", rawFile({ a: { dtype: "U8", shape: [1] } }, 1), /data_offsets is not a pair/],
    ["three offsets", rawFile({ a: { ...U8(0, 1), data_offsets: [0, 1, 1] } }, 1), /data_offsets is not a pair/],
    ["backward offsets", rawFile({ a: { ...U8(0, 1), data_offsets: [1, 0] } }, 1), /run backwards/],
    ["offsets behind the end", rawFile({ a: U8(0, 2) }, 1), /end behind the data/],
    ["a wrong size", rawFile({ a: U8(0, 2, [3]) }, 2), /U8 of shape \[3\] takes 3 bytes, data_offsets give it 2/],
    ["half a byte", rawFile({ a: { ...U8(0, 1, [1]), dtype: "F4" } }, 1), /takes 0.5 bytes/],
    ["an overlap", rawFile({ a: U8(0, 2), b: U8(1, 3) }, 3), /"b" overlaps/],
    ["a repeated range", rawFile({ a: U8(0, 2), b: U8(0, 2) }, 2), /overlaps/],
    ["a gap", rawFile({ a: U8(0, 1), b: U8(2, 3) }, 3), /"b" leaves a gap/],
    ["a gap at the start", rawFile({ a: U8(1, 2) }, 2), /"a" leaves a gap/],
    ["data nobody claims", rawFile(good, 5), /data that no tensor claims/],
    ["data only", rawFile("{}", 5), /data that no tensor claims/],
    ["an empty tensor inside another", rawFile({ a: U8(0, 2), b: U8(1, 1, [0]) }, 2), /"b" overlaps/],
  ])("refuses %s", async (_, bytes, problem) => {
    const path = write(bytes);
    const error = await rejection(SafetensorsFile.open(path));
    expect(error).toBeInstanceOf(FormatError);
    expect(error).toMatchObject({ format: "safetensors", where: path, problem: expect.stringMatching(problem) });
  });

  it("keeps long names out of messages", () => {
    const header = Buffer.from(JSON.stringify({ ["x".repeat(10_000)]: 1 }));
    let message = "";
    try {
      parseSafetensorsHeader(header, 0, "file");
    } catch (error) {
      message = (error as Error).message;
    }
    expect(message).toMatch(/x\.\.\.": is not described/);
    expect(message.length).toBeLessThan(400);
  });

  it("knows the sizes of all dtypes", () => {
    const bits: Partial<Record<SafetensorsDType, number>> = {
      F4: 4,
      F6_E2M3: 6,
      F6_E3M2: 6,
      BOOL: 8,
      BF16: 16,
      C64: 64,
    };
    expect(SAFETENSORS_BITS).toMatchObject(bits);
    expect(SAFETENSORS_DTYPES).toHaveLength(22);
  });
});
