/**
 * Measures kernels on a GPU: by its own events round many launches back to back, the lower quartile of the rounds, as a share of
 * the device-to-device copy speed of the same run. Something long is launched first, so that the GPU still works on it while the
 * launches that are measured are enqueued: their time is the GPU's, however slow the host. What each bench gives is held
 * against the cpu once, so that what is timed is right.
 */
import { CpuBackend } from "#halfbyte/backend/cpu/backend.js";
import type { CudaBackend } from "#halfbyte/backend/cuda/backend.js";
import { DTYPE_ID } from "#halfbyte/core/dtype.js";
import { tidy } from "#halfbyte/core/scope.js";
import { Tensor } from "#halfbyte/core/tensor.js";
import { quantize4bit } from "#halfbyte/ops/fourbit.js";
import { type Bench, copyBench, lowerQuartile, type Running } from "./harness.js";
import type { Timed } from "./products.js";

/** Weights of a large model; one of a small model, which stays in the GPU's cache and is bound by launches. */
export const CUDA_SIZES = [128 * 1024 * 1024, 1024 * 1024];

/** Elements of a slice that is held against the cpu, at the beginning and at the end. */
const CHECKED = 256 * 1024;
const WARM_UP = 5;
/** GPU time of a round. */
const ROUND_MS = 4;
const MOST_LAUNCHES = 60;
/** Of a GPU's memory. */
const BUSY_SHARE = 1 / 128;

export interface CudaResult {
  readonly name: string;
  readonly elements: number;
  /** The GPU's time of one run. */
  readonly microseconds: number;
  /** Time of one run when they are launched as fast as the host can. */
  readonly launchedMicroseconds: number;
  readonly gelem: number;
  readonly gbytes: number;
  readonly ofCopy: number;
  readonly peer?: string;
  /** Why what it gives is not known to be right. */
  readonly wrong?: string;
}

/** What is measured: a GPU, or what stands in for one. */
export interface Gpu extends Timed {
  /** Copies of so many bytes keep it busy for milliseconds while launches are enqueued. */
  readonly busyBytes: number;
}

export const gpuOf = (backend: CudaBackend): Gpu => ({
  backend,
  elapsed: (body) => backend.elapsed(body),
  busyBytes: Math.floor(backend.info.totalBytes * BUSY_SHARE),
});

/** @param elements of the copy that memory is measured by */
export async function measureCuda(
  gpu: Gpu,
  benches: readonly Bench[],
  elements: number,
  rounds: number,
): Promise<CudaResult[]> {
  const cpu = new CpuBackend();
  try {
    const copy = copyBench(elements);
    const all = [copy, ...benches, copy];
    const times = all.map((bench) => measureBench(gpu, cpu, bench, rounds));
    // Measured before and after the others: what the clocks do in between shows.
    const copyTime = Math.min(times[0]!.microseconds, times.at(-1)!.microseconds);
    const copySpeed = copy.bytes / copyTime;
    return all.map(({ name, elements: count, bytes, peer }, i) => {
      const { microseconds, launchedMicroseconds, wrong } = times[i]!;
      return {
        name: i === all.length - 1 ? `${name}, again` : name,
        elements: count,
        microseconds,
        launchedMicroseconds,
        gelem: count / microseconds / 1e3,
        gbytes: bytes / microseconds / 1e3,
        ofCopy: bytes / microseconds / copySpeed,
        ...(peer !== undefined && { peer }),
        ...(wrong !== undefined && { wrong }),
      };
    });
  } finally {
    await cpu.close();
  }
}

type Times = Pick<CudaResult, "microseconds" | "launchedMicroseconds" | "wrong">;

function measureBench(
  { backend, elapsed, busyBytes: bytes }: Gpu,
  cpu: CpuBackend,
  bench: Bench,
  rounds: number,
): Times {
  return tidy((): Times => {
    const [source, target] = [Tensor.allocate(backend, "u8", [bytes]), Tensor.allocate(backend, "u8", [bytes])];
    const keepBusy = (): void => {
      for (let i = 0; i < 3; i++) backend.launch("copy", { src: source, dst: target, bytes });
    };
    const running = bench.setup(backend, { elements: bench.elements, begin: 0 });
    const wrong = check(cpu, bench, running);
    const { run } = running;
    const several = (count: number) => (): void => {
      for (let i = 0; i < count; i++) run();
    };
    several(WARM_UP)();
    const once = elapsed(several(WARM_UP)) / WARM_UP;
    const count = Math.max(3, Math.min(MOST_LAUNCHES, Math.ceil(ROUND_MS / once)));
    const alone: number[] = [];
    const launched: number[] = [];
    for (let round = 0; round < rounds; round++) {
      keepBusy();
      alone.push((elapsed(several(count)) * 1000) / count);
      launched.push((elapsed(several(count)) * 1000) / count);
    }
    running.dispose?.();
    return {
      microseconds: lowerQuartile(alone),
      launchedMicroseconds: lowerQuartile(launched),
      ...(wrong !== undefined && { wrong }),
    };
  });
}

