/**
 * The main thread's side of the command stream: puts records into the ring, waits for fences, notices failures.
 * asm/stream.ts is the other side; layout.ts is what they share.
 */
import { readFileSync } from "node:fs";
import type { LaunchContext } from "../../core/backend.js";
import { BackendError, NonFiniteError } from "../../core/errors.js";
import { type FieldType, KERNEL_NAMES, KERNELS, type KernelName } from "../../core/kernels.js";
import * as L from "./layout.js";
import { WorkerPool } from "./pool.js";
import type { KernelExports } from "./worker.js";

const WASM_FILE = new URL("./kernels.wasm", import.meta.url);
/** How long one look lasts while the main thread is blocked in `waitSync`. */
const SLICE_MS = 20;

let compiled: WebAssembly.Module | undefined;
function kernelModule(): WebAssembly.Module {
  compiled ??= new WebAssembly.Module(readFileSync(WASM_FILE));
  return compiled;
}

/** A read that waits for its fence. */
interface Waiter {
  readonly seq: number;
  /** The first of the commands below `seq`, and not below that of the read before, to meet one. */
  fault: NonFiniteError | undefined;
  readonly resolve: () => void;
  readonly reject: (error: Error) => void;
}

export class CommandStream {
  readonly memory: WebAssembly.Memory;
  /** First byte after what the stream and its threads use. */
  readonly heapBase: number;
  private readonly scratch: number;
  /** Commands enqueued since the start; the ring's HEAD holds its low 32 bits. */
  head = 0;
  failure: BackendError | undefined;

  /** Shared memory as words: control words and ring lie in its first pages, which never move. */
  readonly ring: Int32Array;
  private readonly words: Int32Array;
  private readonly kernel: KernelExports;
  /** By kernel: its place in the module's function table, and in KERNEL_NAMES. */
  private readonly ids: Readonly<Record<KernelName, { table: number; id: number }>>;
  private readonly fenceIndex: number;
  private pool: WorkerPool | undefined;
  /** Commands below this number may be overwritten in the ring. */
  private reusableBelow = L.RING_SLOTS;
  private lastFence = 0;
  private waiters: Waiter[] = [];
  private listening = false;
  /** How many faults have been looked at, and below which command there are no others. */
  private faults = 0;
  private searchedBelow = 0;
  /** What the next read that is made has to report. */
  private readonly next: Pick<Waiter, "fault"> = { fault: undefined };
  /** Launch contexts by the number that records carry; 0 is none. */
  private readonly contexts: (LaunchContext | undefined)[] = [undefined];
  private readonly contextIds = new Map<LaunchContext, number>();

  constructor(
    readonly threads: number,
    /** No part may take longer than this while the main thread is blocked: then a worker is taken for lost. */
    private readonly stallMs: number,
  ) {
    // The main thread helps, so it has scratch memory as well.
    const scratchBytes = (threads + 1) * L.SCRATCH_BYTES;
    const initial = 64 + scratchBytes / L.PAGE_BYTES;
    this.memory = new WebAssembly.Memory({ initial, maximum: L.MAX_PAGES, shared: true });
    this.ring = new Int32Array(this.memory.buffer);
    this.words = this.ring;
    const wait = (address: number, expected: number): void => this.helperWait(address, expected);
    const instance = new WebAssembly.Instance(kernelModule(), { env: { memory: this.memory, wait } });
    this.kernel = instance.exports as unknown as KernelExports;
    this.scratch = Math.ceil((this.kernel.heapBase() >>> 0) / L.PAGE_BYTES) * L.PAGE_BYTES;
    this.heapBase = this.scratch + scratchBytes;
    this.fenceIndex = this.kernel.fenceTableIndex();
    this.ids = Object.fromEntries(
      KERNEL_NAMES.map((name, id) => [name, { table: this.kernel.kernelTableIndex(id), id }]),
    ) as Record<KernelName, { table: number; id: number }>;
    this.words[(L.PROGRESS + L.MAIN_SLOT * L.LINE + 4) >> 2] = 1;
  }

  /** Commands below this number are complete. */
  get low(): number {
    const word = Atomics.load(this.words, L.LOW >> 2);
    return this.head - ((this.head - word) >>> 0);
  }

  /** Reads that wait for a command below this number may go on: a fence has run, though LOW may not have passed it yet. */
  private get fenced(): number {
    const word = Atomics.load(this.words, L.FENCE >> 2);
    return Math.max(this.low, this.head - ((this.head - word) >>> 0));
  }

