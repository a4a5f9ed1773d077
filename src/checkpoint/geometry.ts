/** The sizes of a decoder that decide what it needs beside its weights, read from config.json. */
import { FormatError, UnsupportedError } from "../core/errors.js";

type Config = Readonly<Record<string, unknown>>;

export interface Geometry {
  readonly layers: number;
  readonly hidden: number;
  readonly vocab: number;
}

/** What attention keeps per token. */
export interface CacheGeometry {
  readonly kvHeads: number;
  readonly headDim: number;
  /** Of each layer that has a cache: the tokens it looks back at, undefined for all. */
  readonly windows: readonly (number | undefined)[];
  /** What is not counted, as a sentence. */
  readonly note: string | undefined;
}

/** Other names for the same size, most frequent first. */
const NAMES = {
  layers: ["num_hidden_layers", "n_layer", "num_layers", "n_layers"],
  hidden: ["hidden_size", "n_embd", "d_model", "dim"],
  heads: ["num_attention_heads", "n_head", "n_heads", "num_heads"],
  kvHeads: ["num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num"],
  headDim: ["head_dim", "kv_channels", "d_kv", "attention_head_dim"],
  vocab: ["vocab_size", "padded_vocab_size"],
} as const;

/** Marks of layers whose state is no cache of keys and values, and whose places the configuration tells in its own way. */
const STATE_SPACE = ["ssm_state_size", "mamba_d_state", "state_size", "hybrid_override_pattern", "attn_layer_period"];

/** @throws FormatError when config.json does not say a size, or not as a number */
export function readGeometry(config: Config, path: string): Geometry {
  const text = textConfig(config);
  return {
    layers: need(text, "layers", path),
    hidden: need(text, "hidden", path),
    vocab: need(text, "vocab", path),
  };
}

/**
 * Keys and values are kept of every attention layer; a layer with a sliding window keeps no more than the window.
 * @throws FormatError as `readGeometry`; UnsupportedError for a cache of another kind (MLA, state-space layers, cross-attention)
 */
export function readCacheGeometry(config: Config, path: string): CacheGeometry {
  const text = textConfig(config);
  const refuse = (what: string): never => {
    throw new UnsupportedError(what, "its cache is not one of keys and values per head; --train needs none of it");
  };
  if (typeof text.kv_lora_rank === "number") refuse("the cache of multi-head latent attention");
  if (config.is_encoder_decoder === true) refuse("the cache of an encoder-decoder model");
  const layerTypes = Array.isArray(text.layer_types) ? (text.layer_types as readonly unknown[]) : undefined;
  if (layerTypes === undefined && STATE_SPACE.some((key) => text[key] !== undefined && text[key] !== null)) {
    refuse("the cache of a model with state-space layers");
  }
  const layers = need(text, "layers", path);
  const heads = need(text, "heads", path);
  const single = text.multi_query === true && text.new_decoder_architecture !== true;
  const kvHeads = single ? 1 : (find(text, "kvHeads", path) ?? heads);
  const headDim = find(text, "headDim", path) ?? need(text, "hidden", path) / heads;
  if (layerTypes !== undefined && layerTypes.length !== layers) {
    throw new FormatError("config", path, `layer_types: expected ${layers} entries, received ${layerTypes.length}`);
  }
  const types =
    layerTypes ?? Array.from({ length: layers }, (_, i) => (slides(text, i) ? "sliding_attention" : "full_attention"));
  const cached = types.filter((type) => String(type).endsWith("_attention") && type !== "linear_attention");
  const others = layers - cached.length;
  return {
    kvHeads,
    headDim,
    windows: cached.map((type) => windowOf(text, type)),
    note: others === 0 ? undefined : `${others} of ${layers} layers keep a state of another kind, which is not counted`,
  };
}

/** The part of a composed model that generates text. */
function textConfig(config: Config): Config {
  for (const key of ["text_config", "llm_config"]) {
    const part = config[key];
    if (typeof part === "object" && part !== null && !Array.isArray(part)) return part as Config;
  }
  return config;
}

function windowOf(text: Config, type: unknown): number | undefined {
  const key =
    type === "sliding_attention" ? "sliding_window" : type === "chunked_attention" ? "attention_chunk_size" : "";
  const tokens = text[key];
  return typeof tokens === "number" && tokens > 0 ? tokens : undefined;
}

/** Whether a layer has a sliding window, where no list of layers says it. */
function slides(text: Config, layer: number): boolean {
  if (typeof text.sliding_window !== "number" || text.use_sliding_window === false) return false;
  const pattern = text.model_type === "gemma2" ? 2 : text.sliding_window_pattern;
  if (typeof pattern === "number" && pattern > 0) return (layer + 1) % pattern !== 0;
  // Qwen's first layers look at everything.
  return typeof text.max_window_layers !== "number" || layer >= text.max_window_layers;
}

function need(text: Config, size: keyof typeof NAMES, path: string): number {
  const value = find(text, size, path);
  if (value === undefined) throw new FormatError("config", path, `lacks ${NAMES[size][0]}`);
  return value;
}

function find(text: Config, size: keyof typeof NAMES, path: string): number | undefined {
  const key = NAMES[size].find((name) => text[name] !== undefined && text[name] !== null);
  if (key === undefined) return undefined;
  const value = text[key];
  if (typeof value === "number" && Number.isSafeInteger(value) && value > 0) return value;
  throw new FormatError("config", path, `${key}: expected a whole number above 0, received ${JSON.stringify(value)}`);
}
