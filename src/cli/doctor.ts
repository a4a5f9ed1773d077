/** `halfbyte doctor`: does this machine run halfbyte, and is what it computes right? */
import { availableParallelism, cpus } from "node:os";
import type { Command } from "commander";
import { DEVICE_CHOICES, type DeviceChoice, shutdown } from "../backend/devices.js";
import { describeJetson, detectJetson, type Jetson } from "../backend/jetson.js";
import { type AvailableMemory, availableMemory } from "../backend/system.js";
import { ArgumentError } from "../core/errors.js";
import { VERSION } from "../core/version.js";
import {
  type Check,
  checkKernel,
  describeLatency,
  describeMemory,
  info,
  type Latency,
  measureLatency,
  result,
} from "./doctor-checks.js";
import { type CudaDiagnosis, diagnoseCuda } from "./doctor-cuda.js";
import { deviceOption, jsonOption, threadsOption, useDevice } from "./options.js";
import { describeError, EXIT_FAILURE, formatBytes, print, printJson, table } from "./output.js";

interface Diagnosis {
  readonly version: string;
  readonly ok: boolean;
  readonly checks: readonly Check[];
  readonly memory: AvailableMemory;
  /** null on anything else. */
  readonly jetson: Jetson | null;
  /** null where nothing ran. */
  readonly cpu: { readonly latency: Latency } | null;
  /** null with `--device cpu`. */
  readonly cuda: CudaDiagnosis | null;
}

/** The oldest Node that works, as package.json says. */
const LEAST_NODE = [20, 19] as const;

// The smallest modules that need a feature: one function with a SIMD instruction; a shared memory with an atomic load.
const SIMD_MODULE = "AGFzbQEAAAABBQFgAAF7AwIBAAoKAQgAQQD9D/1iCw==";
const THREADS_MODULE = "AGFzbQEAAAABBAFgAAADAgEABQQBAwEBCgsBCQBBAP4QAgAaCw==";

export function registerDoctor(program: Command): void {
  const command = program
    .command("doctor")
    .description(
      "check this machine: Node, SIMD, workers, the GPU, a kernel on each backend; what to do about a failure",
    )
    .action(async ({ threads, device, json = false }: { threads?: number; device?: DeviceChoice; json?: boolean }) => {
      const diagnosis = await diagnose(threads, device);
      if (json) printJson(diagnosis);
      else print(describe(diagnosis));
      if (!diagnosis.ok) process.exitCode = EXIT_FAILURE;
    });
  jsonOption(threadsOption(deviceOption(command)));
}

async function diagnose(threads: number | undefined, device: DeviceChoice | undefined): Promise<Diagnosis> {
  const memory = availableMemory();
  const jetson = detectJetson();
  const asked = device ?? (process.env.HALFBYTE_DEVICE || "auto");
  const checks = [machine(memory), ...board(jetson), node(), simd(), threadsSupport()];
  let latency: Latency | undefined;
  if (checks.every(({ status }) => status !== "failed")) {
    const cpu = await checkCpu(threads);
    checks.push(...cpu.checks);
    latency = cpu.latency;
  }
  let cuda: CudaDiagnosis | undefined;
  if (!(DEVICE_CHOICES as readonly string[]).includes(asked)) {
    const detail = `HALFBYTE_DEVICE: expected ${DEVICE_CHOICES.join(", ")}, received ${JSON.stringify(asked)}`;
    checks.push(result("device", false, detail, "correct it, or leave it out"));
  } else if (asked !== "cpu") {
    const found = await diagnoseCuda(asked === "cuda", jetson);
    checks.push(...found.checks);
    cuda = found.cuda;
  }
  return {
    version: VERSION,
    ok: checks.every(({ status }) => status !== "failed"),
    checks,
    memory,
    jetson: jetson.isJetson ? jetson : null,
    cpu: latency === undefined ? null : { latency },
    cuda: cuda ?? null,
  };
}

function machine({ bytes, totalBytes, source, gpuBytes }: AvailableMemory): Check {
  const model = cpus()[0]?.model.trim() || "unknown CPU";
  const cores = `${availableParallelism()} cores available`;
  const limit = source.startsWith("cgroup") ? ` (the limit of ${source})` : "";
  const gpu = gpuBytes === undefined ? "" : `, the GPU holds ${formatBytes(gpuBytes)}`;
  const memory = `${formatBytes(bytes)} of ${formatBytes(totalBytes)} of memory free${limit}${gpu}`;
  return info("machine", `${process.platform} ${process.arch}, ${model}, ${cores}, ${memory}`);
}

function board(jetson: Jetson): Check[] {
  if (!jetson.isJetson) return [];
  return [info("jetson", `${describeJetson(jetson)}${jetson.container ? ", in a container" : ""}`)];
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

async function checkCpu(threads: number | undefined): Promise<{ checks: Check[]; latency?: Latency }> {
  try {
    const backend = await useDevice({ device: "cpu", ...(threads === undefined ? {} : { threads }) });
    try {
      const kernel = await checkKernel(backend);
      const latency = await measureLatency(backend);
      return { checks: [kernel, describeLatency(backend, latency), describeMemory(backend)], latency };
    } catch (error) {
      const advice =
        "set HALFBYTE_THREADS=1 and try again; if that fails too, report it with the output of halfbyte doctor --json";
      return { checks: [result("cpu kernel", false, describeError(error).message, advice)] };
    }
  } catch (error) {
    const mistaken = error instanceof ArgumentError;
    const advice = mistaken ? "correct it, or leave it out" : "install halfbyte again (from a clone: npm run build)";
    return { checks: [result("cpu", false, describeError(error).message, advice)] };
  } finally {
    await shutdown();
  }
}

function describe({ version, ok, checks }: Diagnosis): string {
  const rows = checks.map(({ name, status, detail }) => [name, status === "info" ? "-" : status, detail]);
  const lines = table([{ title: `halfbyte ${version}` }, { title: "" }, { title: "" }], rows);
  const advice = checks.flatMap(({ name, advice }) => (advice ? [`${name}: ${advice}`] : []));
  return [lines, "", ...advice, verdict(ok, checks)].join("\n");
}

function verdict(ok: boolean, checks: readonly Check[]): string {
  const has = (name: string): boolean => checks.some((check) => check.name === name && check.status === "ok");
  if (ok) return "halfbyte works here";
  if (has("cpu kernel") && has("cuda kernel")) return "halfbyte works here, but not all is well";
  return has("cpu kernel") ? "halfbyte works here on the cpu only" : "halfbyte does not work here";
}
