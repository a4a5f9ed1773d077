/**
 * Reads: each is answered with the bytes as they are after what was launched before it. The stream copies them into page-locked
 * slots; an event after each copy, watched by the addon's own thread, carries them to the event loop. A read that finds too few
 * slots leaves the rest of its bytes where they are and copies them as slots come back; whoever is about to overwrite
 * them calls `settle` first.
 */
import type { CudaStorage } from "./arena.js";
import type { FaultCheck, FaultWord } from "./faults.js";
import type { PinnedMemory, Slot } from "./staging.js";
import { SlotPool } from "./staging.js";
import type { CudaStream } from "./stream.js";

/** Reads up to this many bytes have small slots of their own, so that they never wait for large ones. */
export const SMALL_READ = 64 << 10;
export const SMALL_READS = 64;
/** The slots of larger reads, and how many there are at most. */
export const READ_SLOT = 4 << 20;
export const READ_SLOTS = 16;
export const READ_SLOTS_INTEGRATED = 4;

/** The reads of one size: their slots, and those that wait for one, the oldest first. */
interface Lane {
  readonly slots: SlotPool;
  readonly waiting: Set<Read>;
}

/** A read under way. */
interface Read {
  /** Undefined: nothing but a wait. */
  readonly storage: CudaStorage | undefined;
  readonly address: number;
  readonly result: Uint8Array<ArrayBuffer>;
  readonly lane: Lane;
  readonly check: FaultCheck | undefined;
  /** Bytes whose copies are enqueued, and bytes that are in `result`. */
  issued: number;
  taken: number;
  /** Whether all copies are enqueued. */
  complete: boolean;
  over: boolean;
  /** Undefined: the thread is blocked until it is over. */
  readonly resolve: ((bytes: Uint8Array<ArrayBuffer>) => void) | undefined;
  readonly reject: (error: unknown) => void;
}

/** A copy under way. */
interface Chunk {
  readonly read: Read;
  readonly slot: Slot | undefined;
  readonly at: number;
  readonly bytes: number;
  readonly event: number;
  /** The completion thread has the event until it calls back. */
  readonly watched: boolean;
}

export class ReadQueue {
  private readonly small: Lane;
  private readonly large: Lane;
  /** Copies that are enqueued and not taken yet, in the stream's order. */
  private readonly chunks = new Set<Chunk>();
  private readonly open = new Set<Read>();

  constructor(
    private readonly stream: CudaStream,
    private readonly faults: FaultWord,
    memory: PinnedMemory,
    integrated: boolean,
    /** Called for a storage that was released while reads were waiting, when the last of them has its copies enqueued. */
    private readonly reclaim: (storage: CudaStorage) => void,
  ) {
    const most = integrated ? READ_SLOTS_INTEGRATED : READ_SLOTS;
    this.small = { slots: new SlotPool(memory, SMALL_READ, 16, SMALL_READS), waiting: new Set() };
    this.large = { slots: new SlotPool(memory, READ_SLOT, 1, most), waiting: new Set() };
  }

  /** Whether `settle` may have something to do. */
  get pinning(): boolean {
    return this.small.waiting.size + this.large.waiting.size > 0;
  }

  /** The bytes; rejects with NonFiniteError or BackendError. Without a storage: when everything before is done. */
  read(storage: CudaStorage | undefined, offset: number, bytes: number): Promise<Uint8Array<ArrayBuffer>> {
    return new Promise((resolve, reject) => {
      const read = this.begin(storage, offset, bytes, resolve, reject);
      try {
        this.issue(read);
      } catch (error) {
        this.end(read, error);
      }
    });
  }

  /** `read` that blocks the thread. */
  readSync(storage: CudaStorage | undefined, offset: number, bytes: number): Uint8Array<ArrayBuffer> {
    let failure: { readonly error: unknown } | undefined;
    const read = this.begin(storage, offset, bytes, undefined, (error) => {
      failure = { error };
    });
    try {
      for (this.issue(read); !read.over; this.issue(read)) this.takeOldest(read);
    } catch (error) {
      this.end(read, error);
    }
    if (failure) {
      // Nobody else waits for its copies. Their slots may be used at once: what writes there next runs later.
      for (const chunk of this.chunks) if (chunk.read === read) this.drop(chunk);
      throw failure.error;
    }
    return read.result;
  }

  /** Enqueues what reads of this storage still have to copy; blocks while there is no slot. */
  settle(storage: CudaStorage): void {
    if (storage.reads === 0) return;
    for (const { waiting } of [this.small, this.large]) {
      for (const read of waiting) {
        if (read.storage !== storage) continue;
        for (this.issue(read); !read.complete && !read.over; this.issue(read)) this.takeOldest(read);
      }
    }
  }

