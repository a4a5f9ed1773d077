/**
 * bitsandbytes' checkpoint layouts, 4-bit and int8, as plain bytes: which tensors belong together, whether they fit,
 * and what has to be written. Nothing here computes.
 *
 * 4-bit weight P: `P` (packed codes, first element in the high nibble), `P.absmax`, `P.quant_map`, with double
 * quantization `P.nested_absmax` and `P.nested_quant_map`, and `P.quant_state.bitsandbytes__nf4` (or fp4), a JSON text.
 * int8 weight `M.weight`: `M.SCB` and `M.weight_format` beside it.
 */
import { ArgumentError, FormatError } from "../core/errors.js";
import { ceilDiv, formatShape, type Shape, sameShape, sizeOf } from "../core/shape.js";
import { CODEBOOK_SIZE } from "../quant/codebook.js";
import { type FourBitMeta, formatQuantState, MAX_STATE_BYTES, parseQuantState } from "../quant/state-json.js";
import { NESTED_BLOCKSIZE, QUANT_TYPES, type QuantType } from "../quant/types.js";
import type { TensorDeclaration } from "./safetensors-writer.js";
import { type ModelSource, rowCount, SAFETENSORS_BITS, type SafetensorsDType, type SourceTensor } from "./source.js";

/** Values of a 4-bit codebook. */
const QUANT_MAP_SIZE = 16;
const STATE_INFIX = ".quant_state.bitsandbytes__";
/** The longest `repr` of a finite double. */
const LONGEST_FLOAT = -2.2250738585072014e-308;

/** dtypes that packed codes may be stored under (`bnb_4bit_quant_storage`), by the name PyTorch prints. */
export const QUANT_STORAGE = {
  uint8: "U8",
  int8: "I8",
  float16: "F16",
  bfloat16: "BF16",
  float32: "F32",
  float64: "F64",
} as const satisfies Record<string, SafetensorsDType>;
export type QuantStorage = keyof typeof QUANT_STORAGE;

/** The tensors of one 4-bit weight. */
export interface FourBitKeys {
  readonly quantType: QuantType;
  readonly weight: SourceTensor;
  readonly absmax: SourceTensor;
  readonly quantMap: SourceTensor;
  readonly quantState: SourceTensor;
  readonly nestedAbsmax?: SourceTensor;
  readonly nestedQuantMap?: SourceTensor;
}

/** The tensors of one int8 weight. */
export interface Int8Keys {
  readonly weight: SourceTensor;
  /** Row scales: weight = codes * SCB / 127. */
  readonly scb: SourceTensor;
  /** One byte that must be 0 (row-major); absent means the same. */
  readonly weightFormat?: SourceTensor;
}

/** A checkpoint's tensors sorted by what they are: every name is in exactly one group, keyed by the weight's name. */
export interface QuantizedTensors {
  readonly fourBit: ReadonlyMap<string, FourBitKeys>;
  readonly int8: ReadonlyMap<string, Int8Keys>;
  /** Names of tensors that no quantized weight claims. */
  readonly plain: readonly string[];
}

/** The tensor names of a 4-bit weight. */
export function fourBitNames(weight: string, quantType: QuantType) {
  return {
    weight,
    absmax: `${weight}.absmax`,
    quantMap: `${weight}.quant_map`,
    nestedAbsmax: `${weight}.nested_absmax`,
    nestedQuantMap: `${weight}.nested_quant_map`,
    quantState: `${weight}${STATE_INFIX}${quantType}`,
  } as const;
}

/** The tensor names of an int8 weight, which must end with "weight". Throws ArgumentError otherwise. */
export function int8Names(weight: string) {
  const module = /^(|.*\.)weight$/s.exec(weight)?.[1];
  if (module === undefined) throw new ArgumentError("int8Names", "weight", 'a name ending with ".weight"', weight);
  return { weight, scb: `${module}SCB`, weightFormat: `${module}weight_format` } as const;
}

/**
 * Finds the quantized weights of a checkpoint by the keys that are there, as bitsandbytes does, and checks what can be
 * checked without data: that every part is present and has a dtype and shape that can be right.
 * @throws FormatError naming the tensor
 */
