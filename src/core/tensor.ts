/** Tensors: a dtype, a shape, and a reference to storage on a device. */
import type { Backend, DeviceName } from "./backend.js";
import { DTYPE_BYTES, DTYPE_ID, type DType, FLOAT_DTYPES, gradientDTypes, isDType, isFloat } from "./dtype.js";
import { ArgumentError, DeviceError, DisposedError, DTypeError, ShapeError } from "./errors.js";
import type { Address, Storage } from "./kernels.js";
import { adopt } from "./scope.js";
import { formatShape, type Shape, sameShape, sizeOf } from "./shape.js";
import {
  bytesOf,
  type DataOf,
  describeArray,
  isFloat16Array,
  naturalDType,
  type TensorLike,
  viewBytes,
} from "./typedarray.js";

interface Counter {
  tensors: number;
}
const counters = new WeakMap<Backend, Counter>();
function counterOf(backend: Backend): Counter {
  let counter = counters.get(backend);
  if (!counter) {
    counter = { tensors: 0 };
    counters.set(backend, counter);
  }
  return counter;
}

/** Storage that several tensors (views) share; given back with the last of them. */
class SharedStorage {
  private readonly counter: Counter;
  private refs = 0;
  constructor(
    private readonly backend: Backend,
    readonly storage: Storage,
  ) {
    this.counter = counterOf(backend);
  }
  retain(): this {
    this.refs++;
    this.counter.tensors++;
    return this;
  }
  drop(): void {
    this.counter.tensors--;
    if (--this.refs === 0) this.backend.release(this.storage);
  }
}

// Safety net for tensors that nobody disposed: the collector's word only enqueues a release ordered with the stream.
const collected = new FinalizationRegistry<SharedStorage>((shared) => shared.drop());

/** Tensors of a backend that are neither disposed nor collected. */
export function liveTensors(backend: Backend): number {
  return counterOf(backend).tensors;
}

/**
 * A contiguous row-major array on a device.
 *
 * Operations on tensors return at once; `data()` waits for them. A tensor holds device memory until `dispose()` is called,
 * a `using` scope or `tidy()` ends, or the garbage collector finds it.
 */
export class Tensor<D extends DType = DType> implements Address {
  readonly size: number;
  private shared: SharedStorage | undefined;
  private gradient: Tensor | null = null;

  private constructor(
    readonly backend: Backend,
    readonly dtype: D,
    readonly shape: Shape,
    shared: SharedStorage,
    /** Where the first element lies in `storage`. */
    readonly byteOffset: number,
  ) {
    this.size = sizeOf(shape);
    this.shared = shared.retain();
    collected.register(this, shared, this);
    adopt(this);
  }

  /**
   * A new tensor with undefined contents. For those who write ops; users call `empty`.
   * @param paged in memory that may exceed what the GPU has (see `Backend.allocate`)
   * @throws OutOfMemoryError
   */
  static allocate<D extends DType>(backend: Backend, dtype: D, shape: Shape, paged = false): Tensor<D> {
    const storage = backend.allocate(sizeOf(shape) * DTYPE_BYTES[dtype], paged);
    return new Tensor(backend, dtype, Object.freeze([...shape]), new SharedStorage(backend, storage), 0);
  }

  get device(): DeviceName {
    return this.backend.device;
  }

  /** Bytes of the elements. */
  get byteLength(): number {
    return this.size * DTYPE_BYTES[this.dtype];
  }

  get isDisposed(): boolean {
    return this.shared === undefined;
  }

  /** @throws DisposedError */
  get storage(): Storage {
    return this.alive("tensor").storage;
  }

  /**
   * The gradient of a loss with respect to this tensor, which optimizers read; null where there is none. Same shape and device, dtype f32
   * or this tensor's own; an f32 tensor takes f16 and bf16 too.
   *
   * The tensor only refers to it: disposing one does not dispose the other, and setting null or another gradient disposes nothing
   * (`optimizer.zeroGrad()` does). A view has a gradient of its own.
   * Setting throws ArgumentError (no tensor, or one that shares memory with this one), DisposedError, DTypeError, DeviceError, ShapeError.
   */
  get grad(): Tensor | null {
    return this.gradient;
  }

  set grad(value: Tensor | null) {
    if (value !== null) this.checkGradient(value);
    this.gradient = value;
  }

  /**
   * The elements, as they are after everything launched so far. f16 comes as a Float16Array where the runtime has it, else
   * as a Uint16Array of bit patterns; bf16 as a Uint16Array of bit patterns (`to("f32")` gives numbers).
   * Rejects with NonFiniteError, BackendError or DisposedError.
   */
  async data(): Promise<DataOf<D>> {
    return viewBytes(this.dtype, await this.bytes());
  }

