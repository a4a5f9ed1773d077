/** Quantizing a model into a folder that transformers + bitsandbytes load. */
import { writeFile } from "node:fs/promises";
import { join } from "node:path";
import { type DeviceChoice, openBackend } from "../backend/devices.js";
import type { Backend, DeviceName } from "../core/backend.js";
import { TORCH_NAME } from "../core/dtype.js";
import { FormatError, HalfbyteError } from "../core/errors.js";
import type { Shape } from "../core/shape.js";
import { sizeOf } from "../core/shape.js";
import { CONFIG_FILE } from "../formats/hf-folder.js";
import { CheckpointWriter } from "../formats/safetensors-shards.js";
import { declaredBytes } from "../formats/safetensors-writer.js";
import type { SafetensorsDType } from "../formats/source.js";
import { copyTensor, type Encoding, encodeFourBit, encodeInt8 } from "./encode.js";
import { ErrorSum, type TensorError } from "./error-sum.js";
import { notesOf } from "./inspect.js";
import { type Job, runJobs } from "./jobs.js";
import { type Model, openModel } from "./open.js";
import { OutputFolder } from "./output-folder.js";
import {
  type ComputeDtype,
  checkSettings,
  planModel,
  type QuantizeType,
  type Settings,
  type SettingsOptions,
  type TensorPlan,
} from "./plan.js";
import { elementsInFlight } from "./slices.js";

export type { ComputeDtype, QuantizeType } from "./plan.js";

/** How far `quantizeModel` is. */
export interface QuantizeProgress {
  /** Weights that are written, and all there are. */
  readonly done: number;
  readonly total: number;
  /** The tensor that was worked on last. */
  readonly tensor: string;
}

export interface QuantizeOptions extends SettingsOptions {
  /** Replace the model in `out`. Default false: an `out` that exists is an error. */
  readonly force?: boolean | undefined;
  /** Measure the error of every quantized tensor on the way. Default false. */
  readonly errors?: boolean | undefined;
  /** Where to compute. Default: as `getBackend`. The result is the same bytes everywhere. */
  readonly device?: DeviceChoice | undefined;
  /** Stops the work: nothing is left of it, and the promise rejects with the signal's reason. */
  readonly signal?: AbortSignal | undefined;
  readonly onProgress?: ((progress: QuantizeProgress) => void) | undefined;
}

/** A tensor that was quantized. */
export interface QuantizedTensorReport {
  readonly name: string;
  /** Of the weight, as it is used: [out, in]. */
  readonly shape: Shape;
  /** Bytes of codes, scales, maps and state. */
  readonly bytes: number;
  /** 8 x bytes / weights. */
  readonly bitsPerWeight: number;
  /** With `errors` only. */
  readonly error?: TensorError;
}

/** A tensor that was stored as it is, but for its dtype. */
export interface KeptTensorReport {
  readonly name: string;
  readonly shape: Shape;
  readonly dtype: SafetensorsDType;
  readonly bytes: number;
  /** Why a matrix was not quantized; absent for vectors and the like. */
  readonly reason?: string;
}

/** What `quantizeModel` did. */
export interface QuantizeReport {
  readonly source: { readonly path: string; readonly kind: Model["kind"]; readonly bytes: number };
  readonly out: string;
  /** What computed. */
  readonly device: DeviceName;
  readonly type: QuantizeType;
  /** 4-bit types only. */
  readonly blocksize?: number;
  readonly doubleQuant?: boolean;
  readonly computeDtype: ComputeDtype;
  /** All weights of the model, and those that were quantized. */
  readonly parameters: number;
  readonly quantizedParameters: number;
  /** Bytes of all tensors in `out`. */
  readonly bytes: number;
  /** Bits per quantized weight, scales and state included. */
  readonly bitsPerWeight: number;
  /** Files in `out`, in the order they were written. */
  readonly files: readonly string[];
  readonly quantized: readonly QuantizedTensorReport[];
  readonly kept: readonly KeptTensorReport[];
  /** Error over all quantized weights together, with `errors` only. */
  readonly error?: TensorError;
  /** What of the source has no place in the result and should be known, as sentences. */
  readonly notes: readonly string[];
  readonly seconds: number;
}

/**
 * Quantizes a model into a new folder that transformers + bitsandbytes load: config.json with its `quantization_config`,
 * generation config, tokenizer files and safetensors shards. The output head, embeddings and everything else that
 * transformers would leave alone stays, in the compute dtype. Tensors stream through in slices: memory stays below a
 * gigabyte whatever the size of the model. The same input and options give the same bytes on every device, whatever the number
 * of threads.
 *
 * Nothing is visible under `out` before it is complete; after an error or an abort nothing is left.
 *
 * @param src a Hugging Face folder or a .gguf file
 * @param out the folder to make
 * @throws ArgumentError (options, `out` exists), FormatError (source malformed or already quantized, disk full),
 *   UnsupportedError (a model that cannot be quantized), NonFiniteError naming the tensor, DeviceError, BackendError, the
 *   signal's reason
 */
export async function quantizeModel(src: string, out: string, options: QuantizeOptions = {}): Promise<QuantizeReport> {
  const started = performance.now();
  const settings = checkSettings(options);
  let source: Model | undefined;
  try {
    const folder = OutputFolder.check(out, src, options.force ?? false);
    options.signal?.throwIfAborted();
    source = await openModel(src);
    const backend = await openBackend(options.device);
    return await convert(source, backend, folder, settings, options, started);
  } catch (error) {
    throw explained(error, out);
  } finally {
    await source?.close();
  }
}

