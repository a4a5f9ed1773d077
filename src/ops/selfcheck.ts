/**
 * Is what a backend computes right? NF4 of seeded numbers, with and without double quantization, there and back, held against
 * plain JavaScript that follows docs/numerics.md without a thought about speed. For `halfbyte doctor` and the cuda probe.
 */
import type { Backend } from "../core/backend.js";
import { SUM_CHUNK, SUM_LANES } from "../core/kernels.js";
import { tidy } from "../core/scope.js";
import { Tensor } from "../core/tensor.js";
import { bytesOf } from "../core/typedarray.js";
import { createDynamicMap, NF4_THRESHOLDS, NF4_VALUES } from "../quant/codebooks.js";
import { NESTED_BLOCKSIZE } from "../quant/types.js";
import { dequantize4bit, quantize4bit } from "./fourbit.js";

const { fround } = Math;
const BLOCKSIZE = 64;
/** A last block that is not full, and an odd length. */
export const SELF_CHECK_ELEMENTS = 1000 * BLOCKSIZE + 37;

type Result =
  | "codes"
  | "scales"
  | "values"
  | "codes with double quantization"
  | "codes of scales"
  | "offset of scales"
  | "scales of scales"
  | "values with double quantization";

/** What `selfCheck` found. */
export interface SelfCheckResult {
  readonly elements: number;
  /** What is wrong, as words; undefined when every byte is right. */
  readonly wrong: string | undefined;
  /** From the first launch to the last byte read. */
  readonly milliseconds: number;
}

/** Runs the check on a backend. @throws what the backend throws */
export async function selfCheck(backend: Backend, elements = SELF_CHECK_ELEMENTS): Promise<SelfCheckResult> {
  const x = sample(elements);
  const started = performance.now();
  const actual = await compute(backend, x);
  const milliseconds = performance.now() - started;
  const { codes, packed, absmax } = nf4(x);
  const scales = nested(absmax);
  const expected: Record<Result, ArrayBufferView> = {
    codes: packed,
    scales: absmax,
    values: decode(codes, absmax),
    "codes with double quantization": packed,
    "codes of scales": scales.codes,
    "offset of scales": Float32Array.of(scales.offset),
    "scales of scales": scales.absmax,
    "values with double quantization": decode(codes, scales.decoded),
  };
  const differences = Object.entries(expected).map(([what, bytes]) =>
    differing(what, actual[what as Result], bytesOf(bytes)),
  );
  return { elements, wrong: differences.find((words) => words !== undefined), milliseconds };
}

async function compute(backend: Backend, x: Float32Array): Promise<Record<Result, Uint8Array>> {
  const tensors = tidy((): Record<Result, Tensor> => {
    const input = Tensor.allocate(backend, "f32", [x.length]).copyFrom(x);
    const options = { quantType: "nf4", blocksize: BLOCKSIZE } as const;
    const [packed, state] = quantize4bit(input, options);
    const [packed2, state2] = quantize4bit(input, { ...options, compressStatistics: true });
    return {
      codes: packed,
      scales: state.absmax,
      values: dequantize4bit(packed, state),
      "codes with double quantization": packed2,
      "codes of scales": state2.absmax,
      "offset of scales": state2.offset!,
      "scales of scales": state2.state2!.absmax,
      "values with double quantization": dequantize4bit(packed2, state2),
    };
  });
  try {
    const reads = Object.entries(tensors).map(async ([what, tensor]) => [what, await tensor.bytes()] as const);
    return Object.fromEntries(await Promise.all(reads)) as Record<Result, Uint8Array>;
  } finally {
    for (const tensor of Object.values(tensors)) tensor.dispose();
  }
}

function differing(what: string, actual: Uint8Array, expected: Uint8Array): string | undefined {
  const at = expected.findIndex((byte, i) => byte !== actual[i]);
  if (at < 0 && actual.length === expected.length) return undefined;
  return `${what} differ from plain JavaScript, first at byte ${at < 0 ? expected.length : at}`;
}

/**
 * The mantissas whose reciprocal one Newton step from a neighbour of the right number does not reach: the kernels for a GPU rely
 * on its approximation being right there.
 */
const HARD_MANTISSAS = [
  0x069913, 0x07cc45, 0x0efa43, 0x109909, 0x186799, 0x1beaaf, 0x20ddd1, 0x224cf7, 0x26449f, 0x2aaaac, 0x2b8be1,
  0x2d1367, 0x384a93, 0x423dc3, 0x50ac19, 0x50dd0d, 0x525d25, 0x543d43, 0x5c23dd, 0x5e86a9, 0x605475, 0x61368b,
  0x625473, 0x6c7ec7, 0x6e4bc5, 0x700ff1, 0x702a3b, 0x70ff0f, 0x7c3237, 0x7e01ff, 0x7ffffd, 0x7fffff,
];
const ONE_BITS = 0x3f800000;

