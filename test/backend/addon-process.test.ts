/** The native addon against the fake driver, in processes of their own: garbage, threads, faults, and the ways to end. */
import { spawnSync } from "node:child_process";
import { copyFileSync, existsSync, mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, describe, expect, test } from "vitest";
import { BINDING } from "#halfbyte/backend/cuda/addon.js";
import { addonPath, loadAddon } from "#halfbyte/backend/cuda/load.js";
import { fakeCuda } from "../helpers/fake-cuda.js";
import { sanitizedAddon, sanitizerMissing } from "../helpers/sanitized-addon.js";

const library = fakeCuda();
const built = existsSync(addonPath());
if (!built) console.log("skipped: there is no native addon (npm run build:addon)");

const ILLEGAL_ADDRESS = 700;
const folder = mkdtempSync(join(tmpdir(), "halfbyte-addon-"));
afterAll(() => rmSync(folder, { recursive: true }));

const [LOAD, INTERFACE] = ["load", "addon"].map((module) =>
  JSON.stringify(new URL(`../../dist/backend/cuda/${module}.js`, import.meta.url).href),
);

/** What the programs of the tests below begin with. */
const PREAMBLE = `
import { loadAddon, check } from ${LOAD};
import { BINDING, BLAS_COMMAND, BLAS_WORDS, COMMAND_OPERANDS, COMMAND_WORDS } from ${INTERFACE};
const addon = loadAddon(process.env.ADDON_ROOT);
const must = (name, ...args) => { check(addon, name, addon[name](...args)); return addon.results[0]; };
const start = () => { must("open", process.env.LIBRARY); must("init"); must("retainContext", 0); };
const say = (value) => console.log(JSON.stringify(value));
function command(func, stream, operands, grid = 1, block = 32) {
  const words = new Uint32Array(addon.command, 0, 6);
  words[COMMAND_WORDS.func] = func; words[COMMAND_WORDS.grid] = grid; words[COMMAND_WORDS.block] = block;
  words[COMMAND_WORDS.shared] = 0; words[COMMAND_WORDS.stream] = stream; words[COMMAND_WORDS.operandBytes] = operands.byteLength;
  new Uint8Array(addon.command, COMMAND_OPERANDS).set(operands);
}
const kernel = (name) => must("moduleFunction", must("moduleLoad", Buffer.from("text")), name);
`;

/** Every function with whatever comes. */
const GARBAGE = `
process.env.HALFBYTE_FAKE_CUDA_MANAGED = "1";
start();
must("blasOpen", process.env.LIBRARY, {});
const values = [undefined, null, true, false, 0, -0, 1, 2, 65536, 65537, 131072, -1, 0.5, NaN, Infinity, -Infinity, 2 ** 31,
  2 ** 32, 2 ** 53, 1e300, "", "text", "a\\0b", "x".repeat(5000), Symbol("s"), 10n, {}, [], () => { throw new Error("called"); },
  new Uint8Array(0), new Uint8Array(100), new Float64Array(4), new DataView(new ArrayBuffer(8)), new ArrayBuffer(8),
  new Proxy({}, { set() { throw new Error("set"); } }), Object.freeze({})];
const stream = must("streamCreate"), event = must("eventCreate", true), host = must("hostAllocate", 64), memory = must("memoryAllocate", 64);
const managed = must("memoryAllocateManaged", 64);
values.push(stream, event, host, memory, memory + 63, managed, managed + 1);
// Nobody else has these.
const hidden = must("streamCreate"), place = must("memoryAllocate", 4096);
let seed = 1, calls = 0, negative = 0, products = 0;
const random = (n) => (seed = (seed * 48271) % 2147483647) % n;
// What would end the world that the rest needs, or block for ever.
const skip = ["command", "results", "open", "releaseContext"];
const names = Object.keys(addon).filter((name) => !skip.includes(name));
for (let round = 0; round < Number(process.env.ROUNDS ?? 3000); round++) {
  for (const name of names) {
    const args = Array.from({ length: random(7) }, () => values[random(values.length)]);
    const answer = addon[name](...args);
    calls++;
    if (name === "describe" ? answer.length !== 2 : name === "detail" ? typeof answer !== "string" : !Number.isInteger(answer)) {
      throw new Error(name + " answered " + answer);
    }
    if (answer < 0) negative++;
    // A stream is a thread.
    if (name === "streamCreate" && answer === 0 && random(100)) addon.streamDestroy(addon.results[0]);
  }
  const words = new Uint32Array(addon.command);
  for (let i = 0; i < 6; i++) words[i] = random(3) ? random(2 ** 31) : values[random(20)];
  const product = new Uint32Array(addon.command, BLAS_COMMAND, 28);
  for (const [name, at] of Object.entries(BLAS_WORDS)) {
    product[at] = name === "dtype" ? random(5) : at < BLAS_WORDS.stream ? 1 + random(4) : name === "stream" ? hidden : 0;
    if (/^(a|b|y|bias)$/.test(name)) [product[at], product[at + 1]] = [place, place / 2 ** 32];
  }
  for (let i = random(4); i > 0; i--) product[random(28)] = random(2) ? random(2 ** 31) : values[random(20)];
  const multiplied = addon.blasMatmul();
  if (multiplied > 0) throw new Error("multiplied: " + multiplied);
  if (multiplied === 0) products++;
  const status = addon.launch();
  if (status >= 0) throw new Error("launched garbage: " + status);
}
// Node 24 refuses to detach it, Node 20 does not.
try { structuredClone(addon.command, { transfer: [addon.command] }); } catch {}
addon.launch();
must("releaseContext");
must("retainContext", 0);
must("memoryFree", must("memoryAllocate", 1));
say(calls); say(negative); say("still there"); say(products);`;

