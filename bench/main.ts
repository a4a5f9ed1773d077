/**
 * `npm run bench`, `npm run bench -- --device cuda`: tables for docs/benchmarks.md.
 *
 *     --device cpu|cuda   --filter TEXT   --rounds N   --json FILE (as well)   --peer (bitsandbytes beside ours; HALFBYTE_PYTHON)
 *     --threads 1,2 (cpu)   --elements 134217728,1048576 (cuda)
 */
import { execFileSync } from "node:child_process";
import { mkdtempSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { cpus, tmpdir } from "node:os";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { CudaBackend } from "#halfbyte/backend/cuda/backend.js";
import { blockwiseBenches } from "./blockwise.bench.js";
import { convertBenches } from "./convert.bench.js";
import { CUDA_SIZES, type CudaResult, measureCuda, measureLaunches } from "./cuda.js";
import { fourbitBenches } from "./fourbit.bench.js";
import { type Bench, ELEMENTS, input, measure, type Result } from "./harness.js";
import { int8Benches } from "./int8.bench.js";
import { measureStream, type StreamResult } from "./stream.bench.js";
import { sumBenches } from "./sum.bench.js";

const { values: options } = parseArgs({
  options: {
    device: { type: "string", default: "cpu" },
    json: { type: "string" },
    peer: { type: "boolean", default: false },
    filter: { type: "string", default: "" },
    threads: { type: "string", default: "1,2" },
    elements: { type: "string", default: CUDA_SIZES.join(",") },
    rounds: { type: "string", default: "15" },
  },
});
const rounds = Number(options.rounds);
const machine = { cpu: cpus()[0]!.model.trim(), cores: cpus().length, node: process.version, arch: process.arch };

function benchesOf(elements: number): Bench[] {
  const families = [blockwiseBenches, fourbitBenches, int8Benches, convertBenches, sumBenches];
  return families.flatMap((benches) => benches(elements)).filter((b) => b.name.includes(options.filter));
}

function python(args: readonly string[], env: Record<string, string> = {}): unknown {
  const program = process.env.HALFBYTE_PYTHON ?? "python3";
  return JSON.parse(execFileSync(program, args, { encoding: "utf8", env: { ...process.env, ...env } }));
}

function save(found: object): void {
  if (options.json === undefined) return;
  writeFileSync(`${options.json}.partial`, `${JSON.stringify({ machine, ...found }, null, 1)}\n`);
  renameSync(`${options.json}.partial`, options.json);
}

const row = (cells: readonly string[]): string => `| ${cells.join(" | ")} |`;

if (options.device === "cpu") await benchCpu();
else if (options.device === "cuda") await benchCuda();
else throw new Error(`--device: cpu or cuda, not ${options.device}`);

/** bitsandbytes' native CPU library on the same array, one thread: milliseconds by operation (lower quartile). */
function peerTimes(): Record<string, number> {
  const folder = mkdtempSync(join(tmpdir(), "halfbyte-bench-"));
  try {
    const file = join(folder, "input.f32");
    writeFileSync(file, input());
    return python(["bench/peer.py", file], { OMP_NUM_THREADS: "1" }) as Record<string, number>;
  } finally {
    rmSync(folder, { recursive: true });
  }
}

async function benchCpu(): Promise<void> {
  const threads = options.threads.split(",").map(Number);
  const results: Result[] = [];
  const stream: StreamResult[] = [];
  for (const count of threads) {
    results.push(...(await measure(benchesOf(ELEMENTS), count, rounds)));
    if (!options.filter) stream.push(...(await measureStream(count)));
  }
  const peer = options.peer ? peerTimes() : {};
  save({ results, stream, peer });
  console.log(
    `${machine.cpu}, ${machine.cores} cores, Node ${machine.node} ${machine.arch}; lower quartiles of ${rounds} rounds\n`,
  );
  const head = [
    "",
    ...threads.map((t) => `${t} worker${t > 1 ? "s" : ""}`),
    ...(threads.length > 1 ? ["speed-up"] : []),
  ];
  console.log(row([...head, ...(options.peer ? ["bitsandbytes, 1 thread", "ours to theirs"] : [])]));
  console.log(`|${"---|".repeat(head.length + (options.peer ? 2 : 0))}`);
  for (const name of new Set(results.map((r) => r.name))) {
    const own = results.filter((r) => r.name === name);
    const cells = own.map((r) => `${r.gelem.toFixed(2)} Gelem/s, ${(r.ofCopy * 100).toFixed(0)} % of copy`);
    const line = [name, ...cells];
    if (threads.length > 1) line.push(`${(own[0]!.milliseconds / own.at(-1)!.milliseconds).toFixed(2)}x`);
    if (options.peer) {
      const ms = own[0]!.peer === undefined ? undefined : peer[own[0]!.peer];
      const rate = ms && (own[0]!.gelem * own[0]!.milliseconds) / ms;
      line.push(rate ? `${rate.toFixed(2)} Gelem/s` : "-", rate ? `${(own[0]!.gelem / rate).toFixed(2)}x` : "-");
    }
    console.log(row(line));
  }
  if (stream.length > 0) console.log("");
  for (const { name, threads: count, microseconds } of stream) {
    console.log(`${name}, ${count} worker${count > 1 ? "s" : ""}: ${microseconds.toFixed(2)} µs`);
  }
}

/** What bench/peer_cuda.py prints. */
interface PeerCuda {
  readonly versions: string;
  /** By elements: microseconds of the float32 copy by torch, and of each operation. */
  readonly sizes: Readonly<Record<string, { readonly copy: number; readonly ops: Readonly<Record<string, number>> }>>;
}

async function benchCuda(): Promise<void> {
  const gpu = new CudaBackend();
  const sizes = options.elements.split(",").map(Number);
  const results: CudaResult[] = [];
  for (const elements of sizes) results.push(...(await measureCuda(gpu, benchesOf(elements), elements, rounds)));
  const launches = options.filter ? [] : await measureLaunches(gpu);
  const images = gpu.imagesInUse();
  const { name, multiprocessors, driverVersion } = gpu.info;
  await gpu.close();
  // After ours has let go of the GPU, in the same run: clocks and neighbours are the same.
  const peer = options.peer ? (python(["bench/peer_cuda.py", ...sizes.map(String)]) as PeerCuda) : undefined;
  save({ gpu: { name, multiprocessors, driverVersion }, images, results, launches, peer });

  const driver = `${Math.floor(driverVersion / 1000)}.${(driverVersion % 1000) / 10}`;
  console.log(`${name}, ${multiprocessors} multiprocessors, driver ${driver}; ${machine.cpu}, Node ${machine.node}`);
  console.log(`images: ${images.join("; ")}`);
  if (peer) console.log(`beside: ${peer.versions}`);
  for (const elements of sizes) {
    const own = results.filter((r) => r.elements === elements);
    const other = peer?.sizes[elements];
    const copy = own[0]!;
    const where = elements === Math.max(...CUDA_SIZES) ? "in memory" : "operands fit in the GPU's cache";
    console.log(
      `\n${elements} elements (${where}); copy ${copy.gbytes.toFixed(0)} GB/s${other ? `, torch's ${((8 * elements) / other.copy / 1e3).toFixed(0)} GB/s` : ""}\n`,
    );
    const head = ["", "µs", "launched, µs", "Gelem/s", "of copy"];
    console.log(row([...head, ...(other ? ["bitsandbytes, µs", "of its copy", "ours to theirs"] : [])]));
    console.log(`|${"---|".repeat(head.length + (other ? 3 : 0))}`);
    for (const r of own) {
      const line = [
        r.name,
        r.microseconds.toFixed(1),
        r.launchedMicroseconds.toFixed(1),
        r.gelem.toFixed(1),
        percent(r.ofCopy),
      ];
      const theirs = other && r.peer !== undefined ? other.ops[r.peer] : undefined;
      if (other && theirs !== undefined) {
        const bytes = r.gbytes * r.microseconds * 1e3;
        const ofTheirCopy = bytes / theirs / ((8 * elements) / other.copy);
        line.push(theirs.toFixed(1), percent(ofTheirCopy), `${(theirs / r.microseconds).toFixed(2)}x`);
      } else if (other) line.push("-", "-", "-");
      console.log(row(line));
    }
  }
  console.log("");
  for (const { name: what, microseconds } of launches) console.log(`${what}: ${microseconds.toFixed(2)} µs`);
  const wrong = results.filter((r) => r.wrong !== undefined);
  for (const r of wrong) console.error(`WRONG ${r.name}, ${r.elements} elements: ${r.wrong}`);
  console.log(wrong.length === 0 ? "every result is the cpu's, bit for bit, where it was checked" : "");
  if (wrong.length > 0) process.exitCode = 1;
}

function percent(share: number): string {
  return `${(share * 100).toFixed(0)} %`;
}
