/** The native addon against the fake driver: every function and its misuse, in one process. addon-process.test.ts has the rest. */
import { existsSync, mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, beforeEach, describe, expect, test } from "vitest";
import {
  BINDING,
  COMMAND_OPERANDS,
  COMMAND_WORDS,
  type CudaAddon,
  HOST,
  type Status,
} from "#halfbyte/backend/cuda/addon.js";
import { addonPath, check, loadAddon } from "#halfbyte/backend/cuda/load.js";
import { CudaError, CudaUnavailableError } from "#halfbyte/core/errors.js";
import { fakeCuda } from "../helpers/fake-cuda.js";

const library = fakeCuda();
const built = existsSync(addonPath());
if (!built) console.log("skipped: there is no native addon (npm run build:addon)");
const here = built && library !== undefined;

const NOT_READY = 600;
/** What whoever sits before a board needs to be told, by cuInit's status. */
const ADVICE = {
  100: /groups video and render/,
  34: /library path/,
  35: /JetPack/,
  803: /cuda-compat/,
  804: /cuda-compat/,
  999: /groups video and render/,
};
const IMAGE = Buffer.from("any text is a module to the fake driver");
const folder = mkdtempSync(join(tmpdir(), "halfbyte-addon-"));
afterAll(() => rmSync(folder, { recursive: true }));

