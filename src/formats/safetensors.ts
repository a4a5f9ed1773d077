/**
 * Reader of safetensors files: 8 bytes of header length (u64, little endian), the header (JSON, UTF-8), then the data
 * of all tensors without gaps. Only the header is read when a file is opened.
 */
import { constants } from "node:buffer";
import { type FileHandle, open, stat } from "node:fs/promises";
import { ArgumentError, DisposedError, FormatError, HalfbyteError } from "../core/errors.js";
import { formatShape } from "../core/shape.js";
import { JsonReader } from "../quant/json-reader.js";
import {
  isSafetensorsDType,
  SAFETENSORS_BITS,
  type SafetensorsDType,
  type SourceTensor,
  safetensorsBytes,
} from "./source.js";

const FORMAT = "safetensors";
/** Bytes of the length field that every file starts with. */
export const PREFIX_BYTES = 8;
/** The header key that holds metadata instead of a tensor. */
export const METADATA_KEY = "__metadata__";
/** Largest header that the format allows. */
export const MAX_HEADER_BYTES = 100_000_000;
// One read(2) moves at most 2 GiB; smaller steps also let other work in between.
const MAX_READ_BYTES = 1 << 28;

/** A tensor of a file: its kind and where its data lie, in bytes from the start of the data section. */
export interface TensorEntry extends SourceTensor {
  readonly begin: number;
  readonly end: number;
}

/** What a header says. Tensors stand in the order of their data. */
export interface SafetensorsHeader {
  readonly metadata: ReadonlyMap<string, string>;
  readonly tensors: ReadonlyMap<string, TensorEntry>;
}

/**
 * Parses and checks a header: known dtypes, shapes and offsets in range, dtype x shape = bytes, and data that cover
 * `dataBytes` exactly, without overlap or gap.
 * @param bytes the JSON, without the length field
 * @param dataBytes bytes that follow the header in the file
 * @param path names the file in messages
 * @throws FormatError
 */
export function parseSafetensorsHeader(bytes: Uint8Array, dataBytes: number, path: string): SafetensorsHeader {
  if (bytes[0] !== 0x7b) throw new FormatError(FORMAT, path, 'the header does not start with "{"');
  const reader = JsonReader.of(bytes, FORMAT, path);
  const names = new Set<string>();
  const entries: TensorEntry[] = [];
  let metadata: ReadonlyMap<string, string> = new Map();
  reader.object((name) => {
    if (names.has(name)) reader.duplicate(name);
    names.add(name);
    if (name === METADATA_KEY) metadata = readMetadata(reader, path);
    else entries.push(readEntry(reader, name, dataBytes, path));
  });
  reader.end();
  entries.sort((a, b) => a.begin - b.begin || a.end - b.end);
  let covered = 0;
  for (const { name, begin, end } of entries) {
    if (begin !== covered) {
      const what = begin < covered ? "overlaps the tensor before it" : "leaves a gap before it";
      throw new FormatError(
        FORMAT,
        path,
        `tensor ${quote(name)} ${what}: data up to ${covered}, then [${begin}, ${end})`,
      );
    }
    covered = end;
  }
  if (covered !== dataBytes) {
    const cause = covered > dataBytes ? "is cut off" : "has data that no tensor claims";
    throw new FormatError(FORMAT, path, `the file ${cause}: tensors cover ${covered} bytes, ${dataBytes} are there`);
  }
  return { metadata, tensors: new Map(entries.map((entry) => [entry.name, entry])) };
}

function quote(name: string): string {
  return JSON.stringify(name.length > 200 ? `${name.slice(0, 200)}...` : name);
}

function readMetadata(reader: JsonReader, path: string): ReadonlyMap<string, string> {
  const metadata = new Map<string, string>();
  if (reader.kind() === "word" && reader.word() === null) return metadata;
  if (reader.kind() !== "object") throw new FormatError(FORMAT, path, `${METADATA_KEY} is not an object`);
  reader.object((key) => {
    if (metadata.has(key)) reader.duplicate(key);
    if (reader.kind() !== "string") {
      throw new FormatError(FORMAT, path, `${METADATA_KEY}: the value of ${quote(key)} is not a string`);
    }
    metadata.set(key, reader.string());
  });
  return metadata;
}

