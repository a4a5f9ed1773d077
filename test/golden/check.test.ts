/** `checkGolden` on bitsandbytes' own results, on damaged copies of them, and on what is no golden file at all. */

import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { memory, shutdown } from "#halfbyte/backend/devices.js";
import { ArgumentError, DeviceError, FormatError } from "#halfbyte/core/errors.js";
import { checkGolden } from "#halfbyte/golden/check.js";
import { isPassed } from "#halfbyte/golden/report.js";
import {
  bytesOf,
  type CaseFields,
  type Editable,
  loadReal,
  makeFile,
  REAL_DIR,
  REAL_FILE,
  serialize,
  withDir,
  wordsOf,
} from "./files.js";

let real: Editable;
beforeAll(async () => {
  real = await loadReal();
});
afterAll(shutdown);

/** A copy that may be changed. */
function copy(cases = real.cases): Editable {
  return { ...real, cases: structuredClone(cases), data: real.data.slice() };
}

const check = (file: Editable, options = {}) =>
  withDir({ [REAL_FILE]: serialize(file) }, (dir) => checkGolden(dir, { device: "cpu", ...options }));

/** The index of the case whose codes (or codebook) this tensor is. */
function indexOf(tensor: string): number {
  const results = (c: CaseFields) => (c.op === "codebook" ? [c.code] : [c.packed, c.q]);
  const index = real.cases.findIndex((c) => results(c).includes(tensor));
  if (index < 0) throw new Error(`no case with ${tensor}`);
  return index;
}

describe("bitsandbytes' vectors", () => {
  test("all 330 cases of quantization pass, with the known number of ties, and nothing leaks", async () => {
    const seen: string[] = [];
    const report = await withDir({ [REAL_FILE]: serialize(real) }, (dir) =>
      checkGolden(dir, { device: "cpu", onOp: (op, { passed }) => seen.push(`${op} ${passed}`) }),
    );
    expect(report.failures).toEqual([]);
    expect(report.notRun).toEqual([]);
    expect(report.ops).toEqual({
      codebook: { passed: 9, failed: 0, notRun: 0, ties: 0 },
      quantize_4bit: { passed: 144, failed: 0, notRun: 0, ties: 14 },
      quantize_blockwise: { passed: 171, failed: 0, notRun: 0, ties: 15 },
      quantize_4bit_nested: { passed: 6, failed: 0, notRun: 0, ties: 3 },
    });
    expect(seen).toEqual(["codebook 9", "quantize_4bit 144", "quantize_blockwise 171", "quantize_4bit_nested 6"]);
    expect(isPassed(report)).toBe(true);
    expect(memory().cpu).toMatchObject({ tensors: 0, bytes: 0 });
  });

  test("one case by its name, with or without the extension", async () => {
    for (const file of [REAL_FILE, "blockwise"]) {
      const report = await checkGolden(REAL_DIR, { only: `${file}:9` });
      expect(report.ops).toEqual({ quantize_4bit: { passed: 1, failed: 0, notRun: 0, ties: expect.any(Number) } });
    }
    for (const only of ["blockwise:330", "blockwise", "other:1", "blockwise:-1", "blockwise:01", ":"]) {
      await expect(checkGolden(REAL_DIR, { only }), only).rejects.toThrow(ArgumentError);
    }
  });

  test("an aborted signal stops it, an unknown device is refused", async () => {
    const reason = new Error("enough");
    await expect(checkGolden(REAL_DIR, { signal: AbortSignal.abort(reason) })).rejects.toBe(reason);
    await expect(checkGolden(REAL_DIR, { device: "tpu" as "cpu" })).rejects.toThrow(DeviceError);
    expect(memory().cpu?.tensors).toBe(0);
  });
});

interface Damage {
  readonly what: string;
  readonly tensor: string;
  /** A tensor of the case that must fail, where it is not `tensor`. */
  readonly of: string;
  /** Bits to flip, by byte. */
  readonly byte: number;
  readonly flip: number;
  readonly field: string;
  readonly index: number;
}

