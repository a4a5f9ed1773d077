/**
 * Which ggml tensor is which Hugging Face parameter, for the Llama family, and what its metadata says about the model's
 * shape. Names: the tensor name table of the Python package gguf 0.19; parameters: transformers 5.
 */
import { FormatError, UnsupportedError } from "../core/errors.js";
import { formatShape, type Shape, sameShape } from "../core/shape.js";
import type { GgufFile, GgufTensor } from "./gguf.js";
import { lookUp, requireValue } from "./gguf-metadata.js";

/** What differs between the architectures that are read. */
interface Family {
  /** transformers' model_type and class. */
  readonly modelType: string;
  readonly className: string;
  /** llama.cpp stores the rows of q and k so that the two halves of a rotary pair are neighbours. */
  readonly permutesHeads: boolean;
  /** q, k and v always have biases, and o has none. Else either all four or none has. */
  readonly qkvBias: boolean;
}

/** By `general.architecture`. Mistral models are written as `llama`. */
const FAMILIES: Readonly<Record<string, Family>> = {
  llama: { modelType: "llama", className: "LlamaForCausalLM", permutesHeads: true, qkvBias: false },
  qwen2: { modelType: "qwen2", className: "Qwen2ForCausalLM", permutesHeads: false, qkvBias: true },
};

/** The sizes of a model, as its metadata says them. */
export interface GgufHyperparameters extends Family {
  readonly architecture: string;
  readonly layers: number;
  readonly hidden: number;
  readonly intermediate: number;
  readonly heads: number;
  readonly kvHeads: number;
  readonly headDim: number;
}

/** A parameter of the Hugging Face model and the tensor that holds it. */
export interface MappedTensor {
  readonly name: string;
  readonly tensor: GgufTensor;
  /** Heads whose rows are permuted in the file; undefined where rows are in order. */
  readonly permutedHeads: number | undefined;
}

/** Tensors that transformers has no parameter for and that can be left out, with what that means. */
const LEFT_OUT: readonly { readonly pattern: RegExp; readonly note?: string }[] = [
  {
    pattern: /^rope_(freqs|factors_long|factors_short)\.weight$/,
    note:
      "the file scales rotary frequencies by a table; a Hugging Face checkpoint says this in config.json's " +
      "rope_parameters, which cannot be told from the table: copy them from the original repository",
  },
  { pattern: /^blk\.\d+\.(attn_rot_embd|rope_freqs)(\.\w+)?$/ },
];

/** The modules of a layer by ggml's name: transformers' name, and the shape of the weight. */
const LAYER_MODULES: Readonly<Record<string, { name: string; shape: (h: GgufHyperparameters) => Shape }>> = {
  attn_norm: { name: "input_layernorm", shape: (h) => [h.hidden] },
  attn_q: { name: "self_attn.q_proj", shape: (h) => [h.heads * h.headDim, h.hidden] },
  attn_k: { name: "self_attn.k_proj", shape: (h) => [h.kvHeads * h.headDim, h.hidden] },
  attn_v: { name: "self_attn.v_proj", shape: (h) => [h.kvHeads * h.headDim, h.hidden] },
  attn_output: { name: "self_attn.o_proj", shape: (h) => [h.hidden, h.heads * h.headDim] },
  ffn_norm: { name: "post_attention_layernorm", shape: (h) => [h.hidden] },
  ffn_gate: { name: "mlp.gate_proj", shape: (h) => [h.intermediate, h.hidden] },
  ffn_up: { name: "mlp.up_proj", shape: (h) => [h.intermediate, h.hidden] },
  ffn_down: { name: "mlp.down_proj", shape: (h) => [h.hidden, h.intermediate] },
};
const ATTENTION = ["attn_q", "attn_k", "attn_v", "attn_output"];
const MLP = ["ffn_gate", "ffn_up", "ffn_down"];

/**
 * Reads the sizes of the model. Throws UnsupportedError for an architecture that is not read (naming those that are) or
 * a variant of one that transformers cannot hold, FormatError for missing or contradictory metadata.
 */
export function readHyperparameters(file: GgufFile): GgufHyperparameters {
  const architecture = requireValue(file, "general.architecture", "string");
  const family = Object.hasOwn(FAMILIES, architecture) ? FAMILIES[architecture] : undefined;
  if (!family) {
    throw new UnsupportedError(
      `${file.path}: GGUF architecture '${architecture}'`,
      `architectures that are read are ${Object.keys(FAMILIES).join(", ")}`,
    );
  }
  const size = (name: string): number | undefined => {
    const value = perLayerValue(file, `${architecture}.${name}`);
    if (value === 0) throw new FormatError("gguf", file.path, `${architecture}.${name} is 0`);
    return value;
  };
  const required = (name: string): number => {
    const value = size(name);
    if (value === undefined) throw new FormatError("gguf", file.path, `${architecture}.${name} is missing`);
    return value;
  };
  const experts = lookUp(file, `${architecture}.expert_count`, "integer") ?? 0;
  if (experts > 0) {
    throw new UnsupportedError(`${file.path}: a mixture of ${experts} experts`, "only dense models are read");
  }
  const hidden = required("embedding_length");
  const heads = required("attention.head_count");
  const kvHeads = size("attention.head_count_kv") ?? heads;
  const rotary = size("rope.dimension_count");
  const headDim = size("attention.key_length") ?? rotary ?? hidden / heads;
  if (!Number.isInteger(headDim) || headDim % 2 !== 0 || heads % kvHeads !== 0) {
    const problem = `${heads} heads, ${kvHeads} key-value heads and head size ${headDim} do not fit together`;
    throw new FormatError("gguf", file.path, problem);
  }
  const valueDim = size("attention.value_length") ?? headDim;
  if ((rotary ?? headDim) !== headDim || valueDim !== headDim) {
    throw new UnsupportedError(
      `${file.path}: keys of ${headDim}, values of ${valueDim} and a rotary part of ${rotary} dimensions`,
      `transformers' ${family.className} has one size for all three`,
    );
  }
  return {
    ...family,
    architecture,
    layers: required("block_count"),
    hidden,
    intermediate: required("feed_forward_length"),
    heads,
    kvHeads,
    headDim,
  };
}

