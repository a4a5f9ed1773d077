/**
 * Writer of a safetensors file. Tensors are declared first, so that the header is known; their data then stream in, in
 * any order of tensors and in chunks of any size, and go straight to their place in a temporary file beside the target.
 */
import { randomBytes } from "node:crypto";
import { type FileHandle, open, rename, rm } from "node:fs/promises";
import { basename, dirname, join } from "node:path";
import { ArgumentError, DisposedError } from "../core/errors.js";
import { formatShape } from "../core/shape.js";
import { compareCodePoints } from "../quant/pyjson.js";
import { bytesOfShape, MAX_HEADER_BYTES, METADATA_KEY, PREFIX_BYTES } from "./safetensors.js";
import { isSafetensorsDType, SAFETENSORS_BITS, SAFETENSORS_DTYPES, type SafetensorsDType } from "./source.js";

const OP = "SafetensorsWriter";
/** The header's length and so the data's start are multiples of this. */
const HEADER_ALIGNMENT = 8;
// One write(2) moves at most 2 GiB.
const MAX_WRITE_BYTES = 1 << 28;

/** A tensor that will be written. */
export interface TensorDeclaration {
  readonly name: string;
  readonly dtype: SafetensorsDType;
  /**
   * Its shape; or `{ atMost }` for a short 1-d tensor of a byte-sized dtype whose length is known only when it is
   * written (a quant state holds a mean that exists after the last block): up to `atMost` elements, in one `write`.
   */
  readonly shape: readonly number[] | { readonly atMost: number };
}

/** What `metadata` is when none is given: transformers insists on it. */
export const DEFAULT_METADATA: Readonly<Record<string, string>> = { format: "pt" };

/** A declared tensor with its progress. */
interface Slot {
  readonly declaration: TensorDeclaration;
  /** Bytes it will have; the most it may have while `deferred`. */
  readonly bytes: number;
  readonly deferred: boolean;
  /** From the start of the data section; of a deferred tensor known at the end. */
  begin: number;
  /** Bytes accepted, and bytes that reached the file. */
  claimed: number;
  written: number;
  /** The data of a deferred tensor. */
  content?: Uint8Array;
}

/** A new hidden name in the folder of `path`: what is being written, before it is renamed. */
export function temporaryBeside(path: string): string {
  return join(dirname(path), `.${basename(path)}.${process.pid}-${randomBytes(4).toString("hex")}.tmp`);
}

/**
 * Bytes of a declared tensor, the most it may have if that is open.
 * @throws ArgumentError for a name, dtype or shape that no file can hold
 */
export function declaredBytes(declaration: TensorDeclaration): number {
  return slotOf(declaration).bytes;
}

function slotOf(declaration: TensorDeclaration): Slot {
  const { name, dtype, shape } = declaration;
  if (name === METADATA_KEY || !name.isWellFormed()) {
    throw new ArgumentError(OP, "name", `a name other than ${METADATA_KEY} that UTF-8 can hold`, JSON.stringify(name));
  }
  if (!isSafetensorsDType(dtype)) throw new ArgumentError(OP, name, "a dtype of safetensors", String(dtype));
  const deferred = !isShape(shape);
  const dimensions = deferred ? [shape.atMost] : shape;
  const counts = dimensions.every((d) => Number.isSafeInteger(d) && d >= 0);
  const bytes = counts ? bytesOfShape(dtype, dimensions) : undefined;
  if (bytes === undefined || !Number.isInteger(bytes)) {
    throw new ArgumentError(OP, name, `a shape of a whole number of bytes of ${dtype}`, formatShape(dimensions));
  }
  if (deferred && SAFETENSORS_BITS[dtype] !== 8) {
    throw new ArgumentError(OP, name, "a byte-sized dtype for a tensor whose length comes later", dtype);
  }
  return { declaration, bytes, deferred, begin: 0, claimed: 0, written: 0 };
}

function isShape(shape: TensorDeclaration["shape"]): shape is readonly number[] {
  return Array.isArray(shape);
}

