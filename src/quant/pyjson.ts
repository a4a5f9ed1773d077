/**
 * JSON as Python's `json` module writes and reads it. Python tells 1 from 1.0, JavaScript does not, and both bitsandbytes'
 * quant states and transformers' strict configuration classes mind the difference: floats are `PyFloat` here, plain
 * numbers are Python ints.
 */
import { ArgumentError, FormatError } from "../core/errors.js";

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

/** `float.__repr__`: the shortest digits that read back as the same double, with an exponent below 1e-4 and from 1e16. */
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

/** A string as `json.dumps` writes it with `ensure_ascii`: everything outside printable ASCII escaped by UTF-16 unit. */
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
 * The reverse of `toPlain`, as far as it can be: integral numbers become ints, all others floats. A `PyFloat` stays one.
 * Throws ArgumentError for what JSON cannot hold.
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

/** Deepest nesting that `parsePyJson` follows: far above any real file, far below the end of the stack. */
export const MAX_JSON_DEPTH = 128;
/** Python refuses to read longer ints too. */
const MAX_INT_DIGITS = 4300;

/**
 * Parses JSON strictly: no duplicate keys, no trailing characters, no lone surrogates, nesting up to MAX_JSON_DEPTH. Like
 * Python it takes NaN, Infinity and -Infinity. Time and memory are linear in the text.
 * @param format what the text is, for messages (`quant_state`, `safetensors` ...)
 * @param where the file or tensor it came from
 * @throws FormatError with the position of the first problem
 */
export function parsePyJson(text: string, format: string, where: string): PyJson {
  return new Parser(text, format, where).document();
}

/**
 * Decodes UTF-8 and parses it as `parsePyJson` does.
 * @throws FormatError also for bytes that are not UTF-8
 */
export function parsePyJsonBytes(bytes: Uint8Array, format: string, where: string): PyJson {
  let text: string;
  try {
    text = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch (cause) {
    throw new FormatError(format, where, "is not valid UTF-8", { cause });
  }
  return parsePyJson(text, format, where);
}

// JSON's numbers; Python's three words for the others come first.
const NUMBER = /NaN|Infinity|-Infinity|-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?/y;
const UNESCAPE: Readonly<Record<string, string>> = {
  '"': '"',
  "\\": "\\",
  "/": "/",
  b: "\b",
  f: "\f",
  n: "\n",
  r: "\r",
  t: "\t",
};

class Parser {
  private at = 0;

  constructor(
    private readonly text: string,
    private readonly format: string,
    private readonly where: string,
  ) {}

  document(): PyJson {
    this.space();
    const value = this.value(0);
    this.space();
    if (this.at < this.text.length) this.fail("nothing after the value");
    return value;
  }

  private fail(expected: string): never {
    const rest = this.text.slice(this.at, this.at + 20);
    const found = this.at >= this.text.length ? "the end of the text" : JSON.stringify(rest);
    throw new FormatError(this.format, this.where, `invalid JSON at ${this.at}: expected ${expected}, found ${found}`);
  }

  private space(): void {
    for (; ; this.at++) {
      const c = this.text.charCodeAt(this.at);
      if (c !== 0x20 && c !== 0x0a && c !== 0x0d && c !== 0x09) return;
    }
  }

  private value(depth: number): PyJson {
    if (depth > MAX_JSON_DEPTH) this.fail(`at most ${MAX_JSON_DEPTH} levels of nesting`);
    switch (this.text[this.at]) {
      case "{":
        return this.object(depth);
      case "[":
        return this.list(depth);
      case '"':
        return this.string();
      case "t":
        return this.word("true", true);
      case "f":
        return this.word("false", false);
      case "n":
        return this.word("null", null);
      default:
        return this.number();
    }
  }

  private word<T>(word: string, value: T): T {
    if (!this.text.startsWith(word, this.at)) this.fail("a value");
    this.at += word.length;
    return value;
  }

  private object(depth: number): PyObject {
    const object = new Map<string, PyJson>();
    this.at++;
    this.space();
    if (this.take("}")) return object;
    do {
      this.space();
      if (this.text[this.at] !== '"') this.fail("a key in double quotes");
      const start = this.at;
      const key = this.string();
      if (object.has(key)) {
        this.at = start;
        this.fail("every key once");
      }
      this.space();
      if (!this.take(":")) this.fail('":"');
      this.space();
      object.set(key, this.value(depth + 1));
      this.space();
    } while (this.take(","));
    if (!this.take("}")) this.fail('"," or "}"');
    return object;
  }

  private list(depth: number): PyJson[] {
    const list: PyJson[] = [];
    this.at++;
    this.space();
    if (this.take("]")) return list;
    do {
      this.space();
      list.push(this.value(depth + 1));
      this.space();
    } while (this.take(","));
    if (!this.take("]")) this.fail('"," or "]"');
    return list;
  }

  private take(c: string): boolean {
    if (this.text[this.at] !== c) return false;
    this.at++;
    return true;
  }

  private number(): number | bigint | PyFloat {
    NUMBER.lastIndex = this.at;
    const match = NUMBER.exec(this.text);
    if (match === null) this.fail("a value");
    const [literal, fraction, exponent] = match;
    const isInt = fraction === undefined && exponent === undefined && !/[NI]/.test(literal);
    if (isInt && literal.length > MAX_INT_DIGITS) this.fail(`at most ${MAX_INT_DIGITS} digits`);
    this.at += literal.length;
    const value = Number(literal);
    if (!isInt) return pyFloat(value);
    // Python has no negative zero among its ints.
    return Number.isSafeInteger(value) ? value + 0 : BigInt(literal);
  }

  private string(): string {
    let out = "";
    let start = ++this.at;
    for (;;) {
      const c = this.text.charCodeAt(this.at);
      if (c === 0x22) {
        out += this.text.slice(start, this.at++);
        if (!out.isWellFormed()) this.fail("a string without lone surrogates before this");
        return out;
      }
      if (Number.isNaN(c)) this.fail("a closing quote");
      if (c < 0x20) this.fail("no control characters in a string");
      if (c !== 0x5c) {
        this.at++;
        continue;
      }
      out += this.text.slice(start, this.at) + this.escape();
      start = this.at;
    }
  }

  /** Reads one escape sequence and stands behind it. */
  private escape(): string {
    const c = this.text[this.at + 1] ?? "";
    if (c === "u") {
      const hex = this.text.slice(this.at + 2, this.at + 6);
      if (!/^[0-9a-fA-F]{4}$/.test(hex)) this.fail("four hex digits after \\u");
      this.at += 6;
      return String.fromCharCode(Number.parseInt(hex, 16));
    }
    if (!Object.hasOwn(UNESCAPE, c)) this.fail("an escape that JSON knows");
    this.at += 2;
    return UNESCAPE[c]!;
  }
}