export function listQuantized(entries: ReadonlyMap<string, SourceTensor>): QuantizedTensors {
  const fourBit = new Map<string, FourBitKeys>();
  const int8 = new Map<string, Int8Keys>();
  const claimed = new Set<string>();
  const claim = (name: string): SourceTensor | undefined => {
    const tensor = entries.get(name);
    if (tensor) claimed.add(name);
    return tensor;
  };
  for (const name of entries.keys()) {
    const at = name.lastIndexOf(STATE_INFIX);
    if (at >= 0) {
      const weight = name.slice(0, at);
      if (fourBit.has(weight))
        throw new FormatError("checkpoint", weight, "has more than one quant_state: expected exactly one");
      fourBit.set(weight, fourBitKeys(weight, name.slice(at + STATE_INFIX.length), claim));
    } else if (name === "SCB" || name.endsWith(".SCB")) {
      const weight = `${name.slice(0, -"SCB".length)}weight`;
      int8.set(weight, int8Keys(weight, claim));
    } else if (name.endsWith(".quant_map")) {
      checkHasState(name.slice(0, -".quant_map".length), entries);
    }
  }
  return { fourBit, int8, plain: [...entries.keys()].filter((name) => !claimed.has(name)) };
}

/** A weight with scales and codebook needs a state as well. (One of an unknown type is reported where it is found.) */
function checkHasState(weight: string, entries: ReadonlyMap<string, SourceTensor>): void {
  if (!entries.has(weight) || !entries.has(`${weight}.absmax`)) return;
  if (QUANT_TYPES.some((type) => entries.has(`${weight}${STATE_INFIX}${type}`))) return;
  if ([...entries.keys()].some((name) => name.startsWith(weight + STATE_INFIX))) return;
  const expected = QUANT_TYPES.map((type) => STATE_INFIX + type).join(" or ");
  throw new FormatError("checkpoint", weight, `lacks its quant_state (a tensor with the same name and ${expected})`);
}

function fourBitKeys(
  weight: string,
  quantType: string,
  claim: (name: string) => SourceTensor | undefined,
): FourBitKeys {
  if (!isQuantType(quantType)) {
    const problem = `quant_state of type ${JSON.stringify(quantType)}: expected ${QUANT_TYPES.join(" or ")}`;
    throw new FormatError("checkpoint", weight, problem);
  }
  const names = fourBitNames(weight, quantType);
  const need = (name: string): SourceTensor => {
    const tensor = claim(name);
    if (!tensor)
      throw new FormatError("checkpoint", weight, `has a quant_state, but ${JSON.stringify(name)} is missing`);
    return tensor;
  };
  const keys = {
    quantType,
    weight: need(names.weight),
    absmax: need(names.absmax),
    quantMap: need(names.quantMap),
    quantState: need(names.quantState),
    nestedAbsmax: claim(names.nestedAbsmax),
    nestedQuantMap: claim(names.nestedQuantMap),
  };
  refuseCpuLayout(keys);
  const nested = keys.nestedAbsmax !== undefined;
  if (nested !== (keys.nestedQuantMap !== undefined)) {
    const missing = nested ? names.nestedQuantMap : names.nestedAbsmax;
    throw new FormatError("checkpoint", weight, `is double-quantized, but ${JSON.stringify(missing)} is missing`);
  }
  if (!Object.values(QUANT_STORAGE).some((dtype) => dtype === keys.weight.dtype)) {
    throw new FormatError(
      "checkpoint",
      weight,
      `packed codes are stored as ${keys.weight.dtype}, which no quant_storage is`,
    );
  }
  if (keys.weight.shape.length !== 2 || keys.weight.shape[1] !== 1) {
    wrong(keys.weight, "a column [n, 1] of packed codes");
  }
  expectTensor(keys.absmax, nested ? "U8" : "F32", [rowCount(keys.absmax.shape)]);
  expectTensor(keys.quantMap, "F32", [QUANT_MAP_SIZE]);
  expectTensor(keys.quantState, "U8", [rowCount(keys.quantState.shape)]);
  if (keys.quantState.shape[0]! > MAX_STATE_BYTES) wrong(keys.quantState, `at most ${MAX_STATE_BYTES} bytes`);
  if (keys.nestedAbsmax) expectTensor(keys.nestedAbsmax, "F32", [rowCount(keys.nestedAbsmax.shape)]);
  if (keys.nestedQuantMap) expectTensor(keys.nestedQuantMap, "F32", [CODEBOOK_SIZE]);
  return keys;
}

/**
 * On a CPU with AVX512-BF16, bitsandbytes 0.50 repacks weights in place on their first forward pass and turns absmax
 * into a transposed bfloat16 matrix. A checkpoint saved afterwards keeps that absmax, and in some versions the repacked
 * codes, without saying so.
 */
