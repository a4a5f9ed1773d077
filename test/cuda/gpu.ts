/**
 * For the bad days: tests that need a real GPU. `npm run test:cuda` runs them, one file after the other, and records how they
 * ended; elsewhere they are skipped.
 */
import { spawnSync } from "node:child_process";
import { fileURLToPath } from "node:url";
import { describe } from "vitest";
import { CpuBackend } from "#halfbyte/backend/cpu/backend.js";
import { CudaBackend, type CudaOptions } from "#halfbyte/backend/cuda/backend.js";
import { cudaMissing } from "#halfbyte/backend/devices.js";
import type { Backend } from "#halfbyte/core/backend.js";
import { Tensor } from "#halfbyte/core/tensor.js";
import { expectNothingLeft } from "../helpers/backends.js";

export const MB = 1 << 20;
export const GB = 2 ** 30;

// `rehearse`: whatever driver HALFBYTE_CUDA_LIBRARY names, for the sake of these tests.
const SKIPPED =
  process.env.HALFBYTE_TEST_CUDA === "rehearse"
    ? undefined
    : process.env.HALFBYTE_TEST_CUDA
      ? cudaMissing()
      : "npm run test:cuda runs it on a machine with a GPU";

/** Tests on the GPU, or the reason why they are not run. */
export function onGpu(what: string, body: () => void): void {
  describe.skipIf(SKIPPED)(`${what}${SKIPPED ? ` (skipped: ${SKIPPED})` : ""}`, body);
}

/** Runs `body` with a backend of its own; then nothing may be left. */
export async function withCuda(options: CudaOptions, body: (gpu: CudaBackend) => Promise<void> | void): Promise<void> {
  const gpu = new CudaBackend(options);
  try {
    await body(gpu);
    expectNothingLeft(gpu);
  } finally {
    await gpu.close();
  }
}

/** `withCuda` with the cpu beside it. */
export async function withBoth(body: (gpu: CudaBackend, cpu: CpuBackend) => Promise<void> | void): Promise<void> {
  const cpu = new CpuBackend({ threads: 2 });
  try {
    await withCuda({}, (gpu) => body(gpu, cpu));
    expectNothingLeft(cpu);
  } finally {
    await cpu.close();
  }
}

/** Free bytes of the GPU as its driver sees them: whatever has leaked is missing here. */
export function driverFree(gpu: CudaBackend): number {
  const { addon } = (gpu as unknown as { stream: { addon: { memoryInfo(): number; results: Float64Array } } }).stream;
  if (addon.memoryInfo() !== 0) throw new Error("memoryInfo failed");
  return addon.results[0]!;
}

export function bytes(backend: Backend, n: number): Tensor<"u8"> {
  return Tensor.allocate(backend, "u8", [n]);
}

export function floats(backend: Backend, values: Float32Array): Tensor<"f32"> {
  return Tensor.allocate(backend, "f32", [values.length]).copyFrom(values);
}

export function fill(t: Tensor, value: number): void {
  t.backend.launch("fill", { dst: t, bytes: t.byteLength, value: Math.imul(value & 255, 0x01010101) >>> 0 });
}

/** The error that `body` throws or rejects with. */
export async function caught(body: () => unknown): Promise<Error> {
  try {
    await body();
  } catch (error) {
    return error as Error;
  }
  throw new Error("expected an error");
}

export interface Ended {
  readonly code: number | null;
  readonly signal: NodeJS.Signals | null;
  readonly stdout: string;
  readonly stderr: string;
}

/** What a forked program finds under these names. */
const PRELUDE = `
import { CpuBackend } from "#halfbyte/backend/cpu/backend.js";
import { CudaBackend } from "#halfbyte/backend/cuda/backend.js";
import { Tensor } from "#halfbyte/core/tensor.js";
import { quantize4bit } from "#halfbyte/ops/fourbit.js";
const say = (value) => console.log(JSON.stringify(value));
const fill = (t, value) => t.backend.launch("fill", { dst: t, bytes: t.byteLength, value: (value * 0x01010101) >>> 0 });
const about = (error) => ({ name: error?.name, code: error?.code, status: error?.statusName, message: error?.message });
const attempt = async (body) => { try { await body(); return "no error"; } catch (error) { return about(error); } };
/** An address that is nobody's: a kernel that reads there faults. */
const NOWHERE = { storage: { bytes: 1 << 20, arena: 0, offset: 0, address: 0x1000, reads: 0, released: false }, byteOffset: 0 };
`;

/** Runs a program in a process of its own, so that whatever it does to the GPU ends with it. */
export function program(code: string, env: Record<string, string> = {}): Ended {
  const { status, signal, stdout, stderr } = spawnSync(
    process.execPath,
    ["--input-type=module", "-e", `${PRELUDE}\n${code}`],
    {
      cwd: fileURLToPath(new URL("../../", import.meta.url)),
      encoding: "utf8",
      timeout: 60_000,
      killSignal: "SIGKILL",
      env: { ...process.env, ...env },
    },
  );
  return { code: status, signal, stdout, stderr };
}

/** The values that a program `say`s. */
export function said({ stdout }: Ended): unknown[] {
  return stdout
    .split("\n")
    .filter((line) => line !== "")
    .map((line) => JSON.parse(line) as unknown);
}
