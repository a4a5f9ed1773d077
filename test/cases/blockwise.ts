import { DTYPE_ID } from "#halfbyte/core/dtype.js";
import type { Tensor } from "#halfbyte/core/tensor.js";
import { type CodeSearch, dequantizeBlockwise, quantizeBlockwise } from "#halfbyte/ops/blockwise.js";
import { Codebook } from "#halfbyte/quant/codebook.js";
import { createDynamicMap, createFp8Map, createLinearMap, createNormalMap } from "#halfbyte/quant/codebooks.js";
import { random } from "../helpers/random.js";
import * as scalar from "../helpers/scalar.js";
import {
  type Case,
  caseId,
  EXTREME_SIZES,
  EXTREMES,
  FLOATS,
  floats,
  framed,
  framedHost,
  type Host,
  hostBytes,
  type Kind,
  LENGTHS,
  oddScales,
  repeated,
  SHORT_LENGTHS,
  TILE_LENGTHS,
  VIEWS,
} from "./case.js";

/** 256 sorted values with clusters far finer than the search table's bins: the exact search has to serve. */
function clustered(): Float32Array<ArrayBuffer> {
  const next = random("clustered");
  const values = Float32Array.from({ length: 256 }, (_, i) => (i % 4 === 0 ? 0.3 : -0.7) + (next() % 1000) * 1e-7);
  values[0] = -1;
  values[255] = 1;
  return values.sort();
}

export const CODES: Record<string, () => Float32Array<ArrayBuffer>> = {
  dynamic: () => createDynamicMap(),
  unsigned: () => createDynamicMap(false),
  linear: () => createLinearMap(),
  fp8: () => createFp8Map(),
  normal: () => createNormalMap(),
  clustered,
};
type CodeName = keyof typeof CODES;

function quantizeCase(
  code: CodeName,
  dtype: (typeof FLOATS)[number],
  n: number,
  blocksize: number,
  kind: Kind,
  search: "auto" | "exact" = "auto",
): Case {
  const id = caseId("quantizeBlockwise", code, dtype, `n=${n}`, `bs=${blocksize}`, kind, search);
  return {
    id,
    primitive: "quantizeBlockwise",
    dtype,
    inputs: () => {
      const A = floats(dtype, n, kind, id);
      return { A: code === "unsigned" ? { ...A, values: Float32Array.from(A.values, Math.abs) } : A };
    },
    run: ({ A }) => {
      const [out, state] = quantizeBlockwise(A!, {
        code: CODES[code]!(),
        blocksize,
        search,
        allowNonFinite: kind === "nonfinite",
      });
      return { out, absmax: state.absmax };
    },
    expected: ({ A }) => {
      const { q, absmax } = scalar.quantizeBlockwise(A!.values, CODES[code]!(), blocksize);
      return {
        out: { dtype: "u8", shape: [n], values: q },
        absmax: { dtype: "f32", shape: [absmax.length], values: absmax },
      };
    },
  };
}

function dequantizeCase(
  code: CodeName,
  dtype: (typeof FLOATS)[number],
  n: number,
  blocksize: number,
  scale: number,
): Case {
  const id = caseId("dequantizeBlockwise", code, dtype, `n=${n}`, `bs=${blocksize}`, `scale=${scale}`);
  const blocks = Math.ceil(n / blocksize);
  return {
    id,
    primitive: "dequantizeBlockwise",
    dtype,
    inputs: () => {
      const next = random(id);
      return {
        A: { dtype: "u8", shape: [n], values: Uint8Array.from({ length: n }, () => next() & 255) },
        absmax: {
          dtype: "f32",
          shape: [blocks],
          values: Float32Array.from({ length: blocks }, () => ((next() % 10007) / 9973) * scale),
        },
      };
    },
    run: ({ A, absmax }) => ({
      y: dequantizeBlockwise(A!, undefined, { absmax: absmax!, code: CODES[code]!(), blocksize, dtype }),
    }),
    expected: ({ A, absmax }) => ({
      y: {
        dtype,
        shape: [n],
        values: scalar.dequantizeBlockwise(
          A!.values as Uint8Array,
          absmax!.values as Float32Array,
          CODES[code]!(),
          blocksize,
          dtype,
        ),
      },
    }),
  };
}

function oddScalesCase(dtype: (typeof FLOATS)[number]): Case {
  const id = caseId("dequantizeBlockwise", "dynamic", dtype, "n=2001", "bs=32", "odd-scales");
  const c = dequantizeCase("dynamic", dtype, 2001, 32, 1);
  return { ...c, id, inputs: () => ({ ...c.inputs(), absmax: { dtype: "f32", shape: [63], values: oddScales(63) } }) };
}

