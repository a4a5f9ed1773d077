/**
 * Writes a tiny Llama-shaped checkpoint: random weights from a seed, about 1 MB, with everything a Hugging Face folder has.
 * It says nothing sensible, but it loads, quantizes and shards like a large one.
 *
 * Usage: node scripts/make-tiny-model.mjs FOLDER [--seed N] [--untied] [--max-shard-size S]
 */
import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { parseArgs } from "node:util";
import { CheckpointWriter } from "../dist/formats/safetensors-shards.js";
import { dumpPyJson, fromPlain, pyFloat } from "../dist/quant/pyjson.js";

/** Sizes that no block size divides evenly come from the tests; these are the ordinary ones. */
const DEFAULTS = {
  seed: 1,
  hidden: 128,
  intermediate: 352,
  layers: 2,
  heads: 4,
  kvHeads: 2,
  vocab: 512,
  tied: true,
  dtype: "bf16",
  maxShardSize: undefined,
};

const BOS = 1;
const EOS = 2;
const SPECIAL = ["<unk>", "<s>", "</s>"];
const MERGES = [
  "t h",
  "th e",
  "i n",
  "e r",
  "a n",
  "o n",
  "Ġ t",
  "Ġt h",
  "Ġth e",
  "Ġ a",
  "an d",
  "Ġa nd",
  "i s",
  "Ġ is",
  "Ġ o",
  "Ġo f",
];

/**
 * @param {string} folder made if it is not there
 * @param {Partial<typeof DEFAULTS>} options
 */
export async function makeTinyModel(folder, options = {}) {
  const given = Object.fromEntries(Object.entries(options).filter(([, value]) => value !== undefined));
  const model = { ...DEFAULTS, ...given };
  mkdirSync(folder, { recursive: true });
  const tensors = tensorShapes(model);
  const declarations = tensors.map(([name, shape]) => ({ name, shape, dtype: model.dtype.toUpperCase() }));
  const { maxShardSize } = model;
  const writer = new CheckpointWriter(folder, declarations, maxShardSize === undefined ? {} : { maxShardSize });
  const normal = normalNumbers(model.seed);
  for (const [name, shape] of tensors) {
    const values = new Float32Array(shape.reduce((a, b) => a * b, 1));
    const isNorm = shape.length === 1;
    for (let i = 0; i < values.length; i++)
      values[i] = isNorm ? 1 + 0.1 * normal() : normal() / Math.sqrt(model.hidden);
    await writer.write(name, ENCODERS[model.dtype](values));
  }
  await writer.finish();
  for (const [file, value] of Object.entries(jsonFiles(model))) {
    writeFileSync(join(folder, file), `${dumpPyJson(value, { indent: 2 })}\n`);
  }
}

/** Parameters in the order of transformers' state dict. */
function tensorShapes({ hidden, intermediate, layers, heads, kvHeads, vocab, tied }) {
  const headDim = hidden / heads;
  const layer = (i) => [
    [`model.layers.${i}.self_attn.q_proj.weight`, [hidden, hidden]],
    [`model.layers.${i}.self_attn.k_proj.weight`, [kvHeads * headDim, hidden]],
    [`model.layers.${i}.self_attn.v_proj.weight`, [kvHeads * headDim, hidden]],
    [`model.layers.${i}.self_attn.o_proj.weight`, [hidden, hidden]],
    [`model.layers.${i}.mlp.gate_proj.weight`, [intermediate, hidden]],
    [`model.layers.${i}.mlp.up_proj.weight`, [intermediate, hidden]],
    [`model.layers.${i}.mlp.down_proj.weight`, [hidden, intermediate]],
    [`model.layers.${i}.input_layernorm.weight`, [hidden]],
    [`model.layers.${i}.post_attention_layernorm.weight`, [hidden]],
  ];
  return [
    ["model.embed_tokens.weight", [vocab, hidden]],
    ...Array.from({ length: layers }, (_, i) => layer(i)).flat(),
    ["model.norm.weight", [hidden]],
    ...(tied ? [] : [["lm_head.weight", [vocab, hidden]]]),
  ];
}

/** Normally distributed numbers (Box-Muller) from a 32-bit generator (mulberry32). */
function normalNumbers(seed) {
  let state = seed >>> 0;
  const uniform = () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return (((t ^ (t >>> 14)) >>> 0) + 0.5) / 2 ** 32;
  };
  return () => Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform());
}

