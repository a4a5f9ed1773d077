/**
 * The caching allocator over the driver's memory. The driver hands out segments, which are expensive to get and are kept;
 * allocations are blocks of them, best fit, split on demand and merged with their neighbours when they are released. Requests
 * up to a mebibyte share segments of two; larger ones have segments of their own, so that those can go back to the driver.
 * Allocation is ordered with the backend's one stream: a released block may be handed out at once, because what uses it next
 * runs later. Paged allocations are not cut from segments: see paged.ts. (The cpu's arena is one range that grows; what the two
 * have in common is too little to share.)
 */
import { OutOfMemoryError } from "../../core/errors.js";
import type { Address, Storage } from "../../core/kernels.js";
import { type Block, FreeBlocks, join, type Segment } from "./blocks.js";
import { CUDA_STATUS } from "./device.js";
import { PagedMemory, type PagedOptions } from "./paged.js";
import type { CudaStream } from "./stream.js";

/** What cuMemAlloc aligns to, so that every kernel may use its widest loads and no two allocations share a line. */
export const ALIGN = 512;
/** The driver hands memory out in pages of this size. */
export const SEGMENT = 2 << 20;
/** Requests up to this many bytes come from shared segments. */
export const SMALL = 1 << 20;
/** Bytes on each side of an allocation when guards are on, and what they hold. */
const GUARD = ALIGN;
const GUARD_BYTE = 0xa5;

/** An allocation of the cuda backend. */
export class CudaStorage implements Storage {
  readonly arena: number;
  readonly offset: number;
  /** Where it lies for the GPU. */
  readonly address: number;
  /** Reads that have not taken their copy of these bytes yet. */
  reads = 0;
  /** `release` was called while such reads were waiting. */
  released = false;
  constructor(
    /** @internal */
    readonly block: Block,
    guard: number,
    readonly bytes: number,
    /** Belongs to the library, not to a tensor. */
    readonly internal: boolean,
  ) {
    this.arena = block.segment.id;
    this.offset = block.offset + guard;
    this.address = block.segment.address + this.offset;
  }

  /** Whether its pages move between host and GPU. */
  get paged(): boolean {
    return this.block.segment.paged;
  }
}

/** Where an operand lies for the GPU; 0 for none. */
export function addressOf(address: Address | null): number {
  return address === null ? 0 : (address.storage as CudaStorage).address + address.byteOffset;
}

const roundUp = (bytes: number, to: number): number => Math.ceil(bytes / to) * to;

export interface ArenaOptions {
  /** The most it takes from the driver. */
  readonly limitBytes: number;
  /** Put known bytes round every allocation and check them on release. Every allocation and release then waits for the GPU. */
  readonly guards: boolean;
  /** Copies device memory to the host, after all that was enqueued; for the guards. */
  readonly peek: (address: number, bytes: number) => Uint8Array;
  /** Bytes that the device could still give. */
  readonly free: () => number;
  /** Take no more than `free` says: the driver of an integrated GPU goes on where the system then kills a process. */
  readonly careful: boolean;
  /** Undefined: paged allocations are plain ones. */
  readonly paged?: PagedOptions | undefined;
}

/** What a segment holds, for tests and diagnosis. */
export interface SegmentLayout {
  readonly address: number;
  readonly bytes: number;
  readonly blocks: readonly { readonly offset: number; readonly bytes: number; readonly free: boolean }[];
}

export class Arena {
  private readonly segments = new Map<number, Segment>();
  private readonly free = { small: new FreeBlocks(), large: new FreeBlocks() };
  private readonly live = new Set<CudaStorage>();
  private readonly guard: number;
  private readonly paged: PagedMemory | undefined;
  private nextId = 0;
  readonly limitBytes: number;
  committedBytes = 0;
  bytes = 0;
  allocations = 0;
  /** Of `bytes`, those of paged allocations. */
  pagedBytes = 0;
  internalBytes = 0;

