/** Writes GGUF files for tests: valid ones, and ones that are wrong in just the way a test asks for. */
import { GGML_TYPES, GGUF_VALUE, type GgmlType } from "#halfbyte/formats/gguf-types.js";

type ValueType = keyof typeof GGUF_VALUE;
type Scalar = string | number | bigint | boolean;

/** A metadata value with its type in the file. */
export type Typed =
  | { type: Exclude<ValueType, "array">; value: Scalar }
  | { type: "array"; element: Exclude<ValueType, "array">; value: readonly Scalar[] }
  | { type: "array"; element: "array"; value: readonly Typed[] };

export const u32 = (value: number): Typed => ({ type: "uint32", value });
export const f32 = (value: number): Typed => ({ type: "float32", value });
export const bool = (value: boolean): Typed => ({ type: "bool", value });
export const text = (value: string): Typed => ({ type: "string", value });
export const list = (element: Exclude<ValueType, "array">, value: readonly Scalar[]): Typed => ({
  type: "array",
  element,
  value,
});

export interface TensorSpec {
  name: string;
  /** Row-major. */
  shape: readonly number[];
  type: GgmlType;
  data: Uint8Array;
  /** Instead of the next free offset. */
  offset?: number;
  /** Instead of the type's number. */
  typeId?: number;
}

export interface GgufSpec {
  version?: number;
  metadata?: readonly (readonly [string, Typed])[];
  tensors?: readonly TensorSpec[];
  alignment?: number;
}

/** Grows as it is written to. */
export class ByteWriter {
  private parts: Uint8Array[] = [];
  length = 0;

  raw(bytes: Uint8Array): this {
    this.parts.push(bytes);
    this.length += bytes.byteLength;
    return this;
  }

  number(type: ValueType, value: Scalar): this {
    const bytes = new Uint8Array(8);
    const view = new DataView(bytes.buffer);
    const n = Number(value);
    switch (type) {
      case "uint8":
      case "bool":
        view.setUint8(0, n);
        return this.raw(bytes.subarray(0, 1));
      case "int8":
        view.setInt8(0, n);
        return this.raw(bytes.subarray(0, 1));
      case "uint16":
        view.setUint16(0, n, true);
        return this.raw(bytes.subarray(0, 2));
      case "int16":
        view.setInt16(0, n, true);
        return this.raw(bytes.subarray(0, 2));
      case "uint32":
        view.setUint32(0, n, true);
        return this.raw(bytes.subarray(0, 4));
      case "int32":
        view.setInt32(0, n, true);
        return this.raw(bytes.subarray(0, 4));
      case "float32":
        view.setFloat32(0, n, true);
        return this.raw(bytes.subarray(0, 4));
      case "float64":
        view.setFloat64(0, n, true);
        return this.raw(bytes);
      case "uint64":
        view.setBigUint64(0, BigInt(value), true);
        return this.raw(bytes);
      case "int64":
        view.setBigInt64(0, BigInt(value), true);
        return this.raw(bytes);
      default:
        throw new Error(`${type} is no number`);
    }
  }

  string(value: string): this {
    const bytes = new TextEncoder().encode(value);
    return this.number("uint64", bytes.byteLength).raw(bytes);
  }

  value(typed: Typed): this {
    if (typed.type === "string") return this.string(String(typed.value));
    if (typed.type !== "array") return this.number(typed.type, typed.value);
    this.number("uint32", GGUF_VALUE[typed.element]).number("uint64", typed.value.length);
    for (const item of typed.value) {
      if (typeof item === "object") this.value(item);
      else if (typed.element === "string") this.string(String(item));
      else this.number(typed.element, item);
    }
    return this;
  }

  align(alignment: number): this {
    return this.raw(new Uint8Array((alignment - (this.length % alignment)) % alignment));
  }

  finish(): Buffer {
    return Buffer.concat(this.parts);
  }
}

/** The bytes of a GGUF file. */
export function ggufBytes({ version = 3, metadata = [], tensors = [], alignment = 32 }: GgufSpec): Buffer {
  const out = new ByteWriter();
  out.raw(new TextEncoder().encode("GGUF")).number("uint32", version);
  out.number("uint64", tensors.length).number("uint64", metadata.length);
  for (const [key, typed] of metadata) {
    out.string(key).number("uint32", GGUF_VALUE[typed.type]).value(typed);
  }
  let next = 0;
  for (const tensor of tensors) {
    out.string(tensor.name).number("uint32", tensor.shape.length);
    for (const dim of [...tensor.shape].reverse()) out.number("uint64", dim);
    out.number("uint32", tensor.typeId ?? GGML_TYPES[tensor.type].id);
    out.number("uint64", tensor.offset ?? next);
    next = Math.ceil((next + tensor.data.byteLength) / alignment) * alignment;
  }
  out.align(alignment);
  for (const { data } of tensors) out.raw(data).align(alignment);
  return out.finish();
}

