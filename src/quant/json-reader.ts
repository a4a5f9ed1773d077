/**
 * A strict JSON reader that hands out one value after the other, so that a large text can be checked and turned into
 * something small without a tree in between.
 */
import { FormatError } from "../core/errors.js";

/** Deepest nesting that is followed: far above any real file, far below the end of the stack. */
export const MAX_JSON_DEPTH = 128;
/** Python refuses to read longer ints too. */
const MAX_INT_DIGITS = 4300;
/** Digits that are certainly a safe integer. */
const SAFE_DIGITS = 15;

export type JsonKind = "object" | "list" | "string" | "number" | "word";

export interface JsonNumber {
  readonly value: number;
  /** Written without fraction and exponent. */
  readonly isInt: boolean;
  readonly literal: string;
}

// JSON's numbers; Python's three words for the others come first.
const NUMBER = /NaN|Infinity|-Infinity|-?(?:0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?/y;
// biome-ignore lint/suspicious/noControlCharactersInRegex: they are what JSON forbids inside a string
const PLAIN = /[^"\\\u0000-\u001f]*/y;
const WORDS = { t: ["true", true], f: ["false", false], n: ["null", null] } as const;
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

/**
 * Stands before a value until one of its methods reads it. Every method throws FormatError, with the position, when the
 * text is not what it reads, for lone surrogates in strings, and for nesting beyond MAX_JSON_DEPTH. Time is linear in the
 * text.
 */
export class JsonReader {
  private at = 0;
  private depth = 0;

  /**
   * @param format what the text is, for messages (`safetensors`, `quant_state` ...)
   * @param where the file or tensor it came from
   */
  constructor(
    private readonly text: string,
    private readonly format: string,
    private readonly where: string,
  ) {
    this.space();
  }

  /** Reads UTF-8. Throws FormatError for bytes that are not. */
  static of(bytes: Uint8Array, format: string, where: string): JsonReader {
    try {
      return new JsonReader(new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes), format, where);
    } catch (cause) {
      throw new FormatError(format, where, "is not valid UTF-8", { cause });
    }
  }

  /** What the next value is; a "number" may still turn out to be no value at all. */
  kind(): JsonKind {
    switch (this.text[this.at]) {
      case "{":
        return "object";
      case "[":
        return "list";
      case '"':
        return "string";
      case "t":
      case "f":
      case "n":
        return "word";
      default:
        return "number";
    }
  }

  /** Reads an object: `onEntry` is called with each key and must read (or skip) the value. Keys may come twice. */
  object(onEntry: (key: string) => void): void {
    this.sequence("{", "}", () => {
      const key = this.string();
      if (!this.take(":")) this.fail('":"');
      onEntry(key);
    });
  }

  /** Reads a list: `onItem` is called before each item and must read (or skip) it. */
  list(onItem: () => void): void {
    this.sequence("[", "]", onItem);
  }

  private sequence(open: string, close: string, onItem: () => void): void {
    if (!this.take(open)) this.fail(`"${open}"`);
    if (++this.depth > MAX_JSON_DEPTH) this.fail(`at most ${MAX_JSON_DEPTH} levels of nesting`);
    if (!this.take(close)) {
      do onItem();
      while (this.take(","));
      if (!this.take(close)) this.fail(`"," or "${close}"`);
    }
    this.depth--;
  }

  /** Reads any value and forgets it. */
  skip(): void {
    const kind = this.kind();
    if (kind === "object") this.object(() => this.skip());
    else if (kind === "list") this.list(() => this.skip());
    else if (kind === "string") this.string();
    else if (kind === "word") this.word();
    else this.number();
  }

  string(): string {
    if (this.text[this.at] !== '"') this.fail("a string in double quotes");
    let out = "";
    let start = ++this.at;
    for (;;) {
      PLAIN.lastIndex = this.at;
      PLAIN.test(this.text);
      this.at = PLAIN.lastIndex;
      const c = this.text[this.at];
      if (c === '"') break;
      if (c === undefined) this.fail("a closing quote");
      if (c !== "\\") this.fail("no control characters in a string");
      out += this.text.slice(start, this.at) + this.escape();
      start = this.at;
    }
    out += this.text.slice(start, this.at);
    if (!out.isWellFormed()) this.fail("a string without lone surrogates before this");
    this.at++;
    this.space();
    return out;
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

  /** Reads a number. Like Python it takes NaN, Infinity and -Infinity, and has no negative zero among ints. */
  number(): JsonNumber {
    NUMBER.lastIndex = this.at;
    const match = NUMBER.exec(this.text);
    if (match === null) this.fail("a value");
    const [literal, fraction, exponent] = match;
    const isInt = fraction === undefined && exponent === undefined && !/[NI]/.test(literal);
    if (isInt && literal.length > MAX_INT_DIGITS) this.fail(`at most ${MAX_INT_DIGITS} digits`);
    this.at += literal.length;
    this.space();
    return { value: isInt ? Number(literal) + 0 : Number(literal), isInt, literal };
  }

  /** Reads a non-negative int below 2^53, or skips another value and gives undefined. */
  count(): number | undefined {
    const start = this.at;
    let value = 0;
    for (; this.at < start + SAFE_DIGITS; this.at++) {
      const digit = this.text.charCodeAt(this.at) - 0x30;
      if (!(digit >= 0 && digit <= 9)) break;
      value = value * 10 + digit;
    }
    const next = this.text[this.at];
    // The common case without a regular expression; everything else takes the long way.
    if (this.at > start && (next === "," || next === "]") && (this.at === start + 1 || this.text[start] !== "0")) {
      return value;
    }
    this.at = start;
    if (this.kind() !== "number") {
      this.skip();
      return undefined;
    }
    const number = this.number();
    return number.isInt && number.value >= 0 && Number.isSafeInteger(number.value) ? number.value : undefined;
  }

  /** Reads true, false or null. */
  word(): true | false | null {
    const [word, value] = WORDS[this.text[this.at] as keyof typeof WORDS] ?? this.fail("a value");
    if (!this.text.startsWith(word, this.at)) this.fail("a value");
    this.at += word.length;
    this.space();
    return value;
  }

  /** Throws FormatError unless the text is at its end. */
  end(): void {
    if (this.at < this.text.length) this.fail("nothing after the value");
  }

  /** For callers that want every key once. */
  duplicate(key: string): never {
    const shown = JSON.stringify(key.slice(0, 200));
    throw new FormatError(this.format, this.where, `invalid JSON before ${this.at}: the key ${shown} comes twice`);
  }

  private take(c: string): boolean {
    if (this.text[this.at] !== c) return false;
    this.at++;
    this.space();
    return true;
  }

  private space(): void {
    for (; ; this.at++) {
      const c = this.text.charCodeAt(this.at);
      if (c !== 0x20 && c !== 0x0a && c !== 0x0d && c !== 0x09) return;
    }
  }

  private fail(expected: string): never {
    const rest = this.text.slice(this.at, this.at + 20);
    const found = this.at >= this.text.length ? "the end of the text" : JSON.stringify(rest);
    throw new FormatError(this.format, this.where, `invalid JSON at ${this.at}: expected ${expected}, found ${found}`);
  }
}