const NF4 = "q4/f32/normal/nf4/64";
const FP4 = "q4/bf16/heavy/fp4/4096";
const Q8 = "q8/f16/normal/dynamic/256";
const NESTED = "nested/bf16/fp4";
const STATE = `${NESTED}/state`;
const DAMAGES: readonly Damage[] = [
  // A neighbouring code, so that only the tie proof can tell.
  {
    what: "a 4-bit code",
    tensor: `${NF4}/packed`,
    of: `${NF4}/packed`,
    byte: 10,
    flip: 0x01,
    field: "packed",
    index: 21,
  },
  {
    what: "a 4-bit code, high nibble",
    tensor: `${FP4}/packed`,
    of: `${FP4}/packed`,
    byte: 7,
    flip: 0x80,
    field: "packed",
    index: 14,
  },
  {
    what: "the pad nibble",
    tensor: `${NF4}/packed`,
    of: `${NF4}/packed`,
    byte: 2304,
    flip: 0x01,
    field: "packed",
    index: 4609,
  },
  {
    what: "a 4-bit scale",
    tensor: `${NF4}/absmax`,
    of: `${NF4}/packed`,
    byte: 4 * 33,
    flip: 0x01,
    field: "absmax",
    index: 33,
  },
  {
    what: "a 4-bit value",
    tensor: `${FP4}/dequant`,
    of: `${FP4}/packed`,
    byte: 2 * 4608,
    flip: 0x01,
    field: "dequant",
    index: 4608,
  },
  { what: "an 8-bit code", tensor: `${Q8}/q`, of: `${Q8}/q`, byte: 4000, flip: 0x01, field: "q", index: 4000 },
  {
    what: "an 8-bit scale",
    tensor: `${Q8}/absmax`,
    of: `${Q8}/q`,
    byte: 4 * 18 + 3,
    flip: 0x80,
    field: "absmax",
    index: 18,
  },
  { what: "an 8-bit value", tensor: `${Q8}/dequant`, of: `${Q8}/q`, byte: 1, flip: 0x80, field: "dequant", index: 0 },
  {
    what: "a codebook",
    tensor: "code/ulinear",
    of: "code/ulinear",
    byte: 4 * 200,
    flip: 0x02,
    field: "code",
    index: 200,
  },
  {
    what: "a nested scale's code",
    tensor: `${STATE}/absmax`,
    of: `${NESTED}/packed`,
    byte: 959,
    flip: 0x01,
    field: "state.absmax",
    index: 959,
  },
  {
    what: "a scale of scales",
    tensor: `${STATE}/nested_absmax`,
    of: `${NESTED}/packed`,
    byte: 8,
    flip: 0x01,
    field: "state.nested_absmax",
    index: 2,
  },
  {
    what: "the quant map",
    tensor: `${STATE}/quant_map`,
    of: `${NESTED}/packed`,
    byte: 4 * 8 + 3,
    flip: 0x80,
    field: "state.quant_map",
    index: 8,
  },
  {
    what: "the nested map",
    tensor: `${STATE}/nested_quant_map`,
    of: `${NESTED}/packed`,
    byte: 4,
    flip: 0x01,
    field: "state.nested_quant_map",
    index: 1,
  },
  {
    what: "the state's JSON",
    tensor: `${STATE}/quant_state.bitsandbytes__fp4`,
    of: `${NESTED}/packed`,
    byte: 30,
    flip: 0x01,
    field: "state.quant_state.bitsandbytes__fp4",
    index: 30,
  },
];

describe("a damaged copy fails and names the tensor and the element", () => {
  for (const { what, tensor, of, byte, flip, field, index } of DAMAGES) {
    test(what, async () => {
      const wanted = indexOf(of);
      const file = copy();
      file.cases = [wanted, 8, 152, 153, 324, 329].map((i) => file.cases[i]!);
      const bytes = bytesOf(file, tensor);
      bytes[byte] = bytes[byte]! ^ flip;
      const report = await check(file);
      expect(report.failures.length).toBeGreaterThan(0);
      // The damaged tensor comes first; what was decoded from it may follow. No other case fails.
      expect(report.failures[0]).toMatchObject({
        file: REAL_FILE,
        case: 0,
        field,
        tensor,
        mismatches: 1,
        worst: { index },
      });
      expect(new Set(report.failures.map((f) => f.case))).toEqual(new Set([0]));
      const failed = Object.values(report.ops).reduce((sum, { failed }) => sum + failed, 0);
      expect(failed).toBe(1);
      expect(isPassed(report)).toBe(false);
      expect(memory().cpu?.tensors).toBe(0);
    });
  }

  test("the worst element of several is the one furthest off", async () => {
    const file = copy([real.cases[indexOf(`${NF4}/packed`)]!]);
    const words = wordsOf(file, `${NF4}/absmax`);
    for (const [at, ulps] of [
      [3, 2],
      [40, 90],
      [72, 17],
    ] as const)
      words.setUint32(4 * at, words.getUint32(4 * at, true) + ulps, true);
    const { failures } = await check(file);
    const { expectedBits, gotBits } = failures[0]!.worst!;
    expect(failures[0]).toMatchObject({ field: "absmax", mismatches: 3, elements: 73, worst: { index: 40, ulps: 90 } });
    expect(Number(expectedBits) - Number(gotBits)).toBe(90);
  });

  test("a mean of the scales may be 2 ulp off, but not 3, and the rest has to follow from it", async () => {
    const name = `${NESTED}/packed`;
    const offset = `${NESTED}/offset`;
    const shifted = async (ulps: number) => {
      const file = copy([real.cases[indexOf(name)]!]);
      const words = wordsOf(file, offset);
      words.setUint32(0, words.getUint32(0, true) + ulps, true);
      return check(file);
    };
    const near = await shifted(1);
    expect(near.failures.map((f) => f.field)).not.toContain("offset");
    expect(near.failures.map((f) => f.field)).toContain("state.quant_state.bitsandbytes__fp4");
    const far = await shifted(5);
    expect(far.failures[0]).toMatchObject({ field: "offset", tensor: offset, mismatches: 1 });
  });
});

