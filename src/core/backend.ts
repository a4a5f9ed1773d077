/**
 * The contract between everything above (tensors, ops, formats) and a device: allocate, free, write, read, launch.
 * A backend is one stream: what is launched runs in that order; launching returns at once, reading waits.
 */
import type { Address, KernelName, Operands, Storage } from "./kernels.js";

export type DeviceName = "cpu" | "cuda";

/** What a launch is part of; says whose operand a fault in the kernel is about. Static: one object per op. */
export interface LaunchContext {
  /** The public operation (`quantize4bit`). */
  readonly op: string;
  /** The operand that is checked for non-finite values. */
  readonly operand: string;
  /** What a kernel counts when it reports a fault. */
  readonly unit: "block" | "row" | "parameter";
}

/**
 * What a kernel reaches through addresses that lie in device memory, beside its operands: a launch has to know, so that reads and writes
 * by the host keep their order with it.
 */
export interface Reached {
  readonly reads: readonly Address[];
  readonly writes: readonly Address[];
}

/** The most bytes of a peek. */
export const PEEK_BYTES = 64;

/** Bytes on their way to the host that nobody waits for: no fault is reported through them, and they keep no process alive. */
export interface Peek {
  /** The bytes as they were when `peek` was called, once they have arrived. @throws BackendError when the stream has failed or was restarted */
  poll(): Uint8Array | undefined;
  /** The bytes; blocks the thread until they have arrived. @throws BackendError */
  wait(): Uint8Array;
  /** Gives up what they take on their way; for those that are not polled to the end. */
  drop(): void;
}

/** Memory for a `peek` that is still to come. */
export interface PeekRoom {
  /** Gives it back unused. */
  drop(): void;
}

/** Memory of one device, in bytes. */
export interface DeviceMemory {
  /** Bytes of live allocations that belong to tensors. */
  readonly bytes: number;
  /** Live tensors' allocations. */
  readonly allocations: number;
  /** Bytes held for the library itself: code tables, scratch, rings. */
  readonly reservedBytes: number;
  /** Bytes the device has taken from the system so far. */
  readonly committedBytes: number;
  /** The most it will take. */
  readonly limitBytes: number;
  /**
   * Of `bytes`, those of paged allocations whose pages may lie in the host's memory: not in `committedBytes`, and against `limitBytes` only
   * where `paging` says that they must fit. 0 where paged memory is plain memory.
   */
  readonly pagedBytes: number;
  /** What paged memory is on this device, in words. */
  readonly paging: string;
}

export type BackendState = "ready" | "failed" | "closed";

export interface Backend {
  readonly device: DeviceName;
  readonly state: BackendState;
  /** Restarts so far: what was under way at one, writes included, may never have happened. */
  readonly epoch: number;

  /**
   * Reserves `bytes` (0 is allowed). Paged memory may exceed what the GPU has: the driver moves its pages to where they are used. Where
   * host and device share their memory, and on the cpu, it is plain memory. @throws OutOfMemoryError, BackendError
   */
  allocate(bytes: number, paged?: boolean): Storage;
  /** Brings pages of paged allocations to the device, ordered with the stream; nothing for what is not paged. */
  prefetch(storages: readonly Storage[]): void;
  /** Gives an allocation back, ordered with the stream: kernels launched before still see it. Never throws. */
  release(storage: Storage): void;
  /** Puts host bytes into an allocation, ordered with the stream; `src` may be changed as soon as it returns. */
  write(dst: Storage, dstOffset: number, src: Uint8Array): void;
  /** The bytes as they are after everything launched so far. @throws NonFiniteError, BackendError (as a rejection) */
  read(src: Storage, srcOffset: number, bytes: number): Promise<Uint8Array<ArrayBuffer>>;
  /** `read` that blocks the thread: for scripts and tests. */
  readSync(src: Storage, srcOffset: number, bytes: number): Uint8Array<ArrayBuffer>;
  /**
   * A look at up to PEEK_BYTES as they are after everything launched so far, without waiting.
   * @param room what `reservePeek` gave: used up, whatever comes of it
   * @throws ArgumentError (bytes), BackendError; without `room` OutOfMemoryError
   */
  peek(src: Storage, srcOffset: number, bytes: number, room?: PeekRoom): Peek;
  /** What a peek takes, ahead of it. @throws OutOfMemoryError, BackendError */
  reservePeek(): PeekRoom;
  /**
   * Gets what a launch of this kernel takes beside its operands onto the device, so that the launch needs no memory: for launches of which
   * all or none should happen. @throws OutOfMemoryError, BackendError, NoKernelImageError
   */
  load<K extends KernelName>(kernel: K, operands: Operands<K>): void;
  /** Enqueues a kernel. Operands were checked by the caller. @throws BackendError when the stream has failed */
  launch<K extends KernelName>(kernel: K, operands: Operands<K>, context?: LaunchContext, reached?: Reached): void;
  /** The number by which kernels know a place: for tables of addresses in device memory. At most 2^53. */
  addressOf(address: Address): number;
  /** Resolves when everything launched so far is done. Rejects like `read`. */
  synchronize(): Promise<void>;
  /** A device copy of constant bytes (a code table), made once per key and kept as long as the key lives. */
  constant(key: object, bytes: () => Uint8Array): Storage;
  memory(): DeviceMemory;
  /** Makes a failed backend usable again: allocations stay, results of commands that had not finished are undefined. */
  restart(): Promise<void>;
  /** Stops the workers and drops the memory. Every later use throws DisposedError. */
  close(): Promise<void>;
}
