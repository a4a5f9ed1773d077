/**
 * What the native addon offers: the CUDA driver API, call by call, with nothing of our own in it but safety. Every function
 * returns a status and never throws: 0 is success, a positive number is the driver's CUresult, a negative one is of the
 * binding itself (`BINDING`). Numbers that a call yields are in `results` until the next call. Handles are small numbers
 * that the addon checks, as it checks that an address range lies inside one live allocation; device addresses are plain
 * numbers (below 2^53). Main thread only.
 */

import type { DType } from "../../core/dtype.js";

/** Statuses of the binding itself. The addon's C++ gets them generated from here. */
export const BINDING = {
  /** An argument has the wrong type or range. */
  badArgument: -1,
  /** A handle that does not exist, or no more. */
  badHandle: -2,
  /** Called from a thread other than the one that opened the library. */
  wrongThread: -3,
  /** The driver library cannot be opened: `detail()` has the loader's words. */
  noLibrary: -4,
  /** The driver library lacks a function that is needed: `detail()` names it. */
  missingSymbol: -5,
  /** Host memory, handles or threads are exhausted. */
  outOfHostMemory: -6,
  /** Called before `open`, a product before `blasOpen`. */
  closed: -7,
  /** cuBLASLt has no algorithm for a product of this kind: `detail()` has its sizes. */
  notSupported: -8,
} as const;

/** A call of cuBLASLt that failed with cublasStatus_t s has the status BLAS_STATUS - s. */
export const BLAS_STATUS = -1000;

export type Status = number;

/** The host, where `memoryAdvise` and `memoryPrefetch` take a device (CU_DEVICE_CPU). */
export const HOST = -1;

/** A launch, as words of `CudaAddon.command`; the operand struct follows at byte COMMAND_OPERANDS. */
export const COMMAND_WORDS = { func: 0, grid: 1, block: 2, shared: 3, stream: 4, operandBytes: 5 } as const;
export const COMMAND_OPERANDS = 64;

/** The dtypes of `blasMatmul`, as DTYPE_ID numbers them; i8 gives i32. */
export const BLAS_DTYPES = ["f32", "f16", "bf16", "i8"] as const satisfies readonly DType[];
/**
 * A product, as words of `CudaAddon.command` from byte BLAS_COMMAND on, which lies past the operands of every kernel: addresses and
 * strides are of two words, the low one first. Row-major, y[m, n] = op(a) op(b) + bias[n]: a holds m x k elements, or k x m with
 * transposeA, b k x n, or n x k with transposeB; lda, ldb and ldy are elements from row to row, the strides elements from matrix to
 * matrix (0: one for all; ignored for a batch of 1). bias 0: none. wide: y is f32 where a and b are of
 * 16 bits. Sizes are from 1 to 2^31 - 1.
 */
export const BLAS_WORDS = {
  dtype: 0,
  transposeA: 1,
  transposeB: 2,
  m: 3,
  n: 4,
  k: 5,
  batch: 6,
  lda: 7,
  ldb: 8,
  ldy: 9,
  stream: 10,
  workspaceBytes: 11,
  strideA: 12,
  strideB: 14,
  strideY: 16,
  a: 18,
  b: 20,
  bias: 22,
  y: 24,
  workspace: 26,
  wide: 28,
} as const;
export const BLAS_COMMAND = 2048;

export interface CudaAddon {
  /** Numbers that the last call yielded. */
  readonly results: Float64Array;
  /** What the next `launch` launches: COMMAND_WORDS as u32, then up to 4,096 bytes of operands. One buffer for ever. */
  readonly command: ArrayBuffer;

  /** Opens the driver library (`path`, or "libcuda.so.1") and finds every function. Once per process: the same path again is fine. */
  open(path?: string): Status;
  /** More words about the last failure: the loader's, a missing symbol's name, the JIT compiler's log. "" if none. */
  detail(): string;
  /**
   * The driver's name and words for a status (`["CUDA_ERROR_OUT_OF_MEMORY", "out of memory"]`); also for `BINDING`'s. "unknown"
   * before `open`, and on other threads.
   */
  describe(status: Status): [name: string, words: string];
  /** cuInit. */
  init(): Status;
  /** results[0]: the driver's CUDA version, 13000 for 13.0. */
  driverVersion(): Status;
  /** results[0]: devices. */
  deviceCount(): Status;
  /** results[0]: a CUdevice_attribute of a device. */
  deviceAttribute(device: number, attribute: number): Status;
  /** results[0]: total bytes. `identity` gets the device's `name` and `uuid` (32 hex digits) as properties. */
  deviceIdentity(device: number, identity: { name?: string; uuid?: string }): Status;
  /** Retains the device's primary context and makes it current. At most one device at a time. */
  retainContext(device: number): Status;
  /**
   * Ends the completion thread after the event it waits for, destroys what handles stand for, frees what is allocated and
   * releases the context; of watched events nothing more is heard. Safe after a device fault, and without a context.
   */
  releaseContext(): Status;

