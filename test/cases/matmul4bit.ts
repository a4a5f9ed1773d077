import type { DeviceName } from "#halfbyte/core/backend.js";
import { DTYPE_BYTES, type DType, type FloatDType } from "#halfbyte/core/dtype.js";
import { type ProductMode, type ProductPath, productPath } from "#halfbyte/core/product-paths.js";
import { Tensor } from "#halfbyte/core/tensor.js";
import {
  checkWeight,
  gemv4bit,
  matmul4bit,
  matmul4bitBackward,
  multiplyDecoded,
  multiplySplit,
} from "#halfbyte/ops/matmul4bit.js";
import { Codebook } from "#halfbyte/quant/codebook.js";
import { createDynamicMap } from "#halfbyte/quant/codebooks.js";
import { QuantState } from "#halfbyte/quant/state.js";
import { BLOCKSIZES, NESTED_BLOCKSIZE } from "#halfbyte/quant/types.js";
import { fastBound, fourBitBound, product, type Terms } from "../helpers/bounds.js";
import * as scalar from "../helpers/scalar.js";
import { type Case, caseId, FLOATS, framedParts, framedPartsHost, type Host, oddScales } from "./case.js";
import { TABLES } from "./fourbit.js";
import { bytes, type Fill, matrix, scaleName, scales, vector } from "./product-inputs.js";

/** What a case of the family is made of. */
interface Spec {
  readonly op: "matmul4bit" | "matmul4bitBackward" | "gemv4bit";
  readonly type: "nf4" | "fp4";
  readonly dtype: FloatDType;
  readonly m: number;
  readonly n: number;
  readonly k: number;
  readonly blocksize?: number;
  readonly nested?: boolean;
  readonly bias?: boolean;
  readonly mode?: ProductMode;
  readonly fill?: Fill;
  /** Magnitude of the activations, of the scales. */
  readonly scale?: readonly [number, number];
  /** The first scales are zeros. */
  readonly zeroScales?: boolean;
  /**
   * Scales that are no scales, best with one to each row of the weight. Infinity times the sum of a block is another thing than
   * the sum of infinities: what is not finite may be anything that is not, and everything else is as it should be.
   */
  readonly oddScales?: boolean;
  /** Elements before the operands; the result lies in the middle of its allocation. */
  readonly view?: number;
  /** Dimensions of A before its last. */
  readonly lead?: readonly number[];
  /** dtype of the weight that was quantized, where it is not that of A. */
  readonly weight?: FloatDType;
  /** dtype of the tensor that carries the codes. */
  readonly storage?: DType;
  /** On path `dense` whatever the device and the rows, with slices of the weight of about so many bytes. */
  readonly slice?: number;
  /** On path `tiles` on cuda, whatever the weight's size. */
  readonly tiles?: boolean;
  readonly large?: boolean;
}

function idOf(s: Spec): string {
  const words = [
    s.nested && "nested",
    s.bias && "bias",
    s.mode === "fast" && "fast",
    s.fill,
    s.scale && `scale=${s.scale.map(scaleName).join()}`,
    s.zeroScales && "zero-scales",
    s.oddScales && "odd-scales",
    s.view !== undefined && `view=${s.view}`,
    s.lead && `lead=${s.lead.join("x")}`,
    s.weight && `weight=${s.weight}`,
    s.storage && `storage=${s.storage}`,
    s.slice !== undefined && `slice=${s.slice}`,
    s.tiles && "tiles",
  ].filter((word) => typeof word === "string");
  return caseId(s.op, s.type, s.dtype, `m=${s.m}`, `n=${s.n}`, `k=${s.k}`, `bs=${s.blocksize ?? 64}`, ...words);
}

/** The mean of the scales of a nested state. */
const OFFSET = 0.021;