  /**
   * Reserves the next record and fills its head; the caller writes the operands at the returned word index and calls
   * `publish`. @throws BackendError when the stream has failed
   */
  begin(kernel: KernelName | null, units: number, per: number, context: LaunchContext | undefined): number {
    if (this.failure) throw this.failure;
    this.startPool();
    if (this.head >= this.reusableBelow) this.waitForSlot();
    const at = (L.RING + (this.head % L.RING_SLOTS) * L.RECORD_BYTES) >> 2;
    const words = this.words;
    words[at + (L.RECORD_KERNEL >> 2)] = kernel === null ? this.fenceIndex : this.ids[kernel].table;
    words[at + (L.RECORD_PARTS >> 2)] = Math.ceil(units / per);
    words[at + (L.RECORD_UNITS >> 2)] = units;
    words[at + (L.RECORD_PER >> 2)] = per;
    words[at + (L.RECORD_CONTEXT >> 2)] = context ? this.contextId(context) : 0;
    words[at + (L.RECORD_KERNEL_ID >> 2)] = kernel === null ? -1 : this.ids[kernel].id;
    words[at + (L.RECORD_CLAIMED >> 2)] = 0;
    words[at + (L.RECORD_FINISHED >> 2)] = 0;
    words[at + (L.RECORD_FAULT >> 2)] = -1;
    words[at + (L.RECORD_PAGES >> 2)] = this.memory.buffer.byteLength / L.PAGE_BYTES;
    return at + (L.RECORD_OPERANDS >> 2);
  }

  /** Makes the record of the last `begin` visible and wakes as many workers as it has parts for. */
  publish(parts: number): void {
    this.head++;
    Atomics.store(this.words, L.HEAD >> 2, this.head | 0);
    const parked = Atomics.load(this.words, L.PARKED >> 2);
    if (parked > 0) {
      const wake = Math.min(parts, this.threads) - (this.threads - parked);
      if (wake > 0) Atomics.notify(this.words, L.HEAD >> 2, wake);
    }
  }

  /** Resolves when everything enqueued so far is complete; rejects with the failure or the first fault. */
  wait(): Promise<void> {
    if (this.failure) return Promise.reject(this.failure);
    return new Promise((resolve, reject) => {
      const seq = this.low === this.head ? this.head : this.fence();
      this.waiters.push({ seq, fault: this.takeFault(), resolve, reject });
      this.listen();
    });
  }

  /** `wait` that blocks the thread. @throws BackendError, NonFiniteError */
  waitSync(): void {
    if (this.failure) throw this.failure;
    if (this.low < this.head) this.blockUntil(this.fence());
    this.findFaults();
    const fault = this.takeFault();
    if (fault) throw fault;
  }

  /** Whether everything before a fence is complete. @throws BackendError when the stream has failed */
  hasPassed(fence: number): boolean {
    this.noticeAbort();
    if (this.failure) throw this.failure;
    return this.fenced >= fence;
  }

  /** Blocks until everything before a fence is complete, leaving faults for the next read. @throws BackendError */
  waitFor(fence: number): void {
    if (this.failure) throw this.failure;
    if (this.fenced < fence) this.blockUntil(fence);
  }

  /** Blocks until everything enqueued so far is complete, leaving faults for the next read. */
  drainSync(): void {
    if (!this.failure && this.low < this.head) this.blockUntil(this.fence());
  }

  /** Rejects everything pending and stops the workers. */
  fail(error: BackendError): void {
    if (this.failure) return;
    this.failure = error;
    Atomics.store(this.words, L.ABORT >> 2, 1);
    for (const address of [L.HEAD, L.LOW, L.FENCE]) Atomics.notify(this.words, address >> 2);
    const waiters = this.waiters;
    this.waiters = [];
    for (const waiter of waiters) waiter.reject(error);
    this.pool?.keepAlive(false);
    void this.stopPool();
  }

  /** A new pool over the same memory; commands that had not finished are dropped. */
  async restart(): Promise<void> {
    if (!this.failure) this.fail(new BackendError("cpu", "the backend was restarted"));
    await this.stopPool();
    const words = this.words;
    for (const word of [L.PARKED, L.LOW_WAITERS, L.ABORT, L.ARRIVED, L.FAULTS, L.ERROR_CLAIM])
      Atomics.store(words, word >> 2, 0);
    this.faults = 0;
    this.searchedBelow = this.head;
    this.next.fault = undefined;
    Atomics.store(words, L.LOW >> 2, this.head | 0);
    for (let slot = 0; slot <= L.MAIN_SLOT; slot++) words[(L.PROGRESS + slot * L.LINE + 4) >> 2] = 1;
    this.failure = undefined;
  }

