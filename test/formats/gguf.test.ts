import { mkdtempSync, rmSync, truncateSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, describe, expect, it } from "vitest";
import { ArgumentError, DisposedError, FormatError, UnsupportedError } from "#halfbyte/core/errors.js";
import { type GgufFile, MAX_GGUF_HEADER_BYTES, openGguf } from "#halfbyte/formats/gguf.js";
import { GGML_TYPES, type GgmlType } from "#halfbyte/formats/gguf-types.js";
import {
  ByteWriter,
  bool,
  f32,
  type GgufSpec,
  ggufBytes,
  list,
  randomBlocks,
  seeded,
  type TensorSpec,
  type Typed,
  text,
  u32,
} from "../helpers/gguf-writer.js";

const folder = mkdtempSync(join(tmpdir(), "halfbyte-gguf-"));
afterAll(() => rmSync(folder, { recursive: true }));

let files = 0;
function save(bytes: Uint8Array): string {
  const path = join(folder, `${files++}.gguf`);
  writeFileSync(path, bytes);
  return path;
}

async function read(bytes: Uint8Array): Promise<GgufFile> {
  const file = await openGguf(save(bytes));
  await file.close();
  return file;
}

const fails = async (bytes: Uint8Array, message: RegExp): Promise<void> => {
  const opening = openGguf(save(bytes));
  await expect(opening).rejects.toBeInstanceOf(FormatError);
  await expect(opening).rejects.toThrow(message);
};

const tensor = (name: string, type: GgmlType, shape: number[], more: Partial<TensorSpec> = {}): TensorSpec => ({
  name,
  type,
  shape,
  ...more,
  data: more.data ?? randomBlocks(type, shape, seeded(name.length)),
});

const withTensors = (...tensors: TensorSpec[]): Buffer => ggufBytes({ tensors });
const withEntry = (key: string, value: Typed): Buffer => ggufBytes({ metadata: [[key, value]] });

