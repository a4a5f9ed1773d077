import { readFileSync } from "node:fs";
import { describe, expect, it } from "vitest";
import { ArgumentError, FormatError, UnsupportedError } from "#halfbyte/core/errors.js";
import {
  formatQuantizedConfig,
  type QuantizationConfig,
  quantizationConfig,
  readQuantizationConfig,
} from "#halfbyte/formats/bnb-config.js";
import { modulesToQuantize, skipMatcher } from "#halfbyte/formats/bnb-modules.js";
import { dumpPyJson, type PyObject, parsePyJson } from "#halfbyte/quant/pyjson.js";
import { failure } from "../helpers/checkpoint.js";

describe("quantization_config", () => {
  // json.dumps(BitsAndBytesConfig(...).to_dict()) of transformers 5.23.
  it.each<[QuantizationConfig, string]>([
    [
      { type: "nf4", computeDType: "bf16" },
      '{"quant_method": "bitsandbytes", "_load_in_8bit": false, "_load_in_4bit": true, "llm_int8_threshold": 6.0, "llm_int8_skip_modules": null, "llm_int8_enable_fp32_cpu_offload": false, "llm_int8_has_fp16_weight": false, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": false, "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_quant_storage": "uint8", "load_in_4bit": true, "load_in_8bit": false}',
    ],
    [
      { type: "fp4", doubleQuant: true, computeDType: "f16", quantStorage: "bfloat16" },
      '{"quant_method": "bitsandbytes", "_load_in_8bit": false, "_load_in_4bit": true, "llm_int8_threshold": 6.0, "llm_int8_skip_modules": null, "llm_int8_enable_fp32_cpu_offload": false, "llm_int8_has_fp16_weight": false, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": true, "bnb_4bit_compute_dtype": "float16", "bnb_4bit_quant_storage": "bfloat16", "load_in_4bit": true, "load_in_8bit": false}',
    ],
    [
      { type: "int8", skipModules: ["lm_head", "x"], computeDType: "bf16", doubleQuant: true },
      '{"quant_method": "bitsandbytes", "_load_in_8bit": true, "_load_in_4bit": false, "llm_int8_threshold": 6.0, "llm_int8_skip_modules": ["lm_head", "x"], "llm_int8_enable_fp32_cpu_offload": false, "llm_int8_has_fp16_weight": false, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": false, "bnb_4bit_compute_dtype": "float32", "bnb_4bit_quant_storage": "uint8", "load_in_4bit": false, "load_in_8bit": true}',
    ],
  ])("is transformers' own for %o", (config, json) => {
    expect(dumpPyJson(quantizationConfig(config))).toBe(json);
    const back = readQuantizationConfig({ quantization_config: JSON.parse(json) }, "config.json")!;
    expect(dumpPyJson(quantizationConfig(back))).toBe(json);
  });

  it("is put into a config.json as transformers saves it", () => {
    const tree = parsePyJson(
      '{"rms_norm_eps": 1e-05, "b": {"rope_theta": 10000.0}, "a": 1}',
      "config",
      "x",
    ) as PyObject;
    const saved = formatQuantizedConfig(tree, { type: "nf4" });
    expect(saved).toMatch(
      /^\{\n {2}"a": 1,\n {2}"b": \{\n {4}"rope_theta": 10000.0\n {2}\},\n {2}"quantization_config": \{\n {4}"_load_in_4bit": true,/,
    );
    expect(saved).toMatch(/"llm_int8_threshold": 6.0,/);
    expect(saved.endsWith('  },\n  "rms_norm_eps": 1e-05\n}\n')).toBe(true);
    expect(tree.has("quantization_config")).toBe(false);
    const again = formatQuantizedConfig(parsePyJson(saved, "config", "x") as PyObject, { type: "int8" });
    expect(readQuantizationConfig(JSON.parse(again), "x")!.type).toBe("int8");
  });

  it("reads files of all ages", () => {
    const read = (quantization_config: unknown) => readQuantizationConfig({ quantization_config }, "config.json");
    expect(readQuantizationConfig({}, "x")).toBeUndefined();
    expect(read(null)).toBeUndefined();
    expect(read({ load_in_8bit: true })).toMatchObject({ type: "int8", threshold: 6, skipModules: null });
    expect(read({ load_in_4bit: true })).toMatchObject({ type: "fp4", computeDType: "f32", quantStorage: "uint8" });
    expect(read({ _load_in_4bit: true, bnb_4bit_quant_type: "nf4" })).toMatchObject({
      type: "nf4",
      doubleQuant: false,
    });
    // Written by transformers for every 8-bit model; what it says of 4 bits means nothing there.
    expect(read({ load_in_8bit: true, bnb_4bit_quant_type: "???", bnb_4bit_compute_dtype: 3 })).toMatchObject({
      type: "int8",
    });
  });

  it.each<[unknown, RegExp]>([
    ["x", /is not an object/],
    [[1], /is not an object/],
    [{ load_in_4bit: true, load_in_8bit: true }, /exactly one of/],
    [{ quant_method: "bitsandbytes" }, /exactly one of/],
    [{ load_in_4bit: "yes" }, /load_in_4bit is not true or false/],
    [{ load_in_4bit: true, bnb_4bit_quant_type: "int4" }, /bnb_4bit_quant_type is "int4"/],
    [{ load_in_4bit: true, bnb_4bit_compute_dtype: "float64" }, /compute_dtype is "float64"/],
    [{ load_in_4bit: true, bnb_4bit_quant_storage: "toString" }, /quant_storage is "toString"/],
    [{ load_in_4bit: true, llm_int8_skip_modules: "lm_head" }, /skip_modules is not a list/],
    [{ load_in_8bit: true, llm_int8_threshold: "6" }, /threshold is not a number/],
  ])("refuses %o", (value, problem) => {
    const error = failure(() => readQuantizationConfig({ quantization_config: value }, "config.json"));
    expect(error).toBeInstanceOf(FormatError);
    expect(error.message).toMatch(problem);
  });

  it("names another method", () => {
    for (const method of ["gptq", 7]) {
      const error = failure(() =>
        readQuantizationConfig({ quantization_config: { quant_method: method } }, "config.json"),
      );
      expect(error).toBeInstanceOf(UnsupportedError);
      expect(error.message).toContain(JSON.stringify(method));
    }
  });
});

describe("modulesToQuantize", () => {
  interface Decision {
    config: { model_type: string; architectures: string[]; tie_word_embeddings: boolean };
    linear: string[];
    conv1d: string[];
    kept: string[];
    biases: string[];
  }
  const fixture = new URL("../fixtures/skip-rules.json", import.meta.url);
  const decisions = JSON.parse(readFileSync(fixture, "utf8")) as Decision[];
  const shapes = (names: readonly string[], shape = [4, 4]) => new Map(names.map((name) => [name, { shape }]));

  it.each(
    decisions.map(
      (d) => [`${d.config.architectures[0]} ${d.config.tie_word_embeddings ? "tied" : "untied"}`, d] as const,
    ),
  )("decides as transformers: %s", (_, { config, linear, conv1d, kept, biases }) => {
    const tensors = new Map([...shapes([...kept, ...conv1d, ...linear]), ...shapes(biases, [4])]);
    const plan = modulesToQuantize(config, tensors);
    expect([...plan.quantize].sort()).toEqual([...linear, ...conv1d].sort());
    expect([...plan.transposed].sort()).toEqual([...conv1d].sort());
    expect([...plan.kept.keys()].sort()).toEqual([...kept].sort());
    expect(plan.skipModules).toBeNull();
  });

  it("covers what it should", () => {
    expect(decisions.length).toBeGreaterThan(25);
    expect(decisions.some((d) => d.conv1d.length > 0)).toBe(true);
    expect(decisions.filter((d) => d.kept.some((name) => name.includes("experts")))).not.toHaveLength(0);
    expect(decisions.filter((d) => d.linear.length === 0).map((d) => d.config.model_type)).toEqual([
      "falcon",
      "gpt2",
      "openai-gpt",
    ]);
  });

  const llama = shapes([
    "lm_head.weight",
    "model.embed_tokens.weight",
    "model.layers.1.mlp.up_proj.weight",
    "model.layers.11.mlp.up_proj.weight",
  ]);

  it("leaves vectors, 3-d parameters and other names alone", () => {
    const tensors = new Map([
      ...llama,
      ["model.norm.weight", { shape: [4] }],
      ["e.weight", { shape: [2, 2, 2] }],
      ["e.w", { shape: [2, 2] }],
    ]);
    const plan = modulesToQuantize({}, tensors);
    expect(plan.quantize).toEqual(["model.layers.1.mlp.up_proj.weight", "model.layers.11.mlp.up_proj.weight"]);
    expect([...plan.kept]).toEqual([
      ["lm_head.weight", "output head"],
      ["model.embed_tokens.weight", "embedding"],
    ]);
  });

  it("takes skip patterns and writes them down with the output head", () => {
    const plan = modulesToQuantize({}, llama, ["model.layers.1"]);
    expect(plan.quantize).toEqual(["model.layers.11.mlp.up_proj.weight"]);
    expect(plan.kept.get("model.layers.1.mlp.up_proj.weight")).toBe("skipped on request");
    expect(plan.skipModules).toEqual(["lm_head", "model.layers.1"]);
    const tied = modulesToQuantize({}, shapes(["a.weight"]), ["a", "lm_head"]);
    expect(tied).toMatchObject({ quantize: [], skipModules: ["lm_head", "a"] });
  });

  it.each<[string, string, boolean]>([
    // Python: should_convert_module(name, [pattern]) of transformers 5.23, negated.
    ["layer.1", "layer.1.attn", true],
    ["layer.1", "layer.11.attn", false],
    ["layer.1", "layer.1", true],
    ["layer.*", "layer.11.attn", true],
    ["mlp.gate", "mlp.gate", true],
    ["mlp.gate", "mlp.gate_proj", false],
    ["fc1", "model.decoder.layers.23.fc1", true],
    ["fc1", "model.decoder.layers.23.fc11", false],
    ["wo", "encoder.two", true],
    ["up_proj|down_proj", "down_proj.x", true],
    ["up_proj|down_proj", "a.down_proj", false],
    ["model.layers.", "model.layers.3", true],
    ["odel", "model", true],
    ["(.*\\.)?mlp", "model.layers.0.mlp.up_proj", true],
  ])("matches %s against %s: %s", (pattern, name, matches) => {
    expect(skipMatcher([pattern])(name)).toBe(matches);
  });

  it.each(["", "(", "[a", "a\\Z", "(?P<x>a)", "(?i)a", "*"])("refuses the pattern %j", (pattern) =>
    expect(() => modulesToQuantize({}, llama, [pattern])).toThrow(ArgumentError),
  );

  it("says which model types it cannot do, and survives odd configurations", () => {
    expect(() => modulesToQuantize({ model_type: "gte" }, llama)).toThrow(UnsupportedError);
    for (const model_type of ["__proto__", "constructor", 7, null]) {
      expect(modulesToQuantize({ model_type }, llama).quantize).toHaveLength(2);
    }
    expect(modulesToQuantize({ model_type: "olmo", tie_word_embeddings: true }, new Map()).quantize).toEqual([]);
  });
});