/** Keys besides the three are ignored, as every other reader does. */
function readEntry(reader: JsonReader, name: string, dataBytes: number, path: string): TensorEntry {
  const fail = (problem: string): never => {
    throw new FormatError(FORMAT, path, `tensor ${quote(name)}: ${problem}`);
  };
  if (reader.kind() !== "object") return fail("is not described by an object");
  let dtype: string | undefined;
  let shape: number[] | undefined;
  let offsets: number[] | undefined;
  const seen = new Set<string>();
  reader.object((key) => {
    if (seen.has(key)) reader.duplicate(key);
    if (key === "dtype") dtype = reader.kind() === "string" ? reader.string() : fail("its dtype is not a string");
    else if (key === "shape")
      shape = readCounts(reader) ?? fail("shape is not a list of non-negative integers below 2^53");
    else if (key === "data_offsets") offsets = readCounts(reader);
    else return reader.skip();
    seen.add(key);
  });
  if (!isSafetensorsDType(dtype)) return fail(`unknown dtype ${dtype === undefined ? "(none given)" : quote(dtype)}`);
  if (!shape) return fail("has no shape");
  if (offsets?.length !== 2) return fail("data_offsets is not a pair of non-negative integers");
  const [begin, end] = offsets as [number, number];
  if (begin > end) return fail(`data_offsets [${begin}, ${end}] run backwards`);
  if (end > dataBytes)
    return fail(`data_offsets [${begin}, ${end}] end behind the data, which have ${dataBytes} bytes`);
  const bytes = bytesOfShape(dtype, shape);
  if (bytes !== end - begin) {
    const needs = bytes === undefined ? "more bytes than can be counted" : `${bytes} bytes`;
    return fail(`${dtype} of shape ${formatShape(shape)} takes ${needs}, data_offsets give it ${end - begin}`);
  }
  return { name, dtype, shape: Object.freeze(shape), begin, end };
}

/** Longest shape that is read: what no tensor library reaches. */
const MAX_DIMENSIONS = 64;

function readCounts(reader: JsonReader): number[] | undefined {
  if (reader.kind() !== "list") {
    reader.skip();
    return undefined;
  }
  const counts: number[] = [];
  let valid = true;
  reader.list(() => {
    const count = reader.count();
    if (count === undefined || counts.length === MAX_DIMENSIONS) valid = false;
    else counts.push(count);
  });
  return valid ? counts : undefined;
}

/**
 * Bytes of a tensor, or undefined when a product along the way leaves the safe integers. A fraction where a sub-byte
 * dtype does not end on a byte (the format has no such tensors).
 */
export function bytesOfShape(dtype: SafetensorsDType, shape: readonly number[]): number | undefined {
  let elements = 1;
  for (const d of shape) {
    elements *= d;
    if (!Number.isSafeInteger(elements)) return undefined;
  }
  return Number.isSafeInteger(elements * SAFETENSORS_BITS[dtype]) ? safetensorsBytes(dtype, elements) : undefined;
}

/** An open safetensors file. */
export class SafetensorsFile {
  private closed = false;

  private constructor(
    readonly path: string,
    private readonly handle: FileHandle,
    /** The `__metadata__` of the header. */
    readonly metadata: ReadonlyMap<string, string>,
    /** Every tensor by name, in the order of the data. */
    readonly tensors: ReadonlyMap<string, TensorEntry>,
    private readonly dataStart: number,
    /** Size and modification time when it was opened: what tells a changed file from an unchanged one. */
    readonly fingerprint: string,
  ) {}

  /**
   * Opens a file and reads its header.
   * @throws FormatError when it cannot be opened, is no regular file, is cut off, or its header is not valid
   */
  static async open(path: string): Promise<SafetensorsFile> {
    // Looked at before it is opened: opening a pipe would wait for its other end.
    const before = await stat(path).catch((cause: unknown) => cannotOpen(path, cause));
    if (!before.isFile()) throw new FormatError(FORMAT, path, "is not a regular file");
    const handle = await open(path, "r").catch((cause: unknown) => cannotOpen(path, cause));
    try {
      const { size, fingerprint } = await statOf(handle);
      if (size < PREFIX_BYTES) {
        throw new FormatError(FORMAT, path, `is too short to be a safetensors file: ${size} bytes`);
      }
      const prefix = new Uint8Array(PREFIX_BYTES);
      await readFully(handle, prefix, 0, path);
      const declared = new DataView(prefix.buffer).getBigUint64(0, true);
      if (declared > MAX_HEADER_BYTES) {
        const problem = `the header claims ${declared} bytes of ${MAX_HEADER_BYTES} allowed: not a safetensors file?`;
        throw new FormatError(FORMAT, path, problem);
      }
      const headerBytes = Number(declared);
      const dataBytes = size - PREFIX_BYTES - headerBytes;
      if (dataBytes < 0) {
        throw new FormatError(FORMAT, path, `is cut off: a header of ${headerBytes} bytes in a file of ${size} bytes`);
      }
      const json = new Uint8Array(headerBytes);
      await readFully(handle, json, PREFIX_BYTES, path);
      const { metadata, tensors } = parseSafetensorsHeader(json, dataBytes, path);
      return new SafetensorsFile(path, handle, metadata, tensors, PREFIX_BYTES + headerBytes, fingerprint);
    } catch (error) {
      await handle.close();
      throw error;
    }
  }

