import { readFileSync } from "node:fs";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { type EstimateOptions, estimateModel, type ModelEstimate } from "#halfbyte/checkpoint/estimate.js";
import { inspectModel } from "#halfbyte/checkpoint/inspect.js";
import { quantizeModel } from "#halfbyte/checkpoint/quantize.js";
import { ArgumentError, FormatError, UnsupportedError } from "#halfbyte/core/errors.js";
import { rejection, temporaryFolder } from "../helpers/checkpoint.js";
import { type DecoderConfig, modelConfig, writeHollowDecoder } from "../helpers/hollow-model.js";

const GIB = 2 ** 30;
const folder = temporaryFolder();
const MODELS = ["tinyllama-1.1b", "qwen2.5-3b", "nemotron-nano-4b"] as const;
type ModelName = (typeof MODELS)[number];
const path = (name: string): string => folder.file(name);

beforeAll(() => {
  for (const name of MODELS) writeHollowDecoder(path(name), modelConfig(name));
});
afterAll(() => folder.remove());

const part = ({ parts }: ModelEstimate, name: string): number => {
  const found = parts.find((p) => p.name === name);
  if (!found) throw new Error(`no ${name} in ${parts.map((p) => p.name)}`);
  return found.bytes;
};

/** A model of a few thousand weights. */
const TINY: DecoderConfig = {
  model_type: "llama",
  hidden_size: 64,
  intermediate_size: 192,
  num_hidden_layers: 2,
  num_attention_heads: 4,
  num_key_value_heads: 2,
  vocab_size: 128,
  tie_word_embeddings: false,
};
function tiny(config: object = {}): string {
  const name = path(`tiny-${Math.random()}`);
  return writeHollowDecoder(name, TINY, { ...TINY, ...config });
}

describe("weights", () => {
  test("the shapes are those of the real models", async () => {
    const counts = { "tinyllama-1.1b": 1_100_048_384, "qwen2.5-3b": 3_085_938_688, "nemotron-nano-4b": 4_512_746_496 };
    for (const name of MODELS) {
      const { parameters } = await estimateModel(path(name));
      expect.soft(parameters, name).toBe(counts[name]);
    }
  });

  const types: EstimateOptions[] = [
    { type: "nf4" },
    { type: "nf4", doubleQuant: true, blocksize: 128 },
    { type: "fp4", computeDtype: "float32" },
    { type: "int8" },
    { type: "nf4", skip: ["o_proj"] },
  ];
  for (const options of types) {
    test(`are those that quantize makes: ${JSON.stringify(options)}`, async () => {
      const source = tiny({ torch_dtype: "bfloat16" });
      const out = path(`out-${Math.random()}`);
      await quantizeModel(source, out, options as object);
      const { memoryBytes, parameters } = await inspectModel(out);
      const weightsOf = (e: ModelEstimate): number =>
        part(e, "quantized weights") + part(e, "quantization state") + part(e, "other weights");
      const estimate = await estimateModel(source, options);
      expect(weightsOf(estimate)).toBe(memoryBytes);
      expect(estimate.parameters).toBe(parameters);
      // The quantized checkpoint gives the same.
      const again = await estimateModel(out);
      expect(weightsOf(again)).toBe(memoryBytes);
      expect(again.quantizedParameters).toBe(estimate.quantizedParameters);
      expect(again.type).toBe(options.type);
    });
  }

  test("NF4 is 4.5 bits, 4.127 with double quantization, and a code table per matrix", async () => {
    const plain = await estimateModel(path("tinyllama-1.1b"));
    const linear = 22 * (2 * 2048 * 2048 + 2 * 2048 * 256 + 3 * 2048 * 5632);
    expect(plain.quantizedParameters).toBe(linear);
    expect(part(plain, "quantized weights")).toBe(linear / 2);
    expect(part(plain, "quantization state")).toBe(linear / 16 + 22 * 7 * 64);
    expect(part(plain, "other weights")).toBe(2 * (2 * 32000 * 2048 + 45 * 2048));
    const nested = await estimateModel(path("tinyllama-1.1b"), { doubleQuant: true });
    const bits = (8 * (part(nested, "quantized weights") + part(nested, "quantization state"))) / linear;
    expect(bits).toBeCloseTo(4 + 8 / 64 + 32 / (64 * 256), 2);
  });

  test("without quantization, in any float dtype", async () => {
    for (const [type, bytes] of [
      ["bf16", 2],
      ["f16", 2],
      ["f32", 4],
    ] as const) {
      const estimate = await estimateModel(path("tinyllama-1.1b"), { type });
      expect(part(estimate, "weights")).toBe(bytes * 1_100_048_384);
      expect(estimate.quantizedParameters).toBe(0);
    }
  });
});

