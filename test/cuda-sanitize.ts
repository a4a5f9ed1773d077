/**
 * Every kernel entry at small awkward sizes, for compute-sanitizer, which is some hundred times slower than the GPU:
 *
 *     compute-sanitizer --tool memcheck node build/test/cuda-sanitize.js     (also racecheck, initcheck)
 *
 * Every tensor is an allocation of the driver's own, of just the bytes it needs, so that the tools see the first byte
 * outside. Results are compared with the cpu's as well. Exit 1 when one differs.
 */
import { CpuBackend } from "#halfbyte/backend/cpu/backend.js";
import { Arena, CudaStorage } from "#halfbyte/backend/cuda/arena.js";
import { CudaBackend } from "#halfbyte/backend/cuda/backend.js";
import { CUDA_KERNELS } from "#halfbyte/backend/cuda/kernels.js";
import { DTYPE_ID } from "#halfbyte/core/dtype.js";
import { KERNEL_NAMES, type KernelName, type Operands } from "#halfbyte/core/kernels.js";
import type { Case } from "./cases/case.js";
import { allCases } from "./cases/index.js";
import { compareOutputs, runCase } from "./cases/run.js";

/** Elements of the largest operand beyond which a case is left out. */
const MOST = 21_000;
/** Cases per kernel entry and kind of case. */
const EACH = 2;

/** The parts of the arena that exact allocations need. */
interface Exact {
  readonly stream: { check(call: string, status: number): void; drain(): void; addon: ExactAddon };
  readonly live: Set<CudaStorage>;
  bytes: number;
}
interface ExactAddon {
  readonly results: Float64Array;
  memoryAllocate(bytes: number): number;
  memoryFree(address: number): number;
}

/** One allocation of the driver for each of the arena's, of exactly its size. */
function allocateExactly(): void {
  const prototype = Arena.prototype as unknown as Record<"allocate" | "release", unknown>;
  prototype.allocate = function (this: Exact, bytes: number, internal: boolean): CudaStorage {
    const { addon } = this.stream;
    this.stream.check("memoryAllocate", addon.memoryAllocate(Math.max(1, bytes)));
    const segment = { id: 0, address: addon.results[0]!, bytes };
    const storage = new CudaStorage({ segment, offset: 0 } as never, 0, bytes, internal);
    this.live.add(storage);
    if (!internal) this.bytes += bytes;
    return storage;
  };
  prototype.release = function (this: Exact, storage: CudaStorage): void {
    if (!this.live.delete(storage)) return;
    if (!storage.internal) this.bytes -= storage.bytes;
    this.stream.drain();
    this.stream.check("memoryFree", this.stream.addon.memoryFree(storage.address));
  };
}

/** What a case launches: `entry` of each kernel, with what geometry and branches depend on. */
function entriesOf(c: Case): Set<string> {
  const entries = new Set<string>();
  const launch = CpuBackend.prototype.launch;
  CpuBackend.prototype.launch = function (kernel: KernelName, operands: Operands<KernelName>, context) {
    const plan = CUDA_KERNELS[kernel] as (o: Operands<KernelName>) => { entry: string } | "driver" | undefined;
    const chosen = plan(operands);
    if (typeof chosen === "object") {
      const { from, to, table, offset } = operands as Record<string, unknown>;
      entries.add([chosen.entry, from, to, table ? "table" : "", offset ? "offset" : ""].join(" ").trimEnd());
    }
    launch.call(this, kernel, operands, context);
  };
  try {
    runCase(cpu, c, c.inputs());
  } finally {
    CpuBackend.prototype.launch = launch;
  }
  return entries;
}

/** Cases that together run every kernel entry in each of its ways. */
function chosenCases(): Case[] {
  const seen = new Map<string, number>();
  return [...allCases()].filter((c) => {
    const numbers = [...c.id.matchAll(/\d+/g)].map(Number);
    if (c.large || numbers.some((n) => n > MOST)) return false;
    // Each way of a kernel on plain operands, on views, and with values that take other branches.
    const style =
      /view|nonfinite|wild|nested/.exec(c.id)?.[0] ?? (numbers.some((n) => n > 2000 && n % 2 === 1) ? "odd" : "");
    if (style === "") return false;
    const news = [...entriesOf(c)].filter((entry) => (seen.get(`${entry} ${style}`) ?? 0) < EACH);
    for (const entry of news) seen.set(`${entry} ${style}`, (seen.get(`${entry} ${style}`) ?? 0) + 1);
    return news.length > 0;
  });
}

/** What each tool is there to find, made on purpose: a tool that says nothing of its own has not looked. */
async function plant(kind: string): Promise<void> {
  const gpu = new CudaBackend();
  const at = (bytes: number) => ({ storage: gpu.allocate(bytes), byteOffset: 0 });
  const types = { from: DTYPE_ID.f32, to: DTYPE_ID.f16 };
  // 1,000 elements are read, and there are 999.
  if (kind === "memcheck") gpu.launch("convert", { x: at(3996), y: at(2000), n: 1000, ...types });
  // Nobody has written what is read.
  if (kind === "initcheck") gpu.launch("convert", { x: at(4000), y: at(2000), n: 1000, ...types });
  await gpu.synchronize();
  await gpu.close();
}

const planted = process.argv.indexOf("--plant");
const cpu = new CpuBackend({ threads: 1 });
const cases = planted < 0 ? chosenCases() : [];
if (planted >= 0) {
  allocateExactly();
  await plant(process.argv[planted + 1] ?? "");
} else if (process.argv.includes("--list")) {
  const entries = new Set(cases.flatMap((c) => [...entriesOf(c)]));
  for (const c of cases) console.log(c.id);
  console.log(`${cases.length} cases, ${entries.size} ways to launch ${KERNEL_NAMES.length} kernels`);
} else {
  allocateExactly();
  const gpu = new CudaBackend();
  let failures = 0;
  for (const c of cases) {
    try {
      const inputs = c.inputs();
      const failure = compareOutputs(c, runCase(cpu, c, inputs), runCase(gpu, c, inputs));
      if (failure === undefined) continue;
      failures++;
      console.error(`FAILED ${failure}`);
    } catch (error) {
      failures++;
      console.error(`FAILED ${c.id}: ${error instanceof Error ? error.stack : String(error)}`);
      if (gpu.state !== "ready") break;
    }
  }
  await gpu.close();
  console.log(`${cases.length} cases, ${failures} failures`);
  if (failures > 0) process.exitCode = 1;
}
await cpu.close();
