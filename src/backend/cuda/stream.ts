/**
 * One stream of the driver: everything a backend enqueues goes through it, in order. It also knows whether the device has
 * failed, and which kernels were launched last, for the words of that failure.
 */
import type { BackendError } from "../../core/errors.js";
import { type FieldType, KERNEL_NAMES, KERNELS, type KernelName } from "../../core/kernels.js";
import {
  BINDING,
  BLAS_COMMAND,
  BLAS_STATUS,
  BLAS_WORDS,
  COMMAND_OPERANDS,
  COMMAND_WORDS,
  type CudaAddon,
  type Status,
} from "./addon.js";
import type { SharedContext } from "./context.js";
import { CUDA_STATUS } from "./device.js";
import type { Launch } from "./launch.js";
import { cudaLayout } from "./layout.js";
import { check } from "./load.js";

/** Statuses after which the driver answers every call with the same: the context, and mostly the process's use of CUDA, is lost. */
const STICKY = new Set([3, 4, 46, 201, 214, 220, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 999]);

/** Launches that a failure names: it is noticed later than the one that caused it. */
const REMEMBERED = 4;
/** Events that are kept for later; more exist only while more are in use. */
const IDLE_EVENTS = 128;
const OPERAND_WORD = COMMAND_OPERANDS >> 2;
const BLAS_STREAM = (BLAS_COMMAND >> 2) + BLAS_WORDS.stream;
/** CUBLAS_STATUS_ALLOC_FAILED. */
const BLAS_OUT_OF_MEMORY = BLAS_STATUS - 3;

/** By kernel: its number in KERNEL_NAMES, and the words of its operand struct. */
const IDS = new Map(KERNEL_NAMES.map((name, id) => [name, { id, words: cudaLayout(name).bytes >> 2 }]));
const MOST_WORDS = Math.max(...[...IDS.values()].map(({ words }) => words));

/** A function of the addon. */
type Call = keyof CudaAddon;

export class CudaStream {
  failure: BackendError | undefined;
  readonly command: Uint32Array;
  private readonly handle: number;
  private closed = false;
  /** `settled` was called: nothing more is to be enqueued. */
  ending = false;
  /** Events that nobody uses. */
  private readonly events: number[] = [];
  /** The operand structs of the last launches, one after the other, and which kernels they are of. */
  private readonly history = new Uint32Array(REMEMBERED * MOST_WORDS);
  private readonly historyKernels = new Int32Array(REMEMBERED).fill(-1);
  private launches = 0;

  constructor(
    readonly addon: CudaAddon,
    readonly context: SharedContext,
    /** Called once, when the device fails. */
    private readonly onFailure: (error: BackendError) => void,
  ) {
    this.command = new Uint32Array(addon.command);
    this.check("streamCreate", addon.streamCreate());
    this.handle = addon.results[0]!;
  }

  /** Frees memory that is only cached, and says whether there was any: somebody else's allocation has failed. */
  relieve: () => boolean = () => false;

  /** @throws CudaError for a status other than success; a sticky one fails the backend */
  check(call: Call, status: Status): void {
    if (status !== 0) throw this.error(call, status);
  }

  /** What a failed call becomes. A sticky status fails the backend. @param kernel what the call was about, if not that */
  error(call: Call, status: Status, kernel?: string): Error {
    if (this.failure) return this.failure;
    const sticky = STICKY.has(status);
    try {
      check(this.addon, call, status, sticky ? this.describeLast(REMEMBERED) : kernel);
    } catch (error) {
      if (sticky) {
        this.failure = error as BackendError;
        this.onFailure(this.failure);
      }
      return error as Error;
    }
    throw new Error(`[cuda] ${call} succeeded`);
  }

  /** A call that may run out of memory: once more after cached memory was given back. */
  retry(call: () => Status): Status {
    const status = call();
    return status === CUDA_STATUS.outOfMemory && this.relieve() ? call() : status;
  }

  /** Notes the operands that lie in `command` as those of the kernel that is about to be launched. */
  remember(kernel: KernelName): void {
    const { id, words } = IDS.get(kernel)!;
    const slot = this.launches++ % REMEMBERED;
    this.historyKernels[slot] = id;
    const { command, history } = this;
    for (let i = 0, to = slot * MOST_WORDS; i < words; i++) history[to + i] = command[OPERAND_WORD + i]!;
  }

