/**
 * Measures kernels against a memcpy of the same run. Benches are interleaved (every round runs each once), so that a noisy
 * neighbour hits all of them; the lower quartile of the rounds is reported (on shared machines the median tells more about the
 * neighbours), and the share of the copy speed.
 */
import { CpuBackend } from "#halfbyte/backend/cpu/backend.js";
import { Tensor } from "#halfbyte/core/tensor.js";

export const ELEMENTS = 16 * 1024 * 1024;

/** One thing to measure. */
export interface Bench {
  readonly name: string;
  /** Elements of one run: rates are elements per second. */
  readonly elements: number;
  /** Bytes read and written by one run: its floor is these over the copy speed. */
  readonly bytes: number;
  /** What bench/peer.py calls the same operation, where bitsandbytes has it. */
  readonly peer?: string;
  /** Makes operands; the returned function launches the work once. */
  setup(backend: CpuBackend): () => void;
}

export interface Result {
  readonly name: string;
  readonly threads: number;
  readonly milliseconds: number;
  /** 10^9 elements per second. */
  readonly gelem: number;
  /** 10^9 bytes per second, read and written. */
  readonly gbytes: number;
  /** Share of the copy speed of the same run. */
  readonly ofCopy: number;
  readonly peer?: string;
}

export const copyBench: Bench = {
  name: "memcpy 64 MB",
  elements: ELEMENTS,
  bytes: 8 * ELEMENTS,
  setup(backend) {
    const src = Tensor.allocate(backend, "f32", [ELEMENTS]).copyFrom(input());
    const dst = Tensor.allocate(backend, "f32", [ELEMENTS]);
    return () => backend.launch("copy", { src, dst, bytes: src.byteLength });
  },
};

let values: Float32Array<ArrayBuffer> | undefined;
/** The 16 M roughly normal values that every bench and the peer use. */
export function input(): Float32Array<ArrayBuffer> {
  if (!values) {
    values = new Float32Array(ELEMENTS);
    let state = 1;
    const next = (): number => {
      state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
      return state;
    };
    for (let i = 0; i < ELEMENTS; i++) values[i] = ((next() + next() + next() + next()) / 2 ** 32 - 2) * 0.05;
  }
  return values;
}

export async function measure(benches: readonly Bench[], threads: number, rounds: number): Promise<Result[]> {
  const backend = new CpuBackend({ threads });
  try {
    const all = [copyBench, ...benches];
    const runs = all.map((b) => b.setup(backend));
    const times: number[][] = all.map(() => []);
    for (let round = -2; round < rounds; round++) {
      for (const [i, run] of runs.entries()) {
        const start = performance.now();
        run();
        await backend.synchronize();
        if (round >= 0) times[i]!.push(performance.now() - start);
      }
    }
    const typical = times.map(lowerQuartile);
    const copySpeed = copyBench.bytes / typical[0]!;
    return all.map((b, i) => ({
      name: b.name,
      threads,
      milliseconds: typical[i]!,
      gelem: b.elements / typical[i]! / 1e6,
      gbytes: b.bytes / typical[i]! / 1e6,
      ofCopy: b.bytes / typical[i]! / copySpeed,
      peer: b.peer,
    }));
  } finally {
    await backend.close();
  }
}

export function lowerQuartile(times: readonly number[]): number {
  return [...times].sort((a, b) => a - b)[times.length >> 2]!;
}

/** The input in `dtype` on the backend. */
export function operand(backend: CpuBackend, dtype: "f32" | "f16" | "bf16"): Tensor {
  const wide = Tensor.allocate(backend, "f32", [ELEMENTS]).copyFrom(input());
  if (dtype === "f32") return wide;
  const narrow = wide.to(dtype);
  wide.dispose();
  return narrow;
}