describe.runIf(here)("one process", () => {
  let addon: CudaAddon;
  let stream: number;

  /** results[0] of a call that must succeed. */
  const made = (status: Status): number => {
    expect([status, addon.detail()]).toEqual([0, ""]);
    return addon.results[0]!;
  };
  const ok = (status: Status): void => void made(status);
  const refused = (status: Status, expected: number, detail: RegExp): void => {
    expect(status).toBe(expected);
    expect(addon.detail()).toMatch(detail);
  };

  beforeAll(() => {
    addon = loadAddon();
    expect(loadAddon()).toBe(addon);
    expect(addon.deviceCount()).toBe(BINDING.closed);
    expect(addon.launch()).toBe(BINDING.closed);
    expect(addon.releaseContext()).toBe(BINDING.closed);
    refused(addon.open(join(folder, "none.so")), BINDING.noLibrary, /none\.so: cannot open/);
    expect(() => check(addon, "open", addon.open("/none.so"))).toThrow(
      expect.objectContaining({ reason: "no-driver", detail: expect.stringContaining("/none.so: cannot open") }),
    );
    refused(addon.open(fakeCuda("old")!), BINDING.missingSymbol, /^cuEventElapsedTime$/);
    expect(addon.deviceCount()).toBe(BINDING.closed);
    ok(addon.open(library));
    ok(addon.open(library));
    refused(addon.open("other.so"), BINDING.badArgument, /is open already/);
    expect(addon.deviceCount()).toBe(3);
    expect(addon.describe(3)).toEqual(["CUDA_ERROR_NOT_INITIALIZED", "initialization error"]);
    ok(addon.init());
    expect(addon.memoryInfo()).toBe(201);
    expect(addon.streamCreate()).toBe(201);
    refused(addon.retainContext(1), 101, /^$/);
    ok(addon.retainContext(0));
    refused(addon.retainContext(0), BINDING.badArgument, /device 0 is retained already/);
  });
  beforeEach(() => {
    stream = made(addon.streamCreate());
    return () => ok(addon.streamDestroy(stream));
  });
  afterAll(() => {
    const report = join(folder, "release");
    process.env.HALFBYTE_FAKE_CUDA_REPORT = report;
    made(addon.memoryAllocate(100));
    made(addon.memoryAllocateManaged(100));
    made(addon.hostAllocate(100));
    made(addon.moduleLoad(IMAGE));
    made(addon.eventCreate(false));
    const left = made(addon.streamCreate());
    ok(addon.releaseContext());
    ok(addon.releaseContext());
    delete process.env.HALFBYTE_FAKE_CUDA_REPORT;
    expect(readFileSync(report, "utf8")).toBe("allocations=0 hosts=0 streams=0 events=0 modules=0\n");
    refused(addon.streamQuery(left), BINDING.badHandle, /stream/);
    ok(addon.retainContext(0));
    ok(addon.releaseContext());
  });

  const address = (bytes: number): number => made(addon.memoryAllocate(bytes));

  function prepare(func: number, operands: Uint8Array, { grid = 1, block = 32, shared = 0 } = {}): void {
    const words = new Uint32Array(addon.command, 0, 6);
    words[COMMAND_WORDS.func] = func;
    words[COMMAND_WORDS.grid] = grid;
    words[COMMAND_WORDS.block] = block;
    words[COMMAND_WORDS.shared] = shared;
    words[COMMAND_WORDS.stream] = stream;
    words[COMMAND_WORDS.operandBytes] = operands.length;
    new Uint8Array(addon.command, COMMAND_OPERANDS).set(operands);
  }

  test("every status has a name and words", () => {
    for (const [name, status] of Object.entries(BINDING)) {
      const [found, words] = addon.describe(status);
      expect(found).toBe(name);
      expect(words).toMatch(/^[a-z ,]+$/);
      expect(words).not.toBe("unknown status");
    }
    expect(addon.describe(2)).toEqual(["CUDA_ERROR_OUT_OF_MEMORY", "out of memory"]);
    expect(addon.describe(123456)).toEqual(["unknown", "unknown status"]);
    expect(addon.describe(-100)).toEqual(["unknown", "unknown status"]);
    expect(addon.describe("x" as never)).toEqual(["unknown", "unknown status"]);
  });

  test("statuses become errors", () => {
    expect(() => check(addon, "init", 0)).not.toThrow();
    const thrown = (call: keyof CudaAddon, status: Status, kernel?: string): Error => {
      try {
        check(addon, call, status, kernel);
      } catch (error) {
        return error as Error;
      }
      throw new Error("nothing was thrown");
    };
    addon.detail();
    const stale = thrown("streamQuery", addon.streamQuery(5), "quantize4bit");
    expect(stale).toBeInstanceOf(CudaError);
    expect(stale).toMatchObject({ call: "streamQuery", status: -2, statusName: "badHandle", kernel: "quantize4bit" });
    expect(stale.message).toMatch(/argument 1 \(stream\): there is no 5, or no more in quantize4bit$/);
    for (const [status, reason] of [
      [100, "no-device"],
      [34, "no-driver"],
      [35, "driver-too-old"],
      [803, "driver-error"],
      [804, "driver-error"],
      [999, "driver-error"],
    ] as const) {
      const error = thrown("init", status);
      expect(error).toBeInstanceOf(CudaUnavailableError);
      expect(error).toMatchObject({ reason });
      expect((error as CudaUnavailableError).advice).toMatch(ADVICE[status]);
    }
    expect(thrown("moduleLoad", 100)).toBeInstanceOf(CudaError);
  });

  test("devices", () => {
    expect(made(addon.driverVersion())).toBe(13000);
    expect(made(addon.deviceCount())).toBe(1);
    expect(made(addon.deviceAttribute(0, 75))).toBe(8);
    expect(made(addon.deviceAttribute(0, 76))).toBe(7);
    const identity: { name?: string; uuid?: string } = {};
    expect(made(addon.deviceIdentity(0, identity))).toBe(8 * 2 ** 30);
    expect(identity).toEqual({ name: "Fake Orin", uuid: "f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff" });
    expect(addon.deviceAttribute(7, 75)).toBe(101);
    refused(addon.deviceAttribute(0.5, 75), BINDING.badArgument, /argument 1 \(device\): .* received 0\.5$/);
    refused(
      addon.deviceIdentity(0, null as never),
      BINDING.badArgument,
      /identity\): expected an object, received null/,
    );
    const throwing = { set name(_: string) { throw new Error("no"); } }; // biome-ignore format: one line
    refused(addon.deviceIdentity(0, throwing), BINDING.badArgument, /identity/);
  });

  test("device memory", () => {
    made(addon.memoryInfo());
    const [free, total] = addon.results;
    expect(total).toBe(8 * 2 ** 30);
    const a = address(1000);
    made(addon.memoryInfo());
    expect(addon.results[0]).toBe(free! - 1000);
    ok(addon.memoryFree(a));
    refused(addon.memoryFree(a), BINDING.badHandle, /nothing is allocated/);
    expect(addon.memoryAllocate(9 * 2 ** 30)).toBe(2);
    ok(addon.memoryFree(address(1)));
    refused(addon.memoryAllocate(0), BINDING.badArgument, /from 1 to 9007199254740991, received 0$/);
    refused(addon.memoryAllocate(2 ** 53), BINDING.badArgument, /bytes/);
    made(addon.memoryInfo());
    expect(addon.results[0]).toBe(free);
  });

  test("managed memory", () => {
    made(addon.memoryInfo());
    const free = addon.results[0]!;
    // Without concurrentManagedAccess it takes device memory, and there are no hints.
    const whole = made(addon.memoryAllocateManaged(1000));
    made(addon.memoryInfo());
    expect(addon.results[0]).toBe(free - 1000);
    expect(addon.memoryPrefetch(whole, 1000, 0, stream)).toBe(101);
    ok(addon.memoryFree(whole));
    process.env.HALFBYTE_FAKE_CUDA_MANAGED = "1";
    try {
      const [managed, plain] = [made(addon.memoryAllocateManaged(100_000)), address(100)];
      made(addon.memoryInfo());
      expect(addon.results[0]).toBe(free - 100);
      for (const device of [HOST, 0]) {
        ok(addon.memoryAdvise(managed, 100_000, 3, device));
        ok(addon.memoryPrefetch(managed + 10, 99_990, device, stream));
      }
      // It is memory like any other.
      const host = made(addon.hostAllocate(64));
      ok(addon.hostWrite(host, 0, new Uint8Array(64).fill(7)));
      ok(addon.copyFromHost(managed + 100, host, 0, 64, stream));
      ok(addon.fill8(managed + 101, 9, 1, stream));
      ok(addon.copyOnDevice(plain, managed + 100, 64, stream));
      ok(addon.copyToHost(host, 0, plain, 64, stream));
      ok(addon.streamSynchronize(stream));
      const back = new Uint8Array(64);
      ok(addon.hostRead(host, 0, back));
      expect([...back.subarray(0, 3)]).toEqual([7, 9, 7]);
      ok(addon.hostFree(host));

      expect(addon.memoryAdvise(plain, 100, 3, HOST)).toBe(1);
      expect(addon.memoryPrefetch(plain, 100, 0, stream)).toBe(1);
      expect(addon.memoryAdvise(managed, 100, 99, HOST)).toBe(1);
      expect(addon.memoryPrefetch(managed, 100, 7, stream)).toBe(101);
      refused(addon.memoryAllocateManaged(0), BINDING.badArgument, /from 1 to 9007199254740991, received 0$/);
      refused(addon.memoryAdvise(managed, 100_001, 3, HOST), BINDING.badArgument, /are not inside an allocation/);
      refused(addon.memoryAdvise(managed, 100, 0, HOST), BINDING.badArgument, /argument 3 \(advice\)/);
      refused(addon.memoryAdvise(managed, 100, 3, -2), BINDING.badArgument, /argument 4 \(device\): .*from -1/);
      refused(
        addon.memoryPrefetch(managed + 99_999, 2, 0, stream),
        BINDING.badArgument,
        /are not inside an allocation/,
      );
      refused(addon.memoryPrefetch(managed, 100, 0.5, stream), BINDING.badArgument, /argument 3 \(device\)/);
      refused(addon.memoryPrefetch(managed, 100, 0, 5), BINDING.badHandle, /argument 4 \(stream\)/);
      expect(addon.memoryAllocateManaged(9 * 2 ** 30)).toBe(2);
      ok(addon.memoryFree(managed));
      refused(addon.memoryFree(managed), BINDING.badHandle, /nothing is allocated/);
      refused(addon.memoryPrefetch(managed, 100, 0, stream), BINDING.badArgument, /are not inside an allocation/);
      ok(addon.memoryFree(plain));
      process.env.HALFBYTE_FAKE_CUDA_MANAGED_MEMORY = "0";
      expect(addon.memoryAllocateManaged(64)).toBe(801);
    } finally {
      delete process.env.HALFBYTE_FAKE_CUDA_MANAGED;
      delete process.env.HALFBYTE_FAKE_CUDA_MANAGED_MEMORY;
    }
    made(addon.memoryInfo());
    expect(addon.results[0]).toBe(free);
  });

  test("copies and fills, there and back", () => {
    const host = made(addon.hostAllocate(4096));
    const [a, b] = [address(4096), address(4096)];
    const bytes = Uint8Array.from({ length: 1000 }, (_, i) => i * 7);
    ok(addon.hostWrite(host, 96, bytes));
    ok(addon.copyFromHost(a + 10, host, 96, 1000, stream));
    ok(addon.copyOnDevice(b, a + 10, 1000, stream));
    ok(addon.fill8(b + 500, 0xab, 100, stream));
    ok(addon.fill32(b + 700, 0xdeadbeef, 8, stream));
    ok(addon.copyToHost(host, 2048, b, 1000, stream));
    ok(addon.streamSynchronize(stream));
    const back = new Uint8Array(new SharedArrayBuffer(1200), 100, 1000);
    ok(addon.hostRead(host, 2048, back));
    bytes.fill(0xab, 500, 600);
    bytes.set([0xef, 0xbe, 0xad, 0xde, 0xef, 0xbe, 0xad, 0xde], 700);
    expect(Uint8Array.from(back)).toEqual(bytes);
    ok(addon.hostRead(host, 4096, new Uint8Array(0)));

    refused(addon.hostRead(host, 3097, back), BINDING.badArgument, /1000 bytes at 3097 are not inside the 4096/);
    refused(addon.hostWrite(host, 2 ** 53 - 1, back), BINDING.badArgument, /offset/);
    refused(
      addon.hostWrite(host, 0, new Float32Array(2) as never),
      BINDING.badArgument,
      /a Uint8Array, received an object/,
    );
    refused(addon.copyFromHost(a, host, 4000, 97, stream), BINDING.badArgument, /offset/);
    refused(addon.copyFromHost(a + 4000, host, 0, 97, stream), BINDING.badArgument, /not inside an allocation/);
    refused(
      addon.copyToHost(host, 0, a - 1, 1, stream),
      BINDING.badArgument,
      /argument 3 \(from\).*not inside an allocation/,
    );
    refused(addon.copyOnDevice(a, 12345, 1, stream), BINDING.badArgument, /argument 2 \(from\)/);
    refused(addon.copyOnDevice(a, b, 1, host), BINDING.badHandle, /argument 4 \(stream\)/);
    refused(addon.fill8(a, 256, 1, stream), BINDING.badArgument, /value/);
    refused(addon.fill32(a + 2, 0, 4, stream), BINDING.badArgument, /multiples of 4/);
    refused(addon.fill32(a, 0, 6, stream), BINDING.badArgument, /multiples of 4/);
    ok(addon.memoryFree(a));
    refused(addon.fill8(a, 0, 1, stream), BINDING.badArgument, /not inside an allocation/);
    ok(addon.memoryFree(b));
    ok(addon.hostFree(host));
    refused(addon.hostFree(host), BINDING.badHandle, /host/);
    refused(addon.hostRead(host, 0, back), BINDING.badHandle, /host/);
  });

  test("streams and events", () => {
    const [a, b, untimed] = [
      made(addon.eventCreate(true)),
      made(addon.eventCreate(true)),
      made(addon.eventCreate(false)),
    ];
    const sleep = made(addon.moduleFunction(made(addon.moduleLoad(IMAGE)), "fake_sleep"));
    prepare(sleep, new Uint8Array(Uint32Array.of(100).buffer));
    ok(addon.eventRecord(a, stream));
    ok(addon.launch());
    ok(addon.eventRecord(b, stream));
    ok(addon.eventRecord(untimed, stream));
    expect(addon.eventQuery(b)).toBe(NOT_READY);
    expect(addon.streamQuery(stream)).toBe(NOT_READY);
    ok(addon.eventSynchronize(b));
    ok(addon.eventQuery(b));
    ok(addon.streamSynchronize(stream));
    ok(addon.streamQuery(stream));
    const elapsed = made(addon.eventElapsed(a, b));
    expect(elapsed).toBeGreaterThan(99);
    expect(addon.eventElapsed(a, untimed)).toBe(400);
    for (const event of [a, b, untimed]) {
      refused(addon.eventRecord(event, event), BINDING.badHandle, /argument 2 \(stream\)/);
      ok(addon.eventDestroy(event));
      refused(addon.eventQuery(event), BINDING.badHandle, /event/);
      refused(addon.eventDestroy(event), BINDING.badHandle, /event/);
    }
    refused(addon.eventCreate(1 as never), BINDING.badArgument, /a boolean, received 1$/);
    refused(addon.streamDestroy(0), BINDING.badHandle, /stream/);
  });

  test("modules, functions and launches", () => {
    const module = made(addon.moduleLoad(IMAGE));
    expect(addon.moduleFunction(module, "missing_one")).toBe(500);
    const store = made(addon.moduleFunction(module, "fake_store"));
    expect(made(addon.functionAttribute(store, 0))).toBe(1024);
    expect(made(addon.functionOccupancy(store, 256, 0))).toBe(6);
    const operands = new DataView(new ArrayBuffer(16));
    const to = address(64);
    operands.setBigUint64(0, BigInt(to), true);
    operands.setUint32(8, 0x01020304, true);
    operands.setUint32(12, 16, true);
    const packed = new Uint8Array(operands.buffer);
    prepare(store, packed);
    ok(addon.launch());
    // The operands were taken: the buffer is free for the next launch at once.
    new Uint8Array(addon.command, COMMAND_OPERANDS).fill(0);
    const host = made(addon.hostAllocate(64));
    ok(addon.copyToHost(host, 0, to, 64, stream));
    ok(addon.streamSynchronize(stream));
    const bytes = new Uint8Array(64);
    ok(addon.hostRead(host, 0, bytes));
    expect(new Uint32Array(bytes.buffer)).toEqual(new Uint32Array(16).fill(0x01020304));

    prepare(store, packed, { shared: 100_000 });
    expect(addon.launch()).toBe(1);
    expect(addon.functionSetAttribute(store, 8, 1_000_000)).toBe(1);
    ok(addon.functionSetAttribute(store, 8, 100_000));
    ok(addon.launch());
    prepare(store, packed, { block: 2048 });
    expect(addon.launch()).toBe(1);
    prepare(store, packed);
    new Uint32Array(addon.command)[COMMAND_WORDS.operandBytes] = 4097;
    refused(addon.launch(), BINDING.badArgument, /at most 4096 bytes, received 4097/);
    prepare(stream, packed);
    refused(addon.launch(), BINDING.badHandle, /no function/);
    prepare(store, packed);
    new Uint32Array(addon.command)[COMMAND_WORDS.stream] = store;
    refused(addon.launch(), BINDING.badHandle, /no stream/);
    ok(addon.streamSynchronize(stream));

    ok(addon.moduleUnload(module));
    prepare(store, packed);
    refused(addon.launch(), BINDING.badHandle, /no function/);
    refused(addon.functionAttribute(store, 0), BINDING.badHandle, /func/);
    refused(addon.moduleFunction(module, "fake_store"), BINDING.badHandle, /module/);
    ok(addon.memoryFree(to));
    ok(addon.hostFree(host));
  });

  test("an image is refused unless it is whole", () => {
    const elf = readFileSync(addonPath());
    ok(addon.moduleUnload(made(addon.moduleLoad(elf))));
    ok(addon.moduleUnload(made(addon.moduleLoad(Buffer.from(".entry k\0")))));
    for (const length of [0, 1, 20, 63, 64, 200, elf.length >> 1, elf.length - 1]) {
      refused(addon.moduleLoad(elf.subarray(0, length)), 200, new RegExp(`neither .* \\(${length} bytes\\)`));
    }
    for (let bit = 0; bit < 64 * 8; bit++) {
      const bent = Buffer.from(elf);
      bent[bit >> 3]! ^= 1 << (bit & 7);
      const status = addon.moduleLoad(bent);
      if (status === 0) ok(addon.moduleUnload(addon.results[0]!));
      else expect(status).toBe(200);
    }
    for (const text of ["with\0 in between", "\x7fELF", "P\xedU\xba", "not ASCII: \xe9", "\x1b[1m"]) {
      refused(addon.moduleLoad(Buffer.from(text, "latin1")), 200, /neither/);
    }
    refused(addon.moduleLoad("text" as never), BINDING.badArgument, /a Uint8Array, received a string/);
  });

  test("a handle is never taken for another, nor an old one for a new one", () => {
    const handles = new Set<number>();
    for (let i = 0; i < 10_000; i++) {
      const event = made(addon.eventCreate(false));
      expect(addon.eventQuery(event)).toBe(0);
      expect(handles.has(event)).toBe(false);
      handles.add(event);
      expect(addon.eventDestroy(event)).toBe(0);
    }
    const live = new Set(Array.from({ length: 1000 }, () => made(addon.eventCreate(false))));
    for (const old of handles) if (!live.has(old)) expect(addon.eventQuery(old)).toBe(BINDING.badHandle);
    for (const event of live) ok(addon.eventDestroy(event));
  });

  test("10,000 rounds of allocating and freeing leave nothing", () => {
    made(addon.memoryInfo());
    const free = addon.results[0];
    const held: number[] = [];
    for (let i = 0; i < 10_000; i++) {
      held.push(address(1 + ((i * 977) % 5000)));
      if (held.length > 50) ok(addon.memoryFree(held.splice((i * 31) % held.length, 1)[0]!));
      ok(addon.hostFree(made(addon.hostAllocate(64))));
    }
    for (const a of held) ok(addon.memoryFree(a));
    made(addon.memoryInfo());
    expect(addon.results[0]).toBe(free);
  });

  test("watched events are reported in order", async () => {
    const event = made(addon.eventCreate(false));
    refused(addon.watch(event, 1), BINDING.badArgument, /onCompleted/);
    refused(addon.hold(true), BINDING.badArgument, /onCompleted/);
    refused(addon.onCompleted({} as never), BINDING.badArgument, /a function, received an object/);
    const seen: [number, Status][] = [];
    let done = (): void => {};
    ok(addon.onCompleted(() => expect.fail("this callback was replaced")));
    ok(
      addon.onCompleted((token, status) => {
        seen.push([token, status]);
        if (token === 2 ** 53 - 1) done();
      }),
    );
    const events = Array.from({ length: 200 }, () => made(addon.eventCreate(false)));
    for (const [i, e] of events.entries()) {
      ok(addon.eventRecord(e, stream));
      ok(addon.watch(e, i));
      // Destroyed while it is watched: gone for JavaScript, still waited for.
      if (i % 2) {
        ok(addon.eventDestroy(e));
        refused(addon.eventQuery(e), BINDING.badHandle, /event/);
      }
    }
    ok(addon.watch(event, 2 ** 53 - 1));
    refused(addon.watch(event, -1), BINDING.badArgument, /token/);
    refused(addon.watch(event, Number.NaN), BINDING.badArgument, /token.*received nan/);
    ok(addon.hold(true));
    await new Promise<void>((resolve) => {
      done = resolve;
    });
    ok(addon.hold(false));
    expect(seen).toEqual([...events.map((_, i) => [i, 0]), [2 ** 53 - 1, 0]]);
    for (const [i, e] of events.entries()) if (i % 2 === 0) ok(addon.eventDestroy(e));
    ok(addon.eventDestroy(event));
  });

  test("detached buffers and views of nothing do no harm", () => {
    const host = made(addon.hostAllocate(16));
    const gone = new Uint8Array(16);
    structuredClone(gone.buffer, { transfer: [gone.buffer] });
    ok(addon.hostWrite(host, 0, gone));
    ok(addon.hostRead(host, 16, gone));
    ok(addon.hostFree(host));
  });
});