  /** results[0], [1]: free and total bytes as the driver sees them. */
  memoryInfo(): Status;
  /** results[0]: a device address. */
  memoryAllocate(bytes: number): Status;
  /**
   * Managed memory, for every stream (CU_MEM_ATTACH_GLOBAL); `memoryFree` gives it back. results[0]: an address. Like the two that
   * follow `missingSymbol` where the driver lacks the function: only managed memory needs it.
   */
  memoryAllocateManaged(bytes: number): Status;
  /** A CUmem_advise about managed memory; `device` is what it names, HOST for the host. */
  memoryAdvise(address: number, bytes: number, advice: number, device: number): Status;
  /** Moves the pages of managed memory to a device, or HOST, in stream order. Only for devices with concurrentManagedAccess. */
  memoryPrefetch(address: number, bytes: number, device: number, stream: number): Status;
  memoryFree(address: number): Status;
  /** Page-locked host memory. results[0]: a handle. */
  hostAllocate(bytes: number): Status;
  hostFree(host: number): Status;
  /** Copies between page-locked memory and bytes of JavaScript, on the calling thread. */
  hostRead(host: number, offset: number, into: Uint8Array): Status;
  hostWrite(host: number, offset: number, from: Uint8Array): Status;

  /** results[0]: a handle of a non-blocking stream. */
  streamCreate(): Status;
  streamDestroy(stream: number): Status;
  /** Blocks the thread. */
  streamSynchronize(stream: number): Status;
  /** CUDA_ERROR_NOT_READY (600) while work is under way. */
  streamQuery(stream: number): Status;
  /** results[0]: a handle. Waiting for one blocks without spinning; `timing` makes `eventElapsed` possible. */
  eventCreate(timing: boolean): Status;
  /** An event that is watched is destroyed when its last watch is over; its handle ends at once. */
  eventDestroy(event: number): Status;
  eventRecord(event: number, stream: number): Status;
  eventQuery(event: number): Status;
  /** Blocks the thread. */
  eventSynchronize(event: number): Status;
  /** results[0]: milliseconds between two events. */
  eventElapsed(start: number, end: number): Status;

  /** `completed(token, status)` is called on the event loop when the event is over, from now on for every `watch`. */
  onCompleted(completed: (token: number, status: Status) => void): Status;
  /**
   * Waits for an event on the addon's own thread, in the order of calls; `token` is an integer from 0. A device fault
   * completes it with its status. `process.exit` waits for the event that is being waited for.
   */
  watch(event: number, token: number): Status;
  /** Whether watched events keep the process alive. Not at first. */
  hold(alive: boolean): Status;

  /**
   * Loads a cubin, or PTX that the driver compiles. results[0]: a handle. `detail()` has the compiler's log after a failure.
   * What is neither a whole ELF file nor ASCII is CUDA_ERROR_INVALID_IMAGE (200) without asking the driver.
   */
  moduleLoad(image: Uint8Array): Status;
  moduleUnload(module: number): Status;
  /** results[0]: a handle of a kernel, valid as long as its module. */
  moduleFunction(module: number, name: string): Status;
  /** results[0]: a CUfunction_attribute. */
  functionAttribute(func: number, attribute: number): Status;
  functionSetAttribute(func: number, attribute: number, value: number): Status;
  /** results[0]: blocks of this many threads that fit on a multiprocessor together. */
  functionOccupancy(func: number, block: number, shared: number): Status;
  /** Launches what `command` says. The kernel takes one struct by value: the operands. */
  launch(): Status;

  /**
   * Opens cuBLASLt (a name for the loader, or a path) and makes its handle in the retained context: one library per context, opened
   * anew for every context. results[0 to 2]: major, minor and patch, also when the handle then fails. `identity`
   * gets the library's `file`. The handle goes with the context.
   */
  blasOpen(path: string, identity: { file?: string }): Status;
  /**
   * Enqueues the product that `command` says, float32 sums (never TF32), int32 ones for i8, in an order that depends on sizes,
   * strides, the alignment of addresses, the workspace's size and the GPU only. results[0]: 1 when it was planned anew, else 0;
   * [1]: bytes of the workspace that it takes; [2]: how often it fills the GPU, by the library's estimate. The first product of
   * a kind takes device memory for the library's code. `notSupported` leaves y as it is.
   */
  blasMatmul(): Status;

  /** Asynchronous copies in stream order. */
  copyFromHost(to: number, host: number, offset: number, bytes: number, stream: number): Status;
  copyToHost(host: number, offset: number, from: number, bytes: number, stream: number): Status;
  copyOnDevice(to: number, from: number, bytes: number, stream: number): Status;
  /** Fills with a byte, or with a 32-bit word (address and bytes multiples of 4). */
  fill8(to: number, value: number, bytes: number, stream: number): Status;
  fill32(to: number, value: number, bytes: number, stream: number): Status;
}
