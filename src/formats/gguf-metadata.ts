/** Typed access to GGUF metadata: a key of the wrong type is a FormatError that names file and key. */
import { FormatError } from "../core/errors.js";
import type { GgufArray, GgufHeader, GgufValue } from "./gguf.js";

/** What is read from: an open file, or a test's stand-in. */
export type GgufMetadata = Pick<GgufHeader, "path" | "metadata">;

/** What the lookups return, by the name used in messages. */
interface Expected {
  string: string;
  boolean: boolean;
  number: number;
  /** Not negative: every integer that the project reads from metadata is a size, a count or an index. */
  integer: number;
  strings: readonly string[];
  integers: readonly number[] | Exclude<GgufArray, readonly GgufValue[]>;
}

const CHECKS: { readonly [K in keyof Expected]: (value: GgufValue) => boolean } = {
  string: (value) => typeof value === "string",
  boolean: (value) => typeof value === "boolean",
  number: (value) => typeof value === "number" && Number.isFinite(value),
  integer: isIndex,
  strings: (value) => Array.isArray(value) && value.every((item) => typeof item === "string"),
  integers: (value) =>
    typeof value === "object" && Array.from<GgufValue>(value).every((item) => Number.isInteger(item)),
};

function isIndex(value: GgufValue): boolean {
  return typeof value === "number" && Number.isSafeInteger(value) && value >= 0;
}

/** The value of `key`, or undefined where the file does not have it. Throws FormatError when it is no `kind`. */
export function lookUp<K extends keyof Expected>(file: GgufMetadata, key: string, kind: K): Expected[K] | undefined {
  const value = file.metadata.get(key);
  if (value === undefined) return undefined;
  if (!CHECKS[kind](value)) {
    throw new FormatError("gguf", file.path, `${key}: expected ${kind}, received ${describe(value)}`);
  }
  return value as Expected[K];
}

/** The value of `key`. Throws FormatError when it is missing or no `kind`. */
export function requireValue<K extends keyof Expected>(file: GgufMetadata, key: string, kind: K): Expected[K] {
  const value = lookUp(file, key, kind);
  if (value === undefined) throw new FormatError("gguf", file.path, `${key} is missing`);
  return value;
}

function describe(value: GgufValue): string {
  if (typeof value === "object") return `an array of length ${value.length}`;
  return `${typeof value} ${JSON.stringify(String(value))}`;
}
