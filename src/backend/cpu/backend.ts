/** The cpu backend: the arena and the command stream behind the Backend interface. */
import { availableParallelism } from "node:os";
import {
  type Backend,
  type BackendState,
  type DeviceMemory,
  type LaunchContext,
  PEEK_BYTES,
  type Peek,
  type PeekRoom,
  type Reached,
} from "../../core/backend.js";
import { ArgumentError, BackendError, DisposedError } from "../../core/errors.js";
import {
  type Address,
  type FieldType,
  KERNELS,
  type KernelName,
  type Operands,
  type Storage,
} from "../../core/kernels.js";
import { Arena, type CpuStorage } from "./arena.js";
import { CPU_KERNELS, type Partition } from "./kernels.js";
import * as L from "./layout.js";
import { StagingRing } from "./staging.js";
import { CommandStream } from "./stream.js";

export interface CpuOptions {
  /** Worker threads, 1 to 64. Default: HALFBYTE_THREADS, else the available parallelism. */
  readonly threads?: number;
  /** Most bytes the shared memory may take. Default and maximum: 4 GiB. */
  readonly memoryLimit?: number;
  /** Surround every allocation with known bytes and check them on release: finds kernels that overrun. Slow. */
  readonly guards?: boolean;
  /** Milliseconds without any progress after which a blocked `dataSync` takes a worker for lost. Default 10,000. */
  readonly stallTimeout?: number;
}

interface Plan {
  readonly names: readonly string[];
  readonly types: readonly FieldType[];
}

const PLANS = Object.fromEntries(
  Object.entries(KERNELS).map(([name, fields]) => [name, { names: Object.keys(fields), types: Object.values(fields) }]),
) as unknown as Record<KernelName, Plan>;

/** A read under way. Its bytes are taken when its fence has come back, or earlier when somebody is about to overwrite them. */
interface Pin {
  readonly storage: CpuStorage;
  readonly offset: number;
  readonly bytes: number;
  taken: Uint8Array<ArrayBuffer> | undefined;
}

/** A constant, and the epoch in which its bytes were written. */
interface Constant {
  readonly storage: CpuStorage;
  epoch: number;
}

/** Reads of at most this many bytes are copied aside on the stream, so that later launches need not wait for them. */
const SMALL_READ = 1 << 16;

export class CpuBackend implements Backend {
  readonly device = "cpu";
  readonly threads: number;
  private readonly stream: CommandStream;
  private readonly arena: Arena;
  private readonly pins = new Set<Pin>();
  private readonly staging: StagingRing;
  private readonly constants = new WeakMap<object, Constant>();
  private readonly constantsGone: FinalizationRegistry<CpuStorage>;
  private readonly floatWord = new Float32Array(1);
  private readonly floatBits = new Int32Array(this.floatWord.buffer);
  private closed = false;
  epoch = 0;

  constructor(options: CpuOptions = {}) {
    this.threads = threadCount(options.threads);
    const limit = options.memoryLimit ?? L.MAX_PAGES * L.PAGE_BYTES;
    if (!Number.isFinite(limit) || limit <= 0) {
      throw new ArgumentError("cpu", "memoryLimit", "a positive number of bytes", String(limit));
    }
    this.stream = new CommandStream(this.threads, options.stallTimeout ?? 10_000);
    this.arena = new Arena(this.stream.memory, {
      base: this.stream.heapBase,
      limitBytes: limit,
      guards: options.guards ?? false,
    });
    this.staging = new StagingRing((bytes) => this.reserve(bytes, true));
    this.constantsGone = new FinalizationRegistry((storage) => this.release(storage));
  }

  get state(): BackendState {
    return this.closed ? "closed" : this.stream.failure ? "failed" : "ready";
  }

  allocate(bytes: number): Storage {
    return this.reserve(bytes, false);
  }

  /** Nothing to bring: memory is memory. */
  prefetch(): void {}