const ENCODERS = {
  f32: (values) => new Uint8Array(values.buffer),
  /** Nearest even. */
  bf16: (values) => {
    const bits = new Uint32Array(values.buffer);
    const out = Uint16Array.from(bits, (u) => (u + 0x7fff + ((u >>> 16) & 1)) >>> 16);
    return new Uint8Array(out.buffer);
  },
};

function jsonFiles({ hidden, intermediate, layers, heads, kvHeads, vocab, tied, dtype }) {
  const config = {
    architectures: ["LlamaForCausalLM"],
    attention_bias: false,
    attention_dropout: pyFloat(0),
    bos_token_id: BOS,
    dtype: dtype === "f32" ? "float32" : "bfloat16",
    eos_token_id: EOS,
    head_dim: hidden / heads,
    hidden_act: "silu",
    hidden_size: hidden,
    initializer_range: pyFloat(0.02),
    intermediate_size: intermediate,
    max_position_embeddings: 256,
    mlp_bias: false,
    model_type: "llama",
    num_attention_heads: heads,
    num_hidden_layers: layers,
    num_key_value_heads: kvHeads,
    pad_token_id: EOS,
    pretraining_tp: 1,
    rms_norm_eps: pyFloat(1e-5),
    rope_parameters: { rope_theta: pyFloat(10000), rope_type: "default" },
    tie_word_embeddings: tied,
    use_cache: true,
    vocab_size: vocab,
  };
  const generation = { bos_token_id: BOS, eos_token_id: EOS, pad_token_id: EOS };
  const tokenizerConfig = {
    add_bos_token: false,
    bos_token: SPECIAL[BOS],
    eos_token: SPECIAL[EOS],
    pad_token: SPECIAL[EOS],
    tokenizer_class: "PreTrainedTokenizerFast",
    unk_token: SPECIAL[0],
  };
  const files = {
    "config.json": config,
    "generation_config.json": generation,
    "tokenizer.json": tokenizer(),
    "tokenizer_config.json": tokenizerConfig,
  };
  return Object.fromEntries(Object.entries(files).map(([name, value]) => [name, withFloats(value)]));
}

/** Plain objects as Python JSON; values that are pyFloat already stay. */
function withFloats(value) {
  if (value === null || typeof value !== "object") return fromPlain(value);
  if (Array.isArray(value)) return value.map(withFloats);
  if (value.constructor !== Object) return value;
  return new Map(Object.entries(value).map(([key, item]) => [key, withFloats(item)]));
}

/** Byte-level BPE: every byte is a token, and a few pairs are. */
function tokenizer() {
  const pieces = [...SPECIAL, ...byteCharacters(), ...MERGES.map((pair) => pair.replace(" ", ""))];
  const special = (content, id) => ({
    id,
    content,
    single_word: false,
    lstrip: false,
    rstrip: false,
    normalized: false,
    special: true,
  });
  return {
    version: "1.0",
    truncation: null,
    padding: null,
    added_tokens: SPECIAL.map(special),
    normalizer: null,
    pre_tokenizer: { type: "ByteLevel", add_prefix_space: false, trim_offsets: true, use_regex: true },
    post_processor: null,
    decoder: { type: "ByteLevel", add_prefix_space: true, trim_offsets: true, use_regex: true },
    model: {
      type: "BPE",
      dropout: null,
      unk_token: null,
      continuing_subword_prefix: null,
      end_of_word_suffix: null,
      fuse_unk: false,
      byte_fallback: false,
      ignore_merges: false,
      vocab: Object.fromEntries(pieces.map((piece, id) => [piece, id])),
      merges: MERGES.map((pair) => pair.split(" ")),
    },
  };
}

/** The printable character that stands for each byte: itself where it is one, else the next free one from U+0100 on. */
function byteCharacters() {
  const printable = (byte) => (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
  let next = 256;
  return Array.from({ length: 256 }, (_, byte) => String.fromCodePoint(printable(byte) ? byte : next++));
}

if (process.argv[1] && import.meta.url === pathToFileURL(process.argv[1]).href) {
  const { values, positionals } = parseArgs({
    allowPositionals: true,
    options: { seed: { type: "string" }, untied: { type: "boolean" }, "max-shard-size": { type: "string" } },
  });
  if (positionals.length !== 1) {
    console.error("usage: node scripts/make-tiny-model.mjs FOLDER [--seed N] [--untied] [--max-shard-size S]");
    process.exit(2);
  }
  await makeTinyModel(positionals[0], {
    seed: values.seed === undefined ? undefined : Number(values.seed),
    tied: !values.untied,
    maxShardSize: values["max-shard-size"],
  });
}
