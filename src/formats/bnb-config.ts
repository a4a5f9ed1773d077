/** config.json of a quantized model: the `quantization_config` object as transformers writes and reads it. */
import { dtypeFromTorch, type FloatDType, isFloat, TORCH_NAME } from "../core/dtype.js";
import { FormatError, UnsupportedError } from "../core/errors.js";
import { dumpPyJson, type PyJson, type PyObject, pyFloat } from "../quant/pyjson.js";
import { QUANT_TYPES, type QuantType } from "../quant/types.js";
import { QUANT_STORAGE, type QuantStorage } from "./bnb.js";

const KEY = "quantization_config";
const METHOD = "bitsandbytes";
/** Activations from here on count as outliers in LLM.int8(): the default of the paper and of transformers. */
const DEFAULT_THRESHOLD = 6;

/** What a `quantization_config` of bitsandbytes says. */
export interface QuantizationConfig {
  readonly type: QuantType | "int8";
  /** dtype of products with 4-bit weights. Default f32, as in transformers; not used by int8. */
  readonly computeDType?: FloatDType;
  /** Default false; not used by int8. */
  readonly doubleQuant?: boolean;
  /** dtype that packed 4-bit codes are stored under. Default "uint8". */
  readonly quantStorage?: QuantStorage;
  /** Modules that stay as they are; null (the default) leaves the choice to transformers' rules. */
  readonly skipModules?: readonly string[] | null;
  /** LLM.int8()'s outlier threshold. Default 6. */
  readonly threshold?: number;
}

/** The `quantization_config` object, with the keys and in the order of `BitsAndBytesConfig.to_dict()`. */
export function quantizationConfig(config: QuantizationConfig): PyObject {
  const eightBit = config.type === "int8";
  return new Map<string, PyJson>([
    ["quant_method", METHOD],
    ["_load_in_8bit", eightBit],
    ["_load_in_4bit", !eightBit],
    // A float: transformers refuses the int 6.
    ["llm_int8_threshold", pyFloat(config.threshold ?? DEFAULT_THRESHOLD)],
    ["llm_int8_skip_modules", config.skipModules ? [...config.skipModules] : null],
    ["llm_int8_enable_fp32_cpu_offload", false],
    ["llm_int8_has_fp16_weight", false],
    // 8-bit configurations carry transformers' 4-bit defaults along.
    ["bnb_4bit_quant_type", config.type === "int8" ? "fp4" : config.type],
    ["bnb_4bit_use_double_quant", !eightBit && (config.doubleQuant ?? false)],
    ["bnb_4bit_compute_dtype", TORCH_NAME[(!eightBit && config.computeDType) || "f32"]],
    ["bnb_4bit_quant_storage", (!eightBit && config.quantStorage) || "uint8"],
    ["load_in_4bit", !eightBit],
    ["load_in_8bit", eightBit],
  ]);
}

/**
 * The text of a config.json with this `quantization_config`, laid out as transformers saves it.
 * @param tree the original configuration: `source.configTree`, or `fromPlain(source.config)`
 */
export function formatQuantizedConfig(tree: PyObject, config: QuantizationConfig): string {
  const changed = new Map(tree).set(KEY, quantizationConfig(config));
  return `${dumpPyJson(changed, { indent: 2, sortKeys: true })}\n`;
}

/**
 * The `quantization_config` of a parsed config.json, or undefined for a model that is not quantized.
 * @param where the file, for messages
 * @throws UnsupportedError for another method than bitsandbytes, FormatError for values that make no sense
 */
export function readQuantizationConfig(
  config: Readonly<Record<string, unknown>>,
  where: string,
): Required<QuantizationConfig> | undefined {
  const value = config[KEY];
  if (value === undefined || value === null) return undefined;
  const fail = (problem: string): never => {
    throw new FormatError("config", where, `${KEY}: ${problem}`);
  };
  if (typeof value !== "object" || Array.isArray(value)) return fail("is not an object");
  const fields = value as Readonly<Record<string, unknown>>;
  const flag = (key: string): boolean => {
    const given = fields[key] ?? false;
    return typeof given === "boolean" ? given : fail(`${key} is not true or false`);
  };
  const eightBit = flag("load_in_8bit") || flag("_load_in_8bit");
  const fourBit = flag("load_in_4bit") || flag("_load_in_4bit");
  // Files from before other methods existed name none.
  const method = fields.quant_method ?? (eightBit || fourBit ? METHOD : undefined);
  if (method !== METHOD) {
    const why = "only bitsandbytes checkpoints are read";
    throw new UnsupportedError(`${where}: quantization method ${JSON.stringify(method)}`, why);
  }
  if (eightBit === fourBit) return fail("exactly one of load_in_4bit and load_in_8bit must be true");

  const skip = fields.llm_int8_skip_modules ?? null;
  if (skip !== null && !(Array.isArray(skip) && skip.every((name) => typeof name === "string"))) {
    return fail("llm_int8_skip_modules is not a list of names");
  }
  const threshold = fields.llm_int8_threshold ?? DEFAULT_THRESHOLD;
  if (typeof threshold !== "number" || !(threshold >= 0)) return fail("llm_int8_threshold is not a number");
  const common = { skipModules: skip, threshold };
  if (eightBit) {
    return { ...common, type: "int8", computeDType: "f32", doubleQuant: false, quantStorage: "uint8" };
  }
  const type = fields.bnb_4bit_quant_type ?? "fp4";
  const quantType = QUANT_TYPES.find((known) => known === type);
  if (!quantType) return fail(`bnb_4bit_quant_type is ${JSON.stringify(type)}: expected ${QUANT_TYPES.join(" or ")}`);
  const storage = fields.bnb_4bit_quant_storage ?? "uint8";
  if (typeof storage !== "string" || !Object.hasOwn(QUANT_STORAGE, storage)) {
    return fail(`bnb_4bit_quant_storage is ${JSON.stringify(storage)}`);
  }
  const compute = fields.bnb_4bit_compute_dtype ?? TORCH_NAME.f32;
  const computeDType = typeof compute === "string" ? dtypeFromTorch(compute) : undefined;
  if (computeDType === undefined || !isFloat(computeDType)) {
    return fail(`bnb_4bit_compute_dtype is ${JSON.stringify(compute)}: expected float32, float16 or bfloat16`);
  }
  const doubleQuant = flag("bnb_4bit_use_double_quant");
  return { ...common, type: quantType, computeDType, doubleQuant, quantStorage: storage as QuantStorage };
}
