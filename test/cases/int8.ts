import { DTYPE_ID, type FloatDType } from "#halfbyte/core/dtype.js";
import type { Tensor } from "#halfbyte/core/tensor.js";
import { int8DoubleQuant, int8VectorwiseDequant, int8VectorwiseQuant } from "#halfbyte/ops/int8.js";
import { normals, random } from "../helpers/random.js";
import { round } from "../helpers/scalar.js";
import * as scalar from "../helpers/scalar-int8.js";
import {
  type Case,
  caseId,
  EXTREMES,
  FLOATS,
  floats,
  framed,
  framedHost,
  type Host,
  type Kind,
  oddScales,
} from "./case.js";

const SHAPES = [
  [0, 5],
  [5, 0],
  [1, 1],
  [3, 15],
  [7, 16],
  [2, 17],
  [33, 65],
  [5, 1000],
  [300, 257],
  [3, 70001],
  [3, 1023],
  [3, 1024],
  [3, 1025],
  [9, 4096],
  [2, 8192],
] as const;
/** For the extreme kinds. */
const EXTREME_SHAPES = [
  [33, 65],
  [5, 1000],
  [2, 12289],
] as const;

function quantCase(dtype: (typeof FLOATS)[number], rows: number, cols: number, kind: Kind): Case {
  const id = caseId("int8VectorwiseQuant", dtype, `${rows}x${cols}`, kind);
  return {
    id,
    primitive: "int8VectorwiseQuant",
    dtype,
    inputs: () => ({ A: { ...floats(dtype, rows * cols, kind, id), shape: [rows, cols] } }),
    run: ({ A }) => {
      const [q, scale] = int8VectorwiseQuant(A!, { allowNonFinite: kind === "nonfinite" });
      return { q, scale };
    },
    expected: ({ A }) => {
      const { q, scale } = scalar.int8VectorwiseQuant(A!.values, rows, cols);
      return {
        q: { dtype: "i8", shape: [rows, cols], values: q },
        scale: { dtype: "f32", shape: [rows], values: scale },
      };
    },
  };
}

function dequantCase(dtype: (typeof FLOATS)[number], rows: number, cols: number): Case {
  const id = caseId("int8VectorwiseDequant", dtype, `${rows}x${cols}`);
  return {
    id,
    primitive: "int8VectorwiseDequant",
    dtype,
    inputs: () => {
      const next = random(id);
      return {
        q: { dtype: "i8", shape: [rows, cols], values: Int8Array.from({ length: rows * cols }, () => next()) },
        scale: { dtype: "f32", shape: [rows], values: Float32Array.from({ length: rows }, () => next() / 2 ** 30) },
      };
    },
    run: ({ q, scale }) => ({ y: int8VectorwiseDequant(q!, scale!, { dtype }) }),
    expected: ({ q, scale }) => {
      const { fround } = Math;
      const { values } = scale!;
      const y = Array.from(q!.values, (v, i) =>
        round(dtype, fround(fround(v * values[Math.floor(i / cols)]!) * fround(7.874015718698502e-3))),
      );
      return { y: { dtype, shape: [rows, cols], values: y } };
    },
  };
}

/** Rows of odd length from a view, so that no two of them are aligned alike; codes and scales in the middle, too. */
function quantViewCase(dtype: (typeof FLOATS)[number], lead: number): Case {
  const id = caseId("int8VectorwiseQuant", dtype, "37x333", `view=${lead}`);
  const [rows, cols] = [37, 333];
  const behind = (lead * 5) % 16;
  return {
    id,
    primitive: "int8VectorwiseQuant",
    dtype,
    lead: { A: lead },
    inputs: () => ({ A: { ...floats(dtype, rows * cols, "edge", id), shape: [rows, cols] } }),
    run: ({ A }, backend) => {
      const q = framed(backend, "i8", [rows, cols], behind);
      const scale = framed(backend, "f32", [rows], behind % 3);
      const operands = { x: A!, q: q.view, scale: scale.view, outliers: null, rows, cols, threshold: 0 };
      backend.launch("int8VectorwiseQuant", { ...operands, dtype: DTYPE_ID[dtype], allowNonFinite: 0 });
      return { q: q.base, scale: scale.base };
    },
    expected: ({ A }) => {
      const { q, scale } = scalar.int8VectorwiseQuant(A!.values, rows, cols);
      return {
        q: framedHost({ dtype: "i8", shape: [rows, cols], values: q }, behind),
        scale: framedHost({ dtype: "f32", shape: [rows], values: scale }, behind % 3),
      };
    },
  };
}

