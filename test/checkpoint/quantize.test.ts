import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, afterEach, describe, expect, it } from "vitest";
import { memory, shutdown } from "#halfbyte/backend/devices.js";
import { compareModels } from "#halfbyte/checkpoint/compare.js";
import { inspectModel } from "#halfbyte/checkpoint/inspect.js";
import { type QuantizeOptions, type QuantizeProgress, quantizeModel } from "#halfbyte/checkpoint/quantize.js";
import type { FloatDType } from "#halfbyte/core/dtype.js";
import { ArgumentError, FormatError, NonFiniteError, UnsupportedError } from "#halfbyte/core/errors.js";
import { createDynamicMap, FP4_RANKS, FP4_THRESHOLDS, NF4_THRESHOLDS } from "#halfbyte/quant/codebooks.js";
import { makeTinyModel } from "../../scripts/make-tiny-model.mjs";
import { listing } from "../helpers/cli.js";
import { f32Tensor, LLAMA, readModel, type TestTensor, writeModel } from "../helpers/model-folder.js";
import { normals } from "../helpers/random.js";
import { encode, mean, quantize4bit, quantizeBlockwise, round } from "../helpers/scalar.js";
import { int8VectorwiseQuant } from "../helpers/scalar-int8.js";

const folder = mkdtempSync(join(tmpdir(), "halfbyte-quantize-"));
afterAll(async () => {
  await shutdown();
  rmSync(folder, { recursive: true });
});
// Whatever a test does, nothing stays on the device.
afterEach(() => expect(memory().cpu?.tensors ?? 0).toBe(0));

let count = 0;
const fresh = (): string => join(folder, `${count++}`);
const NAME = "model.layers.0.mlp.up_proj.weight";
const TABLES = {
  nf4: { values: [], thresholds: NF4_THRESHOLDS },
  fp4: { values: [], thresholds: FP4_THRESHOLDS, magnitudes: FP4_RANKS },
};

const asF32 = (tensor: TestTensor | undefined) => new Float32Array(tensor!.bytes.slice().buffer);

async function quantized(tensors: Record<string, TestTensor>, options: QuantizeOptions, config: object = LLAMA) {
  const src = await writeModel(fresh(), tensors, config);
  const out = fresh();
  const report = await quantizeModel(src, out, options);
  return { src, out, report, tensors: await readModel(out) };
}

