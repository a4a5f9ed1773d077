/** The cuda backend: arena, stream, staging and kernel images behind the Backend interface. */
import { fileURLToPath } from "node:url";
import type {
  Backend,
  BackendState,
  DeviceMemory,
  LaunchContext,
  Peek,
  PeekRoom,
  Reached,
} from "../../core/backend.js";
import { DTYPE_ID } from "../../core/dtype.js";
import { ArgumentError, BackendError, DisposedError } from "../../core/errors.js";
import {
  type Address,
  type FieldType,
  KERNEL_FAMILY,
  KERNEL_NAMES,
  KERNELS,
  type KernelFamily,
  type KernelName,
  type Operands,
  QUANT_TYPE_ID,
  type Storage,
} from "../../core/kernels.js";
import { availableMemory } from "../system.js";
import { COMMAND_OPERANDS } from "./addon.js";
import { Arena, addressOf, type CudaStorage } from "./arena.js";
import { CudaBlas } from "./blas.js";
import { SharedContext } from "./context.js";
import { type CudaDevice, describePaging, findDevice, openDriver, pagingOf } from "./device.js";
import { FaultWord } from "./faults.js";
import { CUDA_KERNELS } from "./kernels.js";
import type { Launch, Plan } from "./launch.js";
import { type CudaLayout, cudaLayout } from "./layout.js";
import { KernelModules } from "./modules.js";
import { Peeks } from "./peeks.js";
import { ReadQueue } from "./reads.js";
import { PinnedMemory, WriteRing } from "./staging.js";
import { CudaStream } from "./stream.js";

export interface CudaOptions {
  /** The driver's number of the GPU. Default 0. */
  readonly device?: number;
  /**
   * Most bytes of device memory to take. Default: all that the GPU has; on an integrated GPU, which shares its memory with the
   * system, what is available when the backend is made. There no allocation takes more than what is available at that time. Paged
   * memory does not count where its pages move on demand: its limit is what the host has available at its first allocation.
   */
  readonly memoryLimit?: number;
  /** Surround every allocation with known bytes and check them on release: finds kernels that overrun. Very slow. */
  readonly guards?: boolean;
  /** A folder with kernel images instead of the package's. Default: HALFBYTE_KERNELS. */
  readonly kernels?: string;
  /** The driver library. Default: HALFBYTE_CUDA_LIBRARY, else libcuda.so.1. */
  readonly library?: string;
  /**
   * The cuBLASLt library that multiplies matrices, or `false` for this package's own kernels alone. Default: HALFBYTE_CUBLASLT (a
   * path, or "off"), else the system's, where there is one.
   */
  readonly blas?: string | false;
}

/** Where the kernel images are: `folder`, else HALFBYTE_KERNELS, else the package's. */
export function kernelFolder(folder?: string): string {
  return folder ?? (process.env.HALFBYTE_KERNELS || fileURLToPath(new URL("./kernels", import.meta.url)));
}

/** How a kernel's operands are packed: per field its name, its type and its word in the command. */
interface Packing {
  readonly names: readonly string[];
  readonly types: readonly FieldType[];
  readonly words: readonly number[];
  readonly fault: CudaLayout["fault"];
  readonly bytes: number;
}

const PACKINGS = Object.fromEntries(
  KERNEL_NAMES.map((kernel): [KernelName, Packing] => {
    const fields = KERNELS[kernel] as Record<string, FieldType>;
    const { offsets, fault, bytes } = cudaLayout(kernel);
    const names = Object.keys(fields);
    const words = names.map((name) => (COMMAND_OPERANDS + offsets[name]!) >> 2);
    return [kernel, { names, types: Object.values(fields), words, fault, bytes }];
  }),
) as Record<KernelName, Packing>;

type Values = Readonly<Record<string, Address | number | null>>;

const GUARD_PEEK = 4096;
const TWO_32 = 2 ** 32;
/** The first architecture with bf16 on tensor cores and copies into shared memory. */
const TENSOR_CORES = 80;

