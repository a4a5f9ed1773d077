/**
 * JSON as Python's `json` module writes and reads it. Python tells 1 from 1.0, JavaScript does not, and both
 * bitsandbytes' quant states and transformers' strict configuration classes mind the difference: floats are `PyFloat`
 * here, plain numbers are Python ints.
 */
import { ArgumentError } from "../core/errors.js";
import { JsonReader } from "./json-reader.js";

/** A Python float. Everything `json.dumps` prints by `float.__repr__`. */
export class PyFloat {
  constructor(readonly value: number) {}
}

export function pyFloat(value: number): PyFloat {
  return new PyFloat(value);
}

/** A JSON object that keeps its keys in order, whatever they are called. */
export type PyObject = ReadonlyMap<string, PyJson>;

/** What JSON can say in Python: `number` and `bigint` are ints (a `number` must be a safe integer). */
export type PyJson = null | boolean | string | number | bigint | PyFloat | readonly PyJson[] | PyObject;

/**
 * `float.__repr__`: the shortest digits that read back as the same double, with an exponent below 1e-4 and from 1e16.
 */
export function pyFloatRepr(value: number): string {
  if (Number.isNaN(value)) return "NaN";
  if (!Number.isFinite(value)) return value > 0 ? "Infinity" : "-Infinity";
  const sign = value < 0 || Object.is(value, -0) ? "-" : "";
  // Both languages print the shortest digits that round-trip; only the layout differs.
  const [mantissa, power] = Math.abs(value).toExponential().split("e") as [string, string];
  const digits = mantissa.replace(".", "");
  const exponent = Number(power);
  if (exponent < -4 || exponent >= 16) {
    const fraction = digits.length > 1 ? `.${digits.slice(1)}` : "";
    const magnitude = String(Math.abs(exponent)).padStart(2, "0");
    return `${sign}${digits[0]}${fraction}e${exponent < 0 ? "-" : "+"}${magnitude}`;
  }
  if (exponent < 0) return `${sign}0.${"0".repeat(-exponent - 1)}${digits}`;
  const whole = digits.slice(0, exponent + 1).padEnd(exponent + 1, "0");
  return `${sign}${whole}.${digits.slice(exponent + 1) || "0"}`;
}

const ESCAPES: Readonly<Record<string, string>> = {
  '"': '\\"',
  "\\": "\\\\",
  "\n": "\\n",
  "\r": "\\r",
  "\t": "\\t",
  "\f": "\\f",
  "\b": "\\b",
};

/**
 * A string as `json.dumps` writes it with `ensure_ascii`: everything outside printable ASCII escaped by UTF-16 unit.
 */
