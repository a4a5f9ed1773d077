import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, describe, expect, it } from "vitest";
import { ArgumentError, DisposedError, FormatError, UnsupportedError } from "#halfbyte/core/errors.js";
import { dequantizeGguf } from "#halfbyte/formats/gguf-dequant.js";
import { type GgufModelSource, openGgufModel } from "#halfbyte/formats/gguf-model.js";
import {
  f32,
  type GgufSpec,
  ggufBytes,
  list,
  type TensorSpec,
  TINY_LLAMA,
  type TinyModel,
  type Typed,
  text,
  tinyModel,
  u32,
} from "../helpers/gguf-writer.js";

const folder = mkdtempSync(join(tmpdir(), "halfbyte-gguf-model-"));
afterAll(() => rmSync(folder, { recursive: true }));

let files = 0;
function save(spec: GgufSpec): string {
  const path = join(folder, `${files++}.gguf`);
  writeFileSync(path, ggufBytes(spec));
  return path;
}

const LLAMA: TinyModel = {
  ...TINY_LLAMA,
  layers: 2,
  types: ["Q4_1", "F16", "Q8_0", "BF16", "F32", "Q5_0", "Q4_0"],
};
const QWEN2: TinyModel = { ...LLAMA, architecture: "qwen2", bias: true, tied: true, seed: 2 };
const K_QUANTS: TinyModel = {
  ...LLAMA,
  hidden: 256,
  heads: 4,
  kvHeads: 4,
  headDim: 64,
  intermediate: 256,
  types: ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q5_1"],
};

type Spec = ReturnType<typeof tinyModel>;

/** The model with metadata replaced or, where undefined, removed. */
function changed(spec: Spec, entries: Record<string, Typed | undefined>): Spec {
  const kept = spec.metadata.filter(([key]) => !(key in entries));
  const added = Object.entries(entries).filter((entry): entry is [string, Typed] => entry[1] !== undefined);
  return { ...spec, metadata: [...kept, ...added] };
}

const open = (spec: GgufSpec): Promise<GgufModelSource> => openGgufModel(save(spec));

async function refuses(
  spec: GgufSpec,
  error: typeof FormatError | typeof UnsupportedError,
  message: RegExp,
): Promise<void> {
  const opening = open(spec);
  await expect(opening).rejects.toThrow(message);
  await expect(opening).rejects.toBeInstanceOf(error);
}

const HF_NAMES: Record<string, string> = {
  "token_embd.weight": "model.embed_tokens.weight",
  "output_norm.weight": "model.norm.weight",
  "output.weight": "lm_head.weight",
};
for (const i of [0, 1]) {
  const [from, to] = [`blk.${i}`, `model.layers.${i}`];
  HF_NAMES[`${from}.attn_norm.weight`] = `${to}.input_layernorm.weight`;
  HF_NAMES[`${from}.ffn_norm.weight`] = `${to}.post_attention_layernorm.weight`;
  for (const part of ["weight", "bias"]) {
    HF_NAMES[`${from}.attn_q.${part}`] = `${to}.self_attn.q_proj.${part}`;
    HF_NAMES[`${from}.attn_k.${part}`] = `${to}.self_attn.k_proj.${part}`;
    HF_NAMES[`${from}.attn_v.${part}`] = `${to}.self_attn.v_proj.${part}`;
    HF_NAMES[`${from}.attn_output.${part}`] = `${to}.self_attn.o_proj.${part}`;
  }
  HF_NAMES[`${from}.ffn_gate.weight`] = `${to}.mlp.gate_proj.weight`;
  HF_NAMES[`${from}.ffn_up.weight`] = `${to}.mlp.up_proj.weight`;
  HF_NAMES[`${from}.ffn_down.weight`] = `${to}.mlp.down_proj.weight`;
}

const PLAIN = ["F32", "F16", "BF16"];

/** The bytes that a tensor must come out as: all of it, with whole heads reordered the way the definition reads. */
function expectedBytes({ type, data, shape }: TensorSpec, heads: number | undefined): Buffer {
  const values = PLAIN.includes(type) ? data : new Uint8Array(dequantizeGguf(type, data).buffer);
  const rows = Array.from({ length: shape[0]! }, (_, r) => {
    const bytes = values.byteLength / shape[0]!;
    return values.subarray(r * bytes, (r + 1) * bytes);
  });
  if (heads === undefined) return Buffer.concat(rows);
  const half = rows.length / heads / 2;
  const out: Uint8Array[] = [];
  // reshape(heads, half, 2, columns).swapaxes(1, 2)
  for (let head = 0; head < heads; head++) {
    for (let pair = 0; pair < 2; pair++) {
      for (let i = 0; i < half; i++) out.push(rows[head * 2 * half + 2 * i + pair]!);
    }
  }
  return Buffer.concat(out);
}

