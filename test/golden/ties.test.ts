/** The tie proof against exact integer arithmetic. */

import { describe, expect, test } from "vitest";
import { CaseRun } from "#halfbyte/golden/case-run.js";
import { f32Bits, f32FromBits, f32Step, f32Ulp, ulpsApart } from "#halfbyte/golden/float-bits.js";
import { allowedCodes, blockwiseRule, fourBitRule, INT8_RULE, TIE_ULPS } from "#halfbyte/golden/ties.js";
import { createDynamicMap, createFp8Map, FP4_THRESHOLDS, NF4_THRESHOLDS } from "#halfbyte/quant/codebooks.js";
import { random } from "../helpers/random.js";

const TINY = 2 ** -126;

/** A finite float32 as an integer multiple of 2^-149. */
function integer(x: number): bigint {
  const bits = f32Bits(Math.abs(x));
  const exponent = bits >>> 23;
  const significand = BigInt(exponent ? (bits & 0x7fffff) | 0x800000 : bits & 0x7fffff);
  const value = significand << BigInt(Math.max(exponent, 1) - 1);
  return x < 0 ? -value : value;
}

/** |t - x * factor / absmax| <= TIE_ULPS * ulp(t), in integers. */
function isNear(t: number, x: number, factor: number, absmax: number): boolean {
  // Everything times 2^149 twice.
  const difference = integer(t) * integer(absmax) - (integer(x) << 149n) * BigInt(factor);
  const bound = BigInt(TIE_ULPS) * integer(f32Ulp(t)) * integer(absmax);
  return (difference < 0n ? -difference : difference) <= bound;
}

const DYNAMIC = createDynamicMap();
const FP8 = createFp8Map();
const RULES = {
  nf4: fourBitRule("nf4"),
  fp4: fourBitRule("fp4"),
  dynamic: blockwiseRule(DYNAMIC),
  fp8: blockwiseRule(FP8),
  int8: INT8_RULE,
};

describe("allowedCodes", () => {
  for (const [name, rule] of Object.entries(RULES)) {
    test(`${name}: the codes of exactly the float32 values within ${TIE_ULPS} ulp of the exact ratio`, () => {
      const next = random(name);
      let ambiguous = 0;
      for (let i = 0; i < 20_000; i++) {
        const absmax = f32FromBits(0x3f000000 + (next() % 0x1000000));
        // Values that scale to the neighbourhood of a boundary, where it matters.
        const target = rule.factor === 127 ? (next() % 127) - 63.5 : boundary(rule, next);
        const x = Math.fround(f32Step(Math.fround((target * absmax) / rule.factor), (next() % 9) - 4));
        const expected = new Set<number>();
        const centre = Math.fround((x * rule.factor) / absmax);
        for (let step = -8; step <= 8; step++) {
          const t = f32Step(centre, step);
          if (isNear(t, x, rule.factor, absmax)) expected.add(rule.decide(t));
        }
        const allowed = allowedCodes(rule, x, absmax);
        if ([...allowed].sort().join() !== [...expected].sort().join()) {
          expect.fail(`x ${x} absmax ${absmax}: allowed ${[...allowed]}, exactly ${[...expected]}`);
        }
        if (allowed.size > 1) ambiguous++;
      }
      // Otherwise nothing was tested.
      expect(ambiguous).toBeGreaterThan(4000);
    });
  }

  test("is one code 3 ulp from a boundary and two codes 2 ulp from it", () => {
    const boundary = NF4_THRESHOLDS[10]!;
    const { nf4 } = RULES;
    for (let step = -6; step <= 6; step++) {
      const codes = [...allowedCodes(nf4, f32Step(boundary, step), 1)].sort();
      // A value on the threshold goes down, so the boundary lies just above it.
      const expected = step <= -TIE_ULPS ? "10" : step > TIE_ULPS ? "11" : "10,11";
      expect(codes.join(), `step ${step}`).toBe(expected);
    }
  });

  test("a zero block has code 0 and nothing else, whatever lies in it", () => {
    for (const rule of [RULES.nf4, RULES.fp4, RULES.dynamic]) {
      for (const [x, absmax] of [
        [0, 0],
        [TINY / 2, TINY / 2],
        [-TINY / 2, 0],
        [1, 0],
      ] as const) {
        expect([...allowedCodes(rule, x, absmax)]).toEqual([0]);
      }
    }
    expect([...allowedCodes(RULES.int8, 0, 0)]).toEqual([0]);
  });

  test("denormals count as zero: no negative FP4 code for them", () => {
    expect([...allowedCodes(RULES.fp4, -TINY / 2, TINY)]).toEqual([0]);
    expect([...allowedCodes(RULES.fp4, -TINY, 1)].sort()).toEqual([0, 8]);
    expect([...allowedCodes(RULES.fp4, -4 * TINY, 1)]).toEqual([8]);
    expect([...allowedCodes(RULES.nf4, TINY / 2, TINY)]).toEqual([7]);
  });
});