describe("quantizeModel: the tensors", () => {
  const shapes = [
    [64, 64],
    [7, 9],
    [1, 1],
    [33, 129],
    [130, 64],
  ] as const;
  const dtypes = { float32: "f32", float16: "f16", bfloat16: "bf16" } as const satisfies Record<string, FloatDType>;
  for (const type of ["nf4", "fp4"] as const) {
    for (const [computeDtype, dtype] of Object.entries(dtypes) as [keyof typeof dtypes, FloatDType][]) {
      it(`${type}, ${computeDtype}: codes, scales and state of weights of any shape`, async () => {
        for (const shape of shapes) {
          for (const blocksize of [32, 64, 4096]) {
            const x = normals(shape[0] * shape[1], `${shape}`);
            const { tensors, report } = await quantized(
              { [NAME]: f32Tensor(x, shape) },
              { type, blocksize, computeDtype },
            );
            const rounded = Float32Array.from(x, (v) => round(dtype, v));
            const expected = quantize4bit(rounded, type, TABLES[type], blocksize);
            expect(tensors.get(NAME)).toEqual({
              dtype: "U8",
              shape: [expected.packed.length, 1],
              bytes: expected.packed,
            });
            expect(asF32(tensors.get(`${NAME}.absmax`))).toEqual(expected.absmax);
            expect(tensors.get(`${NAME}.quant_map`)?.shape).toEqual([16]);
            const state = Buffer.from(tensors.get(`${NAME}.quant_state.bitsandbytes__${type}`)!.bytes).toString();
            const size = `[${shape.join(", ")}]`;
            expect(state).toBe(
              `{"quant_type": "${type}", "blocksize": ${blocksize}, "dtype": "${computeDtype}", "shape": ${size}}`,
            );
            expect(tensors.size).toBe(4);
            expect(report.quantizedParameters).toBe(x.length);
          }
        }
      });
    }
  }

  it("double quantization nests the scales of the whole weight", async () => {
    const shape = [300, 129];
    const x = normals(300 * 129, "nested");
    const { tensors } = await quantized(
      { [NAME]: f32Tensor(x, shape) },
      { doubleQuant: true, computeDtype: "float32" },
    );
    const { packed, absmax } = quantize4bit(x, "nf4", TABLES.nf4, 64);
    const offset = mean(absmax);
    const code = createDynamicMap();
    const nested = quantizeBlockwise(absmax, code, 256, offset);
    expect(tensors.get(NAME)?.bytes).toEqual(packed);
    expect(tensors.get(`${NAME}.absmax`)).toEqual({ dtype: "U8", shape: [absmax.length], bytes: nested.q });
    expect(asF32(tensors.get(`${NAME}.nested_absmax`))).toEqual(nested.absmax);
    expect(asF32(tensors.get(`${NAME}.nested_quant_map`))).toEqual(code);
    const state = Buffer.from(tensors.get(`${NAME}.quant_state.bitsandbytes__nf4`)!.bytes).toString();
    expect(JSON.parse(state)).toEqual({
      quant_type: "nf4",
      blocksize: 64,
      dtype: "float32",
      shape,
      nested_blocksize: 256,
      nested_dtype: "float32",
      nested_offset: offset,
    });
  });

  it("int8 rounds to the compute dtype, then to float16, and quantizes by row", async () => {
    const shape = [37, 51];
    const x = normals(37 * 51, "int8");
    const { tensors, report } = await quantized({ [NAME]: f32Tensor(x, shape) }, { type: "int8" });
    const half = Float32Array.from(x, (v) => round("f16", round("bf16", v)));
    const { q, scale } = int8VectorwiseQuant(half, 37, 51);
    expect(tensors.get(NAME)).toEqual({ dtype: "I8", shape, bytes: new Uint8Array(q.buffer) });
    const module = NAME.replace(/weight$/, "");
    expect(asF32(tensors.get(`${module}SCB`))).toEqual(scale);
    expect(tensors.get(`${module}weight_format`)).toEqual({ dtype: "U8", shape: [], bytes: Uint8Array.of(0) });
    expect(report.blocksize).toBeUndefined();
  });

  it("stores the rest in the compute dtype, integers as they are", async () => {
    const x = normals(40, "rest");
    const integers = { dtype: "I64", shape: [3], bytes: new Uint8Array(24).fill(7) } as const;
    const scalar = f32Tensor([1.2345678], []);
    const wide = { dtype: "F64", shape: [40], bytes: new Uint8Array(Float64Array.from(x).buffer) } as const;
    const given = {
      [NAME]: f32Tensor(x, [4, 10]),
      "model.norm.weight": f32Tensor(x, [40]),
      "model.wide": wide,
      "model.position_ids": integers,
      "model.scale": scalar,
      "model.empty": f32Tensor([], [0, 4]),
      "model.embed_tokens.weight": f32Tensor(x, [20, 2]),
    };
    for (const [computeDtype, dtype, stored] of [
      ["bfloat16", "bf16", "BF16"],
      ["float16", "f16", "F16"],
    ] as const) {
      const { tensors, report } = await quantized(given, { computeDtype });
      const rounded = Uint16Array.from(x, (v) => encode(dtype, round(dtype, v)));
      const bytes = new Uint8Array(rounded.buffer);
      expect(tensors.get("model.norm.weight")).toEqual({ dtype: stored, shape: [40], bytes });
      expect(tensors.get("model.wide")).toEqual({ dtype: stored, shape: [40], bytes });
      expect(tensors.get("model.embed_tokens.weight")).toEqual({ dtype: stored, shape: [20, 2], bytes });
      expect(tensors.get("model.position_ids")).toEqual(integers);
      expect(tensors.get("model.scale")?.shape).toEqual([]);
      expect(tensors.get("model.empty")).toEqual({ dtype: stored, shape: [0, 4], bytes: new Uint8Array(0) });
      expect(report.kept.find(({ name }) => name === "model.embed_tokens.weight")?.reason).toBe("embedding");
    }
  });

  it("transposes the Conv1D weights of GPT-2", async () => {
    const x = normals(24 * 72, "conv1d");
    const name = "transformer.h.0.attn.c_attn.weight";
    const { src, out, tensors } = await quantized(
      { [name]: f32Tensor(x, [24, 72]) },
      { computeDtype: "float32" },
      { model_type: "gpt2", architectures: ["GPT2LMHeadModel"] },
    );
    const turned = Float32Array.from(x, (_, i) => x[(i % 24) * 72 + Math.floor(i / 24)]!);
    expect(tensors.get(name)?.bytes).toEqual(quantize4bit(turned, "nf4", TABLES.nf4, 64).packed);
    const { tensors: compared } = await compareModels(src, out);
    expect(compared[0]?.shape).toEqual([72, 24]);
    expect(compared[0]?.relative).toBeLessThan(0.15);
  });

  it("a weight of several slices is quantized as one", async () => {
    const shape = [1031, 4100];
    const block = normals(4100, "slices");
    const x = new Float32Array(1031 * 4100);
    for (let row = 0; row < 1031; row++) x.set(block.subarray(row), row * 4100);
    const { tensors } = await quantized({ [NAME]: f32Tensor(x, shape) }, { blocksize: 4096, doubleQuant: true });
    const rounded = Float32Array.from(x, (v) => round("bf16", v));
    const { packed, absmax } = quantize4bit(rounded, "nf4", TABLES.nf4, 4096);
    expect(Buffer.compare(tensors.get(NAME)!.bytes, packed)).toBe(0);
    const nested = quantizeBlockwise(absmax, createDynamicMap(), 256, mean(absmax));
    expect(tensors.get(`${NAME}.absmax`)!.bytes).toEqual(nested.q);
  });
});