  addressOf({ storage, byteOffset }: Address): number {
    return storage.offset + byteOffset;
  }

  release(storage: Storage): void {
    const own = storage as CpuStorage;
    if (this.closed || own.released) return;
    own.released = true;
    if (own.reads === 0) this.reclaim(own);
  }

  write(dst: Storage, dstOffset: number, src: Uint8Array): void {
    this.check("write");
    if (src.byteLength === 0) return;
    const own = dst as CpuStorage;
    this.settleReads(own);
    if (own.lastUse <= this.stream.low) {
      this.bytes(own.offset + dstOffset, src.byteLength).set(src);
      return;
    }
    // Commands before this one still use the destination: stage the bytes and let the stream put them in place.
    const to = { storage: dst, byteOffset: dstOffset };
    const place = this.staging.take(src.byteLength, this.stream.low);
    if (place) {
      this.bytes((place.storage as CpuStorage).offset + place.byteOffset, src.byteLength).set(src);
      try {
        this.launch("copy", { src: place, dst: to, bytes: src.byteLength });
      } finally {
        this.staging.use(this.stream.head);
      }
      return;
    }
    const staging = this.reserve(src.byteLength, true);
    try {
      if (staging.lastUse > this.stream.low) this.stream.drainSync();
      this.bytes(staging.offset, src.byteLength).set(src);
      const from = { storage: staging, byteOffset: 0 };
      this.launch("copy", { src: from, dst: to, bytes: src.byteLength });
    } finally {
      this.release(staging);
    }
  }

  async read(src: Storage, srcOffset: number, bytes: number): Promise<Uint8Array<ArrayBuffer>> {
    this.check("read");
    let source = src as CpuStorage;
    if (source.lastUse <= this.stream.low) {
      // Nothing under way touches it: these are the bytes, whatever happens next. Faults are still to be waited for.
      const now = this.copyOut(source, srcOffset, bytes);
      await this.stream.wait();
      return now;
    }
    // Anything may be launched, written or disposed before the fence comes back. A small read is copied aside in stream
    // order; a large one is pinned, and whoever wants to write there waits for it (`settleReads`).
    const aside = bytes <= SMALL_READ;
    if (aside) {
      source = this.reserve(bytes, true);
      const dst = { storage: source, byteOffset: 0 };
      try {
        this.launch("copy", { src: { storage: src, byteOffset: srcOffset }, dst, bytes });
      } catch (error) {
        this.release(source);
        throw error;
      }
    }
    const pin: Pin = { storage: source, offset: aside ? 0 : srcOffset, bytes, taken: undefined };
    source.reads++;
    this.pins.add(pin);
    try {
      await this.stream.wait();
      return this.take(pin);
    } finally {
      this.pins.delete(pin);
      source.reads--;
      if (aside) this.release(source);
      else if (source.released && source.reads === 0 && !this.closed) this.reclaim(source);
    }
  }

  readSync(src: Storage, srcOffset: number, bytes: number): Uint8Array<ArrayBuffer> {
    this.check("readSync");
    this.stream.waitSync();
    return this.copyOut(src as CpuStorage, srcOffset, bytes);
  }

  reservePeek(): PeekRoom {
    const storage = this.reserve(PEEK_BYTES, true);
    return new CpuPeekRoom(storage, () => this.release(storage));
  }

  /** Nothing to load: all kernels are there. */
  load(): void {
    this.check("load");
  }

  peek(src: Storage, srcOffset: number, bytes: number, room: PeekRoom = this.reservePeek()): Peek {
    const copy = (room as CpuPeekRoom).use();
    try {
      this.check("peek");
      if (!(Number.isInteger(bytes) && bytes >= 1 && bytes <= PEEK_BYTES)) {
        throw new ArgumentError("peek", "bytes", `an integer from 1 to ${PEEK_BYTES}`, String(bytes));
      }
      this.launch("copy", {
        src: { storage: src, byteOffset: srcOffset },
        dst: { storage: copy, byteOffset: 0 },
        bytes,
      });
      const { epoch } = this;
      const isLost = (): boolean => this.epoch !== epoch;
      return new CpuPeek(this.stream, this.stream.fence(), isLost, () => {
        const result = this.copyOut(copy, 0, bytes);
        this.release(copy);
        return result;
      });
    } catch (error) {
      this.release(copy);
      throw error;
    }
  }

