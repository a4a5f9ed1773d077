/**
 * Guards against non-finite gradients: words of device memory (GUARD) by which kernels skip a step on their own, and what the host
 * has heard of it. The host never waits for a step's outcome: until it is known, the next step takes along the scalars for every
 * number of steps that may have been skipped (row k: k of those not heard of), and the kernels choose.
 */
import type { Backend, LaunchContext, Peek, PeekRoom } from "../core/backend.js";
import type { Operands } from "../core/kernels.js";
import { GUARD, GUARD_BYTES, NONE_FOUND } from "../core/optimizers.js";
import type { Tensor } from "../core/tensor.js";
import { bytesOf } from "../core/typedarray.js";
import { deviceBytes } from "./optimizer-list.js";

/** The most attempts whose outcomes are not known; one more waits for the oldest, which leaves the device the others to work on. */
export const MOST_UNRESOLVED = 16;

/** What a guard holds beside its words. */
interface Held {
  readonly peeks: Peek[];
  /** For the peek of the next attempt. */
  room: PeekRoom | undefined;
}

function drop(held: Held): void {
  for (const peek of held.peeks.splice(0)) peek.drop();
  held.room?.drop();
  held.room = undefined;
}

/** Guards that nobody has disposed. */
const collected = new FinalizationRegistry<Held>(drop);

/** The device's words alone: for a step whose outcome nobody has to know. */
export class GuardWords {
  readonly words: Tensor;
  constructor(
    readonly backend: Backend,
    /** Whether a skipped step is reported as NonFiniteError by the next read, or only counted. */
    readonly reports: boolean,
    /** Whose operand that is about: one object per op. */
    readonly context: LaunchContext,
  ) {
    this.words = deviceBytes(backend, GUARD_BYTES);
    try {
      this.reset(0);
    } catch (error) {
      this.words.dispose();
      throw error;
    }
  }

  /** Takes what the rest takes. @throws OutOfMemoryError, BackendError; nothing of the step was launched then */
  prepare(): void {
    this.backend.load("gradientVerdict", this.verdict);
  }

  /** Decides about a step, from what the checks before have found. */
  launchVerdict(): void {
    this.backend.launch("gradientVerdict", this.verdict, this.context);
  }

  private get verdict(): Operands<"gradientVerdict"> {
    return { guard: this.words, allowNonFinite: this.reports ? 0 : 1 };
  }

  dispose(): void {
    this.words.dispose();
  }

  protected reset(skipped: number): void {
    const words = new Uint32Array(GUARD_BYTES / 4);
    words[GUARD.found] = NONE_FOUND;
    words[GUARD.skipped] = skipped;
    this.backend.write(this.words.storage, 0, bytesOf(words));
  }
}

/**
 * A guard of many steps. Before a step: `settle`; the scalars are then those of a step before which none of the `unresolved` attempts
 * was skipped. `launchStep` (optimizer-step.ts) does the rest.
 */
export class Guard extends GuardWords {
  /** Skipped steps that the host has heard of. */
  known = 0;
  private readonly held: Held = { peeks: [], room: undefined };
  private readonly peeks = this.held.peeks;
  /** Beside each peek: what to do when that attempt has been skipped. */
  private readonly skips: (() => void)[] = [];
  /** The backend's epoch in which the words were last written. */
  private epoch = this.backend.epoch;
  /** An attempt was abandoned: the words may be those of half a step. */
  private spoiled = false;

  constructor(backend: Backend, reports: boolean, context: LaunchContext) {
    super(backend, reports, context);
    collected.register(this, this.held, this);
  }

  /** The last attempts: those whose outcomes are not known. */
  get unresolved(): number {
    return this.peeks.length;
  }

  /** Takes in the outcomes that have arrived; blocks only when there are too many that have not. @throws BackendError */
  settle(): void {
    this.mend();
    if (this.peeks.length >= MOST_UNRESOLVED) this.learn(this.peeks[0]!.wait());
    while (this.peeks.length > 0) {
      const words = this.peeks[0]!.poll();
      if (!words) return;
      this.learn(words);
    }
  }

  /**
   * Takes in all outcomes, and blocks until it has them: for when a step's tensors are not those of all the unresolved attempts, so
   * that one number of skipped steps would not be right for all of them. @throws BackendError
   */
  resolve(): void {
    this.mend();
    while (this.peeks.length > 0) this.learn(this.peeks[0]!.wait());
  }

  override prepare(): void {
    super.prepare();
    this.held.room ??= this.backend.reservePeek();
  }

  /** Decides about an attempt that was prepared. @param onSkipped is called from a later `settle` or `resolve`, if it was skipped */
  attempt(onSkipped: () => void): void {
    if (this.peeks.length >= MOST_UNRESOLVED) throw new Error("a step without a settled guard");
    this.launchVerdict();
    const { words, held } = this;
    const { room } = held;
    held.room = undefined;
    this.peeks.push(this.backend.peek(words.storage, words.byteOffset, GUARD_BYTES, room));
    this.skips.push(onSkipped);
  }

  /**
   * Forgets the attempts after the first `unresolved`: of the last one something has failed, after its checks had begun. It never counts,
   * as a step or as skipped.
   */
  abandon(unresolved: number): void {
    for (const peek of this.peeks.splice(unresolved)) peek.drop();
    this.skips.length = unresolved;
    this.spoiled = true;
  }

  /** Steps skipped so far: waits for what was launched. Rejects like `Tensor.data`. */
  async skipped(): Promise<number> {
    this.mend();
    return wordsOf(await this.words.bytes())[GUARD.skipped]!;
  }

  override dispose(): void {
    collected.unregister(this);
    drop(this.held);
    this.skips.length = 0;
    super.dispose();
  }

  /** Writes the words anew where they may not be what they should. @throws BackendError */
  private mend(): void {
    const { epoch } = this.backend;
    if (this.epoch !== epoch) {
      // The outcomes of what was under way at a restart will never be known.
      drop(this.held);
      this.skips.length = 0;
    } else if (!this.spoiled) {
      return;
    }
    while (this.peeks.length > 0) this.learn(this.peeks[0]!.wait());
    this.reset(this.known);
    this.epoch = epoch;
    this.spoiled = false;
  }

  private learn(bytes: Uint8Array): void {
    this.peeks.shift();
    const onSkipped = this.skips.shift()!;
    const more = (wordsOf(bytes)[GUARD.skipped]! - this.known) >>> 0;
    if (more === 0) return;
    if (more !== 1) throw new Error(`${more} steps skipped by one attempt`);
    this.known++;
    onSkipped();
  }
}

function wordsOf(bytes: Uint8Array): Uint32Array {
  return new Uint32Array(bytes.buffer, bytes.byteOffset, GUARD_BYTES / 4);
}
