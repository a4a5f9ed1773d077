/**
 * The case list, but for what is large, for compute-sanitizer, which is some hundred times slower than the GPU:
 *
 *     compute-sanitizer --tool memcheck node build/test/cuda-sanitize.js [--shard 0/4]     (also racecheck, initcheck)
 *
 * With --shard only every fourth case, from the first on: several processes then share the list. Dense products run on our own
 * kernels, not on a library's.
 *
 * Every tensor is an allocation of the driver's own, of just the bytes it needs, so that the tools see the first byte
 * outside. Results are compared with the cpu's or the reference as well. Exit 1 when one differs.
 */
import { CpuBackend } from "#halfbyte/backend/cpu/backend.js";
import { Arena, CudaStorage } from "#halfbyte/backend/cuda/arena.js";
import { CudaBackend } from "#halfbyte/backend/cuda/backend.js";
import { DTYPE_ID } from "#halfbyte/core/dtype.js";
import { allCases } from "./cases/index.js";
import { compareOutputs, expectedOn, runCase } from "./cases/run.js";

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

function shardOf(args: readonly string[]): [shard: number, shards: number] {
  const at = args.indexOf("--shard");
  const [, shard, shards] = /^(\d+)\/(\d+)$/.exec(at < 0 ? "0/1" : (args[at + 1] ?? "")) ?? [];
  if (shard === undefined || Number(shards) === 0) throw new Error("--shard: expected two numbers, 0/4");
  return [Number(shard), Number(shards)];
}

async function runCases(): Promise<void> {
  const cpu = new CpuBackend({ threads: 1 });
  const gpu = new CudaBackend({ blas: false });
  const [shard, shards] = shardOf(process.argv);
  const cases = [...allCases()].filter((c) => !c.large).filter((_, i) => i % shards === shard);
  let failures = 0;
  for (const c of cases) {
    try {
      const inputs = c.inputs();
      const expected = expectedOn("cuda", c, inputs, () => runCase(cpu, c, inputs));
      const failure = compareOutputs(c, expected, runCase(gpu, c, inputs));
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
  await cpu.close();
  console.log(`${cases.length} cases, ${failures} failures`);
  if (failures > 0) process.exitCode = 1;
}

allocateExactly();
const planted = process.argv.indexOf("--plant");
await (planted < 0 ? runCases() : plant(process.argv[planted + 1] ?? ""));
