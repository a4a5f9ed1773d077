/**
 * One tensor of a checkpoint from its source to the writer, slice by slice: to 4-bit codes, to int8 codes, or as it is.
 *
 * Weights are first rounded to the compute dtype (int8: then to float16, as bitsandbytes does), so that a GGUF file and the
 * Hugging Face folder made from it give the same codes. What is not quantized is stored in the compute dtype as well.
 */
import type { Backend } from "../core/backend.js";
import { dtypeFromTorch, type FloatDType, isFloat, TORCH_NAME } from "../core/dtype.js";
import { NonFiniteError, UnsupportedError } from "../core/errors.js";
import { tidy } from "../core/scope.js";
import { ceilDiv, type Shape, sizeOf } from "../core/shape.js";
import { Tensor } from "../core/tensor.js";
import { bytesOf } from "../core/typedarray.js";
import { fourBitNames, int8Names } from "../formats/bnb.js";
import type { ModelSource, SafetensorsDType, SourceTensor } from "../formats/source.js";
import { nest, unnest } from "../ops/blockwise.js";
import { dequantize4bit, quantize4bit } from "../ops/fourbit.js";
import { int8VectorwiseDequant, int8VectorwiseQuant } from "../ops/int8.js";
import { get4bitType } from "../quant/codebooks.js";
import { QuantState } from "../quant/state.js";
import { formatQuantState } from "../quant/state-json.js";
import { NESTED_BLOCKSIZE, type QuantType } from "../quant/types.js";
import type { ErrorSum } from "./error-sum.js";
import { pipeline, readSlices, type Slice } from "./slices.js";

const OP = "quantizeModel";

/** A tensor on its way, and where it goes. */
export interface Encoding {
  readonly backend: Backend;
  readonly source: ModelSource;
  readonly tensor: SourceTensor;
  /** Stored [in, out], written [out, in]. */
  readonly transposed: boolean;
  /** What the weights are rounded to. */
  readonly dtype: FloatDType;
  /** The next bytes of an output tensor. */
  readonly write: (name: string, bytes: Uint8Array) => Promise<void>;
  /** Called with the number of elements that are done. */
  readonly advance: (elements: number) => void;
  /** Where the distance of the result from the source is added up. */
  readonly errors?: ErrorSum | undefined;
  readonly signal?: AbortSignal | undefined;
}

export interface FourBitOptions {
  readonly quantType: QuantType;
  readonly blocksize: number;
  readonly doubleQuant: boolean;
}

/** The shape a tensor has in the output. */
export function outputShape(tensor: SourceTensor, transposed: boolean): Shape {
  return transposed ? [...tensor.shape].reverse() : tensor.shape;
}

/** The dtype a float tensor of the source has on a device, or undefined for one that is not float. */
export function floatDType(dtype: SafetensorsDType): FloatDType | undefined {
  if (dtype === "F64") return "f32";
  const known = dtype === "F32" ? "f32" : dtype === "F16" ? "f16" : dtype === "BF16" ? "bf16" : undefined;
  return known;
}

/** The float dtype that config files call `name`, or undefined. */
export function floatFromTorch(name: unknown): FloatDType | undefined {
  const dtype = typeof name === "string" ? dtypeFromTorch(name) : undefined;
  return dtype !== undefined && isFloat(dtype) ? dtype : undefined;
}

/**
 * Packed codes, scales and state of a weight, into the tensors that `fourBitDeclarations` declares.
 * @throws NonFiniteError naming the tensor, what reading and writing throw
 */
