/**
 * GGUF files, versions 2 and 3, little-endian: metadata, tensor table, and reads of tensor bytes.
 * Format: the GGUF specification (ggml, docs/gguf.md). Nothing is allocated that the file could not fill.
 */
import { type FileHandle, open } from "node:fs/promises";
import { ArgumentError, DisposedError, FormatError, UnsupportedError } from "../core/errors.js";
import { formatShape, type Shape, sizeOf } from "../core/shape.js";
import { GgufCursor, MORE } from "./gguf-cursor.js";
import { GGML_TYPES, type GgmlType, type GgufValue, ggmlTypeFromId } from "./gguf-types.js";

export { GGML_TYPES, type GgmlType, type GgufArray, type GgufValue } from "./gguf-types.js";

/** A header (metadata and tensor table) of more bytes is refused; the largest vocabularies take about 20 MiB. */
export const MAX_GGUF_HEADER_BYTES = 256 * 1024 * 1024;

const MAGIC = 0x46554747; // "GGUF"
const DEFAULT_ALIGNMENT = 32;
const MAX_DIMS = 4;
const FIRST_CHUNK = 1024 * 1024;
/** One read(2) takes less than 2 GiB. */
const READ_CHUNK = 1024 * 1024 * 1024;
/** The least that a key and its value, and an entry of the tensor table, take. */
const LEAST_ENTRY_BYTES = 8 + 4 + 1;
const LEAST_TENSOR_BYTES = 8 + 4 + 4 + 8;

/** A tensor in the file. */
export interface GgufTensor {
  /** ggml's name, as `blk.0.attn_q.weight`. */
  readonly name: string;
  readonly type: GgmlType;
  /** Row-major: the reverse of the order in the file. */
  readonly shape: Shape;
  /** Where its bytes begin in the file. */
  readonly offset: number;
  readonly bytes: number;
}

/** What a GGUF file says before its tensor data. */
export interface GgufHeader {
  readonly path: string;
  readonly version: number;
  readonly metadata: ReadonlyMap<string, GgufValue>;
  /** By ggml's names, in the file's order. */
  readonly tensors: ReadonlyMap<string, GgufTensor>;
  readonly alignment: number;
  /** Where the tensor data begins. */
  readonly dataOffset: number;
  /** Bytes of the whole file. */
  readonly fileBytes: number;
}

/** An open GGUF file. */
export interface GgufFile extends GgufHeader {
  /**
   * `bytes` bytes of a tensor from byte `offset` of its data on, in a fresh buffer.
   * Throws ArgumentError for a range outside the tensor, FormatError when the file was cut off since it was opened,
   * DisposedError after `close()`.
   */
  read(tensor: GgufTensor, offset: number, bytes: number): Promise<Uint8Array<ArrayBuffer>>;
  /** Closes the file; calling it again does nothing. */
  close(): Promise<void>;
}

/**
 * Opens a GGUF file and reads its header.
 *
 * Throws FormatError when the file cannot be opened, is no GGUF file, is of version 1 or big-endian, is cut off, or
 * contradicts itself; UnsupportedError for one part of a model that was split over several files.
 */
export async function openGguf(path: string): Promise<GgufFile> {
  let handle: FileHandle;
  try {
    handle = await open(path, "r");
  } catch (cause) {
    throw new FormatError("gguf", path, `cannot be opened: ${reason(cause)}`, { cause });
  }
  try {
    const header = await readGgufHeader(handle, path);
    return openFile(handle, header);
  } catch (error) {
    await handle.close();
    throw error;
  }
}

function openFile(handle: FileHandle, header: GgufHeader): GgufFile {
  let closed: Promise<void> | undefined;
  return {
    ...header,
    async read(tensor, offset, bytes) {
      if (closed) throw new DisposedError(header.path, "read");
      if (!(offset >= 0 && bytes >= 0 && offset + bytes <= tensor.bytes)) {
        const wanted = `[${offset}, ${offset + bytes})`;
        throw new ArgumentError("read", tensor.name, `a range inside its ${tensor.bytes} bytes`, wanted);
      }
      const out = new Uint8Array(bytes);
      await readFully(handle, header.path, out, tensor.offset + offset);
      return out;
    },
    close() {
      closed ??= handle.close();
      return closed;
    },
  };
}

