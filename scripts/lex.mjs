/**
 * Source text as the compiler sees it: the tokens of C++/CUDA or TypeScript without comments and blank space. Two texts have
 * the same tokens exactly when they differ in comments and layout alone; where blank space means something (the lines of the
 * preprocessor, a line's end after `return` in TypeScript) it is a token.
 */

/** Those of several characters, longest first, so that the first match is the longest. */
const PUNCTUATORS = {
  cpp: "<=> ->* ... <<= >>= :: -> ++ -- << >> <= >= == != && || += -= *= /= %= &= |= ^= .*".split(" "),
  ts: ">>>= ... === !== **= <<= >>= >>> &&= ||= ??= => == != <= >= && || ?? ?. ++ -- += -= *= /= %= &= |= ^= << >> **".split(
    " ",
  ),
};

const IDENTIFIER = /[\p{ID_Start}_$#][\p{ID_Continue}$\u200c\u200d]*/uy;
const NUMBER = { cpp: /\.?\d(?:[eEpP][+-]|'?[\w.])*/y, ts: /\.?\d(?:[eE][+-]|[\w.])*/y };
const RAW_STRING = /(?:u8|[uUL])?R"([^()\\\s]{0,16})\(/y;
const STRING_PREFIX = /(?:u8|[uUL])?(?=["'])/y;
const BLANK = /\s+/y;
/** A division cannot follow these words; a regular expression can. */
const BEFORE_REGEX =
  /^(?:return|typeof|instanceof|in|of|new|delete|void|throw|case|do|else|yield|await|extends|default)$/;
/** A statement of these ends with its line. */
const RESTRICTED = /^(?:return|break|continue|throw|yield|async)$/;

/**
 * The tokens of a source text.
 * @param {string} text
 * @param {"cpp" | "ts"} language
 * @returns {string[]}
 * @throws {Error} a comment, string or template that does not end, with its line
 */
export function tokens(text, language) {
  const lexer = new Lexer(text.replace(/\r\n?/g, "\n"), language);
  return lexer.all();
}

class Lexer {
  constructor(text, language) {
    this.text = text;
    this.cpp = language === "cpp";
    this.language = language;
    this.at = 0;
    this.found = [];
  }

  all() {
    this.until(undefined);
    return this.found;
  }

  /** Takes tokens to the end, or to the brace that closes a template's expression. */
  until(closing) {
    let depth = 0;
    let startOfLine = true;
    while (true) {
      const from = this.at;
      const newline = this.blank();
      if (newline) startOfLine = true;
      if (this.at >= this.text.length) {
        if (closing) this.fail(from, "a template's expression");
        return;
      }
      if (this.cpp && startOfLine && this.text[this.at] === "#") {
        this.directive();
        startOfLine = true;
        continue;
      }
      if (!this.cpp && newline && this.meaningfulNewline()) this.found.push("\n");
      startOfLine = false;
      const char = this.text[this.at];
      if (closing && char === "}" && depth === 0) return;
      if (char === "{") depth++;
      if (char === "}") depth--;
      this.found.push(this.token());
    }
  }

  /** Passes comments and blank space; whether a line ended there. */
  blank() {
    let newline = false;
    while (this.at < this.text.length) {
      const { text, at } = this;
      if (this.cpp && text.startsWith("\\\n", at)) this.at += 2;
      else if (text.startsWith("//", at)) this.lineComment();
      else if (text.startsWith("/*", at)) newline = this.blockComment() || newline;
      else {
        const space = this.match(BLANK);
        if (space === undefined) break;
        newline ||= space.includes("\n");
      }
    }
    return newline;
  }

  lineComment() {
    // In C++ a backslash before the line's end carries the comment on.
    do this.at = this.indexOf("\n", this.at + 1);
    while (this.cpp && this.text[this.at - 1] === "\\" && this.at < this.text.length);
  }

  blockComment() {
    const end = this.text.indexOf("*/", this.at + 2);
    if (end < 0) this.fail(this.at, "a comment");
    const newline = this.text.slice(this.at, end).includes("\n");
    this.at = end + 2;
    return newline;
  }

  indexOf(what, from) {
    const index = this.text.indexOf(what, from);
    return index < 0 ? this.text.length : index;
  }

  /** A line of the preprocessor: one token, its blank space single, since `#define F(x)` is not `#define F (x)`. */
  directive() {
    let line = "";
    while (this.at < this.text.length && this.text[this.at] !== "\n") {
      line += this.directiveBlank() ? " " : this.token();
    }
    this.found.push(line.trimEnd().replace(/^# /, "#"));
  }

  /** Blank space within a directive; a block comment may reach over line ends, as in any compiler. */
  directiveBlank() {
    const from = this.at;
    while (true) {
      const { text, at } = this;
      if (text.startsWith("\\\n", at)) this.at += 2;
      else if (text.startsWith("//", at)) this.lineComment();
      else if (text.startsWith("/*", at)) this.blockComment();
      else if (text[at] !== "\n" && this.match(/[^\S\n]+/y) !== undefined) continue;
      else return this.at > from;
    }
  }

  /** TypeScript puts a semicolon at a line's end in few places that parse without it as well. */
  meaningfulNewline() {
    const before = this.found.at(-1);
    if (before === undefined) return false;
    const next = this.text.slice(this.at, this.at + 2);
    return RESTRICTED.test(before) || next === "++" || next === "--";
  }

  token() {
    if (this.cpp) {
      const raw = this.raw();
      if (raw !== undefined) return raw;
      const prefix = this.match(STRING_PREFIX);
      if (prefix !== undefined) return prefix + this.string();
    } else {
      const char = this.text[this.at];
      if (char === '"' || char === "'") return this.string();
      if (char === "`") return this.template();
      if (char === "/" && this.regexPossible()) return this.regex();
    }
    return this.match(NUMBER[this.language]) ?? this.match(IDENTIFIER) ?? this.punctuator();
  }

  match(pattern) {
    pattern.lastIndex = this.at;
    const found = pattern.exec(this.text)?.[0];
    if (found !== undefined) this.at += found.length;
    return found;
  }

  raw() {
    RAW_STRING.lastIndex = this.at;
    const opening = RAW_STRING.exec(this.text);
    if (opening === null) return undefined;
    const closing = `)${opening[1]}"`;
    const end = this.text.indexOf(closing, this.at + opening[0].length);
    if (end < 0) this.fail(this.at, "a raw string");
    return this.take(end + closing.length);
  }

  take(end) {
    const token = this.text.slice(this.at, end);
    this.at = end;
    return token;
  }

  string() {
    const quote = this.text[this.at];
    let end = this.at + 1;
    while (this.text[end] !== quote) {
      if (end >= this.text.length || this.text[end] === "\n") this.fail(this.at, "a string");
      end += this.text[end] === "\\" ? 2 : 1;
    }
    return this.take(end + 1);
  }

  /** A template's text is kept as it stands; its expressions are tokens between `${` and `}`. */
  template() {
    const start = this.at;
    let chunk = this.at++;
    while (this.text[this.at] !== "`") {
      if (this.at >= this.text.length) this.fail(start, "a template");
      if (this.text.startsWith("${", this.at)) {
        this.at += 2;
        this.found.push(this.text.slice(chunk, this.at));
        this.until("}");
        chunk = this.at++;
      } else this.at += this.text[this.at] === "\\" ? 2 : 1;
    }
    this.at++;
    return this.text.slice(chunk, this.at);
  }

  /** Whether a slash begins a regular expression: not after what can end an operand. `if (a) /b/` is taken for a division. */
  regexPossible() {
    const before = this.found.at(-1);
    if (before === undefined || BEFORE_REGEX.test(before)) return true;
    return before !== "++" && before !== "--" && !/[\p{ID_Continue}$)\]}"'`]$/u.test(before);
  }

  regex() {
    let end = this.at + 1;
    let inClass = false;
    while (inClass || this.text[end] !== "/") {
      const char = this.text[end];
      if (char === undefined || char === "\n") this.fail(this.at, "a regular expression");
      if (char === "[") inClass = true;
      if (char === "]") inClass = false;
      end += char === "\\" ? 2 : 1;
    }
    while (/[a-z]/.test(this.text[end + 1] ?? "")) end++;
    return this.take(end + 1);
  }

  punctuator() {
    const found = PUNCTUATORS[this.language].find((p) => this.text.startsWith(p, this.at));
    return this.take(this.at + (found?.length ?? String.fromCodePoint(this.text.codePointAt(this.at)).length));
  }

  fail(at, what) {
    const line = this.text.slice(0, at).split("\n").length;
    throw new Error(`line ${line}: ${what} does not end`);
  }
}
