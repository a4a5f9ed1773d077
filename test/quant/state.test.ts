import { afterAll, beforeAll, expect, test } from "vitest";
import {
  ArgumentError,
  dequantize4bit,
  dequantizeBlockwise,
  FormatError,
  init,
  memory,
  QuantState,
  type QuantStateDict,
  quantize4bit,
  quantizeBlockwise,
  shutdown,
  Tensor,
  tensor,
  UnsupportedError,
} from "#halfbyte/index.js";
import { normals } from "../helpers/random.js";

beforeAll(() => init({ threads: 2, guards: true }));
afterAll(() => shutdown());

function dispose(...things: (QuantStateDict | Tensor | QuantState)[]): void {
  for (const thing of things) {
    if (thing instanceof Tensor || thing instanceof QuantState) thing.dispose();
    else for (const value of Object.values(thing)) if (value instanceof Tensor) value.dispose();
  }
}

const text = (dict: QuantStateDict, key: string): string => Buffer.from((dict[key] as Tensor).bytesSync()).toString();

for (const compressStatistics of [false, true]) {
  for (const packed of [false, true]) {
    test(`4-bit, nested ${compressStatistics}, packed ${packed}: what comes back decodes to the same bits`, async () => {
      const before = memory().cpu!.tensors;
      const A = tensor(normals(10_001, "state"), { dtype: "bf16", shape: [73, 137] });
      const [codes, state] = quantize4bit(A, { quantType: "nf4", compressStatistics });
      const dict = await state.asDict(packed);
      const entries = Object.entries(dict);
      const prefixed = Object.fromEntries(entries.map(([key, value]) => [`model.q_proj.weight.${key}`, value]));
      const back = await QuantState.fromDict(packed ? prefixed : dict);
      const [y, z] = [dequantize4bit(codes, state), dequantize4bit(codes, back)];
      expect(Buffer.compare(y.bytesSync(), z.bytesSync())).toBe(0);
      const fields = { shape: [73, 137], dtype: "bf16", blocksize: 64, quantType: "nf4", nested: compressStatistics };
      expect(back).toMatchObject(fields);
      dispose(A, codes, state, dict, back, y, z);
      expect(memory().cpu!.tensors).toBe(before);
    });
  }
}

test("the packed text is what Python writes", async () => {
  const A = tensor(Float32Array.of(1e-5, 0, 0, 0));
  const [codes, state] = quantize4bit(A, { quantType: "fp4", compressStatistics: true });
  const dict = await state.asDict(true);
  const names = ["absmax", "nested_absmax", "nested_quant_map", "quant_map", "quant_state.bitsandbytes__fp4"];
  expect(Object.keys(dict).sort()).toEqual(names);
  expect(text(dict, "quant_state.bitsandbytes__fp4")).toBe(
    '{"quant_type": "fp4", "blocksize": 64, "dtype": "float32", "shape": [4], "nested_blocksize": 256, ' +
      '"nested_dtype": "float32", "nested_offset": 9.999999747378752e-06}',
  );
  dispose(A, codes, state, dict);
});

test("8-bit states go through the unpacked form", async () => {
  const A = tensor(normals(5000, "eight"));
  for (const nested of [false, true]) {
    const [codes, state] = quantizeBlockwise(A, { blocksize: 64, nested });
    await expect(state.asDict(true)).rejects.toThrow(ArgumentError);
    const dict = await state.asDict();
    const back = await QuantState.fromDict(dict);
    const [y, z] = [dequantizeBlockwise(codes, state), dequantizeBlockwise(codes, back)];
    expect(Buffer.compare(y.bytesSync(), z.bytesSync())).toBe(0);
    dispose(codes, state, dict, back, y, z);
  }
  A.dispose();
});

test("what does not fit together is refused by name, and nothing is kept", async () => {
  const A = tensor(normals(640, "bad"));
  const [codes, state] = quantize4bit(A, { quantType: "nf4", compressStatistics: true });
  const good = await state.asDict(true);
  const plain = await state.asDict();
  const before = memory().cpu!.tensors;
  const KEY = "quant_state.bitsandbytes__nf4";
  const { nested_absmax: _nested, ...incomplete } = good;
  const { absmax: _absmax, ...headless } = plain;
  const bad: [QuantStateDict, RegExp][] = [
    [incomplete, /nested_absmax: expected a f32 tensor of 1 elements, received nothing/],
    [headless, /absmax: expected a u8 tensor/],
    [{ ...good, absmax: good.quant_map! }, /absmax: expected a u8 tensor of 10 elements, received Tensor\(f32/],
    [{ ...good, quant_map: good.nested_quant_map! }, /quant_map: expected a f32 tensor of 16/],
    [{ ...good, "quant_state.bitsandbytes__fp4": good[KEY]! }, /expected one key, received 2/],
    [{ ...plain, blocksize: 0 }, /blocksize: expected one of 32, .*, received 0/],
    [{ ...plain, dtype: "int8" }, /dtype: expected float32, float16 or bfloat16/],
    [{ ...plain, quant_type: "nf5" }, /quant_type: expected nf4 or fp4/],
  ];
  for (const [dict, message] of bad) {
    const error = await QuantState.fromDict(dict).catch((e: unknown) => e);
    expect(error).toBeInstanceOf(ArgumentError);
    expect(String(error)).toMatch(message);
  }
  const texts: [string, new (...args: never[]) => Error][] = [
    ["{", FormatError],
    ['{"quant_type": "fp4"}', FormatError],
    [text(good, KEY).replace('"nested_dtype": "float32"', '"nested_dtype": "bfloat16"'), UnsupportedError],
  ];
  for (const [value, type] of texts) {
    const tampered = tensor(new Uint8Array(Buffer.from(value)));
    await expect(QuantState.fromDict({ ...good, [KEY]: tampered })).rejects.toBeInstanceOf(type);
    tampered.dispose();
  }
  expect(memory().cpu!.tensors).toBe(before);
  dispose(A, codes, state, good, plain);
});

test("block sizes that no kernel knows are refused by name", async () => {
  const A = tensor(normals(64 * 300, "sizes"));
  const [codes, state] = quantize4bit(A, { quantType: "nf4", compressStatistics: true });
  const dict = await state.asDict();
  for (const [key, size] of [
    ["nested_blocksize", 200],
    ["nested_blocksize", 2 ** 33],
    ["blocksize", 48],
  ] as const) {
    const error = QuantState.fromDict({ ...dict, [key]: size });
    await expect(error).rejects.toThrow(
      `[QuantState.fromDict] ${key}: expected one of 32, 64, 128, 256, 512, 1024, 2048, 4096, received ${size}`,
    );
  }
  const { state2, ...fields } = state;
  const odd = new QuantState({ ...fields, state2: new QuantState({ ...state2!, blocksize: 200 }) });
  expect(() => dequantize4bit(codes, odd)).toThrow(/\[dequantize4bit\] blocksize: expected one of 32.*received 200/);
  dispose(A, codes, state, dict);
});
