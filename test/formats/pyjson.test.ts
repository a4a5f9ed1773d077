import { readFileSync } from "node:fs";
import { describe, expect, it } from "vitest";
import { ArgumentError, FormatError } from "#halfbyte/core/errors.js";
import { MAX_JSON_DEPTH } from "#halfbyte/quant/json-reader.js";
import {
  compareCodePoints,
  dumpPyJson,
  fromPlain,
  PyFloat,
  type PyJson,
  parsePyJson,
  parsePyJsonBytes,
  pyFloat,
  pyFloatRepr,
  toPlain,
} from "#halfbyte/quant/pyjson.js";

const parse = (text: string) => parsePyJson(text, "test", "text");
const round = (text: string) => dumpPyJson(parse(text));

describe("pyFloatRepr", () => {
  it("prints every double of the fixture as Python does", () => {
    const fixture = new URL("../fixtures/pyrepr.json", import.meta.url);
    const reprs = (JSON.parse(readFileSync(fixture, "utf8")) as { reprs: string }).reprs.split(" ");
    expect(reprs.length).toBeGreaterThan(2500);
    expect(reprs.filter((repr) => repr.includes("e")).length).toBeGreaterThan(1000);
    expect(reprs.filter((repr) => pyFloatRepr(Number(repr)) !== repr)).toEqual([]);
  });

  it.each([
    [1e-5, "1e-05"],
    [1, "1.0"],
    [-0, "-0.0"],
    [1.5e-7, "1.5e-07"],
    [0.0001, "0.0001"],
    [1e16, "1e+16"],
    [9999999999999998, "9999999999999998.0"],
    [1e15, "1000000000000000.0"],
    [5e-324, "5e-324"],
    [1.7976931348623157e308, "1.7976931348623157e+308"],
    [Number.POSITIVE_INFINITY, "Infinity"],
    [Number.NEGATIVE_INFINITY, "-Infinity"],
    [Number.NaN, "NaN"],
  ])("%s is %s", (value, text) => expect(pyFloatRepr(value)).toBe(text));
});

describe("dumpPyJson", () => {
  it("separates and escapes as json.dumps does", () => {
    const value = new Map<string, PyJson>([
      ["a", [1, pyFloat(2), null, true, false, 12345678901234567890n]],
      ['q"\\\n\r\t\b\f\u0001\u007fé😀', "ÿ"],
      ["__proto__", new Map()],
      ["empty", []],
    ]);
    expect(dumpPyJson(value)).toBe(
      '{"a": [1, 2.0, null, true, false, 12345678901234567890], ' +
        '"q\\"\\\\\\n\\r\\t\\b\\f\\u0001\\u007f\\u00e9\\ud83d\\ude00": "\\u00ff", "__proto__": {}, "empty": []}',
    );
  });

  it("indents and sorts keys by code point", () => {
    const value = new Map<string, PyJson>([
      ["b", [1, new Map([["z", 1]])]],
      ["𝒳", 1],
      ["\uffff", 2],
      ["B", new Map()],
    ]);
    expect(dumpPyJson(value, { indent: 2, sortKeys: true })).toBe(
      '{\n  "B": {},\n  "b": [\n    1,\n    {\n      "z": 1\n    }\n  ],\n  "\\uffff": 2,\n  "\\ud835\\udcb3": 1\n}',
    );
  });

  it.each([1.5, Number.NaN, 2 ** 53, Number.POSITIVE_INFINITY])("refuses the plain number %s", (value) =>
    expect(() => dumpPyJson([value])).toThrow(ArgumentError),
  );
});

