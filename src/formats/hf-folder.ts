/**
 * A Hugging Face model folder as a ModelSource: config.json, `model.safetensors` or shards with an index, and the
 * tokenizer and generation files beside them.
 *
 * As in transformers, `model.safetensors` wins over an index, and tensors that a shard holds beyond the index count as
 * well. A name that two shards hold is an error here (transformers takes whichever file comes last).
 */
import type { Dirent } from "node:fs";
import { readdir, readFile, stat } from "node:fs/promises";
import { join, posix } from "node:path";
import { ArgumentError, DisposedError, FormatError } from "../core/errors.js";
import { JsonReader } from "../quant/json-reader.js";
import { isPyObject, type PyObject, parsePyJsonBytes, toPlain } from "../quant/pyjson.js";
import { allocate, errorMessage, MAX_HEADER_BYTES, SafetensorsFile, type TensorEntry } from "./safetensors.js";
import { INDEX_FILE, MODEL_FILE } from "./safetensors-shards.js";
import { type ModelSource, rowRange, type SourceTensor } from "./source.js";

const FORMAT = "checkpoint";
export const CONFIG_FILE = "config.json";
/** Shards that are open at the same time. */
const MAX_OPEN_SHARDS = 8;
/** Largest config.json: its parsed form is many times larger. */
const MAX_CONFIG_BYTES = 8_000_000;
/** Largest file that is passed on in one piece, a tokenizer say. */
const MAX_SIDECAR_BYTES = 1_000_000_000;

/** Files that belong to a model besides its weights and config.json. */
const SIDECARS = [
  /^generation_config\.json$/,
  /^(special_tokens_map|added_tokens|vocab|chat_template|vocab-\w+)\.json$/,
  /^(tokenizer|tokenizer_config)\.json$/,
  /^((video_)?preprocessor|(image_)?processor)_config\.json$/,
  /^(merges|vocab|normalizer)\.(txt|json)$/,
  /^[\w.-]+\.(model|tiktoken|jinja)$/,
  /^(configuration|modeling|tokenization|processing|image_processing)_\w+\.py$/,
  /^(LICENSE|NOTICE|USE_POLICY)(\.\w+)?$/,
];

/** Weights of other kinds, and what to do about them when there is nothing else. */
const OTHER_WEIGHTS: readonly (readonly [RegExp, string])[] = [
  [
    /^pytorch_model.*\.bin(\.index\.json)?$/,
    "only PyTorch weights (pytorch_model.bin): convert them to safetensors first (load in transformers, save_pretrained)",
  ],
  [/\.gguf$/, "a GGUF model: pass the .gguf file instead of the folder"],
  [/^adapter_(config\.json|model\.)/, "a PEFT adapter, not a model: merge it into its base model first"],
  [/^consolidated.*\.(pth|safetensors)$/, "weights in their maker's own layout: convert them to a Hugging Face folder"],
  [/^(tf_model\.h5|flax_model\.msgpack)$/, "only TensorFlow or Flax weights: convert them to safetensors first"],
];

/**
 * Opens a model folder. Headers of all files are read and checked, data only on request; at most a few shards are open
 * at a time.
 * @throws FormatError naming the file when the folder, its config.json, index or a safetensors file is missing or wrong
 */
export async function openHfFolder(path: string): Promise<ModelSource> {
  const files = await listFolder(path);
  const weights = findWeights(path, files);
  if (!files.has(CONFIG_FILE)) throw new FormatError(FORMAT, path, `has no ${CONFIG_FILE}`);
  const configTree = await readConfig(path);
  const index = weights === INDEX_FILE ? await readIndex(path) : new Map<string, string>();
  const shardNames = weights === INDEX_FILE ? [...new Set(index.values())].sort() : [MODEL_FILE];

  const shards = new ShardPool(path);
  try {
    const shardOf = new Map<string, string>();
    const tensors = new Map<string, TensorEntry>();
    for (const shard of shardNames) {
      for (const [name, entry] of await shards.use(shard, async (file) => file.tensors)) {
        const other = shardOf.get(name);
        if (other !== undefined) {
          throw new FormatError(FORMAT, path, `tensor ${JSON.stringify(name)} is in two shards: ${other} and ${shard}`);
        }
        shardOf.set(name, shard);
        tensors.set(name, entry);
      }
    }
    for (const [name, shard] of index) {
      if (shardOf.get(name) === shard) continue;
      const problem = `${INDEX_FILE} says that ${JSON.stringify(name)} is in ${shard}, which does not hold it`;
      throw new FormatError(FORMAT, path, problem);
    }
    return new HfFolder(path, configTree, tensors, shardOf, shards, sidecarsOf(path, files));
  } catch (error) {
    await shards.close();
    throw error;
  }
}

