/** Small checkpoints for tests, and their tensors as they are in the file. */
import { mkdirSync, truncateSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { openHfFolder } from "#halfbyte/formats/hf-folder.js";
import { CheckpointWriter, MODEL_FILE } from "#halfbyte/formats/safetensors-shards.js";
import type { SafetensorsDType } from "#halfbyte/formats/source.js";

export interface TestTensor {
  readonly dtype: SafetensorsDType;
  readonly shape: readonly number[];
  readonly bytes: Uint8Array;
}

export const LLAMA = { architectures: ["LlamaForCausalLM"], model_type: "llama", tie_word_embeddings: true };

/** Writes a folder with this config.json and these tensors. */
export async function writeModel(
  folder: string,
  tensors: Readonly<Record<string, TestTensor>>,
  config: object = LLAMA,
): Promise<string> {
  mkdirSync(folder, { recursive: true });
  const declarations = Object.entries(tensors).map(([name, { dtype, shape }]) => ({ name, dtype, shape }));
  const writer = new CheckpointWriter(folder, declarations);
  for (const [name, { bytes }] of Object.entries(tensors)) await writer.write(name, bytes);
  await writer.finish();
  writeFileSync(join(folder, "config.json"), JSON.stringify(config));
  return folder;
}

/** All tensors of a folder, whole. */
export async function readModel(folder: string): Promise<Map<string, TestTensor>> {
  const source = await openHfFolder(folder);
  try {
    const tensors = new Map<string, TestTensor>();
    for (const { name, dtype, shape } of source.tensors.values()) {
      tensors.set(name, { dtype, shape, bytes: await source.readRows(name, 0, shape.length === 0 ? 1 : shape[0]!) });
    }
    return tensors;
  } finally {
    await source.close();
  }
}

/** float32 values as a tensor. */
export function f32Tensor(values: ArrayLike<number>, shape: readonly number[]): TestTensor {
  return { dtype: "F32", shape, bytes: new Uint8Array(Float32Array.from(values).buffer) };
}

/** A model of zeros that takes (nearly) no room on the disk: one bfloat16 matrix [rows, cols] in a file with a hole. */
export function writeHollowModel(folder: string, rows: number, cols: number): string {
  mkdirSync(folder, { recursive: true });
  const bytes = 2 * rows * cols;
  const entry = { dtype: "BF16", shape: [rows, cols], data_offsets: [0, bytes] };
  const json = JSON.stringify({ "model.layers.0.mlp.up_proj.weight": entry }).padEnd(256);
  const head = Buffer.alloc(8 + json.length);
  head.writeBigUInt64LE(BigInt(json.length));
  head.write(json, 8);
  writeFileSync(join(folder, MODEL_FILE), head);
  truncateSync(join(folder, MODEL_FILE), head.length + bytes);
  writeFileSync(join(folder, "config.json"), JSON.stringify(LLAMA));
  return folder;
}
