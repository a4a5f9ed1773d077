/**
 * The allocator over one shared WebAssembly memory. Blocks are handed out best-fit from address-ordered free blocks that
 * merge with their neighbours; the memory grows when nothing fits. Allocation is ordered with the command stream: a freed
 * block may be handed out at once, because later kernels run after earlier ones; only the host must not write into it
 * before the commands that still use it are done, so a block carries the command number of its last use.
 */
import { OutOfMemoryError } from "../../core/errors.js";
import type { Storage } from "../../core/kernels.js";
import { MAX_PAGES, PAGE_BYTES } from "./layout.js";

/** Allocations start on cache lines, so that two of them never share one. */
const ALIGN = 64;
/** Bytes on each side of an allocation when guards are on, and what they hold. */
const GUARD = 64;
const GUARD_BYTE = 0xa5;
/** The memory grows by at least this much: growing is cheap, but not free. */
const GROW_PAGES = 256;

/** An allocation of the cpu backend. */
export class CpuStorage implements Storage {
  readonly arena = 0;
  /** Number of the last command that uses these bytes (a count of commands since the start, never wraps). */
  lastUse: number;
  /** Reads under way whose bytes are still to be taken. */
  reads = 0;
  /** `release` was called while reads were under way. */
  released = false;
  constructor(
    readonly offset: number,
    readonly bytes: number,
    lastUse: number,
    /** Belongs to the library, not to a tensor. */
    readonly internal: boolean,
  ) {
    this.lastUse = lastUse;
  }
}

interface FreeBlock {
  start: number;
  end: number;
  lastUse: number;
}

export interface ArenaOptions {
  /** First byte the arena may use. */
  readonly base: number;
  readonly limitBytes: number;
  /** Put known bytes round every allocation and check them on release. */
  readonly guards: boolean;
}

export class Arena {
  /** Address-ordered, never adjacent. */
  private readonly free: FreeBlock[] = [];
  private end: number;
  private readonly limit: number;
  private readonly guard: number;
  private readonly live = new Set<CpuStorage>();
  bytes = 0;
  allocations = 0;
  internalBytes = 0;

  constructor(
    private readonly memory: WebAssembly.Memory,
    options: ArenaOptions,
  ) {
    this.end = Math.ceil(options.base / ALIGN) * ALIGN;
    this.limit = Math.min(options.limitBytes, MAX_PAGES * PAGE_BYTES - PAGE_BYTES);
    this.guard = options.guards ? GUARD : 0;
    const top = memory.buffer.byteLength;
    if (top > this.end) {
      this.free.push({ start: this.end, end: top, lastUse: 0 });
      this.end = top;
    }
  }

  get committedBytes(): number {
    return this.memory.buffer.byteLength;
  }

  get limitBytes(): number {
    return this.limit;
  }

  /** @param idleBelow prefer blocks whose last use lies below this command number, so that the host may write there. */
  allocate(bytes: number, internal: boolean, idleBelow: number): CpuStorage {
    const need = Math.max(ALIGN, Math.ceil(bytes / ALIGN) * ALIGN) + 2 * this.guard;
    let at = this.bestFit(need, idleBelow);
    if (at < 0) at = this.bestFit(need, Number.POSITIVE_INFINITY);
    if (at < 0) at = this.grow(need, bytes);
    const block = this.free[at]!;
    const storage = new CpuStorage(block.start + this.guard, bytes, block.lastUse, internal);
    block.start += need;
    if (block.start === block.end) this.free.splice(at, 1);
    if (this.guard) this.paintGuards(storage);
    this.live.add(storage);
    if (internal) this.internalBytes += bytes;
    else {
      this.bytes += bytes;
      this.allocations++;
    }
    return storage;
  }

  /** @throws Error when a guard was overwritten (guards on only) */
  release(storage: CpuStorage): void {
    if (!this.live.delete(storage)) return;
    if (storage.internal) this.internalBytes -= storage.bytes;
    else {
      this.bytes -= storage.bytes;
      this.allocations--;
    }
    const start = storage.offset - this.guard;
    const end = start + Math.max(ALIGN, Math.ceil(storage.bytes / ALIGN) * ALIGN) + 2 * this.guard;
    this.insert({ start, end, lastUse: storage.lastUse });
    if (this.guard) this.checkStorage(storage);
  }

