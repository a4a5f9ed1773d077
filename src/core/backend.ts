/**
 * The contract between everything above (tensors, ops, formats) and a device: allocate, free, write, read, launch.
 * A backend is one stream: what is launched runs in that order; launching returns at once, reading waits.
 */
import type { KernelName, Operands, Storage } from "./kernels.js";

export type DeviceName = "cpu" | "cuda";

/** What a launch is part of; says whose operand a fault in the kernel is about. Static: one object per op. */
export interface LaunchContext {
  /** The public operation (`quantize4bit`). */
  readonly op: string;
  /** The operand that is checked for non-finite values. */
  readonly operand: string;
  /** What a kernel counts when it reports a fault. */
  readonly unit: "block" | "row";
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
}

export type BackendState = "ready" | "failed" | "closed";

export interface Backend {
  readonly device: DeviceName;
  readonly state: BackendState;

  /** Reserves `bytes` (0 is allowed). @throws OutOfMemoryError, BackendError */
  allocate(bytes: number): Storage;
  /** Gives an allocation back, ordered with the stream: kernels launched before still see it. Never throws. */
  release(storage: Storage): void;
  /** Puts host bytes into an allocation, ordered with the stream; `src` may be changed as soon as it returns. */
  write(dst: Storage, dstOffset: number, src: Uint8Array): void;
  /** The bytes as they are after everything launched so far. @throws NonFiniteError, BackendError (as a rejection) */
  read(src: Storage, srcOffset: number, bytes: number): Promise<Uint8Array<ArrayBuffer>>;
  /** `read` that blocks the thread: for scripts and tests. */
  readSync(src: Storage, srcOffset: number, bytes: number): Uint8Array<ArrayBuffer>;
  /** Enqueues a kernel. Operands were checked by the caller. @throws BackendError when the stream has failed */
  launch<K extends KernelName>(kernel: K, operands: Operands<K>, context?: LaunchContext): void;
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
