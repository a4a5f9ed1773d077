import { expect, test } from "vitest";
import { halfbyte, parseOnly } from "../helpers/cli.js";
import { onGpu } from "./gpu.js";

onGpu("golden vectors", () => {
  test("of bitsandbytes' own kernels: all pass on the GPU, with the cpu's ties", async () => {
    const [cuda, cpu] = await Promise.all(
      ["cuda", "cpu"].map((device) => halfbyte(["golden", "check", "test/golden/data", "--device", device, "--json"])),
    );
    expect(cuda!.code, cuda!.stderr + cuda!.stdout.slice(0, 2000)).toBe(0);
    const [ours, reference] = [parseOnly(cuda!.stdout), parseOnly(cpu!.stdout)];
    expect(ours.failures).toEqual([]);
    expect(ours.ops).toEqual(reference.ops);
    expect(JSON.stringify(ours)).toMatch(/"passed":[1-9]/);
  });
});