describe("KV cache", () => {
  const cache = async (config: object, options: EstimateOptions = {}): Promise<number> =>
    part(await estimateModel(tiny(config), { context: 100, ...options }), "KV cache");
  // 2 x layers x heads x headDim x tokens x bytes.
  const FULL = 2 * 2 * 2 * 16 * 100 * 2;

  test("grows with context, batch and dtype; grouped heads count once", async () => {
    expect(await cache({})).toBe(FULL);
    expect(await cache({}, { batch: 3 })).toBe(3 * FULL);
    expect(await cache({}, { kvDtype: "f32" })).toBe(2 * FULL);
    expect(await cache({}, { type: "f32" })).toBe(2 * FULL);
    expect(await cache({ num_key_value_heads: undefined })).toBe(2 * FULL);
    expect(await cache({ head_dim: 32 })).toBe(2 * FULL);
    expect(await cache({ multi_query: true })).toBe(FULL / 2);
  });

  test("a sliding window is the most that is kept", async () => {
    expect(await cache({ sliding_window: 10 })).toBe(FULL / 10);
    expect(await cache({ sliding_window: 1000 })).toBe(FULL);
    expect(await cache({ sliding_window: null })).toBe(FULL);
    expect(await cache({ sliding_window: 10, use_sliding_window: false })).toBe(FULL);
    expect(await cache({ sliding_window: 10, max_window_layers: 1 })).toBe(FULL / 2 + FULL / 20);
    expect(await cache({ sliding_window: 10, sliding_window_pattern: 2 })).toBe(FULL / 2 + FULL / 20);
    const layer_types = ["full_attention", "sliding_attention"];
    expect(await cache({ sliding_window: 10, layer_types })).toBe(FULL / 2 + FULL / 20);
    expect(await cache({ attention_chunk_size: 20, layer_types: ["full_attention", "chunked_attention"] })).toBe(
      FULL / 2 + FULL / 10,
    );
  });

  test("of the text part of a composed model", async () => {
    const { hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads, vocab_size } = TINY;
    const text_config = { hidden_size, num_hidden_layers, num_attention_heads, num_key_value_heads, vocab_size };
    const composed = { hidden_size: undefined, num_hidden_layers: 2, num_attention_heads: 4, num_key_value_heads: 2 };
    expect(await cache({ ...composed, text_config: { ...text_config, num_key_value_heads: 1 } })).toBe(FULL / 2);
  });

  test("layers with another kind of state are told", async () => {
    const estimate = await estimateModel(tiny({ layer_types: ["linear_attention", "full_attention"] }), {
      context: 100,
    });
    expect(part(estimate, "KV cache")).toBe(FULL / 2);
    expect(estimate.notes).toEqual(["1 of 2 layers keep a state of another kind, which is not counted"]);
  });

  const refused: [config: object, error: unknown, message: RegExp][] = [
    [{ kv_lora_rank: 512 }, UnsupportedError, /multi-head latent attention/],
    [{ is_encoder_decoder: true }, UnsupportedError, /encoder-decoder/],
    [{ ssm_state_size: 16 }, UnsupportedError, /state-space/],
    [{ layer_types: ["full_attention"] }, FormatError, /layer_types: expected 2 entries, received 1/],
    [{ num_hidden_layers: 0 }, FormatError, /num_hidden_layers: expected a whole number above 0, received 0/],
    [{ num_key_value_heads: [1, 2] }, FormatError, /num_key_value_heads: expected a whole number/],
    [{ vocab_size: null }, FormatError, /lacks vocab_size/],
  ];
  for (const [config, kind, message] of refused) {
    test(`refuses ${JSON.stringify(config)}`, async () => {
      const error = await rejection(estimateModel(tiny(config)));
      expect(error).toBeInstanceOf(kind);
      expect((error as Error).message).toMatch(message);
    });
  }

  test("training needs none, so MLA is no obstacle", async () => {
    const { parts } = await estimateModel(tiny({ kv_lora_rank: 512 }), { train: true });
    expect(parts.map(({ name }) => name)).not.toContain("KV cache");
  });
});

