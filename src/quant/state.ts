/** QuantState: what is needed to decode a quantized tensor. */
import type { Backend } from "../core/backend.js";
import { dtypeFromTorch, type FloatDType, isFloat, TORCH_NAME } from "../core/dtype.js";
import { ArgumentError, UnsupportedError } from "../core/errors.js";
import { ceilDiv, type Shape, sizeOf } from "../core/shape.js";
import { Tensor } from "../core/tensor.js";
import { Codebook } from "./codebook.js";
import { get4bitType } from "./codebooks.js";
import { type FourBitMeta, formatQuantState, parseQuantState } from "./state-json.js";
import { BLOCKSIZES, QUANT_TYPES, type QuantType } from "./types.js";

/** A state as bitsandbytes' `as_dict` gives it: its names, tensors and plain values. */
export type QuantStateDict = Readonly<Record<string, Tensor | string | number | readonly number[]>>;

/** The key that holds the JSON of a packed state ends with its type. */
const PACKED_KEY = "quant_state.bitsandbytes__";

export interface QuantStateFields {
  /** f32 scales, one per block; u8 codes of them when `state2` is there. */
  readonly absmax: Tensor;
  /** Shape of the tensor that was quantized. */
  readonly shape: Shape;
  /** dtype that decoding gives: the dtype of the tensor that was quantized. */
  readonly dtype: FloatDType;
  readonly blocksize: number;
  /** nf4 or fp4; absent for 8-bit blockwise codes, which use `code`. */
  readonly quantType?: QuantType;
  /** Codebook of 8-bit blockwise codes. */
  readonly code?: Codebook;
  /** Double quantization: the mean that was taken off absmax (one f32) and the state that decodes absmax. */
  readonly offset?: Tensor<"f32">;
  readonly state2?: QuantState;
}

/**
 * The state that `quantize4bit` and `quantizeBlockwise` return beside the codes, as bitsandbytes' class of that name.
 * It owns its tensors: dispose it when the codes go.
 */
export class QuantState implements QuantStateFields {
  readonly absmax: Tensor;
  readonly shape: Shape;
  readonly dtype: FloatDType;
  readonly blocksize: number;
  readonly quantType?: QuantType;
  readonly code?: Codebook;
  readonly offset?: Tensor<"f32">;
  readonly state2?: QuantState;

  constructor(fields: QuantStateFields) {
    this.absmax = fields.absmax;
    this.shape = Object.freeze([...fields.shape]);
    this.dtype = fields.dtype;
    this.blocksize = fields.blocksize;
    this.quantType = fields.quantType;
    this.code = fields.code;
    this.offset = fields.offset;
    this.state2 = fields.state2;
  }

  /** True when absmax is itself quantized (`compressStatistics`, "double quantization"). */
  get nested(): boolean {
    return this.state2 !== undefined;
  }

  /**
   * The state under bitsandbytes' names. Packed, it is what a checkpoint holds beside a 4-bit weight: `absmax`, `quant_map`,
   * `nested_absmax`, `nested_quant_map` and `quant_state.bitsandbytes__nf4`, whose bytes are the JSON that Python writes. The
   * tensors are the caller's to dispose; those that the state holds too are views.
   * @throws ArgumentError when a blockwise (8-bit) state is packed: checkpoints know 4-bit states only; DisposedError,
   *   BackendError
   */
  async asDict(packed = false): Promise<QuantStateDict> {
    const { absmax, state2, quantType } = this;
    const { backend } = absmax;
    const offset = this.offset ? (await this.offset.data())[0]! : undefined;
    if (packed && !quantType) throw new ArgumentError("asDict", "packed", "a 4-bit state", "an 8-bit blockwise state");
    const view = (tensor: Tensor): Tensor => tensor.reshape(tensor.shape);
    const map = (values: Float32Array): Tensor => Tensor.allocate(backend, "f32", [values.length]).copyFrom(values);
    const tensors = {
      absmax: view(absmax),
      quant_map: map(quantType ? get4bitType(quantType) : this.codebook().values),
      ...(state2 && { nested_absmax: view(state2.absmax), nested_quant_map: map(state2.codebook().values) }),
    };
    const nested = state2 && { blocksize: state2.blocksize, offset: offset ?? 0 };
    if (packed && quantType) {
      const meta: FourBitMeta = { ...this, quantType, nested };
      const json = formatQuantState(meta);
      return { ...tensors, [PACKED_KEY + quantType]: Tensor.allocate(backend, "u8", [json.length]).copyFrom(json) };
    }
    return {
      ...(quantType && { quant_type: quantType }),
      ...tensors,
      blocksize: this.blocksize,
      dtype: TORCH_NAME[this.dtype],
      shape: this.shape,
      ...(nested && {
        nested_blocksize: nested.blocksize,
        nested_dtype: TORCH_NAME[state2.dtype],
        nested_offset: nested.offset,
      }),
    };
  }