/** Contexts come and go while the completion thread reports, waits or has nothing to do. */
const SOAK = `
must("open", process.env.LIBRARY); must("init");
for (let round = 0; round < 30; round++) {
  must("retainContext", 0);
  let left = 0, over;
  const all = new Promise((resolve) => { over = resolve; });
  must("onCompleted", () => { if (--left === 0) over(); });
  const stream = must("streamCreate"), host = must("hostAllocate", 4096), memory = must("memoryAllocate", 4096);
  for (let i = 0; i < 100; i++) {
    const event = must("eventCreate", false);
    must("copyFromHost", memory, host, 0, 4096, stream);
    must("eventRecord", event, stream);
    for (let n = 0; n <= i % 3; n++) { must("watch", event, i); left++; }
    if (i % 2) must("eventDestroy", event);
    must("hold", i % 20 !== 0);
  }
  if (round % 3 === 0) await all;
  if (round % 3 === 1) await new Promise((resolve) => setTimeout(resolve, 1));
  if (round < 29) must("releaseContext");
}
say("soaked");
process.exit(0);`;

interface Ended {
  readonly lines: unknown[];
  readonly code: number | null;
  readonly signal: NodeJS.Signals | null;
  readonly stderr: string;
}

/** Runs a program in a process of its own. */
function child(
  program: string,
  environment: Record<string, string> = {},
  [command, ...args]: readonly [string, ...string[]] = [process.execPath],
): Ended {
  const { stdout, stderr, status, signal } = spawnSync(
    command,
    [...args, "--input-type=module", "-e", PREAMBLE + program],
    { encoding: "utf8", timeout: 60_000, env: { ...process.env, LIBRARY: library, ...environment } },
  );
  const lines = stdout.split("\n").filter(Boolean);
  return { lines: lines.map((line) => JSON.parse(line) as unknown), code: status, signal, stderr };
}

/** What a program says that must end well. */
function says(program: string, environment: Record<string, string> = {}): unknown[] {
  const { lines, code, signal, stderr } = child(program, environment);
  expect({ code, signal, stderr }).toEqual({ code: 0, signal: null, stderr: "" });
  return lines;
}

