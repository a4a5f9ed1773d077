/**
 * Paged memory: managed memory of the driver, which moves its pages between host and GPU, so that there may be more of it than the
 * GPU holds. Each allocation is one of the driver's. It is for what a step reads and writes once, from one end to the other: the state
 * of an optimizer.
 *
 * Advice: the preferred location is the host. By the documentation of cuMemAdvise, a page that lies at its preferred location is mapped by
 * whoever faults on it and not moved, prefetches move it all the same, and pages that go to and fro end at the host, while with the
 * GPU as preferred location they would do so for ever. So what was not prefetched, or had to make room before it was used, is read
 * and written over the bus once; without advice it would be fetched by faults, push out other pages, and be pushed out before it is used
 * again. What was fetched stays until others need the room. Not SET_ACCESSED_BY: it is meant for data whose place does not matter.
 *
 * Freeing: the driver's cuMemFree blocks until the GPU is done with everything, also with what was launched after the last use. So a released
 * allocation is kept. A later one that fits may take it at once, because what uses it next runs later. It is freed when the stream
 * is found idle, which is looked at when work enqueued before is over and before more is taken from the driver; and by `reclaim`, when memory
 * is short. While the GPU is never found idle, what is kept is bounded by the limit alone: nothing could be freed without waiting.
 * (Another backend of this process on the same GPU is not looked at: a free waits for its work as well.)
 */
import { OutOfMemoryError } from "../../core/errors.js";
import { type CudaAddon, HOST, type Status } from "./addon.js";
import { type Block, FreeBlocks, type Segment } from "./blocks.js";
import { CUDA_STATUS } from "./device.js";
import type { CudaStream } from "./stream.js";

/** CUmem_advise. */
const PREFERRED_LOCATION = 3;
/** The largest page of a supported host (64-bit Arm has them), and what a GPU maps at least. */
export const PAGE = 64 << 10;
/** The host is asked what it has left, which takes up to a millisecond, once for as many bytes. */
const LOOK_EVERY = 16 << 20;
/** An allocation takes a kept one that is larger by at most this part of what it needs. */
const WASTE = 1 / 8;

export interface PagedOptions {
  /** The driver's number of the GPU. */
  readonly device: number;
  /** Pages move one by one when they are used (concurrentManagedAccess). If not, all of them are on the GPU when a kernel runs. */
  readonly onDemand: boolean;
  /** Bytes of memory that the host can still give. */
  readonly hostFree: () => number;
}

export class PagedMemory {
  /** Driver's bytes, whether in use or kept. */
  committedBytes = 0;
  /** What the driver said when it last refused a hint. That costs speed and nothing else. */
  refused: string | undefined;
  private readonly held = new Set<Block>();
  /** Released, and perhaps in use by kernels. */
  private readonly kept = new FreeBlocks();
  /** An event is being watched for the sake of what is kept. */
  private watching = false;
  private hostLimit: number | undefined;
  private hostFree = 0;
  /** Bytes allocated since the host was asked. */
  private unseen = 0;
  /** The last allocation failed because the driver said so. */
  private driverRefused = false;

  constructor(
    private readonly stream: CudaStream,
    private readonly options: PagedOptions,
    private readonly deviceLimit: number,
    /** Bytes of the GPU's limit that are not taken. */
    private readonly deviceRoom: () => number,
  ) {}

  /** Bytes that count against the limit of the GPU. */
  get deviceBytes(): number {
    return this.options.onDemand ? 0 : this.committedBytes;
  }

  /** Whether `reclaim` would free anything. */
  get leaving(): boolean {
    return this.kept.size > 0;
  }