  /**
   * The state that `asDict` gave, packed or not; keys may carry a prefix (`model.layers.0.mlp.up_proj.weight.absmax`). Its tensors
   * are views of the dict's and on their device.
   * @throws ArgumentError for missing or contradicting entries, FormatError for a malformed JSON, UnsupportedError for scales
   *   that are not float32
   */
  static async fromDict(dict: QuantStateDict): Promise<QuantState> {
    const packedKeys = Object.keys(dict).filter((key) => key.includes(PACKED_KEY));
    if (packedKeys.length > 1) throw badEntry(PACKED_KEY, "one key", `${packedKeys.length}`);
    const values: Record<string, unknown> = {};
    for (const [key, value] of Object.entries(dict)) {
      if (key !== packedKeys[0]) values[key.slice(key.lastIndexOf(".") + 1)] = value;
    }
    const [packedKey] = packedKeys;
    if (packedKey !== undefined) {
      const quantType = packedKey.slice(packedKey.indexOf(PACKED_KEY) + PACKED_KEY.length);
      const json = dict[packedKey];
      if (!isQuantType(quantType))
        throw badEntry(packedKey, `a key that ends with ${QUANT_TYPES.join(" or ")}`, quantType);
      if (!(json instanceof Tensor) || json.dtype !== "u8") throw badEntry(packedKey, "a u8 tensor", String(json));
      return fromParts(parseQuantState(await json.bytes(), quantType, packedKey), values);
    }
    const { quant_type, blocksize, dtype, shape, nested_blocksize, nested_offset } = values;
    if (quant_type !== undefined && !isQuantType(quant_type)) {
      throw badEntry("quant_type", QUANT_TYPES.join(" or "), String(quant_type));
    }
    const float = dtypeFromTorch(String(dtype));
    if (!float || !isFloat(float)) throw badEntry("dtype", "float32, float16 or bfloat16", String(dtype));
    if (!Array.isArray(shape)) throw badEntry("shape", "a list of sizes", String(shape));
    const meta = {
      quantType: quant_type,
      blocksize: blocksizeOf("blocksize", blocksize),
      dtype: float,
      shape: shape as Shape,
    };
    if (nested_blocksize === undefined && values.nested_absmax === undefined) return fromParts(meta, values);
    if (typeof nested_offset !== "number") throw badEntry("nested_offset", "a number", String(nested_offset));
    const nested = { blocksize: blocksizeOf("nested_blocksize", nested_blocksize), offset: nested_offset };
    return fromParts({ ...meta, nested }, values);
  }

  private codebook(): Codebook {
    return this.code ?? Codebook.dynamic();
  }

  /** Every tensor it owns. */
  tensors(): Tensor[] {
    const own: Tensor[] = [this.absmax];
    if (this.offset) own.push(this.offset);
    return this.state2 ? [...own, ...this.state2.tensors()] : own;
  }

  dispose(): void {
    for (const tensor of this.tensors()) tensor.dispose();
  }

  [Symbol.dispose](): void {
    this.dispose();
  }
}

type Meta = Omit<FourBitMeta, "quantType"> & { readonly quantType?: QuantType };

/** Puts a state together from what its text says and the tensors beside it. */
async function fromParts(meta: Meta, values: Readonly<Record<string, unknown>>): Promise<QuantState> {
  const { quantType, blocksize, dtype, shape, nested } = meta;
  const blocks = ceilDiv(sizeOf(shape), blocksize);
  const absmax = entry(values, "absmax", nested ? "u8" : "f32", blocks);
  const map = await codebookOf(values, "quant_map", quantType ? 16 : 256);
  if (quantType && !map.every((v, i) => v === get4bitType(quantType)[i])) {
    throw badEntry("quant_map", `the values of ${quantType}`, "others");
  }
  const view = (tensor: Tensor): Tensor => tensor.reshape(tensor.shape);
  const code = quantType ? undefined : Codebook.of("QuantState.fromDict", map);
  if (nested?.dtype && nested.dtype !== "f32") {
    const why = "only a save after a forward pass on a CPU writes such scales, and decoding rounds them to that dtype";
    throw new UnsupportedError(`[QuantState.fromDict] nested_dtype ${TORCH_NAME[nested.dtype]}`, why);
  }
  if (!nested) {
    const extra = Object.keys(values).find((key) => key.startsWith("nested_"));
    if (extra) throw badEntry(extra, "no such entry without nested_blocksize", "one");
    return new QuantState({ absmax: view(absmax), shape, dtype, blocksize, quantType, code });
  }
  const absmax2 = entry(values, "nested_absmax", "f32", ceilDiv(blocks, nested.blocksize));
  const code2 = Codebook.of("QuantState.fromDict", await codebookOf(values, "nested_quant_map", 256));
  const inner = { shape: [blocks], dtype: "f32", blocksize: nested.blocksize, code: code2 } as const;
  const state2 = new QuantState({ ...inner, absmax: view(absmax2) });
  const offset = scalar(absmax.backend, nested.offset);
  return new QuantState({ absmax: view(absmax), shape, dtype, blocksize, quantType, code, offset, state2 });
}

async function codebookOf(values: Readonly<Record<string, unknown>>, key: string, size: number) {
  return (await entry(values, key, "f32", size).data()) as Float32Array<ArrayBuffer>;
}

function entry(values: Readonly<Record<string, unknown>>, key: string, dtype: "u8" | "f32", size: number): Tensor {
  const tensor = values[key];
  const expected = `a ${dtype} tensor of ${size} elements`;
  if (!(tensor instanceof Tensor)) throw badEntry(key, expected, tensor === undefined ? "nothing" : typeof tensor);
  if (tensor.dtype !== dtype || tensor.size !== size) throw badEntry(key, expected, tensor.toString());
  return tensor;
}

function scalar(backend: Backend, value: number): Tensor<"f32"> {
  return Tensor.allocate(backend, "f32", []).copyFrom([value]);
}

function blocksizeOf(key: string, value: unknown): number {
  if ((BLOCKSIZES as readonly unknown[]).includes(value)) return value as number;
  throw badEntry(key, `one of ${BLOCKSIZES.join(", ")}`, String(value));
}

function isQuantType(value: unknown): value is QuantType {
  return (QUANT_TYPES as readonly unknown[]).includes(value);
}

function badEntry(key: string, expected: string, received: string): ArgumentError {
  return new ArgumentError("QuantState.fromDict", key, expected, received);
}
