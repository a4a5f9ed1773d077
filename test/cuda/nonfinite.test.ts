import { expect, test } from "vitest";
import { NonFiniteError } from "#halfbyte/core/errors.js";
import { quantize4bit } from "#halfbyte/ops/fourbit.js";
import { nonFiniteStory } from "../helpers/nonfinite.js";
import { normals } from "../helpers/random.js";
import { floats, onGpu, withBoth, withCuda } from "./gpu.js";

onGpu("non-finite input", () => {
  test("is reported as on the cpu: which block, of which op, to which read", () =>
    withBoth(async (gpu, cpu) => {
      const expected = await nonFiniteStory(cpu);
      expect(expected.filter((line) => !line.endsWith("fine")).length).toBeGreaterThan(40);
      expect(await nonFiniteStory(gpu)).toEqual(expected);
    }));

  test("each of two pending reads gets the fault of the launches before it", () =>
    withCuda({}, async (gpu) => {
      const x = normals(100_000, "pending");
      x[70_000] = Number.NaN;
      using late = floats(gpu, x);
      x[10] = Number.NaN;
      using early = floats(gpu, x);
      const [a, stateA] = quantize4bit(late);
      const first = a.data().catch((e: unknown) => e);
      const [b, stateB] = quantize4bit(early);
      const second = b.data().catch((e: unknown) => e);
      expect(await first).toBeInstanceOf(NonFiniteError);
      expect(await first).toMatchObject({ index: Math.floor(70_000 / 64) });
      expect(await second).toMatchObject({ index: 0 });
      for (const t of [a, b, stateA, stateB]) t.dispose();
    }));
});