  /** Rejects everything pending. Copies under way end by themselves. */
  fail(error: unknown): void {
    for (const read of [...this.open]) this.end(read, error);
  }

  private begin(
    storage: CudaStorage | undefined,
    offset: number,
    bytes: number,
    resolve: Read["resolve"],
    reject: Read["reject"],
  ): Read {
    const result = new Uint8Array(bytes);
    const read: Read = {
      storage,
      address: storage ? storage.address + offset : 0,
      result,
      lane: bytes <= SMALL_READ ? this.small : this.large,
      check: this.faults.check(),
      issued: 0,
      taken: 0,
      complete: false,
      over: false,
      resolve,
      reject,
    };
    this.open.add(read);
    return read;
  }

  /** Enqueues as many of a read's copies as there are slots for. */
  private issue(read: Read): void {
    if (read.over || read.complete) return;
    const { stream } = this;
    const { slots } = read.lane;
    const total = read.result.byteLength;
    do {
      const slot = total === 0 ? undefined : slots.take();
      if (total > 0 && !slot) {
        this.hold(read);
        return;
      }
      const at = read.issued;
      const bytes = Math.min(slots.slotBytes, total - at);
      try {
        if (slot) stream.copyToHost(slot.host, slot.offset, read.address + at, bytes);
        this.follow({ read, slot, at, bytes, event: stream.mark(), watched: read.resolve !== undefined });
      } catch (error) {
        if (slot) slots.give(slot);
        throw error;
      }
      read.issued += bytes;
    } while (read.issued < total);
    read.complete = true;
    this.unhold(read);
  }

  private follow(chunk: Chunk): void {
    if (chunk.watched) {
      const status = this.stream.context.watch(chunk.event, (result) => this.completed(chunk, result));
      if (status !== 0) this.stream.recycle(chunk.event);
      this.stream.check("watch", status);
    }
    this.chunks.add(chunk);
  }

  private completed(chunk: Chunk, status: number): void {
    this.stream.recycle(chunk.event);
    if (this.chunks.has(chunk)) {
      if (status === 0) this.take(chunk);
      else {
        this.drop(chunk);
        this.end(chunk.read, this.stream.error("eventSynchronize", status));
      }
    }
    this.pump(chunk.read.lane);
  }

  /** Lets waiting reads use the slots that came back. */
  private pump({ waiting }: Lane): void {
    for (const read of waiting) {
      try {
        this.issue(read);
      } catch (error) {
        this.end(read, error);
      }
      if (waiting.has(read)) return;
    }
  }

  /** Blocks until a copy is done that `read` needs (its own, or one whose slot it can use), and takes its bytes. */
  private takeOldest(read: Read): void {
    for (const chunk of this.chunks) {
      const needed = read.complete ? chunk.read === read : chunk.slot && chunk.read.lane === read.lane;
      if (!needed) continue;
      this.stream.await(chunk.event);
      this.take(chunk);
      return;
    }
    // Every slot of a pool belongs to a copy under way, so there always is one.
    throw new Error("[cuda] no copy to wait for");
  }

  private take(chunk: Chunk): void {
    const { read, slot, at, bytes } = chunk;
    try {
      if (slot && !read.over) {
        const { addon } = this.stream;
        this.stream.check("hostRead", addon.hostRead(slot.host, slot.offset, read.result.subarray(at, at + bytes)));
      }
    } catch (error) {
      this.end(read, error);
    } finally {
      this.drop(chunk);
    }
    read.taken += bytes;
    if (read.complete && read.taken === read.result.byteLength) this.end(read, undefined);
  }

  private drop(chunk: Chunk): void {
    this.chunks.delete(chunk);
    if (chunk.slot) chunk.read.lane.slots.give(chunk.slot);
    if (!chunk.watched) this.stream.recycle(chunk.event);
  }

  /** Settles a read, once. */
  private end(read: Read, error: unknown): void {
    if (read.over) return;
    read.over = true;
    this.open.delete(read);
    let reason = error;
    try {
      if (read.check && error !== undefined) this.faults.leave(read.check);
      else if (read.check) reason = this.faults.take(read.check);
      this.unhold(read);
    } catch (failure) {
      reason ??= failure;
    }
    if (reason !== undefined) read.reject(reason);
    else read.resolve?.(read.result);
  }

  private hold(read: Read): void {
    const { waiting } = read.lane;
    if (waiting.has(read)) return;
    waiting.add(read);
    if (read.storage) read.storage.reads++;
  }

  private unhold(read: Read): void {
    if (!read.lane.waiting.delete(read)) return;
    const { storage } = read;
    if (storage && --storage.reads === 0 && storage.released) this.reclaim(storage);
  }
}
