/**
 * `npm run bench`, `npm run bench -- --device cuda`: tables for docs/benchmarks.md.
 *
 *     --device cpu|cuda   --what kernels,products,optimizers   --filter TEXT   --rounds N   --json FILE (as well)
 *     --peer (bitsandbytes beside ours; HALFBYTE_PYTHON)   --threads 1,2 (cpu)   --elements 134217728,1048576 (cuda)
 *     --rehearse: with cuda, the products and optimizers small and on the cpu, to see that everything runs
 */
import { execFileSync } from "node:child_process";
import { mkdtempSync, renameSync, rmSync, writeFileSync } from "node:fs";
import { cpus, tmpdir } from "node:os";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { CpuBackend } from "#halfbyte/backend/cpu/backend.js";
import { CudaBackend } from "#halfbyte/backend/cuda/backend.js";
import { Tensor } from "#halfbyte/core/tensor.js";
import { blockwiseBenches } from "./blockwise.bench.js";
import { convertBenches } from "./convert.bench.js";
import { CUDA_SIZES, type CudaResult, gpuOf, measureCuda, measureLaunches } from "./cuda.js";
import { fourbitBenches } from "./fourbit.bench.js";
import { type Bench, ELEMENTS, input, measure, type Result } from "./harness.js";
import { igemmBenches } from "./igemm.bench.js";
import { int8Benches } from "./int8.bench.js";
import { matmulBenches } from "./matmul.bench.js";
import { matmul4bitBenches } from "./matmul4bit.bench.js";
import { smolLm2 } from "./optimizer.bench.js";
import {
  CPU_PARAMETERS,
  CUDA_PARAMETERS,
  measureOptimizers,
  measureOptimizersCuda,
  optimizerTable,
  optimizerTableCuda,
  type PeerOptimizers,
} from "./optimizers.js";
import { measureProducts, type ProductTable, products, type Timed } from "./products.js";
import { sparseBenches } from "./sparse.bench.js";
import { measureStream, type StreamResult } from "./stream.bench.js";
import { sumBenches } from "./sum.bench.js";

const { values: options } = parseArgs({
  options: {
    device: { type: "string", default: "cpu" },
    json: { type: "string" },
    what: { type: "string", default: "kernels,products,optimizers" },
    rehearse: { type: "boolean", default: false },
    peer: { type: "boolean", default: false },
    filter: { type: "string", default: "" },
    threads: { type: "string", default: "1,2" },
    elements: { type: "string", default: CUDA_SIZES.join(",") },
    rounds: { type: "string", default: "15" },
  },
});
const rounds = Number(options.rounds);
const [kernelsToo, productsToo, optimizersToo] = ["kernels", "products", "optimizers"].map((what) =>
  options.what.split(",").includes(what),
);
const REHEARSAL_DIVISOR = 32;
const REHEARSAL_COPY = 1024 * 1024;
const machine = { cpu: cpus()[0]!.model.trim(), cores: cpus().length, node: process.version, arch: process.arch };

function benchesOf(elements: number): Bench[] {
  const families = [blockwiseBenches, fourbitBenches, int8Benches, convertBenches, sumBenches];
  return families.flatMap((benches) => benches(elements)).filter((b) => b.name.includes(options.filter));
}