describe("quantizeModel: the folder", () => {
  it("has a config.json with quantization_config and the compute dtype, and the source's other files", async () => {
    const src = fresh();
    await makeTinyModel(src);
    const out = fresh();
    const report = await quantizeModel(src, out, { doubleQuant: true, computeDtype: "float16", skip: ["o_proj"] });
    const config = JSON.parse(readFileSync(join(out, "config.json"), "utf8"));
    const original = JSON.parse(readFileSync(join(src, "config.json"), "utf8"));
    const { quantization_config, dtype, ...rest } = config;
    expect({ ...rest, dtype: "bfloat16" }).toEqual(original);
    expect(dtype).toBe("float16");
    expect(quantization_config).toMatchObject({
      quant_method: "bitsandbytes",
      load_in_4bit: true,
      bnb_4bit_quant_type: "nf4",
      bnb_4bit_use_double_quant: true,
      bnb_4bit_compute_dtype: "float16",
      llm_int8_skip_modules: ["lm_head", "o_proj"],
    });
    const others = ["generation_config.json", "tokenizer.json", "tokenizer_config.json"];
    for (const file of others) expect(readFileSync(join(out, file))).toEqual(readFileSync(join(src, file)));
    expect(listing(out)).toEqual(["config.json", ...others, "model.safetensors"].sort());
    expect([...report.files].sort()).toEqual(listing(out));
    expect(report.quantized.some(({ name }) => name.includes("o_proj"))).toBe(false);
    expect(report.kept.filter(({ reason }) => reason === "skipped on request").length).toBe(2);
  });

  it("gives the same bytes for a sharded source", async () => {
    const [whole, sharded, a, b] = [fresh(), fresh(), fresh(), fresh()];
    await makeTinyModel(whole, { tied: false });
    await makeTinyModel(sharded, { tied: false, maxShardSize: "200kB" });
    expect(listing(sharded).filter((file) => file.endsWith(".safetensors")).length).toBeGreaterThan(3);
    await quantizeModel(whole, a);
    await quantizeModel(sharded, b);
    const tensors = await readModel(a);
    expect(tensors.has("lm_head.weight.absmax")).toBe(false);
    expect(new Map([...(await readModel(b))].sort())).toEqual(new Map([...tensors].sort()));
  });

  it("says when a skip pattern matches nothing", async () => {
    const src = fresh();
    await makeTinyModel(src);
    const report = await quantizeModel(src, fresh(), { skip: ["nonsense", "o_proj"] });
    expect(report.notes).toEqual([expect.stringContaining("skip pattern nonsense")]);
  });
});

