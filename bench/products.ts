/**
 * The products on a GPU: each by the GPU's own events, back to back, as cuda.ts measures kernels, with the host's part apart. The
 * operands of a product are the same at every launch, as in the tables that others print: what fits in the GPU's cache stays
 * there. bitsandbytes and dense products of the same shapes come from bench/peer_cuda.py, in the same run. A part of each
 * result is held against float64 before it is timed.
 */
import type { Backend } from "#halfbyte/core/backend.js";
import { productPath } from "#halfbyte/core/product-paths.js";
import { tidy } from "#halfbyte/core/scope.js";
import { Tensor } from "#halfbyte/core/tensor.js";
import {
  dequantize4bit,
  int8VectorwiseDequant,
  int8VectorwiseQuant,
  matmul4bit,
  matmul8bit,
  QuantState,
  quantize4bit,
} from "#halfbyte/index.js";
import { unnest } from "#halfbyte/ops/blockwise.js";
import { copyBench, lowerQuartile, operand, PERIOD } from "./harness.js";

/** A product of m rows of activations with a weight of n x k. */
export interface Product {
  readonly name: string;
  /** nf4: bf16, block size 64, plain or nested scales. int8: LLM.int8() on f16. */
  readonly kind: "nf4" | "nf4 double" | "int8";
  readonly m: number;
  readonly n: number;
  readonly k: number;
  /** int8: what an outlier is; 0 for none. */
  readonly threshold?: number;
}

interface Times {
  /** The GPU's time of one product, and that when they are launched as fast as the host can. */
  readonly microseconds: number;
  readonly launchedMicroseconds: number;
  /** Until the call returns. */
  readonly hostMicroseconds: number;
}

export interface ProductResult extends Product, Times {
  readonly path: string;
  /** Of the weight as it is stored, the activations and the result. */
  readonly bytes: number;
  readonly wrong?: string;
}

export interface ProductTable {
  /** 10^9 bytes per second, read and written, of a large copy before or after. */
  readonly copyGbytes: number;
  readonly results: readonly ProductResult[];
}

type Shape = readonly [m: number, n: number, k: number];
/** Of large models. */
const LARGE: readonly Shape[] = [
  [1, 8192, 28672],
  [1, 28672, 8192],
  [1, 4096, 4096],
  ...[4, 16, 64, 512, 2048].map((m) => [m, 8192, 28672] as const),
];
/** The weights of SmolLM2-135M, and the rows of activations they are measured with. */
const SMALL = [
  [576, 576],
  [192, 576],
  [1536, 576],
  [576, 1536],
  [49152, 576],
] as const;
const SMALL_ROWS = [1, 37];
const INT8: Shape = [2048, 4096, 4096];
const LARGE_SIDE = 4096;
const THRESHOLD = 6;

/** @param divisor makes dimensions of large models so much smaller: for rehearsals */
export function products(divisor = 1): Product[] {
  const smaller = (size: number): number => (size < LARGE_SIDE ? size : size / divisor);
  const nf4 = ([m, rows, columns]: Shape, kind: "nf4" | "nf4 double" = "nf4"): Product => {
    const [n, k] = [smaller(rows), smaller(columns)];
    return { name: `${kind} ${n}x${k}, M=${m}`, kind, m, n, k };
  };
  const int8 = (threshold: number): Product => {
    const [m, n, k] = [INT8[0], smaller(INT8[1]), smaller(INT8[2])];
    return { name: `LLM.int8() ${n}x${k}, M=${m}, threshold ${threshold}`, kind: "int8", m, n, k, threshold };
  };
  return [
    ...LARGE.map((shape) => nf4(shape)),
    nf4(LARGE[0]!, "nf4 double"),
    int8(0),
    int8(THRESHOLD),
    ...SMALL_ROWS.flatMap((m) => SMALL.map(([n, k]) => nf4([m, n, k]))),
  ];
}

/** What times them: a GPU, or what stands in for one. */
export interface Timed {
  readonly backend: Backend;
  /** Milliseconds that the device takes for what `body` launches. */
  elapsed(body: () => void): number;
}

const BLOCKSIZE = 64;
/** Elements of the copy that memory is measured by, and that keeps the GPU busy while launches are enqueued. */
const COPY_ELEMENTS = 128 * 1024 * 1024;
/** Copies in front of what is timed: some 1.5 ms. */
const COPIES = 6;
const WARM_UP = 5;
/** GPU time of a round. */
const ROUND_MS = 4;
const MOST_LAUNCHES = 60;

