import { DTYPE_BYTES, DTYPES, type DType } from "#halfbyte/core/dtype.js";
import type { Tensor } from "#halfbyte/core/tensor.js";
import { dequantize4bit, quantize4bit } from "#halfbyte/ops/fourbit.js";
import {
  createDynamicMap,
  FP4_RANKS,
  FP4_THRESHOLDS,
  FP4_VALUES,
  NF4_THRESHOLDS,
  NF4_VALUES,
} from "#halfbyte/quant/codebooks.js";
import { QuantState } from "#halfbyte/quant/state.js";
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

const TYPES = ["nf4", "fp4"] as const;
type Type = (typeof TYPES)[number];

export const TABLES: Record<Type, scalar.FourBitTables> = {
  nf4: { values: NF4_VALUES, thresholds: NF4_THRESHOLDS },
  fp4: { values: FP4_VALUES, thresholds: FP4_THRESHOLDS, magnitudes: FP4_RANKS },
};

/** NaN and infinity go through where they are wanted. */
const allows = (kind: Kind) => ({ allowNonFinite: kind === "nonfinite" });

function quantizeCase(type: Type, dtype: (typeof FLOATS)[number], n: number, blocksize: number, kind: Kind): Case {
  const id = caseId("quantize4bit", type, dtype, `n=${n}`, `bs=${blocksize}`, kind);
  return {
    id,
    primitive: "quantize4bit",
    dtype,
    inputs: () => ({ A: floats(dtype, n, kind, id) }),
    run: ({ A }) => {
      const [packed, state] = quantize4bit(A!, { blocksize, quantType: type, ...allows(kind) });
      return { packed, absmax: state.absmax };
    },
    expected: ({ A }) => {
      const { packed, absmax } = scalar.quantize4bit(A!.values, type, TABLES[type], blocksize);
      return {
        packed: { dtype: "u8", shape: [packed.length, 1], values: packed },
        absmax: { dtype: "f32", shape: [absmax.length], values: absmax },
      };
    },
  };
}

function nestedCase(type: Type, n: number, kind: Kind): Case {
  const id = caseId("quantize4bit", type, "bf16", `n=${n}`, "bs=64", "nested", kind);
  return {
    id,
    primitive: "quantize4bit",
    dtype: "bf16",
    inputs: () => ({ A: floats("bf16", n, kind, id) }),
    run: ({ A }) => {
      const [packed, state] = quantize4bit(A!, { quantType: type, compressStatistics: true, ...allows(kind) });
      return { packed, absmax: state.absmax, offset: state.offset!, absmax2: state.state2!.absmax };
    },
    expected: ({ A }) => {
      const { packed, absmax } = scalar.quantize4bit(A!.values, type, TABLES[type], 64);
      const offset = scalar.mean(absmax);
      const nested = scalar.quantizeBlockwise(absmax, createDynamicMap(), 256, offset);
      return {
        packed: { dtype: "u8", shape: [packed.length, 1], values: packed },
        absmax: { dtype: "u8", shape: [absmax.length], values: nested.q },
        offset: { dtype: "f32", shape: [], values: [offset] },
        absmax2: { dtype: "f32", shape: [nested.absmax.length], values: nested.absmax },
      };
    },
  };
}

/** Codes and scales in the middle of their allocations, from a view. */
function quantizeViewCase(type: Type, dtype: (typeof FLOATS)[number], lead: number, blocksize: number): Case {
  const id = caseId("quantize4bit", type, dtype, `view=${lead}`, `bs=${blocksize}`);
  const n = 5003;
  const behind = (lead * 5) % 16;
  return {
    id,
    primitive: "quantize4bit",
    dtype,
    lead: { A: lead },
    inputs: () => ({ A: floats(dtype, n, "edge", id) }),
    run: ({ A }, backend) => {
      const out = framed(backend, "u8", [Math.ceil(n / 2), 1], behind);
      const absmax = framed(backend, "f32", [Math.ceil(n / blocksize)], behind % 3);
      quantize4bit(A!, { blocksize, quantType: type, out: out.view, absmax: absmax.view });
      return { packed: out.base, absmax: absmax.base };
    },
    expected: ({ A }) => {
      const { packed, absmax } = scalar.quantize4bit(A!.values, type, TABLES[type], blocksize);
      return {
        packed: framedHost({ dtype: "u8", shape: [packed.length, 1], values: packed }, behind),
        absmax: framedHost({ dtype: "f32", shape: [absmax.length], values: absmax }, behind % 3),
      };
    },
  };
}

