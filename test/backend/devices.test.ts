/** How the device is chosen: by the call, by `init`, by HALFBYTE_DEVICE, by what works here. */
import { spawnSync } from "node:child_process";
import { existsSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { describe, expect, test } from "vitest";
import { addonPath } from "#halfbyte/backend/cuda/load.js";
import { findTraces } from "#halfbyte/backend/cuda/traces.js";
import { runScript } from "../helpers/script.js";

const hasAddon = existsSync(addonPath());
const traces = findTraces().any ? " (skipped: this machine has an NVIDIA driver)" : "";

/** A library that loads and is no driver. */
const NO_DRIVER = { HALFBYTE_CUDA_LIBRARY: "libc.so.6" };
const IMPORT = `
  import * as halfbyte from "#halfbyte/index.js";
  import { openBackend } from "#halfbyte/backend/devices.js";
  const outcome = (task) => { try { return task(); } catch (e) { return { code: e.code, reason: e.reason, message: e.message }; } };
  const outcomeOf = async (task) => { try { return await task(); } catch (e) { return { code: e.code, reason: e.reason, message: e.message }; } };
`;

interface Refusal {
  code: string;
  reason?: string;
  message: string;
}

describe("HALFBYTE_DEVICE", () => {
  const device = `give(outcome(() => halfbyte.tensor([1]).device))`;

  test("cpu is taken, whatever the driver", async () => {
    for (const env of [{}, NO_DRIVER]) {
      const { given, stderr } = await runScript(IMPORT + device, { ...env, HALFBYTE_DEVICE: "cpu" });
      expect({ given, stderr }).toEqual({ given: "cpu", stderr: "" });
    }
  });

  test("cuda fails with the reason", async () => {
    const { given } = await runScript<Refusal>(IMPORT + device, { ...NO_DRIVER, HALFBYTE_DEVICE: "cuda" });
    expect(given).toMatchObject({ code: "ERR_HALFBYTE_CUDA_UNAVAILABLE" });
    expect(given.reason).toBe(hasAddon ? "driver-too-old" : "addon-missing");
  });

  test("a bad value is named, for every way to a backend; an empty one is none", async () => {
    const code = `give(await Promise.all([
      outcomeOf(() => halfbyte.getBackend()), outcomeOf(() => openBackend()), outcomeOf(() => halfbyte.init())]))`;
    const { given } = await runScript<Refusal[]>(IMPORT + code, { HALFBYTE_DEVICE: "gpu" });
    const message = "HALFBYTE_DEVICE: expected auto, cpu or cuda, received gpu";
    for (const [i, op] of ["device", "device", "init"].entries()) {
      expect(given[i]).toEqual({ code: "ERR_HALFBYTE_ARGUMENT", message: `[${op}] ${message}` });
    }
    const empty = await runScript(`${IMPORT} give(halfbyte.getBackend("cpu").device)`, { HALFBYTE_DEVICE: "" });
    expect(empty.given).toBe("cpu");
  });

  test("an explicit device wins, also over a bad value", async () => {
    const code = `
      const direct = halfbyte.tensor([1], { device: "cpu" }).device;
      const opened = (await openBackend("cpu")).device;
      await halfbyte.shutdown();
      const made = (await halfbyte.init({ device: "cpu" })).device;
      give([direct, opened, made, halfbyte.tensor([1]).device]);`;
    for (const HALFBYTE_DEVICE of ["cuda", "gpu"]) {
      const { given } = await runScript(IMPORT + code, { ...NO_DRIVER, HALFBYTE_DEVICE });
      expect(given).toEqual(["cpu", "cpu", "cpu", "cpu"]);
    }
  });
});

describe("a device that does not exist", () => {
  test("is refused by name", async () => {
    const code = `give([outcome(() => halfbyte.getBackend("gpu")), await outcomeOf(() => halfbyte.init({ device: "tpu" }))])`;
    const { given } = await runScript(IMPORT + code);
    expect(given).toEqual([
      { code: "ERR_HALFBYTE_DEVICE", message: "[device] device: expected auto, cpu or cuda, received gpu" },
      { code: "ERR_HALFBYTE_DEVICE", message: "[init] device: expected auto, cpu or cuda, received tpu" },
    ]);
  });
});

describe("auto", () => {
  test.skipIf(traces)(`says nothing and costs little where there is no NVIDIA GPU${traces}`, async () => {
    const code = `
      import { probeCudaSync } from "#halfbyte/index.js";
      probeCudaSync();
      const started = performance.now();
      for (let i = 0; i < 100; i++) probeCudaSync();
      const milliseconds = (performance.now() - started) / 100;
      give({ probe: probeCudaSync(), milliseconds, device: halfbyte.tensor([1]).device });`;
    const { given, stderr } = await runScript<{ milliseconds: number }>(IMPORT + code);
    expect(stderr).toBe("");
    expect(given).toMatchObject({ device: "cpu", probe: { ok: false, reason: "no-driver", cached: false } });
    expect(given.milliseconds).toBeLessThan(1);
  });

  test("falls back to the cpu and says why, once per process", async () => {
    const code = `
      const devices = [halfbyte.tensor([1]).device, (await openBackend()).device];
      await halfbyte.shutdown();
      devices.push((await halfbyte.init()).device);
      await halfbyte.shutdown();
      devices.push(halfbyte.getBackend("auto").device);
      await halfbyte.shutdown();
      give(devices);`;
    const { given, stderr } = await runScript(IMPORT + code, NO_DRIVER);
    expect(given).toEqual(["cpu", "cpu", "cpu", "cpu"]);
    expect(stderr.match(/\[HALFBYTE_CUDA_FALLBACK\] HalfbyteWarning: the cpu is used: /g)).toHaveLength(1);
    expect(stderr).toContain(hasAddon ? "lacks cuInit" : "native addon");
  });

  test("an unused default is not probed", async () => {
    const code = `give(halfbyte.tensor([1], { device: "cpu" }).device)`;
    expect((await runScript(IMPORT + code, NO_DRIVER)).stderr).toBe("");
  });
});

describe("Node's permission model", () => {
  const PACKAGE = fileURLToPath(new URL("../..", import.meta.url));
  const PERMISSION = process.allowedNodeEnvironmentFlags.has("--permission")
    ? "--permission"
    : "--experimental-permission";
  /** What `auto` is, without and with a wait, or how that failed. */
  function automatic(flags: readonly string[], env: Record<string, string> = {}): string {
    const code = `import("${new URL("../../dist/index.js", import.meta.url).href}").then(async (h) => {
      const devices = [];
      devices.push(h.getBackend("auto").device);
      await h.shutdown();
      devices.push((await h.init({ device: "auto" })).device);
      await h.shutdown();
      console.log(devices.join());
    }).catch((error) => console.log(error.stack));`;
    const { stdout } = spawnSync(process.execPath, [PERMISSION, "--allow-worker", ...flags, "-e", code], {
      encoding: "utf8",
      env: { ...process.env, HALFBYTE_DEVICE: "", ...env },
    });
    return stdout.trim();
  }

  test("auto is the cpu where no process may be started", () => {
    expect(automatic(["--allow-fs-read=*"], NO_DRIVER)).toBe("cpu,cpu");
  });

  test("auto is the cpu where only the package may be read", () => {
    expect(automatic([`--allow-fs-read=${PACKAGE}`])).toBe("cpu,cpu");
  });
});

describe("init", () => {
  test("its device is the default from then on, until shutdown", async () => {
    const code = `
      await halfbyte.init({ device: "cpu", threads: 1 });
      const before = outcome(() => halfbyte.tensor([1]).device);
      await halfbyte.shutdown();
      give([before, outcome(() => halfbyte.tensor([1]))]);`;
    const { given } = await runScript<[string, Refusal]>(IMPORT + code, { ...NO_DRIVER, HALFBYTE_DEVICE: "cuda" });
    expect(given[0]).toBe("cpu");
    expect(given[1].code).toBe("ERR_HALFBYTE_CUDA_UNAVAILABLE");
  });

  test("a device that is in use is refused, and stays as it is", async () => {
    const code = `
      const x = halfbyte.tensor([7], { device: "cpu" });
      const again = await outcomeOf(() => halfbyte.init({ device: "cpu", threads: 1 }));
      const automatic = await outcomeOf(() => halfbyte.init());
      give([again, automatic, [...x.dataSync()], Object.keys(halfbyte.memory())]);`;
    const { given } = await runScript(IMPORT + code, NO_DRIVER);
    const refusal = {
      code: "ERR_HALFBYTE_ARGUMENT",
      message: "[init] device: expected a device that is not in use yet (call shutdown() first), received cpu",
    };
    expect(given).toEqual([refusal, refusal, [7], ["cpu"]]);
  });

  test("a refused cuda leaves nothing behind", async () => {
    const code = `
      const refused = await outcomeOf(() => halfbyte.init({ device: "cuda" }));
      const libraryOfOption = await outcomeOf(() => halfbyte.init({ device: "cuda", library: "/no/such/libcuda.so" }));
      give([refused.reason, libraryOfOption, Object.keys(halfbyte.memory()), halfbyte.tensor([1], { device: "cpu" }).device]);`;
    const { given, stderr } = await runScript<[string, Refusal, string[], string]>(IMPORT + code, NO_DRIVER);
    expect(given[0]).toBe(hasAddon ? "driver-too-old" : "addon-missing");
    if (hasAddon)
      expect(given[1]).toMatchObject({ reason: "no-driver", message: expect.stringContaining("/no/such/libcuda.so") });
    expect(given.slice(2)).toEqual([[], "cpu"]);
    expect(stderr).toBe("");
  });
});

describe("a worker thread", () => {
  test("gets the cpu from auto, silently, and an error from cuda", async () => {
    const inside = `${IMPORT}
      import { parentPort } from "node:worker_threads";
      const devices = [halfbyte.tensor([1]).device, (await openBackend("auto")).device];
      const cuda = [outcome(() => halfbyte.getBackend("cuda")), await outcomeOf(() => halfbyte.init({ device: "cuda" }))];
      const probe = await halfbyte.probeCuda();
      await halfbyte.shutdown();
      parentPort.postMessage({ devices, cuda, probe });`;
    const code = `
      import { Worker } from "node:worker_threads";
      const worker = new Worker(${JSON.stringify(inside)}, { eval: true, execArgv: ["--input-type=module"] });
      give(await new Promise((resolve, reject) => worker.on("message", resolve).on("error", reject)));`;
    const { given, stderr } = await runScript<{ devices: string[]; cuda: Refusal[]; probe: object }>(code, NO_DRIVER);
    expect(given.devices).toEqual(["cpu", "cpu"]);
    for (const refusal of given.cuda) {
      expect(refusal).toMatchObject({ code: "ERR_HALFBYTE_CUDA_UNAVAILABLE", reason: "worker-thread" });
    }
    expect(given.probe).toMatchObject({ ok: false, reason: "worker-thread" });
    expect(stderr).toBe("");
  });
});

test("HALFBYTE_PROBE_TIMEOUT must be a number of milliseconds", async () => {
  const code = `give(await Promise.all([outcomeOf(() => halfbyte.probeCuda()), outcomeOf(() => halfbyte.probeCuda({ timeout: -1 }))]))`;
  for (const value of ["soon", "0", "-5", "1e12"]) {
    const { given } = await runScript<Refusal[]>(IMPORT + code, { ...NO_DRIVER, HALFBYTE_PROBE_TIMEOUT: value });
    expect(given).toEqual([
      {
        code: "ERR_HALFBYTE_ARGUMENT",
        message: `[probeCuda] HALFBYTE_PROBE_TIMEOUT: expected a positive number of milliseconds, received ${value}`,
      },
      {
        code: "ERR_HALFBYTE_ARGUMENT",
        message: "[probeCuda] timeout: expected a positive number of milliseconds, received -1",
      },
    ]);
  }
});