async function convert(
  source: Model,
  backend: Backend,
  folder: OutputFolder,
  settings: Settings,
  options: QuantizeOptions,
  started: number,
): Promise<QuantizeReport> {
  const plan = planModel(source, settings);
  const parameters = plan.tensors.reduce((sum, { elements }) => sum + elements, 0);
  const sums = new Map<TensorPlan, ErrorSum>();
  await folder.create(plan.tensors.reduce((sum, tensor) => sum + bytesOf(tensor), 0));
  let writer: CheckpointWriter | undefined;
  try {
    const declarations = plan.tensors.flatMap((tensor) => tensor.declarations);
    const { maxShardSize } = settings;
    writer = new CheckpointWriter(folder.work, declarations, {
      totalParameters: parameters,
      ...(maxShardSize === undefined ? {} : { maxShardSize }),
    });
    await runJobs(jobsOf(source, backend, plan.tensors, settings, options, writer, parameters, sums));
    const { files, totalBytes } = await writer.finish();
    await writeFile(join(folder.work, CONFIG_FILE), plan.config);
    for (const [name, load] of source.sidecars) await writeFile(join(folder.work, name), await load());
    options.signal?.throwIfAborted();
    folder.commit();

    const quantized = plan.tensors
      .filter(({ action }) => action === "quantize")
      .map((t) => quantizedReport(t, sums.get(t)));
    const quantizedParameters = quantized.reduce((sum, { shape }) => sum + sizeOf(shape), 0);
    const quantizedBytes = quantized.reduce((sum, { bytes }) => sum + bytes, 0);
    const total = new ErrorSum();
    for (const sum of sums.values()) total.include(sum);
    const { type, blocksize, doubleQuant, dtype } = settings;
    return {
      source: { path: source.path, kind: source.kind, bytes: storedBytes(source) },
      out: folder.path,
      device: backend.device,
      type,
      ...(type === "int8" ? {} : { blocksize, doubleQuant }),
      computeDtype: TORCH_NAME[dtype] as ComputeDtype,
      parameters,
      quantizedParameters,
      bytes: totalBytes,
      bitsPerWeight: (8 * quantizedBytes) / Math.max(1, quantizedParameters),
      files: [...files, CONFIG_FILE, ...source.sidecars.keys()],
      quantized,
      kept: plan.tensors.filter(({ action }) => action === "copy").map(keptReport),
      ...(options.errors ? { error: total.result } : {}),
      notes: [...plan.notes, ...notesOf(source)],
      seconds: (performance.now() - started) / 1000,
    };
  } catch (error) {
    await writer?.abort();
    folder.abort();
    throw error;
  }
}

function* jobsOf(
  source: Model,
  backend: Backend,
  plans: readonly TensorPlan[],
  settings: Settings,
  options: QuantizeOptions,
  writer: CheckpointWriter,
  total: number,
  sums: Map<TensorPlan, ErrorSum>,
): Generator<Job> {
  const { signal, onProgress } = options;
  let done = 0;
  for (const plan of plans) {
    const { tensor, transposed, dtype, action } = plan;
    const errors = action === "quantize" && options.errors ? new ErrorSum() : undefined;
    if (errors) sums.set(plan, errors);
    const encoding: Encoding = {
      backend,
      source,
      tensor,
      transposed,
      dtype,
      errors,
      signal,
      write: (name, bytes) => writer.write(name, bytes),
      advance(elements) {
        done += elements;
        onProgress?.({ done, total, tensor: tensor.name });
      },
    };
    const { type: quantType, blocksize, doubleQuant } = settings;
    yield {
      weight: elementsInFlight(tensor, transposed),
      run: async () => {
        signal?.throwIfAborted();
        if (action === "copy") await copyTensor(encoding);
        else if (quantType === "int8") await encodeInt8(encoding);
        else await encodeFourBit(encoding, { quantType, blocksize, doubleQuant });
      },
    };
  }
}

function bytesOf(plan: TensorPlan): number {
  return plan.declarations.reduce((sum, declaration) => sum + declaredBytes(declaration), 0);
}

function quantizedReport(plan: TensorPlan, sum: ErrorSum | undefined): QuantizedTensorReport {
  const { tensor, transposed, elements } = plan;
  const bytes = bytesOf(plan);
  return {
    name: tensor.name,
    shape: transposed ? [...tensor.shape].reverse() : tensor.shape,
    bytes,
    bitsPerWeight: (8 * bytes) / Math.max(1, elements),
    ...(sum ? { error: sum.result } : {}),
  };
}

function keptReport(plan: TensorPlan): KeptTensorReport {
  const { tensor, declarations, reason } = plan;
  const { dtype } = declarations[0]!;
  const bytes = bytesOf(plan);
  return { name: tensor.name, shape: tensor.shape, dtype, bytes, ...(reason === undefined ? {} : { reason }) };
}

function storedBytes(source: Model): number {
  return [...source.tensors.keys()].reduce((sum, name) => sum + source.storedBytes(name), 0);
}

/** Errors of the file system (a full disk, no permission) as typed ones; everything else as it is. */
function explained(error: unknown, out: string): unknown {
  if (error instanceof HalfbyteError || !(error instanceof Error)) return error;
  const { code, syscall } = error as NodeJS.ErrnoException;
  if (code === undefined || syscall === undefined) return error;
  return new FormatError("checkpoint", out, `cannot be written: ${error.message}`, { cause: error });
}
