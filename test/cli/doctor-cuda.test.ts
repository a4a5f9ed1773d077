/** What doctor makes of each outcome of the probe, on the machines of the recorded trees. */
import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { describe, expect, test } from "vitest";
import type { CudaDevice } from "#halfbyte/backend/cuda/device.js";
import type { ProbeResult } from "#halfbyte/backend/cuda/probe.js";
import { detectJetson, type Jetson } from "#halfbyte/backend/jetson.js";
import { adviceFor, type CudaDiagnosis, probeChecks, STATUS_ADVICE } from "#halfbyte/cli/doctor-cuda.js";
import type { CudaUnavailableCause } from "#halfbyte/core/errors.js";

type Failure = Extract<ProbeResult, { ok: false }>;

const jetson = (board: string): Jetson =>
  detectJetson(fileURLToPath(new URL(`../fixtures/jetson/${board}`, import.meta.url)));
const PLAIN: Jetson = { ...jetson("thor"), isJetson: false, soc: undefined, architecture: undefined, l4t: undefined };
const failure = (reason: CudaUnavailableCause, more: Partial<Failure> = {}): Failure => ({
  ok: false,
  reason,
  detail: "what was found",
  advice: "Its own advice.",
  cached: false,
  ...more,
});
const IMAGES: CudaDiagnosis["images"] = [
  { family: "fourbit", kind: "cubin", architecture: 87, compiler: "nvrtc 11.8.89" },
  { family: "sum", kind: "cubin", architecture: 87, compiler: "nvrtc 11.8.89" },
  { family: "sum", kind: "ptx", architecture: 80, compiler: "nvrtc 11.8.89" },
];
const ORIN: CudaDevice = {
  ordinal: 0,
  name: "Orin",
  uuid: "0".repeat(32),
  architecture: 87,
  multiprocessors: 8,
  sharedBytesPerBlock: 166_912,
  totalBytes: 7620 * 2 ** 20,
  integrated: true,
  driverVersion: 12060,
  managedMemory: true,
  concurrentManagedAccess: false,
  memoryPools: true,
};
/** The causes in the source of the errors: there is no list of them at run time. */
const CAUSES = [
  .../type CudaUnavailableCause =([^;]+);/
    .exec(readFileSync(new URL("../../src/core/errors.ts", import.meta.url), "utf8"))![1]!
    .matchAll(/"([a-z-]+)"/g),
].map(([, cause]) => cause as CudaUnavailableCause);

describe("a probe that failed", () => {
  test("is a failure with its cause and one line of advice where a GPU is wanted or expected", () => {
    expect(CAUSES.length).toBeGreaterThan(8);
    for (const reason of CAUSES) {
      for (const [wanted, expected] of [
        [true, false],
        [false, true],
      ] as const) {
        const checks = probeChecks(failure(reason), IMAGES, { wanted, expected, jetson: PLAIN });
        const last = checks.at(-1)!;
        expect(last).toMatchObject({ name: "cuda", status: "failed", detail: `${reason}: what was found` });
        expect(last.advice).toBe("Its own advice.");
      }
    }
  });

  test("is none where nothing points to a GPU; a crash and wrong numbers always are", () => {
    const failed = CAUSES.filter((reason) => {
      const circumstances = { wanted: false, expected: false, jetson: PLAIN };
      return probeChecks(failure(reason), IMAGES, circumstances).some(({ status }) => status === "failed");
    });
    expect(CAUSES.filter((reason) => !failed.includes(reason))).toEqual([
      "platform",
      "addon-missing",
      "no-driver",
      "no-device",
    ]);
  });

  test("without kernels for the GPU names it and what there is", () => {
    const gpu = { ...ORIN, name: "GTX 1080", architecture: 61, integrated: false };
    const checks = probeChecks(failure("no-kernel-image", { device: gpu }), IMAGES, {
      wanted: false,
      expected: true,
      jetson: PLAIN,
    });
    expect(checks.map(({ detail }) => detail)).toEqual([
      "GTX 1080, sm_61, 8 multiprocessors, 8.0 GB of memory, driver for CUDA 12.6",
      "the package has code for sm_87, compute_80 (PTX)",
      "no-kernel-image: what was found",
    ]);
  });
});

