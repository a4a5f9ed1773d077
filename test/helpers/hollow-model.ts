/** Checkpoints of real models' shapes that take no room on the disk: a header, and a hole where the weights would be. */
import { mkdirSync, readFileSync, truncateSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { MODEL_FILE } from "#halfbyte/formats/safetensors-shards.js";

export interface DecoderConfig {
  readonly model_type: string;
  readonly hidden_size: number;
  readonly intermediate_size: number;
  readonly num_hidden_layers: number;
  readonly num_attention_heads: number;
  readonly num_key_value_heads: number;
  readonly head_dim?: number;
  readonly vocab_size: number;
  readonly tie_word_embeddings: boolean;
}

/** The config.json of a model in test/fixtures/shapes. */
export function modelConfig(name: string): DecoderConfig {
  return JSON.parse(readFileSync(new URL(`../fixtures/shapes/${name}.json`, import.meta.url), "utf8"));
}

/** The tensors of a Llama or Qwen2 checkpoint. */
export function decoderTensors(config: DecoderConfig): Map<string, readonly number[]> {
  const { hidden_size: hidden, intermediate_size: intermediate, vocab_size: vocab } = config;
  const headDim = config.head_dim ?? hidden / config.num_attention_heads;
  const q = headDim * config.num_attention_heads;
  const kv = headDim * config.num_key_value_heads;
  const tensors = new Map<string, readonly number[]>([
    ["model.embed_tokens.weight", [vocab, hidden]],
    ["model.norm.weight", [hidden]],
  ]);
  if (!config.tie_word_embeddings) tensors.set("lm_head.weight", [vocab, hidden]);
  for (let i = 0; i < config.num_hidden_layers; i++) {
    const layer = (name: string, ...shape: number[]) => tensors.set(`model.layers.${i}.${name}`, shape);
    for (const [name, outputs] of Object.entries({ q_proj: q, k_proj: kv, v_proj: kv })) {
      layer(`self_attn.${name}.weight`, outputs, hidden);
      if (config.model_type === "qwen2") layer(`self_attn.${name}.bias`, outputs);
    }
    layer("self_attn.o_proj.weight", hidden, q);
    layer("mlp.gate_proj.weight", intermediate, hidden);
    layer("mlp.up_proj.weight", intermediate, hidden);
    layer("mlp.down_proj.weight", hidden, intermediate);
    layer("input_layernorm.weight", hidden);
    layer("post_attention_layernorm.weight", hidden);
  }
  return tensors;
}

/** Writes a folder with such a checkpoint in bfloat16, and a config.json that may say something else. */
export function writeHollowDecoder(folder: string, shapes: DecoderConfig, config: object = shapes): string {
  mkdirSync(folder, { recursive: true });
  const header: Record<string, object> = {};
  let offset = 0;
  for (const [name, shape] of decoderTensors(shapes)) {
    const bytes = 2 * shape.reduce((product, d) => product * d, 1);
    header[name] = { dtype: "BF16", shape, data_offsets: [offset, offset + bytes] };
    offset += bytes;
  }
  const json = Buffer.from(JSON.stringify(header));
  const prefix = Buffer.alloc(8);
  prefix.writeBigUInt64LE(BigInt(json.length));
  const file = join(folder, MODEL_FILE);
  writeFileSync(file, Buffer.concat([prefix, json]));
  truncateSync(file, prefix.length + json.length + offset);
  writeFileSync(join(folder, "config.json"), JSON.stringify(config));
  return folder;
}