export function measureProducts(
  timed: Timed,
  wanted: readonly Product[],
  rounds: number,
  copyElements = COPY_ELEMENTS,
): ProductTable {
  const { backend } = timed;
  return tidy(() => {
    const copy = copyBench(copyElements);
    const { run: copyOnce } = copy.setup(backend, { elements: copyElements, begin: 0 });
    const keepBusy = (): void => {
      for (let i = 0; i < COPIES; i++) copyOnce();
    };
    const before = time(timed, copyOnce, keepBusy, rounds).microseconds;
    const results = wanted.map((product) =>
      tidy((): ProductResult => {
        const { bytes, run, wrong } = product.kind === "int8" ? int8(backend, product) : fourBit(backend, product);
        const shape = { ...product, dtype: "bf16", blocksize: BLOCKSIZE, aligned: true } as const;
        const path = product.kind === "int8" ? "int8" : productPath(backend.device, shape, "exact");
        const times = time(timed, run, keepBusy, rounds);
        return { ...product, path, bytes, ...times, ...(wrong !== undefined && { wrong }) };
      }),
    );
    const copyTime = Math.min(before, time(timed, copyOnce, keepBusy, rounds).microseconds);
    return { copyGbytes: copy.bytes / copyTime / 1e3, results };
  });
}

function time({ elapsed }: Timed, run: () => void, keepBusy: () => void, rounds: number): Times {
  const several = (count: number) => (): void => {
    for (let i = 0; i < count; i++) run();
  };
  several(WARM_UP)();
  const once = elapsed(several(WARM_UP)) / WARM_UP;
  const count = Math.max(3, Math.min(MOST_LAUNCHES, Math.ceil(ROUND_MS / once)));
  const [alone, launched, host]: [number[], number[], number[]] = [[], [], []];
  const each = (milliseconds: number): number => (milliseconds * 1000) / count;
  for (let round = 0; round < rounds; round++) {
    keepBusy();
    const onHost = (): void => {
      const start = performance.now();
      several(count)();
      host.push(each(performance.now() - start));
    };
    alone.push(each(elapsed(onHost)));
    launched.push(each(elapsed(several(count))));
  }
  return {
    microseconds: lowerQuartile(alone),
    launchedMicroseconds: lowerQuartile(launched),
    hostMicroseconds: lowerQuartile(host),
  };
}

interface Prepared {
  readonly bytes: number;
  readonly wrong: string | undefined;
  run(): void;
}

type HalfDType = "bf16" | "f16";

function weightOf(backend: Backend, dtype: HalfDType, n: number, k: number): Tensor {
  return operand(backend, dtype, { elements: n * k, begin: 0 }).reshape([n, k]);
}

/** Other values than the weight's first rows, which would make single large results, unless there are too many of them. */
function activationsOf(backend: Backend, dtype: HalfDType, m: number, k: number): Tensor {
  const begin = m * k <= PERIOD / 2 ? PERIOD / 2 : 0;
  return operand(backend, dtype, { elements: m * k, begin }).reshape([m, k]);
}

function fourBit(backend: Backend, { kind, m, n, k }: Product): Prepared {
  const A = activationsOf(backend, "bf16", m, k);
  const [packed, state] = tidy(() =>
    quantize4bit(weightOf(backend, "bf16", n, k), { quantType: "nf4", compressStatistics: kind === "nf4 double" }),
  );
  const out = Tensor.allocate(backend, "bf16", [m, n]);
  const run = (): void => void matmul4bit(A, packed, state, { out });
  run();
  // Rows [begin, end) of the weight, decoded and rounded as a product decodes them.
  const decoded = (begin: number, end: number): Tensor => {
    const scales = state.nested ? unnest("bench", state) : state.absmax;
    const absmax = scales.slice((begin * k) / BLOCKSIZE, (end * k) / BLOCKSIZE);
    const part = new QuantState({ ...state, absmax, shape: [end - begin, k], state2: undefined, offset: undefined });
    return dequantize4bit(packed.slice((begin * k) / 2, (end * k) / 2), part);
  };
  const wrong = difference(out, 2 ** -8, (rows, columns) =>
    products64(floats(rows(A)), floats(decoded(...columns)), k),
  );
  const scales = state.tensors().reduce((sum, { byteLength }) => sum + byteLength, 0);
  return { bytes: packed.byteLength + scales + A.byteLength + out.byteLength, run, wrong };
}

