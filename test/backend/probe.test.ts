/** The probe against a driver that misbehaves in every way there is a reason for, and what follows from its answer. */
import { spawnSync } from "node:child_process";
import { existsSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import type { ProbeResult } from "#halfbyte/backend/cuda/probe.js";
import { cudaMissing } from "#halfbyte/backend/devices.js";
import { temporaryFolder } from "../helpers/checkpoint.js";
import { halfbyte, until } from "../helpers/cli.js";
import { cudaScene, FAKE_ORIN, NO_SCENE, type Scene } from "../helpers/cuda-scene.js";
import { fakeCuda } from "../helpers/fake-cuda.js";
import { runScript } from "../helpers/script.js";

const IMPORT = `import * as halfbyte from "#halfbyte/index.js";`;
const BOTH = `${IMPORT} give([await halfbyte.probeCuda(), halfbyte.probeCudaSync({ fresh: true })]);`;

let folder: ReturnType<typeof temporaryFolder>;
let scene: Scene;
beforeEach(() => {
  folder = temporaryFolder();
  if (NO_SCENE === "") scene = cudaScene(folder.path);
});
afterEach(() => folder.remove());

type Failure = Extract<ProbeResult, { ok: false }>;

/** The probe's answer, which must be the same with and without blocking, and leave nothing in the cache. */
async function failureOf(env: Record<string, string | undefined>): Promise<Failure> {
  const { given, stderr } = await runScript<Failure[]>(BOTH, { ...scene.env, ...env });
  expect(stderr).toBe("");
  // Which call notices a fault of the device, and what was launched last by then, is a matter of timing.
  const fault = /^\[cuda\] \w+: (CUDA_ERROR_ILLEGAL_ADDRESS \(700\)).* in one of the last launched: .*/;
  const answers = given.map((failure) => ({
    ...failure,
    detail: failure.detail.replace(fault, "$1").replace(/0x\w+/g, "0x..."),
  }));
  const [first, second] = answers as [Failure, Failure];
  expect(second).toEqual(first);
  expect(first.ok).toBe(false);
  expect(first.cached).toBe(false);
  for (const words of [first.detail, first.advice]) expect(words).toMatch(/^[^\n]{20,}$/);
  expect(first.detail).not.toMatch(/\.$/);
  expect(existsSync(folder.file("cache"))).toBe(false);
  return first;
}

describe.skipIf(NO_SCENE)(`a driver that${NO_SCENE}`, () => {
  test("crashes when it is initialised", async () => {
    const crashed = await failureOf({ HALFBYTE_FAKE_CUDA_INIT: "segv" });
    expect(crashed.reason).toBe("probe-crashed");
    expect(crashed.detail).toBe("the probe ended with SIGSEGV while the driver was opened");
    const aborted = await failureOf({ HALFBYTE_FAKE_CUDA_INIT: "abort" });
    expect(aborted.reason).toBe("probe-crashed");
    expect(aborted.detail).toMatch(/^the probe ended with SIGABRT while the driver was opened/);
  });

  test("hangs", async () => {
    const env = { HALFBYTE_FAKE_CUDA_INIT: "hang", HALFBYTE_PROBE_TIMEOUT: "1500" };
    const { reason, detail, advice } = await failureOf(env);
    expect({ reason, detail }).toEqual({
      reason: "probe-timeout",
      detail: "no answer within 1500 ms while the driver was opened",
    });
    expect(advice).toContain("HALFBYTE_PROBE_TIMEOUT");
  });

  test("is too old", async () => {
    const { reason, detail } = await failureOf({ HALFBYTE_FAKE_CUDA_VERSION: "10020" });
    expect(reason).toBe("driver-too-old");
    expect(detail).toMatch(/10\.2.*11\.4/);
  });

  test("is the toolkit's stub", async () => {
    const { reason, detail, advice } = await failureOf({ HALFBYTE_FAKE_CUDA_INIT: "34" });
    expect(reason).toBe("no-driver");
    expect(detail).toMatch(/^cuDriverGetVersion failed with CUDA_ERROR_STUB_LIBRARY \(34\)/);
    expect(advice).toContain("stub");
  });

  test("lacks a function", async () => {
    const { reason, detail } = await failureOf({ HALFBYTE_CUDA_LIBRARY: fakeCuda("old") });
    expect(reason).toBe("driver-too-old");
    expect(detail).toContain("cuEventElapsedTime");
  });

  test("is not there, or is something else", async () => {
    const absent = await failureOf({ HALFBYTE_CUDA_LIBRARY: folder.file("libcuda.so.1") });
    expect(absent.reason).toBe("no-driver");
    expect(absent.detail).toContain(folder.file("libcuda.so.1"));
    writeFileSync(folder.file("libcuda.so.1"), "not a library");
    const wrong = await failureOf({ HALFBYTE_CUDA_LIBRARY: folder.file("libcuda.so.1") });
    expect(wrong.reason).toBe("no-driver");
  });

  test("has no device, or not the one that is asked for", async () => {
    const none = await failureOf({ HALFBYTE_FAKE_CUDA_DEVICES: "0" });
    expect(none.reason).toBe("no-device");
    expect(none.device).toBeUndefined();
    const code = `${IMPORT} give(await halfbyte.probeCuda({ device: 3 }));`;
    const { given } = await runScript<Failure>(code, scene.env);
    expect(given).toMatchObject({ ok: false, reason: "no-device", detail: expect.stringContaining("received 3") });
  });

  test("refuses for a reason of its own", async () => {
    const { reason, detail } = await failureOf({ HALFBYTE_FAKE_CUDA_INIT: "999" });
    expect(reason).toBe("driver-error");
    expect(detail).toContain("CUDA_ERROR_UNKNOWN (999)");
  });

  test("does not take the kernels", async () => {
    const { reason, detail, device } = await failureOf({ HALFBYTE_FAKE_CUDA_MODULE: "209" });
    expect(reason).toBe("no-kernel-image");
    expect(detail).toContain("CUDA_ERROR_NO_BINARY_FOR_GPU (209)");
    expect(device).toMatchObject({ name: "Fake Orin", architecture: 87, driverVersion: 13000 });
  });

  test("computes wrong numbers", async () => {
    const { reason, detail, advice, device } = await failureOf({});
    expect(reason).toBe("probe-mismatch");
    expect(detail).toMatch(/^Fake Orin \(sm_87\) computes wrong numbers: of NF4 of \d+ elements codes differ from/);
    expect(advice).toContain("halfbyte doctor --json");
    expect(device?.integrated).toBe(true);
  });

  test("faults in a kernel, or cannot launch", async () => {
    const fault = await failureOf({ HALFBYTE_FAKE_CUDA_FAULT_AT: "2" });
    expect(fault.reason).toBe("driver-error");
    expect(fault.detail).toBe("CUDA_ERROR_ILLEGAL_ADDRESS (700)");
    const launch = await failureOf({ HALFBYTE_FAKE_CUDA_LAUNCH: "701" });
    expect(launch).toMatchObject({ reason: "driver-error", device: { name: "Fake Orin" } });
    expect(launch.detail).toContain("(701)");
  });

  test("has too little memory", async () => {
    const { reason, detail } = await failureOf({ HALFBYTE_FAKE_CUDA_MEMORY: "4096" });
    expect(reason).toBe("driver-error");
    expect(detail).toContain("out of memory");
  });
});

describe.skipIf(NO_SCENE)(`kernels that${NO_SCENE}`, () => {
  test("are for other GPUs", async () => {
    cudaScene(folder.path, { kind: "cubin", architecture: 72 });
    const failure = await failureOf({});
    expect(failure).toMatchObject({ reason: "no-kernel-image", available: ["sm_72"], device: { architecture: 87 } });
    const code = `${IMPORT}
      try { await halfbyte.init({ device: "cuda" }); } catch (e) {
        give([e instanceof halfbyte.NoKernelImageError, e.architecture, e.available, e.reason]);
      }`;
    expect((await runScript(code, scene.env)).given).toEqual([true, "sm_87", ["sm_72"], "no-kernel-image"]);
  });

  test("are damaged", async () => {
    writeFileSync(`${scene.kernels}/fourbit.ptx`, "lies");
    const { reason, detail } = await failureOf({});
    expect(reason).toBe("no-kernel-image");
    expect(detail).toContain("fourbit.ptx");
  });

  test("are absent", async () => {
    const { reason } = await failureOf({ HALFBYTE_KERNELS: folder.file("none") });
    expect(reason).toBe("no-kernel-image");
  });
});

describe.skipIf(NO_SCENE)(`the answer${NO_SCENE}`, () => {
  test("is asked for once when several wait for it, and again with fresh", async () => {
    const code = `${IMPORT}
      const two = await Promise.all([halfbyte.probeCuda(), halfbyte.probeCuda()]);
      give({ same: two[0] === two[1], again: halfbyte.probeCudaSync().cached, fresh: (await halfbyte.probeCuda({ fresh: true })).cached });`;
    expect((await runScript(code, scene.env)).given).toEqual({ same: true, again: true, fresh: false });
  });

  test("from the file starts nothing: a driver that would hang is not opened", async () => {
    scene.rememberSuccess();
    const env = { ...scene.env, HALFBYTE_FAKE_CUDA_INIT: "hang", HALFBYTE_PROBE_TIMEOUT: "1500" };
    const code = `${IMPORT}
      const [known, fresh] = [halfbyte.probeCudaSync(), halfbyte.probeCudaSync({ fresh: true })];
      give([known.ok, known.cached, fresh.ok, fresh.reason, halfbyte.probeCudaSync().reason]);`;
    const { given } = await runScript(code, env);
    expect(given).toEqual([true, true, false, "probe-timeout", "probe-timeout"]);
  });

  test("does not depend on what the program wants of Node, nor on what the driver prints", async () => {
    const noise = folder.file("noise.cjs");
    writeFileSync(noise, 'process.stdout.write("{\\"ok\\":true}\\n"); console.error("noise");');
    const env = { ...scene.env, NODE_OPTIONS: `--require ${noise}` };
    const { given } = await runScript<Failure[]>(BOTH, env);
    for (const failure of given) expect(failure.reason).toBe("probe-mismatch");
  });

  test("is probe-crashed where no process may be started", async () => {
    const code = `${IMPORT} process.execPath = "/no/such/node";
      give([await halfbyte.probeCuda({ fresh: true }), halfbyte.probeCudaSync({ fresh: true })]);`;
    const { given } = await runScript<Failure[]>(code, scene.env);
    for (const { reason, detail } of given) {
      expect(reason).toBe("probe-crashed");
      expect(detail).toMatch(/^the probe cannot be started: .*ENOENT/);
    }
  });

  test("is probe-crashed where no file descriptor is left", () => {
    const code = `import * as halfbyte from ${JSON.stringify(new URL("../../dist/index.js", import.meta.url).href)};
      import { openSync } from "node:fs";
      const open = () => { for (;;) openSync("/dev/null"); };
      try { open(); } catch {}
      const answers = [await halfbyte.probeCuda(), halfbyte.probeCudaSync({ fresh: true })];
      console.log(JSON.stringify(answers.map(({ reason, detail }) => [reason, detail])));`;
    const limited = ["-c", 'ulimit -n 100; exec "$@"', "-", process.execPath, "--input-type=module", "-e", code];
    const env = { ...process.env, ...scene.env };
    const { stdout, stderr } = spawnSync("bash", limited, { encoding: "utf8", env, timeout: 20_000 });
    expect(stderr).toBe("");
    for (const [reason, detail] of JSON.parse(stdout) as [string, string][]) {
      expect(reason).toBe("probe-crashed");
      expect(detail).toMatch(/^the probe cannot be started: .* EMFILE$/);
    }
  });
});

describe.skipIf(NO_SCENE)(`a probe's process that${NO_SCENE}`, () => {
  /** Stands in for Node: a shell script that says on descriptor 3 what a probe would. */
  function actor(...lines: string[]): string {
    const file = folder.file("actor");
    writeFileSync(file, ["#!/bin/sh", ...lines].join("\n"), { mode: 0o755 });
    return `process.execPath = ${JSON.stringify(file)};`;
  }
  const success = (): string =>
    JSON.stringify({ ok: true, device: FAKE_ORIN, images: ["an image"], library: scene.library });
  const say = (line: string): string => `echo '${line}' >&3`;

  test("succeeds is remembered by this process and by the next, until a file changes", async () => {
    const code = actor(
      "echo noise",
      "echo more noise >&2",
      say("{"),
      say("[1]"),
      say('{"at":"it ran"}'),
      say(success()),
    );
    const first = await runScript<ProbeResult[]>(
      `${IMPORT}${code} give([await halfbyte.probeCuda(), halfbyte.probeCudaSync()]);`,
      scene.env,
    );
    expect(first.given[0]).toEqual({
      ok: true,
      device: FAKE_ORIN,
      images: ["an image"],
      cached: false,
      milliseconds: expect.any(Number),
    });
    expect(first.given[1]).toEqual({ ...first.given[0], cached: true });
    const [file] = readdirSync(folder.file("cache/halfbyte"));
    expect(file).toBe("probe.json");
    const ask = `${IMPORT} give(halfbyte.probeCudaSync());`;
    expect((await runScript(ask, scene.env)).given).toEqual(first.given[1]);
    const manifest = `${scene.kernels}/manifest.json`;
    writeFileSync(manifest, readFileSync(manifest, "utf8") + "\n");
    expect((await runScript(ask, scene.env)).given).toMatchObject({ ok: false, reason: "probe-mismatch" });
  });

  test("crashes after its success has not succeeded", async () => {
    const code = actor(
      say('{"at":"the device was given back"}'),
      say(success()),
      "echo double free >&2",
      "kill -SEGV $$",
    );
    const { given } = await runScript<Failure[]>(
      `${IMPORT}${code} give([await halfbyte.probeCuda(), halfbyte.probeCudaSync({ fresh: true })]);`,
      scene.env,
    );
    for (const { ok, reason, detail } of given) {
      expect({ ok, reason }).toEqual({ ok: false, reason: "probe-crashed" });
      expect(detail).toBe("the probe ended with SIGSEGV while the device was given back (double free)");
    }
    expect(existsSync(folder.file("cache"))).toBe(false);
  });

  test("ends without a word is a crash too", async () => {
    const { given } = await runScript<Failure>(
      `${IMPORT}${actor("exit 7")} give(await halfbyte.probeCuda());`,
      scene.env,
    );
    expect(given).toMatchObject({
      reason: "probe-crashed",
      detail: "the probe exited with code 7 while the process started",
    });
  });

  test("leaves somebody behind who holds its pipes is not waited for", async () => {
    const code = actor("sleep 20 &", say(success()));
    const { given, milliseconds } = await runScript<ProbeResult>(
      `${IMPORT}${code} give(await halfbyte.probeCuda());`,
      scene.env,
    );
    expect(given.ok).toBe(true);
    expect(milliseconds).toBeLessThan(10_000);
  });

  test("is over keeps the program no longer", async () => {
    const code = `${IMPORT}${actor(say(success()))}
      await halfbyte.probeCuda();
      const answered = performance.now();
      process.on("exit", () => give(performance.now() - answered));`;
    expect((await runScript<number>(code, scene.env)).given).toBeLessThan(300);
  });

  test("is the program itself, which has Node inside, does not start the next", async () => {
    const count = folder.file("count");
    const nested = `import("${new URL("../../dist/index.js", import.meta.url).href}").then((h) => { process.execPath = process.env.ACTOR; h.probeCudaSync(); })`;
    const code = actor(
      `echo started >> ${count}`,
      `test $(wc -l < ${count}) -gt 3 || ${process.execPath} -e '${nested}'`,
      "exit 7",
    );
    const { given } = await runScript<Failure>(`${IMPORT}${code} give(halfbyte.probeCudaSync());`, {
      ...scene.env,
      ACTOR: folder.file("actor"),
    });
    expect(given.reason).toBe("probe-crashed");
    expect(readFileSync(count, "utf8")).toBe("started\n");
  });

  test("is ended with the program that waits for it", async () => {
    const code = `${actor(`echo $$ > ${folder.file("pid")}`, "exec sleep 20")}
      import { existsSync, readFileSync } from "node:fs";
      halfbyte.probeCuda();
      const timer = setInterval(() => {
        if (!existsSync(${JSON.stringify(folder.file("pid"))})) return;
        const pid = Number(readFileSync(${JSON.stringify(folder.file("pid"))}, "utf8"));
        if (pid > 0) { give(pid); process.exit(); }
      }, 10);`;
    const { given: pid, milliseconds } = await runScript<number>(IMPORT + code, scene.env);
    expect(milliseconds).toBeLessThan(10_000);
    await until(() => !alive(pid), 5);
  });
});

function alive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return !readFileSync(`/proc/${pid}/stat`, "utf8").includes(") Z ");
  } catch {
    return false;
  }
}

