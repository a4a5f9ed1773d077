/** Paged memory of the cuda backend over the real addon and the fake driver, on the kinds of GPU that there are. */
import { setTimeout } from "node:timers/promises";
import { describe, expect, test } from "vitest";
import { COMMAND_OPERANDS, type CudaAddon, HOST } from "#halfbyte/backend/cuda/addon.js";
import { Arena, type CudaStorage } from "#halfbyte/backend/cuda/arena.js";
import type { CudaBackend, CudaOptions } from "#halfbyte/backend/cuda/backend.js";
import { openDriver } from "#halfbyte/backend/cuda/device.js";
import { PAGE, type PagedOptions } from "#halfbyte/backend/cuda/paged.js";
import type { CudaStream } from "#halfbyte/backend/cuda/stream.js";
import { availableMemory } from "#halfbyte/backend/system.js";
import { CudaError, DisposedError, OutOfMemoryError } from "#halfbyte/core/errors.js";
import type { Storage } from "#halfbyte/core/kernels.js";
import { fakeBackend, fill, HERE, refusing, uniform, withCuda } from "../helpers/fake-backend.js";

const MB = 1 << 20;
const OUT_OF_MEMORY = 2;
const NOT_SUPPORTED = 801;
const ILLEGAL_ADDRESS = 700;

/** The GPUs that paged memory knows, as the fake driver is told of them. */
const GPUS = {
  "pages on demand": { INTEGRATED: "0", MANAGED: "1" },
  "without page faults": { INTEGRATED: "0", MANAGED: "0" },
  integrated: { INTEGRATED: "1", MANAGED: "0" },
  "without managed memory": { INTEGRATED: "0", MANAGED: "0", MANAGED_MEMORY: "0" },
} as const;
type Gpu = keyof typeof GPUS;

async function withVariables<T>(variables: Record<string, string>, body: () => Promise<T>): Promise<T> {
  const names = Object.keys(variables).map((name) => `HALFBYTE_FAKE_CUDA_${name}`);
  Object.values(variables).forEach((value, i) => {
    process.env[names[i]!] = value;
  });
  try {
    return await body();
  } finally {
    for (const name of names) delete process.env[name];
  }
}

const on = (gpu: Gpu, body: (backend: CudaBackend) => Promise<void> | void, options: CudaOptions = {}): Promise<void> =>
  withVariables(GPUS[gpu], () => withCuda(options, body));

/** The calls of some functions of the addon while `body` runs: name, arguments, status. */
async function calls(
  names: readonly (keyof CudaAddon)[],
  body: () => Promise<void> | void,
): Promise<[string, number[], number][]> {
  const { addon } = openDriver();
  const all = addon as unknown as Record<string, (...args: number[]) => number>;
  const original = { ...all };
  const seen: [string, number[], number][] = [];
  for (const name of names) {
    all[name] = (...args) => {
      const status = original[name]!(...args);
      seen.push([name, args, status]);
      return status;
    };
  }
  try {
    await body();
  } finally {
    Object.assign(all, original);
  }
  return seen;
}

const paged = (backend: CudaBackend, bytes: number): CudaStorage => backend.allocate(bytes, true) as CudaStorage;
const streamOf = (backend: CudaBackend): CudaStream => (backend as unknown as { stream: CudaStream }).stream;

/** Launches one of the fake driver's own kernels. */
function launch(backend: CudaBackend, name: string, ...words: number[]): void {
  const stream = streamOf(backend);
  const { addon } = stream;
  stream.check("moduleLoad", addon.moduleLoad(Buffer.from("text")));
  stream.check("moduleFunction", addon.moduleFunction(addon.results[0]!, name));
  stream.command.set(words, COMMAND_OPERANDS >> 2);
  stream.launch({ func: addon.results[0]!, resident: 1 }, { grid: 1, block: 32, shared: 0 } as never, 16);
}
const sleep = (backend: CudaBackend, ms: number): void => launch(backend, "fake_sleep", ms);
const store = (backend: CudaBackend, { address }: CudaStorage, value: number): void =>
  launch(backend, "fake_store", address % 2 ** 32, Math.floor(address / 2 ** 32), value, 1);

