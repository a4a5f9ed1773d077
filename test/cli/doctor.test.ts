import { describe, expect, it } from "vitest";
import { CUDA_MISSING } from "#halfbyte/backend/devices.js";
import { halfbyte, parseOnly } from "../helpers/cli.js";

interface Check {
  name: string;
  status: string;
  detail: string;
  advice?: string;
}

async function doctor(args: string[] = [], env: Record<string, string> = {}) {
  const { code, stdout, stderr } = await halfbyte(["doctor", "--json", ...args], { env });
  const { ok, checks } = parseOnly(stdout) as { ok: boolean; checks: Check[] };
  return { code, stderr, ok, checks: new Map(checks.map((check) => [check.name, check])) };
}

describe("halfbyte doctor", () => {
  it("finds everything in order here, and says why cuda is not there", async () => {
    const { code, stderr, ok, checks } = await doctor(["--threads", "3"]);
    expect({ code, stderr, ok }).toEqual({ code: 0, stderr: "", ok: true });
    for (const name of ["node", "simd", "threads", "cpu kernel"]) expect(checks.get(name)?.status).toBe("ok");
    expect(checks.get("cpu kernel")?.detail).toMatch(/^3 workers, NF4 of 64037 elements equals plain JavaScript/);
    expect(checks.get("cpu launch")?.detail).toMatch(/^\d+ ns a launch .* \d+ µs from launch to result$/);
    expect(checks.get("cuda")).toEqual({ name: "cuda", status: "info", detail: `not there: ${CUDA_MISSING}` });
    expect([...checks.values()].some(({ advice }) => advice)).toBe(false);
  });

  it("prints aligned lines without colour, and a verdict", async () => {
    const { code, stdout, stderr } = await halfbyte(["doctor"]);
    expect({ code, stderr }).toEqual({ code: 0, stderr: "" });
    expect(stdout).toMatch(/^halfbyte \d/);
    expect(stdout).toMatch(/\nmachine +- +linux|\nmachine +- /);
    expect(stdout.endsWith("\nhalfbyte works here\n")).toBe(true);
    expect(stdout).not.toContain("\u001b");
  });

  it("exits 1 with one line of advice per failure", async () => {
    const bare = await halfbyte(["doctor"], { node: ["--jitless"] });
    expect(bare.code).toBe(1);
    expect(bare.stdout).toMatch(/^simd +failed +/m);
    expect(bare.stdout).toMatch(/^simd: use a 64-bit build of Node\.js without --jitless/m);
    expect(bare.stdout.endsWith("\nhalfbyte does not work here\n")).toBe(true);

    const { code, ok, checks } = await doctor([], { HALFBYTE_THREADS: "99" });
    expect({ code, ok }).toEqual({ code: 1, ok: false });
    const failed = [...checks.values()].filter(({ status }) => status === "failed");
    expect(failed).toEqual([
      {
        name: "cpu",
        status: "failed",
        detail: expect.stringContaining("HALFBYTE_THREADS"),
        advice: "correct it, or leave it out",
      },
    ]);
  });
});