describe("a probe that worked", () => {
  const found: ProbeResult = {
    ok: true,
    device: ORIN,
    images: ["fourbit sm_87 cubin, nvrtc 11.8.89"],
    milliseconds: 812.4,
    cached: false,
  };

  test("says what it found", () => {
    const circumstances = { wanted: false, expected: true, jetson: jetson("orin-nano-8gb") };
    expect(probeChecks(found, IMAGES, circumstances)).toEqual([
      {
        name: "cuda gpu",
        status: "info",
        detail: "Orin, sm_87, 8 multiprocessors, shares the machine's memory, driver for CUDA 12.6",
      },
      { name: "cuda images", status: "info", detail: "fourbit sm_87 cubin, nvrtc 11.8.89" },
      {
        name: "cuda probe",
        status: "ok",
        detail: "kernels ran in a process of their own and their numbers are right (812 ms)",
      },
    ]);
  });

  test("on a board whose chip should have another GPU tells it", () => {
    const checks = probeChecks(found, IMAGES, { wanted: false, expected: true, jetson: jetson("thor") });
    expect(checks.at(-1)?.detail).toMatch(/; the board's chip should have sm_110$/);
  });
});

describe("advice by what the machine is", () => {
  const cases: [board: string, reason: CudaUnavailableCause, change: Partial<Jetson>, advice: RegExp][] = [
    ["agx-orin-container", "no-driver", {}, /--runtime nvidia/],
    ["agx-orin-container", "no-device", {}, /--runtime nvidia/],
    ["agx-orin-container", "driver-error", {}, /--runtime nvidia/],
    ["agx-orin-container", "probe-mismatch", {}, /^Its own advice\.$/],
    ["agx-orin-container", "no-driver", { gpuNodes: true }, /--runtime nvidia, which mounts it/],
    ["orin-nano-8gb", "no-driver", {}, /nvidia-l4t-cuda/],
    ["orin-nano-8gb", "no-driver", { gpuNodes: false }, /nvgpu kernel module/],
    ["orin-nano-8gb", "no-device", {}, /^Its own advice\.$/],
    ["orin-nano-8gb", "addon-missing", {}, /^Its own advice\.$/],
    ["xavier-nx", "driver-too-old", { l4t: "32.7.1" }, /JetPack 4 is older/],
  ];
  for (const [board, reason, change, advice] of cases) {
    test(`${board}, ${reason} ${JSON.stringify(change)}`, () => {
      expect(adviceFor(failure(reason), { ...jetson(board), ...change }, "")).toMatch(advice);
    });
  }

  test("a container on another machine", () => {
    expect(adviceFor(failure("no-driver"), { ...PLAIN, container: true }, "")).toMatch(/--gpus all/);
    expect(adviceFor(failure("no-driver"), PLAIN, "")).toBe("Its own advice.");
  });

  test("a library that the user named", () => {
    expect(adviceFor(failure("no-driver"), jetson("agx-orin-container"), "/x")).toMatch(/^HALFBYTE_CUDA_LIBRARY/);
  });

  test("a status of the driver has its own", () => {
    for (const [status, { name, advice }] of Object.entries(STATUS_ADVICE)) {
      const probe = failure("driver-error", { detail: `init: ${name} (${status}), words` });
      expect(adviceFor(probe, PLAIN, "")).toBe(advice);
    }
    const unknown = failure("driver-error", { detail: "init: CUDA_ERROR_ODD (12345), words" });
    expect(adviceFor(unknown, PLAIN, "")).toBe("Its own advice.");
  });
});

describe("docs/jetson.md", () => {
  const docs = readFileSync(new URL("../../docs/jetson.md", import.meta.url), "utf8");
  const rows = docs.split("\n").filter((line) => line.startsWith("|"));

  test("has a row for every cause, and none for one that is not there", () => {
    const named = rows
      .flatMap((row) => /^\| `([a-z-]+)` \|/.exec(row)?.[1] ?? [])
      .filter((name) => /^(platform|addon|worker|no|driver|probe)(-|$)/.test(name));
    expect(named.sort()).toEqual([...CAUSES].sort());
  });

  test("has a row for every status, with the same advice", () => {
    const listed = rows.flatMap((row) => {
      const [, status, name, advice] = /^\| (\d+) \| `(CUDA_\w+)` \| (.*) \|$/.exec(row) ?? [];
      return status === undefined ? [] : [[status, { name, advice }] as const];
    });
    expect(Object.fromEntries(listed)).toEqual(STATUS_ADVICE);
  });
});