class HfFolder implements ModelSource {
  readonly kind = "safetensors";
  readonly config: Readonly<Record<string, unknown>>;
  readonly tensors: ReadonlyMap<string, SourceTensor>;

  constructor(
    readonly path: string,
    readonly configTree: PyObject,
    private readonly entries: ReadonlyMap<string, TensorEntry>,
    private readonly shardOf: ReadonlyMap<string, string>,
    private readonly shards: ShardPool,
    readonly sidecars: ReadonlyMap<string, () => Promise<Uint8Array>>,
  ) {
    this.config = toPlain(configTree) as Record<string, unknown>;
    this.tensors = entries;
  }

  storedBytes(name: string): number {
    const { begin, end } = this.entry(name, "storedBytes");
    return end - begin;
  }

  async readRows(name: string, begin: number, end: number): Promise<Uint8Array<ArrayBuffer>> {
    const { offset, bytes } = rowRange(this.entry(name, "readRows"), begin, end);
    const dst = allocate(bytes, this.path, name);
    await this.shards.use(this.shardOf.get(name)!, (file) => file.readRange(name, offset, dst));
    return dst;
  }

  close(): Promise<void> {
    return this.shards.close();
  }

  private entry(name: string, op: string): TensorEntry {
    const entry = this.entries.get(name);
    if (!entry) throw new ArgumentError(op, "name", `a tensor of ${this.path}`, JSON.stringify(name));
    return entry;
  }
}

interface OpenShard {
  readonly file: Promise<SafetensorsFile>;
  users: number;
}

/**
 * At most MAX_OPEN_SHARDS open files, the most recently used last; further ones wait for their turn. A shard that comes
 * back after it was closed must be the same file.
 */
class ShardPool {
  private readonly open = new Map<string, OpenShard>();
  private readonly fingerprints = new Map<string, string>();
  private readonly waiting: (() => void)[] = [];
  private closed = false;

  constructor(private readonly folder: string) {}

  async use<T>(shard: string, task: (file: SafetensorsFile) => Promise<T>): Promise<T> {
    const slot = await this.acquire(shard);
    try {
      return await task(await slot.file);
    } catch (error) {
      // The next use tries again to open a file that did not open.
      slot.file.catch(() => this.open.get(shard) === slot && this.open.delete(shard));
      throw error;
    } finally {
      slot.users--;
      this.waiting.shift()?.();
    }
  }

  async close(): Promise<void> {
    this.closed = true;
    const files = [...this.open.values()];
    this.open.clear();
    for (const wake of this.waiting.splice(0)) wake();
    for (const { file } of files) await closeFile(file);
  }

  private async acquire(shard: string): Promise<OpenShard> {
    for (;;) {
      if (this.closed) throw new DisposedError(this.folder, "ModelSource");
      const known = this.open.get(shard);
      if (known || this.open.size < MAX_OPEN_SHARDS) {
        const slot = known ?? { file: this.openShard(shard), users: 0 };
        this.open.delete(shard);
        this.open.set(shard, slot);
        slot.users++;
        return slot;
      }
      const idle = [...this.open].find(([, { users }]) => users === 0);
      if (idle) {
        this.open.delete(idle[0]);
        await closeFile(idle[1].file);
      } else {
        await new Promise<void>((resolve) => this.waiting.push(resolve));
      }
    }
  }

  private async openShard(shard: string): Promise<SafetensorsFile> {
    const file = await SafetensorsFile.open(join(this.folder, shard));
    const before = this.fingerprints.get(shard);
    if (before !== undefined && before !== file.fingerprint) {
      await file.close();
      throw new FormatError(FORMAT, file.path, "was changed by someone else while the model was open");
    }
    this.fingerprints.set(shard, file.fingerprint);
    return file;
  }
}

/** A file that could not be opened has told whoever asked for it; there is nothing to close. */
async function closeFile(opening: Promise<SafetensorsFile>): Promise<void> {
  const file = await opening.catch(() => undefined);
  await file?.close();
}