function inputsOf(s: Spec): Record<string, Host> {
  const { type, dtype, m, n, k, blocksize = 64, scale = [1, 0.02] } = s;
  const id = idOf(s);
  const blocks = Math.ceil((n * k) / blocksize);
  const columns = s.op === "matmul4bitBackward" ? n : k;
  const A = matrix(dtype, [m, columns], `${id} A`, s.fill, scale[0]);
  const packed = bytes(Math.ceil((n * k) / 2), `${id} packed`);
  // The last nibble of an odd number is a pad: one that would be seen.
  if ((n * k) % 2) packed.values[packed.values.length - 1]! |= type === "nf4" ? 15 : 3;
  const inputs: Record<string, Host> = {
    A: { ...A, shape: [...(s.lead ?? [m]), columns] },
    packed: { ...packed, shape: [packed.values.length, 1] },
  };
  if (s.storage) {
    const size = DTYPE_BYTES[s.storage];
    const padded = new Uint8Array(Math.ceil(packed.values.length / size) * size);
    padded.set(packed.values);
    inputs.packed = { dtype: s.storage, shape: [padded.length / size, 1], values: packed.values, bytes: padded };
  }
  if (s.nested) {
    inputs.absmax = bytes(blocks, `${id} absmax`);
    inputs.absmax2 = scales(Math.ceil(blocks / NESTED_BLOCKSIZE), `${id} absmax2`, 0.01);
    inputs.offset = { dtype: "f32", shape: [], values: [Math.fround(OFFSET)] };
  } else {
    const absmax = scales(blocks, `${id} absmax`, scale[1]);
    if (s.zeroScales) absmax.values.fill(0, 0, Math.ceil(blocks / 3));
    // Sums stay in float32's range.
    if (s.oddScales) absmax.values.set(oddScales(blocks).map((v) => (v > 1e30 && v < 1e39 ? 1e30 : v)));
    inputs.absmax = absmax;
  }
  if (s.bias) inputs.bias = vector(dtype, n, `${id} bias`, 0.5);
  return inputs;
}

/** The weight as float64 numbers, each rounded to the dtype. */
function weightOf(s: Spec, inputs: Record<string, Host>): Float64Array {
  const { type, dtype, n, k, blocksize = 64 } = s;
  const absmax = s.nested
    ? scalar.dequantizeBlockwise(
        inputs.absmax!.values as Uint8Array,
        inputs.absmax2!.values as Float32Array,
        createDynamicMap(),
        NESTED_BLOCKSIZE,
        "f32",
        inputs.offset!.values[0],
      )
    : inputs.absmax!.values;
  return scalar.weights4bit(inputs.packed!.values as Uint8Array, absmax, n * k, TABLES[type].values, blocksize, dtype);
}

function stateOf(
  { n, k, dtype, weight = dtype, blocksize = 64, type }: Spec,
  inputs: Record<string, Tensor>,
): QuantState {
  const { absmax, absmax2, offset } = inputs as Record<string, Tensor<"f32">>;
  const fields = { absmax: absmax!, shape: [n, k], dtype: weight, blocksize, quantType: type };
  if (!absmax2) return new QuantState(fields);
  const code = Codebook.dynamic();
  const inner = { absmax: absmax2, shape: absmax!.shape, dtype: "f32", blocksize: NESTED_BLOCKSIZE, code } as const;
  return new QuantState({ ...fields, offset, state2: new QuantState(inner) });
}

/** The path that a product takes. */
export function pathOf(s: Spec, device: DeviceName): ProductPath {
  const { m, n, k, dtype, blocksize = 64, view = 0, mode = "exact" } = s;
  // The elements before a view are those of packed bytes, too.
  const aligned = view % 16 === 0;
  return productPath(device, { m, n, k, dtype, blocksize, aligned }, mode);
}

function expectedOf(s: Spec, inputs: Record<string, Host>, device: DeviceName): Pick<Host, "values" | "bound"> {
  const { dtype, m, n, k, mode = "exact" } = s;
  const weight = { values: weightOf(s, inputs) };
  const activations = inputs.A!.values;
  const path = s.tiles && device === "cuda" ? "tiles" : s.slice === undefined ? pathOf(s, device) : "dense";
  const finite = (t: Terms): number => fourBitBound(path, dtype, t);
  // What is not finite has no int8 codes either: such a row becomes NaN.
  const lax = s.oddScales || (mode === "fast" && device === "cpu");
  const bound = (t: Terms) => (lax && !Number.isFinite(t.value) ? Number.POSITIVE_INFINITY : finite(t));
  if (s.op === "matmul4bitBackward") {
    const A = { values: activations, rowStep: n, columnStep: 1 };
    return product([m, k, n], A, { ...weight, rowStep: k, columnStep: 1 }, undefined, bound);
  }
  const A = { values: activations, rowStep: k, columnStep: 1 };
  const result = product([m, n, k], A, { ...weight, rowStep: 1, columnStep: k }, inputs.bias?.values, bound);
  if (mode === "fast" && device === "cpu") {
    const more = fastBound([m, n, k], activations, weight.values);
    more.forEach((by, i) => {
      if (Number.isFinite(by)) result.bound[i]! += by;
    });
  }
  return result;
}