describe("parsePyJson", () => {
  it("tells ints, floats and big ints apart", () => {
    expect(parse("[1, -0, 1.0, 1e2, -0.0, 9007199254740993]")).toEqual([
      1,
      0,
      pyFloat(1),
      pyFloat(100),
      pyFloat(-0),
      9007199254740993n,
    ]);
    expect(Object.is((parse("[-0]") as number[])[0], 0)).toBe(true);
  });

  it("reads what Python writes beyond JSON", () => {
    expect(round("[NaN, Infinity, -Infinity]")).toBe("[NaN, Infinity, -Infinity]");
  });

  it.each([
    '{"a": 1, "b": [1.0, 1e-05, "x"]}',
    '"\\u00e9\\ud83d\\ude00\\u007f\\"\\\\"',
    "[]",
    "{}",
    "null",
    "-12",
    '{"": {"": []}}',
    '{"__proto__": {"constructor": 1}}',
  ])("round-trips %s", (text) => expect(round(text)).toBe(text));

  it("takes any JSON white space and any escape", () => {
    expect(round(" \t\r\n[ 1 ,\n2 ]\n")).toBe("[1, 2]");
    expect(parse('"\\/\\b\\f\\n\\r\\t\\u0041"')).toBe("/\b\f\n\r\tA");
  });

  it.each([
    "",
    " ",
    "{",
    "[1,]",
    '{"a":1,}',
    '{"a" 1}',
    "{a: 1}",
    "{'a': 1}",
    '{"a":1,"a":2}',
    "[1] 2",
    "01",
    "1.",
    ".5",
    "+1",
    "--1",
    "1e",
    "0x10",
    "nul",
    "True",
    "undefined",
    "nan",
    '"abc',
    '"\\x"',
    '"\\u12"',
    '"\\ud800"',
    '"\\udc00\\ud800"',
    '"a\nb"',
    '"\0"',
    "\ufeff{}",
    "[1 2]",
    `[${"9".repeat(4301)}]`,
  ])("refuses %j", (text) => expect(() => parse(text)).toThrow(FormatError));

  it("says where", () => {
    expect(() => parse('{"a": 1, "a": 2}')).toThrow(/^\[test\] text: invalid JSON before 14: the key "a" comes twice/);
    expect(() => parse("[1, ")).toThrow(/at 4: expected a value, found the end of the text/);
  });

  it("bounds nesting without a stack overflow", () => {
    const nested = (depth: number) => "[".repeat(depth) + "]".repeat(depth);
    expect(parse(nested(MAX_JSON_DEPTH))).toBeInstanceOf(Array);
    expect(() => parse(nested(MAX_JSON_DEPTH + 2))).toThrow(FormatError);
    expect(() => parse("[".repeat(1_000_000))).toThrow(FormatError);
    expect(() => parse('{"a":'.repeat(1_000_000))).toThrow(FormatError);
  });

  it("refuses bytes that are not UTF-8", () => {
    expect(() => parsePyJsonBytes(Uint8Array.of(0x22, 0xff, 0x22), "test", "bytes")).toThrow(/not valid UTF-8/);
    expect(() => parsePyJsonBytes(Uint8Array.of(0xef, 0xbb, 0xbf, 0x31), "test", "bytes")).toThrow(FormatError);
    expect(parsePyJsonBytes(new TextEncoder().encode('"é"'), "test", "bytes")).toBe("é");
  });
});

describe("plain values", () => {
  it("loses only the difference between ints and floats", () => {
    const text = '{"a": 1.0, "b": 0.5, "c": [null, true, "x"], "__proto__": 3, "big": 12345678901234567890}';
    const plain = toPlain(parse(text)) as Record<string, unknown>;
    expect(plain).toMatchObject({ a: 1, b: 0.5, c: [null, true, "x"], big: 12345678901234567000 });
    expect(Object.keys(plain)).toContain("__proto__");
    expect(Object.getPrototypeOf(plain)).toBe(Object.prototype);
    const back = fromPlain({ a: 1, b: 0.5, c: [null, null], gone: undefined, f: pyFloat(2) });
    expect(dumpPyJson(back)).toBe('{"a": 1, "b": 0.5, "c": [null, null], "f": 2.0}');
    expect((back as ReadonlyMap<string, PyJson>).get("b")).toBeInstanceOf(PyFloat);
    expect(() => fromPlain({ f: () => 1 })).toThrow(ArgumentError);
  });

  it("orders strings by code point", () => {
    const sorted = ["a", "ab", "B", "", "é", "\uffff", "𝒳", "\ud7ff"].sort(compareCodePoints);
    expect(sorted).toEqual(["", "B", "a", "ab", "é", "\ud7ff", "\uffff", "𝒳"]);
    expect(compareCodePoints("x", "x")).toBe(0);
  });
});
