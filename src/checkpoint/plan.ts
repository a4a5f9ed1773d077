/** What happens to each tensor of a model: decided before anything is written. */
import { type FloatDType, TORCH_NAME } from "../core/dtype.js";
import { ArgumentError, FormatError } from "../core/errors.js";
import { sizeOf } from "../core/shape.js";
import { fourBitDeclarations, int8Declarations, listQuantized } from "../formats/bnb.js";
import { formatQuantizedConfig, readQuantizationConfig } from "../formats/bnb-config.js";
import { modulesToQuantize, skipMatcher } from "../formats/bnb-modules.js";
import { parseSize } from "../formats/safetensors-shards.js";
import type { TensorDeclaration } from "../formats/safetensors-writer.js";
import type { ModelSource, SourceTensor } from "../formats/source.js";
import { checkBlocksize, checkChoice } from "../ops/check.js";
import { fromPlain, isPyObject, type PyJson, type PyObject } from "../quant/pyjson.js";
import { copiedDType, floatDType, floatFromTorch, outputShape } from "./encode.js";

const OP = "quantizeModel";

/** What a model can be quantized to. */
export const QUANTIZE_TYPES = ["nf4", "fp4", "int8"] as const;
export type QuantizeType = (typeof QUANTIZE_TYPES)[number];

/** The names PyTorch has for the dtypes that are computed in. */
export const COMPUTE_DTYPES = ["float32", "float16", "bfloat16"] as const;
export type ComputeDtype = (typeof COMPUTE_DTYPES)[number];

/** Options after checks, with defaults. */
export interface Settings {
  readonly type: QuantizeType;
  readonly blocksize: number;
  readonly doubleQuant: boolean;
  readonly dtype: FloatDType;
  readonly skip: readonly string[];
  readonly maxShardSize: number | undefined;
}

export interface SettingsOptions {
  /** Default `nf4`. */
  readonly type?: QuantizeType | undefined;
  /** Weights that share a scale: 32, 64, ... 4096. Default 64. Not for int8, which has one scale per row. */
  readonly blocksize?: number | undefined;
  /** Quantize the scales as well: saves about 0.4 bits per weight in blocks of 64. Not for int8. Default false. */
  readonly doubleQuant?: boolean | undefined;
  /** The dtype weights are rounded to before they are quantized, and that the rest is stored in. Default `bfloat16`. */
  readonly computeDtype?: ComputeDtype | undefined;
  /** Modules to leave alone besides the output head: a name, the end of a name, or a regular expression. */
  readonly skip?: readonly string[] | undefined;
  /** Bytes of tensor data per file, as a number or as text (`"5GB"`). Default 5 GB. */
  readonly maxShardSize?: string | number | undefined;
}

/** @throws ArgumentError */
export function checkSettings(options: SettingsOptions): Settings {
  const { type = "nf4", computeDtype = "bfloat16", skip = [], maxShardSize } = options;
  checkChoice(OP, "type", type, QUANTIZE_TYPES);
  checkChoice(OP, "computeDtype", computeDtype, COMPUTE_DTYPES);
  if (type === "int8") {
    const only = (option: string) =>
      new ArgumentError(OP, option, "no value for int8: it has one scale per row", "one");
    if (options.blocksize !== undefined) throw only("blocksize");
    if (options.doubleQuant) throw only("doubleQuant");
  }
  const { blocksize = 64, doubleQuant = false } = options;
  checkBlocksize(OP, blocksize);
  return {
    type,
    blocksize,
    doubleQuant,
    dtype: floatFromTorch(computeDtype)!,
    skip,
    maxShardSize: maxShardSize === undefined ? undefined : parseSize(maxShardSize, "maxShardSize"),
  };
}

/** A tensor of the source and the tensors that it becomes. */
export interface TensorPlan {
  readonly tensor: SourceTensor;
  readonly elements: number;
  readonly action: "quantize" | "copy";
  readonly transposed: boolean;
  /** The dtype it is rounded to. */
  readonly dtype: FloatDType;
  /** Why a matrix is not quantized. */
  readonly reason: string | undefined;
  readonly declarations: readonly TensorDeclaration[];
}

export interface ModelPlan {
  readonly tensors: readonly TensorPlan[];
  /** The text of the new config.json. */
  readonly config: string;
  /** What the user may not have meant, as sentences. */
  readonly notes: readonly string[];
}