export class CudaBackend implements Backend {
  readonly device = "cuda";
  readonly info: CudaDevice;
  private readonly context: SharedContext;
  private readonly stream: CudaStream;
  private readonly arena: Arena;
  private readonly pinned: PinnedMemory;
  private readonly writes: WriteRing;
  private readonly reads: ReadQueue;
  private readonly peeks: Peeks;
  private readonly faults: FaultWord;
  private readonly modules: KernelModules;
  private readonly blas: CudaBlas;
  private readonly command: Uint32Array;
  private readonly commandFloats: Float32Array;
  private readonly constants = new WeakMap<object, CudaStorage>();
  private readonly constantsGone: FinalizationRegistry<CudaStorage>;
  private guardPeek: number | undefined;
  private closing: Promise<void> | undefined;
  epoch = 0;

  /**
   * Opens the driver and takes the GPU. Main thread only.
   * @throws CudaUnavailableError when it cannot be used, ArgumentError for an option, CudaError
   */
  constructor(options: CudaOptions = {}) {
    const { memoryLimit } = options;
    if (memoryLimit !== undefined && !(Number.isFinite(memoryLimit) && memoryLimit > 0)) {
      throw new ArgumentError("cuda", "memoryLimit", "a positive number of bytes", String(memoryLimit));
    }
    const driver = openDriver(options.library);
    const { addon } = driver;
    this.info = findDevice(driver, options.device ?? 0);
    const { integrated, totalBytes, ordinal } = this.info;
    this.context = SharedContext.acquire(driver, ordinal);
    try {
      // It may fail before there are any reads.
      this.stream = new CudaStream(addon, this.context, (error) => this.reads?.fail(error));
    } catch (error) {
      this.context.release();
      throw error;
    }
    const hostFree = (): number => availableMemory().bytes;
    const limitBytes = Math.min(memoryLimit ?? (integrated ? hostFree() : totalBytes), totalBytes);
    const paging = pagingOf(this.info);
    this.arena = new Arena(this.stream, {
      limitBytes,
      guards: options.guards ?? false,
      peek: (address, bytes) => this.guardBytes(address, bytes),
      free: () => (integrated ? hostFree() : addon.memoryInfo() === 0 ? addon.results[0]! : 0),
      careful: integrated,
      paged: paging === "plain" ? undefined : { device: ordinal, onDemand: paging === "on demand", hostFree },
    });
    this.stream.relieve = () => this.arena.trim();
    this.pinned = new PinnedMemory(this.stream);
    this.writes = new WriteRing(this.pinned);
    this.faults = new FaultWord(this.stream, this.pinned, (bytes) => this.arena.allocate(bytes, true).address);
    this.reads = new ReadQueue(this.stream, this.faults, this.pinned, integrated, (storage) =>
      this.arena.release(storage),
    );
    this.peeks = new Peeks(this.stream, this.pinned, () => this.epoch);
    this.modules = new KernelModules(this.stream, this.info, kernelFolder(options.kernels), (family) => {
      if (integrated) this.warmUp(family);
    });
    this.blas = new CudaBlas(this.stream, {
      library: options.blas,
      device: this.info,
      allocate: (bytes) => this.arena.allocate(bytes, true),
      release: (storage) => this.arena.release(storage),
    });
    this.command = this.stream.command;
    this.commandFloats = new Float32Array(this.command.buffer);
    this.constantsGone = new FinalizationRegistry((storage) => this.release(storage));
  }

  get state(): BackendState {
    return this.closing ? "closed" : this.stream.failure ? "failed" : "ready";
  }

  allocate(bytes: number, paged = false): Storage {
    this.check("allocate");
    return this.arena.allocate(bytes, false, paged);
  }

  prefetch(storages: readonly Storage[]): void {
    this.check("prefetch");
    this.arena.prefetch(storages);
  }

  addressOf(address: Address): number {
    return addressOf(address);
  }

