import { describe, expect, it } from "vitest";
import { findTraces } from "#halfbyte/backend/cuda/traces.js";
import { halfbyte, parseOnly } from "../helpers/cli.js";

interface Check {
  name: string;
  status: string;
  detail: string;
  advice?: string;
}

async function doctor(args: string[] = [], env: Record<string, string> = {}) {
  const { code, stdout, stderr } = await halfbyte(["doctor", "--json", ...args], {
    env: { HALFBYTE_DEVICE: "", HALFBYTE_CUDA_LIBRARY: "", ...env },
  });
  const { ok, checks, ...rest } = parseOnly(stdout) as { ok: boolean; checks: Check[] } & Record<string, unknown>;
  return { code, stderr, ok, rest, checks: new Map(checks.map((check) => [check.name, check])) };
}

/** What the tests below say of a missing driver holds where there is none. */
const noGpu = !findTraces().any;
if (!noGpu) console.log("skipped: what doctor says without an NVIDIA driver; this machine has traces of one");

describe("halfbyte doctor", () => {
  it("finds the cpu in order", async () => {
    const { code, stderr, ok, checks, rest } = await doctor(["--threads", "3", "--device", "cpu"]);
    expect({ code, stderr, ok }).toEqual({ code: 0, stderr: "", ok: true });
    for (const name of ["node", "simd", "threads", "cpu kernel"]) expect(checks.get(name)?.status).toBe("ok");
    expect(checks.get("machine")?.detail).toMatch(/ of [\d.]+ [MGT]B of memory free/);
    expect(checks.get("cpu kernel")?.detail).toMatch(/^3 workers, NF4 of 64037 elements equals plain JavaScript/);
    expect(checks.get("cpu launch")?.detail).toMatch(/^\d+ ns a launch .* \d+ µs from launch to result$/);
    expect([...checks.keys()].filter((name) => name.startsWith("cuda"))).toEqual([]);
    expect([...checks.values()].some(({ advice }) => advice)).toBe(false);
    expect(rest).toMatchObject({
      memory: { source: expect.any(String) },
      cpu: { latency: { launch: expect.any(Number), roundTrip: expect.any(Number) } },
      cuda: null,
    });
  });

  it.runIf(noGpu)("without a GPU says so, and that the cpu is used", async () => {
    const { code, ok, checks, rest } = await doctor();
    expect({ code, ok }).toEqual({ code: 0, ok: true });
    expect(checks.get("cuda")).toEqual({
      name: "cuda",
      status: "info",
      detail: expect.stringMatching(/^not here, cpu is used: there is no NVIDIA driver/),
    });
    expect(rest.cuda).toMatchObject({ probe: { ok: false, reason: "no-driver" }, images: expect.any(Array) });
  });

  it.runIf(noGpu)("--device cuda, or HALFBYTE_DEVICE, makes a missing GPU a failure", async () => {
    for (const [args, env] of [
      [["--device", "cuda"], {}],
      [[], { HALFBYTE_DEVICE: "cuda" }],
    ] as const) {
      const { code, ok, checks } = await doctor([...args], env);
      expect({ code, ok }).toEqual({ code: 1, ok: false });
      expect(checks.get("cuda")).toEqual({
        name: "cuda",
        status: "failed",
        detail: expect.stringMatching(/^no-driver: there is no NVIDIA driver/),
        advice: expect.stringMatching(/^[^\n]{20,}$/),
      });
      expect(checks.get("cpu kernel")?.status).toBe("ok");
    }
    const { stdout } = await halfbyte(["doctor", "--device", "cuda"]);
    expect(stdout).toMatch(/\ncuda: [^\n]+\nhalfbyte works here on the cpu only\n$/);
  });

  it("a driver library that was named and is none is a failure", async () => {
    const { code, checks } = await doctor([], { HALFBYTE_CUDA_LIBRARY: "/no/such/libcuda.so" });
    expect(code).toBe(1);
    expect(checks.get("cuda")?.status).toBe("failed");
  });

  it("prints aligned lines without colour, and a verdict", async () => {
    const { code, stdout, stderr } = await halfbyte(["doctor", "--device", "cpu"]);
    expect({ code, stderr }).toEqual({ code: 0, stderr: "" });
    expect(stdout).toMatch(/^halfbyte \d/);
    expect(stdout).toMatch(/\nmachine +- +linux|\nmachine +- /);
    expect(stdout.endsWith("\nhalfbyte works here\n")).toBe(true);
    expect(stdout).not.toContain("\u001b");
  });

  it("exits 1 with one line of advice per failure", async () => {
    const bare = await halfbyte(["doctor", "--device", "cpu"], { node: ["--jitless"] });
    expect(bare.code).toBe(1);
    expect(bare.stdout).toMatch(/^simd +failed +/m);
    expect(bare.stdout).toMatch(/^simd: use a 64-bit build of Node\.js without --jitless/m);
    expect(bare.stdout.endsWith("\nhalfbyte does not work here\n")).toBe(true);

    const mistakes: [env: Record<string, string>, name: string, variable: string][] = [
      [{ HALFBYTE_THREADS: "99" }, "cpu", "HALFBYTE_THREADS"],
      [{ HALFBYTE_DEVICE: "gpu" }, "device", "HALFBYTE_DEVICE"],
      [{ HALFBYTE_PROBE_TIMEOUT: "soon" }, "cuda", "HALFBYTE_PROBE_TIMEOUT"],
    ];
    for (const [env, name, variable] of mistakes) {
      const { code, ok, checks } = await doctor([], env);
      expect({ code, ok }).toEqual({ code: 1, ok: false });
      const failed = [...checks.values()].filter(({ status }) => status === "failed");
      const detail = expect.stringContaining(variable);
      expect(failed).toEqual([{ name, status: "failed", detail, advice: "correct it, or leave it out" }]);
    }
  });
});