  constructor(
    private readonly stream: CudaStream,
    private readonly options: ArenaOptions,
  ) {
    this.guard = options.guards ? GUARD : 0;
    this.limitBytes = options.limitBytes;
    if (options.paged) {
      this.paged = new PagedMemory(stream, options.paged, this.limitBytes, () => this.room(false));
    }
  }

  get guarded(): boolean {
    return this.guard > 0;
  }

  /** @throws OutOfMemoryError, CudaError, CudaUnavailableError when the driver lacks a function for paged memory */
  allocate(bytes: number, internal: boolean, paged = false): CudaStorage {
    const need = Math.max(ALIGN, roundUp(bytes, ALIGN)) + 2 * this.guard;
    const block = paged && this.paged ? this.takePaged(this.paged, need, bytes) : this.take(need, bytes);
    const storage = new CudaStorage(block, this.guard, bytes, internal);
    if (this.guard) {
      try {
        for (const [from, to] of guardRanges(storage)) this.stream.fill(from, GUARD_BYTE * 0x01010101, to - from);
      } catch (error) {
        this.giveBack(block);
        throw error;
      }
    }
    this.live.add(storage);
    if (internal) this.internalBytes += bytes;
    else {
      this.bytes += bytes;
      this.allocations++;
      if (storage.paged) this.pagedBytes += bytes;
    }
    return storage;
  }

  /** Brings the pages of paged allocations to the GPU, in stream order. @throws CudaError when the device has failed */
  prefetch(storages: Iterable<Storage>): void {
    if (!this.paged) return;
    // Several tensors may share a storage. No two paged ones share a driver's allocation, so there are no neighbours to join.
    for (const storage of new Set(storages) as Set<CudaStorage>) {
      if (storage.paged && this.live.has(storage)) this.paged.prefetch(storage.address, storage.bytes);
    }
  }

  /** What the driver said when it last refused a hint about paged memory. */
  get refusedHint(): string | undefined {
    return this.paged?.refused;
  }

  /** @throws Error when a guard was overwritten (guards on only) */
  release(storage: CudaStorage): void {
    if (!this.live.delete(storage)) return;
    if (storage.internal) this.internalBytes -= storage.bytes;
    else {
      this.bytes -= storage.bytes;
      this.allocations--;
      if (storage.paged) this.pagedBytes -= storage.bytes;
    }
    try {
      if (this.guard && !this.stream.failure) this.checkStorage(storage);
    } finally {
      this.giveBack(storage.block);
    }
  }

  /** Checks the guards of every live allocation. @throws Error naming the first overrun. No-op without guards. */
  checkGuards(): void {
    if (this.guard) for (const storage of this.live) this.checkStorage(storage);
  }

  /**
   * Gives cached segments that hold nothing, and released paged memory, back to the driver, once the stream is drained; says
   * whether there were any.
   */
  trim(): boolean {
    const empty = [...this.free.small.whole(), ...this.free.large.whole()];
    if (empty.length === 0 && !this.paged?.leaving) return false;
    this.stream.drain();
    this.paged?.reclaim();
    for (const block of empty) {
      const { segment } = block;
      this.stream.check("memoryFree", this.stream.addon.memoryFree(segment.address));
      this.poolOf(block).remove(block);
      this.segments.delete(segment.id);
      this.committedBytes -= segment.bytes;
    }
    return true;
  }

  /** Gives everything back, whatever is alive. For the end; errors of a failed device are ignored. */
  close(): void {
    for (const { address } of this.segments.values()) this.stream.addon.memoryFree(address);
    this.paged?.close();
    this.segments.clear();
    this.live.clear();
    this.committedBytes = 0;
  }

  /** Every segment and its blocks in order. */
  layout(): SegmentLayout[] {
    return [...this.segments.values()].map(({ address, bytes, first }) => {
      const blocks: SegmentLayout["blocks"][number][] = [];
      for (let block: Block | undefined = first; block; block = block.after) {
        blocks.push({ offset: block.offset, bytes: block.bytes, free: block.free });
      }
      return { address, bytes, blocks };
    });
  }

