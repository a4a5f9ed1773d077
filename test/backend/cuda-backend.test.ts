/** The cuda backend over the real addon and the fake driver: order, copies, fills, launching, what ends it. The kernels do nothing. */
import { join } from "node:path";
import { describe, expect, test } from "vitest";
import { COMMAND_OPERANDS, COMMAND_WORDS } from "#halfbyte/backend/cuda/addon.js";
import type { CudaStorage } from "#halfbyte/backend/cuda/arena.js";
import type { CudaBackend } from "#halfbyte/backend/cuda/backend.js";
import { listDevices, openDriver } from "#halfbyte/backend/cuda/device.js";
import { cudaLayout } from "#halfbyte/backend/cuda/layout.js";
import { READ_SLOT, READ_SLOTS_INTEGRATED, SMALL_READS } from "#halfbyte/backend/cuda/reads.js";
import { WRITE_BUFFER, WRITE_BUFFERS } from "#halfbyte/backend/cuda/staging.js";
import { availableMemory } from "#halfbyte/backend/system.js";
import { DTYPE_ID } from "#halfbyte/core/dtype.js";
import {
  ArgumentError,
  BackendError,
  CudaError,
  CudaUnavailableError,
  DisposedError,
  NoKernelImageError,
} from "#halfbyte/core/errors.js";
import type { Storage } from "#halfbyte/core/kernels.js";
import { liveTensors, Tensor } from "#halfbyte/core/tensor.js";
import { at, fakeBackend, fill, HERE, LIBRARY, textImages, uniform, withCuda } from "../helpers/fake-backend.js";
import { random } from "../helpers/random.js";

const MB = 1 << 20;
/** Bytes that differ from place to place. */
function pattern(bytes: number, seed: number): Uint8Array<ArrayBuffer> {
  const result = new Uint8Array(bytes);
  for (let i = 0; i < bytes; i++) result[i] = (i * 31 + (i >> 8) * 7 + (i >> 16) * 3 + seed) & 255;
  return result;
}
const same = (a: Uint8Array, b: Uint8Array): boolean => Buffer.compare(a, b) === 0;

