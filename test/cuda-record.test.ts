/**
 * Cross-checking without a GPU: the cpu must still give the bits that a GPU gave, case by case, and the kernels must still be
 * those that ran there.
 */
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { describe, expect, test } from "vitest";
import { CpuBackend } from "#halfbyte/backend/cpu/backend.js";
import { kernelFingerprint } from "../scripts/kernel-sources.mjs";
import type { Case } from "./cases/case.js";
import { allCases } from "./cases/index.js";
import { runCase } from "./cases/run.js";
import {
  agreesWithRecord,
  type CudaRecord,
  formatRecord,
  groupCases,
  pendingWords,
  RUN_ON_GPU,
  readRecord,
  recordedHash,
  recordPath,
  testNames,
  ungroupCases,
} from "./helpers/cuda-record.js";

const PATH = recordPath();
const PENDING_WORDS = pendingWords(PATH);
if (PENDING_WORDS !== undefined) console.log(`skipped: the record of the GPU is behind the kernels: ${PENDING_WORDS}`);

function list(what: string, ids: readonly string[]): string {
  if (ids.length === 0) return "";
  return `${ids.length} ${what}:\n${ids.slice(0, 10).join("\n")}${ids.length > 10 ? "\n..." : ""}\n${RUN_ON_GPU}`;
}

describe("the record of the GPU", () => {
  test("the cpu gives the recorded bits in every case", async () => {
    const recorded = ungroupCases(readRecord(PATH).cases);
    const different: string[] = [];
    const missing: string[] = [];
    const backend = new CpuBackend({ threads: 2 });
    try {
      for (const c of allCases()) {
        const hash = recorded.get(c.id);
        recorded.delete(c.id);
        if (hash === undefined) missing.push(c.id);
        else if (!agreesWithRecord(c, hash, () => runCase(backend, c, c.inputs()))) different.push(c.id);
      }
    } finally {
      await backend.close();
    }
    expect.soft(list("cases differ between this cpu and the GPU of the record", different)).toBe("");
    if (PENDING_WORDS === undefined) expect.soft(list("cases were never run on a GPU", missing)).toBe("");
    expect.soft(list("recorded cases are no longer in the list", [...recorded.keys()])).toBe("");
  });

  test.skipIf(PENDING_WORDS !== undefined)("the kernels are those that ran on the GPU", () => {
    const { fingerprint, gpu, date } = readRecord(PATH);
    const same = kernelFingerprint() === fingerprint;
    expect(
      same
        ? ""
        : `The kernels' sources, compile options or launch geometry are not those that ran on ${gpu} (${date}). ${RUN_ON_GPU}`,
    ).toBe("");
  });

  test("every bad-day test passed on the GPU", () => {
    const { tests } = readRecord(PATH);
    const folder = new URL("cuda/", import.meta.url).pathname;
    const files = readdirSync(folder).filter((file) => file.endsWith(".test.ts"));
    expect(files.length).toBeGreaterThan(5);
    const wanted = files.flatMap((file) => {
      const names = testNames(readFileSync(join(folder, file), "utf8"));
      expect(names.length, file).toBeGreaterThan(0);
      return names.map((name) => `${file}: ${name}`);
    });
    const passed = Object.entries(tests).flatMap(([file, own]) =>
      Object.entries(own).flatMap(([name, result]) => (result === "passed" ? [`${file}: ${name}`] : [])),
    );
    expect(
      list(
        "tests of test/cuda have not passed on a GPU",
        wanted.filter((name) => !passed.includes(name)),
      ),
    ).toBe("");
    expect(
      list(
        "recorded tests are no longer there",
        passed.filter((name) => !wanted.includes(name)),
      ),
    ).toBe("");
  });
});

test("what is held to a bound is recorded as that, and nothing else is", () => {
  const exact = { id: "a" } as Case;
  const bounded = { id: "b", bounded: true } as Case;
  const [here, there] = [1, 2].map((byte) => ({
    y: { dtype: "u8" as const, shape: [1], bytes: Uint8Array.of(byte) },
  }));
  const agrees = (recorded: Case, now: Case) => agreesWithRecord(now, recordedHash(recorded, there!), () => here!);
  expect(agreesWithRecord(exact, recordedHash(exact, here!), () => here!)).toBe(true);
  expect(agrees(exact, exact)).toBe(false);
  expect(agrees(bounded, bounded)).toBe(true);
  // The case has changed its mind since: the GPU has to say it again.
  expect(agrees(bounded, exact)).toBe(false);
  expect(agrees(exact, bounded)).toBe(false);
});

test("a record comes back as it was written, in one line per case", () => {
  const record: CudaRecord = {
    format: 1,
    gpu: "a GPU",
    architecture: "sm_87",
    driver: "12.6",
    date: "2026-01-01",
    node: "v20",
    fingerprint: "00",
    images: ["fourbit sm_87 cubin, nvrtc 11.8.89"],
    tests: { "a.test.ts": { "one: two": "passed" } },
    sanitizer: [{ tool: "memcheck", result: "0 errors", date: "2026-01-01" }],
    cases: groupCases([
      ["quantize4bit:nf4:f32:n=1", "0123456789abcdef"],
      ["quantize4bit:nf4:f32:n=2", "1123456789abcdef"],
      ["mean:f32:n=1", "2123456789abcdef"],
    ]),
  };
  const text = formatRecord(record);
  expect(JSON.parse(text)).toEqual(record);
  expect(text.split("\n")).toContain('"nf4:f32:n=2": "1123456789abcdef"');
  expect([...ungroupCases(record.cases)]).toEqual([
    ["quantize4bit:nf4:f32:n=1", "0123456789abcdef"],
    ["quantize4bit:nf4:f32:n=2", "1123456789abcdef"],
    ["mean:f32:n=1", "2123456789abcdef"],
  ]);
});