/** Wide dtypes first, so that everything is aligned, then by name: the order of the reference serializer. */
function fileOrder(a: Slot, b: Slot): number {
  const rank = (slot: Slot) => SAFETENSORS_DTYPES.indexOf(slot.declaration.dtype);
  // Tensors without a length yet come last: what follows them could not be placed.
  if (a.deferred !== b.deferred) return a.deferred ? 1 : -1;
  return rank(b) - rank(a) || compareCodePoints(a.declaration.name, b.declaration.name);
}

/** Places the tensors and gives the header's JSON. With `final` deferred tensors count as long as they are. */
function layOut(slots: readonly Slot[], metadata: Readonly<Record<string, string>>, final: boolean): Buffer {
  let offset = 0;
  const header: string[] = [];
  const keys = Object.keys(metadata);
  if (keys.length > 0) {
    header.push(
      `${JSON.stringify(METADATA_KEY)}:${JSON.stringify(Object.fromEntries(keys.map((k) => [k, metadata[k]])))}`,
    );
  }
  for (const slot of slots) {
    const { name, dtype, shape } = slot.declaration;
    const bytes = slot.deferred && final ? slot.claimed : slot.bytes;
    const dimensions = isShape(shape) ? shape : [bytes];
    slot.begin = offset;
    const info = { dtype, shape: dimensions, data_offsets: [offset, offset + bytes] };
    header.push(`${JSON.stringify(name)}:${JSON.stringify(info)}`);
    offset += bytes;
  }
  return Buffer.from(`{${header.join(",")}}`);
}

/**
 * Writes one safetensors file. The target appears under its name when `commit` is called, complete or not at all.
 *
 * Bytes are the same as the reference serializer's for the same tensors (but for tensors declared with `atMost`, which
 * stand at the end of the data, and the room their header entries leave).
 */
export class SafetensorsWriter {
  private readonly slots: Map<string, Slot>;
  private readonly ordered: readonly Slot[];
  private readonly dataStart: number;
  private readonly temporary: string;
  private handle: Promise<FileHandle> | undefined;
  private state: "open" | "sealed" | "committed" | "aborted" = "open";
  private sealing: Promise<void> | undefined;
  /** Tensors that still lack bytes. */
  private incomplete: number;

  /**
   * Checks the declarations and lays the file out; nothing is written before the first `write` or `seal`.
   * @throws ArgumentError for a name that comes twice, a bad dtype or shape, or a header larger than the format allows
   */
  constructor(
    readonly path: string,
    declarations: Iterable<TensorDeclaration>,
    private readonly metadata: Readonly<Record<string, string>> = DEFAULT_METADATA,
  ) {
    this.slots = new Map();
    for (const declaration of declarations) {
      if (this.slots.has(declaration.name)) {
        throw new ArgumentError(OP, "name", "every tensor once", `${JSON.stringify(declaration.name)} twice`);
      }
      this.slots.set(declaration.name, slotOf(declaration));
    }
    this.ordered = [...this.slots.values()].sort(fileOrder);
    this.incomplete = this.ordered.filter((slot) => slot.deferred || slot.bytes > 0).length;
    const header = layOut(this.ordered, metadata, false).length;
    const padded = Math.ceil(header / HEADER_ALIGNMENT) * HEADER_ALIGNMENT;
    if (padded > MAX_HEADER_BYTES) {
      throw new ArgumentError(OP, "tensors", `a header of at most ${MAX_HEADER_BYTES} bytes`, `${padded} bytes`);
    }
    this.dataStart = PREFIX_BYTES + padded;
    this.temporary = temporaryBeside(path);
  }

  /** Whether every byte of every tensor is in the file. */
  get complete(): boolean {
    return this.incomplete === 0;
  }

  /** Bytes of all tensors; deferred ones count once they are written. */
  get dataBytes(): number {
    return this.ordered.reduce((sum, slot) => sum + (slot.deferred ? slot.claimed : slot.bytes), 0);
  }

