/** Checkpoints of one or several safetensors files, split and indexed as transformers does it. */
import { readdir, rename, rm, writeFile } from "node:fs/promises";
import { basename, join } from "node:path";
import { ArgumentError, DisposedError } from "../core/errors.js";
import { dumpPyJson, type PyJson } from "../quant/pyjson.js";
import { declaredBytes, SafetensorsWriter, type TensorDeclaration, temporaryBeside } from "./safetensors-writer.js";

const OP = "CheckpointWriter";
/** The file name transformers looks for first, and the index of a sharded checkpoint. */
export const MODEL_FILE = "model.safetensors";
export const INDEX_FILE = `${MODEL_FILE}.index.json`;
const SHARD_FILE = /^model-\d{5}-of-\d{5}\.safetensors$/;

/** `model-00001-of-00003.safetensors`; `index` counts from 0. A single file is `model.safetensors`. */
export function shardFileName(index: number, count: number): string {
  const number = (n: number) => String(n).padStart(5, "0");
  return count === 1 ? MODEL_FILE : `model-${number(index + 1)}-of-${number(count)}.safetensors`;
}

const SIZE_UNITS: Readonly<Record<string, number>> = {
  "": 1,
  B: 1,
  KB: 1e3,
  MB: 1e6,
  GB: 1e9,
  TB: 1e12,
  KIB: 2 ** 10,
  MIB: 2 ** 20,
  GIB: 2 ** 30,
  TIB: 2 ** 40,
};

/** The shard size of transformers' command line tools and of ours: 5 GB. */
export const DEFAULT_MAX_SHARD_SIZE = 5e9;

/**
 * A size in bytes: a number, or text such as "5GB", "500 MB", "1.5GiB" or "1000000" (KB, MB ... are powers of 1,000 as
 * in transformers, KiB, MiB ... of 1,024).
 * @param option names the value in messages
 * @throws ArgumentError for anything else, and for less than one byte
 */
export function parseSize(size: string | number, option = "size"): number {
  const match = /^\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*$/i.exec(String(size));
  const unit = match && SIZE_UNITS[match[2]!.toUpperCase()];
  const bytes = match && unit ? Math.floor(Number(match[1]) * unit) : Number.NaN;
  if (!Number.isSafeInteger(bytes) || bytes < 1) {
    throw new ArgumentError("parseSize", option, 'a size such as "5GB", "500MB" or a number of bytes', `${size}`);
  }
  return bytes;
}

export interface CheckpointOptions {
  /** Bytes of tensor data per file: a number or text for `parseSize`. Default DEFAULT_MAX_SHARD_SIZE. */
  readonly maxShardSize?: string | number;
  readonly metadata?: Readonly<Record<string, string>>;
  /** The model's number of parameters, for the index. Left out when not given. */
  readonly totalParameters?: number;
}

/** What `CheckpointWriter.finish` wrote. */
export interface CheckpointFiles {
  /** File names in the folder, shards first, then the index if there is one. */
  readonly files: readonly string[];
  /** Bytes of tensor data. */
  readonly totalBytes: number;
}

/**
 * Writes `model.safetensors`, or shards with `model.safetensors.index.json`, into a folder. Tensors go to shards in
 * declared order, filling one after the other as transformers does: a tensor above the limit gets a shard of its own.
 * Nothing carries its final name before `finish`.
 */
export class CheckpointWriter {
  private readonly writers: readonly SafetensorsWriter[];
  private readonly shardOf = new Map<string, number>();
  private finished = false;

  /**
   * @param folder an existing folder
   * @throws ArgumentError as SafetensorsWriter, or for a bad maxShardSize
   */
  constructor(
    readonly folder: string,
    declarations: Iterable<TensorDeclaration>,
    private readonly options: CheckpointOptions = {},
  ) {
    const limit = parseSize(options.maxShardSize ?? DEFAULT_MAX_SHARD_SIZE, "maxShardSize");
    const shards = planShards([...declarations], limit);
    for (const [index, shard] of shards.entries()) {
      for (const { name } of shard) {
        if (this.shardOf.has(name)) throw new ArgumentError(OP, "name", "every tensor once", `${name} twice`);
        this.shardOf.set(name, index);
      }
    }
    this.writers = shards.map(
      (shard, i) => new SafetensorsWriter(join(folder, shardFileName(i, shards.length)), shard, options.metadata),
    );
  }