/** Packed codes in a tensor of another dtype, with the bytes that fill up its last element. */
function storageCase(type: Type, quantStorage: DType, n: number): Case {
  const id = caseId("quantize4bit", type, "bf16", `n=${n}`, `storage=${quantStorage}`);
  return {
    id,
    primitive: "quantize4bit",
    dtype: "bf16",
    inputs: () => ({ A: floats("bf16", n, "edge", id) }),
    run: ({ A }): Record<string, Tensor> => {
      const [packed, state] = quantize4bit(A!, { quantType: type, quantStorage });
      return { packed, y: dequantize4bit(packed, state) };
    },
    expected: ({ A }): Record<string, Host> => {
      const { packed, absmax } = scalar.quantize4bit(A!.values, type, TABLES[type], 64);
      const elements = Math.ceil(packed.length / DTYPE_BYTES[quantStorage]);
      const bytes = new Uint8Array(elements * DTYPE_BYTES[quantStorage]);
      bytes.set(packed);
      const y = scalar.dequantize4bit(packed, absmax, n, TABLES[type].values, 64, "bf16");
      return {
        packed: { dtype: quantStorage, shape: [elements, 1], values: [], bytes },
        y: { dtype: "bf16", shape: [n], values: y },
      };
    },
  };
}

function dequantizeCase(type: Type, dtype: (typeof FLOATS)[number], n: number, blocksize: number, scale: number): Case {
  const id = caseId("dequantize4bit", type, dtype, `n=${n}`, `bs=${blocksize}`, `scale=${scale}`);
  const blocks = Math.ceil(n / blocksize);
  return {
    id,
    primitive: "dequantize4bit",
    dtype,
    inputs: () => {
      const next = random(id);
      const packed = Uint8Array.from({ length: Math.ceil(n / 2) }, () => next() & 255);
      const absmax = Float32Array.from({ length: blocks }, () => ((next() % 10007) / 9973) * scale);
      return {
        packed: { dtype: "u8", shape: [packed.length, 1], values: packed },
        absmax: { dtype: "f32", shape: [blocks], values: absmax },
      };
    },
    run: ({ packed, absmax }): Record<string, Tensor> => {
      const state = new QuantState({ absmax: absmax!, shape: [n], dtype, blocksize, quantType: type });
      return { y: dequantize4bit(packed!, state) };
    },
    expected: ({ packed, absmax }): Record<string, Host> => ({
      y: {
        dtype,
        shape: [n],
        values: scalar.dequantize4bit(
          packed!.values as Uint8Array,
          absmax!.values as Float32Array,
          n,
          TABLES[type].values,
          blocksize,
          dtype,
        ),
      },
    }),
  };
}

/** Scales that are no scales: zero, infinite, NaN, denormal, negative. */
function oddScalesCase(type: Type, dtype: (typeof FLOATS)[number]): Case {
  const id = caseId("dequantize4bit", type, dtype, "n=2001", "bs=32", "odd-scales");
  const c = dequantizeCase(type, dtype, 2001, 32, 1);
  return { ...c, id, inputs: () => ({ ...c.inputs(), absmax: { dtype: "f32", shape: [63], values: oddScales(63) } }) };
}

function dequantizeViewCase(type: Type, dtype: (typeof FLOATS)[number], lead: number, blocksize: number): Case {
  const id = caseId("dequantize4bit", type, dtype, `view=${lead}`, `bs=${blocksize}`);
  const n = 5003;
  const c = dequantizeCase(type, dtype, n, blocksize, 1);
  const behind = (lead * 5) % 16;
  return {
    ...c,
    id,
    lead: { packed: lead, absmax: lead % 3 },
    run: ({ packed, absmax }, backend): Record<string, Tensor> => {
      const state = new QuantState({ absmax: absmax!, shape: [n], dtype, blocksize, quantType: type });
      const { view, base } = framed(backend, dtype, [n], behind);
      dequantize4bit(packed!, state, { out: view });
      return { base };
    },
    expected: (inputs, device): Record<string, Host> => ({ base: framedHost(c.expected(inputs, device).y!, behind) }),
  };
}