  /** The entry of a tensor. Throws ArgumentError for a name that the file does not have. */
  entry(name: string): TensorEntry {
    const entry = this.tensors.get(name);
    if (!entry) throw new ArgumentError("SafetensorsFile", "name", `a tensor of ${this.path}`, quote(name));
    return entry;
  }

  /**
   * All bytes of a tensor, little endian, in a fresh buffer.
   * @throws ArgumentError, DisposedError, FormatError as `readRange`; FormatError when one buffer cannot hold the
   * tensor
   */
  async read(name: string): Promise<Uint8Array<ArrayBuffer>> {
    const { begin, end } = this.entry(name);
    const dst = allocate(end - begin, this.path, name);
    await this.readRange(name, 0, dst);
    return dst;
  }

  /**
   * Fills `dst` with the bytes of a tensor from `byteOffset` on. Reads may overlap each other.
   * @throws ArgumentError for an unknown name or a range that leaves the tensor, DisposedError after close, FormatError
   * when the file was changed or cut off since it was opened
   */
  async readRange(name: string, byteOffset: number, dst: Uint8Array): Promise<void> {
    const { begin, end } = this.entry(name);
    if (this.closed) throw new DisposedError(this.path, "SafetensorsFile.readRange");
    if (!Number.isSafeInteger(byteOffset) || byteOffset < 0 || byteOffset + dst.length > end - begin) {
      throw new ArgumentError(
        "SafetensorsFile.readRange",
        "byteOffset",
        `a range inside the ${end - begin} bytes of ${quote(name)}`,
        `[${byteOffset}, ${byteOffset + dst.length})`,
      );
    }
    if (dst.length === 0) return;
    try {
      await readFully(this.handle, dst, this.dataStart + begin + byteOffset, this.path);
      // Afterwards: a change before or during the read shows either way.
      const { fingerprint } = await statOf(this.handle);
      if (fingerprint !== this.fingerprint) {
        throw new FormatError(FORMAT, this.path, "was changed by someone else while it was open");
      }
    } catch (cause) {
      if (cause instanceof HalfbyteError) throw cause;
      if (this.closed) throw new DisposedError(this.path, "SafetensorsFile.readRange");
      throw new FormatError(FORMAT, this.path, `cannot be read: ${errorMessage(cause)}`, { cause });
    }
  }

  /** Closes the file; a read under way rejects or completes. Calling it again does nothing. */
  async close(): Promise<void> {
    if (this.closed) return;
    this.closed = true;
    await this.handle.close();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.close();
  }
}

/** A zeroed buffer for a tensor. Throws FormatError when it is larger than one buffer can be. */
export function allocate(bytes: number, path: string, name: string): Uint8Array<ArrayBuffer> {
  if (bytes <= constants.MAX_LENGTH) {
    try {
      return new Uint8Array(bytes);
    } catch (cause) {
      if (!(cause instanceof RangeError)) throw cause;
    }
  }
  const problem = `tensor ${quote(name)} has ${bytes} bytes, more than one buffer can hold here: read it in parts`;
  throw new FormatError(FORMAT, path, problem);
}

function cannotOpen(path: string, cause: unknown): never {
  throw new FormatError(FORMAT, path, `cannot be opened: ${errorMessage(cause)}`, { cause });
}

/** The text of whatever was thrown. */
export function errorMessage(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

async function statOf(handle: FileHandle): Promise<{ size: number; fingerprint: string }> {
  const { size, mtimeNs } = await handle.stat({ bigint: true });
  return { size: Number(size), fingerprint: `${size}:${mtimeNs}` };
}

/** Fills `dst` from `position` on, however many reads that takes. Throws FormatError when the file ends before. */
async function readFully(handle: FileHandle, dst: Uint8Array, position: number, path: string): Promise<void> {
  for (let done = 0; done < dst.length; ) {
    const length = Math.min(dst.length - done, MAX_READ_BYTES);
    const { bytesRead } = await handle.read(dst, done, length, position + done);
    if (bytesRead === 0) {
      throw new FormatError(FORMAT, path, `was cut off while it was open: it ends at byte ${position + done}`);
    }
    done += bytesRead;
  }
}