/** One column in so many has outliers, if they are looked for. */
const OUTLIER_COLUMNS = 512;

function int8(backend: Backend, { m, n, k, threshold = 0 }: Product): Prepared {
  const A = tidy(() => {
    const values = floats(activationsOf(backend, "f16", m, k));
    // The common input has a standard deviation of 0.03: to 1, and some columns to 20.
    for (let i = 0; i < values.length; i++) values[i]! *= (i % k) % OUTLIER_COLUMNS === 7 ? 600 : 30;
    return Tensor.allocate(backend, "f16", [m, k]).copyFrom(values);
  });
  const [codes, scale] = tidy(() => int8VectorwiseQuant(weightOf(backend, "f16", n, k)).slice(0, 2) as Tensor[]);
  const out = Tensor.allocate(backend, "f16", [m, n]);
  const run = (): void => void matmul8bit(A, codes!, scale!, { threshold, out });
  run();
  const wrong = difference(out, 2 ** -11, (rows, [begin, end]) => {
    const [q, s, outliers] = int8VectorwiseQuant(A, { threshold });
    const [a, own, stats] = [floats(rows(A)), floats(rows(q)), floats(rows(s))];
    const kept = new Uint8Array(k).fill(1);
    for (const column of outliers?.columns.dataSync() ?? []) if (column >= 0) kept[column] = 0;
    const w = floats(codes!.slice(begin, end));
    const columns = floats(scale!.slice(begin, end));
    const whole = floats(int8VectorwiseDequant(codes!.slice(begin, end), scale!.slice(begin, end), { dtype: "f16" }));
    return Float64Array.from({ length: stats.length * columns.length }, (_, at) => {
      const [row, column] = [Math.floor(at / columns.length), at % columns.length];
      let [sum, apart] = [0, 0];
      for (let i = 0; i < k; i++) {
        if (kept[i]) sum += own[row * k + i]! * w[column * k + i]!;
        else apart += a[row * k + i]! * whole[column * k + i]!;
      }
      return (sum * stats[row]! * columns[column]!) / 127 ** 2 + apart;
    });
  });
  return { bytes: codes!.byteLength + scale!.byteLength + A.byteLength + out.byteLength, run, wrong };
}

const floats = (t: Tensor): Float32Array<ArrayBuffer> =>
  tidy(() => (t.dtype === "f32" ? t : t.to("f32"))).dataSync() as Float32Array<ArrayBuffer>;

/** All products of the rows of two matrices with k columns. */
function products64(a: Float32Array, b: Float32Array, k: number): Float64Array {
  const columns = b.length / k;
  return Float64Array.from({ length: (a.length / k) * columns }, (_, at) => {
    const [row, column] = [Math.floor(at / columns) * k, (at % columns) * k];
    let sum = 0;
    for (let i = 0; i < k; i++) sum += a[row + i]! * b[column + i]!;
    return sum;
  });
}

/** Rows and columns of a result that are checked, at both ends. */
const CHECKED_ROWS = 4;
const CHECKED_COLUMNS = 32;

/**
 * Holds the corners of a result against float64. Rounding the result alone makes an error of some 0.42 times the dtype's spacing
 * (`ulp`, relative); a wrong product makes one near 1.
 */
function difference(
  out: Tensor,
  ulp: number,
  reference: (rows: (t: Tensor) => Tensor, columns: [number, number]) => Float64Array,
): string | undefined {
  const [m, n] = out.shape as [number, number];
  const ends = (size: number, count: number): [number, number][] =>
    size <= count
      ? [[0, size]]
      : [
          [0, count],
          [size - count, size],
        ];
  for (const [top, bottom] of ends(m, CHECKED_ROWS)) {
    for (const [begin, end] of ends(n, CHECKED_COLUMNS)) {
      const wrong = tidy(() => {
        const expected = reference((t) => t.slice(top, bottom), [begin, end]);
        const got = floats(out.slice(top, bottom));
        let [off, norm] = [0, 0];
        for (const [i, value] of expected.entries()) {
          const [row, column] = [Math.floor(i / (end - begin)), begin + (i % (end - begin))];
          off += (got[row * n + column]! - value) ** 2;
          norm += value ** 2;
        }
        const error = Math.sqrt(off / norm);
        // Also true of NaN.
        return error <= ulp ? undefined : `rows ${top} to ${bottom}, columns ${begin} to ${end}: error ${error}`;
      });
      if (wrong !== undefined) return wrong;
    }
  }
  return undefined;
}
