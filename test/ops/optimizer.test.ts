import { describe, expect, test } from "vitest";
import { CpuBackend } from "#halfbyte/backend/cpu/backend.js";
import { CASES } from "../cases/index.js";
import { compareOutputs, expectedOutputs, runCase } from "../cases/run.js";
import { runCases } from "../helpers/run-cases.js";

runCases("optimizer");

describe("the same bits", () => {
  const some = [...CASES.optimizer!(), ...CASES.gradient!()].filter(({ large }, i) => i % (large ? 3 : 61) === 0);
  test.each([1, 5])("with %i threads", async (threads) => {
    const backend = new CpuBackend({ threads });
    try {
      const failures = some.flatMap((c) => {
        const inputs = c.inputs();
        return compareOutputs(c, expectedOutputs(c, inputs, "cpu"), runCase(backend, c, inputs)) ?? [];
      });
      expect(failures.join("\n")).toBe("");
    } finally {
      await backend.close();
    }
  });
});
