/** The cuda arena over the real addon and the fake driver. */
import { describe, expect, test } from "vitest";
import { ALIGN, Arena, type CudaStorage, SEGMENT, SMALL } from "#halfbyte/backend/cuda/arena.js";
import type { CudaBackend, CudaOptions } from "#halfbyte/backend/cuda/backend.js";
import type { CudaStream } from "#halfbyte/backend/cuda/stream.js";
import { ArgumentError, OutOfMemoryError } from "#halfbyte/core/errors.js";
import { fakeBackend, fill, HERE, uniform, withCuda } from "../helpers/fake-backend.js";
import { random } from "../helpers/random.js";

const MB = 1 << 20;

async function withArena(
  options: CudaOptions,
  body: (backend: CudaBackend, arena: Arena) => Promise<void> | void,
): Promise<void> {
  const backend = fakeBackend(options);
  try {
    await body(backend, (backend as unknown as { arena: Arena }).arena);
  } finally {
    await backend.close();
  }
}

/** Segments are covered by their blocks, free neighbours are merged, and the blocks in use are just those of `live`. */
function checkLayout(arena: Arena, live: readonly CudaStorage[], guard: number): void {
  const used: string[] = [];
  let committed = 0;
  for (const { address, bytes, blocks } of arena.layout()) {
    committed += bytes;
    let end = 0;
    let freeBefore = false;
    for (const block of blocks) {
      expect(block.offset).toBe(end);
      expect(block.offset % ALIGN).toBe(0);
      expect(block.bytes).toBeGreaterThan(0);
      expect(freeBefore && block.free, "free neighbours").toBe(false);
      freeBefore = block.free;
      end += block.bytes;
      if (!block.free) used.push(`${address + block.offset}+${block.bytes}`);
    }
    expect(end).toBe(bytes);
  }
  expect(arena.committedBytes).toBe(committed);
  const size = (s: CudaStorage): number => Math.max(ALIGN, Math.ceil(s.bytes / ALIGN) * ALIGN) + 2 * guard;
  expect(used.sort()).toEqual(live.map((s) => `${s.address - guard}+${size(s)}`).sort());
  expect(arena.bytes).toBe(live.reduce((sum, s) => sum + s.bytes, 0));
  expect(arena.allocations).toBe(live.length);
}

describe.runIf(HERE)("blocks and segments", () => {
  for (const guards of [false, true]) {
    test(`random allocations and releases${guards ? " with guards" : ""} keep everything in its place`, () =>
      withArena({ guards, memoryLimit: 256 * MB }, (backend, arena) => {
        const next = random("arena");
        const live: CudaStorage[] = [];
        let refused = 0;
        for (let round = 0; round < (guards ? 400 : 4000); round++) {
          if (next() % 5 < 3 || live.length === 0) {
            const bytes =
              [0, 1, 511, 512, 513, 4096, SMALL, SMALL + 1, 3 * MB, 20 * MB][next() % 10]! + (next() % 3) * 77;
            try {
              live.push(backend.allocate(bytes) as CudaStorage);
            } catch (error) {
              expect(error).toBeInstanceOf(OutOfMemoryError);
              refused++;
              for (const storage of live.splice(0, live.length >> 1)) backend.release(storage);
            }
          } else {
            backend.release(live.splice(next() % live.length, 1)[0]!);
          }
          if (round % 20 === 0) checkLayout(arena, live, guards ? ALIGN : 0);
          expect(arena.committedBytes).toBeLessThanOrEqual(256 * MB);
        }
        if (!guards) expect(refused).toBeGreaterThan(5);
        for (const storage of live.splice(0)) backend.release(storage);
        checkLayout(arena, [], 0);
        arena.trim();
        expect([arena.committedBytes, arena.layout()]).toEqual([0, []]);
      }));
  }

  test("small ones share a segment, a large one has its own, which is used again", () =>
    withArena({}, (backend, arena) => {
      const small = Array.from({ length: 100 }, () => backend.allocate(10_000));
      expect(arena.layout().map((s) => s.bytes)).toEqual([SEGMENT]);
      const large = backend.allocate(5 * MB) as CudaStorage;
      expect(arena.layout().map((s) => s.bytes)).toEqual([SEGMENT, 3 * SEGMENT]);
      expect(large.offset).toBe(0);
      backend.release(large);
      const again = backend.allocate(6 * MB) as CudaStorage;
      expect(again.address).toBe(large.address);
      expect(arena.committedBytes).toBe(4 * SEGMENT);
      for (const storage of [...small, again]) backend.release(storage);
    }));

  test("the best fit is taken, not the first", () =>
    withArena({}, (backend) => {
      const [wide, , tight] = [8, 1.5, 4, 1.5].map((mb) => backend.allocate(mb * MB) as CudaStorage);
      backend.release(wide!);
      backend.release(tight!);
      expect((backend.allocate(3.5 * MB) as CudaStorage).address).toBe(tight!.address);
      expect((backend.allocate(7 * MB) as CudaStorage).address).toBe(wide!.address);
    }));

  test("addresses are aligned for every size", () =>
    withArena({}, (backend) => {
      for (const bytes of [0, 1, 3, 511, 512, 513, 70_001, 3 * MB + 5]) {
        const storage = backend.allocate(bytes) as CudaStorage;
        expect(storage.address % ALIGN).toBe(0);
        expect(storage.bytes).toBe(bytes);
      }
    }));

  test("releasing twice does nothing", () =>
    withArena({}, (backend) => {
      const a = backend.allocate(100);
      const b = backend.allocate(100);
      backend.release(a);
      backend.release(a);
      expect(backend.memory()).toMatchObject({ bytes: 100, allocations: 1 });
      backend.release(b);
    }));

  test("10,000 rounds of create and dispose need no more memory than one", () =>
    withArena({}, async (backend) => {
      const round = (i: number): void => {
        const storage = backend.allocate(1 * MB + (i % 3) * 1000);
        fill(backend, storage, i, 64);
        backend.release(storage);
      };
      for (let i = 0; i < 3; i++) round(i);
      const before = backend.memory();
      for (let i = 0; i < 10_000; i++) round(i);
      expect(backend.memory()).toEqual(before);
      await backend.synchronize();
    }));
});

