/** What products promise beyond their values: the same bits for any number of workers, and slices that fit together. */
import { expect, test } from "vitest";
import { CpuBackend } from "#halfbyte/backend/cpu/backend.js";
import { sliceRows } from "#halfbyte/ops/matmul4bit.js";
import type { Case } from "../cases/case.js";
import { CASES } from "../cases/index.js";
import { outputsHash, runCase } from "../cases/run.js";

/** Enough of every family for several parts: what is large, and some of the rest. */
const SOME: readonly Case[] = ["matmul4bit", "matmul", "igemm", "sparse", "int8"].flatMap((family) =>
  [...CASES[family]!()].filter((c, i) => c.large || i % 7 === 0),
);

test("the same bits for 1, 2, 3 and 7 workers", async () => {
  expect(SOME.filter((c) => c.large).length).toBeGreaterThan(30);
  const hashes = new Map<string, string>();
  for (const threads of [1, 2, 3, 7]) {
    const backend = new CpuBackend({ threads });
    try {
      const different: string[] = [];
      for (const c of SOME) {
        const hash = outputsHash(runCase(backend, c, c.inputs()));
        const first = hashes.get(c.id) ?? hash;
        hashes.set(c.id, first);
        if (hash !== first) different.push(c.id);
      }
      expect(different, `${threads} workers`).toEqual([]);
    } finally {
      await backend.close();
    }
  }
});

test("slices begin with a block and with a byte", () => {
  for (const k of [1, 3, 63, 64, 65, 100, 129, 576, 4096]) {
    for (const blocksize of [32, 64, 4096]) {
      for (const n of [1, 100, 127, 128, 129, 5000, 100_000]) {
        for (const most of [0, 1, 128, 1000, 1e9]) {
          const rows = sliceRows(n, k, blocksize, most);
          expect(rows).toBeGreaterThan(0);
          if (rows >= n) continue;
          expect((rows * k) % blocksize, `n=${n} k=${k} bs=${blocksize} most=${most}`).toBe(0);
          expect((rows * k) % 2).toBe(0);
        }
      }
    }
  }
});

test("a row of activations gives the same bits alone and among others", async () => {
  const backend = new CpuBackend({ threads: 2 });
  try {
    const cases = [...CASES.matmul4bit!()].filter(
      (c) =>
        c.primitive === "matmul4bit" &&
        !c.large &&
        /:m=(5|9|17|33|64|65):/.test(c.id) &&
        !/view|lead|:k=0:|:n=0:/.test(c.id),
    );
    expect(cases.length).toBeGreaterThan(300);
    const different: string[] = [];
    for (const c of cases) {
      const inputs = c.inputs();
      const together = runCase(backend, c, inputs).y!;
      const [m, k] = inputs.A!.shape as [number, number];
      const width = together.bytes.length / m;
      for (const r of new Set([0, 1, m >> 1, m - 1])) {
        const row = Array.from({ length: k }, (_, i) => inputs.A!.values[r * k + i]!);
        const alone = runCase(backend, c, { ...inputs, A: { ...inputs.A!, shape: [1, k], values: row } }).y!;
        if (Buffer.compare(alone.bytes, together.bytes.subarray(r * width, (r + 1) * width)) !== 0)
          different.push(`${c.id} row ${r}`);
      }
    }
    expect(different.slice(0, 5), `${different.length} of ${cases.length}`).toEqual([]);
  } finally {
    await backend.close();
  }
});
