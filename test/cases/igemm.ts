import type { FloatDType } from "#halfbyte/core/dtype.js";
import type { Tensor } from "#halfbyte/core/tensor.js";
import {
  batchedIgemm,
  igemm,
  int8LinearMatmul,
  int8MixedScaledMm,
  int8MmDequant,
  int8ScaledMm,
  matmul8bit,
} from "#halfbyte/ops/igemm.js";
import { int8VectorwiseQuant } from "#halfbyte/ops/int8.js";
import { sumBound } from "../helpers/bounds.js";
import { random } from "../helpers/random.js";
import { round } from "../helpers/scalar.js";
import * as scalar from "../helpers/scalar-int8.js";
import {
  type Case,
  caseId,
  FLOATS,
  framed,
  framedHost,
  framedParts,
  framedPartsHost,
  type Host,
  oddScales,
} from "./case.js";
import { codes, matrix, scaleName, scales, vector } from "./product-inputs.js";

type Size = readonly [m: number, n: number, k: number];
const sizeName = ([m, n, k]: Size): string[] => [`m=${m}`, `n=${n}`, `k=${k}`];

/** Rows of codes times rows of codes. `extreme`: all codes -128, so that sums are as large as they get. */
function linearCase(size: Size, options: { view?: number; extreme?: boolean; large?: boolean } = {}): Case {
  const [m, n, k] = size;
  const { view, extreme, large } = options;
  const words = [extreme ? "extreme" : "", view === undefined ? "" : `view=${view}`].filter(Boolean);
  const id = caseId("int8LinearMatmul", ...sizeName(size), ...words);
  const behind = ((view ?? 0) * 5) % 4;
  const filled = (host: Host): Host =>
    extreme ? { ...host, values: new Int8Array(host.values.length).fill(-128) } : host;
  return {
    id,
    primitive: "int8LinearMatmul",
    dtype: "i8",
    ...(large && { large }),
    ...(view !== undefined && { lead: { A: view, B: view + 2 } }),
    inputs: () => ({ A: filled(codes([m, k], `${id} A`)), B: filled(codes([n, k], `${id} B`)) }),
    run: ({ A, B }, backend): Record<string, Tensor> => {
      if (view === undefined) return { y: int8LinearMatmul(A!, B!) };
      const { view: out, base } = framed(backend, "i32", [m, n], behind);
      int8LinearMatmul(A!, B!, { out });
      return { base };
    },
    expected: ({ A, B }): Record<string, Host> => {
      const y: Host = { dtype: "i32", shape: [m, n], values: scalar.igemm(size, A!.values, B!.values) };
      return view === undefined ? { y } : { base: framedHost(y, behind) };
    },
  };
}

/** `shared`: one B for all batches. */
function igemmCase(
  primitive: "igemm" | "batchedIgemm",
  batch: readonly number[],
  size: Size,
  transposedA: boolean,
  transposedB: boolean,
  shared = false,
): Case {
  const [m, n, k] = size;
  const batches = batch.reduce((a, b) => a * b, 1);
  const turned = `${transposedA ? "t" : "n"}${transposedB ? "t" : "n"}`;
  const lead = batch.length > 0 ? [`b=${batch.join("x")}`] : [];
  const id = caseId(primitive, ...lead, ...sizeName(size), turned, ...(shared ? ["shared"] : []));
  const options = { transposedA, transposedB };
  return {
    id,
    primitive,
    dtype: "i8",
    inputs: () => ({
      A: codes([...batch, ...(transposedA ? [k, m] : [m, k])], `${id} A`),
      B: codes([...(shared ? [] : batch), ...(transposedB ? [n, k] : [k, n])], `${id} B`),
    }),
    run: ({ A, B }) => ({ y: (primitive === "igemm" ? igemm : batchedIgemm)(A!, B!, options) }),
    expected: ({ A, B }) => {
      const values = Array.from({ length: batches }, (_, b) => {
        const begins = { aBegin: b * m * k, bBegin: shared ? 0 : b * n * k };
        return [...scalar.igemm(size, A!.values, B!.values, { ...options, ...begins })];
      });
      return { y: { dtype: "i32", shape: [...batch, m, n], values: values.flat() } };
    },
  };
}