describe.runIf(HERE)("order", () => {
  test("a pending read is not changed by what is launched, written or released after it", () =>
    withCuda({}, async (backend) => {
      const large = READ_SLOT * READ_SLOTS_INTEGRATED;
      for (const n of [1, 1000, 100_000, large - 1, large, large + 1, 3 * large + 5]) {
        const t = backend.allocate(n);
        fill(backend, t, 1);
        const reads = [backend.read(t, 0, n)];
        fill(backend, t, 2);
        reads.push(backend.read(t, 0, n));
        backend.write(t, 0, new Uint8Array(n).fill(3));
        reads.push(backend.read(t, 0, n));
        backend.release(t);
        const reuse = backend.allocate(n);
        fill(backend, reuse, 4);
        expect(uniform(backend.readSync(reuse, 0, n), 4)).toBe(true);
        for (const [i, read] of reads.entries()) expect(uniform(await read, i + 1), `${n} bytes, read ${i}`).toBe(true);
        backend.release(reuse);
      }
      expect(backend.memory()).toMatchObject({ bytes: 0, allocations: 0 });
    }));

  test("more reads than there are slots, small and large, all at once", () =>
    withCuda({}, async (backend) => {
      const small = backend.allocate(5000);
      const large = backend.allocate(2 * READ_SLOT);
      const reads: Promise<void>[] = [];
      for (let i = 0; i < 3 * SMALL_READS; i++) {
        for (const storage of i % 8 === 0 ? [small, large] : [small]) {
          fill(backend, storage, i);
          reads.push(
            backend.read(storage, 0, storage.bytes).then((bytes) => expect(uniform(bytes, i & 255)).toBe(true)),
          );
        }
      }
      await Promise.all(reads);
      const { reservedBytes } = backend.memory();
      expect(reservedBytes).toBeGreaterThan(READ_SLOT);
      expect(reservedBytes).toBeLessThanOrEqual(
        READ_SLOTS_INTEGRATED * READ_SLOT + SMALL_READS * 65536 + WRITE_BUFFERS * WRITE_BUFFER + 65536,
      );
    }));

  test("a blocking read takes the slots of others, and leaves them to a read that waits", () =>
    withCuda({}, async (backend) => {
      const [a, b, c] = [1, 2, 3].map((value) => {
        const storage = backend.allocate((READ_SLOTS_INTEGRATED + 1) * READ_SLOT);
        fill(backend, storage, value);
        return storage;
      });
      const first = backend.read(a!, 0, READ_SLOTS_INTEGRATED * READ_SLOT);
      const waiting = backend.read(b!, 0, b!.bytes);
      expect(uniform(backend.readSync(c!, 0, c!.bytes), 3)).toBe(true);
      fill(backend, b!, 9);
      expect(uniform(await first, 1)).toBe(true);
      expect(uniform(await waiting, 2)).toBe(true);
    }));

  test("writes of every size arrive, at every offset, and the source may change at once", () =>
    withCuda({}, async (backend) => {
      const sizes = [
        1,
        63,
        64,
        65,
        4097,
        WRITE_BUFFER - 1,
        WRITE_BUFFER,
        WRITE_BUFFER + 1,
        3 * WRITE_BUFFERS * WRITE_BUFFER,
      ];
      for (const [i, n] of sizes.entries()) {
        const t = backend.allocate(n + 10);
        fill(backend, t, 255);
        const source = pattern(n, i);
        backend.write(t, 7, source);
        const expected = source.slice();
        source.fill(0);
        const bytes = await backend.read(t, 0, n + 10);
        expect(same(bytes.subarray(7, 7 + n), expected), `${n} bytes`).toBe(true);
        expect([...bytes.subarray(0, 7), ...bytes.subarray(7 + n)]).toEqual(new Array(10).fill(255));
        backend.release(t);
      }
      const t = backend.allocate(100);
      const whole = pattern(100, 9);
      backend.write(t, 0, whole.subarray(30));
      expect(same(backend.readSync(t, 20, 50), whole.subarray(50))).toBe(true);
      backend.write(t, 0, new Uint8Array(0));
    }));

  test("a random program", () =>
    withCuda({ memoryLimit: 200 * MB }, async (backend) => {
      const next = random("program");
      const sizes = [64, 70_001, 300_000, 9_000_000, 30_000_001];
      const buffers = sizes.map((n) => ({ storage: backend.allocate(n), value: 0 }));
      for (const { storage } of buffers) fill(backend, storage, 0);
      const pending: Promise<void>[] = [];
      const check = (bytes: Uint8Array, value: number): void => expect(uniform(bytes, value)).toBe(true);
      for (let i = 0; i < 500; i++) {
        const x = buffers[next() % sizes.length]!;
        const y = buffers[next() % sizes.length]!;
        const { bytes } = x.storage;
        const { value } = x;
        const kind = next() % 8;
        if (kind < 2) {
          x.value = next() & 255;
          fill(backend, x.storage, x.value);
        } else if (kind === 2 && x !== y && bytes <= y.storage.bytes) {
          x.value = y.value;
          backend.launch("copy", { src: at(y.storage), dst: at(x.storage), bytes });
        } else if (kind < 5) {
          pending.push(backend.read(x.storage, 0, bytes).then((read) => check(read, value)));
        } else if (kind === 5) {
          check(backend.readSync(x.storage, 0, bytes), value);
        } else if (kind === 6) {
          x.value = next() & 255;
          backend.write(x.storage, 0, new Uint8Array(bytes).fill(x.value));
        } else {
          pending.push(backend.read(x.storage, 0, bytes).then((read) => check(read, value)));
          backend.release(x.storage);
          x.storage = backend.allocate(bytes);
          x.value = 1;
          fill(backend, x.storage, 1);
        }
        if (pending.length > 10 || next() % 10 === 0) await Promise.all(pending.splice(0));
      }
      await Promise.all(pending);
      for (const { storage } of buffers) backend.release(storage);
      expect(backend.memory().bytes).toBe(0);
    }));

  test("empty reads, and waiting for everything", () =>
    withCuda({}, async (backend) => {
      const t = backend.allocate(0);
      expect(await backend.read(t, 0, 0)).toEqual(new Uint8Array(0));
      expect(backend.readSync(t, 0, 0)).toEqual(new Uint8Array(0));
      await backend.synchronize();
    }));
});

