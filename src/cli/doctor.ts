/** `halfbyte doctor`: does this machine run halfbyte, and is what it computes right? */
import { availableParallelism, cpus, totalmem } from "node:os";
import type { Command } from "commander";
import { CUDA_MISSING, getBackend, shutdown } from "../backend/devices.js";
import type { Backend, DeviceName } from "../core/backend.js";
import { ArgumentError } from "../core/errors.js";
import { Tensor } from "../core/tensor.js";
import { dequantize4bit, quantize4bit } from "../ops/fourbit.js";
import { NF4_THRESHOLDS, NF4_VALUES } from "../quant/codebooks.js";
import { jsonOption, threadsOption, useThreads } from "./options.js";
import { describeError, EXIT_FAILURE, formatBytes, print, printJson, table } from "./output.js";
import { VERSION } from "./version.js";

/** One finding. */
interface Check {
  readonly name: string;
  /** `info` is neither good nor bad. */
  readonly status: "ok" | "failed" | "info";
  readonly detail: string;
  /** What to do, of a failure. */
  readonly advice?: string;
}

interface Diagnosis {
  readonly version: string;
  readonly ok: boolean;
  readonly checks: readonly Check[];
}

/** The oldest Node that works, as package.json says. */
const LEAST_NODE = [20, 19] as const;

// The smallest modules that need a feature: one function with a SIMD instruction; a shared memory with an atomic load.
const SIMD_MODULE = "AGFzbQEAAAABBQFgAAF7AwIBAAoKAQgAQQD9D/1iCw==";
const THREADS_MODULE = "AGFzbQEAAAABBAFgAAADAgEABQQBAwEBCgsBCQBBAP4QAgAaCw==";

const BLOCKSIZE = 64;
/** A last block that is not full, and an odd length. */
const SAMPLE_ELEMENTS = 1000 * BLOCKSIZE + 37;
const CHAIN = 10_000;
const ROUND_TRIPS = 50;

export function registerDoctor(program: Command): void {
  const command = program
    .command("doctor")
    .description("check this machine: Node, SIMD, workers, a kernel on each backend; why cuda is not there")
    .action(async ({ threads, json = false }: { threads?: number; json?: boolean }) => {
      const diagnosis = await diagnose(threads);
      if (json) printJson(diagnosis);
      else print(describe(diagnosis));
      if (!diagnosis.ok) process.exitCode = EXIT_FAILURE;
    });
  jsonOption(threadsOption(command));
}

async function diagnose(threads: number | undefined): Promise<Diagnosis> {
  const checks = [machine(), node(), simd(), threadsSupport()];
  if (checks.every(({ status }) => status !== "failed")) {
    checks.push(...(await checkBackend("cpu", threads)));
  }
  checks.push({ name: "cuda", status: "info", detail: `not there: ${CUDA_MISSING}` });
  return { version: VERSION, ok: checks.every(({ status }) => status !== "failed"), checks };
}

function machine(): Check {
  const model = cpus()[0]?.model.trim() || "unknown CPU";
  const cores = `${availableParallelism()} cores available`;
  const detail = `${process.platform} ${process.arch}, ${model}, ${cores}, ${formatBytes(totalmem())} of memory`;
  return { name: "machine", status: "info", detail };
}

function node(): Check {
  const [major = 0, minor = 0] = process.versions.node.split(".").map(Number);
  const [leastMajor, leastMinor] = LEAST_NODE;
  const ok = major > leastMajor || (major === leastMajor && minor >= leastMinor);
  const advice = `install Node.js ${leastMajor}.${leastMinor} or later`;
  return result("node", ok, `${process.version}, V8 ${process.versions.v8}`, advice);
}

function simd(): Check {
  const ok = compiles(SIMD_MODULE);
  const detail = ok ? "128-bit SIMD works" : "this runtime does not compile SIMD instructions";
  return result("simd", ok, detail, "use a 64-bit build of Node.js without --jitless, on a CPU with SSE4.1 or NEON");
}

function threadsSupport(): Check {
  const ok = compiles(THREADS_MODULE) && typeof Atomics.waitAsync === "function";
  const detail = ok ? "shared memory and atomics work" : "this runtime has no shared WebAssembly memory";
  return result("threads", ok, detail, "use a stock build of Node.js, without flags that turn WebAssembly threads off");
}

function compiles(base64: string): boolean {
  try {
    return new WebAssembly.Module(Buffer.from(base64, "base64")) !== undefined;
  } catch {
    return false;
  }
}

async function checkBackend(device: DeviceName, threads: number | undefined): Promise<Check[]> {
  let backend: Backend;
  try {
    await useThreads(threads);
    backend = getBackend(device);
  } catch (error) {
    const mistaken = error instanceof ArgumentError;
    const advice = mistaken ? "correct it, or leave it out" : "install halfbyte again (from a clone: npm run build)";
    return [result(device, false, describeError(error).message, advice)];
  }
  try {
    const checks = [await checkKernel(backend), await checkLatency(backend)];
    const { committedBytes, limitBytes } = backend.memory();
    const detail = `${formatBytes(committedBytes)} taken, up to ${formatBytes(limitBytes)} for tensors`;
    return [...checks, { name: `${device} memory`, status: "info", detail }];
  } catch (error) {
    const advice = `set HALFBYTE_THREADS=1 and try again; if that fails too, report it with the output of halfbyte doctor --json`;
    return [result(`${device} kernel`, false, describeError(error).message, advice)];
  } finally {
    await shutdown();
  }
}

