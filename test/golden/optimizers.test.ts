/** `checkGolden` on bitsandbytes' optimizers: the part of them that is here, damaged copies of it, and all of them where they are. */

import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { memory, shutdown } from "#halfbyte/backend/devices.js";
import { checkGolden } from "#halfbyte/golden/check.js";
import { bytesOf, type CaseFields, type Editable, loadReal, serialize, withDir } from "./files.js";

const FILE = "optim.safetensors";
/** Codes that differ from golden's. */
const TIES = 10;
/** 8-bit RMSprop and Adagrad with weight decay, f32 and bf16. */
const DIFFERENT = 4;

let real: Editable;
beforeAll(async () => {
  real = await loadReal(FILE);
});
afterAll(shutdown);

/** A copy of the case with this index, alone in its file. */
function alone(index: number): { copy: Editable; c: CaseFields } {
  const c = structuredClone(real.cases[index]!);
  const text = JSON.stringify(c);
  const names = Object.keys(real.entries).filter((name) => text.includes(`"${name}"`));
  const parts = names.map((name) => bytesOf(real, name));
  let at = 0;
  const entries: Editable["entries"] = {};
  for (const [k, name] of names.entries()) {
    entries[name] = { ...real.entries[name]!, data_offsets: [at, at + parts[k]!.length] };
    at += parts[k]!.length;
  }
  return { copy: { ...real, cases: [c], entries, data: Buffer.concat(parts) }, c };
}

async function changed(index: number, change: (copy: Editable, c: CaseFields) => void) {
  const { copy, c } = alone(index);
  change(copy, c);
  return withDir({ [FILE]: serialize(copy) }, (dir) => checkGolden(dir, { device: "cpu" }));
}

type Steps = Record<string, string>[];
const tensorOf = (c: CaseFields, step: number, part: string): string | undefined => (c.steps as Steps)[step]![part];

test("all cases pass, with the known ties and differences, and nothing leaks", async () => {
  const report = await withDir({ [FILE]: serialize(real) }, (dir) => checkGolden(dir, { device: "cpu" }));
  expect(report.failures).toEqual([]);
  expect(report.notRun).toEqual([]);
  expect(report.ops).toEqual({ optimizer: { passed: 68, failed: 0, notRun: 0, ties: TIES } });
  expect(report.differences).toEqual([
    { op: "optimizer", cases: DIFFERENT, rule: expect.stringMatching(/without decay/) },
  ]);
  // Not judged there, but a drift of this size would be no drift any more.
  expect(report.drift.map(({ what, cases }) => [what, cases])).toEqual([
    ["2 steps with 32-bit states: parameters", 25],
    ["2 steps with 32-bit states: states", 44],
    ["6 steps with 32-bit states: parameters", 7],
    ["6 steps with 32-bit states: states", 11],
    ["2 steps with 8-bit states: parameters", 25],
    ["2 steps with 8-bit states: states", 43],
    ["6 steps with 8-bit states: parameters", 7],
    ["6 steps with 8-bit states: states", 11],
  ]);
  for (const { worst, what } of report.drift) expect(worst, what).toBeLessThan(0.05);
  expect(memory().cpu).toMatchObject({ tensors: 0, bytes: 0 });
});

test("the cases here are all optimizers, states, dtypes and variants that golden has", () => {
  const kinds = new Set(real.cases.map(({ name, bits }) => `${name} ${bits}`));
  expect(kinds.size).toBe(7 * 2 + 2);
  expect(new Set(real.cases.map(({ dtype }) => dtype))).toEqual(new Set(["f32", "f16", "bf16"]));
  expect(new Set(real.cases.map(({ variant }) => variant))).toEqual(new Set(["", "wd", "schedule"]));
});

const full = process.env.HALFBYTE_GOLDEN;
test.skipIf(!full)(
  `all 76 cases of the whole set pass${full ? "" : " (skipped: HALFBYTE_GOLDEN names no folder with it)"}`,
  async () => {
    for (let i = 0; i < 76; i++) {
      const report = await checkGolden(full!, { device: "cpu", only: `optim:${i}` });
      expect(report.failures, `optim:${i}`).toEqual([]);
      expect(report.ops, `optim:${i}`).toMatchObject({ optimizer: { passed: 1 } });
    }
  },
);

/** Changes of one byte that are more than any bound: of a value, or of a code. */
function flip(copy: Editable, name: string): void {
  const bytes = bytesOf(copy, name);
  const { dtype } = copy.entries[name]!;
  const [element, byte, bits] = { F32: [40, 1, 0x10], U8: [301, 0, 0x02] }[dtype] ?? [40, 0, 0x10];
  const width = { F32: 4, U8: 1 }[dtype] ?? 2;
  // Scales of some blocks only.
  const at = (element! % (bytes.length / width)) * width + byte!;
  bytes[at] = bytes[at]! ^ bits!;
}