function refuseCpuLayout({ weight, absmax }: { weight: SourceTensor; absmax: SourceTensor }): void {
  if (absmax.shape.length !== 2 && absmax.dtype !== "BF16") return;
  throw new FormatError(
    "checkpoint",
    weight.name,
    `its absmax is ${absmax.dtype} ${formatShape(absmax.shape)}: the model was saved after a forward pass on a CPU, for ` +
      "which bitsandbytes had put its scales (and codes) into another order. The file does not say so, and transformers " +
      "reloads it as garbage. Quantize the original again, and save it before its first forward pass",
  );
}

function int8Keys(weight: string, claim: (name: string) => SourceTensor | undefined): Int8Keys {
  const names = int8Names(weight);
  const scb = claim(names.scb)!;
  const tensor = claim(names.weight);
  if (!tensor)
    throw new FormatError("checkpoint", names.scb, `are the scales of ${JSON.stringify(weight)}, which is missing`);
  if (tensor.dtype !== "I8" || tensor.shape.length !== 2) wrong(tensor, "I8 [out, in], because it has an SCB");
  expectTensor(scb, "F32", [tensor.shape[0]!]);
  const weightFormat = claim(names.weightFormat);
  if (weightFormat && (weightFormat.dtype !== "U8" || sizeOf(weightFormat.shape) !== 1)) wrong(weightFormat, "one U8");
  return { weight: tensor, scb, weightFormat };
}

function isQuantType(value: unknown): value is QuantType {
  return (QUANT_TYPES as readonly unknown[]).includes(value);
}

function expectTensor(tensor: SourceTensor, dtype: SafetensorsDType, shape: Shape): void {
  if (tensor.dtype !== dtype || !sameShape(tensor.shape, shape)) wrong(tensor, `${dtype} ${formatShape(shape)}`);
}

function wrong(tensor: SourceTensor, expected: string): never {
  const problem = `expected ${expected}, found ${tensor.dtype} ${formatShape(tensor.shape)}`;
  throw new FormatError("checkpoint", tensor.name, problem);
}

/**
 * Checks that a weight's tensors have the sizes that its quant state calls for.
 * @throws FormatError naming the tensor
 */
export function checkFourBit(keys: FourBitKeys, meta: FourBitMeta): void {
  const { weight, absmax, nestedAbsmax } = keys;
  if ((meta.nested !== undefined) !== (nestedAbsmax !== undefined)) {
    const says = meta.nested ? "says that absmax is quantized" : "knows nothing of nested_absmax";
    throw new FormatError("checkpoint", weight.name, `its quant_state ${says}, the tensors beside it disagree`);
  }
  const elements = sizeOf(meta.shape);
  const itemBytes = SAFETENSORS_BITS[weight.dtype] / 8;
  const stored = weight.shape[0]!;
  const expected = ceilDiv(ceilDiv(elements, 2), itemBytes);
  if (stored !== expected) {
    const of = `the codes of ${formatShape(meta.shape)}`;
    const short = stored === Math.floor((elements + 1) / (2 * itemBytes));
    const hint = short ? "; bitsandbytes rounds down here, so the last codes were never saved" : "";
    throw new FormatError(
      "checkpoint",
      weight.name,
      `${of} take [${expected}, 1] of ${weight.dtype}, found ${formatShape(weight.shape)}${hint}`,
    );
  }
  expectTensor(absmax, absmax.dtype, [ceilDiv(elements, meta.blocksize)]);
  if (meta.nested && nestedAbsmax) {
    expectTensor(nestedAbsmax, "F32", [ceilDiv(absmax.shape[0]!, meta.nested.blocksize)]);
  }
}

/** Reads the quant state of a weight and checks it against the weight's tensors. Throws FormatError. */
export async function readQuantState(source: ModelSource, keys: FourBitKeys): Promise<FourBitMeta> {
  const { name } = keys.quantState;
  const meta = parseQuantState(await readAll(source, keys.quantState), keys.quantType, name);
  checkFourBit(keys, meta);
  return meta;
}

/** A 4-bit weight as bytes, little endian. */
export interface FourBitBytes {
  readonly meta: FourBitMeta;
  /** ceil(elements / 2) bytes, whatever dtype they were stored under. */
  readonly packed: Uint8Array<ArrayBuffer>;
  /** f32 scales, or u8 codes of them when `nestedAbsmax` is there. */
  readonly absmax: Uint8Array<ArrayBuffer>;
  readonly quantMap: Uint8Array<ArrayBuffer>;
  readonly nestedAbsmax?: Uint8Array<ArrayBuffer>;
  readonly nestedQuantMap?: Uint8Array<ArrayBuffer>;
}