export async function encodeFourBit(job: Encoding, options: FourBitOptions): Promise<void> {
  const { backend, tensor, dtype, errors } = job;
  const { quantType, blocksize, doubleQuant } = options;
  const names = fourBitNames(tensor.name, quantType);
  const shape = outputShape(tensor, job.transposed);
  // With double quantization the scales wait here until all are known: 1/16 of a byte per weight in blocks of 64.
  const absmax = doubleQuant ? new Float32Array(ceilDiv(sizeOf(shape), blocksize)) : undefined;
  const quantize = (slice: Slice) => {
    const x = load(backend, tensor, slice);
    const [packed, state] = quantize4bit(rounded(x, dtype), { quantType, blocksize });
    return { x, packed, state };
  };

  const compute = (slice: Slice) =>
    reading(
      () => {
        const { x, packed, state } = quantize(slice);
        const reads = [packed.bytes(), state.absmax.bytes()];
        if (errors && !doubleQuant) reads.push(...comparison(x, dequantize4bit(packed, state)));
        return { reads, held: [x, packed, state] };
      },
      naming(job, slice, blocksize),
    );
  const write = async ([packed, scales, x, y]: Results, slice: Slice): Promise<void> => {
    if (errors && x && y) errors.add(floats(x), floats(y));
    await job.write(names.weight, packed!);
    if (absmax) absmax.set(floats(scales!), slice.begin / blocksize);
    else await job.write(names.absmax, scales!);
    job.advance(slice.elements);
  };
  await pipeline(slicesOf(job, blocksize), compute, write);

  await job.write(names.quantMap, bytesOf(get4bitType(quantType)));
  const meta = { quantType, blocksize, dtype, shape };
  if (!absmax) {
    await job.write(names.quantState, formatQuantState(meta));
    return;
  }
  const nested = nestScales(backend, absmax);
  try {
    const reads = nested.tensors().map((tensor) => tensor.bytes());
    const [codes, mean, scales] = (await Promise.all(reads)) as [Result, Result, Result];
    await job.write(names.absmax, codes);
    await job.write(names.nestedAbsmax, scales);
    await job.write(names.nestedQuantMap, bytesOf(nested.state2!.code!.values));
    const state = { ...meta, nested: { blocksize: NESTED_BLOCKSIZE, offset: floats(mean)[0]! } };
    await job.write(names.quantState, formatQuantState(state));
    if (errors) await nestedErrors(job, options, nested, quantize, errors);
  } finally {
    nested.dispose();
  }
}

/** Double quantization of all scales of a weight: a state whose tensors are the codes, their offset, their scales. */
function nestScales(backend: Backend, absmax: Float32Array): QuantState {
  return tidy(() => {
    const scales = Tensor.allocate(backend, "f32", [absmax.length]).copyFrom(absmax);
    const fields = { shape: scales.shape, dtype: "f32", blocksize: NESTED_BLOCKSIZE } as const;
    return new QuantState({ ...fields, ...nest(scales, NESTED_BLOCKSIZE) });
  });
}

/** Decoding needs the nested scales, which exist only after the last slice: so the slices are read a second time. */
async function nestedErrors(
  job: Encoding,
  { quantType, blocksize }: FourBitOptions,
  nested: QuantState,
  quantize: (slice: Slice) => { x: Tensor<FloatDType>; packed: Tensor; state: QuantState },
  errors: ErrorSum,
): Promise<void> {
  const scales = unnest(OP, nested);
  try {
    const compute = (slice: Slice) =>
      reading(
        () => {
          const { x, packed, state } = quantize(slice);
          const first = slice.begin / blocksize;
          const absmax = scales.slice(first, first + ceilDiv(slice.elements, blocksize));
          const decoded = new QuantState({ absmax, shape: state.shape, dtype: state.dtype, blocksize, quantType });
          return { reads: comparison(x, dequantize4bit(packed, decoded)), held: [x, packed, state] };
        },
        naming(job, slice, blocksize),
      );
    await pipeline(slicesOf(job, blocksize), compute, async ([x, y]) => errors.add(floats(x!), floats(y!)));
  } finally {
    scales.dispose();
  }
}

/**
 * int8 codes and row scales of a weight [out, in], into the tensors that `int8Declarations` declares.
 * @throws NonFiniteError naming the tensor, what reading and writing throw
 */
export async function encodeInt8(job: Encoding): Promise<void> {
  const { backend, tensor, dtype, errors } = job;
  const names = int8Names(tensor.name);
  const [, cols] = outputShape(tensor, job.transposed) as readonly [number, number];
  const compute = (slice: Slice) =>
    reading(
      () => {
        const x = load(backend, tensor, slice);
        const half = rounded(rounded(x, dtype), "f16").reshape([slice.elements / cols, cols]);
        const [codes, scales] = int8VectorwiseQuant(half);
        const reads = [codes.bytes(), scales.bytes()];
        if (errors) reads.push(...comparison(x, int8VectorwiseDequant(codes, scales)));
        return { reads, held: [x, half, codes, scales] };
      },
      naming(job, slice, cols),
    );
  await pipeline(slicesOf(job, Math.max(1, cols)), compute, async ([codes, scales, x, y], slice) => {
    if (errors && x && y) errors.add(floats(x), floats(y));
    await job.write(names.weight, codes!);
    await job.write(names.scb, scales!);
    job.advance(slice.elements);
  });
  await job.write(names.weightFormat, Uint8Array.of(0));
}