function headsOf(name: string, model: TinyModel): number | undefined {
  if (model.architecture !== "llama") return undefined;
  if (name.includes("attn_q.")) return model.heads;
  return name.includes("attn_k.") ? model.kvHeads : undefined;
}

describe("openGgufModel", () => {
  for (const [label, model] of Object.entries({ llama: LLAMA, qwen2: QWEN2, "K types": K_QUANTS })) {
    it(`${label}: every tensor under its name, in its shape and rows, whole and in slices`, async () => {
      const spec = tinyModel(model);
      const source = await open(spec);
      expect(source.kind).toBe("gguf");
      expect([...source.tensors.keys()]).toEqual(spec.tensors.map(({ name }) => HF_NAMES[name]));
      for (const tensor of spec.tensors) {
        const name = HF_NAMES[tensor.name]!;
        const plain = PLAIN.includes(tensor.type);
        expect(source.tensors.get(name)).toEqual({
          name,
          dtype: plain ? tensor.type : "F32",
          shape: [...tensor.shape],
        });
        expect(source.storedBytes(name)).toBe(tensor.data.byteLength);
        expect(source.storedType(name)).toBe(tensor.type);
        const want = expectedBytes(tensor, headsOf(tensor.name, model));
        const rows = tensor.shape[0]!;
        const perRow = want.byteLength / rows;
        for (const [begin, end] of [
          [0, rows],
          [0, 1],
          [rows - 1, rows],
          [3, 3],
          [1, 12],
          [7, 29],
          [rows >> 1, rows],
        ] as const) {
          const got = await source.readRows(name, begin, Math.min(end, rows));
          const slice = want.subarray(begin * perRow, Math.min(end, rows) * perRow);
          expect(Buffer.compare(got, slice), `${name} [${begin}, ${end})`).toBe(0);
        }
      }
      await source.close();
    });
  }

  it("reorders biases of q and k as well", async () => {
    const model = { ...LLAMA, bias: true };
    const spec = tinyModel(model);
    const source = await open(spec);
    for (const tensor of spec.tensors.filter(({ name }) => name.endsWith("attn_k.bias"))) {
      const want = expectedBytes(tensor, model.kvHeads);
      expect(Buffer.compare(want, tensor.data)).not.toBe(0);
      expect(Buffer.compare(await source.readRows(HF_NAMES[tensor.name]!, 0, 32), want)).toBe(0);
    }
    expect(source.config).toMatchObject({ attention_bias: true, mlp_bias: false });
    await source.close();
  });

  it("slices quantized vectors inside their blocks", async () => {
    const spec = tinyModel(LLAMA);
    const norm = spec.tensors.find(({ name }) => name === "output_norm.weight")!;
    const data = spec.tensors.find(({ type }) => type === "Q8_0")!.data.slice(0, 68);
    const tensors = spec.tensors.map((tensor) => (tensor === norm ? { ...norm, type: "Q8_0" as const, data } : tensor));
    const source = await open({ ...spec, tensors });
    const want = dequantizeGguf("Q8_0", data);
    for (const [begin, end] of [
      [0, 64],
      [5, 9],
      [30, 34],
      [63, 64],
    ] as const) {
      const got = await source.readRows("model.norm.weight", begin, end);
      expect(new Float32Array(got.buffer)).toEqual(want.slice(begin, end));
    }
    await source.close();
  });

  it("writes a llama's config.json", async () => {
    const source = await open(tinyModel(LLAMA));
    expect(source.config).toEqual({
      architectures: ["LlamaForCausalLM"],
      attention_bias: false,
      attention_dropout: 0,
      bos_token_id: 1,
      dtype: "bfloat16",
      eos_token_id: 2,
      head_dim: 16,
      hidden_act: "silu",
      hidden_size: 64,
      initializer_range: 0.02,
      intermediate_size: 96,
      max_position_embeddings: 512,
      mlp_bias: false,
      model_type: "llama",
      num_attention_heads: 4,
      num_hidden_layers: 2,
      num_key_value_heads: 2,
      pad_token_id: null,
      pretraining_tp: 1,
      rms_norm_eps: Math.fround(1e-5),
      rope_parameters: { rope_theta: 50000, rope_type: "default" },
      rope_theta: 50000,
      tie_word_embeddings: false,
      use_cache: true,
      vocab_size: 37,
    });
    expect(Object.keys(source.config)).toEqual(Object.keys(source.config).sort());
    const generation = JSON.parse(Buffer.from(await source.sidecars.get("generation_config.json")!()).toString());
    expect(generation).toEqual({ _from_model_config: true, bos_token_id: 1, eos_token_id: 2, use_cache: true });
    await source.close();
  });

  it("writes a qwen2's config.json", async () => {
    const source = await open(changed(tinyModel(QWEN2), { "tokenizer.ggml.bos_token_id": u32(0xffffffff) }));
    expect(source.config).toMatchObject({
      architectures: ["Qwen2ForCausalLM"],
      model_type: "qwen2",
      tie_word_embeddings: true,
      bos_token_id: null,
    });
    for (const key of ["attention_bias", "mlp_bias", "head_dim"]) expect(source.config).not.toHaveProperty(key);
    await source.close();
    const wide = await open(tinyModel({ ...QWEN2, headDim: 32 }));
    expect(wide.config).toMatchObject({ head_dim: 32 });
    await wide.close();
  });

  it("takes the float type from files without blocks", async () => {
    for (const [types, dtype] of [
      [["F32"], "float32"],
      [["F16", "F32"], "float16"],
      [["BF16"], "bfloat16"],
      [["F16", "Q8_0"], "bfloat16"],
    ] as const) {
      const source = await open(tinyModel({ ...LLAMA, types }));
      expect(source.config.dtype).toBe(dtype);
      await source.close();
    }
  });

  it("fills in what a file may leave out, and reads sizes given per layer", async () => {
    const source = await open(
      changed(tinyModel({ ...LLAMA, kvHeads: 4 }), {
        "llama.attention.head_count": list("uint32", [4, 4]),
        "llama.attention.head_count_kv": undefined,
        "llama.rope.freq_base": undefined,
        "llama.rope.dimension_count": undefined,
      }),
    );
    expect(source.config).toMatchObject({ num_key_value_heads: 4, head_dim: 16, rope_theta: 10000 });
    await source.close();
  });

  it("writes scaled rotary embeddings", async () => {
    const scaled = async (entries: Record<string, Typed>): Promise<unknown> => {
      const source = await open(changed(tinyModel(LLAMA), entries));
      await source.close();
      return source.config.rope_parameters;
    };
    const type = "llama.rope.scaling.type";
    const factor = "llama.rope.scaling.factor";
    expect(await scaled({ [type]: text("none") })).toEqual({ rope_theta: 50000, rope_type: "default" });
    expect(await scaled({ [type]: text("linear"), [factor]: f32(4) })).toEqual({
      rope_theta: 50000,
      rope_type: "linear",
      factor: 4,
    });
    const original = { "llama.rope.scaling.original_context_length": u32(128) };
    expect(await scaled({ [type]: text("yarn"), [factor]: f32(4), ...original })).toEqual({
      rope_theta: 50000,
      rope_type: "yarn",
      factor: 4,
      original_max_position_embeddings: 128,
    });
    await refuses(changed(tinyModel(LLAMA), { [type]: text("magic") }), FormatError, /none, linear or yarn.*'magic'/);
    await refuses(changed(tinyModel(LLAMA), { [type]: text("linear") }), FormatError, /scaling.factor is missing/);
  });

  it("leaves rotary tables out and says so", async () => {
    const spec = tinyModel(LLAMA);
    const data = new Uint8Array(Float32Array.of(1, 1, 1, 1, 2, 2, 2, 2).buffer);
    const table: TensorSpec = { name: "rope_freqs.weight", shape: [8], type: "F32", data };
    const source = await open({ ...spec, tensors: [table, ...spec.tensors] });
    expect(source.tensors.size).toBe(spec.tensors.length);
    expect(source.notes).toHaveLength(1);
    expect(source.notes[0]).toMatch(/rope_freqs.weight is left out.*rope_parameters/);
    await source.close();
  });

  it("names the tokenizer that it does not convert", async () => {
    const source = await open(tinyModel(LLAMA));
    expect(source.tokenizerNote).toMatch(/tokenizer of type 'llama' \(SentencePiece\).*copy the tokenizer files/);
    expect([...source.sidecars.keys()]).toEqual(["generation_config.json"]);
    await source.close();
    const none = await open(changed(tinyModel(LLAMA), { "tokenizer.ggml.model": undefined }));
    expect(none.tokenizerNote).toMatch(/without a tokenizer/);
    await none.close();
  });

  it("refuses other models, naming what it reads", async () => {
    const spec = tinyModel(LLAMA);
    const set = (entries: Record<string, Typed | undefined>): Spec => changed(spec, entries);
    await refuses(set({ "general.architecture": text("gemma2") }), UnsupportedError, /'gemma2'.*llama, qwen2/);
    await refuses(set({ "general.architecture": text("toString") }), UnsupportedError, /llama, qwen2/);
    await refuses(set({ "general.architecture": undefined }), FormatError, /general.architecture is missing/);
    await refuses(set({ "general.architecture": u32(3) }), FormatError, /general.architecture: expected string/);
    await refuses(set({ "llama.expert_count": u32(8) }), UnsupportedError, /mixture of 8 experts/);
    await refuses(
      set({ "llama.rope.dimension_count": u32(8) }),
      FormatError,
      /attn_k.weight' has shape \[32, 64\], expected \[16, 64\]/,
    );
    await refuses(set({ "llama.attention.key_length": u32(32) }), UnsupportedError, /rotary part of 16/);
    await refuses(set({ "llama.attention.value_length": u32(8) }), UnsupportedError, /values of 8/);
    const perLayer = list("uint32", [4, 2]);
    await refuses(set({ "llama.attention.head_count": perLayer }), UnsupportedError, /differs between layers/);
  });

  it("refuses metadata that is missing or contradicts the tensors", async () => {
    const spec = tinyModel(LLAMA);
    const set = (key: string, value: Typed | undefined): Spec => changed(spec, { [`llama.${key}`]: value });
    for (const key of [
      "block_count",
      "embedding_length",
      "feed_forward_length",
      "context_length",
      "attention.head_count",
      "attention.layer_norm_rms_epsilon",
    ]) {
      await refuses(set(key, undefined), FormatError, new RegExp(`llama.${key} is missing`));
      await refuses(set(key, text("12")), FormatError, new RegExp(`llama.${key}: expected .*received string "12"`));
    }
    await refuses(set("block_count", u32(0)), FormatError, /block_count is 0/);
    await refuses(set("block_count", f32(1.5)), FormatError, /expected integer, received number/);
    await refuses(set("block_count", u32(3)), FormatError, /tensor 'blk.2.attn_norm.weight' is missing/);
    await refuses(set("block_count", u32(0xffffffff)), FormatError, /'blk.2.attn_norm.weight' is missing/);
    await refuses(set("block_count", u32(1)), UnsupportedError, /'blk.1.attn_norm.weight'.*1 layers has no parameter/);
    await refuses(set("embedding_length", u32(128)), FormatError, /shape \[37, 64\], expected \[37, 128\]/);
    await refuses(set("attention.head_count_kv", u32(3)), FormatError, /do not fit together/);
    await refuses(set("attention.head_count_kv", u32(4)), FormatError, /attn_k.weight' has shape \[32, 64\]/);
  });

  it("refuses tensors that are missing, of another shape, or without a place", async () => {
    const spec = tinyModel(LLAMA);
    for (const name of ["token_embd.weight", "output_norm.weight", "blk.1.ffn_up.weight"]) {
      const tensors = spec.tensors.filter((tensor) => tensor.name !== name);
      await refuses(
        { ...spec, tensors },
        FormatError,
        name === "token_embd.weight" ? /\[0, 64\]|missing/ : /is missing/,
      );
    }
    const extra = (name: string): GgufSpec => {
      const data = new Uint8Array(4 * 64);
      return { ...spec, tensors: [...spec.tensors, { name, shape: [64], type: "F32", data }] };
    };
    for (const name of [
      "blk.0.ffn_gate_exps.weight",
      "blk.0.attn_q_norm.weight",
      "blk.00.attn_norm.weight",
      "blk.0.attn_norm.bias",
      "blk.0.constructor.weight",
      "v.patch_embd.weight",
    ]) {
      await refuses(extra(name), UnsupportedError, new RegExp(`tensor '${name}'`));
    }
    await refuses(extra("blk.0.attn_q.bias"), FormatError, /'blk.0.attn_k.bias' is missing/);
    await refuses(extra("blk.1.attn_q.bias"), UnsupportedError, /biases in some layers or modules only/);
    const noBias = tinyModel({ ...QWEN2, bias: false });
    await refuses(noBias, FormatError, /'blk.0.attn_q.bias' is missing/);
  });

  it("refuses tensor types without a decoder when it opens", async () => {
    const types = ["IQ4_NL", "F16"] as const;
    await refuses(tinyModel({ ...LLAMA, types }), UnsupportedError, /'token_embd.weight' of GGUF type IQ4_NL.*Q4_0/);
  });

  it("refuses unknown names and rows outside a tensor, and reads nothing once closed", async () => {
    const source = await open(tinyModel(LLAMA));
    const name = "model.layers.0.self_attn.q_proj.weight";
    await expect(source.readRows("blk.0.attn_q.weight", 0, 1)).rejects.toBeInstanceOf(ArgumentError);
    expect(() => source.storedBytes("nope")).toThrow(ArgumentError);
    for (const [begin, end] of [
      [-1, 1],
      [0, 65],
      [2, 1],
      [0.5, 1],
    ] as const) {
      await expect(source.readRows(name, begin, end)).rejects.toBeInstanceOf(ArgumentError);
    }
    const whole = Buffer.from(await source.readRows(name, 0, 64));
    const [early, late] = await Promise.all([source.readRows(name, 0, 40), source.readRows(name, 20, 64)]);
    expect(Buffer.compare(early, whole.subarray(0, 40 * 256))).toBe(0);
    expect(Buffer.compare(late, whole.subarray(20 * 256))).toBe(0);
    await source.close();
    await source.close();
    await expect(source.readRows(name, 0, 1)).rejects.toBeInstanceOf(DisposedError);
    await expect(source.readRows(name, 1, 1)).rejects.toBeInstanceOf(DisposedError);
  });
});

/** A folder that holds a GGUF file, and in it or in its `hf` the Hugging Face folder transformers makes from it. */
const real = process.env.HALFBYTE_TEST_MODEL;
const why = "set HALFBYTE_TEST_MODEL to a folder with a .gguf file and, in it or in hf/, its model.safetensors in bf16";

describe("a real model", () => {
  if (!real) {
    it.skip(`equals what transformers makes of it (skipped: ${why})`, () => undefined);
    return;
  }

  it("equals what transformers makes of it, rounded to bfloat16, bit for bit", async () => {
    const gguf = readdirSync(real).find((file) => file.endsWith(".gguf"));
    const hf = [join(real, "hf"), real].find((path) => existsSync(join(path, "model.safetensors")));
    if (!gguf || !hf) throw new Error(`${real} does not hold both files: ${why}`);
    const bytes = readFileSync(join(hf, "model.safetensors"));
    const headerBytes = Number(bytes.readBigUInt64LE(0));
    const header = JSON.parse(bytes.toString("utf8", 8, 8 + headerBytes)) as Record<
      string,
      { dtype: string; shape: number[]; data_offsets: [number, number] }
    >;
    delete header.__metadata__;
    const source = await openGgufModel(join(real, gguf));
    expect([...source.tensors.keys()].sort()).toEqual(Object.keys(header).sort());
    for (const [name, { dtype, shape, data_offsets }] of Object.entries(header)) {
      expect(dtype).toBe("BF16");
      expect(source.tensors.get(name)!.shape).toEqual(shape);
      const want = bytes.subarray(8 + headerBytes + data_offsets[0], 8 + headerBytes + data_offsets[1]);
      const rows = shape[0]!;
      const wantRow = want.byteLength / rows;
      // An odd number of rows, so that slices begin and end inside heads.
      for (let begin = 0; begin < rows; begin += 1999) {
        const end = Math.min(rows, begin + 1999);
        const bits = new Uint32Array((await source.readRows(name, begin, end)).buffer);
        const rounded = new Uint16Array(bits.length);
        for (let i = 0; i < bits.length; i++) rounded[i] = (bits[i]! + 0x7fff + ((bits[i]! >>> 16) & 1)) >>> 16;
        const same = Buffer.compare(new Uint8Array(rounded.buffer), want.subarray(begin * wantRow, end * wantRow));
        expect(same, `${name} [${begin}, ${end})`).toBe(0);
      }
    }
    const config = JSON.parse(readFileSync(join(hf, "config.json"), "utf8")) as Record<string, unknown>;
    for (const key of ["transformers_version", "_model_name_or_path", "unk_token_id"]) delete config[key];
    expect(source.config).toMatchObject(config);
    for (const file of ["tokenizer.json", "chat_template.jinja"]) {
      expect(Buffer.compare(await source.sidecars.get(file)!(), readFileSync(join(hf, file))), file).toBe(0);
    }
    await source.close();
  });
});
