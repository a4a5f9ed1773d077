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

/** What one read has to look at when its copies are done. */
export interface FaultCheck {
  /** The fault, if there was one. To be called once. */
  take(): NonFiniteError | undefined;
}

export class FaultWord {
  /** Launches since the last check that may report. */
  private launches = 0;
  /** Launch contexts by the number that keys carry; 0 is none. */
  private readonly contexts: (LaunchContext | undefined)[] = [undefined];
  private readonly contextIds = new Map<LaunchContext, number>();
  private readonly slots: SlotPool;
  private word = 0;

  constructor(
    private readonly stream: CudaStream,
    memory: PinnedMemory,
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

  /** Enqueues a copy of the word for a read that is being made, and resets it; nothing when no launch since could report. */
  check(): FaultCheck | undefined {
    if (this.launches === 0) return undefined;
    const slot = this.slots.take();
    if (!slot) throw new Error("[cuda] no slot for a fault");
    this.stream.copyToHost(slot.host, slot.offset, this.word, WORD_BYTES);
    this.reset();
    return { take: () => this.take(slot) };
  }

  /** Forgets what was reported. */
  reset(): void {
    if (this.word === 0) return;
    this.stream.fill(this.word, NONE, WORD_BYTES);
    this.launches = 0;
  }

  private take(slot: Slot): NonFiniteError | undefined {
    const bytes = new Uint32Array(2);
    const status = this.stream.addon.hostRead(slot.host, slot.offset, new Uint8Array(bytes.buffer));
    this.slots.give(slot);
    if (status !== 0) return undefined;
    const [index, key] = bytes as unknown as [number, number];
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
