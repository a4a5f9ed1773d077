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
import { type Case, caseId, FLOATS, floats, type Host, type Kind, LENGTHS, SHORT_LENGTHS } from "./case.js";

const TYPES = ["nf4", "fp4"] as const;
type Type = (typeof TYPES)[number];

export const TABLES: Record<Type, scalar.FourBitTables> = {
  nf4: { values: NF4_VALUES, thresholds: NF4_THRESHOLDS },
  fp4: { values: FP4_VALUES, thresholds: FP4_THRESHOLDS, magnitudes: FP4_RANKS },
};

function quantizeCase(type: Type, dtype: (typeof FLOATS)[number], n: number, blocksize: number, kind: Kind): Case {
  const id = caseId("quantize4bit", type, dtype, `n=${n}`, `bs=${blocksize}`, kind);
  return {
    id,
    primitive: "quantize4bit",
    dtype,
    inputs: () => ({ A: floats(dtype, n, kind, id) }),
    run: ({ A }) => {
      const [packed, state] = quantize4bit(A!, { blocksize, quantType: type });
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
      const [packed, state] = quantize4bit(A!, { quantType: type, compressStatistics: true });
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

export function* fourbitCases(): Generator<Case> {
  for (const type of TYPES) {
    for (const dtype of FLOATS) {
      for (const n of LENGTHS) yield quantizeCase(type, dtype, n, 64, n % 2 ? "edge" : "normal");
      for (const blocksize of [32, 128, 256, 512, 1024, 2048, 4096]) {
        for (const n of SHORT_LENGTHS) yield quantizeCase(type, dtype, n, blocksize, "edge");
      }
      for (const n of LENGTHS) yield dequantizeCase(type, dtype, n, 64, 1);
      for (const blocksize of [32, 128, 4096]) yield dequantizeCase(type, dtype, 4097, blocksize, 1);
      // Denormal and overflowing results in the narrow dtypes.
      for (const scale of [2 ** -20, 2 ** -130, 2 ** 17, 2 ** 127]) yield dequantizeCase(type, dtype, 333, 64, scale);
    }
    for (const n of [0, 1, 64, 16385, 131077]) yield nestedCase(type, n, "normal");
    yield nestedCase(type, 40001, "edge");
  }
}