describe("openGguf", () => {
  it("reads every value type", async () => {
    const metadata: GgufSpec["metadata"] = [
      ["u8", { type: "uint8", value: 255 }],
      ["i8", { type: "int8", value: -128 }],
      ["u16", { type: "uint16", value: 65535 }],
      ["i16", { type: "int16", value: -32768 }],
      ["u32", u32(0xffffffff)],
      ["i32", { type: "int32", value: -2147483648 }],
      ["f32", f32(0.1)],
      ["f64", { type: "float64", value: 0.1 }],
      ["u64", { type: "uint64", value: 2 ** 53 - 1 }],
      ["u64 large", { type: "uint64", value: 2n ** 64n - 1n }],
      ["i64", { type: "int64", value: -(2 ** 53 - 1) }],
      ["i64 large", { type: "int64", value: -(2n ** 63n) }],
      ["yes", bool(true)],
      ["no", bool(false)],
      ["text", text("naïve \u{1f600}\u0000")],
      ["empty", text("")],
      ["byte order mark and U+FFFD", text("\ufeff\ufffd")],
      ["__proto__", text("a key like any other")],
      ["bytes", list("uint8", [1, 2])],
      ["signed", list("int32", [-1, 3])],
      ["floats", list("float32", [0.5, Number.NaN])],
      ["doubles", list("float64", [1e300])],
      ["flags", list("bool", [true, false])],
      ["longs", list("uint64", [1, 2n ** 63n])],
      ["words", list("string", ["a", "", "\ufeffb"])],
      ["none", list("string", [])],
      [
        "nested",
        { type: "array", element: "array", value: [list("uint16", [7]), list("string", ["x"]), list("int8", [])] },
      ],
    ];
    const { metadata: got, tensors, version } = await read(ggufBytes({ metadata }));
    expect(version).toBe(3);
    expect(tensors.size).toBe(0);
    expect(Object.fromEntries(got)).toEqual({
      u8: 255,
      i8: -128,
      u16: 65535,
      i16: -32768,
      u32: 0xffffffff,
      i32: -2147483648,
      f32: Math.fround(0.1),
      f64: 0.1,
      u64: 2 ** 53 - 1,
      "u64 large": 2n ** 64n - 1n,
      i64: -(2 ** 53 - 1),
      "i64 large": -(2n ** 63n),
      yes: true,
      no: false,
      text: "naïve \u{1f600}\u0000",
      empty: "",
      "byte order mark and U+FFFD": "\ufeff\ufffd",
      ["__proto__"]: "a key like any other",
      bytes: Uint8Array.of(1, 2),
      signed: Int32Array.of(-1, 3),
      floats: Float32Array.of(0.5, Number.NaN),
      doubles: Float64Array.of(1e300),
      flags: [true, false],
      longs: [1, 2n ** 63n],
      words: ["a", "", "\ufeffb"],
      none: [],
      nested: [Uint16Array.of(7), ["x"], new Int8Array(0)],
    });
  });

  it("reads the tensor table and the bytes of tensors, of versions 2 and 3 and any alignment", async () => {
    for (const [version, alignment] of [
      [2, 32],
      [3, 32],
      [3, 1],
      [3, 4096],
    ] as const) {
      const tensors = [
        tensor("a", "F32", [3]),
        tensor("b", "Q4_0", [5, 64]),
        tensor("c", "F16", [2, 3, 7]),
        tensor("scalar", "F32", []),
        tensor("nothing", "F32", [0, 8]),
      ];
      const metadata: GgufSpec["metadata"] = alignment === 32 ? [] : [["general.alignment", u32(alignment)]];
      const file = await openGguf(save(ggufBytes({ version, alignment, metadata, tensors })));
      expect(file.version).toBe(version);
      expect(file.dataOffset % alignment).toBe(0);
      expect([...file.tensors.keys()]).toEqual(["a", "b", "c", "scalar", "nothing"]);
      for (const { name, shape, type, data } of tensors) {
        const found = file.tensors.get(name)!;
        expect(found).toMatchObject({ name, shape, type, bytes: data.byteLength });
        expect(await file.read(found, 0, data.byteLength)).toEqual(data);
      }
      const b = file.tensors.get("b")!;
      expect(await file.read(b, 18, 36)).toEqual(tensors[1]!.data.slice(18, 54));
      expect(await file.read(b, 18, 0)).toHaveLength(0);
      await expect(file.read(b, 170, 11)).rejects.toBeInstanceOf(ArgumentError);
      await file.close();
      await file.close();
      await expect(file.read(b, 0, 18)).rejects.toBeInstanceOf(DisposedError);
    }
  });

  it("reads headers of several chunks", async () => {
    const words = Array.from({ length: 120_000 }, (_, i) => `word ${i} ${"x".repeat(i % 40)}`);
    const numbers = Array.from({ length: 200_000 }, (_, i) => i);
    const file = await read(
      ggufBytes({
        metadata: [
          ["words", list("string", words)],
          ["numbers", list("uint32", numbers)],
          ["last", u32(1)],
        ],
        tensors: [tensor("t", "F32", [2])],
      }),
    );
    expect(file.dataOffset).toBeGreaterThan(5e6);
    expect(file.metadata.get("words")).toEqual(words);
    expect(file.metadata.get("numbers")).toEqual(Uint32Array.from(numbers));
    expect(file.metadata.get("last")).toBe(1);
    expect(file.tensors.has("t")).toBe(true);
  });

  it("knows the size of every tensor type", async () => {
    const names = Object.keys(GGML_TYPES) as GgmlType[];
    const tensors = names.map((type) => tensor(type, type, [2, GGML_TYPES[type].blockElements]));
    const file = await read(ggufBytes({ tensors }));
    for (const name of names) expect(file.tensors.get(name)!.bytes).toBe(2 * GGML_TYPES[name].blockBytes);
  });

  it("refuses what is no GGUF file of versions 2 and 3", async () => {
    await fails(Buffer.from(""), /magic takes 4 bytes, but 0 bytes are left of the file/);
    await fails(Buffer.from("GG"), /magic takes 4 bytes/);
    await fails(Buffer.from("PK\u0003\u0004 something else entirely"), /does not begin with 'GGUF'/);
    await fails(ggufBytes({ version: 1 }), /version 1 cannot be read/);
    await fails(ggufBytes({ version: 4 }), /unknown GGUF version 4/);
    await fails(ggufBytes({ version: 0 }), /unknown GGUF version 0/);
    await fails(ggufBytes({ version: 0x03000000 }), /big-endian/);
    await expect(openGguf(join(folder, "absent.gguf"))).rejects.toThrow(/absent.gguf: cannot be opened: ENOENT/);
    await expect(openGguf(folder)).rejects.toBeInstanceOf(FormatError);
  });

  it("refuses a file cut off anywhere in its header, and in its last tensor", async () => {
    const bytes = ggufBytes({
      metadata: [
        ["general.architecture", text("llama")],
        ["list", list("string", ["one", "two"])],
        ["numbers", list("float32", [1, 2, 3])],
        ["flag", bool(true)],
      ],
      tensors: [tensor("a", "Q8_0", [3, 32]), tensor("b", "F32", [3])],
    });
    const whole = await read(bytes);
    const last = whole.tensors.get("b")!;
    const end = last.offset + last.bytes;
    await read(bytes.subarray(0, end));
    for (let length = 0; length < end; length++) {
      await expect(openGguf(save(bytes.subarray(0, length)))).rejects.toBeInstanceOf(FormatError);
    }
  });

  it("refuses counts and lengths that the file cannot hold", async () => {
    const start = (): ByteWriter => new ByteWriter().raw(Buffer.from("GGUF")).number("uint32", 3);
    const entry = (): ByteWriter => start().number("uint64", 0).number("uint64", 1);
    for (const huge of [1000n, 2n ** 32n, 2n ** 53n, 2n ** 63n, 2n ** 64n - 1n]) {
      const padding = new Uint8Array(64);
      await fails(start().number("uint64", huge).number("uint64", 0).raw(padding).finish(), /tensor count is/);
      await fails(start().number("uint64", 0).number("uint64", huge).raw(padding).finish(), /metadata count is/);
      await fails(entry().number("uint64", huge).raw(padding).finish(), /metadata key/);
      for (const element of [0, 4, 7, 8, 9, 10]) {
        const array = entry().string("k").number("uint32", 9).number("uint32", element).number("uint64", huge);
        await fails(array.raw(padding).finish(), /length of 'k' is/);
      }
      const word = entry().string("k").number("uint32", 8).number("uint64", huge).raw(padding);
      await fails(word.finish(), /'k'/);
    }
  });

  it("refuses malformed metadata", async () => {
    const entry = (key: string): ByteWriter =>
      new ByteWriter()
        .raw(Buffer.from("GGUF"))
        .number("uint32", 3)
        .number("uint64", 0)
        .number("uint64", 1)
        .string(key)
        .number("uint32", 9);
    await fails(withEntry("k", { type: "bool", value: 2 }), /'k' is a bool of value 2/);
    await fails(
      ggufBytes({
        metadata: [
          ["twice", u32(1)],
          ["once", u32(1)],
          ["twice", text("x")],
        ],
      }),
      /duplicate metadata key 'twice'/,
    );
    await fails(entry("k").number("uint32", 13).number("uint64", 0).finish(), /array of unknown type 13/);
    const bytes = withEntry("k", u32(1));
    bytes.writeUInt32LE(99, 24 + 8 + 1);
    await fails(bytes, /'k' has unknown type 99/);
    const latin1 = withEntry("k", text("abc"));
    latin1[latin1.lastIndexOf("abc") + 1] = 0xe4;
    await fails(latin1, /'k' is not valid UTF-8/);
    let deep: Typed = list("uint8", [1]);
    for (let i = 0; i < 8; i++) deep = { type: "array", element: "array", value: [deep] };
    await fails(withEntry("k", deep), /nests arrays deeper than 8/);
  });

  it("refuses a header above the limit without reading it", async () => {
    const length = MAX_GGUF_HEADER_BYTES + 1024;
    const bytes = new ByteWriter()
      .raw(Buffer.from("GGUF"))
      .number("uint32", 3)
      .number("uint64", 0)
      .number("uint64", 1)
      .string("k")
      .number("uint32", 8)
      .number("uint64", length)
      .finish();
    const path = save(bytes);
    truncateSync(path, length + 4096);
    await expect(openGguf(path)).rejects.toThrow(/that a header may span/);
  });

  it("refuses a bad alignment", async () => {
    for (const value of [u32(0), u32(33), u32(48), text("32"), f32(0.5), list("uint32", [32])]) {
      await fails(withEntry("general.alignment", value), /general.alignment is .*expected a power of two/);
    }
  });

  it("refuses a malformed tensor table", async () => {
    await fails(withTensors(tensor("t", "F32", [4], { typeId: 77 })), /tensor 't' has unknown type 77/);
    await fails(withTensors(tensor("t", "F32", [4], { typeId: 4 })), /unknown type 4/);
    await fails(withTensors(tensor("t", "F32", [1, 1, 1, 1, 1])), /'t' has 5 dimensions, expected at most 4/);
    await fails(withTensors(tensor("t", "F32", [4]), tensor("t", "F32", [4])), /duplicate tensor 't'/);
    await fails(withTensors(tensor("t", "Q4_K", [1, 128], { data: new Uint8Array(144) })), /rows of 128 elements/);
    await fails(withTensors(tensor("t", "F32", [4], { offset: 16 })), /not a multiple of the alignment 32/);
    await fails(withTensors(tensor("t", "F32", [4], { offset: 32 })), /ends at byte \d+, but the file has/);
    await fails(withTensors(tensor("t", "F32", [4], { offset: 2 ** 50 })), /ends at byte/);
    await fails(withTensors(tensor("t", "F32", [2 ** 30, 2 ** 30], { data: new Uint8Array(4) })), /more than any file/);
    await fails(withTensors(tensor("t", "F32", [2 ** 31, 2 ** 20], { data: new Uint8Array(4) })), /ends at byte/);
    await fails(
      withTensors(tensor("a", "F32", [16]), tensor("b", "F32", [4], { offset: 32 })),
      /tensors 'a' and 'b' overlap/,
    );
    await fails(
      withTensors(tensor("a", "F32", [4], { offset: 32 }), tensor("b", "F32", [16], { offset: 0 })),
      /tensors 'b' and 'a' overlap/,
    );
  });

  it("allows gaps, any order, and empty tensors anywhere", async () => {
    const file = await read(
      withTensors(
        tensor("late", "F32", [4], { offset: 96 }),
        tensor("empty", "F32", [0], { offset: 32 }),
        tensor("early", "F32", [20], { offset: 0, data: new Uint8Array(96) }),
      ),
    );
    expect(file.tensors.get("late")!.offset - file.tensors.get("early")!.offset).toBe(96);
  });

  it("names split models", async () => {
    const part: Typed = { type: "uint16", value: 3 };
    const opening = openGguf(save(withEntry("split.count", part)));
    await expect(opening).rejects.toBeInstanceOf(UnsupportedError);
    await expect(opening).rejects.toThrow(/one of 3 parts.*join/);
    await read(withEntry("split.count", { type: "uint16", value: 1 }));
  });

  it("notices a file that shrinks while it is open", async () => {
    const path = save(withTensors(tensor("t", "F32", [64])));
    const file = await openGguf(path);
    writeFileSync(path, "");
    await expect(file.read(file.tensors.get("t")!, 0, 256)).rejects.toThrow(/cut off at byte \d+ while it was read/);
    await file.close();
  });
});
