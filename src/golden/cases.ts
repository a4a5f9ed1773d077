/** Golden files: safetensors whose metadata key `cases` lists cases, each with parameters and the names of its tensors. */
import { readdir } from "node:fs/promises";
import { join } from "node:path";
import { type DType, isDType, isFloat } from "../core/dtype.js";
import { FormatError } from "../core/errors.js";
import { formatShape, type Shape } from "../core/shape.js";
import { SafetensorsFile } from "../formats/safetensors.js";

export const FORMAT = "golden";
export const EXTENSION = ".safetensors";
/** The metadata key of the list. */
export const CASES_KEY = "cases";

/** A key of a case, or the way to one inside its objects and lists (`state`, `double`, `steps`). */
export type Field = string | readonly string[];

export const fieldName = (field: Field): string => (typeof field === "string" ? field : field.join("."));

/** A case is not what its op needs: a key or a tensor is missing or of the wrong kind. */
export class CaseError extends FormatError {
  constructor(
    where: string,
    readonly field: string,
    readonly tensor: string | null,
    problem: string,
  ) {
    super(FORMAT, where, problem);
  }
}

/** A tensor that a case names. */
export interface GoldenTensor<D extends DType = DType> {
  readonly field: string;
  readonly name: string;
  readonly dtype: D;
  readonly shape: Shape;
  readonly bytes: Uint8Array<ArrayBuffer>;
}

/** An open golden file. */
export class GoldenFile {
  private constructor(
    /** Its name in the folder. */
    readonly name: string,
    readonly source: SafetensorsFile,
    readonly cases: readonly GoldenCase[],
  ) {}

  /**
   * Opens a file and reads its list of cases; undefined when it has none and so is no golden file.
   * @throws FormatError
   */
  static async open(dir: string, name: string): Promise<GoldenFile | undefined> {
    const source = await SafetensorsFile.open(join(dir, name));
    try {
      const text = source.metadata.get(CASES_KEY);
      if (text === undefined) {
        await source.close();
        return undefined;
      }
      const cases: GoldenCase[] = [];
      const file = new GoldenFile(name, source, cases);
      for (const [index, fields] of parseCases(text, source.path).entries()) {
        cases.push(new GoldenCase(file, index, fields));
      }
      return file;
    } catch (error) {
      await source.close();
      throw error;
    }
  }
}

type Fields = Readonly<Record<string, unknown>>;

function parseCases(text: string, path: string): readonly (Fields & { readonly op: string })[] {
  let list: unknown;
  try {
    list = JSON.parse(text);
  } catch (cause) {
    throw new FormatError(FORMAT, path, `metadata key "${CASES_KEY}" is not valid JSON`, { cause });
  }
  if (!Array.isArray(list) || list.length === 0) {
    throw new FormatError(FORMAT, path, `metadata key "${CASES_KEY}" is not a list of cases`);
  }
  return list.map((fields: unknown, index) => {
    if (!isFields(fields) || typeof fields.op !== "string" || fields.op === "") {
      throw new FormatError(FORMAT, path, `case ${index} is not an object with an "op"`);
    }
    return { ...fields, op: fields.op };
  });
}