/** From a view into views, all in the middle of their allocations. */
function quantizeViewCase(dtype: (typeof FLOATS)[number], lead: number, blocksize: number, search: CodeSearch): Case {
  const id = caseId("quantizeBlockwise", "dynamic", dtype, `view=${lead}`, `bs=${blocksize}`, search);
  const n = 5003;
  const behind = (lead * 5) % 16;
  return {
    id,
    primitive: "quantizeBlockwise",
    dtype,
    lead: { A: lead },
    inputs: () => ({ A: floats(dtype, n, "edge", id) }),
    run: ({ A }, backend) => {
      const out = framed(backend, "u8", [n], behind);
      const absmax = framed(backend, "f32", [Math.ceil(n / blocksize)], behind % 3);
      quantizeBlockwise(A!, { blocksize, search, out: out.view, absmax: absmax.view });
      return { out: out.base, absmax: absmax.base };
    },
    expected: ({ A }) => {
      const { q, absmax } = scalar.quantizeBlockwise(A!.values, createDynamicMap(), blocksize);
      return {
        out: framedHost({ dtype: "u8", shape: [n], values: q }, behind),
        absmax: framedHost({ dtype: "f32", shape: [absmax.length], values: absmax }, behind % 3),
      };
    },
  };
}

function dequantizeViewCase(dtype: (typeof FLOATS)[number], lead: number, blocksize: number): Case {
  const id = caseId("dequantizeBlockwise", "dynamic", dtype, `view=${lead}`, `bs=${blocksize}`);
  const n = 5003;
  const c = dequantizeCase("dynamic", dtype, n, blocksize, 1);
  const behind = (lead * 5) % 16;
  return {
    ...c,
    id,
    lead: { A: lead, absmax: lead % 3 },
    run: ({ A, absmax }, backend): Record<string, Tensor> => {
      const { view, base } = framed(backend, dtype, [n], behind);
      dequantizeBlockwise(A!, undefined, { absmax: absmax!, blocksize, dtype, out: view });
      return { base };
    },
    expected: (inputs, device): Record<string, Host> => ({ base: framedHost(c.expected(inputs, device).y!, behind) }),
  };
}

/** Kernels with an offset, which double quantization uses with f32 only. */
function offsetCase(dtype: (typeof FLOATS)[number], kind: Kind, blocksize: number): Case {
  const id = caseId("quantizeBlockwise", "dynamic", dtype, "n=5003", `bs=${blocksize}`, "offset", kind);
  const n = 5003;
  const offset = Math.fround(0.0123);
  return {
    id,
    primitive: "quantizeBlockwise",
    dtype,
    inputs: () => ({
      A: floats(dtype, n, kind, id),
      offset: { dtype: "f32", shape: [], values: [offset] },
    }),
    run: ({ A, offset: shift }, backend): Record<string, Tensor> => {
      const q = framed(backend, "u8", [n], 8);
      const absmax = framed(backend, "f32", [Math.ceil(n / blocksize)], 1);
      const y = framed(backend, dtype, [n], 3);
      const codebook = Codebook.dynamic();
      const common = { code: codebook.on(backend), offset: shift!, n, blocksize, dtype: DTYPE_ID[dtype] };
      const table = codebook.tableOn(backend);
      backend.launch("quantizeBlockwise", {
        x: A!,
        q: q.view,
        absmax: absmax.view,
        table,
        ...common,
        allowNonFinite: 1,
      });
      backend.launch("dequantizeBlockwise", { q: q.view, absmax: absmax.view, y: y.view, ...common });
      return { q: q.base, absmax: absmax.base, y: y.base };
    },
    expected: ({ A }): Record<string, Host> => {
      const code = createDynamicMap();
      const { q, absmax } = scalar.quantizeBlockwise(A!.values, code, blocksize, offset);
      const y = scalar.dequantizeBlockwise(q, absmax, code, blocksize, dtype, offset);
      return {
        q: framedHost({ dtype: "u8", shape: [n], values: q }, 8),
        absmax: framedHost({ dtype: "f32", shape: [absmax.length], values: absmax }, 1),
        y: framedHost({ dtype, shape: [n], values: y }, 3),
      };
    },
  };
}

/**
 * Many millions of elements that repeat with a period which is a multiple of nothing but the block. Blocks of 4,096 are shared by
 * warps, which must not get ahead of each other when they walk on.
 */
function largeCase(dtype: (typeof FLOATS)[number], blocksize: number, blocks: number, periods: number): Case {
  const period = blocksize * blocks;
  const n = periods * period;
  const id = caseId("quantizeBlockwise", "dynamic", dtype, `n=${n}`, `bs=${blocksize}`, "large");
  const once = (): Host => floats(dtype, period, "edge", id);
  const many = ({ dtype: of, values, shape }: Host): Host => {
    const count = shape[0]! * periods;
    return {
      dtype: of,
      shape: [count],
      values: [],
      bytes: repeated(of, hostBytes({ dtype: of, shape, values }), count),
    };
  };
  return {
    id,
    primitive: "quantizeBlockwise",
    dtype,
    large: true,
    inputs: () => ({ A: many(once()) }),
    run: ({ A }): Record<string, Tensor> => {
      const [out, state] = quantizeBlockwise(A!, { blocksize });
      return { out, absmax: state.absmax, y: dequantizeBlockwise(out, state) };
    },
    expected: (): Record<string, Host> => {
      const code = createDynamicMap();
      const { q, absmax } = scalar.quantizeBlockwise(once().values, code, blocksize);
      const y = scalar.dequantizeBlockwise(q, absmax, code, blocksize, dtype);
      return {
        out: many({ dtype: "u8", shape: [period], values: q }),
        absmax: many({ dtype: "f32", shape: [absmax.length], values: absmax }),
        y: many({ dtype, shape: [period], values: y }),
      };
    },
  };
}