function boundary({ decide }: { decide: (s: number) => number }, next: () => number): number {
  if (decide === RULES.nf4.decide) return NF4_THRESHOLDS[next() % 15]!;
  if (decide === RULES.fp4.decide) return FP4_THRESHOLDS[next() % 7]! * (next() & 1 ? 1 : -1);
  const code = decide === RULES.dynamic.decide ? DYNAMIC : FP8;
  const i = next() % 255;
  return Math.fround(Math.fround(code[i]! + code[i + 1]!) * 0.5);
}

describe("CaseRun.codes", () => {
  const golden = { field: "q", name: "t", dtype: "u8", shape: [4], bytes: new Uint8Array(4) } as const;
  const boundary = NF4_THRESHOLDS[10]!;
  const values = [boundary, 1, 0, 0];
  const compare = (expected: number[], got: number[]) => {
    const run = new CaseRun({ op: "quantize_4bit", index: 0, file: { name: "f" } } as never, "cpu");
    const rule = RULES.nf4;
    const ties = run.codes({
      golden,
      shape: [4],
      expected,
      got,
      rule,
      value: (i) => values[i]!,
      absmax: () => 1,
      count: 3,
    });
    return { run, ties: [...ties] };
  };

  test("counts a tie and says where", () => {
    const { run, ties } = compare([10, 15, 7, 7], [11, 15, 7, 7]);
    expect(ties).toEqual([0]);
    expect(run.ties).toBe(1);
    expect(run.failures).toEqual([]);
  });

  test("is no tie when the computed code is wrong, although golden's is at a boundary", () => {
    const { run } = compare([10, 15, 7, 7], [12, 15, 7, 7]);
    expect(run.ties).toBe(0);
    expect(run.failures).toMatchObject([
      { field: "q", tensor: "t", mismatches: 1, worst: { index: 0, expected: 10, got: 12, scaled: boundary } },
    ]);
  });

  test("is no tie when golden's code is wrong, although the computed one is at a boundary", () => {
    expect(compare([9, 15, 7, 7], [10, 15, 7, 7]).run.failures).toHaveLength(1);
  });

  test("is no tie away from boundaries or in the padding; the worst is the furthest off", () => {
    const { run } = compare([10, 14, 7, 7], [10, 15, 0, 8]);
    expect(run.failures).toMatchObject([{ mismatches: 3, worst: { index: 2, expected: 7, got: 0 } }]);
    expect(compare([10, 15, 7, 7], [10, 15, 7, 8]).run.failures).toMatchObject([{ worst: { index: 3 } }]);
  });
});

describe("floats by their bits", () => {
  test("steps and distances go through zero and between binades", () => {
    expect(f32Step(0, 1)).toBe(2 ** -149);
    expect(f32Step(2 ** -149, -2)).toBe(-(2 ** -149));
    expect(f32Step(1, -1)).toBe(1 - 2 ** -24);
    expect(f32Ulp(1)).toBe(2 ** -23);
    expect(f32Ulp(-TINY / 2)).toBe(2 ** -149);
    expect(ulpsApart("f32", f32Bits(-(2 ** -149)), f32Bits(2 ** -149))).toBe(2);
    expect(ulpsApart("f32", f32Bits(0), 0x80000000)).toBe(0);
    expect(ulpsApart("bf16", 0x3f80, 0x3f7f)).toBe(1);
    expect(ulpsApart("f16", 0x8001, 0x0001)).toBe(2);
    expect(ulpsApart("f16", 0x7e00, 0x3c00)).toBe(Number.POSITIVE_INFINITY);
  });
});