describe("a damaged copy fails, and names the tensor", () => {
  const PARTS = ["p", "state1", "state2", "absmax1", "absmax2"];
  const firstOf = new Map<string, number>();
  // Known before the file is read: the order of golden's cases.
  const ORDER = ["adam", "adamw", "momentum", "rmsprop", "adagrad", "lion", "ademamix", "lamb", "lars"];
  for (const name of ORDER) {
    for (const bits of name === "lamb" || name === "lars" ? [32] : [32, 8]) {
      test(`${name}, ${bits} bits`, async () => {
        for (const [i, c] of real.cases.entries()) {
          const key = `${c.name} ${c.bits}`;
          if (!firstOf.has(key)) firstOf.set(key, i);
        }
        const index = firstOf.get(`${name} ${bits}`)!;
        const good = await changed(index, () => {});
        expect(good.ops).toMatchObject({ optimizer: { passed: 1, failed: 0 } });
        for (const part of PARTS) {
          if (tensorOf(real.cases[index]!, 0, part) === undefined) continue;
          for (const step of [0, 1]) {
            const bad = await changed(index, (copy, c) => flip(copy, tensorOf(c, step, part)!));
            const fields = bad.failures.map((f) => f.field);
            expect(fields, `${part} of step ${step + 1}`).toContain(`steps.${step}.${part}`);
          }
        }
        for (const step of [0, 1]) {
          const bad = await changed(index, (copy, c) => {
            const bytes = bytesOf(copy, tensorOf(c, step, "grad")!);
            const at = bytes.length - 1;
            bytes[at] = bytes[at]! ^ 0x80;
          });
          expect(bad.failures.length, `the sign of a gradient of step ${step + 1}`).toBeGreaterThan(0);
        }
      });
    }
  }

  test("a code that is one off, where no tie is", async () => {
    const index = real.cases.findIndex(({ name, bits }) => name === "adam" && bits === 8);
    const flipped = await changed(index, (copy, c) => {
      const bytes = bytesOf(copy, tensorOf(c, 0, "state1")!);
      bytes[100] = bytes[100]! ^ 1;
    });
    // And the parameter that follows from it.
    expect(flipped.failures).toMatchObject([
      { field: "steps.0.state1", mismatches: 1, worst: { index: 100 } },
      { field: "steps.1.p", mismatches: 1, worst: { index: 100 } },
    ]);
  });

  test("other hyper-parameters", async () => {
    const at = (name: string, bits: number, variant = ""): number =>
      real.cases.findIndex((c) => c.name === name && c.bits === bits && c.variant === variant);
    for (const [index, key, value] of [
      [at("adam", 32), "lr", 0.00101],
      [at("adam", 32), "eps", 1e-3],
      [at("adam", 8, "wd"), "weight_decay", 0.2],
      [at("ademamix", 32, "schedule"), "t_alpha", 5],
      [at("ademamix", 8, "schedule"), "t_beta3", 6],
      [at("ademamix", 32), "alpha", 4],
      [at("momentum", 8), "betas", [0.8, 0]],
      [at("rmsprop", 8, "wd"), "weight_decay", 0],
      [at("adagrad", 8, "wd"), "lr", 0.0101],
      [at("lamb", 32), "max_unorm", 0],
      [at("lars", 32, "wd"), "max_unorm", 0.021],
    ] as const) {
      const bad = await changed(index, (_, c) => Object.assign(c.hyper as object, { [key]: value }));
      expect(bad.failures.length, `${real.cases[index]!.name} ${key}`).toBeGreaterThan(0);
    }
  });

  test("a case that is not one", async () => {
    const problem = async (change: (c: CaseFields) => void): Promise<string> => {
      const { failures } = await changed(0, (_, c) => change(c));
      return failures[0]?.problem ?? "";
    };
    expect(await problem((c) => (c.name = "sgd"))).toMatch(/name is "sgd"/);
    expect(await problem((c) => (c.steps = []))).toMatch(/steps has none/);
    expect(await problem((c) => ((c.steps as { step: number }[])[1]!.step = 7))).toMatch(/steps.1.step is not 2/);
    expect(await problem((c) => delete (c.steps as Steps)[0]!.state2)).toMatch(/steps.0.state2 is missing/);
    expect(await problem((c) => delete (c.hyper as CaseFields).lr)).toMatch(/hyper.lr is missing/);
  });
});