  release(storage: Storage): void {
    const own = storage as CudaStorage;
    if (this.closing || own.released) return;
    own.released = true;
    if (own.reads === 0) this.arena.release(own);
  }

  write(dst: Storage, dstOffset: number, src: Uint8Array): void {
    this.check("write");
    if (src.byteLength === 0) return;
    const own = dst as CudaStorage;
    this.reads.settle(own);
    this.writes.write(own.address + dstOffset, src);
  }

  async read(src: Storage, srcOffset: number, bytes: number): Promise<Uint8Array<ArrayBuffer>> {
    this.check("read");
    return this.reads.read(src as CudaStorage, srcOffset, bytes);
  }

  readSync(src: Storage, srcOffset: number, bytes: number): Uint8Array<ArrayBuffer> {
    this.check("readSync");
    return this.reads.readSync(src as CudaStorage, srcOffset, bytes);
  }

  peek(src: Storage, srcOffset: number, bytes: number, room?: PeekRoom): Peek {
    try {
      this.check("peek");
    } catch (error) {
      room?.drop();
      throw error;
    }
    return this.peeks.peek(src as CudaStorage, srcOffset, bytes, room);
  }

  reservePeek(): PeekRoom {
    this.check("reservePeek");
    return this.peeks.reserve();
  }

  load<K extends KernelName>(kernel: K, operands: Operands<K>): void {
    this.check("load");
    const launch = this.planned(kernel, operands);
    if (launch === undefined) return;
    if (launch !== "driver") this.modules.entry(KERNEL_FAMILY[kernel], launch);
    if (PACKINGS[kernel].fault) this.faults.address;
  }

  launch<K extends KernelName>(kernel: K, operands: Operands<K>, context?: LaunchContext, reached?: Reached): void {
    this.check("launch");
    const packing = PACKINGS[kernel];
    const values = operands as Values;
    if (kernel === "matmul" || kernel === "igemm") {
      if (this.multiply(kernel, operands as Operands<"matmul" | "igemm">, packing, context)) return;
    }
    const launch = this.planned(kernel, operands);
    if (launch === undefined) return;
    if (this.reads.pinning) {
      this.settleOutputs(packing, values);
      if (reached) for (const { storage } of reached.writes) this.reads.settle(storage as CudaStorage);
    }
    // Before the operands are packed: loading a family may launch its warm-up.
    const entry = launch === "driver" ? undefined : this.modules.entry(KERNEL_FAMILY[kernel], launch);
    this.pack(packing, values, context);
    this.stream.remember(kernel);
    if (launch === "driver") this.serve(kernel, values);
    else this.stream.launch(entry!, launch, packing.bytes);
  }

  async synchronize(): Promise<void> {
    this.check("synchronize");
    await this.reads.read(undefined, 0, 0);
  }

  constant(key: object, bytes: () => Uint8Array): Storage {
    let storage = this.constants.get(key);
    if (!storage) {
      this.check("constant");
      const data = bytes();
      storage = this.arena.allocate(data.byteLength, true);
      try {
        this.write(storage, 0, data);
      } catch (error) {
        this.arena.release(storage);
        throw error;
      }
      this.constants.set(key, storage);
      this.constantsGone.register(key, storage);
    }
    return storage;
  }

  /** `reservedBytes` and `committedBytes` include page-locked host memory. */
  memory(): DeviceMemory {
    const { refusedHint } = this.arena;
    return {
      bytes: this.arena.bytes,
      allocations: this.arena.allocations,
      reservedBytes: this.arena.internalBytes + this.pinned.bytes,
      committedBytes: this.arena.committedBytes + this.pinned.bytes,
      limitBytes: this.arena.limitBytes,
      pagedBytes: this.arena.pagedBytes,
      paging: refusedHint
        ? `${describePaging(this.info)}; refused by the driver: ${refusedHint}`
        : describePaging(this.info),
    };
  }

  /** Descriptions of the kernel images that are loaded. */
  imagesInUse(): string[] {
    return this.modules.descriptions;
  }