/**
 * Decides for each tensor, by transformers' rules and the skip patterns.
 * @throws FormatError for a model that is quantized already or has nothing to quantize, ArgumentError for a bad pattern,
 *   UnsupportedError for a model or a dtype that cannot be quantized
 */
export function planModel(source: ModelSource, settings: Settings): ModelPlan {
  refuseQuantized(source);
  const modules = modulesToQuantize(source.config, source.tensors, settings.skip);
  const chosen = new Set(modules.quantize);
  const tensors = [...source.tensors.values()].map((tensor): TensorPlan => {
    const elements = sizeOf(tensor.shape);
    const target = copiedDType(tensor, settings.dtype);
    const transposed = modules.transposed.has(tensor.name);
    if (chosen.has(tensor.name) && floatDType(tensor.dtype)) {
      const declarations = declare(tensor, transposed, settings);
      return {
        tensor,
        elements,
        action: "quantize",
        transposed,
        dtype: settings.dtype,
        reason: undefined,
        declarations,
      };
    }
    const reason = modules.kept.get(tensor.name);
    // What transformers keeps in float32 loses nothing here.
    const inFloat32 = reason === "kept in float32" && floatDType(tensor.dtype) !== undefined;
    const dtype = inFloat32 ? "f32" : settings.dtype;
    const declarations = [{ name: tensor.name, dtype: inFloat32 ? "F32" : target, shape: tensor.shape } as const];
    return { tensor, elements, action: "copy", transposed: false, dtype, reason, declarations };
  });
  if (!tensors.some(({ action }) => action === "quantize")) {
    const why =
      settings.skip.length > 0 ? "every linear layer is skipped" : "it has no linear layers that are quantized";
    throw new FormatError("checkpoint", source.path, `nothing to quantize: ${why}`);
  }
  const config = quantizedConfig(source, settings, modules.skipModules);
  return { tensors, config, notes: idlePatterns(settings.skip, tensors) };
}

function idlePatterns(skip: readonly string[], tensors: readonly TensorPlan[]): string[] {
  const modules = tensors.map(({ tensor }) => tensor.name.replace(/\.[^.]*$/, ""));
  return skip
    .filter((pattern) => !modules.some(skipMatcher([pattern])))
    .map((pattern) => `no module's name ends with, or is matched from its start by, the skip pattern ${pattern}`);
}

function declare(tensor: SourceTensor, transposed: boolean, settings: Settings): TensorDeclaration[] {
  const shape = outputShape(tensor, transposed);
  const { type, blocksize, doubleQuant, dtype } = settings;
  if (type === "int8") return int8Declarations(tensor.name, shape);
  return fourBitDeclarations(tensor.name, { quantType: type, blocksize, dtype, shape, doubleQuant });
}

function refuseQuantized(source: ModelSource): void {
  const say = (what: string): never => {
    const problem = `is already quantized (${what}): pass the original model`;
    throw new FormatError("checkpoint", source.path, problem);
  };
  const config = source.config.quantization_config as { quant_method?: unknown } | undefined;
  if (config !== undefined && config !== null) {
    const method = config.quant_method ?? "bitsandbytes";
    say(
      method === "bitsandbytes"
        ? `bitsandbytes ${readQuantizationConfig(source.config, source.path)?.type}`
        : `${method}`,
    );
  }
  const { fourBit, int8 } = listQuantized(source.tensors);
  if (fourBit.size > 0) say("bitsandbytes 4-bit tensors");
  if (int8.size > 0) say("bitsandbytes int8 tensors");
}

function quantizedConfig(source: ModelSource, settings: Settings, skipModules: readonly string[] | null): string {
  const tree = source.configTree ?? fromPlain(source.config);
  const { type, doubleQuant, dtype } = settings;
  return formatQuantizedConfig(withDType(tree as PyObject, TORCH_NAME[dtype], true), {
    type,
    doubleQuant,
    computeDType: dtype,
    skipModules,
  });
}

const DTYPE_KEYS = ["dtype", "torch_dtype"];

/** The dtype that the configuration, and those of the parts of a composed model, name: now the compute dtype. */
function withDType(tree: PyObject, dtype: string, top: boolean): PyObject {
  const changed = new Map<string, PyJson>();
  for (const [key, value] of tree) {
    const isPart = isPyObject(value) && DTYPE_KEYS.some((name) => value.has(name));
    changed.set(key, DTYPE_KEYS.includes(key) ? dtype : isPart ? withDType(value, dtype, false) : value);
  }
  if (top && !DTYPE_KEYS.some((key) => changed.has(key))) changed.set("dtype", dtype);
  return changed;
}