/** What the driver has handed out, or the host's pages are promised for. */
const committed = (backend: CudaBackend): number =>
  (backend as unknown as { arena: { paged?: { committedBytes: number } } }).arena.paged?.committedBytes ?? 0;

/** Waits until the driver has all paged memory back, but for `bytes`. */
async function returned(backend: CudaBackend, bytes = 0): Promise<void> {
  await expect.poll(() => committed(backend), { timeout: 5000, interval: 5 }).toBe(bytes);
}

describe.runIf(HERE)("a GPU that pages on demand", () => {
  const gpu = "pages on demand";

  test("paged allocations are the driver's own, of whole pages, prefer the host, and do not count as the GPU's memory", () =>
    on(gpu, async (backend) => {
      const before = backend.memory();
      expect(before.paging).toMatch(/^managed memory: its pages move between host and GPU, are prefetched/);
      const sizes = [0, 1, PAGE, PAGE + 1, 5 * MB];
      const storages: CudaStorage[] = [];
      const seen = await calls(["memoryAllocate", "memoryAllocateManaged", "memoryAdvise"], () => {
        for (const bytes of sizes) storages.push(paged(backend, bytes));
      });
      const whole = [PAGE, PAGE, PAGE, 2 * PAGE, 5 * MB];
      expect(seen).toEqual(
        storages.flatMap(({ address }, i) => [
          ["memoryAllocateManaged", [whole[i]!], 0],
          ["memoryAdvise", [address, whole[i]!, 3, HOST], 0],
        ]),
      );
      expect(new Set(storages.map(({ arena }) => arena)).size).toBe(sizes.length);
      expect(backend.memory()).toMatchObject({
        bytes: sizes.reduce((a, b) => a + b),
        pagedBytes: sizes.reduce((a, b) => a + b),
        allocations: sizes.length,
        committedBytes: before.committedBytes,
        reservedBytes: before.reservedBytes,
      });
      expect(committed(backend)).toBe(whole.reduce((a, b) => a + b));
      const plain = backend.allocate(MB);
      expect(backend.memory().bytes - backend.memory().pagedBytes).toBe(MB);
      for (const storage of [...storages, plain]) backend.release(storage);
      expect(backend.memory()).toMatchObject({ bytes: 0, pagedBytes: 0, allocations: 0 });
      await returned(backend);
    }));

  test("more of it than memoryLimit", () =>
    on(
      gpu,
      async (backend) => {
        const all = Array.from({ length: 8 }, () => paged(backend, 3 * MB));
        const plain = backend.allocate(6 * MB);
        expect(() => backend.allocate(6 * MB)).toThrow(/6291456 bytes requested, 2097152 of 8388608 bytes free/);
        for (const [i, storage] of [...all, plain].entries()) fill(backend, storage, i + 1);
        for (const [i, storage] of [...all, plain].entries()) {
          expect(uniform(await backend.read(storage, 0, storage.bytes), i + 1)).toBe(true);
        }
      },
      { memoryLimit: 8 * MB },
    ));

  test("writes, kernels, copies and reads keep their order, prefetched or not", () =>
    on(gpu, async (backend) => {
      const n = 9 * MB + 3;
      const a = paged(backend, n);
      const b = backend.allocate(n);
      const c = paged(backend, n);
      const bytes = Uint8Array.from({ length: n }, (_, i) => (i * 31 + (i >> 8)) & 255);
      backend.prefetch([a, c]);
      backend.write(a, 0, bytes);
      const early = backend.read(a, 0, n);
      backend.prefetch([a]);
      backend.launch("copy", {
        src: { storage: a, byteOffset: 0 },
        dst: { storage: b, byteOffset: 0 },
        bytes: n,
      });
      backend.launch("copy", {
        src: { storage: b, byteOffset: 0 },
        dst: { storage: c, byteOffset: 0 },
        bytes: n,
      });
      backend.write(a, 5, Uint8Array.of(1, 2, 3));
      sleep(backend, 20);
      store(backend, a, 0x04030201);
      expect(Buffer.compare(await early, bytes)).toBe(0);
      expect(Buffer.compare(backend.readSync(c, 0, n), bytes)).toBe(0);
      expect([...(await backend.read(a, 0, 8))]).toEqual([1, 2, 3, 4, bytes[4], 1, 2, 3]);
    }));

  test("prefetch: each paged allocation once, on the backend's stream, and nothing else", () =>
    on(gpu, async (backend) => {
      const [a, b, empty, gone] = [paged(backend, 100), paged(backend, 3 * MB), paged(backend, 0), paged(backend, 64)];
      const plain = backend.allocate(100);
      backend.release(gone);
      const seen = await calls(["memoryPrefetch"], () => {
        backend.prefetch([]);
        backend.prefetch([plain, a, b, a, empty, gone] as Storage[]);
      });
      const { handle } = streamOf(backend) as unknown as { handle: number };
      expect(seen).toEqual([
        ["memoryPrefetch", [a.address, 100, 0, handle], 0],
        ["memoryPrefetch", [b.address, 3 * MB, 0, handle], 0],
      ]);
      await backend.synchronize();
    }));

  test("released under running kernels: no wait, and not freed before they are done", () =>
    on(gpu, async (backend) => {
      const t = paged(backend, 4 * MB);
      const kept = paged(backend, 4);
      fill(backend, kept, 0);
      const seen = await calls(["memoryFree"], async () => {
        sleep(backend, 300);
        backend.prefetch([t]);
        store(backend, t, 7);
        const began = performance.now();
        const pending = backend.read(t, 0, 4);
        backend.release(t);
        backend.release(t);
        expect(performance.now() - began).toBeLessThan(200);
        expect(backend.memory()).toMatchObject({ bytes: 4, pagedBytes: 4 });
        expect(committed(backend)).toBe(4 * MB + PAGE);
        expect([...(await pending)]).toEqual([7, 0, 0, 0]);
        await returned(backend, PAGE);
      });
      expect(seen).toEqual([["memoryFree", [t.address], 0]]);
      store(backend, kept, 9);
      expect([...(await backend.read(kept, 0, 4))]).toEqual([9, 0, 0, 0]);
      expect(backend.state).toBe("ready");
    }));

  test("released before long work: the event loop goes on, and the memory goes back when the GPU has nothing to do", () =>
    on(gpu, async (backend) => {
      const t = paged(backend, 4 * MB);
      store(backend, t, 7);
      backend.release(t);
      sleep(backend, 600);
      const began = performance.now();
      let longest = 0;
      let more = true;
      for (let last = began; last - began < 900; ) {
        await setTimeout(5);
        const now = performance.now();
        longest = Math.max(longest, now - last);
        last = now;
        // So that the stream is busy again when the first work is over.
        if (more && now - began > 300) sleep(backend, 600);
        more &&= now - began <= 300;
        expect(committed(backend)).toBe(4 * MB);
      }
      expect(longest).toBeLessThan(250);
      await returned(backend);
      expect(performance.now() - began).toBeGreaterThan(1100);
    }));

  test("what is released under running kernels may be had again at once, by what needs nearly as much", () =>
    on(gpu, async (backend) => {
      const [a, wide] = [paged(backend, 64 * PAGE), paged(backend, 70 * PAGE)];
      const seen = await calls(
        ["memoryAllocateManaged", "memoryAdvise", "memoryFree", "streamSynchronize"],
        async () => {
          sleep(backend, 200);
          store(backend, a, 1);
          const first = backend.read(a, 0, 4);
          for (const storage of [wide, a]) backend.release(storage);
          const b = paged(backend, 63 * PAGE + 1);
          expect(b.address).toBe(a.address);
          store(backend, b, 2);
          const second = backend.read(b, 0, 4);
          // 70 pages are more than 62 and an eighth, and not more than 63 and an eighth.
          const c = paged(backend, 62 * PAGE);
          expect(c.address).not.toBe(wide.address);
          const d = paged(backend, 63 * PAGE);
          expect(d.address).toBe(wide.address);
          expect(committed(backend)).toBe((64 + 70 + 62) * PAGE);
          backend.prefetch([b, c, d]);
          expect([...(await first)]).toEqual([1, 0, 0, 0]);
          expect([...(await second)]).toEqual([2, 0, 0, 0]);
          for (const storage of [b, c, d]) backend.release(storage);
          expect(backend.memory()).toMatchObject({ bytes: 0, pagedBytes: 0, allocations: 0 });
        },
      );
      expect(seen.map(([name]) => name)).toEqual(["memoryAllocateManaged", "memoryAdvise"]);
      await returned(backend);
    }));

  test("code that leaves the event loop no turn gets back what it released, when the GPU has nothing to do", () =>
    on(gpu, (backend) => {
      for (let pages = 1; pages < 400; pages = Math.ceil(pages * 1.2)) {
        const t = paged(backend, pages * PAGE);
        expect(committed(backend)).toBe(pages * PAGE);
        fill(backend, t, pages);
        backend.release(t);
        streamOf(backend).drain();
      }
    }));

  test("close while what is kept waits for the GPU", () =>
    on(gpu, async (backend) => {
      backend.release(paged(backend, MB));
      for (let i = 0; i < 4; i++) {
        sleep(backend, 50);
        await setTimeout(30);
      }
      expect(committed(backend)).toBe(MB);
    }));

  test("a released allocation whose reads are waiting for slots stays until they are under way", () =>
    on(gpu, async (backend) => {
      const n = 100 * MB;
      const t = paged(backend, n);
      fill(backend, t, 6);
      const reads = [backend.read(t, 0, n), backend.read(t, 0, n)];
      backend.release(t);
      expect(backend.memory().pagedBytes).toBe(n);
      for (const read of reads) expect(uniform(await read, 6)).toBe(true);
      await returned(backend);
      expect(backend.memory().pagedBytes).toBe(0);
    }));

  test("created and released in a loop, it needs no more than what is alive", () =>
    on(gpu, async (backend) => {
      for (let i = 0; i < 2000; i++) {
        const t = paged(backend, 1 + ((i * 7919) % (3 * PAGE)));
        backend.prefetch([t]);
        fill(backend, t, i);
        backend.release(t);
        if (i % 100 === 0) await backend.synchronize();
      }
      await returned(backend);
    }));

  test("the host's memory is the limit, and what was released comes back in time", () =>
    on(gpu, async (backend) => {
      const most = availableMemory().bytes;
      let error: OutOfMemoryError | undefined;
      try {
        paged(backend, 8 * most);
      } catch (thrown) {
        error = thrown as OutOfMemoryError;
      }
      expect(error).toBeInstanceOf(OutOfMemoryError);
      expect(error).toMatchObject({ device: "cuda, paged memory, which the host must hold", requestedBytes: 8 * most });
      expect(error!.message).toMatch(/, or free memory of the host, which sets this limit\.$/);
      expect(error!.freeBytes / most).toBeGreaterThan(0.5);
      expect(error!.limitBytes / most).toBeGreaterThan(0.5);
      expect(error!.limitBytes / most).toBeLessThan(2);

      let available = 100 * MB;
      let looks = 0;
      const hostFree = (): number => {
        looks++;
        return available;
      };
      const options: PagedOptions = { device: 0, onDemand: true, hostFree };
      const arena = new Arena(streamOf(backend), {
        limitBytes: MB,
        guards: false,
        peek: () => new Uint8Array(),
        free: () => MB,
        careful: false,
        paged: options,
      });
      const a = arena.allocate(60 * MB, false, true);
      // Nobody has touched its pages, so the host still has as much: it is promised all the same.
      expect(() => arena.allocate(60 * MB, false, true)).toThrow(
        /which the host must hold\] out of memory: 62914560 bytes requested, 41943040 of 104857600 bytes free/,
      );
      sleep(backend, 50);
      arena.release(a);
      const b = arena.allocate(70 * MB, false, true);
      available = 20 * MB;
      expect(() => arena.allocate(25 * MB, false, true)).toThrow(
        /26214400 bytes requested, 20971520 of 104857600 bytes free/,
      );
      available = 200 * MB;
      looks = 0;
      for (let i = 0; i < 64; i++) arena.allocate(MB / 4, false, true);
      expect(looks).toBe(1);
      expect(() => arena.allocate(15 * MB, false, true)).toThrow(
        /15728640 bytes requested, 14680064 of 104857600 bytes free/,
      );
      arena.release(b);
      expect(arena.allocate(MB, false).paged).toBe(false);
      expect(arena.trim()).toBe(true);
      expect(arena.trim()).toBe(false);
      arena.close();
    }));

  test("a driver that has no more is asked again when what was released is back", () =>
    on(gpu, async (backend) => {
      await withVariables({ MANAGED_LIMIT: String(8 * MB) }, async () => {
        const a = paged(backend, 6 * MB);
        expect(() => paged(backend, 3 * MB)).toThrow(
          /must hold; the driver has no more\] out of memory: 3145728 bytes/,
        );
        sleep(backend, 50);
        backend.release(a);
        const b = paged(backend, 7 * MB);
        fill(backend, b, 3);
        expect(uniform(await backend.read(b, 0, b.bytes), 3)).toBe(true);
        expect(backend.memory().pagedBytes).toBe(7 * MB);
      });
    }));

  test("guards find an overrun and an underrun, and leave contents alone", () =>
    on(
      gpu,
      async (backend) => {
        const sizes = [0, 1, 511, 512, 513, PAGE, 5 * MB];
        const all = sizes.map((bytes) => paged(backend, bytes));
        for (const [i, storage] of all.entries()) fill(backend, storage, i + 1);
        backend.prefetch(all);
        backend.checkGuards();
        for (const [i, storage] of all.entries()) {
          expect(storage.address % 512).toBe(0);
          expect(uniform(await backend.read(storage, 0, storage.bytes), i + 1)).toBe(true);
          backend.release(storage);
        }
        const over = paged(backend, 100);
        fill(backend, over, 0, 101);
        expect(() => backend.checkGuards()).toThrow(/100 bytes into an allocation of 100 bytes/);
        expect(() => backend.release(over)).toThrow(/100 bytes into/);
        const under = paged(backend, 100);
        backend.launch("fill", { dst: { storage: under, byteOffset: -1 }, bytes: 1, value: 0 });
        expect(() => backend.release(under)).toThrow(/1 bytes before an allocation of 100 bytes/);
        expect(backend.memory()).toMatchObject({ bytes: 0, pagedBytes: 0 });
        await returned(backend);
      },
      { guards: true },
    ));

  test("a hint that the driver refuses costs nothing but speed, and memory() says so", () =>
    on(gpu, async (backend) => {
      const t = await withVariables({ ADVISE: String(NOT_SUPPORTED) }, async () => paged(backend, 100));
      expect(backend.memory().paging).toMatch(/refused by the driver: .*memoryAdvise: CUDA_ERROR_NOT_SUPPORTED/);
      await withVariables({ PREFETCH: String(NOT_SUPPORTED) }, async () => backend.prefetch([t]));
      expect(backend.memory().paging).toMatch(/refused by the driver: .*memoryPrefetch: CUDA_ERROR_NOT_SUPPORTED/);
      backend.prefetch([t]);
      fill(backend, t, 5);
      expect(uniform(await backend.read(t, 0, 100), 5)).toBe(true);
    }));

  test("an allocation that fails half way leaves nothing", () =>
    on(gpu, async (backend) => {
      const nothing = { bytes: 0, pagedBytes: 0, allocations: 0 };
      await refusing("memoryAllocateManaged", 1, () => expect(() => paged(backend, 100)).toThrow(CudaError));
      await refusing("memoryAdvise", -1, () => expect(() => paged(backend, 100)).toThrow(/memoryAdvise/));
      await refusing("memoryAllocateManaged", OUT_OF_MEMORY, () =>
        expect(() => paged(backend, 100)).toThrow(OutOfMemoryError),
      );
      expect(backend.memory()).toMatchObject(nothing);
      expect(committed(backend)).toBe(0);
    }));

  test("when there is no event for it, released memory goes with the next trim or at the end", () =>
    on(gpu, async (backend) => {
      const [a, b] = [paged(backend, MB), paged(backend, MB)];
      await refusing("eventRecord", OUT_OF_MEMORY, () => backend.release(a));
      await backend.synchronize();
      expect(committed(backend)).toBe(2 * MB);
      expect((backend as unknown as { arena: Arena }).arena.trim()).toBe(true);
      expect(committed(backend)).toBe(MB);
      await refusing("watch", -6, () => backend.release(b));
    }));

  test("close gives everything back, with kernels running and releases on their way", async () => {
    let stored: CudaBackend | undefined;
    await on(gpu, async (backend) => {
      stored = backend;
      const [a, b] = [paged(backend, MB), paged(backend, MB)];
      sleep(backend, 100);
      store(backend, a, 1);
      store(backend, b, 1);
      backend.release(a);
    });
    expect(() => stored!.prefetch([])).toThrow(DisposedError);
    expect(() => stored!.allocate(1, true)).toThrow(DisposedError);
  });

  test("a failed device: prefetch throws, release and close do not", () =>
    withVariables(GPUS[gpu], async () => {
      const backend = fakeBackend();
      const [a, b] = [paged(backend, MB), paged(backend, MB)];
      const pending = backend.read(a, 0, 4);
      await refusing("memoryPrefetch", ILLEGAL_ADDRESS, () =>
        expect(() => backend.prefetch([a])).toThrow(/memoryPrefetch: CUDA_ERROR_ILLEGAL_ADDRESS/),
      );
      await expect(pending).rejects.toThrow(/ILLEGAL_ADDRESS/);
      expect(backend.state).toBe("failed");
      expect(() => backend.prefetch([b])).toThrow(/ILLEGAL_ADDRESS/);
      backend.release(a);
      await backend.close();
      expect(committed(backend)).toBe(0);
    }));
});

