import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { createDynamicMap, createFp8Map, createLinearMap, createNormalMap } from "#halfbyte/quant/codebooks.js";
import { buildSearchTable, SEARCH_HEADER, SEARCH_SHIFT, searchCode, stateCode } from "#halfbyte/quant/search-table.js";

const CODEBOOKS: Record<string, Float32Array> = {
  dynamic: createDynamicMap(),
  "unsigned dynamic": createDynamicMap(false),
  "4-bit dynamic": createDynamicMap(true, 7, 4),
  linear: createLinearMap(),
  "unsigned linear": createLinearMap(false),
  "linear without zero": createLinearMap(true, 8, false),
  "fp8 e5m2": createFp8Map(true, 5, 2),
  "fp8 e4m3": createFp8Map(true, 4, 3),
  normal: createNormalMap(),
};

const word = new Uint32Array(1);
const float = new Float32Array(word.buffer);
function bitsOf(value: number): number {
  float[0] = value;
  return word[0]!;
}
function fromBits(bits: number): number {
  word[0] = bits;
  return float[0]!;
}

/** What a kernel does with the table. */
function lookUp(table: Uint8Array, s: number): number {
  const bits = bitsOf(s);
  const i = bits & 0x80000000 ? ~bits : bits;
  const entry = new DataView(table.buffer, table.byteOffset + SEARCH_HEADER).getUint32((i >>> SEARCH_SHIFT) * 4, true);
  return (entry + i) >>> 24;
}

/** The nearest code, by looking at all: the rule of the contract with nothing clever about it. */
function nearest(code: Float32Array, scaled: number): number {
  const s = Math.abs(scaled) < 2 ** -126 ? 0 : scaled;
  if (s > code[255]!) return 255;
  const high = code.findIndex((value) => value >= s);
  if (high === 0) return 0;
  const middle = Math.fround(Math.fround(code[high - 1]! + code[high]!) * 0.5);
  if (s === middle) return high % 2 === 0 ? high : high - 1;
  return s > middle ? high : high - 1;
}

/** Values that matter: around each code and boundary, around zero and the smallest normals. */
function critical(code: Float32Array, ulps: number): number[] {
  const values: number[] = [0, -0, 1, -1];
  const add = (value: number, reach: number): void => {
    const bits = bitsOf(value);
    for (let k = -reach; k <= reach; k++) {
      const magnitude = (bits & 0x7fffffff) + k;
      if (magnitude >= 0 && magnitude <= 0x3f800000) values.push(fromBits((bits & 0x80000000) | magnitude));
    }
  };
  for (let i = 0; i < 256; i++) {
    add(code[i]!, 2);
    if (i > 0) add(Math.fround(Math.fround(code[i - 1]! + code[i]!) * 0.5), ulps);
  }
  for (const value of [2 ** -149, 2 ** -126, -(2 ** -149), -(2 ** -126)]) add(value, 2);
  return values;
}

function mismatches(
  values: Iterable<number>,
  actual: (s: number) => number,
  expected: (s: number) => number,
): string[] {
  const found: string[] = [];
  for (const s of values) {
    if (actual(s) !== expected(s)) found.push(`${s}: ${actual(s)}, expected ${expected(s)}`);
  }
  return found.slice(0, 5);
}

describe.each(Object.entries(CODEBOOKS))("search in the %s codebook", (_name, code) => {
  const table = buildSearchTable(code)!;

  test("has a table", () => {
    expect(table).toBeInstanceOf(Uint8Array);
    expect(table.length).toBe(SEARCH_HEADER + 4 * 2 ** (31 - SEARCH_SHIFT));
  });

  test("the binary search equals the plain rule", () => {
    const actual = (s: number): number => searchCode(code, s);
    expect(mismatches(critical(code, 3), actual, (s) => nearest(code, s))).toEqual([]);
  });

  test("the table equals the search within 1,000 ulp of every boundary", () => {
    const actual = (s: number): number => lookUp(table, s);
    expect(mismatches(critical(code, 1000), actual, (s) => searchCode(code, s))).toEqual([]);
  });

  test("the table equals the search on every bfloat16 and on float16's mantissas", () => {
    function* values(): Generator<number> {
      for (let upper = 0; upper < 0x10000; upper++) {
        if ((upper & 0x7fff) > 0x3f80) continue;
        yield fromBits(upper * 0x10000);
        if ((upper & 0x7fff) < 0x3f80) for (let k = 1; k < 8; k++) yield fromBits(upper * 0x10000 + k * 0x2000);
      }
    }
    expect(
      mismatches(
        values(),
        (s) => lookUp(table, s),
        (s) => searchCode(code, s),
      ),
    ).toEqual([]);
  });

  test("the header holds the smallest magnitude with another code than zero", () => {
    const floor = new Float32Array(table.buffer, table.byteOffset, 1)[0]!;
    const zero = searchCode(code, 0);
    const differs = (s: number): boolean => searchCode(code, s) !== zero || searchCode(code, -s) !== zero;
    expect(floor).toBeGreaterThan(0);
    expect(floor).toBeLessThan(1);
    expect(differs(floor)).toBe(true);
    expect(differs(fromBits(bitsOf(floor) - 1))).toBe(false);
  });
});