  /** The files that will be there after `finish`. */
  get files(): readonly string[] {
    const shards = this.writers.map((writer) => basename(writer.path));
    return shards.length === 1 ? shards : [...shards, INDEX_FILE];
  }

  /** As SafetensorsWriter.write. A shard is closed when its last byte is there, so few files are open at a time. */
  async write(name: string, chunk: Uint8Array): Promise<void> {
    const index = this.shardOf.get(name);
    if (index === undefined) throw new ArgumentError(`${OP}.write`, "name", "a declared tensor", JSON.stringify(name));
    const writer = this.writers[index]!;
    await writer.write(name, chunk);
    if (writer.complete) await writer.seal();
  }

  /**
   * Gives every file its name, and removes the shards of an earlier checkpoint that would stand beside it.
   * @throws ArgumentError when data are missing. After any error nothing of this checkpoint is left in the folder; an
   * earlier one with the same file names is untouched unless renaming itself failed.
   */
  async finish(): Promise<CheckpointFiles> {
    if (this.finished) throw new DisposedError(this.folder, `${OP}.finish`);
    const renamed: string[] = [];
    try {
      for (const writer of this.writers) await writer.seal();
      for (const writer of this.writers) {
        await writer.commit();
        renamed.push(writer.path);
      }
      if (this.writers.length > 1) renamed.push(await this.writeIndex());
      await this.removeStale();
      this.finished = true;
    } catch (error) {
      await this.abort();
      for (const path of renamed) await rm(path, { force: true });
      throw error;
    }
    return { files: this.files, totalBytes: this.totalBytes };
  }

  /** Removes every temporary file. Does nothing after `finish`. */
  async abort(): Promise<void> {
    if (this.finished) return;
    for (const writer of this.writers) await writer.abort();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.abort();
  }

  private get totalBytes(): number {
    return this.writers.reduce((sum, writer) => sum + writer.dataBytes, 0);
  }

  private async writeIndex(): Promise<string> {
    const { totalParameters } = this.options;
    const metadata = new Map<string, PyJson>([["total_size", this.totalBytes]]);
    if (totalParameters !== undefined) metadata.set("total_parameters", totalParameters);
    const weightMap = new Map<string, PyJson>();
    for (const [name, index] of this.shardOf) weightMap.set(name, basename(this.writers[index]!.path));
    const index = new Map<string, PyJson>([
      ["metadata", metadata],
      ["weight_map", weightMap],
    ]);
    const path = join(this.folder, INDEX_FILE);
    const temporary = temporaryBeside(path);
    try {
      await writeFile(temporary, `${dumpPyJson(index, { indent: 2, sortKeys: true })}\n`, { flag: "wx" });
      await rename(temporary, path);
      return path;
    } catch (error) {
      await rm(temporary, { force: true });
      throw error;
    }
  }

  /** A leftover model.safetensors would be loaded instead of the shards, leftover shards only waste space. */
  private async removeStale(): Promise<void> {
    for (const file of await readdir(this.folder)) {
      if (isWeightFile(file) && !this.files.includes(file)) await rm(join(this.folder, file));
    }
  }
}

/** Whether a file name is one that a checkpoint's weights have: the single file, a shard, or the index. */
export function isWeightFile(file: string): boolean {
  return file === MODEL_FILE || file === INDEX_FILE || SHARD_FILE.test(file);
}

/** Greedy, in order. A deferred tensor counts as long as it may become. */
function planShards(declarations: readonly TensorDeclaration[], limit: number): TensorDeclaration[][] {
  const shards: TensorDeclaration[][] = [];
  let current: TensorDeclaration[] = [];
  let size = 0;
  for (const declaration of declarations) {
    const bytes = declaredBytes(declaration);
    if (bytes > limit) {
      shards.push([declaration]);
      continue;
    }
    if (size + bytes > limit) {
      shards.push(current);
      current = [];
      size = 0;
    }
    current.push(declaration);
    size += bytes;
  }
  if (current.length > 0 || shards.length === 0) shards.push(current);
  return shards;
}