describe.runIf(HERE)("other GPUs", () => {
  test("one without page faults: managed memory that must fit, no advice, no prefetch", () =>
    on(
      "without page faults",
      async (backend) => {
        expect(backend.memory().paging).toMatch(
          /^managed memory that must fit on the GPU: .*concurrentManagedAccess is 0/,
        );
        const seen = await calls(["memoryAllocateManaged", "memoryAdvise", "memoryPrefetch"], async () => {
          const t = paged(backend, 5 * MB);
          backend.prefetch([t]);
          fill(backend, t, 8);
          expect(uniform(await backend.read(t, 0, t.bytes), 8)).toBe(true);
          expect(backend.memory().pagedBytes).toBe(5 * MB);
          expect(() => backend.allocate(4 * MB)).toThrow(/4194304 bytes requested, 3145728 of 8388608 bytes free/);
          expect(() => paged(backend, 4 * MB)).toThrow(
            /paged memory, which this GPU must hold\] out of memory: 4194304 bytes requested, 3145728 of 8388608 bytes free.*or raise memoryLimit/,
          );
          // A cached segment makes room.
          backend.release(backend.allocate(2 * MB));
          paged(backend, 3 * MB);
        });
        expect(seen.map(([name]) => name)).toEqual(["memoryAllocateManaged", "memoryAllocateManaged"]);
      },
      { memoryLimit: 8 * MB },
    ));

  for (const [gpu, words] of [
    ["integrated", /^plain device memory: host and GPU share their memory/],
    ["without managed memory", /^plain device memory: this GPU has no managed memory/],
  ] as const) {
    test(`${gpu}: plain device memory`, () =>
      on(gpu, async (backend) => {
        const seen = await calls(["memoryAllocateManaged", "memoryAdvise", "memoryPrefetch"], async () => {
          const t = paged(backend, 5 * MB);
          expect(t.paged).toBe(false);
          backend.prefetch([t]);
          fill(backend, t, 8);
          expect(uniform(await backend.read(t, 0, t.bytes), 8)).toBe(true);
          const { paging, pagedBytes, bytes, committedBytes } = backend.memory();
          expect({ pagedBytes, bytes }).toEqual({ pagedBytes: 0, bytes: 5 * MB });
          expect(committedBytes).toBeGreaterThanOrEqual(5 * MB);
          expect(paging).toMatch(words);
          backend.release(t);
        });
        expect(seen).toEqual([]);
      }));
  }
});
