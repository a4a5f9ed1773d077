/** `checkGolden` on bitsandbytes' products: the part of them that is here, damaged copies of it, and all of them where they are. */

import { afterAll, describe, expect, test } from "vitest";
import { memory, shutdown } from "#halfbyte/backend/devices.js";
import { checkGolden } from "#halfbyte/golden/check.js";
import { isPassed } from "#halfbyte/golden/report.js";
import { bytesOf, type CaseFields, type Editable, loadReal, REAL_DIR, serialize, withDir } from "./files.js";

afterAll(shutdown);

const GEMM = ["gemm4_f32", "gemm4_f16", "gemm4_bf16"] as const;
const file = (name: string): string => `${name}.safetensors`;

const INT8_TIES = 9;

test("all cases pass, and nothing leaks", async () => {
  const report = await checkGolden(REAL_DIR, { device: "cpu" });
  expect(report.failures).toEqual([]);
  expect(report.notRun).toEqual([]);
  expect(report.ops).toMatchObject({
    gemm_4bit: { passed: 16, failed: 0, notRun: 0, ties: 0 },
    int8: { passed: 3, failed: 0, notRun: 0, ties: INT8_TIES },
  });
  expect(memory().cpu).toMatchObject({ tensors: 0, bytes: 0 });
});

test("the cases here have every number of rows, both types, nested scales and block sizes, and every threshold", async () => {
  const values = (cases: CaseFields[], key: string) => [...new Set(cases.map((c) => c[key]))].sort();
  for (const name of GEMM) {
    const { cases } = await loadReal(file(name));
    expect(values(cases, "M"), name).toEqual([1, 17, 2, 4, 64]);
    expect(values(cases, "quant_type"), name).toEqual(["fp4", "nf4"]);
    expect(values(cases, "nested"), name).toEqual([false, true]);
    if (name !== "gemm4_f32") expect(values(cases, "blocksize"), name).toEqual([128, 64]);
  }
  const { cases } = await loadReal(file("int8"));
  expect(values(cases, "threshold")).toEqual([0, 3, 6]);
});

const full = process.env.HALFBYTE_GOLDEN;
test.skipIf(!full)(
  `all 81 + 12 products of the whole set pass${full ? "" : " (skipped: HALFBYTE_GOLDEN names no folder with it)"}`,
  async () => {
    const counts: Record<string, number> = {};
    for (const name of [...GEMM, "int8"]) {
      const { cases } = await loadCases(`${full}/${file(name)}`);
      for (let i = 0; i < cases.length; i++) {
        const report = await checkGolden(full!, { device: "cpu", only: `${name}:${i}` });
        expect(report.failures, `${name}:${i}`).toEqual([]);
        expect(isPassed(report), `${name}:${i}`).toBe(true);
        counts[name] = (counts[name] ?? 0) + 1;
      }
    }
    expect(counts).toEqual({ gemm4_f32: 27, gemm4_f16: 27, gemm4_bf16: 27, int8: 12 });
  },
);

async function loadCases(path: string): Promise<{ cases: unknown[] }> {
  const { SafetensorsFile } = await import("#halfbyte/formats/safetensors.js");
  const source = await SafetensorsFile.open(path);
  const cases = JSON.parse(source.metadata.get("cases")!) as unknown[];
  await source.close();
  return { cases };
}

/** Checks the case with this index alone, after `change` has been at a copy of its file. */
async function damaged(name: string, index: number, change: (copy: Editable, c: CaseFields) => void) {
  const real = await loadReal(file(name));
  const copy = { ...real, cases: [structuredClone(real.cases[index]!)], data: real.data.slice() };
  change(copy, copy.cases[0]!);
  return withDir({ [file(name)]: serialize(copy) }, (dir) => checkGolden(dir, { device: "cpu" }));
}

/** The tensor that a case names: by a key, or by a key of an object inside it. */
function nameOf(c: CaseFields, field: string): string {
  const [key, inner] = field.split(".") as [string, string?];
  const value = c[key];
  return (inner === undefined ? value : (value as Record<string, string>)[inner]) as string;
}

function flip(field: string, byte: number, bits: number) {
  return (copy: Editable, c: CaseFields): void => {
    const bytes = bytesOf(copy, nameOf(c, field));
    const at = byte < 0 ? bytes.length + byte : byte;
    bytes[at] = bytes[at]! ^ bits;
  };
}

describe("a damaged copy of a 4-bit product fails", () => {
  // Cases of one row, of several with nested scales, and of many.
  for (const [name, index] of [
    ["gemm4_f32", 0],
    ["gemm4_f32", 2],
    ["gemm4_f16", 5],
    ["gemm4_bf16", 3],
  ] as const) {
    test(`${name}:${index}`, async () => {
      const nested = (await loadReal(file(name))).cases[index]!.nested as boolean;
      const size = name === "gemm4_f32" ? 4 : 2;
      const damages: readonly [string, (copy: Editable, c: CaseFields) => void, string][] = [
        ["a code", flip("packed", 1000, 0x80), "out"],
        ["the sign of an activation", flip("A", size * 7 - 1, 0x80), "out"],
        nested
          ? ["a scale's code", flip("state.absmax", 100, 0x40), "out"]
          : ["a scale", flip("state.absmax", 403, 0x01), "out"],
      ];
      for (const [what, change, field] of damages) {
        const report = await damaged(name, index, change);
        expect(
          report.failures.map((f) => f.field),
          what,
        ).toContain(field);
        expect(report.ops, what).toMatchObject({ gemm_4bit: { passed: 0, failed: 1 } });
        expect(report.failures[0]!.problem, what).toMatch(/relative error/);
      }
      const good = await damaged(name, index, () => {});
      expect(good.ops).toMatchObject({ gemm_4bit: { passed: 1, failed: 0 } });
      expect(memory().cpu?.tensors).toBe(0);
    });
  }
});

describe("a damaged copy of an int8 product fails, and names the tensor", () => {
  // A threshold of 3 and one row; none and 16 rows; 6 and 16 rows.
  const everywhere = [
    "CB",
    "SCB",
    "CA",
    "SCA",
    "C32",
    "dequant_bias",
    "double.row",
    "double.col",
    "double.row_stats",
    "double.col_stats",
  ];
  for (const index of [0, 1, 2]) {
    test(`int8:${index}`, async () => {
      const fields = index === 1 ? everywhere : [...everywhere, "outlier_cols"];
      for (const field of fields) {
        // The lowest bit of an integer, a high one of a number: what no tie excuses.
        const isFloat = /SC|stats|bias/.test(field);
        const report = await damaged(
          "int8",
          index,
          flip(field, isFloat ? -1 : field === "outlier_cols" ? -4 : 4, isFloat ? 0x01 : 0x05),
        );
        expect(report.ops, field).toMatchObject({ int8: { passed: 0, failed: 1 } });
        expect(
          report.failures.map((f) => f.field),
          field,
        ).toContain(field);
      }
      const wrong = await damaged("int8", index, flip("W", 1, 0x40));
      expect(wrong.failures.map((f) => f.field)).toEqual(expect.arrayContaining(["CB", "SCB"]));
      expect((await damaged("int8", index, () => {})).ops).toMatchObject({ int8: { passed: 1, failed: 0 } });
      expect(memory().cpu?.tensors).toBe(0);
    });
  }
});
