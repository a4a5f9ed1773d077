import { SUM_CHUNK } from "#halfbyte/core/kernels.js";
import { mean } from "#halfbyte/ops/sum.js";
import * as scalar from "../helpers/scalar.js";
import {
  type Case,
  caseId,
  EXTREMES,
  floats,
  framed,
  framedHost,
  type Host,
  type Kind,
  LENGTHS,
  TILE_LENGTHS,
} from "./case.js";

const AWKWARD = [1023, 1024, 1025, 1055, 1056, 1057, 2048, 8192, 32769, 1024 * 1024 - 1, 1024 * 1024, 1024 * 1024 + 1];

function meanCase(n: number, kind: Kind, lead = 0): Case {
  const id = caseId(
    "mean",
    "f32",
    `n=${n}`,
    ...(kind === "normal" ? [] : [kind]),
    ...(lead === 0 ? [] : [`view=${lead}`]),
  );
  return {
    id,
    primitive: "mean",
    dtype: "f32",
    lead: { x: lead },
    inputs: () => ({ x: floats("f32", n, kind, id) }),
    run: ({ x }) => ({ y: mean(x!) }),
    expected: ({ x }) => ({ y: { dtype: "f32", shape: [], values: [scalar.mean(x!.values)] } }),
  };
}

const NEVER = 2 ** 21;

/** A level of the tree over f64 sums, and its top, which `mean` reaches for a billion elements only. */
function levelCase(n: number): Case {
  const id = caseId("mean", "f64", `sums=${n}`);
  const sums = (x: Host): Float64Array => Float64Array.from(x.values, (v) => v * 1e10 + v / 3);
  return {
    id,
    primitive: "mean",
    dtype: "f32",
    inputs: () => {
      const x = floats("f32", n, "edge", id);
      return { x: { dtype: "u8", shape: [8 * n], values: [], bytes: new Uint8Array(sums(x).buffer as ArrayBuffer) } };
    },
    run: ({ x }, backend) => {
      const level = framed(backend, "u8", [8 * Math.ceil(n / SUM_CHUNK)], 8);
      const mean = framed(backend, "f32", [], 1);
      backend.launch("sumChunks", { x: x!, y: level.view, n, wide: 1 });
      backend.launch("meanOfSums", { x: x!, y: mean.view, sums: n, n: NEVER });
      return { level: level.base, mean: mean.base };
    },
    expected: ({ x }) => {
      const values = new Float64Array(x!.bytes!.buffer);
      const level = scalar.chunkSums(values);
      let top = level;
      while (top.length > 1) top = scalar.chunkSums(top);
      const bytes = new Uint8Array(Float64Array.from(level).buffer);
      return {
        level: framedHost({ dtype: "u8", shape: [bytes.length], values: [], bytes }, 8),
        mean: framedHost({ dtype: "f32", shape: [], values: [Math.fround(top[0]! / NEVER)] }, 1),
      };
    },
  };
}

export function* sumCases(): Generator<Case> {
  for (const n of [...LENGTHS, ...TILE_LENGTHS, ...AWKWARD]) yield meanCase(n, "normal");
  for (const kind of ["edge", ...EXTREMES] as const) for (const n of [100, 40961]) yield meanCase(n, kind);
  for (const lead of [1, 2, 3]) for (const n of [65, 5000]) yield meanCase(n, "edge", lead);
  for (const n of [1, 2, 31, 33, 1023, 1024, 1025, 40_961]) yield levelCase(n);
  yield { ...levelCase(SUM_CHUNK ** 2), large: true };
  yield { ...meanCase(5_000_011, "normal"), large: true };
}
