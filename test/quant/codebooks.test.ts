import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { describe, expect, test } from "vitest";
import { ArgumentError } from "#halfbyte/core/errors.js";
import {
  createDynamicMap,
  createFp8Map,
  createLinearMap,
  createNormalMap,
  type FourBitTypeName,
  FP4_RANKS,
  FP4_THRESHOLDS,
  FP4_VALUES,
  get4bitType,
  NF4_THRESHOLDS,
  NF4_VALUES,
} from "#halfbyte/quant/codebooks.js";

/** SHA-256 (16 digits) of the float32 bytes that bitsandbytes 0.50 computes, by function and arguments. */
const upstream = JSON.parse(readFileSync(new URL("../fixtures/codebooks.json", import.meta.url), "utf8")) as Record<
  string,
  string
>;

function digest(values: Float32Array): string {
  const bytes = new Uint8Array(values.buffer, values.byteOffset, values.byteLength);
  return createHash("sha256").update(bytes).digest("hex").slice(0, 16);
}

function make(call: string): Float32Array {
  const [name, ...args] = call.split(" ");
  const flag = (i: number): boolean => args[i] === "true";
  const number = (i: number): number => Number(args[i]);
  switch (name) {
    case "linear":
      return createLinearMap(flag(0), number(1), flag(2));
    case "dynamic":
      return createDynamicMap(flag(0), number(1), number(2));
    case "fp8":
      return createFp8Map(flag(0), number(1), number(2), number(3));
    case "normal":
      return createNormalMap(number(0), flag(1));
    default:
      return get4bitType(args[0] as FourBitTypeName, number(1));
  }
}

describe("codebooks equal upstream's, bit for bit", () => {
  test("the fixture covers every function", () => {
    const names = new Set(Object.keys(upstream).map((call) => call.split(" ")[0]));
    expect([...names].sort()).toEqual(["4bit", "dynamic", "fp8", "linear", "normal"]);
    expect(Object.keys(upstream).length).toBe(186);
  });

  test.each(Object.entries(upstream))("%s", (call, expected) => {
    expect(digest(make(call))).toBe(expected);
  });
});

describe("codebooks", () => {
  const maps = { createDynamicMap, createLinearMap, createFp8Map, createNormalMap };

  test.each(Object.entries(maps))("%s() is sorted, of 256 values up to 1", (_name, create) => {
    const code = create();
    expect(code.length).toBe(256);
    expect(code.every((value, i) => i === 0 || value >= code[i - 1]!)).toBe(true);
    expect(code[255]).toBe(1);
  });

  test("int4 counts down from 1 to -1, with two zeros", () => {
    const code = get4bitType("int4");
    const expected = [7, 6, 5, 4, 3, 2, 1, 0, 0, -1, -2, -3, -4, -5, -6, -7].map((v) => Math.fround(v / 7));
    expect(Array.from(code)).toEqual(expected);
    expect(Object.is(code[8], 0)).toBe(true);
  });

  test("a result belongs to the caller", () => {
    for (const name of ["nf4", "fp4", "int4", "af4"] as const) {
      const first = get4bitType(name);
      const before = Array.from(first);
      first.fill(9);
      expect(Array.from(get4bitType(name))).toEqual(before);
    }
    expect(NF4_VALUES[0]).toBe(-1);
  });

  test("NF4 thresholds lie between the values, midway in float32", () => {
    expect(NF4_THRESHOLDS.length).toBe(15);
    expect(NF4_THRESHOLDS[7]).toBe(Math.fround(0.03979014977812767));
    for (let i = 0; i < 15; i++) {
      expect(NF4_THRESHOLDS[i]).toBe(Math.fround(Math.fround(NF4_VALUES[i]! + NF4_VALUES[i + 1]!) / 2));
    }
  });

  test("FP4: ranks are by magnitude, thresholds in between, code 8 decodes to -0", () => {
    const magnitudes = FP4_RANKS.map((code) => FP4_VALUES[code]!);
    expect([...FP4_RANKS].sort()).toEqual([0, 1, 2, 3, 4, 5, 6, 7]);
    for (let i = 0; i < 7; i++) {
      expect(magnitudes[i]).toBeLessThan(FP4_THRESHOLDS[i]!);
      expect(FP4_THRESHOLDS[i]).toBeLessThan(magnitudes[i + 1]!);
    }
    for (let code = 0; code < 8; code++) expect(Object.is(FP4_VALUES[code + 8], -FP4_VALUES[code]!)).toBe(true);
    expect(Object.is(get4bitType("fp4")[8], 0)).toBe(true);
  });

  test.each([
    ["createDynamicMap", "maxExponentBits", () => createDynamicMap(false, 6, 8)],
    ["createDynamicMap", "maxExponentBits", () => createDynamicMap(true, 0, 8)],
    ["createDynamicMap", "totalBits", () => createDynamicMap(true, 7, 9)],
    ["createDynamicMap", "totalBits", () => createDynamicMap(true, 7, 7.5)],
    ["createLinearMap", "totalBits", () => createLinearMap(true, 1)],
    ["createLinearMap", "totalBits", () => createLinearMap(true, Number.NaN)],
    ["createFp8Map", "exponentBits + precisionBits", () => createFp8Map(true, 5, 3, 8)],
    ["createFp8Map", "exponentBits", () => createFp8Map(true, 0, 7, 8)],
    ["createNormalMap", "offset", () => createNormalMap(0.5)],
    ["createNormalMap", "offset", () => createNormalMap(Number.NaN)],
    ["get4bitType", "blocksize", () => get4bitType("af4", 128)],
    ["get4bitType", "name", () => get4bitType("nf5" as FourBitTypeName)],
  ])("%s refuses a bad %s", (op, operand, call) => {
    expect(call).toThrow(ArgumentError);
    expect(call).toThrow(`[${op}] ${operand}: expected `);
  });
});
