/** The weights of any model as numbers: what they are stored as, and their float32 values slice by slice. */
import { type DeviceChoice, getBackend } from "../backend/devices.js";
import { DTYPE_BYTES, type FloatDType } from "../core/dtype.js";
import { UnsupportedError } from "../core/errors.js";
import { keep, tidy } from "../core/scope.js";
import { ceilDiv, type Shape, sizeOf } from "../core/shape.js";
import { Tensor } from "../core/tensor.js";
import { checkInt8Layout, type FourBitKeys, type Int8Keys, listQuantized, readQuantState } from "../formats/bnb.js";
import type { ModelSource, SourceTensor } from "../formats/source.js";
import { rowCount, SAFETENSORS_BITS } from "../formats/source.js";
import { unnest } from "../ops/blockwise.js";
import { dequantize4bit } from "../ops/fourbit.js";
import { int8VectorwiseDequant } from "../ops/int8.js";
import { Codebook } from "../quant/codebook.js";
import { QuantState } from "../quant/state.js";
import type { FourBitMeta } from "../quant/state-json.js";
import { floatDType, floatFromTorch } from "./encode.js";
import { type Model, openModel } from "./open.js";
import { readSlices, SLICE_ELEMENTS, type Slice } from "./slices.js";

interface WeightBase {
  readonly name: string;
  /** Of the weight as it is used, not of its packed codes. */
  readonly shape: Shape;
  readonly elements: number;
  /** Bytes on disk of everything that belongs to it. */
  readonly diskBytes: number;
  /** Bytes once transformers has loaded it. */
  readonly memoryBytes: number;
}

/** A weight of a model, whatever it is stored as. */
export type Weight = WeightBase &
  (
    | { readonly kind: "plain"; readonly tensor: SourceTensor; readonly stored: string }
    | { readonly kind: "4bit"; readonly keys: FourBitKeys; readonly meta: FourBitMeta; readonly stored: string }
    | { readonly kind: "int8"; readonly keys: Int8Keys; readonly stored: string }
  );

/**
 * Every weight of a model, in the order of its files. Quantization states are read and checked, data are not.
 * @throws FormatError for a quantized checkpoint whose parts do not fit
 */
export async function listWeights(source: Model): Promise<ReadonlyMap<string, Weight>> {
  const { fourBit, int8, plain } = listQuantized(source.tensors);
  const plainNames = new Set(plain);
  const { config } = source;
  const loaded = floatFromTorch(config.dtype ?? config.torch_dtype);
  const weights = new Map<string, Weight>();
  const bytes = (tensors: readonly (SourceTensor | undefined)[]): number =>
    tensors.reduce((sum, tensor) => sum + (tensor ? source.storedBytes(tensor.name) : 0), 0);
  for (const [name, tensor] of source.tensors) {
    const fourBitKeys = fourBit.get(name);
    const int8Keys = int8.get(name);
    if (fourBitKeys) {
      const meta = await readQuantState(source, fourBitKeys);
      const { quantType: stored, shape } = meta;
      const { quantState, quantType: _, ...parts } = fourBitKeys;
      const memoryBytes = bytes(Object.values(parts));
      const diskBytes = memoryBytes + bytes([quantState]);
      const elements = sizeOf(shape);
      weights.set(name, {
        kind: "4bit",
        name,
        shape,
        elements,
        diskBytes,
        memoryBytes,
        keys: fourBitKeys,
        meta,
        stored,
      });
    } else if (int8Keys) {
      await checkInt8Layout(source, int8Keys);
      const { shape } = tensor;
      const elements = sizeOf(shape);
      const memoryBytes = bytes([int8Keys.weight, int8Keys.scb]);
      const diskBytes = memoryBytes + bytes([int8Keys.weightFormat]);
      weights.set(name, {
        kind: "int8",
        name,
        shape,
        elements,
        diskBytes,
        memoryBytes,
        keys: int8Keys,
        stored: "int8",
      });
    } else if (plainNames.has(name)) {
      const { shape } = tensor;
      const elements = sizeOf(shape);
      const diskBytes = source.storedBytes(name);
      const float = floatDType(tensor.dtype);
      const memoryBytes = float ? elements * DTYPE_BYTES[loaded ?? float] : diskBytes;
      const stored = source.kind === "gguf" ? source.storedType(name) : tensor.dtype;
      weights.set(name, { kind: "plain", name, shape, elements, diskBytes, memoryBytes, tensor, stored });
    }
  }
  return weights;
}

/** A model with its weights, ready to be decoded. */
export interface DecodableModel {
  readonly source: Model;
  readonly weights: ReadonlyMap<string, Weight>;
}

export async function openWeights(path: string): Promise<DecodableModel> {
  const source = await openModel(path);
  try {
    return { source, weights: await listWeights(source) };
  } catch (error) {
    await source.close();
    throw error;
  }
}

export interface DecodeOptions {
  /** Values of the transposed matrix (of a weight that is not quantized). */
  readonly transposed?: boolean;
  readonly device?: DeviceChoice | undefined;
  readonly signal?: AbortSignal | undefined;
}

/**
 * The values of a weight in order, as float32: 4-bit weights as the dtype of their state gives them, int8 weights as
 * codes * SCB / 127. The next piece is read and decoded while the caller looks at one.
 * @throws UnsupportedError for a dtype that is no float, what reading throws
 */
export async function* decodeWeight(
  source: ModelSource,
  weight: Weight,
  options: DecodeOptions = {},
): AsyncGenerator<Float32Array, void, void> {
  const pieces = decodedPieces(source, weight, options);
  try {
    let next = pieces.next();
    for (;;) {
      const { value, done } = await next;
      if (done) return;
      next = pieces.next();
      // Nobody waits for it when the caller stops early; otherwise the await above throws.
      next.catch(() => {});
      yield value;
    }
  } finally {
    await pieces.return(undefined);
  }
}