describe("quantizeModel: errors, progress, abort", () => {
  it("reports the errors that compareModels finds", async () => {
    for (const options of [{ type: "nf4" }, { type: "fp4", doubleQuant: true }, { type: "int8" }] as const) {
      const src = fresh();
      await makeTinyModel(src, { hidden: 60, intermediate: 77, vocab: 101, dtype: "f32" });
      const out = fresh();
      const report = await quantizeModel(src, out, { ...options, errors: true });
      const comparison = await compareModels(src, out);
      const compared = new Map(comparison.tensors.map((tensor) => [tensor.name, tensor]));
      expect(report.quantized.length).toBe(14);
      for (const { name, error, bitsPerWeight } of report.quantized) {
        const { max, rms, relative, quantized, ...other } = compared.get(name)!;
        expect(error).toEqual({ max, rms, relative });
        expect(quantized).toBe(true);
        expect(other.bitsPerWeight).toBeCloseTo(bitsPerWeight, 1);
        expect(rms).toBeGreaterThan(0);
        expect(relative).toBeLessThan(options.type === "int8" ? 0.02 : 0.2);
      }
      const { parameters, bitsPerWeight, ...total } = comparison.total;
      expect(report.error?.max).toBe(total.max);
      expect(report.error?.rms).toBeCloseTo(total.rms, 12);
      expect(parameters).toBe(report.quantizedParameters);
      expect(bitsPerWeight).toBeGreaterThan(4);
    }
  });

  it("counts every weight once", async () => {
    const src = fresh();
    await makeTinyModel(src);
    const seen: QuantizeProgress[] = [];
    const report = await quantizeModel(src, fresh(), { onProgress: (progress) => seen.push(progress) });
    expect(seen.at(-1)).toMatchObject({ done: report.parameters, total: report.parameters });
    expect(seen.every(({ done }, i) => i === 0 || done >= seen[i - 1]!.done)).toBe(true);
    expect(new Set(seen.map(({ tensor }) => tensor)).size).toBe(20);
  });

  it("stops with the signal's reason and leaves nothing", async () => {
    const src = fresh();
    await makeTinyModel(src);
    const parent = fresh();
    const controller = new AbortController();
    const onProgress = () => controller.abort(new Error("enough"));
    const options = { signal: controller.signal, onProgress };
    await expect(quantizeModel(src, join(parent, "deep", "out"), options)).rejects.toThrow("enough");
    expect(listing(parent)).toEqual([]);
    expect(listing(folder)).not.toContain(parent);
    await expect(quantizeModel(src, join(parent, "out"), options)).rejects.toThrow("enough");
  });

  for (const [type, bad, computeDtype] of [
    ["nf4", Number.NaN, "bfloat16"],
    ["fp4", Number.POSITIVE_INFINITY, "float32"],
    ["int8", Number.NEGATIVE_INFINITY, "bfloat16"],
    ["nf4", 1e6, "float16"],
    ["int8", 1e6, "bfloat16"],
  ] as const) {
    it(`${bad} in a weight is an error that names it (${type}, ${computeDtype}), and nothing is left`, async () => {
      const x = normals(4096, "bad");
      x[1000] = bad;
      const good = f32Tensor(normals(4096, "good"), [64, 64]);
      const tensors = {
        "model.layers.0.a.weight": good,
        [NAME]: f32Tensor(x, [64, 64]),
        "model.layers.1.b.weight": good,
      };
      const src = await writeModel(fresh(), tensors);
      const out = fresh();
      const attempt = quantizeModel(src, out, { type, computeDtype });
      await expect(attempt).rejects.toBeInstanceOf(NonFiniteError);
      await expect(attempt).rejects.toThrow(new RegExp(`${NAME.replaceAll(".", "\\.")}: .* in elements 960 to 1023`));
      expect(listing(out)).toEqual([]);
      expect(listing(folder).filter((file) => file.endsWith(".tmp"))).toEqual([]);
      // The backend is as good as before.
      await quantizeModel(await writeModel(fresh(), { [NAME]: good }), out, { type });
    });
  }

  it("refuses what is quantized already, has nothing to quantize, or has 8-bit floats", async () => {
    const { out } = await quantized({ [NAME]: f32Tensor(normals(64, "once"), [8, 8]) }, {});
    await expect(quantizeModel(out, fresh())).rejects.toThrow(/already quantized \(bitsandbytes nf4\)/);
    const gptq = await writeModel(
      fresh(),
      { [NAME]: f32Tensor([1], [1, 1]) },
      { ...LLAMA, quantization_config: { quant_method: "gptq" } },
    );
    await expect(quantizeModel(gptq, fresh())).rejects.toThrow(/already quantized \(gptq\)/);
    const { tensors } = await quantized({ [NAME]: f32Tensor(normals(64, "twice"), [8, 8]) }, { type: "int8" });
    const bare = await writeModel(fresh(), Object.fromEntries(tensors));
    await expect(quantizeModel(bare, fresh())).rejects.toThrow(/already quantized \(bitsandbytes int8 tensors\)/);

    const norms = await writeModel(fresh(), { "model.norm.weight": f32Tensor([1, 2], [2]) });
    await expect(quantizeModel(norms, fresh())).rejects.toThrow(/nothing to quantize: it has no linear layers/);
    const linear = await writeModel(fresh(), { [NAME]: f32Tensor([1, 2], [2, 1]) });
    await expect(quantizeModel(linear, fresh(), { skip: ["up_proj"] })).rejects.toThrow(
      /every linear layer is skipped/,
    );
    const fp8 = await writeModel(fresh(), {
      [NAME]: { dtype: "F8_E4M3", shape: [2, 2], bytes: new Uint8Array(4) },
    });
    await expect(quantizeModel(fp8, fresh())).rejects.toBeInstanceOf(UnsupportedError);
  });

  it("refuses options that make no sense, before it looks at anything", async () => {
    const bad = [
      { type: "nf5" },
      { blocksize: 65 },
      { computeDtype: "float64" },
      { maxShardSize: "much" },
      { type: "int8", blocksize: 64 },
      { type: "int8", doubleQuant: true },
    ] as unknown as QuantizeOptions[];
    for (const options of bad) {
      await expect(quantizeModel("nowhere", fresh(), options)).rejects.toBeInstanceOf(ArgumentError);
    }
    await expect(quantizeModel("nowhere", fresh())).rejects.toBeInstanceOf(FormatError);
  });
});