/** NF4 there and back on the backend, and the same in plain JavaScript. */
async function checkKernel(backend: Backend): Promise<Check> {
  const started = performance.now();
  const x = sample(SAMPLE_ELEMENTS);
  const input = Tensor.allocate(backend, "f32", [x.length]).copyFrom(x);
  const [packed, state] = quantize4bit(input, { quantType: "nf4", blocksize: BLOCKSIZE });
  const decoded = dequantize4bit(packed, state);
  const [codes, scales, values] = await Promise.all([packed.bytes(), state.absmax.bytes(), decoded.bytes()]);
  const milliseconds = performance.now() - started;
  const expected = nf4(x);
  const wrong =
    differing("codes", codes, expected.packed) ??
    differing("scales", scales, new Uint8Array(expected.absmax.buffer)) ??
    differing("decoded values", values, new Uint8Array(expected.decoded.buffer));
  const workers = "threads" in backend ? `${backend.threads} workers, ` : "";
  const detail =
    wrong ??
    `${workers}NF4 of ${x.length} elements equals plain JavaScript (${milliseconds.toFixed(0)} ms with start-up)`;
  const advice = "do not trust results of this machine; report it with the output of halfbyte doctor --json";
  return result(`${backend.device} kernel`, wrong === undefined, detail, advice);
}

function differing(what: string, actual: Uint8Array, expected: Uint8Array): string | undefined {
  const at = expected.findIndex((byte, i) => byte !== actual[i]);
  if (at < 0 && actual.length === expected.length) return undefined;
  return `${what} differ from plain JavaScript, first at byte ${at < 0 ? expected.length : at}`;
}

/** Normally distributed numbers from a fixed seed. */
function sample(n: number): Float32Array {
  let state = 1234;
  const uniform = (): number => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return (state + 0.5) / 2 ** 32;
  };
  return Float32Array.from({ length: n }, () => {
    const radius = Math.sqrt(-2 * Math.log(uniform()));
    return radius * Math.cos(2 * Math.PI * uniform());
  });
}

/** NF4 as docs/numerics.md defines it, without a thought about speed. */
function nf4(x: Float32Array) {
  const { fround } = Math;
  const packed = new Uint8Array(Math.ceil(x.length / 2));
  const absmax = new Float32Array(Math.ceil(x.length / BLOCKSIZE));
  const decoded = new Float32Array(x.length);
  const padding = NF4_VALUES.indexOf(0);
  if (x.length % 2 === 1) packed[packed.length - 1] = padding;
  for (let i = 0; i < x.length; i++) {
    const block = Math.floor(i / BLOCKSIZE);
    if (i % BLOCKSIZE === 0) absmax[block] = x.subarray(i, i + BLOCKSIZE).reduce((m, v) => Math.max(m, Math.abs(v)), 0);
    const scaled = fround(x[i]! * fround(1 / absmax[block]!));
    const code = NF4_THRESHOLDS.filter((threshold) => scaled > threshold).length;
    packed[i >> 1]! |= i % 2 === 0 ? code << 4 : code;
    decoded[i] = NF4_VALUES[code]! * absmax[block]!;
  }
  return { packed, absmax, decoded };
}

/** What a launch costs in a chain, and from a launch to its result. */
async function checkLatency(backend: Backend): Promise<Check> {
  const word = Tensor.allocate(backend, "u8", [4]);
  const launch = (): void => backend.launch("fill", { dst: word, bytes: 4, value: 0 });
  const chain = async (): Promise<number> => {
    const started = performance.now();
    for (let i = 0; i < CHAIN; i++) launch();
    await backend.synchronize();
    return (1e6 * (performance.now() - started)) / CHAIN;
  };
  // The first one warms up.
  await chain();
  const perLaunch = Math.min(await chain(), await chain());
  const trips: number[] = [];
  for (let i = 0; i < ROUND_TRIPS; i++) {
    const started = performance.now();
    launch();
    await backend.synchronize();
    trips.push(1e3 * (performance.now() - started));
  }
  const median = trips.sort((a, b) => a - b)[ROUND_TRIPS / 2]!;
  const detail = `${perLaunch.toFixed(0)} ns a launch in a chain of ${CHAIN}, ${median.toFixed(0)} µs from launch to result`;
  return { name: `${backend.device} launch`, status: "info", detail };
}

function result(name: string, ok: boolean, detail: string, advice: string): Check {
  return ok ? { name, status: "ok", detail } : { name, status: "failed", detail, advice };
}

function describe({ version, ok, checks }: Diagnosis): string {
  const rows = checks.map(({ name, status, detail }) => [name, status === "info" ? "-" : status, detail]);
  const lines = table([{ title: `halfbyte ${version}` }, { title: "" }, { title: "" }], rows);
  const advice = checks.flatMap(({ name, advice }) => (advice ? [`${name}: ${advice}`] : []));
  return [lines, "", ...advice, ok ? "halfbyte works here" : "halfbyte does not work here"].join("\n");
}