function dequantViewCase(dtype: (typeof FLOATS)[number], lead: number): Case {
  const id = caseId("int8VectorwiseDequant", dtype, "37x333", `view=${lead}`);
  const c = dequantCase(dtype, 37, 333);
  const behind = (lead * 5) % 16;
  return {
    ...c,
    id,
    lead: { q: lead, scale: lead % 3 },
    run: ({ q, scale }, backend): Record<string, Tensor> => {
      const { view, base } = framed(backend, dtype, [37, 333], behind);
      int8VectorwiseDequant(q!, scale!, { dtype, out: view });
      return { base };
    },
    expected: (inputs, device): Record<string, Host> => ({ base: framedHost(c.expected(inputs, device).y!, behind) }),
  };
}

function oddScalesCase(dtype: (typeof FLOATS)[number]): Case {
  const id = caseId("int8VectorwiseDequant", dtype, "40x67", "odd-scales");
  const c = dequantCase(dtype, 40, 67);
  return { ...c, id, inputs: () => ({ ...c.inputs(), scale: { dtype: "f32", shape: [40], values: oddScales(40) } }) };
}

/** Where outliers are. `edge`: everything awkward, most of it below the threshold. */
type Where = "none" | "all" | "rows" | "columns" | "scattered" | "at the threshold" | "edge" | "nonfinite";
const PLACES: readonly Where[] = [
  "none",
  "all",
  "rows",
  "columns",
  "scattered",
  "at the threshold",
  "edge",
  "nonfinite",
];

/** Like activations: most below 3, some of 8 and more, and ones exactly at the threshold. */
function outliers(dtype: FloatDType, rows: number, cols: number, where: Where, threshold: number, seed: string): Host {
  const next = random(`${seed} outliers`);
  if (where === "edge" || where === "nonfinite")
    return { ...floats(dtype, rows * cols, where, seed), shape: [rows, cols] };
  const values = normals(rows * cols, seed).map((v) => round(dtype, v * 0.7));
  const big = (r: number, c: number): void => {
    values[r * cols + c] = round(dtype, (threshold + 2 + (next() % 100)) * (next() & 1 ? -1 : 1));
  };
  const chosen = (count: number, of: number) => Array.from({ length: count }, () => next() % Math.max(1, of));
  if (where === "all") for (let i = 0; i < values.length; i++) big(0, i);
  else if (where === "rows") for (const r of chosen(2, rows)) for (let c = 0; c < cols; c++) big(r, c);
  else if (where === "columns") {
    for (const c of [0, cols - 1, ...chosen(5, cols)]) for (let r = 0; r < rows; r++) big(r, c);
  } else if (where === "scattered")
    for (let i = 0; i < 1 + cols / 40; i++) big(next() % Math.max(1, rows), next() % cols);
  else if (where === "at the threshold") {
    const step = dtype === "f32" ? 2 ** -22 : dtype === "f16" ? 2 ** -9 : 2 ** -6;
    for (const [i, c] of chosen(9, cols).entries())
      values[c] = round(dtype, (i % 2 ? 1 : -1) * (threshold - (i % 3 ? 0 : step)));
  }
  return { dtype, shape: [rows, cols], values: values.slice(0, rows * cols) };
}

/** Both quantizations with a threshold, and their outlier columns. */
function thresholdCase(dtype: FloatDType, rows: number, cols: number, where: Where, threshold: number): Case {
  const id = caseId("int8VectorwiseQuant", dtype, `${rows}x${cols}`, `t=${threshold}`, where.replaceAll(" ", "-"));
  return {
    id,
    primitive: "int8VectorwiseQuant",
    dtype,
    inputs: () => ({ A: outliers(dtype, rows, cols, where, threshold, id) }),
    run: ({ A }): Record<string, Tensor> => {
      const [q, scale, found] = int8VectorwiseQuant(A!, { threshold, allowNonFinite: where === "nonfinite" });
      return { q, scale, columns: found!.columns, count: found!.count };
    },
    expected: ({ A }) => {
      const { q, scale, outliers: found } = scalar.int8VectorwiseQuant(A!.values, rows, cols, threshold);
      return {
        q: { dtype: "i8", shape: [rows, cols], values: q },
        scale: { dtype: "f32", shape: [rows], values: scale },
        columns: { dtype: "i32", shape: [cols], values: found.columns },
        count: { dtype: "i32", shape: [1], values: [found.count] },
      };
    },
  };
}