function productCase(s: Spec): Case {
  const { op, dtype, m, n, k, view } = s;
  const columns = op === "matmul4bitBackward" ? k : n;
  const shape = [...(s.lead ?? [m]), columns];
  // The result is as far from an alignment as its operands, by another number of elements.
  const behind = ((view ?? 0) * 5) % 16;
  return {
    id: idOf(s),
    primitive: op,
    dtype,
    bounded: true,
    ...(s.large && { large: true }),
    ...(view !== undefined && { lead: { A: view, packed: view, absmax: view % 3, bias: view + 1 } }),
    inputs: () => inputsOf(s),
    run: (inputs, backend): Record<string, Tensor> => {
      const { A, packed, bias } = inputs as { A: Tensor; packed: Tensor; bias?: Tensor };
      const state = stateOf(s, inputs);
      const frame = view === undefined ? undefined : framedParts(backend, dtype, shape, behind);
      const out = frame?.view;
      if (s.slice !== undefined) {
        const y = Tensor.allocate(backend, dtype, shape);
        const a = A as Tensor<FloatDType>;
        multiplyDecoded(a, checkWeight(op, packed, state, a), bias, y, m, s.slice);
        return { y };
      }
      if (s.tiles && backend.device === "cuda") {
        const y = Tensor.allocate(backend, dtype, shape);
        const a = A as Tensor<FloatDType>;
        multiplySplit(a, checkWeight(op, packed, state, a), bias, y, m);
        return { y };
      }
      const y =
        op === "matmul4bit"
          ? matmul4bit(A, packed, state, { out, bias, mode: s.mode })
          : op === "gemv4bit"
            ? gemv4bit(A, packed, state, { out })
            : matmul4bitBackward(A, packed, state, { out });
      return frame ? { y, before: frame.before, behind: frame.behind } : { y };
    },
    expected: (inputs, device): Record<string, Host> => ({
      y: { dtype, shape, ...expectedOf(s, inputs, device) },
      ...(view !== undefined && framedPartsHost(dtype, behind)),
    }),
  };
}

const ROWS = [1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 64, 65, 512];
const DEPTHS = [1, 2, 31, 32, 33, 63, 64, 65, 95, 96, 127, 128, 129, 160, 255, 576, 1000, 4096, 4099];
const COLUMNS = [1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 129, 200];
/** One or two for each path. */
const SOME_ROWS = [1, 3, 8, 17, 65];
/** Of activations and scales: results that overflow f16 or are denormal in it, and the same for the wide exponents. */
const SCALES = {
  f32: [
    [2 ** -90, 2 ** 40],
    [2 ** 50, 2 ** 60],
    [2 ** -70, 2 ** -60],
  ],
  bf16: [
    [2 ** -90, 2 ** 40],
    [2 ** 50, 2 ** 60],
    [2 ** -70, 2 ** -60],
  ],
  f16: [
    [2 ** -10, 2 ** -6],
    [2 ** 10, 2 ** 6],
    [0.5, 2 ** -13],
  ],
} as const;

