import { describe, expect, it } from "vitest";
import { type DType, TORCH_NAME } from "#halfbyte/core/dtype.js";
import { ArgumentError, FormatError } from "#halfbyte/core/errors.js";
import {
  checkFourBit,
  fourBitDeclarations,
  fourBitNames,
  int8Declarations,
  int8Names,
  listQuantized,
  QUANT_STORAGE,
  type QuantStorage,
  readFourBit,
  readInt8,
  readQuantState,
} from "#halfbyte/formats/bnb.js";
import { bytesOfShape } from "#halfbyte/formats/safetensors.js";
import { type ModelSource, rowRange } from "#halfbyte/formats/source.js";
import { parsePyJson, toPlain } from "#halfbyte/quant/pyjson.js";
import { type FourBitMeta, formatQuantState, parseQuantState } from "#halfbyte/quant/state-json.js";
import { dataOf, entries, failure, rejection, type TestTensor } from "../helpers/checkpoint.js";

const utf8 = (text: string) => new TextEncoder().encode(text);
const text = (bytes: Uint8Array) => new TextDecoder().decode(bytes);

/** A source in memory. */
function sourceOf(tensors: Record<string, TestTensor>): ModelSource {
  const map = entries(tensors);
  return {
    path: "memory",
    kind: "safetensors",
    config: {},
    tensors: map,
    sidecars: new Map(),
    storedBytes: (name) => dataOf(name, tensors[name]!).length,
    readRows: async (name, begin, end) => {
      const { offset, bytes } = rowRange(map.get(name)!, begin, end);
      return new Uint8Array(dataOf(name, tensors[name]!).slice(offset, offset + bytes));
    },
    close: async () => {},
  };
}

// What bitsandbytes 0.50.2 puts into a state dict of Linear4bit(96, 70).
const PLAIN_STATE = '{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [70, 96]}';
const NESTED_STATE =
  '{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [70, 96], "nested_blocksize": 256, ' +
  '"nested_dtype": "float32", "nested_offset": 2.615773916244507}';

function fourBit(change: Record<string, TestTensor | undefined> = {}): Record<string, TestTensor> {
  return merge(
    {
      "m.bias": { dtype: "F32", shape: [70] },
      "m.weight": { dtype: "U8", shape: [3360, 1] },
      "m.weight.absmax": { dtype: "F32", shape: [105] },
      "m.weight.quant_map": { dtype: "F32", shape: [16] },
      "m.weight.quant_state.bitsandbytes__nf4": { dtype: "U8", shape: [PLAIN_STATE.length], data: utf8(PLAIN_STATE) },
    },
    change,
  );
}

function nested(change: Record<string, TestTensor | undefined> = {}): Record<string, TestTensor> {
  return merge(
    fourBit({
      "m.weight.absmax": { dtype: "U8", shape: [105] },
      "m.weight.nested_absmax": { dtype: "F32", shape: [1] },
      "m.weight.nested_quant_map": { dtype: "F32", shape: [256] },
      "m.weight.quant_state.bitsandbytes__nf4": { dtype: "U8", shape: [NESTED_STATE.length], data: utf8(NESTED_STATE) },
    }),
    change,
  );
}

function merge(base: Record<string, TestTensor>, change: Record<string, TestTensor | undefined>) {
  const all = Object.entries({ ...base, ...change });
  return Object.fromEntries(all.filter((entry): entry is [string, TestTensor] => entry[1] !== undefined));
}