  /**
   * The next bytes of a tensor. `chunk` may be reused when the promise has resolved; calls for different tensors may
   * overlap. A write that fails (a full disk, say) leaves the writer unusable: abort it.
   * @throws ArgumentError for an unknown name or more bytes than were declared, DisposedError after `seal` or `abort`
   */
  async write(name: string, chunk: Uint8Array): Promise<void> {
    this.checkOpen("write");
    const slot = this.slots.get(name);
    if (!slot) throw new ArgumentError(`${OP}.write`, "name", "a declared tensor", JSON.stringify(name));
    if (slot.claimed + chunk.length > slot.bytes || slot.content !== undefined) {
      const limit = slot.deferred ? `at most ${slot.bytes} bytes in one write` : `${slot.bytes} bytes in all`;
      throw new ArgumentError(`${OP}.write`, name, limit, `${chunk.length} bytes after ${slot.claimed}`);
    }
    const position = this.dataStart + slot.begin + slot.claimed;
    slot.claimed += chunk.length;
    if (slot.deferred) {
      slot.content = chunk.slice();
      this.incomplete--;
      return;
    }
    if (chunk.length === 0) return;
    try {
      await writeFully(await this.file(), chunk, position);
    } catch (error) {
      this.checkOpen("write");
      throw error;
    }
    slot.written += chunk.length;
    if (slot.written === slot.bytes) this.incomplete--;
  }

  /**
   * Writes what is left (header, deferred tensors) and closes the temporary file.
   * @throws ArgumentError when a tensor has fewer bytes than declared: nothing is left on disk then
   */
  async seal(): Promise<void> {
    if (this.state !== "sealed") this.checkOpen("seal");
    this.sealing ??= this.writeRest();
    await this.sealing;
  }

  private async writeRest(): Promise<void> {
    try {
      for (const slot of this.ordered) {
        const { name } = slot.declaration;
        if (slot.deferred && slot.content === undefined) throw new ArgumentError(OP, name, "its data", "none");
        if (!slot.deferred && slot.written !== slot.bytes) {
          throw new ArgumentError(OP, name, `${slot.bytes} bytes`, `${slot.written} when the file was closed`);
        }
      }
      const room = this.dataStart - PREFIX_BYTES;
      const start = Buffer.alloc(this.dataStart, " ");
      start.writeBigUInt64LE(BigInt(room));
      layOut(this.ordered, this.metadata, true).copy(start, PREFIX_BYTES);
      const handle = await this.file();
      for (const { content, begin } of this.ordered) {
        if (content) await writeFully(handle, content, this.dataStart + begin);
      }
      await writeFully(handle, start, 0);
      this.handle = undefined;
      await handle.close();
      this.state = "sealed";
    } catch (error) {
      await this.abort();
      throw error;
    }
  }

  /** Seals the file and gives it its name, replacing a file that has it. */
  async commit(): Promise<void> {
    if (this.state === "committed") return;
    await this.seal();
    try {
      await rename(this.temporary, this.path);
      this.state = "committed";
    } catch (error) {
      await this.abort();
      throw error;
    }
  }

  /** Removes everything that was written. Does nothing after `commit`. */
  async abort(): Promise<void> {
    if (this.state === "committed" || this.state === "aborted") return;
    this.state = "aborted";
    const opening = this.handle;
    this.handle = undefined;
    // A handle that never opened has left nothing to close.
    const handle = await opening?.catch(() => undefined);
    await handle?.close();
    await rm(this.temporary, { force: true });
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.abort();
  }

  private checkOpen(method: string): void {
    if (this.state !== "open") throw new DisposedError(`${this.path} (${this.state})`, `${OP}.${method}`);
  }

  private file(): Promise<FileHandle> {
    this.handle ??= open(this.temporary, "wx").catch((error: NodeJS.ErrnoException) => {
      if (!["ENOENT", "ENOTDIR", "EACCES", "EPERM", "EROFS"].includes(error.code ?? "")) throw error;
      throw new ArgumentError(OP, "path", "a file in a folder that exists and can be written", error.message);
    });
    return this.handle;
  }
}

async function writeFully(handle: FileHandle, bytes: Uint8Array, position: number): Promise<void> {
  for (let done = 0; done < bytes.length; ) {
    const length = Math.min(bytes.length - done, MAX_WRITE_BYTES);
    const { bytesWritten } = await handle.write(bytes, done, length, position + done);
    done += bytesWritten;
  }
}
