/**
 * A bounds-checked reader over the first bytes of a file, of which only a prefix is in memory. A read that runs past the
 * file's end is a FormatError; one that runs past the prefix throws MORE, and the caller loads more and repeats the item.
 */
import { FormatError } from "../core/errors.js";
import { GGUF_VALUE, type GgufArray, type GgufValue } from "./gguf-types.js";

/** Thrown when the bytes asked for are in the file but not yet in memory. */
export const MORE = Symbol("more bytes are needed");

/** Arrays of arrays may nest this deep; no known file has any. */
const MAX_DEPTH = 8;

type NumberArray = Exclude<GgufArray, readonly GgufValue[]>;

/** How the plain number types are read, one by one and into which array. */
interface NumberType {
  readonly bytes: number;
  readonly read: (view: DataView, at: number) => number;
  readonly array: new (length: number) => NumberArray;
}

const NUMBER_TYPES: Readonly<Record<number, NumberType>> = {
  [GGUF_VALUE.uint8]: { bytes: 1, read: (view, at) => view.getUint8(at), array: Uint8Array },
  [GGUF_VALUE.int8]: { bytes: 1, read: (view, at) => view.getInt8(at), array: Int8Array },
  [GGUF_VALUE.uint16]: { bytes: 2, read: (view, at) => view.getUint16(at, true), array: Uint16Array },
  [GGUF_VALUE.int16]: { bytes: 2, read: (view, at) => view.getInt16(at, true), array: Int16Array },
  [GGUF_VALUE.uint32]: { bytes: 4, read: (view, at) => view.getUint32(at, true), array: Uint32Array },
  [GGUF_VALUE.int32]: { bytes: 4, read: (view, at) => view.getInt32(at, true), array: Int32Array },
  [GGUF_VALUE.float32]: { bytes: 4, read: (view, at) => view.getFloat32(at, true), array: Float32Array },
  [GGUF_VALUE.float64]: { bytes: 8, read: (view, at) => view.getFloat64(at, true), array: Float64Array },
};

/** The least bytes that a value of the other types takes. */
const LEAST_BYTES: Readonly<Record<number, number>> = {
  [GGUF_VALUE.bool]: 1,
  [GGUF_VALUE.string]: 8,
  [GGUF_VALUE.array]: 12,
  [GGUF_VALUE.uint64]: 8,
  [GGUF_VALUE.int64]: 8,
};

// ignoreBOM: a token may begin with U+FEFF, which a decoder would otherwise swallow.
const strictUtf8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });

export class GgufCursor {
  position = 0;
  private bytes: Buffer = Buffer.alloc(0);
  private view: DataView = new DataView(new ArrayBuffer(0));

  constructor(
    readonly path: string,
    private readonly fileBytes: number,
    private readonly maxBytes: number,
  ) {}

  /** Bytes that the header may span: the file's size, or the limit on headers where that is smaller. */
  get limit(): number {
    return Math.min(this.fileBytes, this.maxBytes);
  }

  /** Replaces the prefix in memory by a longer one. */
  load(bytes: Buffer): void {
    this.bytes = bytes;
    this.view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  }

  /** Copies the prefix in memory to the beginning of `target`. */
  copyTo(target: Buffer): void {
    this.bytes.copy(target);
  }

  get loaded(): number {
    return this.bytes.byteLength;
  }

  u32(what: string): number {
    return this.view.getUint32(this.take(4, what), true);
  }

  /** A 64-bit length, count or offset. Throws FormatError above 2^53 - 1: no file is that large. */
  size(what: string): number {
    const value = this.view.getBigUint64(this.take(8, what), true);
    if (value > Number.MAX_SAFE_INTEGER) throw this.error(`${what} is ${value}, more than any file holds`);
    return Number(value);
  }

  /** A count of things that take at least `leastBytes` bytes each, checked against what is left of the file. */
  count(what: string, leastBytes: number): number {
    const count = this.size(what);
    const left = this.limit - this.position;
    if (count * leastBytes > left) throw this.error(`${what} is ${count}, but ${this.rest()}`);
    return count;
  }

  string(what: string): string {
    const length = this.size(`length of ${what}`);
    const start = this.take(length, what);
    const end = start + length;
    const text = this.bytes.toString("utf8", start, end);
    if (!text.includes("\ufffd")) return text;
    // Either the text has a real U+FFFD or bytes were replaced: only the slow decoder tells them apart.
    try {
      return strictUtf8.decode(this.bytes.subarray(start, end));
    } catch (cause) {
      throw this.error(`${what} is not valid UTF-8`, { cause });
    }
  }

  /** A metadata value of the type with number `type`. */
  value(type: number, what: string, depth = 0): GgufValue {
    const number = NUMBER_TYPES[type];
    if (number) return number.read(this.view, this.take(number.bytes, what));
    switch (type) {
      case GGUF_VALUE.string:
        return this.string(what);
      case GGUF_VALUE.array:
        return this.array(what, depth + 1);
      case GGUF_VALUE.uint64:
        return safe(this.view.getBigUint64(this.take(8, what), true));
      case GGUF_VALUE.int64:
        return safe(this.view.getBigInt64(this.take(8, what), true));
      case GGUF_VALUE.bool: {
        const value = this.view.getUint8(this.take(1, what));
        if (value > 1) throw this.error(`${what} is a bool of value ${value}, expected 0 or 1`);
        return value === 1;
      }
      default:
        throw this.error(`${what} has unknown type ${type}`);
    }
  }

  private array(what: string, depth: number): GgufArray {
    if (depth > MAX_DEPTH) throw this.error(`${what} nests arrays deeper than ${MAX_DEPTH}`);
    const type = this.u32(`element type of ${what}`);
    const number = NUMBER_TYPES[type];
    const least = number?.bytes ?? LEAST_BYTES[type];
    if (least === undefined) throw this.error(`${what} is an array of unknown type ${type}`);
    const count = this.count(`length of ${what}`, least);
    if (number) {
      const start = this.take(count * number.bytes, what);
      const values = new number.array(count);
      for (let i = 0; i < count; i++) values[i] = number.read(this.view, start + i * number.bytes);
      return values;
    }
    const values: GgufValue[] = [];
    for (let i = 0; i < count; i++) values.push(this.value(type, what, depth));
    return values;
  }

  /** Moves past `bytes` bytes and returns where they begin. */
  private take(bytes: number, what: string): number {
    const start = this.position;
    if (bytes > this.limit - start) {
      throw this.error(`${what} takes ${bytes} bytes, but ${this.rest()}`);
    }
    if (start + bytes > this.bytes.byteLength) throw MORE;
    this.position = start + bytes;
    return start;
  }

  private rest(): string {
    const left = `${this.limit - this.position} bytes`;
    if (this.maxBytes < this.fileBytes) return `${left} are left of the ${this.maxBytes} that a header may span`;
    return `${left} are left of the file`;
  }

  error(problem: string, options?: ErrorOptions): FormatError {
    return new FormatError("gguf", this.path, `${problem} (at byte ${this.position})`, options);
  }
}

function safe(value: bigint): number | bigint {
  const number = Number(value);
  return Number.isSafeInteger(number) ? number : value;
}
