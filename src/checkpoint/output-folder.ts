/** The folder a checkpoint is written to: nothing of it is visible before it is complete, nothing is left when it fails. */
import { randomBytes } from "node:crypto";
import { existsSync, mkdirSync, readdirSync, realpathSync, renameSync, rmdirSync, rmSync, statSync } from "node:fs";
import { statfs } from "node:fs/promises";
import { basename, dirname, join, resolve } from "node:path";
import { ArgumentError, FormatError } from "../core/errors.js";
import { missingFolders } from "../formats/folders.js";
import { CONFIG_FILE, isSidecar } from "../formats/hf-folder.js";
import { isWeightFile } from "../formats/safetensors-shards.js";

const OP = "quantizeModel";

/**
 * A new folder appears by one rename. An existing one (`force`) gets the new files when all of them are complete: the old
 * model's files (configuration, weights, index, tokenizer) go, everything else in it stays. The last steps are synchronous,
 * so that no signal comes between them.
 */
export class OutputFolder {
  /** Where files are written until `commit`: on the same file system as the target. */
  readonly work: string;
  /** Folders that `create` makes, the outermost first, `work` the last. */
  private readonly created: string[] = [];
  private done = false;
  private readonly onExit = (): void => this.remove();

  private constructor(
    readonly path: string,
    private readonly replaces: boolean,
  ) {
    const tag = `${process.pid}-${randomBytes(4).toString("hex")}.tmp`;
    this.work = replaces ? join(path, `.halfbyte-${tag}`) : join(dirname(path), `.${basename(path)}.${tag}`);
  }

  /**
   * Checks that `path` may be written to; nothing is created yet.
   * @param source the model that is read, which must not be the target
   * @throws ArgumentError when the target exists and `force` is not given, is no folder, is the source, or holds files but
   *   no model (then it is not replaced even by force)
   */
  static check(path: string, source: string, force: boolean): OutputFolder {
    const target = resolve(path);
    const fail = (expected: string, received: string): never => {
      throw new ArgumentError(OP, "out", expected, received);
    };
    const found = statSync(target, { throwIfNoEntry: false });
    if (!found) return new OutputFolder(target, false);
    if (!found.isDirectory()) fail("a folder, or a path that does not exist", `the file ${path}`);
    const real = realpathSync(target);
    if (existsSync(source) && realpathSync(source) === real) fail("another folder than the source", path);
    if (!force)
      fail("a path that does not exist (--force, or force: true, replaces the model there)", `${path}, which exists`);
    const files = readdirSync(real);
    if (files.length > 0 && !files.includes(CONFIG_FILE)) {
      fail(`a model's folder or an empty one to replace by force`, `${path}, which holds files but no ${CONFIG_FILE}`);
    }
    return new OutputFolder(real, true);
  }

  /**
   * Creates the working folder, and the folders above it.
   * @param bytes what will be written
   * @throws FormatError when that cannot be: no permission, too little space on the disk
   */
  async create(bytes: number): Promise<void> {
    process.once("exit", this.onExit);
    try {
      this.created.push(...missingFolders(this.work));
      for (const folder of this.created) mkdirSync(folder);
      const { bavail, bsize } = await statfs(this.work);
      if (bavail * bsize < bytes) {
        const problem = `the checkpoint takes ${bytes} bytes, the disk has ${bavail * bsize} left`;
        throw new FormatError("checkpoint", this.path, problem);
      }
    } catch (error) {
      this.abort();
      throw error;
    }
  }

  /** Gives the files in `work` their place. @throws FormatError; nothing is left then, unless moving files itself failed */
  commit(): void {
    try {
      if (this.replaces) this.moveIn();
      else renameSync(this.work, this.path);
    } catch (error) {
      this.abort();
      throw error;
    }
    this.finish();
  }

  /** Removes everything that was written. Does nothing after `commit`. */
  abort(): void {
    if (this.done) return;
    this.remove();
    this.finish();
  }

  private moveIn(): void {
    const fresh = readdirSync(this.work);
    const stale = readdirSync(this.path).filter((file) => isModelFile(file) && !fresh.includes(file));
    // Without its configuration the folder does not load: better than old weights under a new configuration.
    rmSync(join(this.path, CONFIG_FILE), { force: true });
    for (const file of stale) rmSync(join(this.path, file), { force: true });
    const configLast = [...fresh.filter((file) => file !== CONFIG_FILE), CONFIG_FILE];
    for (const file of configLast) renameSync(join(this.work, file), join(this.path, file));
    rmdirSync(this.work);
  }

  private finish(): void {
    this.done = true;
    process.off("exit", this.onExit);
  }

  private remove(): void {
    rmSync(this.work, { recursive: true, force: true });
    // The folders above it, as far as nobody else put something there.
    for (const folder of this.created.slice(0, -1).reverse()) {
      try {
        rmdirSync(folder);
      } catch {
        // Not empty, or never made.
      }
    }
  }
}

function isModelFile(file: string): boolean {
  return file === CONFIG_FILE || isWeightFile(file) || isSidecar(file);
}