/** Reads and checks the header through an open handle, which stays open. Throws what `openGguf` throws. */
export async function readGgufHeader(handle: FileHandle, path: string): Promise<GgufHeader> {
  const stat = await handle.stat();
  if (!stat.isFile()) throw new FormatError("gguf", path, "is not a file");
  const fileBytes = stat.size;
  const cursor = new GgufCursor(path, fileBytes, MAX_GGUF_HEADER_BYTES);
  const item = itemReader(handle, cursor);

  const { version, tensorCount, entryCount } = await item(() => readPreamble(cursor));
  const metadata = new Map<string, GgufValue>();
  for (let i = 0; i < entryCount; i++) {
    const [key, value] = await item(() => readEntry(cursor));
    if (metadata.has(key)) throw cursor.error(`duplicate metadata key '${key}'`);
    metadata.set(key, value);
  }
  refuseSplit(metadata, path);
  const infos: TensorInfo[] = [];
  for (let i = 0; i < tensorCount; i++) infos.push(await item(() => readTensorInfo(cursor)));

  const alignment = readAlignment(metadata, path);
  const dataOffset = Math.ceil(cursor.position / alignment) * alignment;
  const tensors = new Map<string, GgufTensor>();
  for (const info of infos) {
    if (tensors.has(info.name)) throw new FormatError("gguf", path, `duplicate tensor '${info.name}'`);
    tensors.set(info.name, placeTensor(info, path, alignment, dataOffset, fileBytes));
  }
  refuseOverlap(tensors, path);
  return { path, version, metadata, tensors, alignment, dataOffset, fileBytes };
}

/** Runs a parser of one item, loading more of the file and repeating it as often as it runs out of bytes. */
function itemReader(handle: FileHandle, cursor: GgufCursor): <T>(parse: () => T) => Promise<T> {
  return async (parse) => {
    for (;;) {
      const start = cursor.position;
      try {
        return parse();
      } catch (error) {
        if (error !== MORE) throw error;
        cursor.position = start;
        await loadMore(handle, cursor);
      }
    }
  };
}

async function loadMore(handle: FileHandle, cursor: GgufCursor): Promise<void> {
  const have = cursor.loaded;
  const bytes = Buffer.allocUnsafe(Math.min(Math.max(FIRST_CHUNK, 4 * have), cursor.limit));
  cursor.copyTo(bytes);
  await readFully(handle, cursor.path, bytes.subarray(have), have);
  cursor.load(bytes);
}

async function readFully(handle: FileHandle, path: string, out: Uint8Array, position: number): Promise<void> {
  let done = 0;
  while (done < out.byteLength) {
    const length = Math.min(out.byteLength - done, READ_CHUNK);
    let bytesRead: number;
    try {
      ({ bytesRead } = await handle.read(out, done, length, position + done));
    } catch (cause) {
      throw new FormatError("gguf", path, `cannot be read at byte ${position + done}: ${reason(cause)}`, { cause });
    }
    if (bytesRead === 0) throw new FormatError("gguf", path, `cut off at byte ${position + done} while it was read`);
    done += bytesRead;
  }
}

function readPreamble(cursor: GgufCursor): { version: number; tensorCount: number; entryCount: number } {
  if (cursor.u32("magic") !== MAGIC) throw cursor.error("is not a GGUF file: it does not begin with 'GGUF'");
  const version = cursor.u32("version");
  if (version === 1)
    throw cursor.error("GGUF version 1 cannot be read (versions 2 and 3 can): convert the model again");
  if (version !== 0 && version % 0x10000 === 0) {
    throw cursor.error("is a big-endian GGUF file; only little-endian ones can be read");
  }
  if (version !== 2 && version !== 3) throw cursor.error(`unknown GGUF version ${version}, expected 2 or 3`);
  const tensorCount = cursor.count("tensor count", LEAST_TENSOR_BYTES);
  const entryCount = cursor.count("metadata count", LEAST_ENTRY_BYTES);
  return { version, tensorCount, entryCount };
}

