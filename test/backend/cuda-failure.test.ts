/** What ends a cuda backend, keeps it from beginning (each in a process of its own) or fails half way, over the fake driver. */
import { join } from "node:path";
import { describe, expect, test } from "vitest";
import { type CudaDevice, openDriver } from "#halfbyte/backend/cuda/device.js";
import type { Launch } from "#halfbyte/backend/cuda/launch.js";
import { KernelModules } from "#halfbyte/backend/cuda/modules.js";
import { READ_SLOT, READ_SLOTS_INTEGRATED } from "#halfbyte/backend/cuda/reads.js";
import type { CudaStream } from "#halfbyte/backend/cuda/stream.js";
import { CudaError } from "#halfbyte/core/errors.js";
import {
  at,
  fakeBackend,
  fill,
  HERE,
  LIBRARY,
  refusing,
  textImages,
  uniform,
  withCuda,
} from "../helpers/fake-backend.js";
import { fakeCuda } from "../helpers/fake-cuda.js";
import { runScript } from "../helpers/script.js";

const IMAGES = HERE ? textImages() : "";
const PRELUDE = `
import { CudaBackend } from "#halfbyte/backend/cuda/backend.js";
import { CpuBackend } from "#halfbyte/backend/cpu/backend.js";
import { Tensor } from "#halfbyte/core/tensor.js";
const words = (error) => ({ name: error.name, code: error.code, reason: error.reason, message: error.message });
const attempt = (body) => { try { body(); return "fine"; } catch (error) { return words(error); } };
const later = (promise) => promise.then(() => "fine", words);
const at = (storage, byteOffset = 0) => ({ storage, byteOffset });
const fill = (backend, storage, byte) =>
  backend.launch("fill", { dst: at(storage), bytes: storage.bytes, value: (byte * 0x01010101) >>> 0 });
const convert = (backend, storage) => backend.launch("convert", { x: at(storage), y: at(storage), n: 8, from: 0, to: 1 });
`;
const ENVIRONMENT = {
  HALFBYTE_CUDA_LIBRARY: LIBRARY,
  HALFBYTE_KERNELS: IMAGES,
  HALFBYTE_FAKE_CUDA_INTEGRATED: "0",
};

const later = (promise: Promise<unknown>): Promise<unknown> =>
  promise.then(
    () => "fine",
    (error: unknown) => error,
  );

interface Words {
  readonly name: string;
  readonly code: string;
  readonly reason: string;
  readonly message: string;
}
type Outcome = "fine" | Words;

const script = <T>(
  code: string,
  environment: Record<string, string | undefined> = {},
): ReturnType<typeof runScript<T>> => runScript<T>(PRELUDE + code, { ...ENVIRONMENT, ...environment });

