/**
 * Non-finite input, as kernels report it: one 64-bit word of device memory, all ones while there is none. A kernel that meets a
 * bad block does an atomic minimum of `key * 2^32 + block`; the key grows with every launch, so the first fault wins.
 * A read that follows such launches copies the word and resets it in the stream's order.
 */
import type { LaunchContext } from "../../core/backend.js";
import { NonFiniteError } from "../../core/errors.js";
import type { PinnedMemory, Slot } from "./staging.js";
import { SlotPool } from "./staging.js";
import type { CudaStream } from "./stream.js";

const WORD_BYTES = 8;
const NONE = 0xffffffff;
/** A key is a launch's number since the last check in 24 bits, which stays at its greatest, and a context's number in 8. */
const CONTEXTS = 256;
/** One less than 24 bits hold, so that no fault looks like none. */
const LAST_LAUNCH = 2 ** 24 - 2;

/** What one read has to look at when its copies are done: copies of the word, the earliest first. */
export type FaultCheck = readonly Slot[];

export class FaultWord {
  /** Launches since the last check that may report. */
  private launches = 0;
  /** Launch contexts by the number that keys carry; 0 is none. */
  private readonly contexts: (LaunchContext | undefined)[] = [undefined];
  private readonly contextIds = new Map<LaunchContext, number>();
  private readonly slots: SlotPool;
  /** Copies for reads that ended with an error of their own: the next read reports what is in them. */
  private left: Slot[] = [];
  private word = 0;

  constructor(
    private readonly stream: CudaStream,
    private readonly memory: PinnedMemory,
    /** Reserves device memory for the word. */
    private readonly reserve: (bytes: number) => number,
  ) {
    this.slots = new SlotPool(memory, WORD_BYTES, 512, Number.POSITIVE_INFINITY);
  }

  /** The word's device address. */
  get address(): number {
    if (this.word === 0) {
      const word = this.reserve(WORD_BYTES);
      this.stream.fill(word, NONE, WORD_BYTES);
      this.word = word;
    }
    return this.word;
  }

  /** The key of the next launch. @param reports whether the kernel may report anything */
  key(context: LaunchContext | undefined, reports: boolean): number {
    const key = this.launches * CONTEXTS + (context ? this.contextId(context) : 0);
    if (reports && this.launches < LAST_LAUNCH) this.launches++;
    return key;
  }

  /**
   * Enqueues a copy of the word for a read that is being made, and resets it; nothing when no launch since could report.
   * To be handed to `take` or `leave`. @throws OutOfMemoryError, CudaError
   */
  check(): FaultCheck | undefined {
    if (this.launches > 0) {
      const slot = this.slots.take();
      if (!slot) throw this.memory.outOfMemory(WORD_BYTES);
      this.stream.copyToHost(slot.host, slot.offset, this.word, WORD_BYTES);
      this.left.push(slot);
      this.clear();
    }
    if (this.left.length === 0) return undefined;
    const check = this.left;
    this.left = [];
    return check;
  }

  /** The first fault of a read whose copies are done. */
  take(check: FaultCheck): NonFiniteError | undefined {
    let first: NonFiniteError | undefined;
    for (const slot of check) {
      first ??= this.look(slot);
      this.slots.give(slot);
    }
    return first;
  }

  /** For a read that reports something else. */
  leave(check: FaultCheck): void {
    this.left.push(...check);
  }

  /** Forgets what was reported. */
  reset(): void {
    for (const slot of this.left.splice(0)) this.slots.give(slot);
    if (this.word !== 0) this.clear();
  }

  private clear(): void {
    this.stream.fill(this.word, NONE, WORD_BYTES);
    this.launches = 0;
  }

  private look(slot: Slot): NonFiniteError | undefined {
    const words = new Uint32Array(2);
    const { stream } = this;
    stream.check("hostRead", stream.addon.hostRead(slot.host, slot.offset, new Uint8Array(words.buffer)));
    const [index, key] = words as unknown as [number, number];
    if (key === NONE) return undefined;
    const context = this.contexts[key % CONTEXTS];
    return new NonFiniteError(context?.op ?? "kernel", context?.operand ?? "operand", index, context?.unit);
  }

  private contextId(context: LaunchContext): number {
    let id = this.contextIds.get(context);
    if (id === undefined) {
      if (this.contexts.length === CONTEXTS) return 0;
      id = this.contexts.push(context) - 1;
      this.contextIds.set(context, id);
    }
    return id;
  }
}
