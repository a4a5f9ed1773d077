/**
 * Runs the case list on the GPU and holds every bit against the cpu's, or against the float64 reference where each backend sums
 * in an order of its own. scripts/test-cuda.mjs runs it, several times when the
 * device fails on the way: what it finds goes line by line into a file.
 *
 *     node build/test/cuda-cases.js --out FILE [--filter TEXT | --case ID] [--from N] [--pipelined] [--rehearse]
 *
 * Plain: guards round every allocation, every case by itself. `--pipelined`: many cases are launched before the first is
 * waited for, and their memory is given back meanwhile. `--own`: only what a library for dense products may compute, on our own
 * kernels. `--rehearse`: a cpu in the place of the GPU, for this program's sake.
 */
import { openSync, writeSync } from "node:fs";
import { parseArgs } from "node:util";
import { CpuBackend } from "#halfbyte/backend/cpu/backend.js";
import { CudaBackend } from "#halfbyte/backend/cuda/backend.js";
import { liveTensors } from "#halfbyte/core/tensor.js";
import { PRIMITIVES, type PrimitiveName } from "#halfbyte/ops/registry.js";
import type { Case, Host } from "./cases/case.js";
import { allCases } from "./cases/index.js";
import { compareOutputs, type Expected, expectedOn, type Outputs, runCase, runCaseAsync } from "./cases/run.js";
import { recordedHash } from "./helpers/cuda-record.js";

/** Cases under way together with `--pipelined`. */
const BATCH = 48;

const { values: options } = parseArgs({
  options: {
    out: { type: "string" },
    filter: { type: "string", default: "" },
    case: { type: "string" },
    from: { type: "string", default: "0" },
    pipelined: { type: "boolean", default: false },
    own: { type: "boolean", default: false },
    rehearse: { type: "boolean", default: false },
  },
});

/** A line of the file that `--out` names. */
export type Line =
  | { about: { gpu: string; architecture: string; driver: string } }
  /** The cases with these ids come next: if this line is the last, one of them ended the process. */
  | { at: number; ids: string[] }
  | { id: string; hash: string }
  | { id: string; failure: string }
  /** Everything was run. */
  | { end: true; images: string[] };

const file = options.out === undefined ? undefined : openSync(options.out, "a");
function report(line: Line): void {
  if (file !== undefined) writeSync(file, `${JSON.stringify(line)}\n`);
  if ("failure" in line) console.error(`FAILED ${line.failure}`);
}

const rerun = (c: Case): string =>
  `node build/test/cuda-cases.js ${options.pipelined ? "--pipelined " : ""}--case '${c.id}'`;
const message = (error: unknown): string => (error instanceof Error ? (error.stack ?? error.message) : String(error));

const guards = !options.pipelined;
const blas = options.own ? false : undefined;
const gpu = options.rehearse ? new CpuBackend({ threads: 1, guards }) : new CudaBackend({ guards, blas });
const cpu = new CpuBackend({ threads: 2 });

if (gpu instanceof CudaBackend) {
  const { name, architecture, driverVersion } = gpu.info;
  const driver = `${Math.floor(driverVersion / 1000)}.${(driverVersion % 1000) / 10}`;
  report({ about: { gpu: name, architecture: `sm_${architecture}`, driver } });
} else {
  report({ about: { gpu: "a cpu in its place", architecture: process.arch, driver: "none" } });
}

/** What the GPU (or the cpu in its place) has to give. */
const wanted = (c: Case, inputs: Record<string, Host>): Expected =>
  expectedOn(gpu.device, c, inputs, () => runCase(cpu, c, inputs));

function judge(c: Case, expected: Expected, actual: Outputs): void {
  const failure = compareOutputs(c, expected, actual, rerun(c));
  report(failure === undefined ? { id: c.id, hash: recordedHash(c, actual) } : { id: c.id, failure });
}

function failed(c: Case, error: unknown): void {
  report({ id: c.id, failure: `${c.id}\n  ${message(error)}\n  ${rerun(c)}` });
}

/** Nothing that is launched after a device fault can work: the next process goes on. */
function checkAlive(): void {
  if (gpu.state !== "ready") process.exit(3);
}

/** Whether a case launches what a library may compute. */
function isDense({ primitive }: Case): boolean {
  const kernels: readonly string[] = primitive in PRIMITIVES ? PRIMITIVES[primitive as PrimitiveName].kernels : [];
  return kernels.includes("matmul") || kernels.includes("igemm");
}

const cases = [...allCases()]
  .filter((c) => (options.case === undefined ? c.id.includes(options.filter) : c.id === options.case))
  .filter((c) => !options.own || isDense(c));
let at = Number(options.from);
if (!options.pipelined) {
  for (; at < cases.length; at++) {
    const c = cases[at]!;
    report({ at, ids: [c.id] });
    try {
      const inputs = c.inputs();
      const actual = runCase(gpu, c, inputs);
      if (liveTensors(gpu) !== 0 || gpu.memory().bytes !== 0) {
        throw new Error(`${liveTensors(gpu)} tensors and ${gpu.memory().bytes} bytes are left`);
      }
      judge(c, wanted(c, inputs), actual);
    } catch (error) {
      failed(c, error);
      checkAlive();
    }
  }
} else {
  while (at < cases.length) {
    const batch = cases.slice(at, at + BATCH);
    report({ at, ids: batch.map((c) => c.id) });
    const inputs = batch.map((c) => c.inputs());
    const reads = batch.map(async (c, i) => runCaseAsync(gpu, c, inputs[i]!));
    const results = await Promise.allSettled(reads);
    for (const [i, c] of batch.entries()) {
      const result = results[i]!;
      if (result.status === "rejected") failed(c, result.reason);
      else judge(c, wanted(c, inputs[i]!), result.value);
    }
    checkAlive();
    at += batch.length;
  }
}
const images = gpu instanceof CudaBackend ? gpu.imagesInUse() : [];
const library = gpu instanceof CudaBackend ? gpu.blasVersion() : undefined;
if (library !== undefined) images.push(`cuBLASLt ${library.replace(/ .*/, "")}`);
await gpu.close();
await cpu.close();
report({ end: true, images });