function doubleCase(dtype: FloatDType, rows: number, cols: number, where: Where, threshold: number): Case {
  const id = caseId("int8DoubleQuant", dtype, `${rows}x${cols}`, `t=${threshold}`, where.replaceAll(" ", "-"));
  return {
    id,
    primitive: "int8DoubleQuant",
    dtype,
    // With a threshold of 0 "columns" are just columns of larger numbers.
    inputs: () => ({ A: outliers(dtype, rows, cols, where, threshold || 6, id) }),
    run: ({ A }): Record<string, Tensor> => {
      const options = { threshold, allowNonFinite: where === "nonfinite" };
      const [q, byColumn, scale, columnStats, found] = int8DoubleQuant(A!, options);
      return { q, byColumn, scale, columnStats, ...(found && { columns: found.columns, count: found.count }) };
    },
    expected: ({ A }): Record<string, Host> => {
      const { q, scale, outliers: found } = scalar.int8VectorwiseQuant(A!.values, rows, cols, threshold);
      const columns = scalar.int8ColumnQuant(A!.values, rows, cols, dtype, threshold);
      return {
        q: { dtype: "i8", shape: [rows, cols], values: q },
        byColumn: { dtype: "i8", shape: [rows, cols], values: columns.q },
        scale: { dtype: "f32", shape: [rows], values: scale },
        columnStats: { dtype: "f32", shape: [cols], values: columns.stats },
        ...(threshold > 0 && {
          columns: { dtype: "i32", shape: [cols], values: found.columns },
          count: { dtype: "i32", shape: [1], values: [found.count] },
        }),
      };
    },
  };
}

/** Everything that a threshold launches, from views into views: codes, scales, marks, columns. */
function thresholdViewCase(dtype: FloatDType, lead: number): Case {
  const [rows, cols, threshold] = [37, 333, 6];
  const id = caseId("int8VectorwiseQuant", dtype, `${rows}x${cols}`, `t=${threshold}`, `view=${lead}`);
  const behind = (lead * 5) % 16;
  return {
    id,
    primitive: "int8VectorwiseQuant",
    dtype,
    lead: { A: lead },
    inputs: () => ({ A: outliers(dtype, rows, cols, "columns", threshold, id) }),
    run: ({ A }, backend): Record<string, Tensor> => {
      const q = framed(backend, "i8", [rows, cols], behind);
      const scale = framed(backend, "f32", [rows], behind % 3);
      const marks = framed(backend, "u8", [cols], behind);
      const columns = framed(backend, "i32", [cols], behind % 4);
      const count = framed(backend, "i32", [1], 1);
      const byColumn = framed(backend, "i8", [rows, cols], behind);
      const stats = framed(backend, "f32", [cols], behind % 3);
      const size = { rows, cols };
      const kind = DTYPE_ID[dtype];
      backend.launch("fill", { dst: marks.view, bytes: cols, value: 0 });
      const operands = { x: A!, q: q.view, scale: scale.view, outliers: marks.view, ...size, threshold };
      backend.launch("int8VectorwiseQuant", { ...operands, dtype: kind, allowNonFinite: 0 });
      backend.launch("int8OutlierColumns", { outliers: marks.view, columns: columns.view, count: count.view, cols });
      backend.launch("int8ZeroColumns", { q: q.view, columns: columns.view, count: count.view, ...size });
      backend.launch("int8ColumnStats", { x: A!, stats: stats.view, ...size, threshold, dtype: kind });
      const column = { x: A!, stats: stats.view, q: byColumn.view, ...size, threshold, dtype: kind };
      backend.launch("int8ColumnQuant", column);
      const all = { q, scale, columns, count, byColumn, stats };
      return Object.fromEntries(Object.entries(all).map(([name, { base }]) => [name, base]));
    },
    expected: ({ A }): Record<string, Host> => {
      const { q, scale, outliers: found } = scalar.int8VectorwiseQuant(A!.values, rows, cols, threshold);
      const byColumn = scalar.int8ColumnQuant(A!.values, rows, cols, dtype, threshold);
      return {
        q: framedHost({ dtype: "i8", shape: [rows, cols], values: q }, behind),
        scale: framedHost({ dtype: "f32", shape: [rows], values: scale }, behind % 3),
        columns: framedHost({ dtype: "i32", shape: [cols], values: found.columns }, behind % 4),
        count: framedHost({ dtype: "i32", shape: [1], values: [found.count] }, 1),
        byColumn: framedHost({ dtype: "i8", shape: [rows, cols], values: byColumn.q }, behind),
        stats: framedHost({ dtype: "f32", shape: [cols], values: byColumn.stats }, behind % 3),
      };
    },
  };
}