/** The scaled states that matter beside `critical`: both zeros, every power of two with its sign, denormals. */
function* states(code: Float32Array): Generator<number> {
  yield* critical(code, 1000);
  for (let upper = 0; upper < 0x10000; upper++) {
    if ((upper & 0x7fff) <= 0x3f80) for (const lower of [0, 1, 0x8000, 0xffff]) yield fromBits(upper * 0x10000 + lower);
  }
}

describe("optimizer states", () => {
  const signed = createDynamicMap();
  const unsigned = createDynamicMap(false);
  const zero = signed.indexOf(0);

  /** The contract's words: the nearest code, denormals kept; a set sign never gets the zero. */
  function plain(code: Float32Array, s: number): number {
    let best = s > code[255]! ? 255 : code.findIndex((value) => value >= s);
    if (best > 0 && s <= code[255]!) {
      const middle = Math.fround(Math.fround(code[best - 1]! + code[best]!) * 0.5);
      if (s < middle || (s === middle && best % 2 === 1)) best--;
    }
    return bitsOf(s) >= 0x80000000 && best > 0 && code[best] === 0 ? best - 1 : best;
  }

  test("the signed map's table has the sign rule", () => {
    const table = buildSearchTable(signed, { state: true })!;
    const values = [...states(signed)];
    const rule = (s: number): number => stateCode(signed, s);
    expect(
      mismatches(values, rule, (s) => plain(signed, s)),
      "the rule",
    ).toEqual([]);
    expect(
      mismatches(values, (s) => lookUp(table, s), rule),
      "the table",
    ).toEqual([]);
    expect([0, 2 ** -149, -0, -(2 ** -149), -(2 ** -126)].map((s) => lookUp(table, s))).toEqual([
      zero,
      zero,
      zero - 1,
      zero - 1,
      zero - 1,
    ]);
  });

  test("the sign rule changes nothing but the zero of negatives", () => {
    const table = buildSearchTable(signed)!;
    const withRule = buildSearchTable(signed, { state: true })!;
    const expected = (s: number): number => {
      const code = lookUp(table, s);
      return code === zero && bitsOf(s) >= 0x80000000 ? zero - 1 : code;
    };
    expect(mismatches(states(signed), (s) => lookUp(withRule, s), expected)).toEqual([]);
  });

  test("the unsigned map's plain table serves second moments, denormals among them", () => {
    const table = buildSearchTable(unsigned)!;
    const values = [...states(unsigned)].filter((s) => bitsOf(s) < 0x80000000);
    expect(
      mismatches(
        values,
        (s) => lookUp(table, s),
        (s) => plain(unsigned, s),
      ),
    ).toEqual([]);
    expect(unsigned[0]).toBe(0);
  });
});

describe("any sorted codebook", () => {
  test("a table, where there is one, is exact", () => {
    let tables = 0;
    const magnitude = fc.integer({ min: 0, max: 0x3f800000 });
    const value = fc.tuple(magnitude, fc.boolean()).map(([bits, negative]) => fromBits(bits) * (negative ? -1 : 1));
    const scattered = fc.array(value, { maxLength: 256, size: "max" });
    const spaced = fc
      .array(fc.integer({ min: 2, max: 9 }), { minLength: 2, maxLength: 120, size: "max" })
      .map((steps) => {
        const total = steps.reduce((a, b) => a + b);
        let sum = 0;
        return steps.map((step) => {
          sum += step;
          return (2 * sum) / total - 1;
        });
      });
    fc.assert(
      fc.property(fc.oneof(scattered, spaced), (values) => {
        const code = new Float32Array(256);
        code.set(values);
        code.sort();
        const inputs = critical(code, 2);
        expect(
          mismatches(
            inputs,
            (s) => searchCode(code, s),
            (s) => nearest(code, s),
          ),
        ).toEqual([]);
        const table = buildSearchTable(code);
        if (!table) return;
        tables++;
        expect(
          mismatches(
            inputs,
            (s) => lookUp(table, s),
            (s) => searchCode(code, s),
          ),
        ).toEqual([]);
      }),
      { numRuns: 60, seed: 1 },
    );
    expect(tables).toBeGreaterThan(10);
  });

  test("boundaries that are too close need the exact search", () => {
    const code = createLinearMap();
    code[200] = fromBits(bitsOf(code[199]!) + 2);
    code[201] = fromBits(bitsOf(code[199]!) + 4);
    expect(buildSearchTable(code)).toBeNull();
  });

  test("a step over equal codes that are not zero needs the exact search", () => {
    const code = createLinearMap();
    code[200] = code[199]!;
    code[201] = code[199]!;
    expect(searchCode(code, code[199]!)).toBe(199);
    expect(searchCode(code, fromBits(bitsOf(code[199]!) + 1))).toBe(201);
    expect(buildSearchTable(code)).toBeNull();
  });

  test("a codebook of one value gives code 0 or the first zero", () => {
    const zeros = buildSearchTable(new Float32Array(256))!;
    expect(lookUp(zeros, 0)).toBe(0);
    expect(lookUp(zeros, 0.5)).toBe(255);
    expect(lookUp(zeros, -0.5)).toBe(0);
  });
});
