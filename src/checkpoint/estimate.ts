/**
 * What a model needs in memory, from its headers and config.json: exactly what can be known (weights, scales, cache, adapters,
 * optimizer), and stated bounds for the rest. docs/jetson.md has the formulas and how far they are from published peaks.
 */
import { DTYPE_BYTES, type FloatDType } from "../core/dtype.js";
import { ArgumentError } from "../core/errors.js";
import { sizeOf } from "../core/shape.js";
import { listQuantized } from "../formats/bnb.js";
import { modulesToQuantize } from "../formats/bnb-modules.js";
import { declaredBytes } from "../formats/safetensors-writer.js";
import type { SourceTensor } from "../formats/source.js";
import { checkChoice } from "../ops/check.js";
import { listWeights } from "./decode.js";
import { copiedDType } from "./encode.js";
import { type CacheGeometry, type Geometry, readCacheGeometry, readGeometry } from "./geometry.js";
import { type Model, openModel } from "./open.js";
import { type ComputeDtype, checkSettings, planModel, QUANTIZE_TYPES, type QuantizeType } from "./plan.js";

const OP = "estimateModel";

/** What weights become: quantized, or all of them in a float dtype. */
export const ESTIMATE_TYPES = [...QUANTIZE_TYPES, "bf16", "f16", "f32"] as const;
export type EstimateType = (typeof ESTIMATE_TYPES)[number];

export const KV_DTYPES = ["bf16", "f16", "f32"] as const satisfies readonly FloatDType[];
export type KvDtype = (typeof KV_DTYPES)[number];

export const LORA_TARGETS = ["all", "attention"] as const;
export type LoraTargets = (typeof LORA_TARGETS)[number];

/** Moments that an optimizer keeps of each parameter, and what of. */
const OPTIMIZER_STATES = {
  adam: { moments: 2, bits: 32 },
  adam8bit: { moments: 2, bits: 8 },
  "paged-adam": { moments: 2, bits: 32 },
  "paged-adam8bit": { moments: 2, bits: 8 },
  lion: { moments: 1, bits: 32 },
  lion8bit: { moments: 1, bits: 8 },
  sgd: { moments: 1, bits: 32 },
} as const;
export type EstimateOptimizer = keyof typeof OPTIMIZER_STATES;
export const OPTIMIZERS = Object.keys(OPTIMIZER_STATES) as readonly EstimateOptimizer[];

/** Values of an 8-bit state that share a float32 scale, and the least of them that a tensor has to be kept in 8 bits. */
const STATE_BLOCK = 256;
const LEAST_8BIT_ELEMENTS = 4096;

/** Tokens of a prompt that go through the layers together; longer prompts go in pieces. */
const PROMPT_CHUNK = 1024;
/** Training holds the logits and their gradient, both in float32. */
const LOGIT_BYTES = 8;
/**
 * The driver's context, libraries, and what an allocator rounds up. Chosen so that the inference peaks published for an Orin Nano are
 * met: it is the only number here that was fitted.
 */
export const RUNTIME_BYTES = 250e6;

const DEFAULT_CONTEXT = 2048;

export interface EstimateOptions {
  /** Default `nf4`; of a model that is quantized already, what it is. */
  readonly type?: EstimateType | undefined;
  /** As of `quantizeModel`. */
  readonly blocksize?: number | undefined;
  readonly doubleQuant?: boolean | undefined;
  readonly computeDtype?: ComputeDtype | undefined;
  readonly skip?: readonly string[] | undefined;
  /** Tokens of a sequence, prompt and answer. Default 2048, or the model's limit where that is lower. */
  readonly context?: number | undefined;
  /** Sequences at a time. Default 1. */
  readonly batch?: number | undefined;
  /** What keys and values are kept in. Default: the compute dtype. */
  readonly kvDtype?: KvDtype | undefined;
  /** Training of LoRA adapters with gradient checkpointing instead of inference. Default false. */
  readonly train?: boolean | undefined;
  /** Default 16. */
  readonly loraRank?: number | undefined;
  /** The linear layers that get adapters. Default `all`. */
  readonly loraTargets?: LoraTargets | undefined;
  /** Default `adam`. On a Jetson paged state takes the same memory as any other: there is only one DRAM. */
  readonly optimizer?: EstimateOptimizer | undefined;
}