describe.runIf(built && library !== undefined)("processes", () => {
  test("whatever comes as an argument is a status, and the addon works afterwards", () => {
    const [calls, negative, still, products] = says(GARBAGE);
    expect(calls).toBeGreaterThan(100_000);
    expect(negative).toBeGreaterThan(50_000);
    expect(still).toBe("still there");
    // Some of it made sense.
    expect(products).toBeGreaterThan(0);
  });

  test("a driver without managed memory's functions serves all else", () => {
    const lines = says(
      `start();
       const memory = must("memoryAllocate", 4096), stream = must("streamCreate");
       say([addon.memoryAllocateManaged(64), addon.detail()]);
       say([addon.memoryAdvise(memory, 64, 3, -1), addon.detail()]);
       say([addon.memoryPrefetch(memory, 64, 0, stream), addon.detail()]);
       say(addon.fill8(memory, 1, 64, stream)); say(addon.streamSynchronize(stream));
       try { check(addon, "memoryAllocateManaged", addon.memoryAllocateManaged(64)); } catch (e) { say([e.reason, e.detail]); }`,
      { LIBRARY: fakeCuda("unmanaged")! },
    );
    const { missingSymbol } = BINDING;
    expect(lines).toEqual([
      [missingSymbol, "cuMemAllocManaged"],
      [missingSymbol, "cuMemAdvise"],
      [missingSymbol, "cuMemPrefetchAsync"],
      0,
      0,
      ["driver-too-old", "the driver library lacks cuMemAllocManaged"],
    ]);
  });

  test("a worker thread is refused, by the loader and by the addon", () => {
    const [main, worker] = says(`
      import { Worker } from "node:worker_threads";
      start();
      const program = \`
        import { createRequire } from "node:module";
        import { parentPort } from "node:worker_threads";
        import { addonPath, loadAddon } from ${LOAD};
        const addon = createRequire("/")(addonPath());
        let reason;
        try { loadAddon(); } catch (error) { reason = error.reason; }
        parentPort.postMessage([reason, addon.open(), addon.init(), addon.launch(), addon.memoryAllocate(1), addon.releaseContext(), addon.detail(), addon.describe(2)[0]]);
      \`;
      new Worker(new URL("data:text/javascript," + encodeURIComponent(program)))
        .on("message", (answer) => { say("main"); say(answer); must("memoryAllocate", 1); });`);
    const { wrongThread } = BINDING;
    expect(main).toBe("main");
    const refusals = Array.from({ length: 5 }, () => wrongThread);
    // The driver is not asked there either.
    expect(worker).toEqual(["worker-thread", ...refusals, "", "unknown"]);
  });

  test("a second copy of the addon keeps its context when the first one gives its own back", () => {
    const copy = join(folder, "copy.node");
    copyFileSync(addonPath(), copy);
    expect(
      says(`
        import { createRequire } from "node:module";
        const second = createRequire("/")(${JSON.stringify(copy)});
        start();
        const before = [second.open(process.env.LIBRARY), second.init(), second.retainContext(0), second.streamCreate()];
        must("releaseContext");
        say([...before, second.memoryAllocate(100), second.streamCreate(), second.releaseContext(), second.retainContext(0), second.releaseContext()]);`),
    ).toEqual([Array.from({ length: 9 }, () => 0)]);
  });

  test("an image that another thread changes meanwhile is checked as it is loaded", () => {
    const [, refused] = says(`
      import { readFileSync } from "node:fs";
      import { Worker } from "node:worker_threads";
      start();
      const elf = readFileSync(${JSON.stringify(addonPath())});
      const shared = new Uint8Array(new SharedArrayBuffer(elf.length));
      shared.set(elf);
      const program = \`
        import { parentPort, workerData } from "node:worker_threads";
        parentPort.postMessage("ready");
        // Where the section headers begin: right, and far outside.
        for (;;) { workerData[46] ^= 1; for (let i = 0; i < 100; i++); }\`;
      const worker = new Worker(new URL("data:text/javascript," + encodeURIComponent(program)), { workerData: shared });
      worker.on("message", () => {
        let loaded = 0, refused = 0;
        const end = performance.now() + 1000;
        while (performance.now() < end) {
          const status = addon.moduleLoad(shared);
          if (status === 0) { loaded++; must("moduleUnload", addon.results[0]); } else if (status === 200) refused++; else throw new Error(status);
        }
        say(loaded); say(refused);
        process.exit(0);
      });`);
    expect(refused).toBeGreaterThan(0);
  });

  test("Node.js that may not load addons is told so", () => {
    const program = `import { loadAddon } from ${LOAD};
      try { loadAddon(); } catch (error) { console.log(JSON.stringify([error.reason, error.detail, error.advice])); }`;
    const { stdout } = spawnSync(process.execPath, ["--no-addons", "--input-type=module", "-e", program], {
      encoding: "utf8",
    });
    expect(JSON.parse(stdout)).toEqual([
      "platform",
      expect.stringMatching(/^the native addon does not load in this process \(.*disabled\)$/),
      expect.stringContaining("--no-addons"),
    ]);
  });

  test("the addon is not found", () => {
    expect(() => loadAddon(folder)).toThrow(
      expect.objectContaining({ reason: "addon-missing", detail: expect.stringContaining(folder) }),
    );
  });

  const WATCH = `
    start();
    addon.onCompleted((token, status) => say([token, status]));
    const stream = must("streamCreate"), sleep = kernel("fake_sleep");
    function pending(token, milliseconds) {
      const event = must("eventCreate", false);
      command(sleep, stream, new Uint8Array(Uint32Array.of(milliseconds).buffer));
      must("launch"); must("eventRecord", event, stream); must("watch", event, token);
    }`;

  test("a watched event does not keep the process alive, a held one does", () => {
    expect(says(`${WATCH} pending(1, 500);`)).toEqual([]);
    expect(
      says(`${WATCH} pending(1, 100); pending(2, 0);
        must("hold", true); addon.onCompleted((token, status) => { say([token, status]); if (token === 2) must("hold", false); });`),
    ).toEqual([
      [1, 0],
      [2, 0],
    ]);
  });

  test.each([
    ["at once", "process.exit(0);"],
    ["later", "setTimeout(() => process.exit(0), 50);"],
    ["when a report comes", "pending(3, 50); addon.onCompleted(() => process.exit(0)); must('hold', true);"],
  ])("process.exit %s with events pending: no crash, no hang", (_, end) => {
    for (const milliseconds of [0, 1, 300]) {
      expect(says(`${WATCH} pending(1, ${milliseconds}); pending(2, ${milliseconds}); ${end}`).length).toBeLessThan(3);
    }
  });

  test("the context goes when the process ends by itself", () => {
    const report = join(folder, "end");
    says(`${WATCH} pending(1, 50); must("memoryAllocate", 5); must("hostAllocate", 5);`, {
      HALFBYTE_FAKE_CUDA_REPORT: report,
    });
    expect(readFileSync(report, "utf8")).toBe("allocations=0 hosts=0 streams=0 events=0 modules=0\n");
  });

  test("releasing the context forgets what is watched, and the next context works", () => {
    expect(
      says(`${WATCH} pending(1, 100); pending(2, 0);
        must("releaseContext"); say("released"); must("retainContext", 0);
        const again = must("streamCreate"), event = must("eventCreate", false);
        must("eventRecord", event, again); must("watch", event, 7); must("hold", true);
        addon.onCompleted((token, status) => { say([token, status]); must("hold", false); });`),
    ).toEqual(["released", [7, 0]]);
  });

  test("what a callback throws is an uncaught exception", () => {
    const { lines, code } =
      child(`${WATCH} process.on("uncaughtException", (e) => { say(e.message); process.exit(9); });
      addon.onCompleted(() => { throw new Error("mine"); }); must("hold", true); pending(1, 1);`);
    expect([lines, code]).toEqual([["mine"], 9]);
  });

  test("a fault completes every watched event with its status, and another context works", () => {
    const lines = says(`${WATCH} must("hold", true);
      addon.onCompleted((token, status) => {
        say([token, status]);
        if (token < 3) return;
        say([addon.memoryAllocate(1), addon.launch(), addon.streamSynchronize(stream), addon.memoryInfo()]);
        must("hold", false);
        must("releaseContext"); must("retainContext", 0); say(addon.memoryFree(must("memoryAllocate", 1)));
      });
      pending(1, 0);
      command(sleep, stream, new Uint8Array(Uint32Array.of(400).buffer)); must("launch");
      command(kernel("fake_fault"), stream, new Uint8Array(8)); must("launch");
      pending(2, 50); pending(3, 50);`);
    const fault = ILLEGAL_ADDRESS;
    expect(lines).toEqual([[1, 0], [2, fault], [3, fault], [fault, fault, fault, fault], 0]);
  });

  test("what the fake driver is told", () => {
    expect(
      says(`say(addon.open(process.env.LIBRARY)); say(addon.init());`, { HALFBYTE_FAKE_CUDA_DEVICES: "0" }),
    ).toEqual([0, 100]);
    const { signal } = child(`start();`, { HALFBYTE_FAKE_CUDA_INIT: "segv" });
    expect(signal).toBe("SIGSEGV");
    expect(
      says(
        `start(); say(addon.memoryAllocate(1001)); say(addon.memoryAllocate(1000)); say(addon.memoryAllocate(1)); must("driverVersion"); say(addon.results[0]);
         say(addon.moduleLoad(Buffer.from("text"))); say(addon.detail());`,
        {
          HALFBYTE_FAKE_CUDA_MEMORY: "1000",
          HALFBYTE_FAKE_CUDA_VERSION: "11000",
          HALFBYTE_FAKE_CUDA_MODULE: "209",
        },
      ),
    ).toEqual([2, 0, 2, 11000, 209, "fake compiler: no code for this GPU"]);
    expect(
      says(
        `${WATCH} must("hold", true); addon.onCompleted((token, status) => { say([token, status]); if (token === 2) must("hold", false); });
         pending(1, 0); pending(2, 0);`,
        { HALFBYTE_FAKE_CUDA_FAULT_AT: "2", HALFBYTE_FAKE_CUDA_DELAY_MS: "150" },
      ),
    ).toContainEqual([2, ILLEGAL_ADDRESS]);
  });
});

describe.each(["thread", "address"] as const)("compiled with -fsanitize=%s", (kind) => {
  const missing = sanitizerMissing(kind);
  const skipped = missing && ` (skipped: ${missing})`;
  const quiet = (program: string): Ended => {
    const { root, library: driver, command, env } = sanitizedAddon(kind);
    return child(program, { ...env, ADDON_ROOT: root, LIBRARY: driver, ROUNDS: "300" }, command);
  };

  test.skipIf(skipped)(`garbage is quiet${skipped}`, () => {
    const { lines, code, stderr } = quiet(GARBAGE);
    expect({ still: lines[2], code, stderr }).toEqual({ still: "still there", code: 0, stderr: "" });
  });

  test.skipIf(skipped)(`the completion thread is quiet${skipped}`, () => {
    expect(quiet(SOAK)).toEqual({ lines: ["soaked"], code: 0, signal: null, stderr: "" });
  });
});
