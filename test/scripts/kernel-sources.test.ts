// biome-ignore-all lint/suspicious/noTemplateCurlyInString: the strings are source text
/** The kernels' fingerprint: what changes it, and what does not. */
import { cpSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { COMPILE_OPTIONS, GEOMETRY, kernelFingerprint, kernelSources, ROOT } from "../../scripts/kernel-sources.mjs";
import { tokens } from "../../scripts/lex.mjs";

const cpp = (text: string): string[] => tokens(text, "cpp");
const ts = (text: string): string[] => tokens(text, "ts");

describe("C++ without comments and blank space", () => {
  test.each([
    ["a line comment", "int a; // b\nint c;", "int a;\nint c;"],
    ["a block comment is a blank", "int/**/a;", "int a;"],
    ["a comment with quotes", "a /* don't \" */ b", "a b"],
    ["a comment carried on by a backslash", "a // b \\\n still\nc", "a\nc"],
    ["blank space at brackets", "f( a,b ) { }", "f(a, b){}"],
    ["a joined line", "int a\\\n = 1;", "int a = 1;"],
    ["Windows line ends", "int a;\r\n#define X 1\r\n", "int a;\n#define X 1\n"],
    ["blanks in a directive", "#  define   X /* c */ 1 // d\n", "#define X 1\n"],
    ["a directive over two lines", "#define X(a) \\\n  (a)", "#define X(a)   (a)"],
    ["a comment over a directive's line end", "#define X /*\n*/ 1", "#define X 1"],
    ["an indented directive", "  #pragma once\nint a;", "#pragma once\n\n\nint a;"],
  ])("%s", (_, one, other) => {
    expect(cpp(one)).toEqual(cpp(other));
  });

  test.each([
    ["an operator", "a + b", "a - b"],
    ["a number's digit", "1.5f", "1.6f"],
    ["names run together", "unsigned x", "unsignedx"],
    ["operators run together", "a + +b", "a ++b"],
    ["a comment in a string", '"/* a */"', '"/* b */"'],
    ["blanks in a string", '"a  b"', '"a b"'],
    ["a string against its characters", '"a" "b"', '"a\\" \\"b"'],
    ["slashes in a string", 'f("//"); g();', 'f("//"); h();'],
    ["an escaped quote", '"\\"//" + a', '"\\"//" + b'],
    ["a quote as a character", "'\"' + a; // \"", "'\"' + b; // \""],
    ["a raw string", 'R"x( // a )" )x"', 'R"x( // b )" )x"'],
    ["a macro with and without arguments", "#define F(x) 1", "#define F (x) 1"],
    ["where a directive ends", "#define X 1\nint a;", "#define X 1 int a;"],
    ["code after a comment that looks like a directive", "// #if 0\na", "// #if 0\nb"],
    ["the order of statements", "a; b;", "b; a;"],
    ["text that moves across a comment", "/* a */ b", "/* b */ a"],
  ])("%s counts", (_, one, other) => {
    expect(cpp(one)).not.toEqual(cpp(other));
  });

  test("tokens as the compiler sees them", () => {
    const source = 'x<<=1\'000u+.5e-3f; asm("rcp.rn.f32 %0;" : "=f"(r)); p->q::z(u8"a", L\'b\');';
    expect(cpp(source).join(" ")).toBe(
      'x <<= 1\'000u + .5e-3f ; asm ( "rcp.rn.f32 %0;" : "=f" ( r ) ) ; p -> q :: z ( u8"a" , L\'b\' ) ;',
    );
    expect(cpp("#define CAT(a, b) a ## b\nCAT(x, y)")).toEqual([
      "#define CAT(a, b) a ## b",
      "CAT",
      "(",
      "x",
      ",",
      "y",
      ")",
    ]);
  });

  test.each([
    ["int a;\n/* b", "line 2: a comment does not end"],
    ['"a\n"', "line 1: a string does not end"],
    ['R"(a', "line 1: a raw string does not end"],
  ])("%j is refused", (text, message) => {
    expect(() => cpp(text)).toThrow(message);
  });
});

describe("TypeScript without comments and blank space", () => {
  test.each([
    ["comments", "/** doc */ const a = 1; // b", "const a=1;"],
    ["a template's expression", "`a${ b /* c */ }d`", "`a${b}d`"],
    ["braces within it", "`${ { a: 1 } }`", "`${{a:1}}`"],
    ["a template within a template", "`${ `x${ y }` }`", "`${`x${y}`}`"],
    ["lines", "f(a,\n  b)\n", "f(a, b)"],
  ])("%s", (_, one, other) => {
    expect(ts(one)).toEqual(ts(other));
  });

  test.each([
    ["a template's text", "`a  b`", "`a b`"],
    ["a comment in a template's text", "`// a`", "`// b`"],
    ["a template's expression", "`${a}`", "`${b}`"],
    ["code after a template", "`${a}` + b // `", "`${a}` + c // `"],
    ["a regular expression", "x = /[/*]a/.test(y)", "x = /[/*]b/.test(y)"],
    ["code after a division", "a / b; c / d // e", "a / b; c / f // e"],
    ["code after a counter's division", "a++ / b; '/'", "a++ / c; '/'"],
    ["a line's end that ends a statement", "return\na", "return a"],
    ["a line's end before ++", "a\n++b", "a ++b"],
  ])("%s counts", (_, one, other) => {
    expect(ts(one)).not.toEqual(ts(other));
  });

  test("every source of the cuda backend has an end", () => {
    for (const file of ["kernels", "layout", "images", "addon"]) {
      const found = ts(readFileSync(join(ROOT, `src/backend/cuda/${file}.ts`), "utf8"));
      expect(found.length).toBeGreaterThan(100);
      expect(found.filter((token) => /^\/[/*]/.test(token))).toEqual([]);
    }
  });
});

describe("fingerprint", () => {
  let root: string;
  const path = (file: string): string => join(root, file);
  const edit = (file: string, change: (text: string) => string): void => {
    const before = readFileSync(path(file), "utf8");
    const after = change(before);
    expect(after).not.toBe(before);
    writeFileSync(path(file), after);
  };

  const KERNEL = "csrc/kernels/a.cu";
  const HEADER = "csrc/kernels/common.cuh";
  const GENERATED = "csrc/kernels/generated/constants.cuh";

  beforeEach(() => {
    root = mkdtempSync(join(tmpdir(), "halfbyte-sources-"));
    const texts = { [KERNEL]: "// a\nint a = 1;\n", [HEADER]: "#pragma once\n", [GENERATED]: "constexpr int N = 4;\n" };
    for (const [file, text] of Object.entries(texts)) {
      mkdirSync(dirname(path(file)), { recursive: true });
      writeFileSync(path(file), text);
    }
    for (const file of GEOMETRY) cpSync(join(ROOT, file), path(file));
  });
  afterEach(() => rmSync(root, { recursive: true }));

  test("of a kernel, a header, a generated header: code changes it, comments and layout do not", () => {
    for (const file of [KERNEL, HEADER, GENERATED]) {
      const before = [kernelSources({ root }), kernelFingerprint({ root })];
      edit(file, (text) => `/* new */\n\n${text.replaceAll(" ", "  ")}// end`);
      expect([kernelSources({ root }), kernelFingerprint({ root })]).toEqual(before);
      edit(file, (text) => `${text}\nint more;`);
      expect(kernelSources({ root })).not.toBe(before[0]);
      expect(kernelFingerprint({ root })).not.toBe(before[1]);
    }
  });

  test("the launch geometry is in the fingerprint alone", () => {
    for (const file of GEOMETRY) {
      const [sources, fingerprint] = [kernelSources({ root }), kernelFingerprint({ root })];
      edit(file, (text) => `// new\n${text}`);
      expect(kernelFingerprint({ root })).toBe(fingerprint);
      edit(file, (text) => `${text}\nexport const MORE = 1;`);
      expect(kernelFingerprint({ root })).not.toBe(fingerprint);
      expect(kernelSources({ root })).toBe(sources);
    }
  });

  test("an option, a new file and a file's name count", () => {
    const before = kernelSources({ root });
    expect(kernelSources({ root, options: [...COMPILE_OPTIONS, "-use_fast_math"] })).not.toBe(before);
    writeFileSync(path("csrc/kernels/b.cu"), "");
    const more = kernelSources({ root });
    expect(more).not.toBe(before);
    rmSync(path("csrc/kernels/b.cu"));
    writeFileSync(path("csrc/kernels/c.cu"), "");
    expect(kernelSources({ root })).not.toBe(more);
  });

  test("nothing is hashed where something is missing", () => {
    rmSync(path("csrc/kernels/generated"), { recursive: true });
    expect(() => kernelSources({ root })).toThrow("run `npm run generate` first");
    rmSync(path("csrc"), { recursive: true });
    expect(() => kernelSources({ root })).toThrow("has no kernels");
  });

  test("a file that cannot be read to its end is named", () => {
    writeFileSync(path(GEOMETRY[1]!), "/* open");
    expect(() => kernelFingerprint({ root })).toThrow(`${GEOMETRY[1]}: line 1: a comment does not end`);
  });

  test("of this tree: contraction, flushing and approximate division are off", () => {
    expect(kernelFingerprint()).toMatch(/^[0-9a-f]{64}$/);
    expect(COMPILE_OPTIONS).toEqual(
      expect.arrayContaining(["-fmad=false", "-prec-div=true", "-prec-sqrt=true", "-ftz=false"]),
    );
  });
});
