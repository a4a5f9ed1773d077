import { DTYPE_ID } from "#halfbyte/core/dtype.js";
import type { Tensor } from "#halfbyte/core/tensor.js";
import { int8VectorwiseDequant, int8VectorwiseQuant } from "#halfbyte/ops/int8.js";
import { random } from "../helpers/random.js";
import * as scalar from "../helpers/scalar.js";
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
        scalar.round(dtype, fround(fround(v * values[Math.floor(i / cols)]!) * fround(7.874015718698502e-3))),
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
      const operands = { x: A!, q: q.view, scale: scale.view, rows, cols };
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
    expected: (inputs): Record<string, Host> => ({ base: framedHost(c.expected(inputs).y!, behind) }),
  };
}

function oddScalesCase(dtype: (typeof FLOATS)[number]): Case {
  const id = caseId("int8VectorwiseDequant", dtype, "40x67", "odd-scales");
  const c = dequantCase(dtype, 40, 67);
  return { ...c, id, inputs: () => ({ ...c.inputs(), scale: { dtype: "f32", shape: [40], values: oddScales(40) } }) };
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
  // More rows than a grid's second dimension could hold.
  yield { ...quantCase("f16", 70_001, 3, "edge"), large: true };
  yield { ...dequantCase("f16", 70_001, 3), large: true };
  yield { ...quantCase("bf16", 2, 1_000_003, "edge"), large: true };
}