/** Two three-dimensional operands that fit no batched product: contracted over their first two dimensions. */
function contractionCase(
  [b, s]: readonly [number, number],
  [i, o]: readonly [number, number],
  out?: readonly number[] | "none",
): Case {
  const words = out === undefined ? [] : [`out=${typeof out === "string" ? out : out.join("x")}`];
  const id = caseId("igemm", `b=${b}`, `s=${s}`, `${i}x${o}`, "contraction", ...words);
  return {
    id,
    primitive: "igemm",
    dtype: "i8",
    inputs: () => ({ A: codes([b, s, i], `${id} A`), B: codes([b, s, o], `${id} B`) }),
    run: ({ A, B }, backend): Record<string, Tensor> => {
      if (out === "none") return { y: igemm(A!, B!) };
      const { view, base } = framed(backend, "i32", out ?? [i, o], 1);
      const y = igemm(A!, B!, { out: view });
      return { y, base };
    },
    expected: ({ A, B }): Record<string, Host> => {
      const options = { transposedA: true, transposedB: false };
      const values = scalar.igemm([i, o, b * s], A!.values, B!.values, options);
      const y: Host = { dtype: "i32", shape: [i, o], values };
      return out === "none" ? { y } : { y, base: framedHost(y, 1) };
    },
  };
}

/** [b, s, s] by [b, s, o], which could be either: a product per batch, whatever shape `out` has. */
function ambiguousCase(b: number, s: number, o: number, out: readonly number[]): Case {
  const id = caseId("igemm", `b=${b}`, `s=${s}`, `${s}x${o}`, `out=${out.join("x")}`);
  return {
    id,
    primitive: "igemm",
    dtype: "i8",
    inputs: () => ({ A: codes([b, s, s], `${id} A`), B: codes([b, s, o], `${id} B`) }),
    run: ({ A, B }, backend): Record<string, Tensor> => {
      const { view, base } = framed(backend, "i32", out, 1);
      const y = igemm(A!, B!, { out: view });
      return { y, base };
    },
    expected: ({ A, B }): Record<string, Host> => {
      const values = Array.from({ length: b }, (_, i) => {
        const begins = { aBegin: i * s * s, bBegin: i * s * o, transposedB: false };
        return [...scalar.igemm([s, o, s], A!.values, B!.values, begins)];
      });
      const y: Host = { dtype: "i32", shape: [b, s, o], values: values.flat() };
      return { y, base: framedHost(y, 1) };
    },
  };
}

/** int32 of all sizes: those that float32 holds, and those that it rounds. */
function integers(shape: readonly number[], seed: string): Host {
  const next = random(seed);
  const n = shape.reduce((a, b) => a * b, 1);
  const values = Int32Array.from({ length: n }, () => {
    const [bits, shift] = [next() | 0, next() % 32];
    return bits >> shift;
  });
  return { dtype: "i32", shape, values };
}

interface DequantOptions {
  readonly bias?: boolean;
  readonly view?: number;
  /** Of the row scales: denormal results, and such that overflow. */
  readonly scale?: number;
  readonly odd?: boolean;
  readonly large?: boolean;
}

function dequantCase(dtype: FloatDType, m: number, n: number, options: DequantOptions = {}): Case {
  const { bias = false, view, scale = 1, odd = false, large } = options;
  const words = [
    bias && "bias",
    view !== undefined && `view=${view}`,
    scale !== 1 && `scale=${scaleName(scale)}`,
    odd && "odd-scales",
  ];
  const named = words.filter((word) => typeof word === "string");
  const id = caseId("int8MmDequant", dtype, `${m}x${n}`, ...named);
  const behind = ((view ?? 0) * 5) % 16;
  return {
    id,
    primitive: "int8MmDequant",
    dtype: "i32",
    ...(large && { large }),
    ...(view !== undefined && { lead: { A: view, row: view % 3, column: (view + 1) % 4, bias: view } }),
    inputs: () => ({
      A: integers([m, n], `${id} A`),
      row: odd ? { dtype: "f32", shape: [m], values: oddScales(m).map(Math.abs) } : scales(m, `${id} row`, scale),
      column: scales(n, `${id} column`, 0.02),
      ...(bias && { bias: vector(dtype, n, `${id} bias`, 0.3) }),
    }),
    run: ({ A, row, column, bias: added }, backend): Record<string, Tensor> => {
      if (view === undefined) return { y: int8MmDequant(A!, row!, column!, { dtype, bias: added }) };
      const { view: out, base } = framed(backend, dtype, [m, n], behind);
      int8MmDequant(A!, row!, column!, { dtype, bias: added, out });
      return { base };
    },
    expected: ({ A, row, column, bias: added }): Record<string, Host> => {
      const values = scalar.int8MmDequant(A!.values, row!.values, column!.values, added?.values, dtype);
      const y: Host = { dtype, shape: [m, n], values };
      return view === undefined ? { y } : { base: framedHost(y, behind) };
    },
  };
}