function decodedPieces(source: ModelSource, weight: Weight, options: DecodeOptions): AsyncGenerator<Float32Array> {
  if (weight.kind === "4bit") return decode4bit(source, weight.keys, weight.meta, options);
  if (weight.kind === "int8") return decodeInt8(source, weight.keys, options);
  return decodePlain(source, weight.tensor, options);
}

async function* decodePlain(source: ModelSource, tensor: SourceTensor, options: DecodeOptions) {
  const { transposed = false, signal } = options;
  const dtype = floatDType(tensor.dtype);
  if (!dtype)
    throw new UnsupportedError(`${tensor.name} of dtype ${tensor.dtype}`, "it holds no floating-point numbers");
  const backend = getBackend(options.device);
  for await (const { bytes, elements } of readSlices(source, tensor, { multiple: 1, transposed, signal })) {
    if (tensor.dtype === "F32") yield floats(bytes);
    else if (tensor.dtype === "F64") yield Float32Array.from(new Float64Array(bytes.slice().buffer));
    else yield await result(() => fill(Tensor.allocate(backend, dtype, [elements]), bytes).to("f32"));
  }
}

async function* decode4bit(source: ModelSource, keys: FourBitKeys, meta: FourBitMeta, options: DecodeOptions) {
  const { blocksize, quantType, dtype } = meta;
  const backend = getBackend(options.device);
  const total = sizeOf(meta.shape);
  const absmax = await readScales(source, keys, meta, options);
  try {
    const step = SLICE_ELEMENTS - (SLICE_ELEMENTS % blocksize);
    const itemBytes = SAFETENSORS_BITS[keys.weight.dtype] / 8;
    for (let begin = 0; begin < total; begin += step) {
      options.signal?.throwIfAborted();
      const elements = Math.min(step, total - begin);
      const packedBytes = ceilDiv(elements, 2);
      const first = begin / 2 / itemBytes;
      const bytes = await source.readRows(keys.weight.name, first, first + ceilDiv(packedBytes, itemBytes));
      yield await result(() => {
        const packed = fill(Tensor.allocate(backend, "u8", [packedBytes]), bytes.subarray(0, packedBytes));
        const scales = absmax.slice(begin / blocksize, begin / blocksize + ceilDiv(elements, blocksize));
        const state = new QuantState({ absmax: scales, shape: [elements], dtype, blocksize, quantType });
        return asFloat32(dequantize4bit(packed, state));
      });
    }
  } finally {
    absmax.dispose();
  }
}

/** All f32 scales of a 4-bit weight on the device, decoded if they are quantized themselves. */
async function readScales(
  source: ModelSource,
  keys: FourBitKeys,
  { nested }: FourBitMeta,
  options: DecodeOptions,
): Promise<Tensor<"f32">> {
  const backend = getBackend(options.device);
  const whole = (tensor: SourceTensor) => source.readRows(tensor.name, 0, rowCount(tensor.shape));
  const bytes = await whole(keys.absmax);
  const n = rowCount(keys.absmax.shape);
  if (!nested || !keys.nestedAbsmax || !keys.nestedQuantMap) {
    return keep(fill(Tensor.allocate(backend, "f32", [n]), bytes));
  }
  const scales = await whole(keys.nestedAbsmax);
  const code = floats(await whole(keys.nestedQuantMap));
  return tidy(() => {
    const codes = fill(Tensor.allocate(backend, "u8", [n]), bytes);
    const absmax = fill(Tensor.allocate(backend, "f32", [rowCount(keys.nestedAbsmax!.shape)]), scales);
    const offset = Tensor.allocate(backend, "f32", []).copyFrom([nested.offset]);
    const fields = { shape: codes.shape, dtype: "f32", blocksize: nested.blocksize } as const;
    const state2 = new QuantState({ ...fields, absmax, code: Codebook.of("decodeWeight", code) });
    const decoded = unnest("decodeWeight", new QuantState({ ...fields, absmax: codes, offset, state2 }));
    const { dtype = "f32" } = nested;
    return dtype === "f32" ? decoded : decoded.to(dtype).to("f32");
  });
}

async function* decodeInt8(source: ModelSource, keys: Int8Keys, options: DecodeOptions) {
  const backend = getBackend(options.device);
  const [rows, cols] = keys.weight.shape as readonly [number, number];
  if (cols === 0) return;
  const scales = floats(await source.readRows(keys.scb.name, 0, rows));
  for await (const slice of readSlices(source, keys.weight, { multiple: cols, signal: options.signal })) {
    yield await result(() => {
      const count = slice.elements / cols;
      const first = slice.begin / cols;
      const codes = fill(Tensor.allocate(backend, "i8", [count, cols]), slice.bytes);
      const stats = Tensor.allocate(backend, "f32", [count]).copyFrom(scales.subarray(first, first + count));
      return int8VectorwiseDequant(codes, stats);
    });
  }
}

function fill<T extends Tensor>(tensor: T, bytes: Slice["bytes"]): T {
  tensor.backend.write(tensor.storage, tensor.byteOffset, bytes);
  return tensor;
}

function asFloat32(x: Tensor<FloatDType>): Tensor<FloatDType> {
  return x.dtype === "f32" ? x : x.to("f32");
}

/** The values of a float32 tensor that `make` computes. */
async function result(make: () => Tensor<FloatDType>): Promise<Float32Array> {
  return floats(await tidy(() => ({ read: make().bytes() })).read);
}

function floats(bytes: Uint8Array<ArrayBuffer>): Float32Array {
  return new Float32Array(bytes.buffer, bytes.byteOffset, bytes.byteLength / 4);
}
