/**
 * Seeded mutations of headers, quant states, indexes and checkpoints' tensor lists: each gives a typed error or a valid
 * read. Another exception, a hang or an allocation beyond the file's size fails.
 */
import { readdirSync, writeFileSync } from "node:fs";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { HalfbyteError } from "#halfbyte/core/errors.js";
import { listQuantized, readFourBit, readInt8 } from "#halfbyte/formats/bnb.js";
import { readQuantizationConfig } from "#halfbyte/formats/bnb-config.js";
import { modulesToQuantize } from "#halfbyte/formats/bnb-modules.js";
import { openHfFolder } from "#halfbyte/formats/hf-folder.js";
import { bytesOfShape, parseSafetensorsHeader, SafetensorsFile } from "#halfbyte/formats/safetensors.js";
import { rowCount } from "#halfbyte/formats/source.js";
import { dumpPyJson, parsePyJson } from "#halfbyte/quant/pyjson.js";
import { formatQuantState, parseQuantState } from "#halfbyte/quant/state-json.js";
import { safetensorsBytes, type TestTensor, temporaryFolder } from "../helpers/checkpoint.js";
import { random } from "../helpers/random.js";

type Next = () => number;

const TOKENS = [
  ...'{}[]",:\\ \n\0-.eE0123456789',
  "null",
  "true",
  "NaN",
  "1e999",
  "-1",
  "1.5",
  "18446744073709551616",
  "9007199254740993",
  "4294967296",
  '"__proto__"',
  '"__metadata__"',
  '"constructor"',
  "\\ud800",
  "\u00ff",
  "[[[[[[[[",
  '{"a":',
  "../",
  '"F64"',
  '"F4"',
  '"U8"',
  "[0,0]",
];

/** One to four edits: bits flipped, bytes cut, tokens put in, numbers changed, pieces of the text copied elsewhere. */
function mutate(bytes: Uint8Array, next: Next): Buffer {
  let out = Buffer.from(bytes);
  for (let edits = 1 + (next() % 4); edits > 0; edits--) {
    const at = next() % (out.length + 1);
    const end = Math.min(out.length, at + (next() % 24));
    const token = Buffer.from(TOKENS[next() % TOKENS.length]!);
    switch (next() % 7) {
      case 0:
        if (at < out.length) out[at]! ^= 1 << (next() % 8);
        break;
      case 1:
        out = out.subarray(0, at);
        break;
      case 2:
        out = Buffer.concat([out.subarray(0, at), token, out.subarray(at)]);
        break;
      case 3:
        out = Buffer.concat([out.subarray(0, at), token, out.subarray(end)]);
        break;
      case 4: {
        const numbers = [...out.toString("latin1").matchAll(/\d+/g)];
        if (numbers.length === 0) break;
        const { index, 0: old } = numbers[next() % numbers.length]!;
        const value = [0, 1, 2 ** 31, 2 ** 53, -1, Number(old) + 1, Number(old) - 1, Number(old) * 2, 1e300][
          next() % 9
        ]!;
        out = Buffer.concat([out.subarray(0, index), Buffer.from(String(value)), out.subarray(index + old.length)]);
        break;
      }
      case 5: {
        const to = next() % (out.length + 1);
        out = Buffer.concat([out.subarray(0, to), out.subarray(at, end), out.subarray(to)]);
        break;
      }
      default:
        out = Buffer.concat([out.subarray(0, at), out.subarray(end)]);
    }
  }
  return out;
}

/** Runs a task; true when it succeeds, false for a typed error. Everything else is passed on with the case's name. */
async function holds(name: string, task: () => unknown): Promise<boolean> {
  try {
    await task();
    return true;
  } catch (error) {
    if (error instanceof HalfbyteError) {
      expect(error.message.length, name).toBeLessThan(2000);
      return false;
    }
    throw new Error(`${name}: ${String(error)}`, { cause: error });
  }
}