describe.skipIf(NO_SCENE)(`after a good probe${NO_SCENE}`, () => {
  beforeEach(() => scene.rememberSuccess());

  test("auto is cuda, both backends live in one program, and each is closed by shutdown", async () => {
    const code = `${IMPORT}
      const x = halfbyte.tensor([1, 2, 3]);
      const y = halfbyte.tensor([4, 5], { device: "cpu" });
      const back = halfbyte.empty([3], { device: "cpu" }).copyFrom(x);
      const { cpu, cuda } = halfbyte.memory();
      const seen = [x.device, y.device, [...x.dataSync()], [...(await back.data())], cpu.tensors, cuda.tensors, cuda.bytes];
      await halfbyte.shutdown();
      const after = halfbyte.memory();
      seen.push(Object.keys(after).length, halfbyte.tensor([6]).device);
      await halfbyte.shutdown();
      give(seen);`;
    const { given, stderr } = await runScript(code, scene.env);
    expect(given).toEqual(["cuda", "cpu", [1, 2, 3], [1, 2, 3], 2, 1, 12, 0, "cuda"]);
    expect(stderr).toBe("");
  });

  test("init takes the options of the device it finds", async () => {
    const code = `${IMPORT}
      const cuda = await halfbyte.init({ memoryLimit: 1 << 24, threads: 1, guards: true });
      const cpu = await halfbyte.init({ device: "cpu", threads: 1, memoryLimit: 1 << 25 });
      const { memory } = halfbyte;
      give([cuda.device, memory().cuda.limitBytes, cpu.threads, memory().cpu.limitBytes, halfbyte.tensor([1]).device]);
      await halfbyte.shutdown();`;
    expect((await runScript(code, scene.env)).given).toEqual(["cuda", 2 ** 24, 1, 2 ** 25, "cpu"]);
  });

  test("a wrong option is an error, not a reason to fall back", async () => {
    const code = `${IMPORT}
      try { await halfbyte.init({ memoryLimit: -1 }); } catch (e) { give([e.code, e.operand, Object.keys(halfbyte.memory())]); }`;
    expect((await runScript(code, scene.env)).given).toEqual(["ERR_HALFBYTE_ARGUMENT", "memoryLimit", []]);
  });

  test("a driver that fails in this process all the same: auto is the cpu with a warning, cuda an error", async () => {
    const code = `${IMPORT}
      const devices = [halfbyte.tensor([1]).device, (await halfbyte.tensor([2]).data()).length];
      try { halfbyte.getBackend("cuda"); } catch (e) { give([devices, e.reason]); }
      await halfbyte.shutdown();`;
    const { given, stderr } = await runScript(code, { ...scene.env, HALFBYTE_FAKE_CUDA_DEVICES: "0" });
    expect(given).toEqual([["cpu", 1], "no-device"]);
    expect(stderr.match(/HALFBYTE_CUDA_FALLBACK/g)).toHaveLength(1);
  });

  test("golden check --device cuda runs on it: it takes the fake driver's zeros for what they are", async () => {
    const { code, stdout } = await halfbyte(["golden", "check", "test/golden/data", "--device", "cuda"], {
      env: scene.env,
    });
    expect(code).toBe(1);
    expect(stdout).toContain("--device cuda --case");
  });
});

const missing = cudaMissing();
test.skipIf(missing)(`the real GPU passes${missing ? ` (skipped: ${missing})` : ""}`, async () => {
  const env = { XDG_CACHE_HOME: folder.file("cache") };
  const code = `${IMPORT} give([await halfbyte.probeCuda(), halfbyte.probeCudaSync(), halfbyte.probeCudaSync({ fresh: true })]);`;
  const first = await runScript<ProbeResult[]>(code, env);
  expect(first.given.map(({ ok, cached }) => [ok, cached])).toEqual([
    [true, false],
    [true, true],
    [true, false],
  ]);
  expect(readdirSync(folder.file("cache/halfbyte"))).toEqual(["probe.json"]);
  expect(readFileSync(folder.file("cache/halfbyte/probe.json"), "utf8")).toContain('"ok":true');
  const second = await runScript<ProbeResult>(`${IMPORT} give(await halfbyte.probeCuda());`, env);
  expect(second.given).toMatchObject({ ok: true, cached: true });
});