/** The dtype that a tensor which is not quantized has in the output. @throws UnsupportedError for 8-bit floats and smaller */
export function copiedDType({ name, dtype }: SourceTensor, target: FloatDType): SafetensorsDType {
  if (/^F[468](_|$)/.test(dtype)) {
    const why = "pass the model in its original precision (float32, float16 or bfloat16)";
    throw new UnsupportedError(`${name} of dtype ${dtype}`, why);
  }
  if (!floatDType(dtype)) return dtype;
  return target === "f32" ? "F32" : target === "f16" ? "F16" : "BF16";
}

/** A tensor that is not quantized: floats rounded to the compute dtype, everything else byte for byte. */
export async function copyTensor(job: Encoding): Promise<void> {
  const { backend, tensor, dtype, write, advance } = job;
  const convert = copiedDType(tensor, dtype) !== tensor.dtype;
  const compute = async (slice: Slice): Promise<Results> => {
    if (!convert) return [slice.bytes];
    return reading(() => {
      const x = load(backend, tensor, slice);
      const y = rounded(x, dtype);
      return { reads: [y.bytes()], held: [x, y] };
    });
  };
  await pipeline(slicesOf(job, 1), compute, async ([bytes], slice) => {
    await write(tensor.name, bytes!);
    advance(slice.elements);
  });
}

type Result = Uint8Array<ArrayBuffer>;
type Results = readonly Result[];
interface Held {
  dispose(): void;
}

function slicesOf({ source, tensor, transposed, signal }: Encoding, multiple: number): AsyncIterable<Slice> {
  return readSlices(source, tensor, { multiple, transposed, signal });
}

/**
 * Runs launches and waits for what they read. Launches and reads go out in one go, so that a fault of these kernels can only
 * be reported by these reads. `held` tensors live until the reads are back: memory given back earlier would be handed to
 * the next slice while kernels still use it, and the host would have to wait before it could fill it.
 */
async function reading(
  launch: () => { reads: Promise<Uint8Array<ArrayBuffer>>[]; held: Held[] },
  explain: (error: unknown) => unknown = (error) => error,
): Promise<Results> {
  const { reads, held } = tidy(launch);
  try {
    return await Promise.all(reads);
  } catch (error) {
    throw explain(error);
  } finally {
    for (const tensor of held) tensor.dispose();
  }
}

/** A NonFiniteError in terms of the tensor instead of the slice. */
function naming({ tensor, dtype, transposed }: Encoding, slice: Slice, unit: number): (error: unknown) => unknown {
  return (error) => {
    if (!(error instanceof NonFiniteError)) return error;
    const begin = slice.begin + error.index * unit;
    const end = Math.min(begin + unit, sizeOf(tensor.shape)) - 1;
    const named = new NonFiniteError(OP, tensor.name, Math.floor(begin / unit), error.unit);
    const range = error.unit === "row" ? "float16" : TORCH_NAME[dtype];
    named.message =
      `[${OP}] ${tensor.name}: holds NaN, infinity or a value beyond ${range} in elements ${begin} to ${end}` +
      `${transposed ? " of its transpose" : ""}: it cannot be quantized`;
    return named;
  };
}

/** A slice on the device in a float dtype. */
function load(backend: Backend, { dtype }: SourceTensor, { bytes, elements }: Slice): Tensor<FloatDType> {
  const x = Tensor.allocate(backend, floatDType(dtype)!, [elements]);
  const data = dtype === "F64" ? bytesOf(Float32Array.from(new Float64Array(bytes.slice().buffer))) : bytes;
  backend.write(x.storage, x.byteOffset, data);
  return x;
}

function rounded(x: Tensor<FloatDType>, dtype: FloatDType): Tensor<FloatDType> {
  return x.dtype === dtype ? x : x.to(dtype);
}

/** Reads of the original and of what became of it, as float32. */
function comparison(x: Tensor<FloatDType>, y: Tensor<FloatDType>): Promise<Uint8Array<ArrayBuffer>>[] {
  return [x, y].map((tensor) => rounded(tensor, "f32").bytes());
}

function floats(bytes: Uint8Array<ArrayBuffer>): Float32Array {
  return new Float32Array(bytes.buffer, bytes.byteOffset, bytes.byteLength / 4);
}
