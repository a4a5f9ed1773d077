/** What is in a model: read from headers and quantization states alone. */
import { FormatError, UnsupportedError } from "../core/errors.js";
import type { Shape } from "../core/shape.js";
import { type QuantizationConfig, readQuantizationConfig } from "../formats/bnb-config.js";
import { openWeights, type Weight } from "./decode.js";
import type { Model } from "./open.js";

/** A weight of a model. */
export interface InspectedTensor {
  readonly name: string;
  /** As it is used: [out, in], not the shape of packed codes. */
  readonly shape: Shape;
  /** What it is stored as: a safetensors dtype, `nf4`, `fp4`, `int8`, or a GGUF type. */
  readonly stored: string;
  readonly parameters: number;
  /** Bytes on disk, scales and states included, and 8 x that / parameters. */
  readonly diskBytes: number;
  readonly bitsPerWeight: number;
  /** Bytes once transformers has loaded it: quantized weights stay so, others take the dtype that config.json names. */
  readonly memoryBytes: number;
  /** 4-bit weights only. */
  readonly blocksize?: number;
  readonly doubleQuant?: boolean;
}

/** What `inspectModel` found. */
export interface ModelInspection {
  readonly path: string;
  readonly kind: Model["kind"];
  /** `model_type` and the first of `architectures` in config.json. */
  readonly modelType: string | null;
  readonly architecture: string | null;
  /** config.json's `quantization_config`; null for a model that has none. */
  readonly quantization: QuantizationConfig | { readonly method: string } | null;
  readonly parameters: number;
  readonly diskBytes: number;
  readonly memoryBytes: number;
  readonly bitsPerWeight: number;
  /** Files that belong to the model besides weights and config.json. */
  readonly sidecars: readonly string[];
  readonly notes: readonly string[];
  readonly tensors: readonly InspectedTensor[];
}

/**
 * Lists the weights of a Hugging Face folder or GGUF file: shapes, what they are stored as, sizes on disk and in memory.
 * @throws FormatError naming the file when it is missing, malformed, or its parts do not fit
 */
export async function inspectModel(path: string): Promise<ModelInspection> {
  const { source, weights } = await openWeights(path);
  try {
    const tensors = [...weights.values()].map(describe);
    const total = (key: "parameters" | "diskBytes" | "memoryBytes"): number =>
      tensors.reduce((sum, tensor) => sum + tensor[key], 0);
    const parameters = total("parameters");
    const diskBytes = total("diskBytes");
    return {
      path,
      kind: source.kind,
      modelType: text(source.config.model_type),
      architecture: text((source.config.architectures as readonly unknown[] | undefined)?.[0]),
      quantization: quantizationOf(source),
      parameters,
      diskBytes,
      memoryBytes: total("memoryBytes"),
      bitsPerWeight: (8 * diskBytes) / Math.max(1, parameters),
      sidecars: [...source.sidecars.keys()],
      notes: notesOf(source),
      tensors,
    };
  } finally {
    await source.close();
  }
}

/** What of a source has no place in a Hugging Face checkpoint and should be known, as sentences. */
export function notesOf(source: Model): readonly string[] {
  if (source.kind !== "gguf") return [];
  return source.tokenizerNote === undefined ? source.notes : [...source.notes, source.tokenizerNote];
}

function describe(weight: Weight): InspectedTensor {
  const { name, shape, stored, elements: parameters, diskBytes, memoryBytes } = weight;
  const bitsPerWeight = (8 * diskBytes) / Math.max(1, parameters);
  const tensor = { name, shape, stored, parameters, diskBytes, bitsPerWeight, memoryBytes };
  if (weight.kind !== "4bit") return tensor;
  const { blocksize, nested } = weight.meta;
  return { ...tensor, blocksize, doubleQuant: nested !== undefined };
}

/** Other methods than bitsandbytes are only named: their tensors are listed as they are stored. */
function quantizationOf({ config, path }: Model): ModelInspection["quantization"] {
  try {
    return readQuantizationConfig(config, path) ?? null;
  } catch (error) {
    const method = (config.quantization_config as { quant_method?: unknown } | undefined)?.quant_method;
    if (error instanceof UnsupportedError && typeof method === "string") return { method };
    if (error instanceof UnsupportedError) throw new FormatError("config", path, error.message);
    throw error;
  }
}

function text(value: unknown): string | null {
  return typeof value === "string" ? value : null;
}