/** A repeatable stream of 32-bit numbers (mulberry32). */
export function seeded(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = state;
    t = Math.imul(t ^ (t >>> 15), t | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return (t ^ (t >>> 14)) >>> 0;
  };
}

/** Stored bytes of a tensor of this type and shape: random codes, and scales that are small finite numbers. */
export function randomBlocks(type: GgmlType, shape: readonly number[], random: () => number): Uint8Array {
  const { blockElements, blockBytes } = GGML_TYPES[type];
  const elements = shape.reduce((product, d) => product * d, 1);
  if (type === "F32") {
    return new Uint8Array(Float32Array.from({ length: elements }, () => (random() % 2001) / 1000 - 1).buffer);
  }
  // No byte above 0x3b: every 16-bit half, scale or value, is then below 1 and finite.
  return Uint8Array.from({ length: (elements / blockElements) * blockBytes }, () => random() % 0x3c);
}

export interface TinyModel {
  architecture: "llama" | "qwen2";
  hidden: number;
  heads: number;
  kvHeads: number;
  headDim: number;
  intermediate: number;
  layers: number;
  vocab: number;
  /** Types of the matrices, used in turn. */
  types: readonly GgmlType[];
  tied?: boolean;
  /** Biases on q, k, v (and o, for llama). */
  bias?: boolean;
  seed?: number;
}

/** The sizes that tests share; layers, types and the rest are the test's own. */
export const TINY_LLAMA = {
  architecture: "llama",
  hidden: 64,
  heads: 4,
  kvHeads: 2,
  headDim: 16,
  intermediate: 96,
  vocab: 37,
} as const satisfies Partial<TinyModel>;

/** A Llama-family model with every tensor and the metadata that a converter writes. */
export function tinyModel(model: TinyModel): Required<Pick<GgufSpec, "metadata" | "tensors">> {
  const random = seeded(model.seed ?? 1);
  const tensors: TensorSpec[] = [];
  let turn = 0;
  const add = (name: string, shape: number[]): void => {
    const type = shape.length === 1 ? "F32" : model.types[turn++ % model.types.length]!;
    tensors.push({ name, shape, type, data: randomBlocks(type, shape, random) });
  };
  const { hidden, intermediate, vocab } = model;
  const q = model.heads * model.headDim;
  const kv = model.kvHeads * model.headDim;
  add("token_embd.weight", [vocab, hidden]);
  for (let i = 0; i < model.layers; i++) {
    add(`blk.${i}.attn_norm.weight`, [hidden]);
    add(`blk.${i}.ffn_down.weight`, [hidden, intermediate]);
    add(`blk.${i}.ffn_gate.weight`, [intermediate, hidden]);
    add(`blk.${i}.ffn_up.weight`, [intermediate, hidden]);
    add(`blk.${i}.ffn_norm.weight`, [hidden]);
    add(`blk.${i}.attn_k.weight`, [kv, hidden]);
    add(`blk.${i}.attn_output.weight`, [hidden, q]);
    add(`blk.${i}.attn_q.weight`, [q, hidden]);
    add(`blk.${i}.attn_v.weight`, [kv, hidden]);
    if (model.bias) {
      add(`blk.${i}.attn_q.bias`, [q]);
      add(`blk.${i}.attn_k.bias`, [kv]);
      add(`blk.${i}.attn_v.bias`, [kv]);
      if (model.architecture === "llama") add(`blk.${i}.attn_output.bias`, [hidden]);
    }
  }
  add("output_norm.weight", [hidden]);
  if (!model.tied) add("output.weight", [vocab, hidden]);
  const a = model.architecture;
  const metadata: [string, Typed][] = [
    ["general.architecture", text(a)],
    ["general.name", text("tiny")],
    [`${a}.block_count`, u32(model.layers)],
    [`${a}.context_length`, u32(512)],
    [`${a}.embedding_length`, u32(hidden)],
    [`${a}.feed_forward_length`, u32(intermediate)],
    [`${a}.attention.head_count`, u32(model.heads)],
    [`${a}.attention.head_count_kv`, u32(model.kvHeads)],
    [`${a}.attention.layer_norm_rms_epsilon`, f32(1e-5)],
    [`${a}.rope.freq_base`, f32(50000)],
    [`${a}.rope.dimension_count`, u32(model.headDim)],
    [`${a}.vocab_size`, u32(vocab)],
    ["tokenizer.ggml.model", text("llama")],
    [
      "tokenizer.ggml.tokens",
      list(
        "string",
        Array.from({ length: vocab }, (_, i) => `t${i}`),
      ),
    ],
    ["tokenizer.ggml.bos_token_id", u32(1)],
    ["tokenizer.ggml.eos_token_id", u32(2)],
  ];
  return { metadata, tensors };
}