describe.runIf(HERE)("out of memory", () => {
  test("at the limit: what was asked, what is free; smaller requests then work", () =>
    withArena({ memoryLimit: 64 * MB }, async (backend) => {
      const small = backend.allocate(10 * MB);
      expect(() => backend.allocate(100 * MB)).toThrow(OutOfMemoryError);
      expect(() => backend.allocate(100 * MB)).toThrow(
        /104857600 bytes requested, 56623104 of 67108864 bytes free.*tidy/,
      );
      const most = backend.allocate(50 * MB);
      expect(() => backend.allocate(10 * MB)).toThrow(OutOfMemoryError);
      fill(backend, small, 9);
      expect(uniform(await backend.read(small, 0, small.bytes), 9)).toBe(true);
      backend.release(most);
      // There is room only when the cached segment goes back.
      const other = backend.allocate(52 * MB);
      fill(backend, other, 4);
      expect(uniform(backend.readSync(other, 0, other.bytes), 4)).toBe(true);
    }));

  test("a limit below a segment serves small requests", () =>
    withArena({ memoryLimit: 100_000 }, (backend, arena) => {
      const storages = Array.from({ length: 9 }, () => backend.allocate(10_000));
      expect(arena.committedBytes).toBeLessThanOrEqual(100_000);
      expect(() => backend.allocate(20_000)).toThrow(OutOfMemoryError);
      backend.release(storages[3]!);
      backend.allocate(5000);
    }));

  test("a small request is served from a large segment when nothing else is left", () =>
    withArena({ memoryLimit: 8 * MB }, (backend) => {
      const large = backend.allocate(7 * MB) as CudaStorage;
      const tail = backend.allocate(900_000) as CudaStorage;
      expect(tail.arena).toBe(large.arena);
    }));

  test("when the driver has no more, cached segments are given back first", async () => {
    process.env.HALFBYTE_FAKE_CUDA_INTEGRATED = "0";
    process.env.HALFBYTE_FAKE_CUDA_MEMORY = String(64 * MB);
    try {
      await withArena({}, async (backend, arena) => {
        // What somebody else holds: the limit says 64 MiB, the driver has 24.
        process.env.HALFBYTE_FAKE_CUDA_MEMORY = String(24 * MB);
        const a = backend.allocate(12 * MB);
        expect(() => backend.allocate(20 * MB)).toThrow(/20971520 bytes requested, 12582912 of 67108864 bytes free/);
        const kept = backend.allocate(2 * MB);
        fill(backend, a, 1);
        fill(backend, kept, 7);
        backend.release(a);
        const b = backend.allocate(20 * MB);
        expect(arena.committedBytes).toBe(22 * MB);
        fill(backend, b, 2);
        expect(uniform(await backend.read(b, 0, b.bytes), 2)).toBe(true);
        expect(uniform(await backend.read(kept, 0, kept.bytes), 7)).toBe(true);
      });
    } finally {
      delete process.env.HALFBYTE_FAKE_CUDA_INTEGRATED;
      delete process.env.HALFBYTE_FAKE_CUDA_MEMORY;
    }
  });

  test("on an integrated GPU the system's memory is looked at before each segment, on another it is not", async () => {
    for (const careful of [true, false]) {
      await withCuda({}, (backend) => {
        let available = 100 * MB;
        const { stream } = backend as unknown as { stream: CudaStream };
        const peek = (): Uint8Array => new Uint8Array();
        const arena = new Arena(stream, { limitBytes: 1000 * MB, guards: false, peek, free: () => available, careful });
        const first = arena.allocate(60 * MB, false);
        available = 30 * MB;
        if (careful) {
          expect(() => arena.allocate(40 * MB, false)).toThrow(
            /41943040 bytes requested, 31457280 of 1048576000 bytes free/,
          );
          arena.allocate(20 * MB, false);
          arena.release(first);
          arena.allocate(50 * MB, false);
        } else {
          arena.allocate(40 * MB, false);
        }
        expect(arena.committedBytes).toBe((careful ? 80 : 100) * MB);
        arena.close();
      });
    }
  });

  test("page-locked memory that runs out is an error of its own, and not the end", async () => {
    process.env.HALFBYTE_FAKE_CUDA_HOST_MEMORY = String(1 * MB);
    try {
      await withArena({}, async (backend) => {
        const storage = backend.allocate(5 * MB);
        fill(backend, storage, 3);
        await expect(backend.read(storage, 0, 5 * MB)).rejects.toThrow(OutOfMemoryError);
        expect(() => backend.readSync(storage, 0, 5 * MB)).toThrow(/page-locked host memory.*4194304 bytes requested/);
        expect(() => backend.write(storage, 0, new Uint8Array(10))).toThrow(OutOfMemoryError);
        expect(uniform(await backend.read(storage, 0, 1000), 3)).toBe(true);
        process.env.HALFBYTE_FAKE_CUDA_HOST_MEMORY = String(6 * MB);
        expect(uniform(await backend.read(storage, 0, 5 * MB), 3)).toBe(true);
        expect(backend.state).toBe("ready");
      });
    } finally {
      delete process.env.HALFBYTE_FAKE_CUDA_HOST_MEMORY;
    }
  });

  test("memoryLimit is checked", () => {
    for (const memoryLimit of [0, -1, Number.NaN, Number.POSITIVE_INFINITY]) {
      expect(() => fakeBackend({ memoryLimit })).toThrow(ArgumentError);
    }
  });
});

describe.runIf(HERE)("guards", () => {
  test("find an overrun and an underrun", () =>
    withArena({ guards: true }, (backend) => {
      const a = backend.allocate(100) as CudaStorage;
      fill(backend, a, 0);
      backend.checkGuards();
      fill(backend, a, 0, 104);
      expect(() => backend.checkGuards()).toThrow(/100 bytes into an allocation of 100 bytes/);
      expect(() => backend.release(a)).toThrow(/100 bytes into/);
      const b = backend.allocate(512) as CudaStorage;
      backend.checkGuards();
      backend.launch("fill", { dst: { storage: b, byteOffset: -3 }, bytes: 3, value: 0 });
      expect(() => backend.checkGuards()).toThrow(/3 bytes before an allocation of 512 bytes/);
    }));

  test("leave contents alone", () =>
    withArena({ guards: true }, async (backend) => {
      const all = [1, 511, 512, 513, 5 * MB].map((bytes) => backend.allocate(bytes));
      for (const [i, storage] of all.entries()) fill(backend, storage, i + 1);
      backend.checkGuards();
      for (const [i, storage] of all.entries()) {
        expect(uniform(await backend.read(storage, 0, storage.bytes), i + 1)).toBe(true);
        backend.release(storage);
      }
    }));
});
