import { closeSync, mkdtempSync, openSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { HalfbyteError } from "#halfbyte/core/errors.js";
import { openGguf } from "#halfbyte/formats/gguf.js";
import { dequantizeGguf } from "#halfbyte/formats/gguf-dequant.js";
import { openGgufModel } from "#halfbyte/formats/gguf-model.js";
import { bool, ggufBytes, list, seeded, type Typed, text, tinyModel } from "../helpers/gguf-writer.js";

const CASES = 5000;
const SEED = Number(process.env.HALFBYTE_FUZZ_SEED ?? 2019);

const folder = mkdtempSync(join(tmpdir(), "halfbyte-fuzz-gguf-"));
afterAll(() => rmSync(folder, { recursive: true }));

/** The largest single buffer or typed array that is made while `run` runs, in bytes. */
async function largestAllocation(run: () => Promise<void>): Promise<number> {
  let largest = 0;
  const note = (bytes: unknown): void => {
    if (typeof bytes === "number" && bytes > largest) largest = bytes;
  };
  const undo: (() => void)[] = [];
  const arrays = ["Uint8Array", "Int8Array", "Uint16Array", "Int16Array", "Uint32Array", "Int32Array"] as const;
  const wide = ["Float32Array", "Float64Array"] as const;
  for (const name of [...arrays, ...wide, "ArrayBuffer", "Array"] as const) {
    const original = Object.getOwnPropertyDescriptor(globalThis, name)!;
    const watched = new Proxy(original.value as new (...args: unknown[]) => object, {
      construct(target, args, newTarget) {
        const size = "BYTES_PER_ELEMENT" in target ? Number(target.BYTES_PER_ELEMENT) : name === "Array" ? 8 : 1;
        if (typeof args[0] === "number") note(args[0] * size);
        return Reflect.construct(target, args, newTarget) as object;
      },
    });
    Object.defineProperty(globalThis, name, { ...original, value: watched });
    undo.push(() => Object.defineProperty(globalThis, name, original));
  }
  for (const name of ["alloc", "allocUnsafe", "allocUnsafeSlow"] as const) {
    const original = Buffer[name];
    Buffer[name] = ((size: number, ...rest: []) => {
      note(size);
      return original.call(Buffer, size, ...rest);
    }) as typeof Buffer.alloc;
    undo.push(() => {
      Buffer[name] = original;
    });
  }
  try {
    await run();
  } finally {
    for (const restore of undo) restore();
  }
  return largest;
}

/** Files to mutate: every value type, models of every kind of tensor, a vocabulary, nothing at all. */
function originals(): Buffer[] {
  const everything: [string, Typed][] = [
    ["general.architecture", text("llama")],
    ["general.alignment", { type: "uint32", value: 64 }],
    ["u8", { type: "uint8", value: 1 }],
    ["i16", { type: "int16", value: -2 }],
    ["u64", { type: "uint64", value: 2n ** 60n }],
    ["i64", { type: "int64", value: -5 }],
    ["f64", { type: "float64", value: 0.5 }],
    ["flag", bool(true)],
    ["flags", list("bool", [true, false])],
    ["longs", list("int64", [1, -1])],
    ["floats", list("float32", [1, 2, 3, 4])],
    ["words", list("string", ["one", "zwei", "trois"])],
    ["nested", { type: "array", element: "array", value: [list("uint8", [1]), list("string", ["x"])] }],
  ];
  const sizes = { hidden: 32, heads: 2, kvHeads: 1, headDim: 16, intermediate: 32, layers: 1, vocab: 5 };
  const llama = tinyModel({ architecture: "llama", ...sizes, types: ["Q4_1", "F16", "Q8_0"] });
  const qwen2 = tinyModel({ architecture: "qwen2", ...sizes, types: ["Q5_0", "BF16"], bias: true, tied: true });
  const vocabulary: [string, Typed][] = [
    ["tokenizer.ggml.model", text("gpt2")],
    ["tokenizer.ggml.pre", text("llama-bpe")],
    ["tokenizer.ggml.tokens", list("string", ["<s>", "</s>", "a", "b", "ab"])],
    ["tokenizer.ggml.token_type", list("int32", [3, 3, 1, 1, 1])],
    ["tokenizer.ggml.merges", list("string", ["a b"])],
    ["tokenizer.ggml.bos_token_id", { type: "uint32", value: 0 }],
    ["tokenizer.ggml.eos_token_id", { type: "uint32", value: 1 }],
    ["tokenizer.chat_template", text("{{ messages }}")],
  ];
  const withVocabulary = llama.metadata.filter(([key]) => !key.startsWith("tokenizer."));
  return [
    ggufBytes({}),
    ggufBytes({ metadata: everything, alignment: 64, tensors: llama.tensors.slice(0, 3) }),
    ggufBytes({ ...llama, version: 2 }),
    ggufBytes({ ...llama, metadata: [...withVocabulary, ...vocabulary] }),
    ggufBytes(qwen2),
    readFileSync(fileURLToPath(new URL("../fixtures/gguf-tokenizer.gguf", import.meta.url))),
  ];
}

const HUGE = [2n ** 16n, 2n ** 31n, 2n ** 32n - 1n, 2n ** 32n, 2n ** 40n, 2n ** 53n, 2n ** 63n, 2n ** 64n - 1n];

/** One to four changes: flipped bits, random bytes, small and huge numbers, cuts, repeats. */
function mutate(original: Buffer, random: () => number): Buffer {
  let bytes = Buffer.from(original);
  const below = (n: number): number => random() % Math.max(1, n);
  // The header is where the structure is: most changes go there.
  const place = (): number => (random() & 7 ? below(Math.min(bytes.length, 2200)) : below(bytes.length));
  for (let n = 1 + below(4); n > 0; n--) {
    const at = place();
    switch (below(8)) {
      case 0:
      case 1:
        if (at < bytes.length) bytes[at] = bytes[at]! ^ (1 << below(8));
        break;
      case 2:
        if (at < bytes.length) bytes[at] = random() & 255;
        break;
      case 3:
        if (at + 8 <= bytes.length) bytes.writeBigUInt64LE(HUGE[below(HUGE.length)]!, at);
        break;
      case 4:
        if (at + 4 <= bytes.length) bytes.writeUInt32LE(below(16), at);
        break;
      case 5:
        bytes = bytes.subarray(0, at);
        break;
      case 6: {
        const from = place();
        bytes = Buffer.concat([bytes.subarray(0, at), bytes.subarray(from, from + below(64)), bytes.subarray(at)]);
        break;
      }
      default:
        bytes = Buffer.concat([bytes.subarray(0, at), bytes.subarray(at + below(16))]);
    }
  }
  return bytes;
}

/** Reads everything there is to read; true when the file was valid. Any error but a HalfbyteError is thrown. */
async function readAll(path: string): Promise<{ header: boolean; model: boolean }> {
  const read = { header: false, model: false };
  const tolerate = (error: unknown): void => {
    if (!(error instanceof HalfbyteError)) throw error;
  };
  try {
    const file = await openGguf(path);
    for (const tensor of file.tensors.values()) await file.read(tensor, 0, tensor.bytes);
    await file.close();
    read.header = true;
  } catch (error) {
    tolerate(error);
  }
  try {
    const source = await openGgufModel(path);
    try {
      for (const { name, shape } of source.tensors.values()) await source.readRows(name, 0, shape[0] ?? 1);
      for (const sidecar of source.sidecars.values()) await sidecar();
      read.model = true;
    } finally {
      await source.close();
    }
  } catch (error) {
    tolerate(error);
  }
  return read;
}

describe("mutated GGUF files", () => {
  const random = seeded(SEED);
  const files = originals();
  const path = join(folder, "mutated.gguf");
  let descriptor = 0;
  beforeAll(() => {
    // The table of binary16 values is made once, whatever the file.
    dequantizeGguf("F16", new Uint8Array(2));
    descriptor = openSync("/dev/null", "r");
    closeSync(descriptor);
  });

  it("reads the originals", async () => {
    const results = [];
    for (const bytes of files) {
      writeFileSync(path, bytes);
      results.push(await readAll(path));
    }
    expect(results.map(({ header }) => header)).toEqual(files.map(() => true));
    expect(results.map(({ model }) => model)).toEqual([false, false, true, true, true, false]);
  });

  it(`${CASES} of them: a HalfbyteError or a valid read, and no allocation beyond the file's size`, async () => {
    let valid = 0;
    let refused = 0;
    for (let i = 0; i < CASES; i++) {
      const bytes = mutate(files[i % files.length]!, random);
      writeFileSync(path, bytes);
      const started = performance.now();
      const largest = await largestAllocation(async () => {
        try {
          const { header } = await readAll(path);
          if (header) valid++;
          else refused++;
        } catch (error) {
          throw new Error(`case ${i} of seed ${SEED} is not handled`, { cause: error });
        }
      });
      // A 2-bit block becomes float32: sixteen times its size. A tiny file may still fill Node's 8-KiB pool.
      expect(largest, `allocation in case ${i} of seed ${SEED}`).toBeLessThanOrEqual(16 * bytes.length + 8192);
      expect(performance.now() - started, `milliseconds of case ${i} of seed ${SEED}`).toBeLessThan(5000);
    }
    expect(valid + refused).toBe(CASES);
    // Neither all valid nor all refused: the mutations reach the checks and get past them.
    expect(valid).toBeGreaterThan(CASES / 50);
    expect(refused).toBeGreaterThan(CASES / 10);
    // Every file was closed again: the next descriptor is the one it was before.
    const next = openSync("/dev/null", "r");
    closeSync(next);
    expect(next).toBeLessThanOrEqual(descriptor + 2);
  });
});