function* thresholdCases(): Generator<Case> {
  for (const dtype of FLOATS) {
    for (const where of PLACES) {
      const threshold = where === "edge" || where === "nonfinite" ? 0.25 : 6;
      for (const [rows, cols] of [
        [1, 17],
        [1, 1000],
        [2, 64],
        [7, 333],
        [65, 130],
      ] as const) {
        yield thresholdCase(dtype, rows, cols, where, threshold);
        yield doubleCase(dtype, rows, cols, where, threshold);
        if (where !== "none") yield doubleCase(dtype, rows, cols, where, 0);
      }
    }
    for (const [rows, cols] of [
      [0, 5],
      [5, 0],
      [0, 0],
    ] as const) {
      yield thresholdCase(dtype, rows, cols, "none", 6);
      for (const threshold of [0, 6]) yield doubleCase(dtype, rows, cols, "none", threshold);
    }
    // A threshold that no dtype holds, and more columns than a block of threads looks at.
    yield thresholdCase(dtype, 5, 257, "scattered", 3.3);
    // The least threshold: every element but 0 is an outlier, denormal ones too.
    yield thresholdCase(dtype, 7, 333, "edge", 2 ** -149);
    yield doubleCase(dtype, 7, 333, "edge", 2 ** -149);
    yield thresholdCase(dtype, 3, 5000, "scattered", 6);
    yield thresholdCase(dtype, 3, 5000, "all", 6);
    yield doubleCase(dtype, 300, 5, "columns", 6);
    yield doubleCase(dtype, 3, 5000, "columns", 6);
    yield doubleCase(dtype, 1025, 3, "scattered", 3.3);
    for (const lead of [1, 2, 3, 7, 8]) yield thresholdViewCase(dtype, lead);
  }
  yield { ...thresholdCase("f16", 70_001, 3, "columns", 6), large: true };
  yield { ...thresholdCase("f16", 3, 70_001, "scattered", 6), large: true };
  yield { ...doubleCase("f16", 70_001, 3, "columns", 6), large: true };
  yield { ...doubleCase("f16", 3, 70_001, "columns", 6), large: true };
}

export function* int8Cases(): Generator<Case> {
  for (const dtype of FLOATS) {
    for (const [rows, cols] of SHAPES) {
      yield quantCase(dtype, rows, cols, "normal");
      yield quantCase(dtype, rows, cols, "edge");
      yield dequantCase(dtype, rows, cols);
    }
    for (const kind of EXTREMES) for (const [rows, cols] of EXTREME_SHAPES) yield quantCase(dtype, rows, cols, kind);
    for (const lead of [1, 2, 3, 7, 8]) {
      yield quantViewCase(dtype, lead);
      yield dequantViewCase(dtype, lead);
    }
    yield oddScalesCase(dtype);
  }
  yield* thresholdCases();
  // More rows than a grid's second dimension could hold.
  yield { ...quantCase("f16", 70_001, 3, "edge"), large: true };
  yield { ...dequantCase("f16", 70_001, 3), large: true };
  yield { ...quantCase("bf16", 2, 1_000_003, "edge"), large: true };
}