export function* matmul4bitCases(): Generator<Case> {
  const types = ["nf4", "fp4"] as const;
  // Alternating where a sweep has enough of both.
  let turn = 0;
  const next = () => types[turn++ % 2]!;
  const op = "matmul4bit" as const;
  for (const dtype of FLOATS) {
    for (const m of ROWS) {
      for (const type of types) {
        yield productCase({ op, type, dtype, m, n: 17, k: 127 });
        yield productCase({ op, type, dtype, m, n: 17, k: 128 });
        if (m === 512 && type === "fp4") continue;
        yield productCase({ op, type, dtype, m, n: 100, k: 576, bias: type === "nf4", large: m === 512 });
      }
      yield productCase({ op, type: next(), dtype, m, n: 64, k: 256, fill: "onehot" });
      if (m < 3 || m > 64) yield productCase({ op, type: next(), dtype, m, n: 33, k: 77, fill: "onehot" });
    }
    for (const k of DEPTHS) {
      for (const m of SOME_ROWS) yield productCase({ op, type: next(), dtype, m, n: 7, k, bias: turn % 3 === 0 });
    }
    for (const n of COLUMNS) {
      for (const m of SOME_ROWS) {
        yield productCase({ op, type: next(), dtype, m, n, k: 192, bias: turn % 3 === 0 });
        if (m === 1 || m === 17) yield productCase({ op, type: next(), dtype, m, n, k: 45, bias: turn % 3 === 1 });
      }
    }
    for (const blocksize of BLOCKSIZES) {
      for (const m of [1, 8, 65]) {
        yield productCase({ op, type: next(), dtype, m, n: 10, k: 1000, blocksize });
        // Blocks of several rows of the weight, and of parts of a row.
        yield productCase({ op, type: next(), dtype, m, n: 65, k: 63, blocksize });
      }
      for (const m of [1, 8, 20]) {
        yield productCase({ op, type: next(), dtype, m, n: 37, k: 576, blocksize });
        yield productCase({ op, type: next(), dtype, m, n: 66, k: 96, blocksize });
        if (blocksize >= 1024) yield productCase({ op, type: next(), dtype, m, n: 3, k: 8192, blocksize });
      }
    }
    for (const m of [1, 2, 8, 9, 64, 65]) {
      for (const type of types) {
        for (const bias of [false, true]) {
          yield productCase({ op, type, dtype, m, n: 129, k: 576, nested: true, bias });
        }
        yield productCase({ op, type, dtype, m, n: 31, k: 1111, nested: true, blocksize: 32 });
        yield productCase({ op, type, dtype, m, n: 5, k: 64, nested: true, blocksize: 256 });
      }
    }
    for (const view of [1, 2, 3, 7, 8, 16]) {
      for (const m of [1, 4, 16, 65]) {
        yield productCase({ op, type: next(), dtype, m, n: 19, k: 256, view, bias: m > 1 });
        yield productCase({ op, type: next(), dtype, m, n: 19, k: 131, view, bias: m > 1 });
        if (view % 8 < 3) yield productCase({ op, type: next(), dtype, m, n: 40, k: 512, view, nested: true });
      }
    }
    for (const m of [0, 1, 5, 70]) {
      for (const [n, k] of m === 0
        ? ([[5, 64]] as const)
        : ([
            [0, 64],
            [5, 0],
            [0, 0],
          ] as const)) {
        yield productCase({ op, type: next(), dtype, m, n, k, bias: false });
        yield productCase({ op, type: next(), dtype, m, n, k, bias: true });
      }
    }
    for (const m of SOME_ROWS) {
      for (const fill of ["nonfinite", "zeros"] as const) {
        yield productCase({ op, type: next(), dtype, m, n: 12, k: 256, fill });
        yield productCase({ op, type: next(), dtype, m, n: 12, k: 131, fill, bias: true });
      }
      for (const scale of SCALES[dtype]) {
        yield productCase({ op, type: next(), dtype, m, n: 12, k: 200, scale });
        yield productCase({ op, type: next(), dtype, m, n: 12, k: 64, scale });
      }
      yield productCase({ op, type: next(), dtype, m, n: 12, k: 192, zeroScales: true });
      yield productCase({ op, type: next(), dtype, m, n: 20, k: 64, oddScales: true });
    }
    for (const lead of [[2, 3], [2, 1, 5], []]) {
      yield productCase({ op, type: next(), dtype, m: lead.reduce((a, b) => a * b, 1), n: 21, k: 96, lead });
    }
    for (const weight of FLOATS) {
      if (weight !== dtype) yield productCase({ op, type: next(), dtype, weight, m: 2, n: 21, k: 96 });
    }
    for (const storage of ["i8", "bf16", "f32"] as const) {
      yield productCase({ op, type: next(), dtype, storage, m: 2, n: 3, k: 33 });
    }
    for (const m of [1, 70]) {
      // Several slices with a shorter last one, and as short as they get.
      for (const slice of [256 * 129 * 2, 1]) {
        yield productCase({ op, type: next(), dtype, m, n: 301, k: 129, blocksize: 32, bias: true, slice });
        yield productCase({ op, type: next(), dtype, m, n: 301, k: 129, nested: true, slice });
      }
    }
    yield productCase({ op, type: "nf4", dtype, m: 3, n: 1030, k: 1100, bias: true, large: true });
    for (const m of [9, 33]) yield productCase({ op, type: next(), dtype, m, n: 40, k: 4096, bias: true, large: true });
    yield productCase({ op, type: "nf4", dtype, m: 20, n: 400, k: 2112, nested: true, large: true });
    yield productCase({ op, type: "fp4", dtype, m: 66, n: 700, k: 600, nested: true, large: true });
  }
  yield* fastCases();
  yield* vectorCases();
  yield* tensorCoreCases();
  yield* backwardCases();
}