/** One item of an estimate. */
export interface EstimatePart {
  readonly name: string;
  readonly bytes: number;
  /** `bound`: a rough upper bound by the formula in `how`. */
  readonly certainty: "exact" | "bound";
  /** How it was found, in words and numbers. */
  readonly how: string;
}

export interface ModelEstimate {
  readonly path: string;
  /** What weights are; a list such as `nf4` of a model that is quantized already. */
  readonly type: string;
  readonly blocksize?: number;
  readonly doubleQuant?: boolean;
  readonly computeDtype: FloatDType;
  readonly use: "inference" | "training";
  readonly context: number;
  readonly batch: number;
  readonly parameters: number;
  readonly quantizedParameters: number;
  readonly loraParameters?: number;
  readonly parts: readonly EstimatePart[];
  readonly totalBytes: number;
  readonly notes: readonly string[];
}

/** A linear layer. */
interface Linear {
  readonly name: string;
  readonly inputs: number;
  readonly outputs: number;
}

/** The weights as they will lie in memory. */
interface Weights {
  readonly type: string;
  readonly blocksize?: number;
  readonly doubleQuant?: boolean;
  readonly computeDtype: FloatDType;
  readonly parameters: number;
  readonly quantizedParameters: number;
  readonly codeBytes: number;
  readonly stateBytes: number;
  readonly otherBytes: number;
  readonly linear: readonly Linear[];
  readonly notes: readonly string[];
}

/**
 * Estimates the memory that a Hugging Face folder or GGUF file needs for inference or QLoRA training. Only headers, config.json and the
 * quantization states of a model that is quantized already are read.
 * @throws ArgumentError for a bad option, FormatError and UnsupportedError for a model that cannot be quantized or whose cache is not
 *   one of keys and values
 */
export async function estimateModel(path: string, options: EstimateOptions = {}): Promise<ModelEstimate> {
  checkOptions(options);
  const source = await openModel(path);
  try {
    const weights = await weighModel(source, options);
    const geometry = readGeometry(source.config, path);
    const { context = defaultContext(source.config), batch = 1, train = false } = options;
    const parts = [...weightParts(weights)];
    const notes = [...weights.notes];
    let loraParameters: number | undefined;
    if (train) {
      const adapters = loraTensors(weights.linear, options);
      loraParameters = sum(adapters);
      if (adapters.length === 0) {
        throw new ArgumentError(
          OP,
          "loraTargets",
          "targets that the model has",
          `${options.loraTargets ?? "all"}: no linear layer`,
        );
      }
      parts.push(...trainingParts(weights, geometry, adapters, { ...options, context, batch }));
    } else {
      const cache = readCacheGeometry(source.config, path);
      if (cache.note !== undefined) notes.push(cache.note);
      parts.push(...inferenceParts(weights, geometry, cache, { ...options, context, batch }));
    }
    parts.push(bound("runtime", RUNTIME_BYTES, "driver context, libraries, rounding of the allocator"));
    const { type, blocksize, doubleQuant, computeDtype, parameters, quantizedParameters } = weights;
    return {
      path,
      type,
      ...(blocksize === undefined ? {} : { blocksize, doubleQuant: doubleQuant ?? false }),
      computeDtype,
      use: train ? "training" : "inference",
      context,
      batch,
      parameters,
      quantizedParameters,
      ...(loraParameters === undefined ? {} : { loraParameters }),
      parts,
      totalBytes: sum(parts.map(({ bytes }) => bytes)),
      notes,
    };
  } finally {
    await source.close();
  }
}