function dumpString(text: string): string {
  const body = text.replace(
    /["\\]|[^ -~]/g,
    (c) => ESCAPES[c] ?? `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`,
  );
  return `"${body}"`;
}

/** Strings in the order of their Unicode code points, as Python and Rust sort them (JavaScript sorts UTF-16 units). */
export function compareCodePoints(a: string, b: string): number {
  const length = Math.min(a.length, b.length);
  for (let i = 0; i < length; i++) {
    const x = a.charCodeAt(i);
    const y = b.charCodeAt(i);
    if (x === y) continue;
    // Surrogates stand for code points above every other unit.
    const xHigh = x >= 0xd800 && x < 0xe000;
    const yHigh = y >= 0xd800 && y < 0xe000;
    return xHigh === yHigh ? x - y : xHigh ? 1 : -1;
  }
  return a.length - b.length;
}

export interface DumpOptions {
  /** Spaces per level, as `indent=`; without it everything stands on one line. */
  readonly indent?: number;
  /** As `sort_keys=`. */
  readonly sortKeys?: boolean;
}

/**
 * `json.dumps(value)`: the same characters as Python's, all of them ASCII.
 * Throws ArgumentError for a plain number that is no safe integer (wrap floats in `pyFloat`).
 */
export function dumpPyJson(value: PyJson, options: DumpOptions = {}): string {
  const { indent, sortKeys = false } = options;
  const separator = indent === undefined ? ", " : ",";
  const pad = (level: number) => (indent === undefined ? "" : `\n${" ".repeat(indent * level)}`);
  const wrap = (open: string, items: string[], close: string, level: number) =>
    items.length === 0
      ? open + close
      : open + pad(level + 1) + items.join(separator + pad(level + 1)) + pad(level) + close;

  const dump = (v: PyJson, level: number): string => {
    if (v === null) return "null";
    if (typeof v === "boolean" || typeof v === "bigint") return String(v);
    if (typeof v === "string") return dumpString(v);
    if (typeof v === "number") {
      if (!Number.isSafeInteger(v))
        throw new ArgumentError("dumpPyJson", "value", "a safe integer or pyFloat()", `${v}`);
      return String(v);
    }
    if (v instanceof PyFloat) return pyFloatRepr(v.value);
    if (isList(v)) {
      return wrap(
        "[",
        v.map((item) => dump(item, level + 1)),
        "]",
        level,
      );
    }
    const entries = [...v];
    if (sortKeys) entries.sort(([a], [b]) => compareCodePoints(a, b));
    return wrap(
      "{",
      entries.map(([key, item]) => `${dumpString(key)}: ${dump(item, level + 1)}`),
      "}",
      level,
    );
  };
  return dump(value, 0);
}

function isList(value: readonly PyJson[] | PyObject): value is readonly PyJson[] {
  return Array.isArray(value);
}

/** Whether a parsed value is an object. */
export function isPyObject(value: PyJson | undefined): value is PyObject {
  return value instanceof Map;
}

/**
 * Plain JavaScript for readers that do not care about int and float: floats and big ints become numbers, objects become
 * records without a prototype chain to fall into ("__proto__" is an ordinary key).
 */
export function toPlain(value: PyJson): unknown {
  if (value instanceof PyFloat) return value.value;
  if (typeof value === "bigint") return Number(value);
  if (value === null || typeof value !== "object") return value;
  if (isList(value)) return value.map(toPlain);
  const record: Record<string, unknown> = {};
  for (const [key, item] of value) {
    Object.defineProperty(record, key, { value: toPlain(item), enumerable: true, writable: true, configurable: true });
  }
  return record;
}

/**
 * The reverse of `toPlain`, as far as it can be: integral numbers become ints, all others floats. A `PyFloat` stays
 * one. Throws ArgumentError for what JSON cannot hold.
 */
export function fromPlain(value: unknown): PyJson {
  if (value === null || typeof value === "boolean" || typeof value === "string" || typeof value === "bigint")
    return value;
  if (value instanceof PyFloat) return value;
  if (typeof value === "number") return Number.isSafeInteger(value) ? value : pyFloat(value);
  if (Array.isArray(value)) return value.map(fromPlain);
  if (value instanceof Map) return new Map([...value].map(([key, item]) => [String(key), fromPlain(item)]));
  if (typeof value === "object") {
    const entries = Object.entries(value).filter(([, item]) => item !== undefined);
    return new Map(entries.map(([key, item]) => [key, fromPlain(item)]));
  }
  throw new ArgumentError("fromPlain", "value", "something JSON can hold", typeof value);
}

/**
 * Parses JSON strictly: no duplicate keys, no trailing characters, no lone surrogates, bounded nesting (see JsonReader).
 * Like Python it takes NaN, Infinity and -Infinity. The tree can take many times the memory of the text: callers bound
 * the text, or read it piece by piece.
 * @param format what the text is, for messages (`quant_state`, `config` ...)
 * @param where the file or tensor it came from
 * @throws FormatError with the position of the first problem
 */
export function parsePyJson(text: string, format: string, where: string): PyJson {
  return readDocument(new JsonReader(text, format, where), readPyJson);
}

/**
 * Decodes UTF-8 and parses it as `parsePyJson` does.
 * @throws FormatError also for bytes that are not UTF-8
 */
export function parsePyJsonBytes(bytes: Uint8Array, format: string, where: string): PyJson {
  return readDocument(JsonReader.of(bytes, format, where), readPyJson);
}

function readDocument<T>(reader: JsonReader, read: (reader: JsonReader) => T): T {
  const value = read(reader);
  reader.end();
  return value;
}

function readPyJson(reader: JsonReader): PyJson {
  switch (reader.kind()) {
    case "object": {
      const object = new Map<string, PyJson>();
      reader.object((key) => {
        if (object.has(key)) reader.duplicate(key);
        object.set(key, readPyJson(reader));
      });
      return object;
    }
    case "list": {
      const list: PyJson[] = [];
      reader.list(() => list.push(readPyJson(reader)));
      return list;
    }
    case "string":
      return reader.string();
    case "number": {
      const { value, isInt, literal } = reader.number();
      if (!isInt) return pyFloat(value);
      return Number.isSafeInteger(value) ? value : BigInt(literal);
    }
    case "word":
      return reader.word();
  }
}