describe("quant states", () => {
  it.each([
    PLAIN_STATE,
    NESTED_STATE,
    '{"quant_type": "nf4", "blocksize": 4096, "dtype": "float16", "shape": [1]}',
    '{"quant_type": "nf4", "blocksize": 32, "dtype": "float32", "shape": [0, 7, 3], "nested_blocksize": 256, ' +
      '"nested_dtype": "bfloat16", "nested_offset": 1e-05}',
  ])("round-trips %s", (json) => {
    const meta = parseQuantState(utf8(json), "nf4", "w");
    expect(text(formatQuantState(meta))).toBe(json);
  });

  it("reads what it says", () => {
    expect(parseQuantState(utf8(NESTED_STATE), "nf4", "w")).toEqual({
      quantType: "nf4",
      blocksize: 64,
      dtype: "bf16",
      shape: [70, 96],
      nested: { blocksize: 256, dtype: "f32", offset: 2.615773916244507 },
    });
    const int = NESTED_STATE.replace("2.615773916244507", "2");
    expect(parseQuantState(utf8(int), "nf4", "w").nested?.offset).toBe(2);
  });

  it.each<[string, RegExp]>([
    ["", /invalid JSON/],
    ["[]", /is not a JSON object/],
    [PLAIN_STATE.slice(0, -1), /invalid JSON/],
    [PLAIN_STATE.replace("nf4", "fp4"), /quant_type is "fp4", but the tensor's name says nf4/],
    [PLAIN_STATE.replace('"quant_type": "nf4", ', ""), /quant_type is missing/],
    [PLAIN_STATE.replace("64", "16"), /blocksize is 16: expected one of 32, 64/],
    [PLAIN_STATE.replace("64", "8192"), /blocksize is 8192/],
    [PLAIN_STATE.replace("64", "100"), /blocksize is 100/],
    [PLAIN_STATE.replace("64", "64.0"), /blocksize is 64.0/],
    [PLAIN_STATE.replace("64", '"64"'), /blocksize is "64"/],
    [PLAIN_STATE.replace("64", "-64"), /blocksize is -64/],
    [PLAIN_STATE.replace("bfloat16", "int8"), /dtype is "int8": expected float32/],
    [PLAIN_STATE.replace('"bfloat16"', "7"), /dtype is 7/],
    [PLAIN_STATE.replace("[70, 96]", "[]"), /shape is \[\]/],
    [PLAIN_STATE.replace("[70, 96]", "null"), /shape is null/],
    [PLAIN_STATE.replace("[70, 96]", "[70, -96]"), /shape is \[70, -96\]/],
    [PLAIN_STATE.replace("[70, 96]", "[70.0, 96]"), /shape is \[70.0, 96\]/],
    [PLAIN_STATE.replace("[70, 96]", "[4294967296, 4294967296]"), /more elements than can be counted/],
    [PLAIN_STATE.replace("}", ', "extra": 1}'), /unknown key "extra"/],
    [PLAIN_STATE.replace("}", ', "__proto__": 1}'), /unknown key "__proto__"/],
    [
      NESTED_STATE.replace(', "nested_offset": 2.615773916244507', ""),
      /has nested_blocksize, nested_dtype, but no nested_offset/,
    ],
    [NESTED_STATE.replace('"nested_blocksize": 256, ', ""), /but no nested_blocksize/],
    [NESTED_STATE.replace("256", "255"), /nested_blocksize is 255/],
    [NESTED_STATE.replace('"float32"', '"uint8"'), /nested_dtype is "uint8"/],
    [NESTED_STATE.replace("2.615773916244507", "NaN"), /nested_offset is NaN: expected a finite number/],
    [NESTED_STATE.replace("2.615773916244507", '"2"'), /nested_offset is "2"/],
    [PLAIN_STATE.padEnd((1 << 16) + 1), /has 65537 bytes/],
  ])("refuses %s", (json, problem) => {
    const error = failure(() => parseQuantState(utf8(json), "nf4", "m.weight"));
    expect(error).toBeInstanceOf(FormatError);
    expect(error.message).toMatch(problem);
    expect(error.message).toMatch(/^\[quant_state\] m.weight: /);
  });
});

describe("listQuantized", () => {
  it("sorts a checkpoint", () => {
    const tensors = {
      ...nested(),
      "x.weight": { dtype: "I8", shape: [5, 9] },
      "x.SCB": { dtype: "F32", shape: [5] },
      "x.weight_format": { dtype: "U8", shape: [] },
      "y.weight": { dtype: "I8", shape: [2, 3] },
      "y.SCB": { dtype: "F32", shape: [2] },
      "norm.weight": { dtype: "F32", shape: [4] },
      "other.weight": { dtype: "I8", shape: [2, 3] },
      "other.absmax": { dtype: "F32", shape: [2] },
      "other.quant_map": { dtype: "F32", shape: [16] },
    } satisfies Record<string, TestTensor>;
    const found = listQuantized(entries(tensors));
    expect([...found.fourBit.keys()]).toEqual(["m.weight"]);
    expect(found.fourBit.get("m.weight")).toMatchObject({
      quantType: "nf4",
      weight: { name: "m.weight" },
      nestedQuantMap: { name: "m.weight.nested_quant_map" },
    });
    expect([...found.int8.keys()]).toEqual(["x.weight", "y.weight"]);
    expect(found.int8.get("y.weight")!.weightFormat).toBeUndefined();
    expect(found.plain).toEqual(["m.bias", "norm.weight", "other.weight", "other.absmax", "other.quant_map"]);
  });

  it("finds nothing in a plain checkpoint", () => {
    const found = listQuantized(entries({ a: { dtype: "F32", shape: [1] } }));
    expect(found).toEqual({ fourBit: new Map(), int8: new Map(), plain: ["a"] });
  });

  const state = (type: string): TestTensor => ({ dtype: "U8", shape: [4], data: utf8(type) });
  it.each<[string, Record<string, TestTensor>, RegExp]>([
    ["two states", fourBit({ "m.weight.quant_state.bitsandbytes__fp4": state("fp4") }), /more than one quant_state/],
    [
      "an unknown type",
      fourBit({
        "m.weight.quant_state.bitsandbytes__nf4": undefined,
        "m.weight.quant_state.bitsandbytes__int4": state("x"),
      }),
      /type "int4": expected nf4 or fp4/,
    ],
    ["no state", fourBit({ "m.weight.quant_state.bitsandbytes__nf4": undefined }), /m.weight: lacks its quant_state/],
    ["no weight", fourBit({ "m.weight": undefined }), /has a quant_state, but "m.weight" is missing/],
    ["no absmax", fourBit({ "m.weight.absmax": undefined }), /"m.weight.absmax" is missing/],
    ["no quant_map", fourBit({ "m.weight.quant_map": undefined }), /"m.weight.quant_map" is missing/],
    [
      "no nested_quant_map",
      nested({ "m.weight.nested_quant_map": undefined }),
      /"m.weight.nested_quant_map" is missing/,
    ],
    ["no nested_absmax", nested({ "m.weight.nested_absmax": undefined }), /"m.weight.nested_absmax" is missing/],
    ["packed codes of rank 1", fourBit({ "m.weight": { dtype: "U8", shape: [3360] } }), /a column \[n, 1\]/],
    ["packed codes in a row", fourBit({ "m.weight": { dtype: "U8", shape: [1, 3360] } }), /a column \[n, 1\]/],
    [
      "packed codes as I64",
      fourBit({ "m.weight": { dtype: "I64", shape: [420, 1] } }),
      /stored as I64, which no quant_storage is/,
    ],
    [
      "absmax F16",
      fourBit({ "m.weight.absmax": { dtype: "F16", shape: [105] } }),
      /expected F32 \[105\], found F16 \[105\]/,
    ],
    [
      "absmax U8 alone",
      fourBit({ "m.weight.absmax": { dtype: "U8", shape: [105] } }),
      /expected F32 \[105\], found U8/,
    ],
    [
      "absmax F32 nested",
      nested({ "m.weight.absmax": { dtype: "F32", shape: [105] } }),
      /expected U8 \[105\], found F32/,
    ],
    ["a scalar absmax", fourBit({ "m.weight.absmax": { dtype: "F32", shape: [] } }), /found F32 \[\]/],
    [
      "17 values",
      fourBit({ "m.weight.quant_map": { dtype: "F32", shape: [17] } }),
      /expected F32 \[16\], found F32 \[17\]/,
    ],
    ["255 values", nested({ "m.weight.nested_quant_map": { dtype: "F32", shape: [255] } }), /expected F32 \[256\]/],
    [
      "a state of floats",
      fourBit({ "m.weight.quant_state.bitsandbytes__nf4": { dtype: "F32", shape: [78] } }),
      /expected U8/,
    ],
    [
      "a huge state",
      fourBit({ "m.weight.quant_state.bitsandbytes__nf4": { dtype: "U8", shape: [70000] } }),
      /at most 65536 bytes/,
    ],
    ["SCB without weight", { "x.SCB": { dtype: "F32", shape: [5] } }, /are the scales of "x.weight", which is missing/],
    [
      "SCB beside floats",
      { "x.SCB": { dtype: "F32", shape: [5] }, "x.weight": { dtype: "F16", shape: [5, 2] } },
      /expected I8/,
    ],
    [
      "SCB of a vector",
      { SCB: { dtype: "F32", shape: [5] }, weight: { dtype: "I8", shape: [5] } },
      /weight: expected I8 \[out, in\]/,
    ],
    [
      "too few scales",
      { "x.SCB": { dtype: "F32", shape: [4] }, "x.weight": { dtype: "I8", shape: [5, 2] } },
      /expected F32 \[5\]/,
    ],
    [
      "a list of formats",
      {
        "x.SCB": { dtype: "F32", shape: [5] },
        "x.weight": { dtype: "I8", shape: [5, 2] },
        "x.weight_format": { dtype: "U8", shape: [3] },
      },
      /expected one U8/,
    ],
  ])("refuses %s", (_, tensors, problem) => {
    const error = failure(() => listQuantized(entries(tensors)));
    expect(error).toBeInstanceOf(FormatError);
    expect(error.message).toMatch(problem);
  });

  it.each<[string, Record<string, TestTensor>]>([
    ["scales transposed", fourBit({ "m.weight.absmax": { dtype: "BF16", shape: [3, 35] } })],
    [
      "codes repacked too",
      fourBit({ "m.weight": { dtype: "U8", shape: [70, 48] }, "m.weight.absmax": { dtype: "BF16", shape: [3, 35] } }),
    ],
  ])("explains a checkpoint that was saved after a forward pass on a CPU (%s)", (_, tensors) => {
    const error = failure(() => listQuantized(entries(tensors)));
    expect(error.message).toMatch(
      /m.weight: its absmax is BF16 \[3, 35\]: the model was saved after a forward pass on a CPU/,
    );
  });
});

describe("sizes", () => {
  const keysOf = (tensors: Record<string, TestTensor>) => listQuantized(entries(tensors)).fourBit.get("m.weight")!;
  const plain: FourBitMeta = { quantType: "nf4", blocksize: 64, dtype: "bf16", shape: [70, 96] };
  const twice: FourBitMeta = { ...plain, nested: { blocksize: 256, offset: 1 } };

  it("fit", () => {
    checkFourBit(keysOf(fourBit()), plain);
    checkFourBit(keysOf(nested()), twice);
  });

  it.each<[string, Record<string, TestTensor>, FourBitMeta, RegExp]>([
    [
      "codes",
      fourBit(),
      { ...plain, shape: [70, 97] },
      /the codes of \[70, 97\] take \[3395, 1\] of U8, found \[3360, 1\]/,
    ],
    ["scales", fourBit(), { ...plain, blocksize: 128 }, /m.weight.absmax: expected F32 \[53\], found F32 \[105\]/],
    [
      "nested scales",
      nested(),
      { ...twice, nested: { blocksize: 32, offset: 0 } },
      /nested_absmax: expected F32 \[4\]/,
    ],
    ["plain tensors, nested state", fourBit(), twice, /says that absmax is quantized/],
    ["nested tensors, plain state", nested(), plain, /knows nothing of nested_absmax/],
  ])("do not fit: %s", (_, tensors, meta, problem) => {
    expect(failure(() => checkFourBit(keysOf(tensors), meta)).message).toMatch(problem);
  });

  it("recognises codes that bitsandbytes cut off", () => {
    // 9 elements are 5 bytes: float16 storage needs 3 items, bitsandbytes allocates floor(10 / 4) = 2.
    const small = { "m.weight.absmax": { dtype: "F32", shape: [1] } } satisfies Record<string, TestTensor>;
    const meta: FourBitMeta = { ...plain, shape: [9] };
    checkFourBit(keysOf(fourBit({ ...small, "m.weight": { dtype: "F16", shape: [3, 1] } })), meta);
    const short = keysOf(fourBit({ ...small, "m.weight": { dtype: "F16", shape: [2, 1] } }));
    expect(failure(() => checkFourBit(short, meta)).message).toMatch(/the last codes were never saved/);
  });
});

describe("reading", () => {
  it("gives the bytes of a 4-bit weight under any quant_storage", async () => {
    const codes = dataOf("m.weight", fourBit()["m.weight"]!);
    for (const [storage, dtype] of Object.entries(QUANT_STORAGE)) {
      const items = 3360 / bytesOfShape(dtype, [1])!;
      const tensors = nested({ "m.weight": { dtype, shape: [items, 1], data: codes } });
      const source = sourceOf(tensors);
      const keys = listQuantized(source.tensors).fourBit.get("m.weight")!;
      const { meta, packed, ...rest } = await readFourBit(source, keys);
      expect(meta.nested?.offset, storage).toBe(2.615773916244507);
      expect(Buffer.from(packed).equals(codes)).toBe(true);
      expect(Object.fromEntries(Object.entries(rest).map(([name, bytes]) => [name, bytes!.length]))).toEqual({
        absmax: 105,
        quantMap: 64,
        nestedAbsmax: 4,
        nestedQuantMap: 1024,
      });
    }
  });

  it("drops the padding of a wide quant_storage and checks the state", async () => {
    const json = '{"quant_type": "fp4", "blocksize": 64, "dtype": "float32", "shape": [9]}';
    const tensors: Record<string, TestTensor> = {
      w: { dtype: "F64", shape: [1, 1], data: Uint8Array.of(1, 2, 3, 4, 5, 0, 0, 0) },
      "w.absmax": { dtype: "F32", shape: [1] },
      "w.quant_map": { dtype: "F32", shape: [16] },
      "w.quant_state.bitsandbytes__fp4": { dtype: "U8", shape: [json.length], data: utf8(json) },
    };
    const source = sourceOf(tensors);
    const keys = listQuantized(source.tensors).fourBit.get("w")!;
    const { packed, nestedAbsmax } = await readFourBit(source, keys);
    expect(packed).toEqual(Uint8Array.of(1, 2, 3, 4, 5));
    expect(nestedAbsmax).toBeUndefined();
    tensors["w.quant_state.bitsandbytes__fp4"]!.data = utf8(json.replace("fp4", "nf4"));
    expect(await rejection(readQuantState(source, keys))).toBeInstanceOf(FormatError);
    tensors["w.quant_state.bitsandbytes__fp4"]!.data = utf8(json.replace("[9]", "[8]"));
    expect((await readQuantState(source, keys)).shape).toEqual([8]);
    tensors["w.quant_state.bitsandbytes__fp4"]!.data = utf8(json.replace("[9]", "[99]"));
    expect(await rejection(readQuantState(source, keys))).toBeInstanceOf(FormatError);
  });

  it("gives the bytes of an int8 weight, and refuses other layouts than rows", async () => {
    const tensors = (format: number): Record<string, TestTensor> => ({
      "x.weight": { dtype: "I8", shape: [2, 3], data: Uint8Array.of(1, 2, 3, 4, 5, 255) },
      "x.SCB": { dtype: "F32", shape: [2], data: new Uint8Array(Float32Array.of(1, 2).buffer) },
      "x.weight_format": { dtype: "U8", shape: [], data: Uint8Array.of(format) },
    });
    const read = (format: number) => {
      const source = sourceOf(tensors(format));
      return readInt8(source, listQuantized(source.tensors).int8.get("x.weight")!);
    };
    const { codes, scb } = await read(0);
    expect([...codes]).toEqual([1, 2, 3, 4, 5, 255]);
    expect([...new Float32Array(scb.buffer)]).toEqual([1, 2]);
    expect(await rejection(read(2))).toMatchObject({
      where: "x.weight_format",
      problem: expect.stringMatching(/^is 2: /),
    });
  });
});

describe("declarations", () => {
  it("match what is read back, for every type, nesting and storage", () => {
    for (const doubleQuant of [false, true]) {
      for (const storage of Object.keys(QUANT_STORAGE) as QuantStorage[]) {
        for (const shape of [[70, 96], [1], [9], [3, 5, 7], [0]]) {
          const plan = { quantType: "fp4", blocksize: 32, dtype: "f16", shape, doubleQuant, storage } as const;
          const declared = fourBitDeclarations("m.weight", plan);
          const meta: FourBitMeta = {
            ...plan,
            nested: doubleQuant ? { blocksize: 256, offset: -1.1754943508222875e-38 } : undefined,
          };
          const json = formatQuantState(meta);
          const tensors = Object.fromEntries(
            declared.map(({ name, dtype, shape: declaredShape }): [string, TestTensor] => {
              if ("atMost" in declaredShape) expect(json.length).toBeLessThanOrEqual(declaredShape.atMost);
              const isState = name === fourBitNames("m.weight", "fp4").quantState;
              return [name, { dtype, shape: isState ? [json.length] : (declaredShape as readonly number[]) }];
            }),
          );
          const found = listQuantized(entries(tensors));
          expect(found.plain).toEqual([]);
          checkFourBit(found.fourBit.get("m.weight")!, meta);
        }
      }
    }
  });

  it("of int8 weights", () => {
    expect(int8Declarations("a.weight", [4, 8])).toEqual([
      { name: "a.weight", dtype: "I8", shape: [4, 8] },
      { name: "a.SCB", dtype: "F32", shape: [4] },
      { name: "a.weight_format", dtype: "U8", shape: [] },
    ]);
    expect(int8Names("weight")).toEqual({ weight: "weight", scb: "SCB", weightFormat: "weight_format" });
    expect(() => int8Declarations("a.weight", [4])).toThrow(ArgumentError);
    expect(() => int8Names("a.kernel")).toThrow(ArgumentError);
    expect(() => int8Names("overweight")).toThrow(ArgumentError);
  });
});

describe("names", () => {
  it("of float dtypes are the ones that states use", () => {
    for (const dtype of ["f32", "f16", "bf16"] satisfies DType[]) {
      const json = text(formatQuantState({ quantType: "nf4", blocksize: 64, dtype, shape: [1] }));
      expect(toPlain(parsePyJson(json, "x", "y"))).toMatchObject({ dtype: TORCH_NAME[dtype] });
    }
  });
});