/** Holds the first and the last elements of what a bench gives (all of it where it must be) against the cpu's. */
function check(cpu: CpuBackend, bench: Bench, { outputs }: Running): string | undefined {
  const { elements, whole } = bench;
  const count = whole ? elements : Math.min(elements, CHECKED);
  try {
    return tidy(() => {
      const ours = outputs();
      for (const begin of whole ? [0] : [0, elements - count]) {
        const reference = bench.setup(cpu, { elements: count, begin });
        const theirs = reference.outputs();
        reference.dispose?.();
        for (const [i, expected] of theirs.entries()) {
          const all = ours[i]!;
          const from = whole ? 0 : Math.round((all.size / elements) * begin);
          const part = all.reshape([all.size]).slice(from, from + expected.size);
          const [want, got] = [expected.bytesSync(), part.bytesSync()];
          if (Buffer.compare(want, got) === 0) continue;
          const at = want.findIndex((byte, k) => byte !== got[k]);
          return `output ${i} differs from the cpu's at byte ${at} behind element ${from}`;
        }
      }
      return undefined;
    });
  } catch (error) {
    return `not checked: ${error instanceof Error ? error.message : String(error)}`;
  }
}

export interface LaunchResult {
  readonly name: string;
  readonly microseconds: number;
}

const CHAIN = 1000;

/** What launching costs the host, and how long it takes from a launch to its result. */
export async function measureLaunches(gpu: CudaBackend): Promise<LaunchResult[]> {
  const x = Tensor.allocate(gpu, "f32", [64]).copyFrom(new Float32Array(64).fill(1));
  const packed = Tensor.allocate(gpu, "u8", [32, 1]);
  const absmax = Tensor.allocate(gpu, "f32", [1]);
  const operands = { x, packed, absmax, n: 64, blocksize: 64, dtype: 0, quantType: 0, allowNonFinite: 0 };
  const dequantize = { packed, absmax, y: x, n: 64, blocksize: 64, dtype: 0, quantType: 0 };
  const convert = { x, y: packed, n: 1, from: DTYPE_ID.f32, to: DTYPE_ID.u8 };
  const kinds: [string, () => void][] = [
    // One element: the GPU is done with it before the next comes, so that this is the host's time.
    ["launch of convert (5 operands)", () => gpu.launch("convert", convert)],
    ["launch of dequantize4bit (7 operands)", () => gpu.launch("dequantize4bit", dequantize)],
    ["launch of quantize4bit (8 operands, reports faults)", () => gpu.launch("quantize4bit", operands)],
    ["launch of fill (by the driver)", () => gpu.launch("fill", { dst: packed, bytes: 32, value: 0 })],
    [
      "quantize4bit() into given tensors, with its checks",
      () => void quantize4bit(x, { quantType: "nf4", out: packed, absmax }),
    ],
    [
      "quantize4bit() with new tensors, disposed",
      () => {
        const [out, state] = quantize4bit(x, { quantType: "nf4" });
        out.dispose();
        state.dispose();
      },
    ],
  ];
  const results: LaunchResult[] = [];
  for (const [name, launch] of kinds) {
    const host: number[] = [];
    const whole: number[] = [];
    for (let round = 0; round < 40; round++) {
      const start = performance.now();
      for (let i = 0; i < CHAIN; i++) launch();
      const launched = performance.now();
      await gpu.synchronize();
      if (round < 10) continue;
      host.push(((launched - start) * 1000) / CHAIN);
      whole.push(((performance.now() - start) * 1000) / CHAIN);
    }
    results.push({ name: `${name}, ${CHAIN} in a row, host`, microseconds: lowerQuartile(host) });
    results.push({ name: `${name}, ${CHAIN} in a row, until done`, microseconds: lowerQuartile(whole) });
  }
  const waits: number[] = [];
  const blocked: number[] = [];
  for (let round = 0; round < 600; round++) {
    const start = performance.now();
    gpu.launch("quantize4bit", operands);
    await packed.data();
    const middle = performance.now();
    gpu.launch("quantize4bit", operands);
    packed.dataSync();
    if (round < 100) continue;
    waits.push((middle - start) * 1000);
    blocked.push((performance.now() - middle) * 1000);
  }
  results.push({ name: "one launch to its result, await data()", microseconds: lowerQuartile(waits) });
  results.push({ name: "one launch to its result, dataSync()", microseconds: lowerQuartile(blocked) });
  for (const t of [x, packed, absmax]) t.dispose();
  return results;
}