describe.runIf(HERE)("a device fault", () => {
  test("rejects pending reads and everything later with the kernels that may have done it; the process and the cpu go on", async () => {
    const { given } = await script<Record<string, Outcome | Outcome[] | string | number[]>>(
      `
      const backend = new CudaBackend();
      const other = new CudaBackend();
      const t = backend.allocate(64);
      fill(backend, t, 1);
      await backend.read(t, 0, 64);
      convert(backend, t);
      convert(backend, t);
      const pending = await Promise.all([backend.read(t, 0, 64), backend.readSync.bind(backend), backend.synchronize()].map(
        (p) => typeof p === "function" ? attempt(() => p(t, 0, 64)) : later(p)));
      const answers = {
        pending,
        state: backend.state,
        allocate: attempt(() => backend.allocate(1)),
        launch: attempt(() => fill(backend, t, 1)),
        write: attempt(() => backend.write(t, 0, new Uint8Array(1))),
        readSync: attempt(() => backend.readSync(t, 0, 1)),
        read: await later(backend.read(t, 0, 1)),
        synchronize: await later(backend.synchronize()),
        guards: attempt(() => backend.checkGuards()),
        elapsed: attempt(() => backend.elapsed(() => {})),
        restart: await later(backend.restart()),
        neighbour: attempt(() => other.readSync(other.allocate(1), 0, 1)),
        neighbourState: other.state,
        newcomer: attempt(() => new CudaBackend()),
      };
      backend.release(t);
      const cpu = new CpuBackend({ threads: 1 });
      const x = Tensor.allocate(cpu, "u8", [3]).copyFrom(Uint8Array.of(1, 2, 3));
      answers.cpu = [...(await x.data())];
      await cpu.close();
      await Promise.all([backend.close(), other.close()]);
      answers.closed = attempt(() => backend.allocate(1));
      give(answers);
      `,
      { HALFBYTE_FAKE_CUDA_FAULT_AT: "2" },
    );
    const failed = {
      name: "CudaError",
      code: "ERR_HALFBYTE_CUDA",
      message: expect.stringMatching(
        /CUDA_ERROR_ILLEGAL_ADDRESS \(700\), an illegal memory access was encountered in one of the last launched: fill\(dst=0x\w+, bytes=64, value=16843009\), convert\(x=0x\w+, .*n=8, from=0, to=1\), convert/,
      ),
    };
    for (const answer of given.pending as Outcome[]) expect(answer).toMatchObject(failed);
    for (const what of ["allocate", "launch", "write", "readSync", "read", "synchronize", "guards", "elapsed"]) {
      expect(given[what], what).toMatchObject(failed);
    }
    expect(given).toMatchObject({
      state: "failed",
      restart: { name: "BackendError", message: expect.stringMatching(/start the process again to use cuda/) },
      neighbour: { name: "CudaError", message: expect.stringMatching(/CUDA_ERROR_ILLEGAL_ADDRESS/) },
      neighbourState: "failed",
      newcomer: { name: "CudaError" },
      cpu: [1, 2, 3],
      closed: { name: "DisposedError" },
    });
  });

  test("met first by a blocking read, an allocation, and a read whose pieces wait", async () => {
    const { given } = await script<Outcome[]>(
      `
      const backend = new CudaBackend();
      const t = backend.allocate(300e6);
      fill(backend, t, 1);
      const long = later(backend.read(t, 0, t.bytes));
      convert(backend, t);
      const sync = attempt(() => backend.readSync(t, 0, 64));
      give([sync, await long, attempt(() => backend.allocate(1))]);
      await backend.close();
      `,
      { HALFBYTE_FAKE_CUDA_FAULT_AT: "1" },
    );
    expect(given).toHaveLength(3);
    for (const answer of given) {
      expect(answer).toMatchObject({ name: "CudaError", message: expect.stringMatching(/ILLEGAL_ADDRESS/) });
    }
  });

  test("nobody handles: the process fails with the error's words", async () => {
    const code = `const backend = new CudaBackend(); convert(backend, backend.allocate(64)); give(1); await backend.synchronize();`;
    await expect(script(code, { HALFBYTE_FAKE_CUDA_FAULT_AT: "1" })).rejects.toThrow(
      /ended with 1, gave 1: .*ILLEGAL_ADDRESS.*in convert\(/s,
    );
  });

  test("a launch that is refused is no fault: it names its kernel, and the backend goes on", async () => {
    const { given } = await script<[Outcome, string, number]>(
      `
      const backend = new CudaBackend();
      const t = backend.allocate(64);
      fill(backend, t, 9);
      give([attempt(() => convert(backend, t)), backend.state, (await backend.read(t, 0, 64))[63]]);
      `,
      { HALFBYTE_FAKE_CUDA_LAUNCH: "701" },
    );
    expect(given[0]).toMatchObject({ message: expect.stringMatching(/launch: .*\(701\).* in convert\(x=/) });
    expect(given.slice(1)).toEqual(["ready", 9]);
  });
});

describe.runIf(HERE)("the process exits by itself", () => {
  const SLOW = { HALFBYTE_FAKE_CUDA_DELAY_MS: "300" };
  const start = `const backend = new CudaBackend(); const t = backend.allocate(64); fill(backend, t, 3);`;

  test("with an idle backend that was never closed", async () => {
    const { given } = await script(`${start} give((await backend.read(t, 0, 64))[0]);`);
    expect(given).toBe(3);
  });
  test("with a read pending that nobody awaits, which is still answered", async () => {
    const { given, milliseconds } = await script(
      `${start} backend.read(t, 0, 64).then((bytes) => give(bytes[0]));`,
      SLOW,
    );
    expect(given).toBe(3);
    expect(milliseconds).toBeGreaterThan(600);
  });
  test("with work enqueued that nobody reads", async () => {
    const { given } = await script(`${start} give("done");`, SLOW);
    expect(given).toBe("done");
  });
  test("in the middle of a close", async () => {
    const { given } = await script(`${start} backend.close().then(() => give(backend.state));`, SLOW);
    expect(given).toBe("closed");
  });
  test("by process.exit with reads pending", async () => {
    const { given } = await script(`${start} backend.read(t, 0, 64); give("left"); process.exit(0);`, SLOW);
    expect(given).toBe("left");
  });
});

describe.runIf(HERE)("what cannot be used is refused by name", () => {
  const refusal = async (environment: Record<string, string | undefined>): Promise<Outcome> =>
    (await script<Outcome>(`give(attempt(() => new CudaBackend()));`, environment)).given;

  test("a driver that is too old, by version and by what it lacks", async () => {
    expect(await refusal({ HALFBYTE_FAKE_CUDA_VERSION: "11020" })).toMatchObject({
      name: "CudaUnavailableError",
      reason: "driver-too-old",
      message: expect.stringMatching(/the driver is for CUDA 11\.2, the oldest supported is for 11\.4/),
    });
    expect(await refusal({ HALFBYTE_FAKE_CUDA_VERSION: "11040" })).toBe("fine");
    expect(await refusal({ HALFBYTE_CUDA_LIBRARY: fakeCuda("old") })).toMatchObject({
      reason: "driver-too-old",
      message: expect.stringMatching(/cuEventElapsedTime/),
    });
  });

  test("no driver, no device, a driver that does not start", async () => {
    expect(await refusal({ HALFBYTE_CUDA_LIBRARY: join(IMAGES, "none.so") })).toMatchObject({ reason: "no-driver" });
    expect(await refusal({ HALFBYTE_FAKE_CUDA_DEVICES: "0" })).toMatchObject({ reason: "no-device" });
    expect(await refusal({ HALFBYTE_FAKE_CUDA_INIT: "999" })).toMatchObject({ reason: "driver-error" });
  });

  test("a worker thread", async () => {
    const { given } = await script<Words>(`
      import { Worker } from "node:worker_threads";
      const code = \`
        import { parentPort } from "node:worker_threads";
        import { CudaBackend } from "#halfbyte/backend/cuda/backend.js";
        try { new CudaBackend(); } catch (error) { parentPort.postMessage({ name: error.name, reason: error.reason }); }\`;
      new Worker(code, { eval: true }).on("message", give);
    `);
    expect(given).toEqual({ name: "CudaUnavailableError", reason: "worker-thread" });
  });
});

describe.runIf(HERE)("what fails half way", () => {
  const OUT_OF_MEMORY = 2;

  test("a waiting read whose bytes cannot be taken: who overwrites them goes on", () =>
    withCuda({}, async (backend) => {
      const a = backend.allocate(READ_SLOTS_INTEGRATED * READ_SLOT);
      const b = backend.allocate(2 * a.bytes);
      fill(backend, a, 1);
      fill(backend, b, 2);
      const [first, second] = [later(backend.read(a, 0, a.bytes)), later(backend.read(b, 0, b.bytes))];
      await refusing("hostRead", -1, () => fill(backend, b, 3), READ_SLOTS_INTEGRATED);
      expect(await first).toBe("fine");
      expect(await second).toMatchObject({ name: "CudaError" });
      expect(uniform(backend.readSync(b, 0, b.bytes), 3)).toBe(true);
    }));

  test("a blocking read whose bytes cannot be taken gives its slots back", () =>
    withCuda({}, (backend) => {
      const t = backend.allocate(READ_SLOTS_INTEGRATED * READ_SLOT);
      fill(backend, t, 7);
      return refusing("hostRead", -1, () => {
        for (let i = 0; i < 3; i++) expect(() => backend.readSync(t, 0, t.bytes)).toThrow(CudaError);
      }).then(() => {
        const { reads } = backend as unknown as { reads: { chunks: Set<unknown> } };
        expect(reads.chunks.size).toBe(0);
        expect(uniform(backend.readSync(t, 0, t.bytes), 7)).toBe(true);
      });
    }));

  test("a constant that cannot be written is no constant, and takes nothing", () =>
    withCuda({}, async (backend) => {
      const key = {};
      const bytes = (): Uint8Array => new Uint8Array(1000);
      backend.write(backend.allocate(64), 0, new Uint8Array(64));
      const before = backend.memory();
      await refusing("hostWrite", -1, () => expect(() => backend.constant(key, bytes)).toThrow(CudaError));
      expect(backend.memory()).toEqual(before);
      expect(backend.constant(key, bytes).bytes).toBe(1000);
    }));

  test("a warm-up: the next launch begins again", () =>
    withCuda({}, async (backend) => {
      const t = backend.allocate(64);
      const convert = (): void => backend.launch("convert", { x: at(t), y: at(t), n: 8, from: 0, to: 1 });
      for (const call of ["fill8", "launch"] as const) {
        await refusing(call, 1, () => expect(convert).toThrow(CudaError));
        expect(backend.imagesInUse()).toEqual([]);
      }
      convert();
      expect(backend.imagesInUse()).toHaveLength(1);
    }));

  test("close waits for the work though there is no memory for an event", () =>
    withCuda({}, async (backend) => {
      const t = backend.allocate(64);
      fill(backend, t, 1);
      const { addon } = openDriver();
      const calls: string[] = [];
      const original = { ...addon };
      for (const name of ["streamSynchronize", "memoryFree"] as const) {
        Object.assign(addon, {
          [name]: (handle: number) => {
            calls.push(name);
            return original[name](handle);
          },
        });
      }
      try {
        await refusing("eventRecord", OUT_OF_MEMORY, () => backend.close());
      } finally {
        Object.assign(addon, original);
      }
      expect(calls).toEqual(["streamSynchronize", "memoryFree"]);
    }));
});

describe.runIf(HERE)("thousands of reads pending", () => {
  test("each looks for a slot once or twice, and few events are kept", () =>
    withCuda({}, async (backend) => {
      const t = backend.allocate(64);
      const { reads, stream } = backend as unknown as {
        reads: { small: { slots: { take(): unknown } } };
        stream: { events: number[] };
      };
      const { slots } = reads.small;
      const take = slots.take.bind(slots);
      let looks = 0;
      slots.take = () => {
        looks++;
        return take();
      };
      const pending: Promise<unknown>[] = [];
      for (let i = 0; i < 3000; i++) {
        fill(backend, t, i);
        pending.push(backend.synchronize());
        if (i % 10 === 0) pending.push(backend.read(t, 0, 64));
      }
      for (let i = 0; i < 3000; i++) pending.push(backend.read(t, 0, 64));
      await Promise.all(pending);
      expect(looks).toBeLessThan(4 * 3300);
      expect(stream.events.length).toBeLessThan(200);
    }));
});

describe.runIf(HERE)("shared memory of a kernel", () => {
  test("is allowed before it is asked how many blocks fit, and raised when a launch wants more", () => {
    const calls: [string, number][] = [];
    const record =
      (name: string) =>
      (_func: number, _what: number, value: number): number => {
        calls.push([name, value]);
        return 0;
      };
    const addon = {
      results: Float64Array.of(3),
      moduleLoad: () => 0,
      moduleFunction: () => 0,
      functionSetAttribute: record("allow"),
      functionOccupancy: record("occupancy"),
    };
    const stream = { addon, retry: (call: () => number) => call(), check: () => {} } as unknown as CudaStream;
    const device = { architecture: 87, driverVersion: 13000, multiprocessors: 8 } as CudaDevice;
    const modules = new KernelModules(stream, device, IMAGES, () => {});
    const launch = (shared: number): Launch => ({ entry: "walk", grid: 1, block: 128, shared, walks: true });
    expect(modules.entry("fourbit", launch(64 << 10)).resident).toBe(24);
    modules.entry("fourbit", launch(16 << 10));
    modules.entry("fourbit", launch(96 << 10));
    expect(calls).toEqual([
      ["allow", 64 << 10],
      ["occupancy", 64 << 10],
      ["allow", 96 << 10],
    ]);
  });
});

describe.runIf(HERE)("warming up", () => {
  const launches = (backend: unknown): number => (backend as { stream: { launches: number } }).stream.launches;
  const convert = (backend: ReturnType<typeof fakeBackend>): void => {
    const x = { storage: backend.allocate(64), byteOffset: 0 };
    backend.launch("convert", { x, y: x, n: 8, from: 0, to: 1 });
  };

  test("an integrated GPU runs something small of a family before its first launch, another does not", async () => {
    const integrated = fakeBackend();
    convert(integrated);
    expect(launches(integrated)).toBe(3);
    convert(integrated);
    expect(launches(integrated)).toBe(4);
    expect(integrated.memory()).toMatchObject({ bytes: 128, allocations: 2 });
    await integrated.close();
    process.env.HALFBYTE_FAKE_CUDA_INTEGRATED = "0";
    try {
      const discrete = fakeBackend();
      convert(discrete);
      expect(launches(discrete)).toBe(1);
      await discrete.close();
    } finally {
      delete process.env.HALFBYTE_FAKE_CUDA_INTEGRATED;
    }
  });
});