function scaledCase(dtype: FloatDType, size: Size, bias: boolean, lead?: readonly number[]): Case {
  const [m, n, k] = size;
  const words = [bias ? "bias" : "", lead ? `lead=${lead.join("x")}` : ""].filter(Boolean);
  const id = caseId("int8ScaledMm", dtype, ...sizeName(size), ...words);
  return {
    id,
    primitive: "int8ScaledMm",
    dtype: "i8",
    inputs: () => ({
      A: codes([...(lead ?? [m]), k], `${id} A`),
      B: codes([n, k], `${id} B`),
      row: scales(m, `${id} row`, 3),
      column: scales(n, `${id} column`, 0.1),
      ...(bias && { bias: vector(dtype, n, `${id} bias`, 0.3) }),
    }),
    run: ({ A, B, row, column, bias: added }) => ({ y: int8ScaledMm(A!, B!, row!, column!, { dtype, bias: added }) }),
    expected: ({ A, B, row, column, bias: added }) => {
      const products = scalar.igemm(size, A!.values, B!.values);
      const values = scalar.int8MmDequant(products, row!.values, column!.values, added?.values, dtype);
      return { y: { dtype, shape: [...(lead ?? [m]), n], values } };
    },
  };
}

/** Activations of which some columns hold outliers. */
function activations(dtype: FloatDType, rows: number, cols: number, outliers: number, seed: string): Host {
  const next = random(`${seed} outliers`);
  const { values } = matrix(dtype, [rows, cols], seed);
  const all = Array.from(values);
  for (let i = 0; i < outliers && cols > 0; i++) {
    const column = i === 0 ? cols - 1 : next() % cols;
    // Not in every row: the others have the column zeroed in int8 all the same.
    for (let r = next() % 2; r < rows; r += 1 + (next() % 2)) all[r * cols + column] = round(dtype, 6 + (next() % 60));
  }
  return { dtype, shape: [rows, cols], values: all };
}

interface MixedOptions {
  readonly outliers: number;
  readonly bias?: boolean;
  readonly view?: number;
  readonly threshold?: number;
  readonly large?: boolean;
}

/**
 * The int8 product and the outlier columns: exact int32, then float32 sums. `matmul8bit` quantizes by itself, in f16; for
 * `int8MixedScaledMm` the case does.
 */
function mixedCase(
  primitive: "int8MixedScaledMm" | "matmul8bit",
  dtype: FloatDType,
  size: Size,
  options: MixedOptions,
): Case {
  const [m, n, k] = size;
  const { outliers, bias = false, view, threshold = 6, large } = options;
  const words = [bias && "bias", view !== undefined && `view=${view}`];
  const named = words.filter((word) => typeof word === "string");
  const id = caseId(primitive, dtype, ...sizeName(size), `t=${threshold}`, `outliers=${outliers}`, ...named);
  const behind = ((view ?? 0) * 5) % 16;
  return {
    id,
    primitive,
    dtype,
    bounded: true,
    ...(large && { large }),
    ...(view !== undefined && { lead: { A: view, CB: view + 1, SCB: view % 3, bias: view } }),
    inputs: () => ({
      A: activations(dtype, m, k, outliers, `${id} A`),
      CB: codes([n, k], `${id} CB`),
      SCB: scales(n, `${id} SCB`, 0.1),
      ...(bias && { bias: vector(dtype, n, `${id} bias`, 0.3) }),
    }),
    run: ({ A, CB, SCB, bias: added }, backend): Record<string, Tensor> => {
      const frame = view === undefined ? undefined : framedParts(backend, dtype, [m, n], behind);
      const rest = { bias: added, out: frame?.view };
      let y: Tensor;
      if (primitive === "matmul8bit") y = matmul8bit(A!, CB!, SCB!, { ...rest, threshold });
      else {
        const [CA, SCA, outlierCols] = int8VectorwiseQuant(A!, { threshold });
        y = int8MixedScaledMm(A!, CA, CB!, SCA, SCB!, { ...rest, outlierCols });
      }
      return frame ? { y, before: frame.before, behind: frame.behind } : { y };
    },
    expected: ({ A, CB, SCB, bias: added }): Record<string, Host> => {
      const a = A!.values;
      const half = primitive === "matmul8bit" ? Array.from(a, (v) => round("f16", v)) : a;
      const { q, scale, outliers: found } = scalar.int8VectorwiseQuant(half, m, k, threshold);
      const products = scalar.igemm(size, q, CB!.values);
      const base = scalar.int8Scaled(products, scale, SCB!.values, added?.values);
      const bound = base.map((value, i) => {
        const [r, c] = [Math.floor(i / n), i % n];
        let [sum, magnitude] = [value, Math.abs(value)];
        for (const column of found.columns.subarray(0, found.count)) {
          const scaled = Math.fround(CB!.values[c * k + column]! * SCB!.values[c]!);
          const weight = round(dtype, Math.fround(scaled * Math.fround(1 / 127)));
          const term = a[r * k + column]! * weight;
          sum += term;
          magnitude += Math.abs(term);
        }
        base[i] = sum;
        return sumBound(dtype, { value: sum, magnitude, squares: 0, count: found.count, activations: 0 });
      });
      return {
        y: { dtype, shape: [m, n], values: base, bound },
        ...(view !== undefined && framedPartsHost(dtype, behind)),
      };
    },
  };
}