function checkOptions(options: EstimateOptions): void {
  const { type, context, batch, kvDtype, loraRank, loraTargets, optimizer, train } = options;
  if (type !== undefined) checkChoice(OP, "type", type, ESTIMATE_TYPES);
  if (kvDtype !== undefined) checkChoice(OP, "kvDtype", kvDtype, KV_DTYPES);
  if (loraTargets !== undefined) checkChoice(OP, "loraTargets", loraTargets, LORA_TARGETS);
  if (optimizer !== undefined) checkChoice(OP, "optimizer", optimizer, OPTIMIZERS);
  for (const [operand, value] of Object.entries({ context, batch, loraRank })) {
    if (value !== undefined && !(Number.isSafeInteger(value) && value > 0)) {
      throw new ArgumentError(OP, operand, "a whole number above 0", String(value));
    }
  }
  for (const [operand, value] of Object.entries({ loraRank, loraTargets, optimizer })) {
    if (value !== undefined && !train) throw new ArgumentError(OP, operand, "train: true beside it", "inference");
  }
}

function defaultContext(config: Model["config"]): number {
  const limit = config.max_position_embeddings ?? config.n_positions;
  return typeof limit === "number" && limit > 0 ? Math.min(limit, DEFAULT_CONTEXT) : DEFAULT_CONTEXT;
}

async function weighModel(source: Model, options: EstimateOptions): Promise<Weights> {
  const { fourBit, int8 } = listQuantized(source.tensors);
  if (fourBit.size + int8.size > 0) return weighQuantized(source, options);
  const { type = "nf4" } = options;
  if (!(QUANTIZE_TYPES as readonly string[]).includes(type)) return weighPlain(source, type as FloatDType, options);
  return weighPlan(source, type as QuantizeType, options);
}

/** By the plan of `halfbyte quantize`. The JSON text of a state stays in the host's memory. */
function weighPlan(source: Model, type: QuantizeType, options: EstimateOptions): Weights {
  const { blocksize, doubleQuant, computeDtype, skip } = options;
  const settings = checkSettings({ type, blocksize, doubleQuant, computeDtype, skip });
  const plan = planModel(source, settings);
  const linear: Linear[] = [];
  let [codeBytes, stateBytes, otherBytes, parameters, quantizedParameters] = [0, 0, 0, 0, 0];
  for (const { tensor, action, transposed, elements, declarations } of plan.tensors) {
    parameters += elements;
    for (const declaration of declarations) {
      const bytes = declaredBytes(declaration);
      if (action === "copy") otherBytes += bytes;
      else if (declaration.name === tensor.name) codeBytes += bytes;
      else if (!/\.quant_state\.|weight_format$/.test(declaration.name)) stateBytes += bytes;
    }
    if (action === "copy") continue;
    quantizedParameters += elements;
    linear.push(linearOf(tensor, transposed));
  }
  const state = type === "int8" ? {} : { blocksize: settings.blocksize, doubleQuant: settings.doubleQuant };
  const sizes = { codeBytes, stateBytes, otherBytes, parameters, quantizedParameters };
  return { type, ...state, computeDtype: settings.dtype, ...sizes, linear, notes: plan.notes };
}

function weighPlain(source: Model, dtype: FloatDType, options: EstimateOptions): Weights {
  for (const option of ["blocksize", "doubleQuant", "computeDtype"] as const) {
    if (options[option] === undefined) continue;
    throw new ArgumentError(OP, option, `no value for ${dtype}, which is not quantized`, String(options[option]));
  }
  const modules = modulesToQuantize(source.config, source.tensors, options.skip);
  const tensors = [...source.tensors.values()];
  const bytes = tensors.map((tensor) => declaredBytes({ ...tensor, dtype: copiedDType(tensor, dtype) }));
  return {
    type: dtype,
    computeDtype: dtype,
    parameters: sum(tensors.map(({ shape }) => sizeOf(shape))),
    quantizedParameters: 0,
    codeBytes: 0,
    stateBytes: 0,
    otherBytes: sum(bytes),
    linear: modules.quantize.map((name) => linearOf(source.tensors.get(name)!, modules.transposed.has(name))),
    notes: [],
  };
}