/** Twenty million elements that repeat with a period which is a multiple of nothing but the block. */
function largeCase(type: Type, dtype: (typeof FLOATS)[number]): Case {
  const id = caseId("quantize4bit", type, dtype, "n=20000003", "bs=32", "large");
  const n = 20_000_003;
  const period = 32 * 2017;
  const once = (): Host => floats(dtype, period, "edge", id);
  return {
    id,
    primitive: "quantize4bit",
    dtype,
    large: true,
    inputs: () => ({ A: { dtype, shape: [n], values: [], bytes: repeated(dtype, hostBytes(once()), n) } }),
    run: ({ A }): Record<string, Tensor> => {
      const [packed, state] = quantize4bit(A!, { quantType: type, blocksize: 32 });
      return { packed, absmax: state.absmax, y: dequantize4bit(packed, state) };
    },
    expected: (): Record<string, Host> => {
      // The last byte and the last scale are of a block that ends early.
      const values = once().values as Float32Array;
      const { packed, absmax } = scalar.quantize4bit(values, type, TABLES[type], 32);
      const rest = n % period;
      const last = scalar.quantize4bit(values.subarray(0, rest), type, TABLES[type], 32);
      const y = scalar.dequantize4bit(packed, absmax, period, TABLES[type].values, 32, dtype);
      const lastY = scalar.dequantize4bit(last.packed, last.absmax, rest, TABLES[type].values, 32, dtype);
      const periods = Math.floor(n / period);
      const host = (of: DType, whole: ArrayLike<number>, end: ArrayLike<number>): Host => {
        const a = hostBytes({ dtype: of, shape: [], values: whole });
        const b = hostBytes({ dtype: of, shape: [], values: end });
        const bytes = new Uint8Array(periods * a.length + b.length);
        bytes.set(repeated("u8", a, periods * a.length));
        bytes.set(b, periods * a.length);
        return { dtype: of, shape: [bytes.length / DTYPE_BYTES[of]], values: [], bytes };
      };
      const codes = host("u8", packed, last.packed);
      return {
        packed: { ...codes, shape: [...codes.shape, 1] },
        absmax: host("f32", absmax, last.absmax),
        y: host(dtype, y, lastY),
      };
    },
  };
}

export function* fourbitCases(): Generator<Case> {
  for (const type of TYPES) {
    for (const dtype of FLOATS) {
      for (const n of [...LENGTHS, ...TILE_LENGTHS]) yield quantizeCase(type, dtype, n, 64, n % 2 ? "edge" : "normal");
      for (const blocksize of [32, 128, 256, 512, 1024, 2048, 4096]) {
        for (const n of SHORT_LENGTHS) yield quantizeCase(type, dtype, n, blocksize, "edge");
      }
      for (const kind of EXTREMES) {
        for (const [n, blocksize] of EXTREME_SIZES) yield quantizeCase(type, dtype, n, blocksize, kind);
      }
      for (const n of [...LENGTHS, ...TILE_LENGTHS]) yield dequantizeCase(type, dtype, n, 64, 1);
      for (const blocksize of [32, 128, 256, 512, 1024, 2048, 4096]) {
        for (const n of [300, 4097]) yield dequantizeCase(type, dtype, n, blocksize, 1);
      }
      // Denormal and overflowing results in the narrow dtypes.
      for (const scale of [2 ** -20, 2 ** -130, 2 ** 17, 2 ** 127]) yield dequantizeCase(type, dtype, 333, 64, scale);
      yield oddScalesCase(type, dtype);
      for (const [lead, blocksize] of VIEWS) {
        yield quantizeViewCase(type, dtype, lead, blocksize);
        yield dequantizeViewCase(type, dtype, lead, blocksize);
      }
    }
    for (const n of [0, 1, 64, 16385, 131077]) yield nestedCase(type, n, "normal");
    for (const kind of ["edge", ...EXTREMES] as const) yield nestedCase(type, 40001, kind);
    for (const storage of DTYPES) for (const n of [1, 2, 7, 1001]) yield storageCase(type, storage, n);
  }
  yield largeCase("nf4", "bf16");
}