  /** Version and file of the cuBLASLt that multiplies matrices (`12.6.4 (/usr/.../libcublasLt.so.12)`), if any. Opens it. */
  blasVersion(): string | undefined {
    this.check("blasVersion");
    return this.blas.version;
  }

  /** Why no cuBLASLt is used, or undefined when one is. Opens it. */
  blasMissing(): string | undefined {
    this.check("blasMissing");
    return this.blas.missing;
  }

  /** Milliseconds that the GPU takes for what `body` launches. Blocks the thread: for benchmarks. */
  elapsed(body: () => void): number {
    this.check("elapsed");
    return this.stream.elapsed(body);
  }

  /** Checks the guards of every live allocation (option `guards`). @throws Error naming the first overrun */
  checkGuards(): void {
    this.check("checkGuards");
    this.arena.checkGuards();
  }

  /**
   * Pending reads reject; what was launched still runs. After a failure of the device it rejects: the driver then refuses
   * everything for the rest of the process.
   */
  async restart(): Promise<void> {
    if (this.closing) throw new DisposedError("the cuda backend", "restart");
    const { failure } = this.stream;
    if (failure) {
      const reason = `the device has failed (${failure.reason}) and the driver refuses this process from then on: start the process again to use cuda`;
      throw new BackendError("cuda", reason, undefined, { cause: failure });
    }
    this.epoch++;
    this.reads.fail(new BackendError("cuda", "the backend was restarted"));
    this.faults.reset();
  }

  close(): Promise<void> {
    this.closing ??= this.shutDown();
    return this.closing;
  }

  private async shutDown(): Promise<void> {
    const { stream } = this;
    this.reads.fail(new BackendError("cuda", "the backend was closed"));
    await stream.settled();
    this.peeks.close();
    this.modules.close();
    this.blas.close();
    this.writes.close();
    this.arena.close();
    this.pinned.close();
    stream.close();
    this.context.release();
  }

  /**
   * Runs something small of a family that has just been loaded, on integrated GPUs only. Orin boards have been seen to reboot when a
   * process began with several large 4-bit products, and not when a small one went before; power and clocks then rise
   * on something that hardly draws any.
   */
  private warmUp(family: KernelFamily): void {
    const n = 64;
    const storage = this.arena.allocate(4 * n * Float32Array.BYTES_PER_ELEMENT, true);
    const at = (quarter: number): Address => ({ storage, byteOffset: quarter * n * Float32Array.BYTES_PER_ELEMENT });
    try {
      this.launch("fill", { dst: at(0), bytes: storage.bytes, value: 0 });
      const { f32, f16 } = DTYPE_ID;
      if (family === "convert") this.launch("convert", { x: at(0), y: at(1), n, from: f32, to: f16 });
      if (family === "fourbit") {
        const sizes = { n, blocksize: n, dtype: f32, quantType: QUANT_TYPE_ID.nf4 };
        this.launch("dequantize4bit", { packed: at(0), absmax: at(1), y: at(2), ...sizes });
      }
      if (family === "matmul4bit") {
        const sizes = {
          m: 1,
          n: 8,
          k: n,
          blocksize: n,
          blocksize2: 0,
          dtype: f32,
          quantType: QUANT_TYPE_ID.nf4,
          splits: 1,
        };
        const none = { code: null, absmax2: null, offset: null, bias: null, partial: null };
        this.launch("matmul4bit", { a: at(0), packed: at(1), absmax: at(2), y: at(3), ...none, ...sizes });
      }
    } finally {
      this.arena.release(storage);
    }
  }

  /** How a kernel is launched; undefined: not at all, as there is nothing to do. */
  private planned<K extends KernelName>(kernel: K, operands: Operands<K>): ReturnType<Plan<K>> {
    const plan: Plan<K> = CUDA_KERNELS[kernel];
    const launch = plan(operands);
    if (launch === undefined || launch === "driver") return launch;
    return launch.fallback && this.lacks(launch) ? launch.fallback() : launch;
  }