  /** A block of device memory. `bytes` is what was asked for, for the error. @throws OutOfMemoryError, CudaError */
  private take(need: number, bytes: number): Block {
    const small = need <= SMALL;
    const pool = small ? this.free.small : this.free.large;
    const block =
      pool.bestFit(need) ?? this.grow(need, small) ?? this.free.large.bestFit(need) ?? this.free.small.bestFit(need);
    if (!block) throw this.outOfMemory(bytes);
    this.poolOf(block).remove(block);
    block.free = false;
    if (block.bytes > need) this.split(block, need);
    return block;
  }

  /** The same of managed memory. */
  private takePaged(paged: PagedMemory, need: number, bytes: number): Block {
    const allocate = (): Block | undefined => paged.allocate(need, this.nextId);
    const block = allocate() ?? (this.trim() ? allocate() : undefined);
    if (!block) throw paged.outOfMemory(bytes);
    this.nextId++;
    return block;
  }

  /** A new segment as one free block, or undefined when neither limit nor driver allow one. */
  private grow(need: number, small: boolean): Block | undefined {
    let room = this.room(this.options.careful);
    if (room < need && this.trim()) room = this.room(this.options.careful);
    if (room < need) return undefined;
    const bytes = Math.min(roundUp(need, SEGMENT), Math.floor(room / ALIGN) * ALIGN);
    const { addon } = this.stream;
    const allocate = (): number => addon.memoryAllocate(bytes);
    let status = allocate();
    if (status === CUDA_STATUS.outOfMemory && this.trim()) status = allocate();
    if (status === CUDA_STATUS.outOfMemory) return undefined;
    this.stream.check("memoryAllocate", status);
    const segment = { id: this.nextId++, address: addon.results[0]!, bytes, small, paged: false } as Segment;
    segment.first = { segment, offset: 0, bytes, free: true, before: undefined, after: undefined };
    this.segments.set(segment.id, segment);
    this.committedBytes += bytes;
    this.poolOf(segment.first).add(segment.first);
    return segment.first;
  }

  private room(asked: boolean): number {
    const room = this.limitBytes - this.committedBytes - (this.paged?.deviceBytes ?? 0);
    return asked ? Math.min(room, this.options.free()) : room;
  }

  private poolOf(block: Block): FreeBlocks {
    return block.segment.small ? this.free.small : this.free.large;
  }

  private split(block: Block, bytes: number): void {
    const { segment, after } = block;
    const rest: Block = {
      segment,
      offset: block.offset + bytes,
      bytes: block.bytes - bytes,
      free: true,
      before: block,
      after,
    };
    block.bytes = bytes;
    block.after = rest;
    if (after) after.before = rest;
    this.poolOf(rest).add(rest);
  }

  private giveBack(block: Block): void {
    if (block.segment.paged) {
      this.paged!.release(block);
      return;
    }
    const pool = this.poolOf(block);
    let whole = block;
    const { before, after } = block;
    if (after?.free) {
      pool.remove(after);
      join(block, after);
    }
    if (before?.free) {
      pool.remove(before);
      join(before, block);
      whole = before;
    }
    whole.free = true;
    pool.add(whole);
  }

  private outOfMemory(requested: number): OutOfMemoryError {
    const cached = this.free.small.bytes + this.free.large.bytes;
    return new OutOfMemoryError("cuda", requested, cached + Math.max(0, this.room(true)), this.limitBytes);
  }

  private checkStorage(storage: CudaStorage): void {
    for (const [from, to] of guardRanges(storage)) {
      const bytes = this.options.peek(from, to - from);
      const bad = bytes.findIndex((byte) => byte !== GUARD_BYTE);
      if (bad < 0) continue;
      const at = from + bad;
      const before = at < storage.address;
      const side = before ? `${storage.address - at} bytes before` : `${at - storage.address} bytes into`;
      throw new Error(`[cuda] guard overwritten ${side} an allocation of ${storage.bytes} bytes`);
    }
  }
}

function guardRanges({ address, bytes }: CudaStorage): [number, number][] {
  const padded = Math.max(ALIGN, roundUp(bytes, ALIGN));
  return [
    [address - GUARD, address],
    [address + bytes, address + padded + GUARD],
  ];
}