  /** Launches `func` with the operands that lie in `command`. */
  launch(entry: { func: number; resident: number }, plan: Launch, operandBytes: number): void {
    const { command, addon } = this;
    command[COMMAND_WORDS.func] = entry.func;
    command[COMMAND_WORDS.grid] = Math.min(plan.grid, entry.resident);
    command[COMMAND_WORDS.block] = plan.block;
    command[COMMAND_WORDS.shared] = plan.shared;
    command[COMMAND_WORDS.stream] = this.handle;
    command[COMMAND_WORDS.operandBytes] = operandBytes;
    let status = addon.launch();
    // The driver loads code lazily: a first launch may lack memory.
    if (status === CUDA_STATUS.outOfMemory && this.relieve()) status = addon.launch();
    if (status !== 0) throw this.error("launch", status, this.describeLast(1));
  }

  /** The product that lies in `command` by cuBLASLt, whatever comes of it. */
  askBlas(): Status {
    this.command[BLAS_STREAM] = this.handle;
    const status = this.addon.blasMatmul();
    return status === BLAS_OUT_OF_MEMORY && this.relieve() ? this.addon.blasMatmul() : status;
  }

  /**
   * Multiplies by cuBLASLt what lies in `command`, as a product and as the operands of `kernel`.
   * @returns false when the library has no algorithm for it; the addon's `detail` then says more
   * @throws CudaError
   */
  multiply(kernel: KernelName): boolean {
    const status = this.askBlas();
    if (status === BINDING.notSupported) return false;
    this.remember(kernel);
    if (status === 0) return true;
    const error = this.error("blasMatmul", status, this.describeLast(1));
    // The library has one status for everything that befalls the device: the driver knows what it was.
    const { handle } = this;
    const device = this.addon.streamQuery(handle);
    throw STICKY.has(device) ? this.error("streamQuery", device) : error;
  }

  copyFromHost(to: number, host: number, offset: number, bytes: number): void {
    this.check("copyFromHost", this.addon.copyFromHost(to, host, offset, bytes, this.handle));
  }

  copyToHost(host: number, offset: number, from: number, bytes: number): void {
    this.check("copyToHost", this.addon.copyToHost(host, offset, from, bytes, this.handle));
  }

  copyOnDevice(to: number, from: number, bytes: number): void {
    this.check("copyOnDevice", this.addon.copyOnDevice(to, from, bytes, this.handle));
  }

  /** Moves pages of managed memory to a device. A status, because it is a hint: see `PagedMemory`. */
  prefetch(address: number, bytes: number, device: number): Status {
    return this.addon.memoryPrefetch(address, bytes, device, this.handle);
  }

  /** Fills with the four bytes of `value` (the lowest first), whatever the alignment. */
  fill(to: number, value: number, bytes: number): void {
    const byte = (i: number): number => (value >>> (8 * (i & 3))) & 255;
    if (Math.imul(byte(0), 0x01010101) >>> 0 === value >>> 0) {
      this.fill8(to, byte(0), bytes);
      return;
    }
    const lead = Math.min(bytes, (4 - (to % 4)) % 4);
    const whole = Math.floor((bytes - lead) / 4) * 4;
    for (let i = 0; i < lead; i++) this.fill8(to + i, byte(i), 1);
    if (whole > 0) {
      // A shift by 32 is one by 0, so a lead of 0 leaves the word as it is.
      const turned = ((value >>> (8 * lead)) | (value << (32 - 8 * lead))) >>> 0;
      this.check("fill32", this.addon.fill32(to + lead, turned, whole, this.handle));
    }
    for (let i = lead + whole; i < bytes; i++) this.fill8(to + i, byte(i), 1);
  }

  private fill8(to: number, value: number, bytes: number): void {
    this.check("fill8", this.addon.fill8(to, value, bytes, this.handle));
  }

  /** Blocks until everything enqueued is done. @throws CudaError */
  drain(): void {
    this.check("streamSynchronize", this.addon.streamSynchronize(this.handle));
  }

  /** Whether everything enqueued is done. @throws CudaError when the device has failed */
  isIdle(): boolean {
    const status = this.addon.streamQuery(this.handle);
    if (status === CUDA_STATUS.notReady) return false;
    this.check("streamQuery", status);
    return true;
  }