  launch<K extends KernelName>(kernel: K, operands: Operands<K>, context?: LaunchContext, reached?: Reached): void {
    this.check("launch");
    const partition: Partition<K> = CPU_KERNELS[kernel];
    const units = partition.units(operands);
    if (units === 0) return;
    const per = partition.per(operands);
    const { names, types } = PLANS[kernel];
    const values = operands as Readonly<Record<string, Address | number | null>>;
    if (this.pins.size > 0) {
      this.settleOutputs(names, types, values);
      if (reached) for (const { storage } of reached.writes) this.settleReads(storage as CpuStorage);
    }
    const stream = this.stream;
    const at = stream.begin(kernel, units, per, context);
    const words = this.words;
    for (let i = 0; i < names.length; i++) {
      const value = values[names[i]!]!;
      const type = types[i];
      if (type === "in" || type === "out") {
        if (value === null) {
          words[at + i] = 0;
        } else {
          const storage = (value as Address).storage as CpuStorage;
          words[at + i] = storage.offset + (value as Address).byteOffset;
          storage.lastUse = stream.head + 1;
        }
      } else if (type === "f32") {
        this.floatWord[0] = value as number;
        words[at + i] = this.floatBits[0]!;
      } else {
        words[at + i] = value as number;
      }
    }
    if (reached) {
      const last = stream.head + 1;
      for (const { storage } of reached.reads) (storage as CpuStorage).lastUse = last;
      for (const { storage } of reached.writes) (storage as CpuStorage).lastUse = last;
    }
    stream.publish(Math.ceil(units / per));
  }

  async synchronize(): Promise<void> {
    this.check("synchronize");
    await this.stream.wait();
  }

  constant(key: object, bytes: () => Uint8Array): Storage {
    const { epoch } = this;
    const known = this.constants.get(key);
    if (known) {
      // Its bytes may have been on their way when the stream was stopped.
      if (known.epoch !== epoch) this.write(known.storage, 0, bytes());
      known.epoch = epoch;
      return known.storage;
    }
    const data = bytes();
    const storage = this.reserve(data.byteLength, true);
    try {
      this.write(storage, 0, data);
    } catch (error) {
      this.release(storage);
      throw error;
    }
    this.constants.set(key, { storage, epoch });
    this.constantsGone.register(key, storage);
    return storage;
  }

  memory(): DeviceMemory {
    return {
      bytes: this.arena.bytes,
      allocations: this.arena.allocations,
      reservedBytes: this.arena.internalBytes + this.stream.heapBase,
      committedBytes: this.arena.committedBytes,
      limitBytes: this.arena.limitBytes,
      pagedBytes: 0,
      paging: "plain memory: there is nothing to page",
    };
  }

  /** Checks the guards of every live allocation (option `guards`). @throws Error naming the first overrun */
  checkGuards(): void {
    this.stream.drainSync();
    this.arena.checkGuards();
  }

  async restart(): Promise<void> {
    if (this.closed) throw new DisposedError("the cpu backend", "restart");
    this.epoch++;
    await this.stream.restart();
  }

  async close(): Promise<void> {
    if (this.closed) return;
    this.closed = true;
    await this.stream.close(new BackendError("cpu", "the backend was closed"));
  }

  private settleReads(storage: CpuStorage): void {
    if (storage.reads === 0) return;
    this.stream.drainSync();
    for (const pin of this.pins) if (pin.storage === storage) this.take(pin);
  }