/** Activations in int8: a path of the cpu; cuda computes them as it does `exact`. */
function* fastCases(): Generator<Case> {
  const [op, mode] = ["matmul4bit", "fast"] as const;
  let turn = 0;
  const next = () => (["nf4", "fp4"] as const)[turn++ % 2]!;
  for (const dtype of FLOATS) {
    for (const m of [1, 2, 3, 4, 5, 8, 17, 64]) {
      yield productCase({ op, mode, type: next(), dtype, m, n: 17, k: 127 });
      yield productCase({ op, mode, type: next(), dtype, m, n: 70, k: 576, bias: true });
      yield productCase({ op, mode, type: next(), dtype, m, n: 9, k: 192, fill: "onehot" });
    }
    for (const k of DEPTHS) for (const m of [1, 5]) yield productCase({ op, mode, type: next(), dtype, m, n: 7, k });
    for (const n of COLUMNS) for (const m of [1, 6]) yield productCase({ op, mode, type: next(), dtype, m, n, k: 224 });
    for (const blocksize of BLOCKSIZES) {
      yield productCase({ op, mode, type: next(), dtype, m: 1, n: 10, k: 1000, blocksize });
      yield productCase({ op, mode, type: next(), dtype, m: 9, n: 65, k: 63, blocksize });
      yield productCase({ op, mode, type: next(), dtype, m: 2, n: 3, k: 4096, blocksize });
    }
    for (const view of [1, 2, 3, 7, 8]) {
      yield productCase({ op, mode, type: next(), dtype, m: 1, n: 19, k: 131, view });
      yield productCase({ op, mode, type: next(), dtype, m: 7, n: 40, k: 512, view, nested: true, bias: true });
    }
    for (const m of [1, 6]) {
      yield productCase({ op, mode, type: next(), dtype, m, n: 5, k: 0, bias: true });
      yield productCase({ op, mode, type: next(), dtype, m, n: 12, k: 256, fill: "zeros" });
      yield productCase({ op, mode, type: next(), dtype, m, n: 12, k: 256, fill: "nonfinite" });
      yield productCase({ op, mode, type: next(), dtype, m, n: 12, k: 131, fill: "nonfinite", bias: true });
      yield productCase({ op, mode, type: next(), dtype, m, n: 20, k: 64, oddScales: true });
      yield productCase({ op, mode, type: next(), dtype, m, n: 129, k: 576, nested: true });
      for (const scale of SCALES[dtype]) {
        // Integer sums are 2^15 times the products and more: so much sooner they leave float32.
        const less = scale[0] > 2 ** 40 ? ([scale[0] / 2 ** 20, scale[1]] as const) : scale;
        yield productCase({ op, mode, type: next(), dtype, m, n: 12, k: 200, scale: less });
      }
    }
    yield productCase({ op, mode, type: "nf4", dtype, m: 20, n: 400, k: 600, bias: true, large: true });
  }
}

