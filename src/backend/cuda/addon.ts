/**
 * What the native addon offers: the CUDA driver API, call by call, with nothing of our own in it but safety. Every function
 * returns a status and never throws: 0 is success, a positive number is the driver's CUresult, a negative one is of the
 * binding itself (`BINDING`). Numbers that a call yields are in `results` until the next call. Handles are small numbers
 * that the addon checks, as it checks that an address range lies inside one live allocation; device addresses are plain
 * numbers (below 2^53). Main thread only.
 */

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
  /** Called before `open`. */
  closed: -7,
} as const;

export type Status = number;

/** A launch, as words of `CudaAddon.command`; the operand struct follows at byte COMMAND_OPERANDS. */
export const COMMAND_WORDS = { func: 0, grid: 1, block: 2, shared: 3, stream: 4, operandBytes: 5 } as const;
export const COMMAND_OPERANDS = 64;

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

  /** Asynchronous copies in stream order. */
  copyFromHost(to: number, host: number, offset: number, bytes: number, stream: number): Status;
  copyToHost(host: number, offset: number, from: number, bytes: number, stream: number): Status;
  copyOnDevice(to: number, from: number, bytes: number, stream: number): Status;
  /** Fills with a byte, or with a 32-bit word (address and bytes multiples of 4). */
  fill8(to: number, value: number, bytes: number, stream: number): Status;
  fill32(to: number, value: number, bytes: number, stream: number): Status;
}