  /** Stops the workers for good. */
  async close(error: BackendError): Promise<void> {
    this.fail(error);
    await this.stopPool();
  }

  private startPool(): void {
    if (this.pool) return;
    const words = this.words;
    for (let slot = 0; slot < this.threads; slot++) words[(L.PROGRESS + slot * L.LINE + 4) >> 2] = 1;
    Atomics.store(words, L.ARRIVED >> 2, 0);
    const task = { memory: this.memory, module: kernelModule(), threads: this.threads, scratch: this.scratch };
    this.pool = new WorkerPool(task, (reason, cause) => {
      this.fail(new BackendError("cpu", reason, this.describeRunning(), { cause }));
    });
    // A read that was made before anything was launched already waits.
    this.pool.keepAlive(this.listening);
    void this.pool.start();
  }

  private stopping: Promise<void> | undefined;
  private stopPool(): Promise<void> {
    const pool = this.pool;
    if (pool) {
      this.pool = undefined;
      const before = this.stopping ?? Promise.resolve();
      this.stopping = before.then(() => pool.destroy());
    }
    return this.stopping ?? Promise.resolve();
  }

  /** Enqueues a fence; the number that `hasPassed` and `waitFor` know it by. */
  fence(): number {
    if (this.head === this.lastFence) return this.lastFence;
    const at = this.begin(null, 1, 1, undefined);
    this.lastFence = this.head + 1;
    this.words[at] = this.lastFence | 0;
    this.publish(1);
    return this.lastFence;
  }

  private contextId(context: LaunchContext): number {
    let id = this.contextIds.get(context);
    if (id === undefined) {
      id = this.contexts.push(context) - 1;
      this.contextIds.set(context, id);
    }
    return id;
  }

  /** Settles the readers whose fence has run, and sleeps (without blocking) on FENCE while any are left. */
  private listen(): void {
    if (this.listening) return;
    this.listening = true;
    this.pool?.keepAlive(true);
    const turn = (): void => {
      for (;;) {
        const seen = Atomics.load(this.words, L.FENCE >> 2);
        this.noticeAbort();
        this.settle();
        if (this.waiters.length === 0) break;
        const result = Atomics.waitAsync(this.words, L.FENCE >> 2, seen);
        if (result.async) {
          void result.value.then(turn);
          return;
        }
      }
      this.listening = false;
      this.pool?.keepAlive(false);
    };
    // The executor of the first waiter must have returned before it is settled.
    queueMicrotask(turn);
  }

  private settle(): void {
    const done = this.fenced;
    this.findFaults();
    while (this.waiters.length > 0 && this.waiters[0]!.seq <= done) {
      const { fault, resolve, reject } = this.waiters.shift()!;
      if (fault) reject(fault);
      else resolve();
    }
  }

  /** Gives what complete commands have met to the first read after each; that reports only the first it is given. */
  private findFaults(): void {
    const { low, words } = this;
    const count = Atomics.load(words, L.FAULTS >> 2);
    let waiter = 0;
    for (let k = this.searchedBelow; k < low && this.faults !== count; k++) {
      const at = (L.RING + (k % L.RING_SLOTS) * L.RECORD_BYTES) >> 2;
      const index = words[at + (L.RECORD_FAULT >> 2)]! >>> 0;
      if (index === L.NO_FAULT) continue;
      this.faults = (this.faults + 1) | 0;
      while (waiter < this.waiters.length && this.waiters[waiter]!.seq <= k) waiter++;
      const taker = this.waiters[waiter] ?? this.next;
      if (taker.fault) continue;
      const context = this.contexts[words[at + (L.RECORD_CONTEXT >> 2)]!];
      taker.fault = new NonFiniteError(context?.op ?? "kernel", context?.operand ?? "operand", index, context?.unit);
    }
    this.searchedBelow = low;
  }

  /** For a read that is being made: what has been found before it and nobody reports. */
  private takeFault(): NonFiniteError | undefined {
    const { fault } = this.next;
    this.next.fault = undefined;
    return fault;
  }

  private noticeAbort(): void {
    if (!this.failure && Atomics.load(this.words, L.ABORT >> 2)) {
      const length = Atomics.load(this.words, (L.ERROR >> 2) + 1);
      const text = new TextDecoder().decode(new Uint8Array(this.memory.buffer, L.ERROR_TEXT, length).slice());
      this.fail(new BackendError("cpu", `kernel trapped: ${text}`, this.describeRunning()));
    }
  }