/** Weights that the tensor cores' paths take: rows round their fragments and blocks, columns round their chunks and splits. */
function* tensorCoreCases(): Generator<Case> {
  const op = "matmul4bit" as const;
  let turn = 0;
  const next = () => (["nf4", "fp4"] as const)[turn++ % 2]!;
  for (const dtype of ["f16", "bf16"] as const) {
    for (const k of [32, 64, 96, 128, 160, 192, 576, 1056, 2048, 2112, 4096]) {
      for (const m of [1, 2, 4, 5, 8]) {
        const n = [32, 47, 64, 65, 130][turn % 5]!;
        yield productCase({ op, type: next(), dtype, m, n, k, bias: turn % 3 === 0 });
      }
      for (const m of [9, 16, 17, 32, 33, 64]) {
        const n = [32, 47, 129, 257, 300][turn % 5]!;
        yield productCase({ op, type: next(), dtype, m, n, k, bias: turn % 3 === 0, tiles: true });
      }
    }
    for (const blocksize of BLOCKSIZES) {
      for (const m of [2, 4, 8]) {
        yield productCase({ op, type: next(), dtype, m, n: 70, k: 576, blocksize, nested: m === 4 });
        yield productCase({ op, type: next(), dtype, m, n: 35, k: 2176, blocksize });
        yield productCase({ op, type: next(), dtype, m, n: 33, k: 2144, blocksize });
      }
      for (const m of [12, 24, 40]) {
        yield productCase({ op, type: next(), dtype, m, n: 70, k: 576, blocksize, tiles: true });
        yield productCase({ op, type: next(), dtype, m, n: 35, k: 2144, blocksize, tiles: true, nested: m === 24 });
      }
    }
    for (const m of [3, 8, 20, 60]) {
      const tiles = m > 8;
      yield productCase({ op, type: next(), dtype, m, n: 72, k: 256, fill: "onehot", tiles });
      yield productCase({ op, type: next(), dtype, m, n: 40, k: 256, fill: "nonfinite", tiles });
      yield productCase({ op, type: next(), dtype, m, n: 40, k: 96, zeroScales: true, tiles });
      yield productCase({ op, type: next(), dtype, m, n: 40, k: 64, oddScales: true, tiles });
      for (const scale of SCALES[dtype]) yield productCase({ op, type: next(), dtype, m, n: 40, k: 192, scale, tiles });
    }
    yield productCase({ op, type: "nf4", dtype, m: 4, n: 1000, k: 576, large: true });
    // More scales than shared memory keeps at a time.
    for (const m of [1, 4]) {
      yield productCase({ op, type: next(), dtype, m, n: 33, k: 30784, large: true });
      yield productCase({ op, type: next(), dtype, m, n: 33, k: 14432, blocksize: 32, large: true });
    }
    yield productCase({ op, type: "nf4", dtype, m: 40, n: 600, k: 4096, bias: true, tiles: true, large: true });
  }
}

function* vectorCases(): Generator<Case> {
  const op = "gemv4bit" as const;
  for (const dtype of FLOATS) {
    for (const type of ["nf4", "fp4"] as const) {
      yield productCase({ op, type, dtype, m: 1, n: 100, k: 576 });
      yield productCase({ op, type, dtype, m: 1, n: 100, k: 576, nested: true, lead: [] });
      yield productCase({ op, type, dtype, m: 1, n: 19, k: 131, view: 3, lead: [1, 1] });
      yield productCase({ op, type, dtype, m: 1, n: 0, k: 64 });
    }
  }
}

function* backwardCases(): Generator<Case> {
  const op = "matmul4bitBackward" as const;
  let turn = 0;
  const next = () => (["nf4", "fp4"] as const)[turn++ % 2]!;
  for (const dtype of FLOATS) {
    for (const m of [1, 2, 5, 8, 16, 64, 65]) {
      yield productCase({ op, type: next(), dtype, m, n: 17, k: 127 });
      yield productCase({ op, type: next(), dtype, m, n: 100, k: 576 });
      yield productCase({ op, type: next(), dtype, m, n: 96, k: 64, fill: "onehot" });
    }
    for (const k of DEPTHS) for (const m of [1, 6]) yield productCase({ op, type: next(), dtype, m, n: 9, k });
    for (const n of COLUMNS) for (const m of [1, 6]) yield productCase({ op, type: next(), dtype, m, n, k: 80 });
    for (const blocksize of BLOCKSIZES) {
      yield productCase({ op, type: next(), dtype, m: 3, n: 10, k: 1000, blocksize });
      yield productCase({ op, type: next(), dtype, m: 3, n: 65, k: 63, blocksize });
    }
    for (const view of [1, 3, 8]) {
      yield productCase({ op, type: next(), dtype, m: 1, n: 19, k: 131, view });
      yield productCase({ op, type: next(), dtype, m: 7, n: 40, k: 512, view, nested: true });
    }
    yield productCase({ op, type: next(), dtype, m: 0, n: 5, k: 64 });
    yield productCase({ op, type: next(), dtype, m: 3, n: 0, k: 64 });
    yield productCase({ op, type: next(), dtype, m: 3, n: 5, k: 0 });
    yield productCase({ op, type: next(), dtype, m: 5, n: 129, k: 576, nested: true, lead: [5, 1] });
    yield productCase({ op, type: next(), dtype, m: 5, n: 131, k: 40, fill: "nonfinite" });
    for (const scale of SCALES[dtype]) yield productCase({ op, type: next(), dtype, m: 5, n: 12, k: 200, scale });
    yield productCase({ op, type: "nf4", dtype, m: 20, n: 700, k: 600, large: true });
  }
}
