import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { describe, expect, it } from "vitest";
import { ArgumentError, UnsupportedError } from "#halfbyte/core/errors.js";
import { DEQUANTIZED_TYPES, dequantizeGguf } from "#halfbyte/formats/gguf-dequant.js";
import { GGML_TYPES, type GgmlType } from "#halfbyte/formats/gguf-types.js";

interface Span {
  offset: number;
  bytes: number;
}
interface Case {
  type: GgmlType;
  label: string;
  blocks: Span;
  values: Span;
}

const fixture = (name: string): string => fileURLToPath(new URL(`../fixtures/${name}`, import.meta.url));
const data = new Uint8Array(readFileSync(fixture("gguf-dequant.bin")));
const { cases } = JSON.parse(readFileSync(fixture("gguf-dequant.json"), "utf8")) as { cases: Case[] };
const bytesOf = ({ offset, bytes }: Span): Uint8Array => data.slice(offset, offset + bytes);

/** The first element whose bits differ (any NaN equals any NaN), as a sentence. */
function firstDifference(got: Float32Array, want: Float32Array): string | undefined {
  if (got.length !== want.length) return `${got.length} values, expected ${want.length}`;
  for (let i = 0; i < want.length; i++) {
    if (!Object.is(got[i], want[i])) return `element ${i}: ${got[i]}, expected ${want[i]}`;
  }
  return undefined;
}

describe("dequantizeGguf", () => {
  it("has vectors for every type it reads", () => {
    expect([...new Set(cases.map((c) => c.type))].sort()).toEqual([...DEQUANTIZED_TYPES].sort());
  });

  for (const { type, label, blocks, values } of cases) {
    it(`${type}: equals gguf 0.19 on ${label}`, () => {
      const want = new Float32Array(bytesOf(values).buffer);
      expect(want.length).toBeGreaterThan(0);
      expect(firstDifference(dequantizeGguf(type, bytesOf(blocks)), want)).toBeUndefined();
    });
  }

  it("reads blocks at odd addresses", () => {
    for (const { type, blocks, values } of cases) {
      const shifted = new Uint8Array(blocks.bytes + 1);
      shifted.set(bytesOf(blocks), 1);
      const got = dequantizeGguf(type, shifted.subarray(1));
      expect(firstDifference(got, new Float32Array(bytesOf(values).buffer))).toBeUndefined();
    }
  });

  it("gives nothing for nothing", () => {
    for (const type of DEQUANTIZED_TYPES) expect(dequantizeGguf(type, new Uint8Array(0))).toHaveLength(0);
  });

  it("refuses part of a block", () => {
    expect(() => dequantizeGguf("Q4_K", new Uint8Array(143))).toThrow(ArgumentError);
    expect(() => dequantizeGguf("Q4_K", new Uint8Array(143))).toThrow(/144 bytes, received 143 bytes/);
  });

  it("names a type it cannot read and those it can", () => {
    const others = (Object.keys(GGML_TYPES) as GgmlType[]).filter((type) => !DEQUANTIZED_TYPES.includes(type));
    expect(others).toContain("IQ2_XXS");
    for (const type of others) {
      const run = (): unknown => dequantizeGguf(type, new Uint8Array(GGML_TYPES[type].blockBytes));
      expect(run).toThrow(UnsupportedError);
      expect(run).toThrow(new RegExp(`${type} .*Q4_0.*Q6_K`));
    }
  });
});