  private blockUntil(target: number): void {
    if (!this.pool?.running) {
      this.help(target);
    } else {
      const watch = this.stallWatch();
      for (;;) {
        const seen = Atomics.load(this.words, L.FENCE >> 2);
        if (this.fenced >= target) break;
        this.noticeAbort();
        if (this.failure) throw this.failure;
        watch();
        Atomics.wait(this.words, L.FENCE >> 2, seen, SLICE_MS);
      }
    }
    if (this.failure) throw this.failure;
  }

  /** Workers are not up yet (they need this thread's event loop to start): run the commands here. */
  private help(target: number): void {
    this.helperWatch = this.stallWatch();
    try {
      this.kernel.drain(L.MAIN_SLOT, target | 0, this.scratch + this.threads * L.SCRATCH_BYTES);
    } catch (error) {
      const reason = error instanceof BackendError ? error.reason : `kernel trapped: ${(error as Error).message}`;
      this.fail(new BackendError("cpu", reason, this.describeRunning(), { cause: error }));
    }
    this.noticeAbort();
    if (this.failure) throw this.failure;
  }

  private helperWatch: () => void = () => {};
  private helperWait(address: number, expected: number): void {
    this.helperWatch();
    Atomics.wait(this.words, address >>> 2, expected, SLICE_MS);
  }

  /** A check that throws once nothing has moved for `stallMs`: a thread that died raises no event while main is blocked. */
  private stallWatch(): () => void {
    let state = "";
    let since = performance.now();
    return () => {
      const at = this.runningRecord() >> 2;
      const words = [L.RECORD_CLAIMED, L.RECORD_FINISHED].map((o) => Atomics.load(this.words, at + (o >> 2)));
      const now = `${this.low}/${words.join("/")}`;
      if (now !== state) {
        state = now;
        since = performance.now();
      } else if (performance.now() - since > this.stallMs) {
        const seconds = Math.round(this.stallMs / 100) / 10;
        const error = new BackendError(
          "cpu",
          `no progress for ${seconds} s: a worker was lost`,
          this.describeRunning(),
        );
        this.fail(error);
        throw error;
      }
    };
  }

  /** Blocks until the ring slot of the next command is free: every worker has moved past the command that was there. */
  private waitForSlot(): void {
    const watch = this.stallWatch();
    for (let round = 0; ; round++) {
      this.reusableBelow = this.oldestInUse() + L.RING_SLOTS;
      // The next commands overwrite the records of complete ones.
      this.findFaults();
      if (this.head < this.reusableBelow) return;
      if (!this.pool?.running) {
        // Half a ring at a time: the slots are then free, and the next launches do not come here again at once.
        this.help(this.head - L.RING_SLOTS / 2);
      } else {
        this.noticeAbort();
        if (this.failure) throw this.failure;
        if (round > 100) {
          watch();
          const low = Atomics.load(this.words, L.LOW >> 2);
          Atomics.add(this.words, L.LOW_WAITERS >> 2, 1);
          Atomics.wait(this.words, L.LOW >> 2, low, 1);
          Atomics.sub(this.words, L.LOW_WAITERS >> 2, 1);
        }
      }
    }
  }

  /** The lowest command that is not complete or that a worker may still look at. LOW is read first: see asm/stream.ts. */
  private oldestInUse(): number {
    let oldest = this.low;
    for (let i = 0; i <= this.threads; i++) {
      const slot = i === this.threads ? L.MAIN_SLOT : i;
      const at = (L.PROGRESS + slot * L.LINE) >> 2;
      if (Atomics.load(this.words, at + 1)) continue;
      oldest = Math.min(oldest, this.head - ((this.head - Atomics.load(this.words, at)) >>> 0));
    }
    return oldest;
  }

  private runningRecord(): number {
    return L.RING + (this.low % L.RING_SLOTS) * L.RECORD_BYTES;
  }

  /** `quantize4bit(x=0x1000, n=64, ...)` for the command that was running, from its record. */
  private describeRunning(): string | undefined {
    if (this.low >= this.head) return undefined;
    const at = this.runningRecord() >> 2;
    const name = KERNEL_NAMES[this.words[at + (L.RECORD_KERNEL_ID >> 2)]!];
    if (!name) return undefined;
    const fields = Object.entries(KERNELS[name] as Record<string, FieldType>).map(([field, type], i) => {
      const value = this.words[at + (L.RECORD_OPERANDS >> 2) + i]! >>> 0;
      return `${field}=${type === "in" || type === "out" ? `0x${value.toString(16)}` : value}`;
    });
    const context = this.contexts[this.words[at + (L.RECORD_CONTEXT >> 2)]!];
    return `${name}(${fields.join(", ")})${context ? ` of ${context.op}` : ""}`;
  }
}