describe("inspectModel and compareModels", () => {
  it("inspect gives logical shapes, storage and sizes", async () => {
    const src = fresh();
    await makeTinyModel(src);
    const out = fresh();
    const report = await quantizeModel(src, out, { doubleQuant: true });
    const before = await inspectModel(src);
    const after = await inspectModel(out);
    expect(before.quantization).toBeNull();
    expect(after.quantization).toMatchObject({ type: "nf4", doubleQuant: true });
    expect(after.tensors.map(({ name, shape }) => [name, shape]).sort()).toEqual(
      before.tensors.map(({ name, shape }) => [name, shape]).sort(),
    );
    expect(after.parameters).toBe(report.parameters);
    expect(after.diskBytes).toBe(report.bytes);
    expect(before.memoryBytes).toBe(2 * before.parameters);
    expect(after.memoryBytes).toBeLessThan(after.diskBytes);
    const weight = after.tensors.find(({ name }) => name.endsWith("gate_proj.weight"))!;
    expect(weight).toMatchObject({ shape: [352, 128], stored: "nf4", blocksize: 64, doubleQuant: true });
  });

  it("compare lists what only one model has and what has another shape, and ranks the worst first", async () => {
    const x = normals(4096, "compare");
    const shared = { "model.layers.0.a.weight": f32Tensor(x, [64, 64]), "model.norm.weight": f32Tensor(x, [4096]) };
    const a = await writeModel(fresh(), {
      ...shared,
      "model.old.weight": f32Tensor([1], [1]),
      [NAME]: f32Tensor(x, [64, 64]),
    });
    const changed = Float32Array.from(x, (v, i) => v + (i === 5 ? 0.25 : 0));
    const b = await writeModel(fresh(), {
      "model.layers.0.a.weight": f32Tensor(changed, [64, 64]),
      "model.norm.weight": shared["model.norm.weight"],
      "model.new.weight": f32Tensor([1], [1]),
      [NAME]: f32Tensor(x, [32, 128]),
    });
    const report = await compareModels(a, b);
    expect(report.onlyOriginal).toEqual(["model.old.weight"]);
    expect(report.onlyQuantized).toEqual(["model.new.weight"]);
    expect(report.mismatched).toEqual([{ name: NAME, original: [64, 64], quantized: [32, 128] }]);
    expect(report.worst).toEqual(["model.layers.0.a.weight", "model.norm.weight"]);
    const [worst] = report.tensors.filter(({ name }) => name === report.worst[0]);
    expect(worst!.max).toBeCloseTo(0.25, 6);
    expect(worst!.rms).toBeCloseTo(0.25 / 64, 6);
    const norm = Math.sqrt(x.reduce((sum, v) => sum + v * v, 0));
    expect(worst!.relative).toBeCloseTo(0.25 / norm, 6);
    expect(report.total.parameters).toBe(0);

    const other = await writeModel(fresh(), { "something.else": f32Tensor([1], [1]) });
    await expect(compareModels(a, other)).rejects.toThrow(/no weight in common/);
  });
});
