/** Conversions: every pair of dtypes, every bit pattern of the halves, views of every alignment. */
import { DTYPES, type DType, type FloatDType, isFloat } from "#halfbyte/core/dtype.js";
import { normals, random } from "../helpers/random.js";
import * as scalar from "../helpers/scalar.js";
import { type Case, caseId, framed, framedHost, type Host, hostBytes, repeated } from "./case.js";

const N = [0, 1, 2, 7, 8, 9, 15, 17, 100, 2047, 4097, 20001];
const LEADS = [1, 2, 3, 7];

/** Round what each target dtype saturates, rounds and overflows at. */
const SPECIAL = [
  0,
  -0,
  0.5,
  -0.5,
  0.99,
  1.5,
  -1.5,
  2.5,
  -2.5,
  126.99,
  127,
  127.9,
  128,
  128.5,
  -128,
  -128.9,
  -129,
  254.9,
  255,
  255.5,
  256,
  -1,
  -0.99,
  32767,
  65503,
  65504,
  65519,
  65520,
  65536,
  1e5,
  2 ** 24 + 2,
  2147483520,
  2 ** 31,
  -(2 ** 31),
  -2147483904,
  3e9,
  -3e9,
  3.3895e38,
  3.4e38,
  -3.4e38,
  1e-8,
  2 ** -24,
  2 ** -25,
  2 ** -25 + 2 ** -40,
  2 ** -126,
  2 ** -149,
  -(2 ** -133),
  Number.NaN,
  Number.POSITIVE_INFINITY,
  Number.NEGATIVE_INFINITY,
];

function values(from: DType, n: number, seed: string): Host {
  const next = random(seed);
  const shift = next() % SPECIAL.length;
  const value = (i: number): number => {
    const bits = next();
    if (isFloat(from)) {
      if (i % 3 === 0) return scalar.round(from, Math.fround(SPECIAL[(i / 3 + shift) % SPECIAL.length]!));
      if (i % 3 === 1) return scalar.round(from, Math.fround((bits - 2 ** 31) / 2 ** (next() % 40)));
      return scalar.decode(from, from === "f32" ? bits : bits & 0xffff);
    }
    const [low, high] = scalar.INTEGERS[from];
    if (i < 2) return i === 0 ? low : high;
    return Math.max(low, Math.min(high, (bits | 0) >> (next() % 32)));
  };
  return { dtype: from, shape: [n], values: Array.from({ length: n }, (_, i) => value(i)) };
}

function converted(from: DType, to: DType, x: Host): Host {
  // A copy keeps what it copies.
  if (from === to) return { ...x, bytes: hostBytes(x) };
  return { dtype: to, shape: x.shape, values: Array.from(x.values, (v) => scalar.convert(from, to, v)) };
}

function convertCase(from: DType, to: DType, n: number): Case {
  const id = caseId("convert", from, to, `n=${n}`);
  return {
    id,
    primitive: "convert",
    dtype: from,
    inputs: () => ({ x: values(from, n, id) }),
    run: ({ x }) => ({ y: x!.to(to) }),
    expected: ({ x }) => ({ y: converted(from, to, x!) }),
  };
}

/** From a view into a view, both in the middle of their allocations. */
function viewCase(from: DType, to: DType, lead: number): Case {
  const id = caseId("convert", from, to, `view=${lead}`);
  const n = 1003;
  const behind = (lead * 5) % 8;
  return {
    id,
    primitive: "convert",
    dtype: from,
    lead: { x: lead },
    inputs: () => ({ x: values(from, n, id) }),
    run: ({ x }, backend) => {
      const { view, base } = framed(backend, to, [n], behind);
      view.copyFrom(x!);
      return { base };
    },
    expected: ({ x }) => ({ base: framedHost(converted(from, to, x!), behind) }),
  };
}

/** All 65,536 patterns of a half type. */
function patternCase(from: "f16" | "bf16", to: DType): Case {
  const bytes = (): Uint8Array<ArrayBuffer> => new Uint8Array(Uint16Array.from({ length: 65536 }, (_, i) => i).buffer);
  return {
    id: caseId("convert", from, to, "patterns"),
    primitive: "convert",
    dtype: from,
    inputs: () => ({
      x: {
        dtype: from,
        shape: [256, 256],
        values: Array.from({ length: 65536 }, (_, i) => scalar.decode(from, i)),
        bytes: bytes(),
      },
    }),
    run: ({ x }) => ({ y: x!.to(to) }),
    expected: ({ x }) => ({ y: converted(from, to, x!) }),
  };
}

/** float32 values at, below and above every value of a half type and every midpoint between two: its rounding both ways. */
function boundaryCase(to: "f16" | "bf16"): Case {
  const steps = to === "f16" ? [0, 1, 0x0fff, 0x1000, 0x1001, 0x1fff] : [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff];
  const bits = (): Uint32Array<ArrayBuffer> => {
    const patterns = new Uint32Array(65536 * steps.length);
    for (let i = 0, k = 0; i < 65536; i++) {
      const base = scalar.encode("f32", scalar.decode(to, i));
      for (const step of steps) patterns[k++] = base + step;
    }
    return patterns;
  };
  return {
    id: caseId("convert", "f32", to, "boundaries"),
    primitive: "convert",
    dtype: "f32",
    inputs: () => {
      const patterns = bits();
      const bytes = new Uint8Array(patterns.buffer);
      return { x: { dtype: "f32", shape: [patterns.length], values: new Float32Array(patterns.buffer), bytes } };
    },
    run: ({ x }) => ({ y: x!.to(to) }),
    expected: ({ x }) => ({ y: converted("f32", to, x!) }),
  };
}

/** More blocks of threads than 65,535 at 256 elements each. */
function largeCase(from: FloatDType, to: DType): Case {
  const n = 20_000_003;
  const period = 64_577;
  const id = caseId("convert", from, to, `n=${n}`, "large");
  const once = (): Host => ({
    dtype: from,
    shape: [period],
    values: normals(period, id).map((v) => scalar.round(from, v)),
  });
  return {
    id,
    primitive: "convert",
    dtype: from,
    large: true,
    inputs: () => ({ x: { dtype: from, shape: [n], values: [], bytes: repeated(from, hostBytes(once()), n) } }),
    run: ({ x }) => ({ y: x!.to(to) }),
    expected: () => {
      const bytes = repeated(to, hostBytes(converted(from, to, once())), n);
      return { y: { dtype: to, shape: [n], values: [], bytes } };
    },
  };
}

export function* convertCases(): Generator<Case> {
  for (const from of DTYPES) {
    for (const to of DTYPES) {
      for (const n of N) yield convertCase(from, to, n);
      for (const lead of LEADS) yield viewCase(from, to, lead);
    }
  }
  for (const from of ["f16", "bf16"] as const) {
    for (const to of DTYPES) yield patternCase(from, to);
    yield boundaryCase(from);
  }
  yield largeCase("f32", "bf16");
  yield largeCase("f16", "f32");
  yield largeCase("bf16", "i8");
}
