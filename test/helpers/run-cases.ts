/** Runs the case list of a family on every backend: bits against the scalar reference, guards, leaks. */

import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { liveTensors } from "#halfbyte/core/tensor.js";
import { CASES } from "../cases/index.js";
import { compareOutputs, expectedOutputs, runCase } from "../cases/run.js";
import { DEVICES, type GuardedBackend, makeBackend } from "./backends.js";

export function runCases(family: string): void {
  const only = process.env.HALFBYTE_CASE;
  const cases = [...CASES[family]!()].filter((c) => !only || c.id === only);
  for (const { device, missing } of DEVICES) {
    describe.skipIf(missing)(`${family} on ${device}${missing ? ` (skipped: ${missing})` : ""}`, () => {
      let backend: GuardedBackend;
      beforeAll(() => {
        backend = makeBackend(device);
      });
      afterAll(async () => {
        backend?.checkGuards();
        await backend?.close();
      });
      // One test per primitive: thousands of cases as tests of their own would spend their time in the runner.
      const primitives = [...new Set(cases.map((c) => c.primitive))];
      for (const primitive of primitives) {
        const own = cases.filter((c) => c.primitive === primitive);
        test(`${primitive}: ${own.length} cases`, () => {
          const failures: string[] = [];
          for (const c of own) {
            const inputs = c.inputs();
            const failure = compareOutputs(c, expectedOutputs(c, inputs, device), runCase(backend, c, inputs));
            if (failure) failures.push(failure);
            expect(liveTensors(backend), `tensors left by ${c.id}`).toBe(0);
          }
          expect(failures.slice(0, 5).join("\n"), `${failures.length} mismatches`).toBe("");
        });
      }
    });
  }
  if (only && cases.length === 0) test.skip(`no case ${only} in ${family}`, () => {});
}