async function listFolder(path: string): Promise<ReadonlyMap<string, Dirent>> {
  try {
    const entries = await readdir(path, { withFileTypes: true });
    if (entries.length === 0) throw new FormatError(FORMAT, path, "is an empty folder");
    return new Map(entries.map((entry) => [entry.name, entry]));
  } catch (cause) {
    if (cause instanceof FormatError) throw cause;
    const code = (cause as NodeJS.ErrnoException).code;
    if (code === "ENOTDIR") {
      throw new FormatError(FORMAT, path, `is not a folder: pass the folder that holds ${CONFIG_FILE}`, { cause });
    }
    if (code === "ENOENT") throw new FormatError(FORMAT, path, "does not exist", { cause });
    throw new FormatError(FORMAT, path, `cannot be listed: ${errorMessage(cause)}`, { cause });
  }
}

function findWeights(path: string, files: ReadonlyMap<string, Dirent>): typeof MODEL_FILE | typeof INDEX_FILE {
  for (const file of [MODEL_FILE, INDEX_FILE] as const) if (files.has(file)) return file;
  for (const [pattern, problem] of OTHER_WEIGHTS) {
    for (const file of files.keys()) if (pattern.test(file)) throw new FormatError(FORMAT, path, `holds ${problem}`);
  }
  const missing = files.has(CONFIG_FILE) ? "no weights" : `no model: no ${CONFIG_FILE} and no weights`;
  throw new FormatError(FORMAT, path, `holds ${missing} (looked for ${MODEL_FILE} and ${INDEX_FILE})`);
}

/** The index's weight_map: tensor name to shard, checked to stay inside the folder. */
async function readIndex(folder: string): Promise<ReadonlyMap<string, string>> {
  const path = join(folder, INDEX_FILE);
  const reader = JsonReader.of(await readWhole(path, MAX_HEADER_BYTES), FORMAT, path);
  if (reader.kind() !== "object") throw new FormatError(FORMAT, path, "is not a JSON object");
  let map: Map<string, string> | undefined;
  reader.object((key) => {
    if (key !== "weight_map" || reader.kind() !== "object") return reader.skip();
    if (map) reader.duplicate(key);
    const shards = new Map<string, string>();
    map = shards;
    reader.object((name) => {
      if (shards.has(name)) reader.duplicate(name);
      const shard = reader.kind() === "string" ? reader.string() : undefined;
      shards.set(name, shardPath(shard, name, path));
    });
  });
  reader.end();
  if (!map) throw new FormatError(FORMAT, path, "has no weight_map object");
  if (map.size === 0) throw new FormatError(FORMAT, path, "its weight_map is empty");
  return map;
}

/** Purely by its text: inside a download cache a shard is a link to a file elsewhere, and that is fine. */
function shardPath(shard: string | undefined, name: string, path: string): string {
  const plain = shard !== undefined && shard !== "" && !/[\0\\]|^[a-zA-Z]:/.test(shard);
  const normal = plain ? posix.normalize(shard) : "";
  if (!plain || posix.isAbsolute(normal) || normal.startsWith("..") || normal.endsWith("/") || normal === ".") {
    const shown = shard === undefined ? "not a string" : JSON.stringify(shard);
    throw new FormatError(
      FORMAT,
      path,
      `the shard of ${JSON.stringify(name)} is ${shown}: not a file inside the folder`,
    );
  }
  return normal;
}

async function readConfig(folder: string): Promise<PyObject> {
  const path = join(folder, CONFIG_FILE);
  const value = parsePyJsonBytes(await readWhole(path, MAX_CONFIG_BYTES), FORMAT, path);
  if (!isPyObject(value)) throw new FormatError(FORMAT, path, "is not a JSON object");
  return value;
}

async function readWhole(path: string, limit: number): Promise<Uint8Array> {
  try {
    const found = await stat(path);
    if (!found.isFile()) throw new FormatError(FORMAT, path, "is not a regular file");
    if (found.size > limit) {
      throw new FormatError(FORMAT, path, `has ${found.size} bytes, more than the ${limit} that make sense`);
    }
    return await readFile(path);
  } catch (cause) {
    if (cause instanceof FormatError) throw cause;
    throw new FormatError(FORMAT, path, `cannot be read: ${errorMessage(cause)}`, { cause });
  }
}

/** Whether a file name is one that belongs to a model besides its weights and config.json. */
export function isSidecar(name: string): boolean {
  return name !== CONFIG_FILE && SIDECARS.some((pattern) => pattern.test(name));
}

function sidecarsOf(path: string, files: ReadonlyMap<string, Dirent>): Map<string, () => Promise<Uint8Array>> {
  const names = [...files].filter(([, entry]) => !entry.isDirectory()).map(([name]) => name);
  const sidecars = names.filter(isSidecar).sort();
  return new Map(sidecars.map((name) => [name, () => readWhole(join(path, name), MAX_SIDECAR_BYTES)]));
}