  private take(pin: Pin): Uint8Array<ArrayBuffer> {
    pin.taken ??= this.copyOut(pin.storage, pin.offset, pin.bytes);
    return pin.taken;
  }

  private settleOutputs(
    names: readonly string[],
    types: readonly FieldType[],
    values: Readonly<Record<string, Address | number | null>>,
  ): void {
    for (let i = 0; i < names.length; i++) {
      const value = values[names[i]!];
      if (types[i] === "out" && value) this.settleReads((value as Address).storage as CpuStorage);
    }
  }

  private reserve(bytes: number, internal: boolean): CpuStorage {
    this.check("allocate");
    return this.arena.allocate(bytes, internal, this.stream.low);
  }

  private reclaim(storage: CpuStorage): void {
    // Guards are looked at by the host, so with guards on a release waits for the kernels before it.
    if (this.arena.guarded) this.stream.drainSync();
    this.arena.release(storage);
  }

  private check(op: string): void {
    if (this.closed) throw new DisposedError("the cpu backend", op);
    if (this.stream.failure) throw this.stream.failure;
  }

  private get words(): Int32Array {
    return this.stream.ring;
  }

  /** A copy outside shared memory. */
  private copyOut(storage: CpuStorage, offset: number, bytes: number): Uint8Array<ArrayBuffer> {
    const copy = new Uint8Array(bytes);
    copy.set(this.bytes(storage.offset + offset, bytes));
    return copy;
  }

  private bytes(offset: number, length: number): Uint8Array {
    return new Uint8Array(this.stream.memory.buffer, offset, length);
  }
}

class CpuPeekRoom implements PeekRoom {
  private over = false;

  constructor(
    private readonly storage: CpuStorage,
    private readonly release: () => void,
  ) {}

  /** The memory, now the caller's. @throws BackendError when it was used or dropped */
  use(): CpuStorage {
    if (this.over) throw new BackendError("cpu", "the room for a peek is gone");
    this.over = true;
    return this.storage;
  }

  drop(): void {
    if (!this.over) this.release();
    this.over = true;
  }
}

class CpuPeek implements Peek {
  private result: Uint8Array<ArrayBuffer> | undefined;
  /** Its memory was given back. */
  private over = false;

  constructor(
    private readonly stream: CommandStream,
    private readonly fence: number,
    /** Whether the backend was restarted since. */
    private readonly isLost: () => boolean,
    /** Gives the bytes and what held them; called once. */
    private readonly take: () => Uint8Array<ArrayBuffer>,
  ) {}

  poll(): Uint8Array<ArrayBuffer> | undefined {
    if (this.result) return this.result;
    this.check();
    if (this.stream.hasPassed(this.fence)) this.finish();
    return this.result;
  }

  wait(): Uint8Array<ArrayBuffer> {
    if (this.result) return this.result;
    this.check();
    this.stream.waitFor(this.fence);
    return this.finish();
  }

  drop(): void {
    if (!this.over) this.take();
    this.over = true;
  }

  private finish(): Uint8Array<ArrayBuffer> {
    this.over = true;
    this.result = this.take();
    return this.result;
  }

  private check(): void {
    if (this.isLost()) throw new BackendError("cpu", "the backend was restarted");
    if (this.over) throw new BackendError("cpu", "a peek was dropped");
  }
}

/** The number of worker threads to use. @throws ArgumentError for anything but an integer from 1 to 64 */
function threadCount(option: number | undefined): number {
  const env = process.env.HALFBYTE_THREADS;
  const [name, value] =
    option !== undefined ? ["threads", option] : env ? ["HALFBYTE_THREADS", Number(env)] : ["", availableParallelism()];
  if (name === "") return Math.min(L.MAX_THREADS, value);
  if (!Number.isInteger(value) || value < 1 || value > L.MAX_THREADS) {
    throw new ArgumentError("cpu", name, `an integer from 1 to ${L.MAX_THREADS}`, String(option ?? env));
  }
  return value;
}
