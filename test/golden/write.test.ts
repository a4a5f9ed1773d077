/** `writeGolden`: what it writes passes its own check, is the same everywhere, and overwrites nobody's vectors. */
import { createHash } from "node:crypto";
import { readdir, readFile } from "node:fs/promises";
import { join } from "node:path";
import { afterAll, expect, test } from "vitest";
import { memory, shutdown } from "#halfbyte/backend/devices.js";
import { ArgumentError } from "#halfbyte/core/errors.js";
import { SafetensorsFile } from "#halfbyte/formats/safetensors.js";
import { checkGolden } from "#halfbyte/golden/check.js";
import { floatsOf } from "#halfbyte/golden/float-bits.js";
import { makeInput, Random } from "#halfbyte/golden/inputs.js";
import { writeGolden } from "#halfbyte/golden/write.js";
import { createDynamicMap, NF4_THRESHOLDS, NF4_VALUES } from "#halfbyte/quant/codebooks.js";
import { REAL_DIR, REAL_FILE, withDir } from "./files.js";

afterAll(shutdown);

/** The bytes for seed 7. They change only when the cases or the numbers do, and then on purpose. */
const SEED_7 = "294a2c2db091d7d6add9af5eefa5bb9607ca4582014062628a6b4aae1858e398";

const digest = async (path: string) =>
  createHash("sha256")
    .update(await readFile(path))
    .digest("hex");

test("write, then check: everything passes without a single tie", async () => {
  await withDir({}, async (dir) => {
    const target = join(dir, "new");
    const written = await writeGolden(target, { seed: 7 });
    expect(written.path).toBe(join(target, REAL_FILE));
    const report = await checkGolden(target, { device: "cpu" });
    expect(report.failures).toEqual([]);
    expect(report.ops).toEqual({
      codebook: { passed: 9, failed: 0, notRun: 0, ties: 0 },
      quantize_4bit: { passed: 192, failed: 0, notRun: 0, ties: 0 },
      quantize_blockwise: { passed: 276, failed: 0, notRun: 0, ties: 0 },
      quantize_4bit_nested: { passed: 6, failed: 0, notRun: 0, ties: 0 },
    });
    expect(written.cases).toBe(9 + 192 + 276 + 6);
    expect(await digest(written.path)).toBe(SEED_7);
    expect(memory().cpu).toMatchObject({ tensors: 0, bytes: 0 });

    const file = await SafetensorsFile.open(written.path);
    const edge = floatsOf("f16", await file.read("x/f16/edge"));
    await file.close();
    expect(edge.every(Number.isFinite)).toBe(true);
    expect(edge.some((x) => x !== 0 && Math.abs(x) < 2 ** -14)).toBe(true);
    expect(edge.some((x) => Math.abs(x) > 4096)).toBe(true);

    // The same seed again gives the same bytes, another one others; both replace the file without a word.
    await writeGolden(target, { seed: 8 });
    expect(await digest(written.path)).not.toBe(SEED_7);
    await writeGolden(target, { seed: 7 });
    expect(await digest(written.path)).toBe(SEED_7);
    expect(await readdir(target)).toEqual([REAL_FILE]);
  });
});

test("vectors from elsewhere are overwritten with force only", async () => {
  for (const foreign of [await readFile(join(REAL_DIR, REAL_FILE)), Buffer.from("not safetensors")]) {
    await withDir({ [REAL_FILE]: foreign }, async (dir) => {
      const path = join(dir, REAL_FILE);
      await expect(writeGolden(dir, { seed: 7 })).rejects.toThrow(/or force/);
      expect(Buffer.compare(await readFile(path), foreign)).toBe(0);
      await writeGolden(dir, { seed: 7, force: true });
      expect(await digest(path)).toBe(SEED_7);
    });
  }
});

test("a seed that is none and an aborted signal leave nothing behind", async () => {
  await withDir({}, async (dir) => {
    for (const seed of [-1, 0.5, Number.NaN, 2 ** 53]) {
      await expect(writeGolden(dir, { seed })).rejects.toThrow(ArgumentError);
    }
    const reason = new Error("enough");
    await expect(writeGolden(dir, { seed: 7, signal: AbortSignal.abort(reason) })).rejects.toBe(reason);
    expect(await readdir(dir)).toEqual([]);
    expect(memory().cpu?.tensors).toBe(0);
  });
});

test("inputs hold what they are for", () => {
  const code = createDynamicMap();
  const edge = makeInput("edge", "f32", new Random(1, "edge"), []);
  expect(edge.subarray(0, 64).every((x) => x === 0)).toBe(true);
  expect([...edge.subarray(0, 64)].some((x) => Object.is(x, -0))).toBe(true);
  const denormal = (x: number) => x !== 0 && Math.abs(x) < 2 ** -126;
  const blocks = Array.from({ length: 72 }, (_, i) => edge.subarray(64 * i, 64 * i + 64));
  expect(blocks.some((block) => block.every((x) => x === 0 || denormal(x)) && block.some(denormal))).toBe(true);
  expect(blocks.some((block) => block.some(denormal) && block.some((x) => Math.abs(x) === 2 ** -126))).toBe(true);
  expect(blocks.some((block) => new Set(block).size === 1 && block[0] !== 0)).toBe(true);

  const points = makeInput("points", "f32", new Random(1, "points"), [code]);
  const wanted = new Set(points);
  for (const value of [...NF4_VALUES, ...NF4_THRESHOLDS, ...code]) expect(wanted.has(value)).toBe(true);
  expect(wanted.has(Math.fround(Math.fround(code[3]! + code[4]!) * 0.5))).toBe(true);
  for (let i = 0; i < points.length; i += 32) {
    expect(Math.max(...points.subarray(i, i + 32).map(Math.abs))).toBe(1);
  }
  for (const kind of ["normal", "heavy", "edge", "points"] as const) {
    expect(makeInput(kind, "f32", new Random(1, kind), [code]).length % 2, kind).toBe(1);
  }
});

test("random numbers are fixed, and depend on seed and stream", () => {
  const first = (seed: number, stream: string) =>
    Array.from(
      { length: 4 },
      (
        (r) => () =>
          r.next()
      )(new Random(seed, stream)),
    );
  expect(first(1, "a")).toEqual(first(1, "a"));
  expect(first(1, "a")).not.toEqual(first(1, "b"));
  expect(first(1, "a")).not.toEqual(first(1 + 2 ** 32, "a"));
  const r = new Random(42, "normal");
  const values = Array.from({ length: 20_000 }, () => r.normal());
  const mean = values.reduce((a, b) => a + b, 0) / values.length;
  const variance = values.reduce((a, b) => a + b * b, 0) / values.length;
  expect(Math.abs(mean)).toBeLessThan(0.03);
  expect(Math.abs(variance - 1)).toBeLessThan(0.05);
});
