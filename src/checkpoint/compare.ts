/** How far a quantized model is from its original. */
import { type DeviceChoice, openBackend } from "../backend/devices.js";
import { FormatError } from "../core/errors.js";
import { formatShape, type Shape, sameShape } from "../core/shape.js";
import { modulesToQuantize } from "../formats/bnb-modules.js";
import { type DecodableModel, decodeWeight, openWeights, type Weight } from "./decode.js";
import { floatDType } from "./encode.js";
import { ErrorSum, type TensorError } from "./error-sum.js";

export interface CompareOptions {
  /** Where to compute. Default: as `getBackend`. */
  readonly device?: DeviceChoice | undefined;
  readonly signal?: AbortSignal | undefined;
  /** Called as weights are done, with their number and that of all that will be compared. */
  readonly onProgress?: ((progress: { done: number; total: number; tensor: string }) => void) | undefined;
}

/** A weight that both models have. */
export interface ComparedTensor extends TensorError {
  readonly name: string;
  /** Of the quantized model's weight. */
  readonly shape: Shape;
  /** What the quantized model stores it as. */
  readonly stored: string;
  readonly parameters: number;
  /** Scales and states included. */
  readonly bitsPerWeight: number;
  /** True where the quantized model holds codes. */
  readonly quantized: boolean;
}

/** What `compareModels` found. */
export interface ComparisonReport {
  readonly original: string;
  readonly quantized: string;
  /** All weights that both have, in the quantized model's order. */
  readonly tensors: readonly ComparedTensor[];
  /** Names of up to ten weights with the largest relative error, the worst first. */
  readonly worst: readonly string[];
  /** Over all quantized weights together. */
  readonly total: TensorError & { readonly parameters: number; readonly bitsPerWeight: number };
  /** Names that only one of the two has, and weights whose shapes differ. */
  readonly onlyOriginal: readonly string[];
  readonly onlyQuantized: readonly string[];
  readonly mismatched: readonly { readonly name: string; readonly original: Shape; readonly quantized: Shape }[];
  readonly seconds: number;
}

const WORST = 10;

/**
 * Compares every weight of a quantized model with the original's, as float32 values: 4-bit weights as they decode to their
 * state's dtype, int8 weights as codes * SCB / 127. Either may be a Hugging Face folder or a GGUF file, quantized or not.
 * Both stream through in slices.
 * @throws FormatError when a model is malformed or the two have no weight in common, UnsupportedError, DeviceError, the signal's
 *   reason
 */
export async function compareModels(
  original: string,
  quantized: string,
  options: CompareOptions = {},
): Promise<ComparisonReport> {
  const started = performance.now();
  const before = await openWeights(original);
  try {
    const after = await openWeights(quantized);
    try {
      const { device } = await openBackend(options.device);
      const report = await compareWeights(before, after, { ...options, device });
      return { original, quantized, ...report, seconds: (performance.now() - started) / 1000 };
    } finally {
      await after.source.close();
    }
  } finally {
    await before.source.close();
  }
}

interface Pair {
  readonly before: Weight;
  readonly after: Weight;
  readonly transposed: boolean;
}

async function compareWeights(
  before: DecodableModel,
  after: DecodableModel,
  options: CompareOptions,
): Promise<Omit<ComparisonReport, "original" | "quantized" | "seconds">> {
  const transposed = modulesToQuantize(before.source.config, before.source.tensors).transposed;
  const pairs: Pair[] = [];
  const mismatched: ComparisonReport["mismatched"][number][] = [];
  const onlyQuantized: string[] = [];
  for (const [name, weight] of after.weights) {
    const other = before.weights.get(name);
    if (!other) onlyQuantized.push(name);
    else {
      // A Conv1D's weight is stored [in, out] and quantized as [out, in].
      const turned = weight.kind !== "plain" && other.kind === "plain" && transposed.has(name);
      const shape = turned ? [...other.shape].reverse() : other.shape;
      if (sameShape(shape, weight.shape)) pairs.push({ before: other, after: weight, transposed: turned });
      else mismatched.push({ name, original: other.shape, quantized: weight.shape });
    }
  }
  if (pairs.length === 0) {
    const first = mismatched[0];
    const shapes = first && `${first.name} is ${formatShape(first.original)} and ${formatShape(first.quantized)}`;
    const problem = `has no weight in common with ${before.source.path}${shapes ? ` (${shapes})` : ""}`;
    throw new FormatError("checkpoint", after.source.path, problem);
  }
  const comparable = pairs.filter(({ before, after }) => isFloat(before) && isFloat(after));
  const all = comparable.reduce((sum, { after }) => sum + after.elements, 0);
  const total = new ErrorSum();
  const tensors: ComparedTensor[] = [];
  let parameters = 0;
  let bytes = 0;
  let done = 0;
  for (const pair of comparable) {
    const { name, shape, stored, elements, diskBytes, kind } = pair.after;
    const sum = await comparePair(before, after, pair, options, (elements) => {
      done += elements;
      options.onProgress?.({ done, total: all, tensor: name });
    });
    const bitsPerWeight = (8 * diskBytes) / Math.max(1, elements);
    const quantized = kind !== "plain";
    tensors.push({ name, shape, stored, parameters: elements, bitsPerWeight, quantized, ...sum.result });
    if (!quantized) continue;
    total.include(sum);
    parameters += elements;
    bytes += diskBytes;
  }
  const ranked = [...tensors].sort((a, b) => rank(b) - rank(a));
  return {
    tensors,
    worst: ranked.slice(0, WORST).map(({ name }) => name),
    total: { ...total.result, parameters, bitsPerWeight: (8 * bytes) / Math.max(1, parameters) },
    onlyOriginal: [...before.weights.keys()].filter((name) => !after.weights.has(name)),
    onlyQuantized,
    mismatched,
  };
}

/** Not a number is worse than any. */
function rank({ relative }: TensorError): number {
  return Number.isNaN(relative) ? Number.POSITIVE_INFINITY : relative;
}

function isFloat(weight: Weight): boolean {
  return weight.kind !== "plain" || floatDType(weight.tensor.dtype) !== undefined;
}

async function comparePair(
  before: DecodableModel,
  after: DecodableModel,
  pair: Pair,
  options: CompareOptions,
  advance: (elements: number) => void,
): Promise<ErrorSum> {
  const { device, signal } = options;
  const sum = new ErrorSum();
  const xs = decodeWeight(before.source, pair.before, { transposed: pair.transposed, device, signal });
  const ys = decodeWeight(after.source, pair.after, { device, signal });
  let x: Float32Array = new Float32Array(0);
  try {
    for await (let y of ys) {
      while (y.length > 0) {
        if (x.length === 0) {
          const { value } = await xs.next();
          if (!value) throw new FormatError("checkpoint", before.source.path, `${pair.before.name} ends early`);
          x = value;
        }
        const n = Math.min(x.length, y.length);
        sum.add(x.subarray(0, n), y.subarray(0, n));
        x = x.subarray(n);
        y = y.subarray(n);
        advance(n);
      }
    }
  } finally {
    await xs.return(undefined);
  }
  return sum;
}
