/** The scalar references of int8 against bitsandbytes' own results, and their fused multiply-add against integer arithmetic. */
import { expect, test } from "vitest";
import { bytesOf, loadReal } from "../golden/files.js";
import { random } from "./random.js";
import { decode, f32Bits, f32FromBits } from "./scalar.js";
import * as scalar from "./scalar-int8.js";

const { fma32 } = scalar;

test("the references give bitsandbytes' codes, scales, outliers and products", async () => {
  const file = await loadReal("int8.safetensors");
  let [ties, codes] = [0, 0];
  const compareCodes = (ours: Int8Array, theirs: Int8Array, what: string) => {
    codes += ours.length;
    for (let i = 0; i < ours.length; i++) {
      // At a half, where bitsandbytes' approximate reciprocal decides.
      if (ours[i] !== theirs[i]) ties++;
      if (Math.abs(ours[i]! - theirs[i]!) > 1) expect.fail(`${what}: code ${i} is ${ours[i]}, not ${theirs[i]}`);
    }
  };
  for (const c of file.cases) {
    const { M, N, K, threshold } = c as Record<string, number>;
    const [m, n, k] = [M!, N!, K!];
    const raw = (field: string) =>
      bytesOf(file, (c[field] ?? (c.double as Record<string, string>)[field]) as string).slice().buffer;
    const half = (field: string) => Array.from(new Uint16Array(raw(field)), (bits) => decode("f16", bits));
    const f32 = (field: string) => new Float32Array(raw(field));
    const i8 = (field: string) => new Int8Array(raw(field));
    const weight = scalar.int8VectorwiseQuant(half("W"), n, k);
    compareCodes(weight.q, i8("CB"), "CB");
    expect(weight.scale).toEqual(f32("SCB"));
    const A = half("A");
    const rows = scalar.int8VectorwiseQuant(A, m, k, threshold);
    compareCodes(rows.q, i8("CA"), "CA");
    expect(rows.scale).toEqual(f32("SCA"));
    const outliers = threshold! > 0 ? new Int32Array(raw("outlier_cols")) : new Int32Array();
    expect([...rows.outliers.columns.subarray(0, rows.outliers.count)]).toEqual([...outliers]);
    const columns = scalar.int8ColumnQuant(A, m, k, "f16", threshold!);
    expect(columns.stats).toEqual(f32("col_stats"));
    expect(columns.q).toEqual(i8("col"));
    compareCodes(rows.q, i8("row"), "row");
    const products = scalar.igemm([m, n, k], i8("CA"), i8("CB"));
    expect(products).toEqual(new Int32Array(raw("C32")));
    const dequantized = scalar.int8MmDequant(products, f32("SCA"), f32("SCB"), half("bias"), "f16");
    expect(dequantized).toEqual(half("dequant_bias"));
  }
  expect(ties).toBeLessThan(codes / 10_000);
});

/** A finite float32 as an integer multiple of 2^-149. */
function integer(x: number): bigint {
  const bits = f32Bits(Math.abs(x));
  const exponent = bits >>> 23;
  const value = BigInt(exponent ? (bits & 0x7fffff) | 0x800000 : bits & 0x7fffff) << BigInt(Math.max(exponent, 1) - 1);
  return x < 0 ? -value : value;
}

/** a * b + c to the nearest float32, ties to even: the candidates round the float64 value, by their exact distances. */
function exactly(a: number, b: number, c: number): number {
  const exact = integer(a) * integer(b) + (integer(c) << 149n);
  const near = Math.fround(a * b + c);
  const bits = f32Bits(Math.abs(near));
  let best = near;
  let least: bigint | undefined;
  for (const candidate of [bits - 1, bits, bits + 1].filter((v) => v >= 0 && v < 0x7f800000)) {
    for (const sign of [1, -1]) {
      const value = sign * f32FromBits(candidate);
      const distance = (integer(value) << 149n) - exact;
      const away = distance < 0n ? -distance : distance;
      if (least === undefined || away < least || (away === least && candidate % 2 === 0)) {
        least = away;
        best = value;
      }
    }
  }
  return best;
}

test("fma32 rounds once, where float64 would round twice", () => {
  const next = random("fma");
  let twice = 0;
  for (let i = 0; i < 30_000; i++) {
    const any = () => f32FromBits(((next() & 0x807fffff) | ((100 + (next() % 50)) << 23)) >>> 0);
    const a = any();
    const b = any();
    // Often just beyond the last bit of the product, and beside the middle of two float32 numbers.
    const product = Math.fround(a * b);
    const middle = a * b - product;
    const c =
      i % 3 === 0
        ? any()
        : i % 3 === 1
          ? Math.fround(product * 2 ** 24 - middle)
          : Math.fround(-product + any() * 2 ** -20);
    const expected = exactly(a, b, c);
    if (Math.abs(fma32(a, b, c)) !== Math.abs(expected))
      expect.fail(`${a} * ${b} + ${c}: ${fma32(a, b, c)}, not ${expected}`);
    if (Math.fround(a * b + c) !== expected) twice++;
  }
  // Products that end in the middle of two numbers with c far below are rarer than chance finds: made by hand.
  const [a, b] = [1 + 2 ** -12, 1 + 2 ** -12];
  for (const tiny of [2 ** -80, -(2 ** -80), 2 ** -140]) {
    const expected = exactly(a, b, tiny);
    expect(fma32(a, b, tiny)).toBe(expected);
    if (Math.fround(a * b + tiny) !== expected) twice++;
  }
  expect(twice).toBeGreaterThan(0);
  expect(fma32(Number.NaN, 1, 1)).toBeNaN();
  expect(fma32(3e38, 3e38, -1)).toBe(Number.POSITIVE_INFINITY);
  expect(fma32(2, 3, -6)).toBe(0);
});
