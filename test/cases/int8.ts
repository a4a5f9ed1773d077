import { int8VectorwiseDequant, int8VectorwiseQuant } from "#halfbyte/ops/int8.js";
import { random } from "../helpers/random.js";
import * as scalar from "../helpers/scalar.js";
import { type Case, caseId, FLOATS, floats, type Kind } from "./case.js";

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
] as const;

function quantCase(dtype: (typeof FLOATS)[number], rows: number, cols: number, kind: Kind): Case {
  const id = caseId("int8VectorwiseQuant", dtype, `${rows}x${cols}`, kind);
  return {
    id,
    primitive: "int8VectorwiseQuant",
    dtype,
    inputs: () => ({ A: { ...floats(dtype, rows * cols, kind, id), shape: [rows, cols] } }),
    run: ({ A }) => {
      const [q, scale] = int8VectorwiseQuant(A!);
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

export function* int8Cases(): Generator<Case> {
  for (const dtype of FLOATS) {
    for (const [rows, cols] of SHAPES) {
      yield quantCase(dtype, rows, cols, "normal");
      yield quantCase(dtype, rows, cols, "edge");
      yield dequantCase(dtype, rows, cols);
    }
  }
}