  /** `data()` that blocks the thread: for scripts and tests. */
  dataSync(): DataOf<D> {
    return viewBytes(this.dtype, this.bytesSync());
  }

  /** The elements' bytes, little-endian. */
  async bytes(): Promise<Uint8Array<ArrayBuffer>> {
    return this.backend.read(this.alive("data").storage, this.byteOffset, this.byteLength);
  }

  /** `bytes()` that blocks the thread. */
  bytesSync(): Uint8Array<ArrayBuffer> {
    return this.backend.readSync(this.alive("dataSync").storage, this.byteOffset, this.byteLength);
  }

  /**
   * Overwrites all elements. Numbers (arrays, Float32Array, Float64Array) are rounded to the tensor's dtype, nearest even; a
   * Uint16Array holds bit patterns of an f16 or bf16 tensor. Ordered with the operations launched before and after.
   * @throws ShapeError (wrong length), DTypeError (array cannot fill this dtype), ArgumentError (not an integer of the range)
   */
  copyFrom(data: TensorLike | Tensor): this {
    const { storage } = this.alive("copyFrom");
    const length = data instanceof Tensor ? data.size : data.length;
    if (length !== this.size) {
      throw new ShapeError(
        "copyFrom",
        "data",
        `${this.size} elements for shape ${formatShape(this.shape)}`,
        `${length}`,
      );
    }
    if (data instanceof Tensor) {
      this.copyTensor(data);
      return this;
    }
    const raw = rawBytes(this.dtype, data);
    if (raw) {
      this.backend.write(storage, this.byteOffset, raw);
      return this;
    }
    // Floats into f16 or bf16: rounded by the device's own conversion, so that there is one rounding everywhere.
    const wide = Tensor.allocate(this.backend, "f32", this.shape);
    try {
      this.backend.write(wide.storage, 0, bytesOf(Float32Array.from(data as ArrayLike<number>)));
      wide.convertInto(this);
    } finally {
      wide.dispose();
    }
    return this;
  }

  /**
   * A new tensor of another dtype (or a copy, for the same): nearest even into f16 and bf16; into integers truncated towards
   * zero and saturated, NaN to 0. NaN becomes the dtype's one canonical NaN.
   */
  to<E extends DType>(dtype: E): Tensor<E> {
    this.alive("to");
    if (!isDType(dtype)) throw new DTypeError("to", "dtype", "a dtype", String(dtype));
    const result = Tensor.allocate(this.backend, dtype, this.shape);
    if (dtype === (this.dtype as DType)) result.copyTensor(this);
    else this.convertInto(result);
    return result;
  }

  /** A copy with storage of its own. */
  clone(): Tensor<D> {
    return this.to(this.dtype);
  }

  /** The same elements under another shape: a view, nothing is copied. @throws ShapeError */
  reshape(shape: Shape): Tensor<D> {
    const shared = this.alive("reshape");
    checkShape("reshape", shape);
    if (sizeOf(shape) !== this.size) {
      throw new ShapeError("reshape", "shape", `${this.size} elements`, `${formatShape(shape)} with ${sizeOf(shape)}`);
    }
    return new Tensor(this.backend, this.dtype, Object.freeze([...shape]), shared, this.byteOffset);
  }

  /** Rows [begin, end) of the first dimension: a view, nothing is copied. @throws ShapeError, ArgumentError */
  slice(begin: number, end: number): Tensor<D> {
    const shared = this.alive("slice");
    if (this.shape.length === 0) throw new ShapeError("slice", "tensor", "at least one dimension", "a scalar");
    const rows = this.shape[0]!;
    if (!Number.isInteger(begin) || !Number.isInteger(end) || begin < 0 || end < begin || end > rows) {
      throw new ArgumentError("slice", "begin, end", `0 <= begin <= end <= ${rows}`, `${begin}, ${end}`);
    }
    const shape = Object.freeze([end - begin, ...this.shape.slice(1)]);
    const rowBytes = sizeOf(this.shape.slice(1)) * DTYPE_BYTES[this.dtype];
    return new Tensor(this.backend, this.dtype, shape, shared, this.byteOffset + begin * rowBytes);
  }

  /** Whether the two have a byte of memory in common. */
  overlaps(other: Tensor): boolean {
    return (
      this.storage === other.storage &&
      this.byteOffset < other.byteOffset + other.byteLength &&
      other.byteOffset < this.byteOffset + this.byteLength
    );
  }

  /** Gives the memory back (with the last view), ordered with the stream. Calling it twice is allowed. */
  dispose(): void {
    const shared = this.shared;
    if (!shared) return;
    this.shared = undefined;
    collected.unregister(this);
    shared.drop();
  }