function readEntry(cursor: GgufCursor): [string, GgufValue] {
  const key = cursor.string("metadata key");
  const type = cursor.u32(`type of '${key}'`);
  return [key, cursor.value(type, `'${key}'`)];
}

interface TensorInfo {
  name: string;
  shape: number[];
  typeId: number;
  offset: number;
}

function readTensorInfo(cursor: GgufCursor): TensorInfo {
  const name = cursor.string("tensor name");
  const dims = cursor.u32(`dimensions of '${name}'`);
  if (dims > MAX_DIMS) throw cursor.error(`'${name}' has ${dims} dimensions, expected at most ${MAX_DIMS}`);
  const shape: number[] = [];
  for (let i = 0; i < dims; i++) shape.unshift(cursor.size(`dimension of '${name}'`));
  const typeId = cursor.u32(`type of '${name}'`);
  const offset = cursor.size(`offset of '${name}'`);
  return { name, shape, typeId, offset };
}

function readAlignment(metadata: ReadonlyMap<string, GgufValue>, path: string): number {
  const value = metadata.get("general.alignment") ?? DEFAULT_ALIGNMENT;
  const valid = typeof value === "number" && Number.isInteger(value) && value > 0 && Number.isInteger(Math.log2(value));
  if (!valid) throw new FormatError("gguf", path, `general.alignment is ${value}, expected a power of two`);
  return value;
}

/** Checks one entry of the tensor table: type, whole blocks, alignment, and that its bytes are inside the file. */
function placeTensor(
  { name, shape, typeId, offset }: TensorInfo,
  path: string,
  alignment: number,
  dataOffset: number,
  fileBytes: number,
): GgufTensor {
  const fail = (problem: string): FormatError => new FormatError("gguf", path, `tensor '${name}' ${problem}`);
  const type = ggmlTypeFromId(typeId);
  if (!type) throw fail(`has unknown type ${typeId}`);
  const { blockElements, blockBytes } = GGML_TYPES[type];
  const elements = sizeOf(shape);
  const rowElements = shape.at(-1) ?? 1;
  if (!Number.isSafeInteger(elements)) throw fail(`has shape ${formatShape(shape)}, more than any file holds`);
  if (rowElements % blockElements !== 0) {
    throw fail(`has rows of ${rowElements} elements, not a multiple of ${type}'s block of ${blockElements}`);
  }
  const bytes = (elements / blockElements) * blockBytes;
  const start = dataOffset + offset;
  if (offset % alignment !== 0) throw fail(`has offset ${offset}, not a multiple of the alignment ${alignment}`);
  if (start + bytes > fileBytes) {
    throw fail(`ends at byte ${start + bytes}, but the file has ${fileBytes}: it is cut off or was changed`);
  }
  return { name, type, shape, offset: start, bytes };
}

function refuseOverlap(tensors: ReadonlyMap<string, GgufTensor>, path: string): void {
  const placed = [...tensors.values()].filter((t) => t.bytes > 0).sort((a, b) => a.offset - b.offset);
  for (let i = 1; i < placed.length; i++) {
    const [before, after] = [placed[i - 1]!, placed[i]!];
    if (before.offset + before.bytes > after.offset) {
      throw new FormatError("gguf", path, `tensors '${before.name}' and '${after.name}' overlap`);
    }
  }
}

function refuseSplit(metadata: ReadonlyMap<string, GgufValue>, path: string): void {
  const parts = metadata.get("split.count");
  if (typeof parts === "number" && parts > 1) {
    throw new UnsupportedError(
      `${path}, one of ${parts} parts of a split GGUF model,`,
      "join the parts into one file first (llama-gguf-split --merge)",
    );
  }
}

function reason(cause: unknown): string {
  return cause instanceof Error ? cause.message : String(cause);
}
