/**
 * What a GPU did: test/cuda-record.json. `npm run test:cuda` writes it after a run in which everything passed; test/cuda-record.test.ts
 * holds the cpu and the kernels' sources against it on machines without a GPU.
 */
import { readFileSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import type { Case } from "../cases/case.js";
import { type Outputs, outputsHash } from "../cases/run.js";

export interface SanitizerRun {
  readonly tool: string;
  readonly result: string;
  readonly date: string;
}

export interface CudaRecord {
  readonly format: 1;
  readonly gpu: string;
  /** `sm_90` */
  readonly architecture: string;
  /** The CUDA version of the driver, `13.0`. */
  readonly driver: string;
  readonly date: string;
  readonly node: string;
  /** `kernelFingerprint()` of the kernels that ran. */
  readonly fingerprint: string;
  /** Descriptions of the kernel images that ran. */
  readonly images: readonly string[];
  /** By file of test/cuda: tests and how they ended. */
  readonly tests: Readonly<Record<string, Readonly<Record<string, string>>>>;
  /** Runs of compute-sanitizer over build/test/cuda-sanitize.js with this fingerprint. */
  readonly sanitizer: readonly SanitizerRun[];
  /**
   * By what a case is about, then by the rest of its id: the hash of the bits that the GPU gave, marked where they are the GPU's own
   * and have been held to a bound.
   */
  readonly cases: Readonly<Record<string, Readonly<Record<string, string>>>>;
}

/** The end of every message about a record that is not there or no longer true. */
export const RUN_ON_GPU =
  "Run `npm run test:cuda` on a machine with a GPU and commit test/cuda-record.json (CONTRIBUTING.md, The record of the GPU).";

/** The record's place, seen from build/test/helpers as well as from test/helpers. */
export function recordPath(root: string | URL = new URL("../../", import.meta.url)): string {
  return typeof root === "string"
    ? `${root}/test/cuda-record.json`
    : fileURLToPath(new URL("test/cuda-record.json", root));
}

/**
 * A file beside the record that says why it is behind the kernels: kernels and cases that have not all run on a GPU yet. While it is
 * there, that is no failure. A run that is recorded removes it.
 */
export const PENDING = "cuda-record.pending.txt";

/** What the file says, or undefined when the record is up to date. */
export function pendingWords(path: string): string | undefined {
  try {
    return readFileSync(join(dirname(path), PENDING), "utf8").trim();
  } catch {
    return undefined;
  }
}

/** @throws Error that says what to do when there is none, or one of another format */
export function readRecord(path: string): CudaRecord {
  let text: string;
  try {
    text = readFileSync(path, "utf8");
  } catch {
    throw new Error(`There is no record of a run on a GPU (${path}). ${RUN_ON_GPU}`);
  }
  const record = JSON.parse(text) as CudaRecord;
  if (record.format !== 1) throw new Error(`${path} has format ${record.format}, not 1. ${RUN_ON_GPU}`);
  return record;
}

const BOUNDED = "within bounds, ";

/** What the record says of a case that gave this. */
export function recordedHash(c: Case, outputs: Outputs): string {
  return (c.bounded ? BOUNDED : "") + outputsHash(outputs);
}

/** Whether what the record says of a case is true here, where it gives `outputs()`: another backend's bits within bounds are. */
export function agreesWithRecord(c: Case, recorded: string, outputs: () => Outputs): boolean {
  if (recorded.startsWith(BOUNDED) !== (c.bounded ?? false)) return false;
  return c.bounded || recordedHash(c, outputs()) === recorded;
}

/** Writes beside the target and renames. */
export function writeRecord(path: string, record: CudaRecord): void {
  const partial = `${path}.partial`;
  writeFileSync(partial, formatRecord(record));
  renameSync(partial, path);
  rmSync(join(dirname(path), PENDING), { force: true });
}

/** One line per case, so that a change is seen in a diff. */
export function formatRecord({ cases, ...rest }: CudaRecord): string {
  const head = JSON.stringify(rest, undefined, 1).slice(0, -2);
  const groups = Object.entries(cases).map(([subject, own]) => {
    const lines = Object.entries(own).map(([id, hash]) => `${JSON.stringify(id)}: "${hash}"`);
    return `${JSON.stringify(subject)}: {\n${lines.join(",\n")}\n}`;
  });
  return `${head},\n "cases": {\n${groups.join(",\n")}\n}\n}\n`;
}

/** Hashes by id, grouped as the record has them. */
export function groupCases(
  hashes: Iterable<readonly [id: string, hash: string]>,
): Record<string, Record<string, string>> {
  const groups: Record<string, Record<string, string>> = {};
  for (const [id, hash] of hashes) {
    const colon = id.indexOf(":");
    const group = groups[id.slice(0, colon)] ?? {};
    groups[id.slice(0, colon)] = group;
    group[id.slice(colon + 1)] = hash;
  }
  return groups;
}

/** Hashes by id, as `groupCases` took them. */
export function ungroupCases(cases: CudaRecord["cases"]): Map<string, string> {
  const hashes = new Map<string, string>();
  for (const [subject, own] of Object.entries(cases)) {
    for (const [id, hash] of Object.entries(own)) hashes.set(`${subject}:${id}`, hash);
  }
  return hashes;
}

/** Names of the tests in the source of a test file. */
export function testNames(source: string): string[] {
  return [...source.matchAll(/^ *test\(\s*"((?:[^"\\]|\\.)+)"/gm)].map((match) => match[1]!);
}
