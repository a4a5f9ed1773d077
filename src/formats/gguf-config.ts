/** config.json and generation_config.json of a Llama-family model from GGUF metadata, as transformers 5 writes them. */
import { FormatError } from "../core/errors.js";
import type { GgufFile } from "./gguf.js";
import type { GgufHyperparameters, TensorMapping } from "./gguf-layout.js";
import { type GgufMetadata, lookUp, requireValue } from "./gguf-metadata.js";

type Json = Record<string, unknown>;

/** llama.cpp's and transformers' default where a file does not say it. */
const DEFAULT_ROPE_THETA = 10000;
/** Writers put the unsigned -1 where a model has no such token. */
const NO_TOKEN = 0xffffffff;

/** The id that `tokenizer.ggml.<name>_token_id` gives, or undefined. Throws FormatError when it is no index. */
export function tokenId(file: GgufMetadata, name: "bos" | "eos" | "unknown" | "padding"): number | undefined {
  const id = lookUp(file, `tokenizer.ggml.${name}_token_id`, "integer");
  return id === NO_TOKEN ? undefined : id;
}

/**
 * config.json. `dtype` is the file's own float type, bfloat16 where it holds quantized blocks. A token that the file
 * does not name is null: left out, transformers would take its class's default.
 */
export function modelConfig(file: GgufFile, model: GgufHyperparameters, mapping: TensorMapping): Json {
  const { architecture } = model;
  const llama = model.modelType === "llama";
  const theta = lookUp(file, `${architecture}.rope.freq_base`, "number") ?? DEFAULT_ROPE_THETA;
  const config: Json = {
    architectures: [model.className],
    attention_dropout: 0,
    bos_token_id: tokenId(file, "bos") ?? null,
    dtype: floatType(mapping),
    eos_token_id: tokenId(file, "eos") ?? null,
    hidden_act: "silu",
    hidden_size: model.hidden,
    initializer_range: 0.02,
    intermediate_size: model.intermediate,
    max_position_embeddings: requireValue(file, `${architecture}.context_length`, "integer"),
    model_type: model.modelType,
    num_attention_heads: model.heads,
    num_hidden_layers: model.layers,
    num_key_value_heads: model.kvHeads,
    pad_token_id: tokenId(file, "padding") ?? null,
    rms_norm_eps: requireValue(file, `${architecture}.attention.layer_norm_rms_epsilon`, "number"),
    rope_parameters: { rope_theta: theta, ...ropeScaling(file, architecture) },
    // transformers 4 reads the base from here, and would silently take 10000 without it.
    rope_theta: theta,
    tie_word_embeddings: mapping.tied,
    use_cache: true,
    vocab_size: mapping.vocabSize,
  };
  if (llama) {
    config.attention_bias = mapping.attentionBias;
    config.mlp_bias = mapping.mlpBias;
    config.pretraining_tp = 1;
  }
  if (llama || model.headDim * model.heads !== model.hidden) config.head_dim = model.headDim;
  return Object.fromEntries(Object.entries(config).sort(([a], [b]) => (a < b ? -1 : 1)));
}

/** generation_config.json, from the same metadata. */
export function generationConfig(file: GgufFile): Json {
  const ids = {
    bos_token_id: tokenId(file, "bos"),
    eos_token_id: tokenId(file, "eos"),
    pad_token_id: tokenId(file, "padding"),
  };
  return { _from_model_config: true, ...ids, use_cache: true };
}

function floatType(mapping: TensorMapping): string {
  const types = new Set(mapping.tensors.map(({ tensor }) => tensor.type));
  for (const type of ["F32", "F16", "BF16"] as const) types.delete(type);
  const plain = types.size === 0;
  const has = (type: string): boolean => mapping.tensors.some(({ tensor }) => tensor.type === type);
  if (plain && !has("BF16")) return has("F16") ? "float16" : "float32";
  return "bfloat16";
}

/** The rope_type and its parameters. Throws FormatError for a scaling that neither transformers nor llama.cpp knows. */
function ropeScaling(file: GgufFile, architecture: string): Json {
  const key = (name: string): string => `${architecture}.rope.scaling.${name}`;
  const type = lookUp(file, key("type"), "string") ?? "none";
  if (type === "none") return { rope_type: "default" };
  if (type !== "linear" && type !== "yarn") {
    throw new FormatError("gguf", file.path, `${key("type")}: expected none, linear or yarn, received '${type}'`);
  }
  const factor = requireValue(file, key("factor"), "number");
  if (type === "linear") return { rope_type: "linear", factor };
  const original = requireValue(file, key("original_context_length"), "integer");
  return { rope_type: "yarn", factor, original_max_position_embeddings: original };
}