function isFields(value: unknown): value is Fields {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

/** One case: typed access to its keys. What has been read is remembered, so that what nobody looked at shows. */
export class GoldenCase {
  readonly op: string;
  private readonly read = new Set<string>();

  constructor(
    readonly file: GoldenFile,
    readonly index: number,
    private readonly fields: Fields & { readonly op: string },
  ) {
    this.op = fields.op;
  }

  /** `blockwise.safetensors:17` */
  get id(): string {
    return `${this.file.name}:${this.index}`;
  }

  has(field: Field): boolean {
    return this.value(field) !== undefined;
  }

  /** @throws CaseError unless the value is one of `choices` */
  choice<T extends string>(field: Field, choices: readonly T[]): T {
    const value = this.value(field);
    const found = choices.find((choice) => choice === value);
    if (found === undefined) this.fail(field, `is ${show(value)}: expected ${choices.join(" or ")}`);
    return found;
  }

  /** @throws CaseError */
  text(field: Field): string {
    const value = this.value(field);
    if (typeof value !== "string") this.fail(field, `is ${show(value)}: expected a text`);
    return value;
  }

  /** @throws CaseError */
  number(field: Field): number {
    const value = this.value(field);
    if (typeof value !== "number") this.fail(field, `is ${show(value)}: expected a number`);
    return value;
  }

  /** Null when it is null or not there. @throws CaseError */
  numberOrNull(field: Field): number | null {
    return (this.value(field) ?? null) === null ? null : this.number(field);
  }

  /** False when it is not there. @throws CaseError */
  flag(field: Field): boolean {
    const value = this.value(field) ?? false;
    if (typeof value !== "boolean") this.fail(field, `is ${show(value)}: expected true or false`);
    return value;
  }

  /** The tensor that a key names. @throws CaseError when there is none or its dtype is another, FormatError (reading) */
  async tensor<D extends DType>(field: Field, dtypes: readonly D[]): Promise<GoldenTensor<D>> {
    const name = this.text(field);
    const entry = this.file.source.tensors.get(name);
    if (!entry) this.fail(field, `names ${show(name)}, which is not in the file`, name);
    const dtype = entry.dtype.toLowerCase();
    if (!isDType(dtype) || !(dtypes as readonly DType[]).includes(dtype)) {
      this.fail(field, `is ${entry.dtype} ${formatShape(entry.shape)}: expected ${dtypes.join(" or ")}`, name);
    }
    this.read.add(fieldName(field));
    const bytes = await this.file.source.read(name);
    return { field: fieldName(field), name, dtype: dtype as D, shape: entry.shape, bytes };
  }

  /** The main operand, whose dtype the key `dtype` (where it is there) must name. @throws as `tensor` */
  async operand<D extends DType>(field: Field, dtypes: readonly D[]): Promise<GoldenTensor<D>> {
    const tensor = await this.tensor(field, dtypes);
    if (isFloat(tensor.dtype) && this.has("dtype") && this.text("dtype") !== tensor.dtype) {
      this.fail(field, `is ${tensor.dtype}, but the case says ${this.text("dtype")}`, tensor.name);
    }
    return tensor;
  }

  /** Keys that name a tensor which was not read. */
  unread(): string[] {
    const names: string[] = [];
    const visit = (path: string, value: unknown): void => {
      if (typeof value === "string" && this.file.source.tensors.has(value) && !this.read.has(path)) names.push(path);
      if (typeof value !== "object" || value === null) return;
      for (const [key, item] of Object.entries(value)) visit(path === "" ? key : `${path}.${key}`, item);
    };
    visit("", this.fields);
    return names;
  }

  fail(field: Field, problem: string, tensor: string | null = null): never {
    throw new CaseError(this.id, fieldName(field), tensor, `${fieldName(field)} ${problem}`);
  }

  private value(field: Field): unknown {
    const path = typeof field === "string" ? [field] : field;
    return path.reduce<unknown>(
      (value, key) =>
        typeof value === "object" && value !== null && Object.hasOwn(value, key) ? (value as Fields)[key] : undefined,
      this.fields,
    );
  }
}

function show(value: unknown): string {
  const text = value === undefined ? "missing" : JSON.stringify(value);
  return text.length > 100 ? `${text.slice(0, 100)}...` : text;
}

/**
 * Opens every golden file of a folder, in the order of their names. The caller closes them.
 * @throws FormatError when the folder cannot be read, a file is malformed, or there is none with cases
 */
export async function openGoldenFiles(dir: string): Promise<GoldenFile[]> {
  const entries = await readdir(dir).catch((cause: Error) => {
    throw new FormatError(FORMAT, dir, `the folder cannot be read: ${cause.message}`, { cause });
  });
  const files: GoldenFile[] = [];
  try {
    for (const name of entries.filter((entry) => entry.endsWith(EXTENSION)).sort()) {
      const file = await GoldenFile.open(dir, name);
      if (file) files.push(file);
    }
    if (files.length === 0) {
      const problem = `no golden files: expected *${EXTENSION} with a list of cases in the metadata key "${CASES_KEY}"`;
      throw new FormatError(FORMAT, dir, problem);
    }
    return files;
  } catch (error) {
    await closeAll(files);
    throw error;
  }
}

export async function closeAll(files: readonly GoldenFile[]): Promise<void> {
  await Promise.all(files.map((file) => file.source.close()));
}