/** A size that is one number, or one per layer: then all must be equal. */
function perLayerValue(file: GgufFile, key: string): number | undefined {
  if (typeof file.metadata.get(key) !== "object") return lookUp(file, key, "integer");
  const values = requireValue(file, key, "integers");
  const first = values[0] ?? 0;
  for (let i = 1; i < values.length; i++) {
    if (values[i] !== first) {
      throw new UnsupportedError(`${file.path}: ${key} that differs between layers`, "all layers must have one shape");
    }
  }
  if (first < 0) throw new FormatError("gguf", file.path, `${key} is ${first}`);
  return first;
}

/** What `mapTensors` finds. */
export interface TensorMapping {
  /** In the file's order. */
  readonly tensors: readonly MappedTensor[];
  readonly vocabSize: number;
  readonly tied: boolean;
  readonly attentionBias: boolean;
  readonly mlpBias: boolean;
  readonly notes: readonly string[];
}

/**
 * Maps every tensor of the file to its parameter and checks that each parameter of the model is there in its shape.
 * Throws UnsupportedError for a tensor that the model in transformers has no parameter for, FormatError for a missing
 * or misshapen one.
 */
export function mapTensors(file: GgufFile, model: GgufHyperparameters): TensorMapping {
  const notes: string[] = [];
  const tensors: MappedTensor[] = [];
  for (const tensor of file.tensors.values()) {
    const leftOut = LEFT_OUT.find(({ pattern }) => pattern.test(tensor.name));
    if (leftOut) {
      if (leftOut.note) notes.push(`${tensor.name} is left out: ${leftOut.note}`);
      continue;
    }
    tensors.push(mapTensor(file, tensor, model));
  }
  const has = (name: string): boolean => file.tensors.has(name);
  const attentionBias = !model.qkvBias && ATTENTION.some((module) => has(`blk.0.${module}.bias`));
  const mlpBias = MLP.some((module) => has(`blk.0.${module}.bias`));
  const biased = [...(attentionBias ? ATTENTION : model.qkvBias ? ATTENTION.slice(0, 3) : []), ...(mlpBias ? MLP : [])];
  const need = (name: string): void => {
    if (!has(name)) throw new FormatError("gguf", file.path, `tensor '${name}' is missing`);
  };
  need("token_embd.weight");
  need("output_norm.weight");
  for (let layer = 0; layer < model.layers; layer++) {
    for (const module of Object.keys(LAYER_MODULES)) need(`blk.${layer}.${module}.weight`);
    for (const module of biased) need(`blk.${layer}.${module}.bias`);
  }
  const expected =
    2 + (has("output.weight") ? 1 : 0) + model.layers * (Object.keys(LAYER_MODULES).length + biased.length);
  if (tensors.length !== expected) {
    throw new UnsupportedError(
      `${file.path}: biases in some layers or modules only`,
      `transformers' ${model.className} has them everywhere or nowhere`,
    );
  }
  const vocabSize = file.tensors.get("token_embd.weight")!.shape[0]!;
  return { tensors, vocabSize, tied: !has("output.weight"), attentionBias, mlpBias, notes };
}

function mapTensor(file: GgufFile, tensor: GgufTensor, model: GgufHyperparameters): MappedTensor {
  const vocab = file.tensors.get("token_embd.weight")?.shape[0] ?? 0;
  const mapped = (name: string, shape: Shape, permutedHeads?: number): MappedTensor => {
    if (!sameShape(tensor.shape, shape)) {
      const problem = `tensor '${tensor.name}' has shape ${formatShape(tensor.shape)}, expected ${formatShape(shape)}`;
      throw new FormatError("gguf", file.path, problem);
    }
    return { name, tensor, permutedHeads };
  };
  if (tensor.name === "token_embd.weight") return mapped("model.embed_tokens.weight", [vocab, model.hidden]);
  if (tensor.name === "output_norm.weight") return mapped("model.norm.weight", [model.hidden]);
  if (tensor.name === "output.weight") return mapped("lm_head.weight", [vocab, model.hidden]);

  const match = /^blk\.(\d+)\.(\w+)\.(weight|bias)$/.exec(tensor.name);
  const [, layer, ggml, part] = match ?? [];
  const module = ggml !== undefined && Object.hasOwn(LAYER_MODULES, ggml) ? LAYER_MODULES[ggml] : undefined;
  const isNorm = ggml === "attn_norm" || ggml === "ffn_norm";
  if (!module || (isNorm && part === "bias") || Number(layer) >= model.layers || String(Number(layer)) !== layer) {
    throw new UnsupportedError(
      `${file.path}: tensor '${tensor.name}'`,
      `transformers' ${model.className} of ${model.layers} layers has no parameter for it`,
    );
  }
  const weight = module.shape(model);
  const shape = part === "bias" ? weight.slice(0, 1) : weight;
  const heads = ggml === "attn_q" ? model.heads : ggml === "attn_k" ? model.kvHeads : undefined;
  return mapped(`model.layers.${layer}.${module.name}.${part}`, shape, model.permutesHeads ? heads : undefined);
}