function productBenches(): Bench[] {
  const families = [matmul4bitBenches, igemmBenches, matmulBenches, sparseBenches];
  return families.flatMap((benches) => benches()).filter((b) => b.name.includes(options.filter));
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

/** bitsandbytes' native CPU library on the same array: milliseconds by operation (lower quartile). */
function peerTimes(what: "kernels" | "products", threads: number): Record<string, number> {
  const folder = mkdtempSync(join(tmpdir(), "halfbyte-bench-"));
  try {
    const file = join(folder, "input.f32");
    writeFileSync(file, input());
    return python(["bench/peer.py", file, what], { OMP_NUM_THREADS: String(threads) }) as Record<string, number>;
  } finally {
    rmSync(folder, { recursive: true });
  }
}

function peerOptimizers(device: "cpu" | "cuda", elements: number, threads = 1): PeerOptimizers {
  const args = ["bench/peer_optimizers.py", device, String(elements)];
  const shapes = device === "cuda" ? ["--shapes", JSON.stringify(smolLm2().shapes)] : [];
  return python([...args, ...shapes], { OMP_NUM_THREADS: String(threads) }) as PeerOptimizers;
}

async function benchCpu(): Promise<void> {
  const threads = options.threads.split(",").map(Number);
  const results: Result[] = [];
  const stream: StreamResult[] = [];
  const made: Result[] = [];
  for (const count of threads) {
    if (kernelsToo) results.push(...(await measure(benchesOf(ELEMENTS), count, rounds)));
    if (kernelsToo && !options.filter) stream.push(...(await measureStream(count)));
    const benches = productsToo ? productBenches() : [];
    // Without the copy in front, which says nothing about them.
    if (benches.length > 0) made.push(...(await measure(benches, count, rounds)).slice(1));
  }
  const steps = optimizersToo ? await measureOptimizers(threads, rounds, options.filter) : [];
  const peer = options.peer && kernelsToo ? peerTimes("kernels", 1) : {};
  const peerProducts =
    options.peer && made.length > 0
      ? Object.fromEntries(threads.map((count) => [count, peerTimes("products", count)]))
      : undefined;
  const peerSteps =
    options.peer && steps.length > 0
      ? Object.fromEntries(threads.map((count) => [count, peerOptimizers("cpu", CPU_PARAMETERS, count)]))
      : undefined;
  save({ results, stream, peer, products: made, peerProducts, optimizers: steps, peerOptimizers: peerSteps });
  console.log(
    `${machine.cpu}, ${machine.cores} cores, Node ${machine.node} ${machine.arch}; lower quartiles of ${rounds} rounds`,
  );
  if (results.length > 0) printCpu(results, threads, peer);
  if (stream.length > 0) console.log("");
  for (const { name, threads: count, microseconds } of stream) {
    console.log(`${name}, ${workers(count)}: ${microseconds.toFixed(2)} µs`);
  }
  if (made.length > 0) printCpuProducts(made, threads, peerProducts);
  if (steps.length > 0) {
    console.log(`\noptimizers, ${CPU_PARAMETERS} parameters: 10^6 per second, bytes per second, share of the copy's\n`);
    console.log(optimizerTable(steps, threads, peerSteps));
  }
  complain(steps);
}

/** Says what is not right, if anything is not. */
function complain(results: readonly { readonly name: string; readonly wrong?: string }[]): void {
  for (const { name, wrong } of results) {
    if (wrong === undefined) continue;
    console.error(`WRONG ${name}: ${wrong}`);
    process.exitCode = 1;
  }
}

const workers = (count: number): string => `${count} worker${count > 1 ? "s" : ""}`;
const named = (results: readonly Result[]): Result[][] =>
  [...new Set(results.map((r) => r.name))].map((name) => results.filter((r) => r.name === name));
const speedUp = (own: readonly Result[]): string =>
  own.length > 1 ? `${(own[0]!.milliseconds / own.at(-1)!.milliseconds).toFixed(2)}x` : "-";

function printCpu(results: readonly Result[], threads: readonly number[], peer: Record<string, number>): void {
  const other = options.peer ? ["bitsandbytes, 1 thread", "ours to theirs"] : [];
  console.log("");
  printHead(["", ...threads.map(workers), "speed-up", ...other]);
  for (const own of named(results)) {
    const [first] = own as [Result];
    const line = [
      first.name,
      ...own.map((r) => `${r.gelem.toFixed(2)} Gelem/s, ${percent(r.ofCopy)} of copy`),
      speedUp(own),
    ];
    if (options.peer) {
      const ms = first.peer === undefined ? undefined : peer[first.peer];
      const rate = ms && (first.gelem * first.milliseconds) / ms;
      line.push(rate ? `${rate.toFixed(2)} Gelem/s` : "-", rate ? `${(first.gelem / rate).toFixed(2)}x` : "-");
    }
    console.log(row(line));
  }
}

/** An element of these benches is a multiply-add. */
function printCpuProducts(
  results: readonly Result[],
  threads: readonly number[],
  peer: Readonly<Record<number, Record<string, number>>> | undefined,
): void {
  const theirs = peer ? threads.map((count) => `bitsandbytes, ${count} thread${count > 1 ? "s" : ""}`) : [];
  console.log("\nproducts, 10^9 multiply-adds per second\n");
  printHead(["", ...threads.map(workers), "speed-up", ...theirs]);
  for (const own of named(results)) {
    const line = [own[0]!.name, ...own.map((r) => r.gelem.toFixed(2)), speedUp(own)];
    for (const r of peer ? own : []) {
      const ms = r.peer === undefined ? undefined : peer![r.threads]?.[r.peer];
      line.push(ms === undefined ? "-" : ((r.gelem * r.milliseconds) / ms).toFixed(2));
    }
    console.log(row(line));
  }
}

/** What bench/peer_cuda.py prints. */
interface PeerCuda {
  readonly versions: string;
  /** By elements: microseconds of the float32 copy by torch, and of each operation. */
  readonly sizes: Readonly<Record<string, { readonly copy: number; readonly ops: Readonly<Record<string, number>> }>>;
  /** By name: microseconds of a product. */
  readonly products: Readonly<Record<string, PeerProduct>>;
}

interface PeerProduct {
  readonly bitsandbytes: number;
  /** Launched as fast as the host can. */
  readonly bitsandbytesLaunched: number;
  /** By torch, with the weight in the activations' dtype. */
  readonly dense: number;
}

async function benchCuda(): Promise<void> {
  if (options.rehearse) return rehearse();
  const gpu = new CudaBackend();
  const sizes = kernelsToo ? options.elements.split(",").map(Number) : [];
  const results: CudaResult[] = [];
  for (const elements of sizes) {
    results.push(...(await measureCuda(gpuOf(gpu), benchesOf(elements), elements, rounds)));
  }
  const launches = options.filter || !kernelsToo ? [] : await measureLaunches(gpu);
  const wanted = productsToo ? products().filter(({ name }) => name.includes(options.filter)) : [];
  const timed: Timed = { backend: gpu, elapsed: (body) => gpu.elapsed(body) };
  const table = wanted.length > 0 ? measureProducts(timed, wanted, rounds) : undefined;
  const steps = optimizersToo ? await measureOptimizersCuda(gpuOf(gpu), rounds, options.filter) : [];
  const images = gpu.imagesInUse();
  const { name, multiprocessors, driverVersion } = gpu.info;
  await gpu.close();
  // After ours has let go of the GPU, in the same run: clocks and neighbours are the same.
  const asked = ["bench/peer_cuda.py", ...sizes.map(String), "--products", JSON.stringify(wanted)];
  const peer = options.peer && (kernelsToo || productsToo) ? (python(asked) as PeerCuda) : undefined;
  const peerSteps = options.peer && steps.length > 0 ? peerOptimizers("cuda", CUDA_PARAMETERS) : undefined;
  const found = { results, launches, products: table, peer, optimizers: steps, peerOptimizers: peerSteps };
  save({ gpu: { name, multiprocessors, driverVersion }, images, ...found });

  const driver = `${Math.floor(driverVersion / 1000)}.${(driverVersion % 1000) / 10}`;
  console.log(`${name}, ${multiprocessors} multiprocessors, driver ${driver}; ${machine.cpu}, Node ${machine.node}`);
  console.log(`images: ${images.join("; ")}`);
  if (peer) console.log(`beside: ${peer.versions}`);
  for (const elements of sizes) printSize(results, elements, peer);
  if (launches.length > 0) console.log("");
  for (const { name: what, microseconds } of launches) console.log(`${what}: ${microseconds.toFixed(2)} µs`);
  if (table) printProducts(table, peer);
  if (steps.length > 0) {
    const beside = peerSteps ? `; beside ${peerSteps.versions}` : "";
    console.log(`\noptimizers, ${CUDA_PARAMETERS} parameters; copy ${steps[0]!.gbytes.toFixed(0)} GB/s${beside}\n`);
    console.log(optimizerTableCuda(steps, peerSteps));
  }
  complain(results.map((r) => ({ ...r, name: `${r.name}, ${r.elements} elements` })));
  complain([...(table?.results ?? []), ...steps]);
  if (process.exitCode === undefined)
    console.log(
      "\nevery result is right where it was checked: kernels are the cpu's, bit for bit; products are near float64",
    );
}

/** The products and optimizers as on a GPU, but small and on the cpu. The times mean nothing. */
async function rehearse(): Promise<void> {
  const backend = new CpuBackend();
  const word = Tensor.allocate(backend, "u8", [1]);
  await backend.synchronize();
  const elapsed = (body: () => void): number => {
    word.bytesSync();
    const start = performance.now();
    body();
    word.bytesSync();
    return performance.now() - start;
  };
  const wanted = productsToo ? products(REHEARSAL_DIVISOR).filter(({ name }) => name.includes(options.filter)) : [];
  const table = measureProducts({ backend, elapsed }, wanted, 1, REHEARSAL_COPY);
  const gpu = { backend, elapsed, busyBytes: REHEARSAL_COPY };
  const steps = optimizersToo ? await measureOptimizersCuda(gpu, 1, options.filter, REHEARSAL_DIVISOR) : [];
  await backend.close();
  save({
    gpu: { name: "rehearsal", multiprocessors: 0, driverVersion: 0 },
    images: [],
    results: [],
    launches: [],
    products: table,
    optimizers: steps,
  });
  printProducts(table, undefined);
  if (steps.length > 0) console.log(`\n${optimizerTableCuda(steps)}`);
  complain([...table.results, ...steps]);
  if (table.results.length + steps.length === 0) process.exitCode = 1;
}

function printSize(results: readonly CudaResult[], elements: number, peer: PeerCuda | undefined): void {
  const own = results.filter((r) => r.elements === elements);
  const other = peer?.sizes[elements];
  const copy = own[0]!;
  const where = elements === Math.max(...CUDA_SIZES) ? "in memory" : "operands fit in the GPU's cache";
  const speeds = `copy ${copy.gbytes.toFixed(0)} GB/s${other ? `, torch's ${((8 * elements) / other.copy / 1e3).toFixed(0)} GB/s` : ""}`;
  console.log(`\n${elements} elements (${where}); ${speeds}\n`);
  const head = ["", "µs", "launched, µs", "Gelem/s", "of copy"];
  printHead([...head, ...(other ? ["bitsandbytes, µs", "of its copy", "ours to theirs"] : [])]);
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

function printProducts({ copyGbytes, results }: ProductTable, peer: PeerCuda | undefined): void {
  console.log(`\nproducts; copy ${copyGbytes.toFixed(0)} GB/s\n`);
  printHead([
    "",
    "path",
    "µs",
    "launched, µs",
    "host, µs",
    "its bytes at the copy's speed, µs",
    "bitsandbytes, µs",
    "dense, µs",
  ]);
  for (const r of results) {
    const other = peer?.products[r.name];
    const own = [r.microseconds, r.launchedMicroseconds, r.hostMicroseconds, r.bytes / copyGbytes / 1e3];
    const cells = [...own, other?.bitsandbytes, other?.dense].map((time) => time?.toFixed(1) ?? "-");
    console.log(row([r.name, r.path, ...cells]));
  }
}

function printHead(cells: readonly string[]): void {
  console.log(row(cells));
  console.log(`|${"---|".repeat(cells.length)}`);
}

function percent(share: number): string {
  return `${(share * 100).toFixed(0)} %`;
}

if (options.device === "cpu") await benchCpu();
else if (options.device === "cuda") await benchCuda();
else throw new Error(`--device: cpu or cuda, not ${options.device}`);
