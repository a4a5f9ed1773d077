/**
 * The fast code search is the exact one: on every f16 and bf16 value, and on 100 million float32 values round every decision
 * boundary. Both run as kernels over blocks whose maximum is 1, so that the scaled value is the value itself.
 */

import { afterAll, beforeAll, describe, expect, test } from "vitest";
import type { Tensor } from "#halfbyte/core/tensor.js";
import { init, quantizeBlockwise, shutdown, tensor, tidy } from "#halfbyte/index.js";
import { buildSearchTable } from "#halfbyte/quant/search-table.js";
import { CODES } from "../cases/blockwise.js";
import { decode, f32Bits, searchCode } from "../helpers/scalar.js";

beforeAll(() => init({ threads: 2 }));
afterAll(() => shutdown());

const BLOCK = 4096;
const FAST = Object.keys(CODES).filter((name) => buildSearchTable(CODES[name]!()) !== null);

/** Both searches of `x`, in blocks that begin with 1. Returns the first index where they differ, or -1. */
function firstDifference(x: Tensor, code: Float32Array): number {
  return tidy(() => {
    const [fast] = quantizeBlockwise(x, { code, blocksize: BLOCK, search: "table" });
    const [exact] = quantizeBlockwise(x, { code, blocksize: BLOCK, search: "exact" });
    const [a, b] = [fast.dataSync(), exact.dataSync()];
    return Buffer.compare(a, b) === 0 ? -1 : a.findIndex((v, i) => v !== b[i]);
  });
}

/** Packs values of [-1, 1] into blocks that begin with 1. */
function inBlocks(values: Float32Array): Float32Array<ArrayBuffer> {
  const per = BLOCK - 1;
  const out = new Float32Array(Math.ceil(values.length / per) * BLOCK);
  for (let b = 0, i = 0; i < values.length; b++, i += per) {
    out[b * BLOCK] = 1;
    out.set(values.subarray(i, i + per), b * BLOCK + 1);
  }
  return out;
}

test("the codebooks that matter have a search table", () => {
  expect(FAST).toEqual(expect.arrayContaining(["dynamic", "unsigned", "linear", "fp8", "normal"]));
  expect(FAST).not.toContain("clustered");
});

describe.each(FAST)("%s", (name) => {
  const code = CODES[name]!();

  test.each(["f16", "bf16"] as const)("every %s value of [-1, 1]", (dtype) => {
    const values = Float32Array.from({ length: 65536 }, (_, i) => decode(dtype, i)).filter((v) => Math.abs(v) <= 1);
    expect(values.length).toBeGreaterThan(30_000);
    const x = tidy(() => tensor(inBlocks(values), { dtype }));
    expect(firstDifference(x, code)).toBe(-1);
    x.dispose();
  });

  test("float32 values round every decision boundary: 20 million", () => {
    // Boundaries: midpoints of neighbours and the codes themselves, zero with its denormals, and one.
    const centres = new Set<number>([0, -0, 2 ** -126, -(2 ** -126), 1, -1]);
    for (let i = 0; i < code.length; i++) {
      centres.add(code[i]!);
      if (i > 0) centres.add(Math.fround((code[i - 1]! + code[i]!) * 0.5));
    }
    const inside = [...centres].filter((c) => Math.abs(c) <= 1);
    const each = Math.ceil(20_000_000 / inside.length);
    let checked = 0;
    const chunk = new Float32Array(each);
    const chunkBits = new Uint32Array(chunk.buffer);
    const one = f32Bits(1);
    for (const centre of inside) {
      const middle = f32Bits(Math.abs(centre));
      const sign = Object.is(centre, -0) || centre < 0 ? 0x80000000 : 0;
      for (let i = 0; i < each; i++) {
        const bits = middle + i - (each >> 1);
        // Below zero the run goes on with the other sign.
        chunkBits[i] = bits < 0 ? -bits | (sign ^ 0x80000000) : Math.min(bits, one) | sign;
      }
      const x = tensor(inBlocks(chunk));
      const at = firstDifference(x, code);
      x.dispose();
      if (at >= 0) expect.fail(`near ${centre}`);
      checked += each;
    }
    expect(checked).toBeGreaterThanOrEqual(20_000_000);
  });

  test("the exact kernel is the definition", () => {
    const values = inBlocks(Float32Array.from({ length: 20_000 }, (_, i) => Math.fround((i - 10_000) / 10_000)));
    const x = tensor(values);
    const [q, state] = quantizeBlockwise(x, { code, blocksize: BLOCK, search: "exact" });
    const got = q.dataSync();
    expect(got.findIndex((v, i) => v !== searchCode(code, values[i]!))).toBe(-1);
    for (const t of [x, q, state]) t.dispose();
  });
});