/** Bytes, halves and words. By a launch: no op transposes anything but int8. */
function transposeCase(dtype: "i8" | "f16" | "f32", batch: number, rows: number, cols: number, view = 0): Case {
  const id = caseId("igemm", "transpose", dtype, `b=${batch}`, `${rows}x${cols}`, `view=${view}`);
  const size = { i8: 1, f16: 2, f32: 4 }[dtype];
  const behind = (view * 5) % 16;
  return {
    id,
    primitive: "igemm",
    dtype,
    lead: { x: view },
    inputs: () => {
      const next = random(id);
      const bytes = Uint8Array.from({ length: batch * rows * cols * size }, () => next() >>> 24);
      return { x: { dtype, shape: [batch, rows, cols], values: [], bytes } };
    },
    run: ({ x }, backend): Record<string, Tensor> => {
      const { view: y, base } = framed(backend, dtype, [batch, cols, rows], behind);
      backend.launch("transpose", { x: x!, y, rows, cols, batch, itemsize: size });
      return { base };
    },
    expected: ({ x }): Record<string, Host> => {
      const bytes = new Uint8Array(x!.bytes!.length);
      for (let i = 0; i < batch * rows * cols; i++) {
        const [b, r, c] = [Math.floor(i / (rows * cols)), Math.floor(i / cols) % rows, i % cols];
        const to = (b * cols + c) * rows + r;
        bytes.set(x!.bytes!.subarray(i * size, (i + 1) * size), to * size);
      }
      return { base: framedHost({ dtype, shape: [batch, cols, rows], values: [], bytes }, behind) };
    },
  };
}

const ROWS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 129, 300];
const DEPTHS = [1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 576, 1000, 4099];

export function* igemmCases(): Generator<Case> {
  for (const m of ROWS) {
    yield linearCase([m, 17, 45]);
    yield linearCase([m, 64, 128]);
    if (m % 2) yield linearCase([5, m, 77]);
    yield linearCase([64, m, 96]);
  }
  for (const k of DEPTHS)
    for (const [m, n] of [
      [1, 5],
      [3, 9],
      [18, 7],
      [65, 34],
    ] as const)
      yield linearCase([m, n, k]);
  for (const size of [
    [0, 5, 8],
    [5, 0, 8],
    [5, 3, 0],
    [0, 0, 0],
  ] as const)
    yield linearCase(size);
  for (const view of [1, 2, 3, 4, 7, 8, 15]) {
    for (const size of [
      [1, 19, 131],
      [6, 19, 131],
      [40, 33, 256],
    ] as const)
      yield linearCase(size, { view });
  }
  yield linearCase([3, 5, 4096], { extreme: true });
  // 2^31: wraps to the other end.
  yield linearCase([1, 2, 131_072], { extreme: true });
  yield linearCase([3, 2, 131_075], { extreme: true });
  // The same in sizes that a library takes.
  yield linearCase([16, 16, 131_072], { extreme: true, large: true });
  yield linearCase([32, 16, 131_088], { extreme: true, large: true });
  yield linearCase([130, 520, 2050], { large: true });
  yield linearCase([70_001, 3, 5], { large: true });
  yield linearCase([3, 70_001, 5], { large: true });

  for (const transposedA of [false, true]) {
    for (const transposedB of [false, true]) {
      for (const size of [
        [1, 1, 1],
        [5, 7, 9],
        [33, 18, 65],
        [64, 64, 64],
        [4, 3, 0],
        [0, 3, 4],
      ] as const) {
        yield igemmCase("igemm", [], size, transposedA, transposedB);
        yield igemmCase("igemm", [3], size, transposedA, transposedB);
        yield igemmCase("igemm", [2, 2], size, transposedA, transposedB, true);
        yield igemmCase("batchedIgemm", [4], size, transposedA, transposedB);
      }
      yield igemmCase("batchedIgemm", [0], [3, 4, 5], transposedA, transposedB);
      yield igemmCase("batchedIgemm", [67], [3, 4, 5], transposedA, transposedB);
    }
  }
  yield contractionCase([3, 5], [7, 9]);
  yield contractionCase([1, 64], [33, 16]);
  yield contractionCase([3, 5], [7, 9], [1, 7, 9]);
  yield contractionCase([3, 5], [7, 9], [63]);
  yield contractionCase([3, 5], [7, 9], "none");
  yield ambiguousCase(1, 6, 9, [6, 9]);
  yield ambiguousCase(1, 6, 9, [54]);
  yield ambiguousCase(1, 6, 9, [1, 6, 9]);
  yield ambiguousCase(3, 4, 5, [12, 5]);
  for (const dtype of ["i8", "f16", "f32"] as const) {
    for (const [batch, rows, cols] of [
      [1, 1, 1],
      [1, 5, 300],
      [1, 300, 5],
      [3, 33, 65],
      [1, 64, 64],
      [2, 31, 1],
    ] as const) {
      yield transposeCase(dtype, batch, rows, cols);
    }
    for (const view of [1, 3, 8]) yield transposeCase(dtype, 2, 37, 53, view);
  }
  yield { ...transposeCase("i8", 1, 70_001, 3), large: true };
  yield { ...transposeCase("i8", 70_001, 3, 2), large: true };

  yield* dequantCases();
  yield* mixedCases();
}