function expectBoth(valid: number, total: number): void {
  // A mutator that breaks nothing, or everything, tests nothing.
  expect(valid).toBeGreaterThan(total / 100);
  expect(valid).toBeLessThan(total * 0.9);
}

const state = formatQuantState({
  quantType: "nf4",
  blocksize: 64,
  dtype: "bf16",
  shape: [4, 64],
  nested: { blocksize: 256, offset: 0.013 },
});
const TENSORS: Record<string, TestTensor> = {
  "model.layers.0.mlp.up_proj.weight": { dtype: "U8", shape: [128, 1] },
  "model.layers.0.mlp.up_proj.weight.absmax": { dtype: "U8", shape: [4] },
  "model.layers.0.mlp.up_proj.weight.quant_map": { dtype: "F32", shape: [16] },
  "model.layers.0.mlp.up_proj.weight.nested_absmax": { dtype: "F32", shape: [1] },
  "model.layers.0.mlp.up_proj.weight.nested_quant_map": { dtype: "F32", shape: [256] },
  "model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4": {
    dtype: "U8",
    shape: [state.length],
    data: state,
  },
  "a.weight": { dtype: "I8", shape: [3, 5] },
  "a.SCB": { dtype: "F32", shape: [3] },
  "a.weight_format": { dtype: "U8", shape: [], data: Uint8Array.of(0) },
  "model.embed_tokens.weight": { dtype: "BF16", shape: [8, 4] },
  empty: { dtype: "F6_E2M3", shape: [0, 4] },
};
const FILE = safetensorsBytes(TENSORS, { format: "pt" });
const HEADER = FILE.subarray(8, 8 + FILE.readUInt32LE(0));
const DATA = FILE.length - 8 - HEADER.length;

const folder = temporaryFolder();
const openFiles = () => (process.platform === "linux" ? readdirSync("/proc/self/fd").length : 0);
let before = 0;
beforeAll(() => {
  before = openFiles();
});
afterAll(() => {
  folder.remove();
  expect(openFiles()).toBe(before);
});

/** Everything that can be read from a folder: names its bytes, which cannot be more than the files have. */
async function readEverything(path: string, fileBytes: number): Promise<void> {
  const source = await openHfFolder(path);
  try {
    let total = 0;
    for (const [name, { shape, dtype }] of source.tensors) {
      const bytes = await source.readRows(name, 0, rowCount(shape));
      expect(bytes.length).toBe(bytesOfShape(dtype, shape));
      expect(bytes.length).toBe(source.storedBytes(name));
      total += bytes.length;
    }
    expect(total).toBeLessThanOrEqual(fileBytes);
    readQuantizationConfig(source.config, path);
    modulesToQuantize(source.config, source.tensors);
    const { fourBit, int8 } = listQuantized(source.tensors);
    for (const keys of fourBit.values()) await readFourBit(source, keys);
    for (const keys of int8.values()) await readInt8(source, keys);
  } finally {
    await source.close();
  }
}