  /** Whether this GPU lacks what a launch that has a fallback needs. */
  private lacks({ shared }: Launch): boolean {
    return this.info.architecture < TENSOR_CORES || shared > this.info.sharedBytesPerBlock;
  }

  /** A product by cuBLASLt; false when that is not for it. */
  private multiply<K extends "matmul" | "igemm">(
    kernel: K,
    operands: Operands<K>,
    packing: Packing,
    context: LaunchContext | undefined,
  ): boolean {
    if (!this.blas.serves(kernel, operands)) return false;
    const values = operands as Values;
    if (this.reads.pinning) this.settleOutputs(packing, values);
    this.pack(packing, values, context);
    if (!this.blas.wantsSums(kernel, operands)) return this.blas.launch(kernel, operands);
    const { bias, y, m, n, batch, dtype } = operands as Operands<"matmul">;
    const rows = batch * m;
    const sums = this.arena.allocate(rows * n * Float32Array.BYTES_PER_ELEMENT, true);
    try {
      if (!this.blas.launch(kernel, operands, sums.address)) return false;
      const x = { storage: sums, byteOffset: 0 };
      this.launch("sumPartials", { x, bias, y, rows, cols: n, splits: 1, dtype });
      return true;
    } finally {
      this.arena.release(sums);
    }
  }

  /** The driver's own copy and fill. */
  private serve(kernel: KernelName, values: Values): void {
    if (kernel === "copy") {
      const { src, dst, bytes } = values as Operands<"copy">;
      this.stream.copyOnDevice(addressOf(dst), addressOf(src), bytes);
    } else if (kernel === "fill") {
      const { dst, bytes, value } = values as Operands<"fill">;
      this.stream.fill(addressOf(dst), value, bytes);
    } else {
      throw new BackendError("cuda", `the driver has no ${kernel}`);
    }
  }

  private pack(packing: Packing, values: Values, context: LaunchContext | undefined): void {
    const { names, types, words, fault } = packing;
    const { command } = this;
    for (let i = 0; i < names.length; i++) {
      const value = values[names[i]!]!;
      const at = words[i]!;
      switch (types[i]) {
        case "u32":
          command[at] = value as number;
          break;
        case "f32":
          this.commandFloats[at] = value as number;
          break;
        default: {
          const wide = types[i] === "size" ? (value as number) : addressOf(value as Address | null);
          command[at] = wide;
          command[at + 1] = wide / TWO_32;
        }
      }
    }
    if (fault) {
      const word = this.faults.address;
      const at = (COMMAND_OPERANDS + fault.word) >> 2;
      command[at] = word;
      command[at + 1] = word / TWO_32;
      command[(COMMAND_OPERANDS + fault.key) >> 2] = this.faults.key(context, values.allowNonFinite === 0);
    }
  }

  private settleOutputs({ names, types }: Packing, values: Values): void {
    for (let i = 0; i < names.length; i++) {
      const value = values[names[i]!];
      if (types[i] === "out" && value) this.reads.settle((value as Address).storage as CudaStorage);
    }
  }

  /** Device bytes after everything enqueued so far; blocks. */
  private guardBytes(address: number, bytes: number): Uint8Array {
    const { stream } = this;
    if (this.guardPeek === undefined) {
      this.guardPeek = this.pinned.tryAllocate(GUARD_PEEK);
      if (this.guardPeek === undefined) throw this.pinned.outOfMemory(GUARD_PEEK);
    }
    const result = new Uint8Array(bytes);
    stream.copyToHost(this.guardPeek, 0, address, bytes);
    stream.drain();
    stream.check("hostRead", stream.addon.hostRead(this.guardPeek, 0, result));
    return result;
  }

  private check(op: string): void {
    if (this.closing) throw new DisposedError("the cuda backend", op);
    if (this.stream.failure) throw this.stream.failure;
  }
}