describe.runIf(HERE)("copy and fill", () => {
  test("fill: every alignment, length and kind of value", () =>
    withCuda({}, (backend) => {
      const t = backend.allocate(64);
      for (const value of [0x5a5a5a5a, 0x04030201, 0xff000000, 0x80000001]) {
        for (let offset = 0; offset < 9; offset++) {
          for (let bytes = 0; bytes < 23; bytes++) {
            fill(backend, t, 0xee);
            backend.launch("fill", { dst: at(t, offset), bytes, value });
            const expected = new Uint8Array(64).fill(0xee);
            for (let i = 0; i < bytes; i++) expected[offset + i] = value >>> (8 * (i % 4));
            expect(backend.readSync(t, 0, 64), `${value} at ${offset}, ${bytes} bytes`).toEqual(expected);
          }
        }
      }
    }));

  test("copy: bytes at any offset", () =>
    withCuda({}, (backend) => {
      const [a, b] = [backend.allocate(5000), backend.allocate(5000)];
      backend.write(a, 0, pattern(5000, 1));
      fill(backend, b, 0);
      backend.launch("copy", { src: at(a, 13), dst: at(b, 101), bytes: 4001 });
      const expected = new Uint8Array(5000);
      expected.set(pattern(5000, 1).subarray(13, 4014), 101);
      expect(same(backend.readSync(b, 0, 5000), expected)).toBe(true);
    }));

  test("tensors: views, conversion-free copies, constants", () =>
    withCuda({ guards: true }, async (backend) => {
      {
        using t = Tensor.allocate(backend, "f32", [4, 3]).copyFrom(Float32Array.from({ length: 12 }, (_, i) => i));
        using rows = t.slice(1, 3);
        using copy = rows.clone();
        expect(copy.dataSync()).toEqual(Float32Array.of(3, 4, 5, 6, 7, 8));
        rows.copyFrom(new Float32Array(6).fill(-1));
        expect((await t.data())[3]).toBe(-1);
        expect(t.device).toBe("cuda");
      }
      const key = {};
      let made = 0;
      const bytes = (): Uint8Array => {
        made++;
        return Uint8Array.of(1, 2, 3);
      };
      const constant = backend.constant(key, bytes);
      expect(backend.constant(key, bytes)).toBe(constant);
      expect(made).toBe(1);
      expect(backend.readSync(constant, 0, 3)).toEqual(Uint8Array.of(1, 2, 3));
      expect(liveTensors(backend)).toBe(0);
      expect(backend.memory()).toMatchObject({ bytes: 0, allocations: 0 });
    }));
});