/** Reads a whole 4-bit weight. Throws FormatError when its parts do not fit. */
export async function readFourBit(source: ModelSource, keys: FourBitKeys): Promise<FourBitBytes> {
  const meta = await readQuantState(source, keys);
  const optional = (tensor: SourceTensor | undefined) => tensor && readAll(source, tensor);
  const packed = await readAll(source, keys.weight);
  return {
    meta,
    packed: packed.subarray(0, ceilDiv(sizeOf(meta.shape), 2)),
    absmax: await readAll(source, keys.absmax),
    quantMap: await readAll(source, keys.quantMap),
    nestedAbsmax: await optional(keys.nestedAbsmax),
    nestedQuantMap: await optional(keys.nestedQuantMap),
  };
}

/** An int8 weight as bytes: i8 codes `[out, in]` and f32 row scales `[out]`, little endian. */
export interface Int8Bytes {
  readonly codes: Uint8Array<ArrayBuffer>;
  readonly scb: Uint8Array<ArrayBuffer>;
}

/** Reads a whole int8 weight. Throws FormatError when its layout is not row-major. */
export async function readInt8(source: ModelSource, keys: Int8Keys): Promise<Int8Bytes> {
  await checkInt8Layout(source, keys);
  return { codes: await readAll(source, keys.weight), scb: await readAll(source, keys.scb) };
}

/** Throws FormatError when an int8 weight is stored in one of the tiled layouts of old GPUs. */
export async function checkInt8Layout(source: ModelSource, { weightFormat }: Int8Keys): Promise<void> {
  const format = weightFormat ? (await readAll(source, weightFormat))[0] : 0;
  if (format === 0) return;
  const problem = `is ${format}: only row-major int8 weights (0) are supported, this one has a GPU's own layout`;
  throw new FormatError("checkpoint", weightFormat!.name, problem);
}

function readAll(source: ModelSource, tensor: SourceTensor): Promise<Uint8Array<ArrayBuffer>> {
  return source.readRows(tensor.name, 0, rowCount(tensor.shape));
}

/** What has to be known of a 4-bit weight before it is quantized. */
export interface FourBitPlan extends Omit<FourBitMeta, "nested"> {
  /** Whether absmax will be quantized too (double quantization). */
  readonly doubleQuant: boolean;
  /** Default "uint8". */
  readonly storage?: QuantStorage;
}

/**
 * The tensors of a 4-bit weight as a writer wants them declared, in the order of bitsandbytes' state dict. With double
 * quantization the state's length is open until the mean of absmax is known.
 */
export function fourBitDeclarations(weight: string, plan: FourBitPlan): TensorDeclaration[] {
  const { quantType, blocksize, shape, doubleQuant, storage = "uint8" } = plan;
  const names = fourBitNames(weight, quantType);
  const elements = sizeOf(shape);
  const blocks = ceilDiv(elements, blocksize);
  const storageDType = QUANT_STORAGE[storage];
  const items = ceilDiv(ceilDiv(elements, 2), SAFETENSORS_BITS[storageDType] / 8);
  const meta = { quantType, blocksize, dtype: plan.dtype, shape };
  const longest = { ...meta, nested: { blocksize: NESTED_BLOCKSIZE, offset: LONGEST_FLOAT } };
  return [
    { name: names.weight, dtype: storageDType, shape: [items, 1] },
    { name: names.absmax, dtype: doubleQuant ? "U8" : "F32", shape: [blocks] },
    { name: names.quantMap, dtype: "F32", shape: [QUANT_MAP_SIZE] },
    ...(doubleQuant
      ? ([
          { name: names.nestedAbsmax, dtype: "F32", shape: [ceilDiv(blocks, NESTED_BLOCKSIZE)] },
          { name: names.nestedQuantMap, dtype: "F32", shape: [CODEBOOK_SIZE] },
          { name: names.quantState, dtype: "U8", shape: { atMost: formatQuantState(longest).length } },
        ] as const)
      : [{ name: names.quantState, dtype: "U8" as const, shape: [formatQuantState(meta).length] }]),
  ];
}

/** The tensors of an int8 weight `[out, in]` as a writer wants them declared. `weight_format` is the one byte 0. */
export function int8Declarations(weight: string, shape: Shape): TensorDeclaration[] {
  const names = int8Names(weight);
  if (shape.length !== 2) throw new ArgumentError("int8Declarations", "shape", "[out, in]", formatShape(shape));
  return [
    { name: names.weight, dtype: "I8", shape },
    { name: names.scb, dtype: "F32", shape: [shape[0]!] },
    { name: names.weightFormat, dtype: "U8", shape: [] },
  ];
}
