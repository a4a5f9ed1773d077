/**
 * What a pool thread runs. The task only starts the loop and ends: a task that never ended would hold the process. The
 * loop then owns the thread until the stream is aborted or the thread is terminated.
 */
import { threadId } from "node:worker_threads";
import {
  ABORT,
  ARRIVED,
  ERROR,
  ERROR_CLAIM,
  ERROR_TEXT,
  ERROR_TEXT_BYTES,
  FENCE,
  HEAD,
  LOW,
  SCRATCH_BYTES,
} from "./layout.js";

export interface WorkerTask {
  readonly memory: WebAssembly.Memory;
  readonly module: WebAssembly.Module;
  readonly slot: number;
  readonly threads: number;
  /** Where the threads' private memory starts. */
  readonly scratch: number;
}

export interface KernelExports {
  run(slot: number, scratch: number): void;
  drain(slot: number, target: number, scratch: number): void;
  heapBase(): number;
  fenceTableIndex(): number;
  kernelTableIndex(id: number): number;
}

/** Waits until every thread of the pool has taken its task, so that no thread takes two, then starts the loop detached. */
export default function start(task: WorkerTask): number {
  const words = new Int32Array(task.memory.buffer);
  const arrived = ARRIVED >> 2;
  Atomics.add(words, arrived, 1);
  Atomics.notify(words, arrived);
  for (let seen = Atomics.load(words, arrived); seen < task.threads; seen = Atomics.load(words, arrived)) {
    Atomics.wait(words, arrived, seen, 1000);
  }
  setImmediate(loop, task);
  return threadId;
}

function loop({ memory, module, slot, scratch }: WorkerTask): void {
  const words = new Int32Array(memory.buffer);
  const wait = (address: number, expected: number): void => {
    Atomics.wait(words, address >>> 2, expected);
  };
  try {
    const { exports } = new WebAssembly.Instance(module, { env: { memory, wait } });
    (exports as unknown as KernelExports).run(slot, scratch + slot * SCRATCH_BYTES);
  } catch (error) {
    reportFailure(memory, words, error);
  }
}

/** Leaves the trap's words where the main thread finds them; the first worker to fail wins. */
function reportFailure(memory: WebAssembly.Memory, words: Int32Array, error: unknown): void {
  if (Atomics.compareExchange(words, ERROR_CLAIM >> 2, 0, 1) === 0) {
    const text = new TextEncoder().encode(error instanceof Error ? error.message : String(error));
    const length = Math.min(text.length, ERROR_TEXT_BYTES);
    new Uint8Array(memory.buffer).set(text.subarray(0, length), ERROR_TEXT);
    words[ERROR >> 2] = Atomics.load(words, LOW >> 2);
    words[(ERROR >> 2) + 1] = length;
    Atomics.store(words, ABORT >> 2, 1);
  }
  for (const address of [HEAD, LOW, FENCE]) Atomics.notify(words, address >> 2);
}