describe("training", () => {
  test("adapters: rank x (inputs + outputs) of each target, 4 bytes each for value and gradient", async () => {
    const attention = 22 * 16 * (2 * (2048 + 2048) + 2 * (2048 + 256));
    const all = attention + 22 * 16 * 3 * (2048 + 5632);
    for (const [loraTargets, parameters] of [
      ["attention", attention],
      ["all", all],
    ] as const) {
      const estimate = await estimateModel(path("tinyllama-1.1b"), { train: true, loraRank: 16, loraTargets });
      expect(estimate.loraParameters).toBe(parameters);
      expect(part(estimate, "LoRA adapters")).toBe(4 * parameters);
      expect(part(estimate, "gradients")).toBe(4 * parameters);
      expect(part(estimate, "optimizer state")).toBe(8 * parameters);
    }
  });

  test("8-bit Adam takes 2.03 bytes per parameter and saves the 360 MB that are published for 3B, rank 32", async () => {
    const of = (optimizer: "adam" | "adam8bit" | "paged-adam8bit"): Promise<ModelEstimate> =>
      estimateModel(path("qwen2.5-3b"), { train: true, loraRank: 32, optimizer });
    const [wide, narrow, paged] = await Promise.all([of("adam"), of("adam8bit"), of("paged-adam8bit")]);
    const perParameter = part(narrow, "optimizer state") / narrow.loraParameters!;
    expect(perParameter).toBeCloseTo(2 * (1 + 4 / 256), 3);
    expect(part(wide, "optimizer state") - part(narrow, "optimizer state")).toBeGreaterThan(355e6);
    expect(part(wide, "optimizer state") - part(narrow, "optimizer state")).toBeLessThan(365e6);
    expect(part(paged, "optimizer state")).toBe(part(narrow, "optimizer state"));
  });

  test("tensors below 4,096 elements keep 32-bit state", async () => {
    const of = (optimizer: "adam" | "adam8bit", loraRank: number): Promise<ModelEstimate> =>
      estimateModel(tiny(), { train: true, optimizer, loraRank });
    expect(part(await of("adam8bit", 1), "optimizer state")).toBe(part(await of("adam", 1), "optimizer state"));
    expect(part(await of("adam8bit", 64), "optimizer state")).toBeLessThan(
      part(await of("adam", 64), "optimizer state"),
    );
  });
});

describe("options", () => {
  const wrong: [options: object, operand: string][] = [
    [{ type: "nf5" }, "type"],
    [{ context: 0 }, "context"],
    [{ batch: 1.5 }, "batch"],
    [{ kvDtype: "u8" }, "kvDtype"],
    [{ loraRank: 8 }, "loraRank"],
    [{ optimizer: "adam" }, "optimizer"],
    [{ train: true, optimizer: "adamant" }, "optimizer"],
    [{ train: true, loraTargets: "some" }, "loraTargets"],
    [{ type: "bf16", doubleQuant: true }, "doubleQuant"],
    [{ type: "int8", blocksize: 64 }, "blocksize"],
    [{ blocksize: 65 }, "blocksize"],
  ];
  for (const [options, operand] of wrong) {
    test(`refuses ${JSON.stringify(options)}`, async () => {
      const error = await rejection(estimateModel(path("tinyllama-1.1b"), options));
      expect(error).toBeInstanceOf(ArgumentError);
      expect((error as ArgumentError).operand).toBe(operand);
    });
  }

  test("a model that is quantized already takes none of quantization", async () => {
    const out = path("quantized");
    await quantizeModel(tiny(), out);
    const error = await rejection(estimateModel(out, { type: "nf4" }));
    expect((error as Error).message).toContain("which is quantized already");
  });

  test("the context is 2048, or the model's own limit", async () => {
    expect((await estimateModel(path("qwen2.5-3b"))).context).toBe(2048);
    expect((await estimateModel(tiny({ max_position_embeddings: 512 }))).context).toBe(512);
  });
});

/** As docs/jetson.md calls them. */
const TITLES = {
  "tinyllama-1.1b": "TinyLlama 1.1B",
  "qwen2.5-3b": "Qwen2.5-3B",
  "nemotron-nano-4b": "Nemotron-Nano-4B",
} as const;
/**
 * Peaks that bitsandbytes' PR #1929 reports of an Orin Nano Super: batch 1, 1,024 tokens, NF4, LoRA of rank 16 on attention, float32
 * AdamW. Its "GB" are read as 2^30 bytes, as PyTorch's figures are usually divided.
 */
const PUBLISHED: readonly [ModelName, use: "inference" | "training", gigabytes: number][] = [
  ["tinyllama-1.1b", "inference", 1.05],
  ["qwen2.5-3b", "inference", 2.43],
  ["nemotron-nano-4b", "inference", 3.84],
  ["tinyllama-1.1b", "training", 1.22],
  ["qwen2.5-3b", "training", 3.69],
  ["nemotron-nano-4b", "training", 4.43],
];

describe("published peaks", () => {
  const docs = readFileSync(new URL("../../docs/jetson.md", import.meta.url), "utf8");
  for (const [name, use, gigabytes] of PUBLISHED) {
    test(`${name}, ${use}`, async () => {
      const training = use === "training";
      const train = training ? { train: true, loraRank: 16, loraTargets: "attention" as const } : {};
      const { totalBytes } = await estimateModel(path(name), { context: 1024, ...train });
      const off = totalBytes / (gigabytes * GIB) - 1;
      expect(off).toBeGreaterThan(-0.02);
      expect(off).toBeLessThan(training ? 0.15 : 0.02);
      const row = docs.split("\n").find((line) => line.startsWith(`| ${TITLES[name]} |`));
      const sign = off < 0 ? "-" : "+";
      const cells = [gigabytes, (totalBytes / GIB).toFixed(2), `${sign}${Math.abs(100 * off).toFixed(1)} %`];
      expect(row).toContain(`| ${cells.join(" | ")} |`);
    });
  }
});