describe.runIf(HERE)("launching", () => {
  const command = (backend: CudaBackend): Uint32Array => (backend as unknown as { command: Uint32Array }).command;

  test("operands are packed where the layout says", () =>
    withCuda({}, (backend) => {
      const x = backend.allocate(1 << 12) as CudaStorage;
      const operands = { x: at(x, 12), packed: at(x), absmax: null, n: 2 ** 33 + 5, blocksize: 64 };
      backend.launch("quantize4bit", { ...operands, dtype: 2, quantType: 1, allowNonFinite: 1 });
      const words = command(backend);
      const { offsets, bytes } = cudaLayout("quantize4bit");
      const wide = (field: string): bigint => new BigUint64Array(words.buffer, COMMAND_OPERANDS)[offsets[field]! >> 3]!;
      const word = (field: string): number => words[(COMMAND_OPERANDS + offsets[field]!) >> 2]!;
      expect([wide("x"), wide("packed"), wide("absmax"), wide("n")]).toEqual([
        BigInt(x.address) + 12n,
        BigInt(x.address),
        0n,
        2n ** 33n + 5n,
      ]);
      expect([word("blocksize"), word("dtype"), word("quantType"), word("allowNonFinite")]).toEqual([64, 2, 1, 1]);
      expect(words[COMMAND_WORDS.operandBytes]).toBe(bytes);
      expect(words[COMMAND_WORDS.grid]).toBeGreaterThan(2 ** 20);
    }));

  test("images are loaded with the first launch of their family", () =>
    withCuda({}, (backend) => {
      const t = backend.allocate(1024);
      expect(backend.imagesInUse()).toEqual([]);
      backend.launch("convert", { x: at(t), y: at(t), n: 8, from: 0, to: 1 });
      backend.launch("convert", { x: at(t), y: at(t), n: 8, from: 0, to: 1 });
      backend.launch("convert", { x: at(t), y: at(t), n: 0, from: 0, to: 1 });
      fill(backend, t, 0);
      expect(backend.imagesInUse()).toEqual(["convert compute_80 PTX, text 1.0"]);
      backend.launch("meanOfSums", { x: at(t), y: at(t), sums: 1, n: 8 });
      expect(backend.imagesInUse()).toHaveLength(2);
    }));

  test("an image without the entry, a folder without images, an image that does not load", async () => {
    await withCuda({ kernels: textImages(".entry other(") }, async (backend) => {
      const t = backend.allocate(1024);
      const launch = (): void => backend.launch("meanOfSums", { x: at(t), y: at(t), sums: 1, n: 8 });
      expect(launch).toThrow(/the image sum compute_80 PTX, text 1.0 has no entry meanOfSums/);
      expect(launch).toThrow(BackendError);
      fill(backend, t, 5);
      expect(uniform(await backend.read(t, 0, 1024), 5)).toBe(true);
    });
    await withCuda({ kernels: join(textImages(), "nothing") }, (backend) => {
      const t = backend.allocate(1024);
      const launch = (): void => backend.launch("meanOfSums", { x: at(t), y: at(t), sums: 1, n: 8 });
      expect(launch).toThrow(NoKernelImageError);
      expect(launch).toThrow(/no kernels for sm_87/);
    });
    await withCuda({}, (backend) => {
      const t = backend.allocate(1024);
      const launch = (): void => backend.launch("meanOfSums", { x: at(t), y: at(t), sums: 1, n: 8 });
      process.env.HALFBYTE_FAKE_CUDA_MODULE = "209";
      try {
        expect(launch).toThrow(/NO_BINARY_FOR_GPU \(209\).*fake compiler: no code.* in sum compute_80 PTX, text 1.0/);
        expect(launch).toThrow(CudaError);
        expect(backend.state).toBe("ready");
      } finally {
        delete process.env.HALFBYTE_FAKE_CUDA_MODULE;
      }
      launch();
    });
  });

  test("a launch or image that finds no memory is tried again once cached memory has gone back", () =>
    withCuda({}, (backend) => {
      const { addon } = openDriver();
      const { launch, moduleLoad } = addon;
      const t = backend.allocate(64);
      const settled = backend.memory().committedBytes;
      const short = (): boolean => backend.memory().committedBytes > settled;
      const convert = (): void => backend.launch("convert", { x: at(t), y: at(t), n: 8, from: 0, to: 1 });
      const cache = (): void => backend.release(backend.allocate(10 * MB));
      try {
        Object.assign(addon, { moduleLoad: (image: Uint8Array) => (short() ? 2 : moduleLoad(image)) });
        cache();
        convert();
        Object.assign(addon, { launch: () => (short() ? 2 : launch()) });
        cache();
        convert();
        expect(short()).toBe(false);
        Object.assign(addon, { launch: () => 2 });
        expect(convert).toThrow(/launch: CUDA_ERROR_OUT_OF_MEMORY \(2\), out of memory in convert\(/);
        expect(backend.state).toBe("ready");
      } finally {
        Object.assign(addon, { launch, moduleLoad });
      }
    }));

  test("time between two events", () =>
    withCuda({}, (backend) => {
      const t = backend.allocate(64 * MB);
      const milliseconds = backend.elapsed(() => {
        for (let i = 0; i < 5; i++) fill(backend, t, i);
      });
      expect(milliseconds).toBeGreaterThan(0);
      expect(milliseconds).toBeLessThan(10_000);
    }));

  test("what lies outside any allocation is refused, and the backend goes on", () =>
    withCuda({}, async (backend) => {
      const t = backend.allocate(100);
      const outside = { storage: { bytes: 64, arena: 0, offset: 0, address: 4096 } as Storage, byteOffset: 0 };
      expect(() => backend.launch("copy", { src: outside, dst: at(t), bytes: 8 })).toThrow(CudaError);
      expect(() => backend.launch("copy", { src: at(t), dst: at(t), bytes: 2 ** 40 })).toThrow(
        /copyOnDevice: badArgument/,
      );
      await expect(backend.read(t, 0, 2 ** 32)).rejects.toThrow();
      fill(backend, t, 6);
      expect(uniform(await backend.read(t, 0, 100), 6)).toBe(true);
    }));
});

describe.runIf(HERE)("the end", () => {
  test("pending reads reject at close; use after close", async () => {
    const backend = fakeBackend();
    const t = backend.allocate(200 * MB);
    const tensor = Tensor.allocate(backend, "u8", [10]);
    fill(backend, t, 1);
    const pending = [backend.read(t, 0, 200 * MB), backend.read(t, 0, 10), backend.synchronize()];
    const closing = backend.close();
    expect(backend.state).toBe("closed");
    for (const read of pending) {
      await expect(read).rejects.toBeInstanceOf(BackendError);
      await expect(read).rejects.toThrow("[cuda] the backend was closed");
    }
    await closing;
    await backend.close();
    expect(() => backend.allocate(1)).toThrow(DisposedError);
    expect(() => fill(backend, t, 1)).toThrow(DisposedError);
    expect(() => backend.write(t, 0, new Uint8Array(1))).toThrow(DisposedError);
    expect(() => backend.readSync(t, 0, 1)).toThrow(DisposedError);
    expect(() => backend.constant({}, () => new Uint8Array(1))).toThrow(DisposedError);
    expect(() => backend.checkGuards()).toThrow(DisposedError);
    expect(() => backend.elapsed(() => {})).toThrow(DisposedError);
    await expect(backend.read(t, 0, 1)).rejects.toThrow(DisposedError);
    await expect(backend.synchronize()).rejects.toThrow(DisposedError);
    await expect(backend.restart()).rejects.toThrow(DisposedError);
    backend.release(t);
    tensor.dispose();
  });

  test("two backends share the GPU, and one closes without the other", () =>
    withCuda({}, async (first) => {
      const second = fakeBackend({ guards: true });
      const [a, b] = [first.allocate(20 * MB), second.allocate(20 * MB)];
      fill(first, a, 1);
      fill(second, b, 2);
      const reads = [first.read(a, 0, a.bytes), second.read(b, 0, b.bytes)];
      expect(uniform(await reads[0]!, 1)).toBe(true);
      expect(uniform(await reads[1]!, 2)).toBe(true);
      const lost = second.read(b, 0, b.bytes);
      const kept = first.read(a, 0, a.bytes);
      await Promise.all([expect(lost).rejects.toThrow(/closed/), second.close()]);
      expect(uniform(await kept, 1)).toBe(true);
      using third = new (class {
        readonly backend = fakeBackend();
        [Symbol.dispose](): void {
          void this.backend.close();
        }
      })();
      expect(third.backend.state).toBe("ready");
      expect(uniform(first.readSync(a, 0, a.bytes), 1)).toBe(true);
      await third.backend.close();
    }));

  test("closing gives everything back though another backend still holds the context", () =>
    withCuda({}, async () => {
      const { addon } = openDriver();
      const alive: Record<string, number> = {};
      const calls = addon as unknown as Record<string, (...args: unknown[]) => number>;
      const original = { ...calls };
      const count = (name: string, what: string, by: number): void => {
        calls[name] = (...args) => {
          const status = original[name]!(...args);
          if (status === 0) alive[what] = (alive[what] ?? 0) + by;
          return status;
        };
      };
      const pairs = { memory: ["Allocate", "Free"], host: ["Allocate", "Free"], module: ["Load", "Unload"] };
      for (const [what, [make, end]] of Object.entries({
        ...pairs,
        event: ["Create", "Destroy"],
        stream: ["Create", "Destroy"],
      })) {
        count(what + make, what, 1);
        count(what + end, what, -1);
      }
      try {
        const second = fakeBackend({ guards: true });
        const t = second.allocate(30 * MB);
        second.write(t, 0, new Uint8Array(30 * MB));
        second.launch("quantize4bit", {
          x: at(t),
          packed: at(t),
          absmax: at(t),
          n: 64,
          blocksize: 64,
          dtype: 0,
          quantType: 0,
          allowNonFinite: 0,
        });
        const pending = second.read(t, 0, t.bytes);
        second.readSync(t, 0, t.bytes);
        second.elapsed(() => {});
        for (const what of ["memory", "host", "module", "event", "stream"])
          expect(alive[what], what).toBeGreaterThan(0);
        await Promise.all([expect(pending).rejects.toThrow(/closed/), second.close()]);
        expect(alive).toEqual({ memory: 0, host: 0, module: 0, event: 0, stream: 0 });
      } finally {
        Object.assign(addon, original);
      }
    }));

  test("restart of a backend that has not failed: pending reads reject, tensors stay", () =>
    withCuda({}, async (backend) => {
      const t = backend.allocate(50 * MB);
      fill(backend, t, 8);
      const pending = backend.read(t, 0, t.bytes);
      await Promise.all([expect(pending).rejects.toThrow(/restarted/), backend.restart()]);
      expect(backend.state).toBe("ready");
      expect(uniform(await backend.read(t, 0, t.bytes), 8)).toBe(true);
    }));
});

describe.runIf(HERE)("devices", () => {
  test("what the driver says of them", () => {
    expect(listDevices(LIBRARY)).toEqual([
      {
        ordinal: 0,
        name: "Fake Orin",
        uuid: "f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff",
        architecture: 87,
        multiprocessors: 8,
        sharedBytesPerBlock: 163 * 1024,
        totalBytes: 8 * 2 ** 30,
        integrated: true,
        driverVersion: 13000,
        managedMemory: true,
        concurrentManagedAccess: false,
        memoryPools: true,
      },
    ]);
    expect(openDriver()).toBe(openDriver(LIBRARY));
    expect(() => openDriver("/other.so")).toThrow(CudaUnavailableError);
    expect(() => openDriver("/other.so")).toThrow(/has already opened .*libcuda-fake.*\/other\.so was asked for/);
  });

  test("a device that is not there", () => {
    for (const device of [-1, 1, 0.5, Number.NaN]) {
      expect(() => fakeBackend({ device })).toThrow(ArgumentError);
    }
    process.env.HALFBYTE_FAKE_CUDA_DEVICES = "2";
    try {
      expect(listDevices().map((d) => d.ordinal)).toEqual([0, 1]);
    } finally {
      delete process.env.HALFBYTE_FAKE_CUDA_DEVICES;
    }
  });

  test("a 4-bit product falls back where tensor cores or shared memory are missing", async () => {
    const { addon } = openDriver(LIBRARY);
    const find = addon.moduleFunction;
    const names: string[] = [];
    Object.assign(addon, {
      moduleFunction: (module: number, name: string) => {
        names.push(name);
        return find.call(addon, module, name);
      },
    });
    const launched = async (m: number, splits: number, capability: string, shared: number): Promise<string> => {
      process.env.HALFBYTE_FAKE_CUDA_CAPABILITY = capability;
      process.env.HALFBYTE_FAKE_CUDA_SHARED = String(shared);
      // On an integrated GPU a family warms up first.
      process.env.HALFBYTE_FAKE_CUDA_INTEGRATED = "0";
      names.length = 0;
      const backend = fakeBackend();
      const memory = at(backend.allocate(1 << 20));
      const none = { code: null, absmax2: null, offset: null, bias: null, blocksize2: 0 };
      const sizes = { m, n: 64, k: 64, blocksize: 64, dtype: DTYPE_ID.f16, quantType: 0, splits };
      const operands = { a: memory, packed: memory, absmax: memory, y: memory, partial: memory };
      try {
        backend.launch("matmul4bit", { ...operands, ...none, ...sizes });
      } finally {
        await backend.close();
      }
      return names.join();
    };
    try {
      expect(await launched(1, 1, "8.7", 163 * 1024)).toBe("matmul4bit_vector_f16_wide_1_4");
      expect(await launched(64, 2, "8.7", 163 * 1024)).toBe("matmul4bit_tiles_f16_64");
      expect(await launched(1, 1, "8.6", 99 * 1024)).toBe("matmul4bit_vector_f16_wide_1_4");
      expect(await launched(64, 2, "8.6", 99 * 1024)).toBe("matmul4bit_plain_f16");
    } finally {
      Object.assign(addon, { moduleFunction: find });
      delete process.env.HALFBYTE_FAKE_CUDA_CAPABILITY;
      delete process.env.HALFBYTE_FAKE_CUDA_SHARED;
      delete process.env.HALFBYTE_FAKE_CUDA_INTEGRATED;
    }
  });

  test("the limit of an integrated GPU is what the system has available, that of another its memory", async () => {
    const total = 2 ** 46;
    process.env.HALFBYTE_FAKE_CUDA_MEMORY = String(total);
    try {
      const integrated = fakeBackend();
      const { limitBytes } = integrated.memory();
      await integrated.close();
      expect(limitBytes / availableMemory().bytes).toBeGreaterThan(0.5);
      expect(limitBytes / availableMemory().bytes).toBeLessThan(2);
      process.env.HALFBYTE_FAKE_CUDA_INTEGRATED = "0";
      const discrete = fakeBackend();
      expect(discrete.info.integrated).toBe(false);
      expect(discrete.memory().limitBytes).toBe(total);
      await discrete.close();
    } finally {
      delete process.env.HALFBYTE_FAKE_CUDA_MEMORY;
      delete process.env.HALFBYTE_FAKE_CUDA_INTEGRATED;
    }
  });
});