function* dequantCases(): Generator<Case> {
  for (const dtype of FLOATS) {
    for (const [m, n] of [
      [1, 1],
      [1, 100],
      [7, 16],
      [5, 17],
      [33, 65],
      [3, 1000],
      [300, 3],
    ] as const) {
      yield dequantCase(dtype, m, n);
      yield dequantCase(dtype, m, n, { bias: true });
      yield scaledCase(dtype, [m, n, 77], n % 2 === 0);
    }
    yield dequantCase(dtype, 0, 5);
    yield dequantCase(dtype, 5, 0, { bias: true });
    for (const view of [1, 2, 3, 7, 8]) yield dequantCase(dtype, 37, 53, { view, bias: view > 2 });
    for (const scale of [2 ** -140, 2 ** -30, 2 ** 20, 2 ** 100]) {
      yield dequantCase(dtype, 9, 67, { scale });
      yield dequantCase(dtype, 9, 67, { scale, bias: true });
    }
    yield dequantCase(dtype, 20, 19, { odd: true });
    yield scaledCase(dtype, [6, 9, 65], true, [2, 3]);
    yield scaledCase(dtype, [3, 4, 0], true);
    yield scaledCase(dtype, [0, 4, 8], false);
  }
  yield dequantCase("f16", 70_001, 3, { bias: true, large: true });
}

function* mixedCases(): Generator<Case> {
  for (const dtype of FLOATS) {
    for (const op of ["int8MixedScaledMm", "matmul8bit"] as const) {
      for (const m of [1, 2, 5, 16, 33]) {
        for (const outliers of [0, 1, 7]) yield mixedCase(op, dtype, [m, 19, 131], { outliers, bias: m % 2 === 1 });
        yield mixedCase(op, dtype, [m, 64, 256], { outliers: 3, bias: true });
      }
      // Every column an outlier, or nearly.
      yield mixedCase(op, dtype, [4, 9, 70], { outliers: 200 });
      yield mixedCase(op, dtype, [4, 9, 70], { outliers: 3, threshold: 0.25 });
      yield mixedCase(op, dtype, [8, 130, 1000], { outliers: 9 });
      for (const view of [1, 3, 8]) yield mixedCase(op, dtype, [5, 33, 77], { outliers: 4, view, bias: view > 1 });
      for (const size of [
        [0, 4, 8],
        [4, 0, 8],
        [4, 5, 0],
      ] as const)
        yield mixedCase(op, dtype, size, { outliers: 0, bias: true });
      yield mixedCase(op, dtype, [64, 300, 1100], { outliers: 12, bias: true, large: true });
    }
    yield mixedCase("matmul8bit", dtype, [7, 33, 100], { outliers: 4, threshold: 0 });
    yield mixedCase("matmul8bit", dtype, [1, 33, 100], { outliers: 4, threshold: 0, bias: true });
  }
}