  /** Checks the guards of every live allocation. @throws Error naming the first overrun. No-op without guards. */
  checkGuards(): void {
    if (this.guard) for (const storage of this.live) this.checkStorage(storage);
  }

  get guarded(): boolean {
    return this.guard > 0;
  }

  private bestFit(need: number, idleBelow: number): number {
    let best = -1;
    let bestBytes = Number.POSITIVE_INFINITY;
    for (let i = 0; i < this.free.length; i++) {
      const block = this.free[i]!;
      const bytes = block.end - block.start;
      if (bytes >= need && bytes < bestBytes && block.lastUse <= idleBelow) {
        best = i;
        bestBytes = bytes;
      }
    }
    return best;
  }

  private grow(need: number, requested: number): number {
    const last = this.free.at(-1);
    const tail = last && last.end === this.end ? last.end - last.start : 0;
    const room = Math.floor((this.limit - this.end) / PAGE_BYTES);
    const pages = Math.ceil((need - tail) / PAGE_BYTES);
    // Growing by an eighth keeps the number of free blocks and grow calls small for large programs.
    const generous = Math.min(room, Math.max(pages, GROW_PAGES, Math.ceil(this.end / PAGE_BYTES / 8)));
    if (pages > room || !(this.tryGrow(generous) || (generous > pages && this.tryGrow(pages)))) {
      const free = this.free.reduce((sum, b) => sum + b.end - b.start, 0) + Math.max(0, room) * PAGE_BYTES;
      throw new OutOfMemoryError("cpu", requested, free, this.limit);
    }
    return this.bestFit(need, Number.POSITIVE_INFINITY);
  }

  private tryGrow(pages: number): boolean {
    try {
      this.memory.grow(pages);
    } catch {
      return false;
    }
    this.insert({ start: this.end, end: this.end + pages * PAGE_BYTES, lastUse: 0 });
    this.end += pages * PAGE_BYTES;
    return true;
  }

  private insert(block: FreeBlock): void {
    let low = 0;
    let high = this.free.length;
    while (low < high) {
      const mid = (low + high) >> 1;
      if (this.free[mid]!.start < block.start) low = mid + 1;
      else high = mid;
    }
    const before = this.free[low - 1];
    const after = this.free[low];
    if (before && before.end === block.start) {
      before.end = block.end;
      before.lastUse = Math.max(before.lastUse, block.lastUse);
      if (after && after.start === before.end) {
        before.end = after.end;
        before.lastUse = Math.max(before.lastUse, after.lastUse);
        this.free.splice(low, 1);
      }
    } else if (after && after.start === block.end) {
      after.start = block.start;
      after.lastUse = Math.max(after.lastUse, block.lastUse);
    } else {
      this.free.splice(low, 0, block);
    }
  }

  private guardRanges(storage: CpuStorage): [number, number][] {
    const padded = Math.max(ALIGN, Math.ceil(storage.bytes / ALIGN) * ALIGN);
    return [
      [storage.offset - GUARD, storage.offset],
      [storage.offset + storage.bytes, storage.offset + padded + GUARD],
    ];
  }

  private paintGuards(storage: CpuStorage): void {
    const bytes = new Uint8Array(this.memory.buffer);
    for (const [from, to] of this.guardRanges(storage)) bytes.fill(GUARD_BYTE, from, to);
  }

  private checkStorage(storage: CpuStorage): void {
    const bytes = new Uint8Array(this.memory.buffer);
    for (const [from, to] of this.guardRanges(storage)) {
      for (let i = from; i < to; i++) {
        if (bytes[i] !== GUARD_BYTE) {
          const side = i < storage.offset ? `${storage.offset - i} bytes before` : `${i - storage.offset} bytes into`;
          throw new Error(`[cpu] guard overwritten ${side} an allocation of ${storage.bytes} bytes`);
        }
      }
    }
  }
}