function nestedCase(n: number, blocksize: number, kind: Kind = "normal"): Case {
  const parts = kind === "normal" ? ["nested"] : ["nested", kind];
  const id = caseId("quantizeBlockwise", "dynamic", "f32", `n=${n}`, `bs=${blocksize}`, ...parts);
  return {
    id,
    primitive: "quantizeBlockwise",
    dtype: "f32",
    inputs: () => ({ A: floats("f32", n, kind, id) }),
    run: ({ A }) => {
      const [out, state] = quantizeBlockwise(A!, { blocksize, nested: true, allowNonFinite: kind === "nonfinite" });
      return {
        out,
        absmax: state.absmax,
        offset: state.offset!,
        absmax2: state.state2!.absmax,
        y: dequantizeBlockwise(out, state),
      };
    },
    expected: ({ A }) => {
      const code = createDynamicMap();
      const { q, absmax } = scalar.quantizeBlockwise(A!.values, code, blocksize);
      const offset = scalar.mean(absmax);
      const inner = scalar.quantizeBlockwise(absmax, code, blocksize, offset);
      const back = Float32Array.from(scalar.dequantizeBlockwise(inner.q, inner.absmax, code, blocksize, "f32", offset));
      return {
        out: { dtype: "u8", shape: [n], values: q },
        absmax: { dtype: "u8", shape: [absmax.length], values: inner.q },
        offset: { dtype: "f32", shape: [], values: [offset] },
        absmax2: { dtype: "f32", shape: [inner.absmax.length], values: inner.absmax },
        y: { dtype: "f32", shape: [n], values: scalar.dequantizeBlockwise(q, back, code, blocksize, "f32") },
      };
    },
  };
}

export function* blockwiseCases(): Generator<Case> {
  for (const dtype of FLOATS) {
    for (const n of [...LENGTHS, ...TILE_LENGTHS]) {
      yield quantizeCase("dynamic", dtype, n, 256, n % 2 ? "edge" : "normal");
    }
    for (const blocksize of [32, 64, 128, 512, 1024, 2048, 4096]) {
      for (const n of SHORT_LENGTHS) yield quantizeCase("dynamic", dtype, n, blocksize, "edge");
    }
    for (const code of Object.keys(CODES)) {
      for (const search of ["auto", "exact"] as const) {
        yield quantizeCase(code, dtype, 4099, 64, "edge", search);
        yield quantizeCase(code, dtype, 4096, 4096, "normal", search);
      }
      yield dequantizeCase(code, dtype, 1000, 64, 1);
      for (const kind of EXTREMES) {
        yield quantizeCase(code, dtype, 4097, 64, kind, "exact");
        for (const [n, blocksize] of EXTREME_SIZES) yield quantizeCase(code, dtype, n, blocksize, kind);
      }
    }
    for (const n of [...LENGTHS, ...TILE_LENGTHS]) yield dequantizeCase("dynamic", dtype, n, 256, 1);
    for (const blocksize of [32, 64, 128, 512, 1024, 2048, 4096]) {
      yield dequantizeCase("dynamic", dtype, 300, blocksize, 1);
      yield dequantizeCase("dynamic", dtype, 4097, blocksize, 1);
    }
    yield oddScalesCase(dtype);
    for (const kind of ["normal", "edge", ...EXTREMES] as const) {
      for (const blocksize of [32, 256, 4096]) yield offsetCase(dtype, kind, blocksize);
    }
    for (const [lead, blocksize] of VIEWS) {
      for (const search of ["auto", "exact"] as const) yield quantizeViewCase(dtype, lead, blocksize, search);
      yield dequantizeViewCase(dtype, lead, blocksize);
    }
    for (const scale of [2 ** -20, 2 ** -130, 2 ** 17, 2 ** 127]) yield dequantizeCase("fp8", dtype, 333, 64, scale);
  }
  for (const [n, blocksize] of [
    [0, 64],
    [1, 64],
    [4097, 64],
    [131077, 256],
  ] as const)
    yield nestedCase(n, blocksize);
  for (const kind of ["edge", ...EXTREMES] as const) yield nestedCase(40001, 64, kind);
  yield largeCase("f16", 32, 2017, 310);
  yield largeCase("bf16", 4096, 211, 17);
  yield largeCase("f32", 1024, 401, 19);
}