/** A checkpoint of bitsandbytes: as it is. */
async function weighQuantized(source: Model, options: EstimateOptions): Promise<Weights> {
  for (const option of ["type", "blocksize", "doubleQuant", "computeDtype", "skip"] as const) {
    const value = options[option];
    if (value === undefined || (Array.isArray(value) && value.length === 0)) continue;
    throw new ArgumentError(OP, option, `no value for ${source.path}, which is quantized already`, String(value));
  }
  const types = new Set<string>();
  const linear: Linear[] = [];
  let [codeBytes, stateBytes, otherBytes, parameters, quantizedParameters] = [0, 0, 0, 0, 0];
  let computeDtype: FloatDType = "bf16";
  for (const weight of (await listWeights(source)).values()) {
    parameters += weight.elements;
    if (weight.kind === "plain") {
      otherBytes += weight.memoryBytes;
      continue;
    }
    const codes = source.storedBytes(weight.name);
    if (weight.kind === "4bit") computeDtype = weight.meta.dtype;
    types.add(weight.stored);
    codeBytes += codes;
    stateBytes += weight.memoryBytes - codes;
    quantizedParameters += weight.elements;
    linear.push(linearOf(weight, false));
  }
  const sizes = { codeBytes, stateBytes, otherBytes, parameters, quantizedParameters };
  return { type: [...types].join(" and "), computeDtype, ...sizes, linear, notes: [] };
}

function linearOf({ name, shape }: Pick<SourceTensor, "name" | "shape">, transposed: boolean): Linear {
  const [outputs, inputs] = (transposed ? [...shape].reverse() : shape) as readonly [number, number];
  return { name, inputs, outputs };
}

function weightParts({ type, blocksize, doubleQuant, computeDtype, ...sizes }: Weights): EstimatePart[] {
  const { codeBytes, stateBytes, otherBytes, quantizedParameters, parameters } = sizes;
  if (quantizedParameters === 0) return [exact("weights", otherBytes, `${parameters} in ${computeDtype}`)];
  const nested = doubleQuant ? ", quantized themselves" : "";
  const scales = blocksize === undefined ? "as the checkpoint has them" : `one per ${blocksize} weights${nested}`;
  return [
    exact("quantized weights", codeBytes, `${quantizedParameters} as ${type}`),
    exact("quantization state", stateBytes, type === "int8" ? "scales, one per row" : `scales, ${scales}; code tables`),
    exact(
      "other weights",
      otherBytes,
      `${parameters - quantizedParameters} in ${computeDtype} (embeddings, head, norms)`,
    ),
  ];
}

type Run = EstimateOptions & { readonly context: number; readonly batch: number };

function inferenceParts(weights: Weights, geometry: Geometry, cache: CacheGeometry, run: Run): EstimatePart[] {
  const { context, batch, kvDtype = weights.computeDtype } = run;
  const { kvHeads, headDim, windows } = cache;
  const tokens = sum(windows.map((window) => Math.min(context, window ?? context)));
  const kvBytes = 2 * kvHeads * headDim * DTYPE_BYTES[kvDtype] * tokens * batch;
  const windowed = windows.filter((window) => window !== undefined && window < context).length;
  const limited = windowed > 0 ? `, ${windowed} of them with a sliding window` : "";
  const chunk = batch * Math.min(context, PROMPT_CHUNK);
  const logits = 4 * batch * geometry.vocab;
  return [
    exact(
      "KV cache",
      kvBytes,
      `2 x ${windows.length} layers${limited} x ${kvHeads} heads x ${headDim} x ${context} tokens x ${batch} in ${kvDtype}`,
    ),
    bound(
      "workspace",
      layerBytes(weights, geometry, chunk) + decodedBytes(weights) + logits,
      `activations of a layer for ${chunk} tokens, one decoded matrix, logits of the last token`,
    ),
  ];
}

