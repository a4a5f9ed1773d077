/** docs/optimizers.md: its figures are the code's, and its program runs. */
import { execFileSync } from "node:child_process";
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { describe, expect, test } from "vitest";
import { Tensor } from "#halfbyte/core/tensor.js";
import type { Optimizer } from "#halfbyte/index.js";
import * as classes from "#halfbyte/optim/classes.js";
import { withBackend } from "../helpers/backends.js";

const ROOT = fileURLToPath(new URL("../..", import.meta.url));
const text = readFileSync(join(ROOT, "docs/optimizers.md"), "utf8");
const RULES = ["Adam", "AdamW", "LAMB", "AdEMAMix", "SGD", "LARS", "RMSprop", "Adagrad", "Lion"];

function stateTable(): string[][] {
  const [, table] = /<!-- table: state -->\n([\s\S]*?)<!-- end -->/.exec(text) ?? [];
  return table!
    .trim()
    .split("\n")
    .slice(2)
    .map((line) => line.slice(2, -2).split(" | "));
}

describe("docs/optimizers.md", () => {
  test("has the bytes of state that each rule takes", async () => {
    const rows = stateTable().flatMap(([names, , wide, narrow]) =>
      names!.split(", ").map((name) => ({ name, bytes: { 32: Number(wide), 8: Number(narrow) } })),
    );
    expect(rows.map(({ name }) => name).sort()).toEqual([...RULES].sort());
    await withBackend({}, (backend) => {
      for (const { name, bytes } of rows) {
        for (const bits of [32, 8] as const) {
          const n = 16 * 256;
          const p = Tensor.allocate(backend, "f32", [n]).copyFrom(new Float32Array(n));
          p.grad = Tensor.allocate(backend, "f32", [n]).copyFrom(new Float32Array(n).fill(1));
          const make = (classes as unknown as Record<string, new (...args: unknown[]) => Optimizer>)[
            `${name}${bits}bit`
          ]!;
          const optimizer = new make([p], { lr: 1e-3, ...(/^(SGD|LARS)$/.test(name) && { momentum: 0.9 }) });
          optimizer.step();
          expect(optimizer.stateBytes / n, `${name}, ${bits} bits`).toBe(bytes[bits]);
          optimizer.dispose();
          p.grad.dispose();
          p.dispose();
        }
      }
    });
  });

  test("has a program that trains", () => {
    const programs = [...text.matchAll(/```ts\n([\s\S]*?)```/g)].map(([, program]) => program!);
    expect(programs.length).toBe(1);
    // Within the package, so that its name resolves.
    mkdirSync(join(ROOT, "build"), { recursive: true });
    const folder = mkdtempSync(join(ROOT, "build/optimizers-doc-"));
    try {
      writeFileSync(join(folder, "program.mjs"), programs[0]!);
      const said = execFileSync(process.execPath, ["program.mjs"], { cwd: folder, encoding: "utf8" });
      const [, before, after, bytes] = /^loss ([\d.]+), then ([\d.]+); (\d+) bytes of state/.exec(said) ?? [];
      expect(Number(after), said).toBeLessThan(Number(before) / 100);
      expect(Number(bytes)).toBe(2 * (4096 + 16 * 4));
    } finally {
      rmSync(folder, { recursive: true });
    }
  });
});