  /** A segment as one block, a kept one or its own, or undefined when neither limit nor driver allow one. @throws CudaError, CudaUnavailableError */
  allocate(need: number, id: number): Block | undefined {
    const { addon } = this.stream;
    const bytes = Math.ceil(need / PAGE) * PAGE;
    this.driverRefused = false;
    const block = this.kept.bestFit(bytes);
    if (block && block.bytes <= bytes * (1 + WASTE)) {
      this.kept.remove(block);
      return block;
    }
    this.freeIfIdle();
    this.unseen += bytes;
    if (this.unseen >= LOOK_EVERY || this.room < bytes) this.look();
    if (this.room < bytes) return undefined;
    const status = addon.memoryAllocateManaged(bytes);
    this.driverRefused = status === CUDA_STATUS.outOfMemory;
    if (this.driverRefused) return undefined;
    this.stream.check("memoryAllocateManaged", status);
    const segment = { id, address: addon.results[0]!, bytes, small: false, paged: true } as Segment;
    segment.first = { segment, offset: 0, bytes, free: false, before: undefined, after: undefined };
    this.held.add(segment.first);
    this.committedBytes += bytes;
    if (this.options.onDemand) {
      try {
        this.hint("memoryAdvise", addon.memoryAdvise(segment.address, bytes, PREFERRED_LOCATION, HOST));
      } catch (error) {
        this.free(segment.first);
        throw error;
      }
    }
    return segment.first;
  }

  /** Enqueues the move of these pages to the GPU. @throws CudaError when the device has failed */
  prefetch(address: number, bytes: number): void {
    const { device, onDemand } = this.options;
    if (onDemand && bytes > 0) this.hint("memoryPrefetch", this.stream.prefetch(address, bytes, device));
  }

  /** Takes a block back. What was enqueued before may still use it. */
  release(block: Block): void {
    this.kept.add(block);
    this.watch();
  }

  /** Frees everything kept. To be called when the stream is drained. */
  reclaim(): void {
    for (const block of this.kept.whole()) {
      this.kept.remove(block);
      this.free(block);
    }
  }

  /** Gives everything back, whatever is alive. Only when nothing is under way. */
  close(): void {
    for (const { segment } of this.held) this.stream.addon.memoryFree(segment.address);
    this.held.clear();
    for (const block of this.kept.whole()) this.kept.remove(block);
    this.committedBytes = 0;
  }

  outOfMemory(requested: number): OutOfMemoryError {
    const { onDemand } = this.options;
    this.look();
    const what = onDemand
      ? "cuda, paged memory, which the host must hold"
      : "cuda, paged memory, which this GPU must hold";
    const where = this.driverRefused ? `${what}; the driver has no more` : what;
    const limit = onDemand ? this.hostLimit! : this.deviceLimit;
    const advice = onDemand ? "free memory of the host, which sets this limit" : undefined;
    return new OutOfMemoryError(where, requested, Math.max(0, this.room), limit, advice);
  }

  /** Every page may have to be in the host's memory, and is not yet: the driver takes it page by page, with the first use of each. */
  private get room(): number {
    if (!this.options.onDemand) return this.deviceRoom();
    return Math.min((this.hostLimit ?? 0) - this.committedBytes, this.hostFree);
  }

  private look(): void {
    this.unseen = 0;
    if (!this.options.onDemand) return;
    this.hostFree = this.options.hostFree();
    this.hostLimit ??= this.hostFree;
  }

  /** Looks again when what is enqueued now is over. */
  private watch(): void {
    const { stream } = this;
    if (this.watching || stream.ending || stream.failure) return;
    try {
      const event = stream.mark();
      const status = stream.context.watch(event, () => {
        this.watching = false;
        stream.recycle(event);
        if (this.leaving && !this.freeIfIdle()) this.watch();
      });
      this.watching = status === 0;
      if (status !== 0) stream.recycle(event);
    } catch {
      // No event, or a device that has failed: the next release or allocation looks, or `reclaim` or `close` frees it.
    }
  }

  /** Frees what is kept if nothing is under way; says whether nothing is. Never waits. */
  private freeIfIdle(): boolean {
    if (!this.leaving) return true;
    let idle = false;
    try {
      idle = this.stream.isIdle();
    } catch {
      // A device that has failed, which the next call says: `close` frees.
    }
    if (idle) this.reclaim();
    return idle;
  }

  private free(block: Block): void {
    if (!this.held.delete(block)) return;
    this.committedBytes -= block.bytes;
    const status = this.stream.addon.memoryFree(block.segment.address);
    // Nobody could do better about it, but a failure of the device has to be known.
    if (status !== 0) this.stream.error("memoryFree", status);
  }

  private hint(call: keyof CudaAddon, status: Status): void {
    if (status === 0) return;
    const error = this.stream.error(call, status);
    if (status < 0 || this.stream.failure) throw error;
    this.refused = error.message;
  }
}