describe("a case that is not what its op needs has failed", () => {
  const changes: readonly [string, CaseFields, RegExp][] = [
    ["no such tensor", { packed: "nowhere" }, /packed names "nowhere", which is not in the file/],
    ["a key is missing", { absmax: undefined }, /absmax is missing: expected a text/],
    ["a tensor of another dtype", { absmax: `${NF4}/packed` }, /absmax is U8 \[2305, 1\]: expected f32/],
    ["a tensor of another size", { absmax: "q4/f32/normal/nf4/32/absmax" }, /has shape \[145\], computed \[73\]/],
    ["an unknown type", { quant_type: "int4" }, /quant_type is "int4": expected nf4 or fp4/],
    ["a block size that is none", { blocksize: 65 }, /blocksize: expected one of 32, .* received 65/],
    ["a block size of another kind", { blocksize: "64" }, /blocksize is "64": expected a number/],
    ["a dtype that is not the operand's", { dtype: "f16" }, /input is f32, but the case says f16/],
    [
      "a decoded value of another dtype",
      { dequant: "q4/f16/normal/nf4/64/dequant" },
      /dequant is F16 \[4609\]: expected f32/,
    ],
  ];
  for (const [what, change, problem] of changes) {
    test(what, async () => {
      const good = real.cases[indexOf(`${NF4}/packed`)]!;
      const report = await check(copy([{ ...good, ...change }, good]));
      expect(report.ops).toMatchObject({ quantize_4bit: { passed: 1, failed: 1, notRun: 0 } });
      expect(report.failures[0]).toMatchObject({
        case: 0,
        op: "quantize_4bit",
        problem: expect.stringMatching(problem),
      });
      expect(memory().cpu?.tensors).toBe(0);
    });
  }

  test("a state without a part, a codebook without a name, unsorted codes", async () => {
    const nested = structuredClone(real.cases[indexOf(`${NESTED}/packed`)]!);
    delete (nested.state as CaseFields).nested_absmax;
    const unsorted = { ...real.cases[indexOf(`${Q8}/q`)]!, code: "q8/f32/heavy/dynamic/64/absmax" };
    const book = { op: "codebook", name: "mystery", code: "code/linear" };
    const { failures, ops } = await check(copy([nested, unsorted, book]));
    expect(failures.map((f) => f.problem)).toEqual([
      expect.stringContaining("state.nested_absmax is missing"),
      expect.stringContaining("256 values"),
      expect.stringContaining('name is "mystery"'),
    ]);
    expect(Object.values(ops).map((o) => o.failed)).toEqual([1, 1, 1]);
  });
});

describe("what was not checked has not passed", () => {
  test("ops that this version does not have, or nobody knows, are named", async () => {
    const cases = [
      { op: "Linear4bit", weight: "nowhere" },
      { op: "frobnicate" },
      { op: "frobnicate" },
      { op: "toString" },
    ];
    const report = await check(copy([...cases, real.cases[0]!]));
    expect(report.ops).toMatchObject({
      Linear4bit: { passed: 0, failed: 0, notRun: 1 },
      frobnicate: { passed: 0, failed: 0, notRun: 2 },
      toString: { passed: 0, failed: 0, notRun: 1 },
      codebook: { passed: 1, failed: 0, notRun: 0 },
    });
    expect(report.notRun).toEqual([
      { op: "Linear4bit", cases: 1, reason: "this version has no modules" },
      { op: "frobnicate", cases: 2, reason: "unknown op" },
      { op: "toString", cases: 1, reason: "unknown op" },
    ]);
    expect(isPassed(report)).toBe(true);
    expect(isPassed(await check(copy(cases)))).toBe(false);
  });

  test("a tensor that no check looks at leaves the case not run", async () => {
    const good = real.cases[indexOf(`${NF4}/packed`)]!;
    const report = await check(copy([{ ...good, surprise: { inside: "code/linear" } }]));
    expect(report.ops).toMatchObject({ quantize_4bit: { passed: 0, failed: 0, notRun: 1 } });
    expect(report.notRun[0]).toMatchObject({ op: "quantize_4bit", reason: "no check yet for surprise.inside" });
    expect(isPassed(report)).toBe(false);
  });
});

