/**
 * Page-locked host memory between JavaScript's bytes and the GPU: a few buffers that writes go round in, and pools of slots that
 * reads copy into. Bounded and small, because on an integrated GPU it is a part of the one memory there is.
 */
import { OutOfMemoryError } from "../../core/errors.js";
import { BINDING } from "./addon.js";
import { CUDA_STATUS } from "./device.js";
import type { CudaStream } from "./stream.js";

/** What helps where it is the host that has no more. */
const HOST_ADVICE = "free memory of the host";

/** A piece of page-locked memory. */
export interface Slot {
  readonly host: number;
  readonly offset: number;
}

/** The page-locked memory of one backend. */
export class PinnedMemory {
  private readonly hosts: number[] = [];
  bytes = 0;

  constructor(readonly stream: CudaStream) {}

  /** A handle, or undefined when there is no memory. @throws CudaError */
  tryAllocate(bytes: number): number | undefined {
    const { stream } = this;
    const status = stream.retry(() => stream.addon.hostAllocate(bytes));
    if (status === CUDA_STATUS.outOfMemory || status === BINDING.outOfHostMemory) return undefined;
    stream.check("hostAllocate", status);
    const host = stream.addon.results[0]!;
    this.hosts.push(host);
    this.bytes += bytes;
    return host;
  }

  outOfMemory(bytes: number): OutOfMemoryError {
    return new OutOfMemoryError("cuda, page-locked host memory", bytes, 0, this.bytes, HOST_ADVICE);
  }

  /** Only when nothing is under way. */
  close(): void {
    for (const host of this.hosts.splice(0)) this.stream.addon.hostFree(host);
    this.bytes = 0;
  }
}

/** Slots of one size, made as they are needed. */
export class SlotPool {
  private readonly idle: Slot[] = [];
  private made = 0;

  constructor(
    private readonly memory: PinnedMemory,
    readonly slotBytes: number,
    /** Slots that one allocation is cut into. */
    private readonly together: number,
    private readonly most: number,
  ) {}

  /** A slot, or undefined when all that there may be are in use. @throws OutOfMemoryError when there is not even one */
  take(): Slot | undefined {
    if (this.idle.length === 0 && this.made < this.most) this.more();
    return this.idle.pop();
  }

  give(slot: Slot): void {
    this.idle.push(slot);
  }

  private more(): void {
    const bytes = this.slotBytes * this.together;
    const host = this.memory.tryAllocate(bytes);
    if (host === undefined) {
      // With some slots there is progress, though slower.
      if (this.made === 0) throw this.memory.outOfMemory(bytes);
      return;
    }
    this.made += this.together;
    for (let i = this.together - 1; i >= 0; i--) this.idle.push({ host, offset: i * this.slotBytes });
  }
}

/** One buffer of the ring, its size, and how many there are at most. */
export const WRITE_BUFFER = 2 << 20;
export const WRITE_BUFFERS = 4;
/** Copies start on lines of their own. */
const LINE = 64;

/**
 * The way of bytes to the GPU: copied aside at once, then by the stream. A write blocks only when all buffers hold bytes that
 * the GPU has not fetched yet.
 */
export class WriteRing {
  private current: { readonly host: number; used: number } | undefined;
  /** Buffers that are full, oldest first, each with an event after its last copy. */
  private readonly full: { readonly host: number; readonly event: number }[] = [];
  private made = 0;

  constructor(private readonly memory: PinnedMemory) {}

  /** Enqueues `src` into device memory at `to`. @throws OutOfMemoryError, CudaError */
  write(to: number, src: Uint8Array): void {
    const { stream } = this.memory;
    for (let at = 0; at < src.byteLength; ) {
      if (!this.current || this.current.used >= WRITE_BUFFER) this.current = this.next();
      const { host, used } = this.current;
      const bytes = Math.min(WRITE_BUFFER - used, src.byteLength - at);
      stream.check("hostWrite", stream.addon.hostWrite(host, used, src.subarray(at, at + bytes)));
      stream.copyFromHost(to + at, host, used, bytes);
      this.current.used = Math.ceil((used + bytes) / LINE) * LINE;
      at += bytes;
    }
  }

  /** Only when nothing is under way. */
  close(): void {
    for (const { event } of this.full.splice(0)) this.memory.stream.recycle(event);
  }

  private next(): { host: number; used: number } {
    const { stream } = this.memory;
    if (this.current) {
      this.full.push({ host: this.current.host, event: stream.mark() });
      this.current = undefined;
    }
    const oldest = this.full[0];
    if ((!oldest || !stream.isOver(oldest.event)) && this.made < WRITE_BUFFERS) {
      const host = this.memory.tryAllocate(WRITE_BUFFER);
      if (host !== undefined) {
        this.made++;
        return { host, used: 0 };
      }
    }
    if (!oldest) throw this.memory.outOfMemory(WRITE_BUFFER);
    stream.await(oldest.event);
    this.full.shift();
    stream.recycle(oldest.event);
    return { host: oldest.host, used: 0 };
  }
}