  [Symbol.dispose](): void {
    this.dispose();
  }

  /** For `tidy`: what it holds. */
  tensors(): Tensor[] {
    return [this];
  }

  toString(): string {
    return `Tensor(${this.dtype} ${formatShape(this.shape)} on ${this.device}${this.isDisposed ? ", disposed" : ""})`;
  }

  private checkGradient(value: Tensor): void {
    this.alive("grad");
    if (!(value instanceof Tensor)) throw new ArgumentError("grad", "value", "a Tensor or null", typeof value);
    if (value.isDisposed) throw new DisposedError(`${value}`, "grad");
    if (!isFloat(this.dtype)) throw new DTypeError("grad", "tensor", FLOAT_DTYPES.join(" or "), this.dtype);
    const expected: readonly DType[] = gradientDTypes(this.dtype);
    if (!expected.includes(value.dtype)) throw new DTypeError("grad", "value", expected.join(" or "), value.dtype);
    if (value.backend !== this.backend) {
      throw new DeviceError("grad", "value", `a tensor on ${this.device} like its parameter`, `one on ${value.device}`);
    }
    if (!sameShape(value.shape, this.shape)) {
      throw new ShapeError("grad", "value", formatShape(this.shape), formatShape(value.shape));
    }
    if (value.overlaps(this)) {
      throw new ArgumentError("grad", "value", "memory apart from the parameter", "a tensor that shares bytes with it");
    }
  }

  private alive(op: string): SharedStorage {
    if (!this.shared) throw new DisposedError(this.toString(), op);
    return this.shared;
  }

  private copyTensor(source: Tensor): void {
    if (source.backend !== this.backend) {
      // Rounded where it lies, so that only this dtype's bytes cross.
      const same = source.to(this.dtype);
      try {
        this.backend.write(this.storage, this.byteOffset, same.bytesSync());
      } finally {
        same.dispose();
      }
    } else if (source.dtype !== this.dtype) {
      source.convertInto(this);
    } else if (source.storage !== this.storage || source.byteOffset !== this.byteOffset) {
      // Parts of one tensor that overlap: a copy kernel may not see that.
      const apart = source.overlaps(this) ? source.clone() : source;
      this.backend.launch("copy", { src: apart, dst: this, bytes: this.byteLength });
      if (apart !== source) apart.dispose();
    }
  }

  private convertInto(target: Tensor): void {
    const from = DTYPE_ID[this.dtype];
    this.backend.launch("convert", { x: this, y: target, n: this.size, from, to: DTYPE_ID[target.dtype] });
  }
}

/** @throws ShapeError unless every dimension is a non-negative integer and the size is one that can be counted */
export function checkShape(op: string, shape: Shape): void {
  if (!Array.isArray(shape) || !shape.every((d) => Number.isInteger(d) && d >= 0)) {
    throw new ShapeError(
      op,
      "shape",
      "non-negative integers",
      Array.isArray(shape) ? formatShape(shape) : typeof shape,
    );
  }
  if (!Number.isSafeInteger(sizeOf(shape))) throw new ShapeError(op, "shape", "a countable size", formatShape(shape));
}

/** The bytes that fill a tensor of `dtype` as they are, or undefined when floats have to be rounded first. */
function rawBytes(dtype: DType, data: TensorLike): Uint8Array | undefined {
  if (data instanceof Uint16Array) {
    if (dtype === "f16" || dtype === "bf16") return bytesOf(data);
  } else if (isFloat16Array(data)) {
    if (dtype === "f16") return bytesOf(data);
    if (dtype === "f32") return bytesOf(Float32Array.from(data));
    if (dtype === "bf16") return undefined;
  } else if (Array.isArray(data) || data instanceof Float32Array || data instanceof Float64Array) {
    if (dtype === "f32") return bytesOf(data instanceof Float32Array ? data : Float32Array.from(data));
    if (isFloat(dtype)) return undefined;
    if (Array.isArray(data)) return bytesOf(integers(dtype, data));
  } else if (naturalDType(data) === dtype) {
    return bytesOf(data as unknown as ArrayBufferView);
  }
  throw new DTypeError("copyFrom", "data", `an array that fills ${dtype}`, describeArray(data));
}

function integers(dtype: DType, values: readonly number[]): ArrayBufferView {
  const array =
    dtype === "i8" ? Int8Array.from(values) : dtype === "u8" ? Uint8Array.from(values) : Int32Array.from(values);
  const bad = values.findIndex((v, i) => v !== array[i]);
  if (bad >= 0) throw new ArgumentError("copyFrom", `data[${bad}]`, `an integer that ${dtype} holds`, `${values[bad]}`);
  return array;
}