  /** An event after everything enqueued so far. Give it back with `recycle`. */
  mark(): number {
    const event = this.takeEvent();
    this.record(event);
    return event;
  }

  /** An event for `record`, so that no memory is needed then. Give it back with `recycle`. */
  takeEvent(): number {
    const event = this.events.pop();
    if (event !== undefined) return event;
    this.check("eventCreate", this.addon.eventCreate(false));
    return this.addon.results[0]!;
  }

  /** Puts an event after everything enqueued so far. One that cannot be is recycled. @throws CudaError */
  record(event: number): void {
    const status = this.addon.eventRecord(event, this.handle);
    if (status !== 0) this.recycle(event);
    this.check("eventRecord", status);
  }

  /** Whether an event is over. @throws CudaError when the device has failed */
  isOver(event: number): boolean {
    const status = this.addon.eventQuery(event);
    if (status === CUDA_STATUS.notReady) return false;
    this.check("eventQuery", status);
    return true;
  }

  /** Blocks until an event is over. @throws CudaError */
  await(event: number): void {
    this.check("eventSynchronize", this.addon.eventSynchronize(event));
  }

  /** Only for events that nobody waits for any more. */
  recycle(event: number): void {
    if (this.closed || this.events.length >= IDLE_EVENTS) this.addon.eventDestroy(event);
    else this.events.push(event);
  }

  /** Milliseconds that the GPU takes for what `body` enqueues. Blocks the thread. */
  elapsed(body: () => void): number {
    const { addon } = this;
    const events: number[] = [];
    const mark = (): number => {
      this.check("eventCreate", addon.eventCreate(true));
      const event = addon.results[0]!;
      events.push(event);
      this.check("eventRecord", addon.eventRecord(event, this.handle));
      return event;
    };
    try {
      const start = mark();
      body();
      const end = mark();
      this.await(end);
      this.check("eventElapsed", addon.eventElapsed(start, end));
      return addon.results[0]!;
    } finally {
      for (const event of events) addon.eventDestroy(event);
    }
  }

  /** For the end. Resolves when everything enqueued is done or the device has failed; blocks only when there is no memory for an event. */
  settled(): Promise<void> {
    this.ending = true;
    return new Promise((resolve) => {
      if (this.failure) return resolve();
      try {
        const event = this.mark();
        const status = this.context.watch(event, () => {
          this.recycle(event);
          resolve();
        });
        if (status === 0) return;
        this.recycle(event);
      } catch {
        // Nothing may be freed before the work that uses it is over.
      }
      this.addon.streamSynchronize(this.handle);
      resolve();
    });
  }

  /** Destroys the stream and its idle events; to be called when it is settled. */
  close(): void {
    if (this.closed) return;
    this.closed = true;
    for (const event of this.events.splice(0)) this.addon.eventDestroy(event);
    this.addon.streamDestroy(this.handle);
  }

  /** `one of the last launched: copy(src=0x1000, ...), fill(...)`: the kernels that may have caused a failure, the latest last. */
  private describeLast(most: number): string | undefined {
    const names: string[] = [];
    for (let i = Math.max(0, this.launches - most); i < this.launches; i++) {
      const slot = i % REMEMBERED;
      names.push(describeLaunch(KERNEL_NAMES[this.historyKernels[slot]!]!, this.history, slot * MOST_WORDS));
    }
    if (names.length === 0) return undefined;
    return names.length === 1 ? names[0] : `one of the last launched: ${names.join(", ")}`;
  }
}

/** `fill(dst=0x1000, bytes=64, value=0)` from the words of an operand struct. */
function describeLaunch(kernel: KernelName, words: Uint32Array, at: number): string {
  const { offsets } = cudaLayout(kernel);
  const float = new Float32Array(words.buffer);
  const fields = Object.entries(KERNELS[kernel] as Record<string, FieldType>).map(([field, type]) => {
    const word = at + (offsets[field]! >> 2);
    if (type === "u32") return `${field}=${words[word]}`;
    if (type === "f32") return `${field}=${float[word]}`;
    const wide = words[word]! + words[word + 1]! * 2 ** 32;
    return `${field}=${type === "size" ? wide : `0x${wide.toString(16)}`}`;
  });
  return `${kernel}(${fields.join(", ")})`;
}