function trainingParts(weights: Weights, geometry: Geometry, adapters: readonly number[], run: Run): EstimatePart[] {
  const { context, batch, loraRank = 16, loraTargets = "all", optimizer = "adam" } = run;
  const { layers, hidden, vocab } = geometry;
  const tokens = context * batch;
  const parameters = sum(adapters);
  const logits = LOGIT_BYTES * tokens * vocab;
  // A layer is computed again with its gradients once those of the logits are gone.
  const layer = 2 * layerBytes(weights, geometry, tokens) + decodedBytes(weights);
  const peak =
    logits >= layer
      ? `logits and their gradient, ${tokens} x ${vocab} in f32`
      : `a layer computed again, and its gradients`;
  return [
    exact("LoRA adapters", 4 * parameters, `${parameters} in f32: rank ${loraRank}, ${loraTargets} linear layers`),
    exact("gradients", 4 * parameters, "of the adapters, in f32"),
    exact("optimizer state", sum(adapters.map((elements) => stateBytesOf(optimizer, elements))), `of ${optimizer}`),
    bound(
      "kept activations",
      layers * tokens * hidden * DTYPE_BYTES[weights.computeDtype],
      `${layers} layers x ${tokens} tokens x ${hidden} in ${weights.computeDtype}, with gradient checkpointing`,
    ),
    bound("workspace", Math.max(logits, layer), peak),
  ];
}

/** Outputs of all linear layers of the widest decoder layer, and two hidden states, for some tokens. */
function layerBytes({ linear, computeDtype }: Weights, { hidden }: Geometry, tokens: number): number {
  const outputs = new Map<string, number>();
  for (const { name, outputs: width } of linear) {
    const layer = /^.*?\.\d+\./.exec(name)?.[0] ?? "";
    outputs.set(layer, (outputs.get(layer) ?? 0) + width);
  }
  return tokens * (2 * hidden + Math.max(0, ...outputs.values())) * DTYPE_BYTES[computeDtype];
}

/** The largest quantized matrix in the compute dtype: what a product that decodes first needs. */
function decodedBytes({ linear, computeDtype, quantizedParameters }: Weights): number {
  if (quantizedParameters === 0) return 0;
  return linear.reduce((most, { inputs, outputs }) => Math.max(most, inputs * outputs), 0) * DTYPE_BYTES[computeDtype];
}

/** Elements of each adapter's two matrices: rank x inputs and outputs x rank. */
function loraTensors(linear: readonly Linear[], { loraRank = 16, loraTargets = "all" }: EstimateOptions): number[] {
  const isTarget = ({ name }: Linear): boolean => loraTargets === "all" || /attn|attention/i.test(name);
  return linear.filter(isTarget).flatMap(({ inputs, outputs }) => [loraRank * inputs, outputs * loraRank]);
}

/** What an optimizer keeps of a tensor. Small tensors keep 32 bits, as in bitsandbytes. */
function stateBytesOf(optimizer: EstimateOptimizer, elements: number): number {
  const { moments, bits } = OPTIMIZER_STATES[optimizer];
  const small = elements < LEAST_8BIT_ELEMENTS;
  return moments * (bits === 32 || small ? 4 * elements : elements + 4 * Math.ceil(elements / STATE_BLOCK));
}

function exact(name: string, bytes: number, how: string): EstimatePart {
  return { name, bytes, certainty: "exact", how };
}

function bound(name: string, bytes: number, how: string): EstimatePart {
  return { name, bytes: Math.ceil(bytes), certainty: "bound", how };
}

function sum(values: readonly number[]): number {
  return values.reduce((total, value) => total + value, 0);
}