/** Blocks with such a number as absmax, and else what lies within two float32 of a threshold: codes show the last bit of 1/absmax. */
export function hardBlocks(): Float32Array<ArrayBuffer> {
  const x = new Float32Array(HARD_MANTISSAS.length * BLOCKSIZE);
  const bits = new Int32Array(x.buffer);
  for (const [block, mantissa] of HARD_MANTISSAS.entries()) {
    const first = block * BLOCKSIZE;
    bits[first] = ONE_BITS | mantissa;
    for (let i = 1; i < BLOCKSIZE; i++) {
      x[first + i] = NF4_THRESHOLDS[i % NF4_THRESHOLDS.length]! * x[first]!;
      bits[first + i]! += Math.floor(i / NF4_THRESHOLDS.length) - 2;
    }
  }
  return x;
}

/** Normally distributed numbers from a fixed seed, with the hard blocks in front where they fit. */
function sample(n: number): Float32Array<ArrayBuffer> {
  const x = normals(n);
  const hard = hardBlocks();
  if (hard.length <= n) x.set(hard);
  return x;
}

function normals(n: number): Float32Array<ArrayBuffer> {
  let state = 1234;
  const uniform = (): number => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return (state + 0.5) / 2 ** 32;
  };
  return Float32Array.from({ length: n }, () => {
    const radius = Math.sqrt(-2 * Math.log(uniform()));
    return radius * Math.cos(2 * Math.PI * uniform());
  });
}

function absmaxOf(x: Float32Array, blocksize: number): Float32Array {
  const absmax = new Float32Array(Math.ceil(x.length / blocksize));
  for (let i = 0; i < x.length; i++) {
    const block = Math.floor(i / blocksize);
    absmax[block] = Math.max(absmax[block]!, Math.abs(x[i]!));
  }
  return absmax;
}

/** Every element over the largest of its block, by the reciprocal; NaN where that is 0, whose code is 0. */
function scaled(x: Float32Array, absmax: Float32Array, blocksize: number): Float32Array {
  return x.map((value, i) => value * fround(1 / absmax[Math.floor(i / blocksize)]!));
}

function nf4(x: Float32Array) {
  const absmax = absmaxOf(x, BLOCKSIZE);
  const codes = Uint8Array.from(
    scaled(x, absmax, BLOCKSIZE),
    (value) => NF4_THRESHOLDS.filter((threshold) => value > threshold).length,
  );
  const packed = new Uint8Array(Math.ceil(x.length / 2));
  const padding = NF4_VALUES.indexOf(0);
  for (let i = 0; i < packed.length; i++) packed[i] = (codes[2 * i]! << 4) | (codes[2 * i + 1] ?? padding);
  return { codes, packed, absmax };
}

function decode(codes: Uint8Array, absmax: Float32Array): Float32Array {
  return Float32Array.from(codes, (code, i) => NF4_VALUES[code]! * absmax[Math.floor(i / BLOCKSIZE)]!);
}

/** Scales as 8-bit codes of their distance from the mean. */
function nested(scales: Float32Array) {
  const offset = mean(scales);
  const x = scales.map((value) => value - offset);
  const code = createDynamicMap();
  const absmax = absmaxOf(x, NESTED_BLOCKSIZE);
  const codes = Uint8Array.from(scaled(x, absmax, NESTED_BLOCKSIZE), (value) => nearest(code, value));
  const decoded = Float32Array.from(codes, (index, i) =>
    fround(fround(code[index]! * absmax[Math.floor(i / NESTED_BLOCKSIZE)]!) + offset),
  );
  return { codes, offset, absmax, decoded };
}

/** Index of the nearest of ascending values; of two that are equally near, the even one. */
function nearest(code: Float32Array, value: number): number {
  const above = code.findIndex((c) => c >= value);
  if (above === 0 || Number.isNaN(value)) return 0;
  if (above < 0) return code.length - 1;
  const middle = fround(fround(code[above - 1]! + code[above]!) * 0.5);
  return value > middle || (value === middle && above % 2 === 0) ? above : above - 1;
}

/** The summation tree of docs/architecture.md. */
function mean(x: Float32Array): number {
  let level = Array.from(x);
  do {
    const sums: number[] = [];
    for (let begin = 0; begin < level.length; begin += SUM_CHUNK) {
      const lanes = new Array<number>(SUM_LANES).fill(0);
      for (const [i, value] of level.slice(begin, begin + SUM_CHUNK).entries()) lanes[i % SUM_LANES]! += value;
      for (let half = SUM_LANES / 2; half >= 1; half /= 2) {
        for (let i = 0; i < half; i++) lanes[i]! += lanes[i + half]!;
      }
      sums.push(lanes[0]!);
    }
    level = sums;
  } while (level.length > 1);
  return fround(level[0]! / x.length);
}