describe("10,000 mutations", () => {
  it("of headers: 4,000 texts", async () => {
    const next = random("headers");
    let valid = 0;
    for (let i = 0; i < 4000; i++) {
      const bytes = mutate(HEADER, next);
      const ok = await holds(`header ${i}`, () => {
        const { tensors } = parseSafetensorsHeader(bytes, DATA, "file");
        let covered = 0;
        for (const { begin, end, dtype, shape } of tensors.values()) {
          expect(begin).toBe(covered);
          expect(end - begin).toBe(bytesOfShape(dtype, shape));
          covered = end;
        }
        expect(covered).toBe(DATA);
        listQuantized(tensors);
        modulesToQuantize({}, tensors);
      });
      if (ok) valid++;
    }
    expectBoth(valid, 4000);
  });

  it("of whole files: 1,000, read through a folder", async () => {
    const next = random("files");
    let valid = 0;
    for (let i = 0; i < 1000; i++) {
      const config = mutate(
        Buffer.from('{"model_type": "llama", "quantization_config": {"load_in_4bit": true}}'),
        next,
      );
      writeFileSync(folder.file("config.json"), next() % 4 === 0 ? config : "{}");
      const header = mutate(HEADER, next);
      const length = Buffer.alloc(8);
      length.writeBigUInt64LE(next() % 8 === 0 ? BigInt(next()) << BigInt(next() % 33) : BigInt(header.length));
      const rebuilt = Buffer.concat([length, header, FILE.subarray(8 + HEADER.length)]);
      // Edits behind the header change data, the quant state's text among them.
      const bytes = next() % 3 === 0 ? Buffer.concat([FILE.subarray(0, 8 + HEADER.length), dataEdit(next)]) : rebuilt;
      writeFileSync(folder.file("model.safetensors"), bytes);
      if (await holds(`file ${i}`, () => readEverything(folder.path, bytes.length))) valid++;
    }
    expectBoth(valid, 1000);
  });

  function dataEdit(next: Next): Buffer {
    const data = Buffer.from(FILE.subarray(8 + HEADER.length));
    for (let edits = 1 + (next() % 8); edits > 0; edits--) data[next() % data.length]! ^= 1 << (next() % 8);
    return next() % 8 === 0 ? data.subarray(0, next() % data.length) : data;
  }

  it("of quant states: 3,000", async () => {
    const next = random("states");
    let valid = 0;
    for (let i = 0; i < 3000; i++) {
      const bytes = mutate(state, next);
      const ok = await holds(`state ${i}`, () => {
        const meta = parseQuantState(bytes, "nf4", "w");
        expect(parseQuantState(formatQuantState(meta), "nf4", "w")).toEqual(meta);
        const text = dumpPyJson(parsePyJson(bytes.toString(), "state", "w"));
        expect(dumpPyJson(parsePyJson(text, "state", "w"))).toBe(text);
      });
      if (ok) valid++;
    }
    expectBoth(valid, 3000);
  });

  it("of indexes: 2,000", async () => {
    const next = random("indexes");
    const sub = temporaryFolder();
    const shards: Record<string, Record<string, TestTensor>> = {
      "model-00001-of-00002.safetensors": { a: { dtype: "U8", shape: [3] }, b: { dtype: "F32", shape: [2, 2] } },
      "model-00002-of-00002.safetensors": { c: { dtype: "BF16", shape: [4] } },
    };
    let size = 0;
    for (const [file, tensors] of Object.entries(shards)) {
      const bytes = safetensorsBytes(tensors);
      size += bytes.length;
      writeFileSync(sub.file(file), bytes);
    }
    writeFileSync(sub.file("config.json"), "{}");
    const map = Object.fromEntries(Object.entries(shards).flatMap(([f, t]) => Object.keys(t).map((name) => [name, f])));
    const index = Buffer.from(JSON.stringify({ metadata: { total_size: 27 }, weight_map: map }));
    let valid = 0;
    for (let i = 0; i < 2000; i++) {
      writeFileSync(sub.file("model.safetensors.index.json"), mutate(index, next));
      if (await holds(`index ${i}`, () => readEverything(sub.path, size))) valid++;
    }
    expectBoth(valid, 2000);
    sub.remove();
  });
});

it("does not allocate what a header merely claims", async () => {
  const huge = { a: { dtype: "U8", shape: [2 ** 40], data_offsets: [0, 2 ** 40] } };
  const header = Buffer.from(JSON.stringify(huge));
  const length = Buffer.alloc(8);
  const path = folder.file("huge.safetensors");
  for (const declared of [header.length, 99_999_999, 2 ** 52]) {
    length.writeBigUInt64LE(BigInt(declared));
    writeFileSync(path, Buffer.concat([length, header]));
    const { arrayBuffers } = process.memoryUsage();
    expect(await holds("huge", () => SafetensorsFile.open(path))).toBe(false);
    expect(process.memoryUsage().arrayBuffers - arrayBuffers).toBeLessThan(1 << 20);
  }
});