describe("int8", () => {
  // Two rows of 1 x 4; scale 127 makes the codes the rounded values, half to even.
  const f16 = Uint16Array.of(0x57f0, 0xd7f0, 0x3800, 0x3e00, 0, 0x8000, 0, 0);
  const codes = Int8Array.of(127, -127, 0, 2, 0, 0, 0, 0);
  const scales = Float32Array.of(127, 0);
  const weight = { W: "W", CB: "CB", SCB: "SCB" };
  const activation = { A: "W", CA: "CB", SCA: "SCB", double: { row: "CB", row_stats: "SCB" } };
  const make = (...cases: CaseFields[]): Editable => {
    const file = makeFile(cases, { W: f16, CB: codes, SCB: scales, C32: Int32Array.of(1) });
    for (const name of ["W", "CB"]) file.entries[name]!.shape = [2, 4];
    return file;
  };

  test("rows are checked, and a case that has nothing else passes", async () => {
    const report = await check(make({ op: "int8", threshold: 0, ...weight, ...activation }));
    expect(report.failures).toEqual([]);
    expect(report.ops).toEqual({ int8: { passed: 1, failed: 0, notRun: 0, ties: 0 } });
  });

  test("a tensor that no check looks at leaves the case not run, and a wrong part fails it all the same", async () => {
    const file = make({ op: "int8", threshold: 0, ...weight, ...activation, extra: "C32" });
    const report = await check(file);
    expect(report.ops).toMatchObject({ int8: { passed: 0, failed: 0, notRun: 1 } });
    expect(report.notRun.map((gap) => gap.reason)).toEqual(["no check yet for extra"]);
    bytesOf(file, "CB")[1] = -126 & 255;
    const wrong = await check(file);
    expect(wrong.ops).toMatchObject({ int8: { passed: 0, failed: 1, notRun: 0 } });
    expect(wrong.failures[0]).toMatchObject({
      field: "CB",
      tensor: "CB",
      mismatches: 1,
      elements: 8,
      worst: { index: 1, expected: -126, got: -127 },
    });
  });

  test("half a unit is a tie", async () => {
    const file = make({ op: "int8", threshold: 3, ...weight });
    bytesOf(file, "CB").set([1, 1], 2); // 0.5 and 1.5
    expect((await check(file)).ops).toEqual({ int8: { passed: 1, failed: 0, notRun: 0, ties: 2 } });
  });
});

describe("folders and files that are no golden ones", () => {
  test("an empty folder, one without golden files, none at all", async () => {
    await withDir({}, async (dir) => {
      await expect(checkGolden(dir)).rejects.toThrow(FormatError);
      await expect(checkGolden(dir)).rejects.toThrow(/no golden files/);
      await expect(checkGolden(`${dir}/missing`)).rejects.toThrow(/cannot be read/);
    });
    const plain = Buffer.concat([Buffer.from([2, 0, 0, 0, 0, 0, 0, 0]), Buffer.from("{}")]);
    await withDir({ "model.safetensors": plain, "notes.txt": "cases" }, async (dir) => {
      await expect(checkGolden(dir)).rejects.toThrow(/no golden files/);
    });
  });

  test("a malformed file is an error that names it, whatever else is there", async () => {
    const cut = serialize(real).subarray(0, 100_000);
    await withDir({ [REAL_FILE]: serialize(copy()), "zz.safetensors": cut }, async (dir) => {
      await expect(checkGolden(dir)).rejects.toThrow(FormatError);
      await expect(checkGolden(dir)).rejects.toThrow(/zz\.safetensors/);
    });
  });

  test.each([
    ["no JSON", "[{"],
    ["no list", '{"op": "codebook"}'],
    ["an empty list", "[]"],
    ["no objects", "[1]"],
    ["no op", '[{"name": "linear"}]'],
  ])("cases that are %s", async (_, casesText) => {
    await withDir({ "a.safetensors": serialize({ ...makeFile([], {}), casesText }) }, async (dir) => {
      await expect(checkGolden(dir)).rejects.toThrow(FormatError);
      await expect(checkGolden(dir)).rejects.toThrow(/a\.safetensors: (metadata key "cases"|case 0)/);
    });
  });
});
