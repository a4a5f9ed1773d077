/**
 * Measures kernels against a copy of the same run. On the cpu benches are interleaved (every round runs each once), so that a noisy
 * neighbour hits all of them; the lower quartile of the rounds is reported (on shared machines the median tells more about the
 * neighbours), and the share of the copy speed. How a GPU is measured: cuda.ts.
 */
import { CpuBackend } from "#halfbyte/backend/cpu/backend.js";
import type { Backend } from "#halfbyte/core/backend.js";
import { Tensor } from "#halfbyte/core/tensor.js";

/** Elements of every cpu bench. */
export const ELEMENTS = 16 * 1024 * 1024;

/** What a bench works on: elements [begin, begin + elements) of the common input, which repeats after PERIOD. */
export interface Work {
  readonly elements: number;
  readonly begin: number;
}

/** A bench with its operands on a backend. */
export interface Running {
  /** Launches the work once. */
  run(): void;
  /** Launches it once more, and gives what it computes: each tensor has its part of every element, in order. */
  outputs(): readonly Tensor[];
  /** Runs it once and says what is wrong with what it computes: for benches whose results nothing else is compared with on the cpu. */
  check?(): string | undefined;
  /** Gives back what `tidy` does not. */
  dispose?(): void;
}

/** One thing to measure. */
export interface Bench {
  readonly name: string;
  /** Elements of one run: rates are elements per second. */
  readonly elements: number;
  /** Bytes read and written by one run: its floor is these over the copy speed. */
  readonly bytes: number;
  /** What bench/peer.py and bench/peer_cuda.py call the same operation, where bitsandbytes has it. */
  readonly peer?: string;
  /** Some of its outputs depend on the whole input, so that a slice of it cannot be checked by itself. */
  readonly whole?: boolean;
  setup(backend: Backend, work: Work): Running;
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
  /** Why what it gives is not right. */
  readonly wrong?: string;
}

/** float32 from one place to another. */
export function copyBench(elements: number): Bench {
  return {
    name: `memcpy ${(4 * elements) / 2 ** 20} MB`,
    elements,
    bytes: 8 * elements,
    setup(backend, work) {
      const src = operand(backend, "f32", work);
      const dst = Tensor.allocate(backend, "f32", [work.elements]);
      const run = (): void => backend.launch("copy", { src, dst, bytes: src.byteLength });
      return outputs(run, dst);
    },
  };
}

/** A bench whose `run` fills these tensors. */
export function outputs(run: () => void, ...tensors: readonly Tensor[]): Running {
  return {
    run,
    outputs: () => {
      run();
      return tensors;
    },
  };
}

/** Elements after which the input repeats. */
export const PERIOD = ELEMENTS;
let values: Float32Array<ArrayBuffer> | undefined;
/** The 16 M roughly normal values that every bench and the peer use. */
export function input(): Float32Array<ArrayBuffer> {
  if (!values) {
    values = new Float32Array(PERIOD);
    let state = 1;
    const next = (): number => {
      state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
      return state;
    };
    for (let i = 0; i < PERIOD; i++) values[i] = ((next() + next() + next() + next()) / 2 ** 32 - 2) * 0.05;
  }
  return values;
}

/** Also measures a copy, which is the first of the results. */
export async function measure(benches: readonly Bench[], threads: number, rounds: number): Promise<Result[]> {
  const backend = new CpuBackend({ threads });
  try {
    const copy = copyBench(ELEMENTS);
    const all = [copy, ...benches];
    const running = all.map((b) => b.setup(backend, { elements: b.elements, begin: 0 }));
    const wrong = running.map((r) => r.check?.());
    const runs = running.map(({ run }) => run);
    const times: number[][] = all.map(() => []);
    for (let round = -2; round < rounds; round++) {
      for (const [i, run] of runs.entries()) {
        const start = performance.now();
        run();
        await backend.synchronize();
        if (round >= 0) times[i]!.push(performance.now() - start);
        // Once without a watch: what comes first would wait for what the copy has left in the caches to be written back.
        if (i === 0) {
          runs[1]?.();
          await backend.synchronize();
        }
      }
    }
    const typical = times.map(lowerQuartile);
    const copySpeed = copy.bytes / typical[0]!;
    return all.map((b, i) => ({
      name: b.name,
      threads,
      milliseconds: typical[i]!,
      gelem: b.elements / typical[i]! / 1e6,
      gbytes: b.bytes / typical[i]! / 1e6,
      ofCopy: b.bytes / typical[i]! / copySpeed,
      peer: b.peer,
      ...(wrong[i] !== undefined && { wrong: wrong[i] }),
    }));
  } finally {
    await backend.close();
  }
}

export function lowerQuartile(times: readonly number[]): number {
  return [...times].sort((a, b) => a - b)[times.length >> 2]!;
}

/** The input in `dtype` on the backend. What is longer than it repeats it, by copies on the device. */
export function operand(backend: Backend, dtype: "f32" | "f16" | "bf16", { elements, begin }: Work): Tensor {
  const wide = Tensor.allocate(backend, "f32", [elements]);
  const first = begin % PERIOD;
  let done = Math.min(elements, PERIOD - first);
  const head = input().subarray(first, first + done);
  backend.write(wide.storage, 0, new Uint8Array(head.buffer, head.byteOffset, head.byteLength));
  if (done < elements && first !== 0) throw new Error("only an input from the beginning may repeat");
  for (; done < elements; done *= 2) {
    const dst = { storage: wide.storage, byteOffset: 4 * done };
    backend.launch("copy", { src: wide, dst, bytes: 4 * Math.min(done, elements - done) });
  }
  if (dtype === "f32") return wide;
  const narrow = wide.to(dtype);
  wide.dispose();
  return narrow;
}
