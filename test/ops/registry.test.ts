import { readdirSync } from "node:fs";
import { describe, expect, test } from "vitest";
import { CPU_KERNELS } from "#halfbyte/backend/cpu/kernels.js";
import { KERNEL_NAMES } from "#halfbyte/core/kernels.js";
import * as api from "#halfbyte/index.js";
import { PRIMITIVE_NAMES, PRIMITIVES } from "#halfbyte/ops/registry.js";
import { allCases, CASES } from "../cases/index.js";

/** On a device by its name, which no case knows: test/ops/sparse.test.ts has its test. */
const MAKES_TENSORS = "cooZeros";

describe("registry", () => {
  test("every primitive is exported under its name", () => {
    for (const name of PRIMITIVE_NAMES) expect(typeof (api as Record<string, unknown>)[name], name).toBe("function");
  });

  test("every primitive that launches kernels has cases for each of its dtypes", () => {
    const covered = new Map<string, Set<string>>();
    for (const c of allCases()) covered.set(c.primitive, (covered.get(c.primitive) ?? new Set()).add(c.dtype));
    for (const name of PRIMITIVE_NAMES) {
      const info = PRIMITIVES[name];
      if (info.kernels.length === 0 || name === MAKES_TENSORS) continue;
      expect(covered.has(name), `${name} has no case`).toBe(true);
      expect(info.family in CASES, `${info.family} has no case list`).toBe(true);
      // Cases of what decodes go by the dtype of their result.
      if (!/dequant/i.test(name) || name === "int8MmDequant") {
        for (const dtype of info.dtypes)
          expect(covered.get(name)!.has(dtype), `${name} has no ${dtype} case`).toBe(true);
      }
    }
  });

  test("case ids are unique", () => {
    const ids = [...allCases()].map((c) => c.id);
    expect(new Set(ids).size).toBe(ids.length);
  });

  test("every primitive has golden cases or says why not", () => {
    for (const name of PRIMITIVE_NAMES) {
      const { golden } = PRIMITIVES[name];
      if (typeof golden !== "string") expect(golden.none.length, name).toBeGreaterThan(10);
    }
  });

  test("every kernel is used by a primitive or by tensors, and partitioned on the cpu", () => {
    const used = new Set<string>([
      "copy",
      "fill",
      "convert",
      ...PRIMITIVE_NAMES.flatMap((n) => [...PRIMITIVES[n].kernels]),
    ]);
    expect([...used].sort()).toEqual([...KERNEL_NAMES].sort());
    expect(Object.keys(CPU_KERNELS).sort()).toEqual([...KERNEL_NAMES].sort());
  });

  test("one name finds a family everywhere", () => {
    const families = new Set(
      PRIMITIVE_NAMES.filter((n) => PRIMITIVES[n].kernels.length > 0).map((n) => PRIMITIVES[n].family),
    );
    for (const family of families) {
      expect(readdirSync("asm"), family).toContain(`${family}.ts`);
      expect(readdirSync("src/ops"), family).toContain(`${family}.ts`);
      expect(readdirSync("test/ops"), family).toContain(`${family}.test.ts`);
      expect(readdirSync("bench"), family).toContain(`${family}.bench.ts`);
    }
  });
});
