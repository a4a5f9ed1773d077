/** Small reads that nobody waits for: copied into page-locked slots in the stream's order, looked at when they have arrived. */
import { PEEK_BYTES, type Peek, type PeekRoom } from "../../core/backend.js";
import { ArgumentError, BackendError } from "../../core/errors.js";
import type { CudaStorage } from "./arena.js";
import type { PinnedMemory, Slot } from "./staging.js";
import { SlotPool } from "./staging.js";
import type { CudaStream } from "./stream.js";

export class Peeks {
  private readonly slots: SlotPool;
  /** Reserved, or on their way. */
  private readonly open = new Set<{ drop(): void }>();

  constructor(
    private readonly stream: CudaStream,
    private readonly memory: PinnedMemory,
    /** Grows with each restart of the backend. */
    private readonly epoch: () => number,
  ) {
    this.slots = new SlotPool(memory, PEEK_BYTES, 64, Number.POSITIVE_INFINITY);
  }

  /** @throws OutOfMemoryError, CudaError */
  reserve(): PeekRoom {
    const { stream, slots } = this;
    const slot = slots.take();
    if (!slot) throw this.memory.outOfMemory(PEEK_BYTES);
    let event: number;
    try {
      event = stream.takeEvent();
    } catch (error) {
      slots.give(slot);
      throw error;
    }
    const room = new CudaPeekRoom(slot, event, (taken) => {
      this.open.delete(room);
      if (taken) return;
      stream.recycle(event);
      slots.give(slot);
    });
    this.open.add(room);
    return room;
  }

  /**
   * @param reserved used up, whatever comes of it
   * @throws ArgumentError for more than PEEK_BYTES, CudaError; without `reserved` OutOfMemoryError
   */
  peek(storage: CudaStorage, offset: number, bytes: number, reserved?: PeekRoom): Peek {
    const { stream, slots } = this;
    const room = (reserved ?? this.reserve()) as CudaPeekRoom;
    const { slot, event } = room;
    room.use();
    let copied = false;
    try {
      if (!(Number.isInteger(bytes) && bytes >= 1 && bytes <= PEEK_BYTES)) {
        throw new ArgumentError("peek", "bytes", `an integer from 1 to ${PEEK_BYTES}`, String(bytes));
      }
      stream.copyToHost(slot.host, slot.offset, storage.address + offset, bytes);
      copied = true;
      stream.record(event);
    } catch (error) {
      // What could not be recorded has been recycled.
      if (!copied) stream.recycle(event);
      slots.give(slot);
      throw error;
    }
    const peek = new CudaPeek(stream, slot, bytes, event, this.epoch, () => {
      this.open.delete(peek);
      stream.recycle(event);
      slots.give(slot);
    });
    this.open.add(peek);
    return peek;
  }

  /** Only when nothing is under way. */
  close(): void {
    for (const each of this.open) each.drop();
  }
}

export class CudaPeekRoom implements PeekRoom {
  private over = false;

  constructor(
    readonly slot: Slot,
    readonly event: number,
    /** Called once: whether somebody else has slot and event now. */
    private readonly end: (taken: boolean) => void,
  ) {}

  /** @throws BackendError when it was used or dropped */
  use(): void {
    if (this.over) throw new BackendError("cuda", "the room for a peek is gone");
    this.over = true;
    this.end(true);
  }

  drop(): void {
    if (this.over) return;
    this.over = true;
    this.end(false);
  }
}

class CudaPeek implements Peek {
  private result: Uint8Array<ArrayBuffer> | undefined;
  private open = true;
  private readonly made: number;

  constructor(
    private readonly stream: CudaStream,
    private readonly slot: Slot,
    private readonly bytes: number,
    private readonly event: number,
    private readonly epoch: () => number,
    private readonly over: () => void,
  ) {
    this.made = epoch();
  }

  poll(): Uint8Array<ArrayBuffer> | undefined {
    this.checkEpoch();
    if (this.open && this.stream.isOver(this.event)) this.take();
    return this.result;
  }

  wait(): Uint8Array<ArrayBuffer> {
    this.checkEpoch();
    if (this.open) {
      this.stream.await(this.event);
      this.take();
    }
    if (!this.result) throw new BackendError("cuda", "a peek was dropped");
    return this.result;
  }

  /** The slot may be used at once: what is copied there next arrives later. */
  drop(): void {
    if (!this.open) return;
    this.open = false;
    this.over();
  }

  /** What was on its way at a restart is given up, on every backend. */
  private checkEpoch(): void {
    if (this.result || this.made === this.epoch()) return;
    this.drop();
    throw new BackendError("cuda", "the backend was restarted");
  }

  private take(): void {
    const { stream, slot } = this;
    const result = new Uint8Array(this.bytes);
    stream.check("hostRead", stream.addon.hostRead(slot.host, slot.offset, result));
    this.result = result;
    this.drop();
  }
}
