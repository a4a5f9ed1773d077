import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { DTYPES, type DType } from "#halfbyte/core/dtype.js";
import { init, shutdown, tensor } from "#halfbyte/index.js";
import { random } from "../helpers/random.js";
import { decode, encode, f32FromBits, round } from "../helpers/scalar.js";

beforeAll(async () => {
  await init({ threads: 2, guards: true });
});
afterAll(() => shutdown());

const patterns = Uint16Array.from({ length: 65536 }, (_, i) => i);
const bits32 = (a: Float32Array): Uint32Array => new Uint32Array(a.buffer, a.byteOffset, a.length);

describe("all 65,536 patterns", () => {
  for (const dtype of ["f16", "bf16"] as const) {
    const other = dtype === "f16" ? "bf16" : "f16";
    test(`${dtype} to f32 and back, and to ${other}`, () => {
      using t = tensor(patterns, { dtype });
      using wide = t.to("f32");
      const expected = Uint32Array.from(patterns, (p) => encode("f32", decode(dtype, p)));
      expect(Buffer.compare(Buffer.from(bits32(wide.dataSync()).buffer), Buffer.from(expected.buffer))).toBe(0);
      using back = wide.to(dtype);
      const again = new Uint16Array(back.bytesSync().buffer);
      expect(again.findIndex((b, i) => b !== encode(dtype, decode(dtype, patterns[i]!)))).toBe(-1);
      using crossed = t.to(other);
      const cross = new Uint16Array(crossed.bytesSync().buffer);
      expect(cross.findIndex((b, i) => b !== encode(other, round(other, decode(dtype, patterns[i]!))))).toBe(-1);
    });
  }
});

test("f32 to f16 and bf16: rounding boundaries, denormals, overflow, NaN", () => {
  const next = random("boundaries");
  const values: number[] = [];
  for (const dtype of ["f16", "bf16"] as const) {
    for (let i = 0; i < 65536; i += 3) {
      const bits = encode("f32", decode(dtype, i));
      for (const step of [0, 1, 0x0fff, 0x1000, 0x1001, 0x7fff, 0x8000, 0x8001])
        values.push(f32FromBits((bits + step) >>> 0));
    }
  }
  for (let i = 0; i < 100_000; i++) values.push(f32FromBits(next()));
  const source = Float32Array.from(values);
  using t = tensor(source);
  for (const dtype of ["f16", "bf16"] as const) {
    using half = t.to(dtype);
    const got = new Uint16Array(half.bytesSync().buffer);
    const bad = got.findIndex((b, i) => b !== encode(dtype, round(dtype, source[i]!)));
    expect(bad < 0 ? "" : `${dtype} of ${source[bad]}: ${got[bad]}`).toBe("");
  }
});

test("every pair of dtypes at awkward lengths", () => {
  const ranges: Record<DType, [number, number]> = {
    f32: [0, 0],
    f16: [0, 0],
    bf16: [0, 0],
    i8: [-128, 127],
    u8: [0, 255],
    i32: [-(2 ** 31), 2 ** 31 - 1],
  };
  const special = [
    0,
    -0,
    1.5,
    -1.5,
    2.5,
    -2.5,
    127.9,
    128,
    -128.9,
    -129,
    255.5,
    256,
    -1,
    3e9,
    -3e9,
    65504,
    65520,
    1e-8,
    Number.NaN,
    Number.POSITIVE_INFINITY,
    Number.NEGATIVE_INFINITY,
  ];
  for (const from of DTYPES) {
    for (const n of [0, 1, 7, 8, 15, 16, 17, 21, 100, 65537]) {
      const isFloat = from === "f32" || from === "f16" || from === "bf16";
      const next = random(`${from}${n}`);
      const values = Array.from({ length: n }, (_, i) => {
        if (isFloat) return round(from, i < special.length ? special[i]! : (next() - 2 ** 31) / 2 ** (next() % 40));
        const [low, high] = ranges[from];
        return i === 0 ? low : i === 1 ? high : low + (next() % (high - low + 1));
      });
      using x = tensor(values, { dtype: from });
      for (const to of DTYPES) {
        using y = x.to(to);
        using f = to === "f16" || to === "bf16" ? y.to("f32") : y.clone();
        const got = f.dataSync() as ArrayLike<number>;
        for (let i = 0; i < n; i++) {
          const v = values[i]!;
          const [low, high] = ranges[to];
          const want =
            to === "f32" || to === "f16" || to === "bf16"
              ? round(to, Math.fround(v))
              : Number.isNaN(v)
                ? 0
                : Math.max(low, Math.min(high, Math.trunc(v))) + 0;
          if (!Object.is(got[i], want))
            expect.fail(`${from} to ${to}, n=${n}: [${i}] ${v} gave ${got[i]}, expected ${want}`);
        }
      }
    }
  }
});
