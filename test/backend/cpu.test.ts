import { execFileSync } from "node:child_process";
import type { Worker } from "node:worker_threads";
import { describe, expect, test } from "vitest";
import { CpuBackend } from "#halfbyte/backend/cpu/backend.js";
import { MAX_THREADS } from "#halfbyte/backend/cpu/layout.js";
import { ArgumentError, BackendError, DisposedError, NonFiniteError, OutOfMemoryError } from "#halfbyte/core/errors.js";
import { liveTensors, Tensor } from "#halfbyte/core/tensor.js";
import { quantizeBlockwise } from "#halfbyte/ops/blockwise.js";
import { quantize4bit } from "#halfbyte/ops/fourbit.js";
import { int8VectorwiseQuant } from "#halfbyte/ops/int8.js";
import { withBackend } from "../helpers/backends.js";
import { normals } from "../helpers/random.js";

const MB = 1 << 20;

function fill(t: Tensor, value: number): void {
  t.backend.launch("fill", { dst: t, bytes: t.byteLength, value: Math.imul(value & 255, 0x01010101) >>> 0 });
}

function bytes(backend: CpuBackend, n: number): Tensor<"u8"> {
  return Tensor.allocate(backend, "u8", [n]);
}

function floats(backend: CpuBackend, values: Float32Array): Tensor<"f32"> {
  return Tensor.allocate(backend, "f32", [values.length]).copyFrom(values);
}

function workers(backend: CpuBackend): Worker[] {
  return (backend as unknown as { stream: { pool: { piscina: { threads: Worker[] } } } }).stream.pool.piscina.threads;
}

/** An address outside the memory: a kernel that is given it traps. */
const OUTSIDE = { storage: { bytes: 64, arena: 0, offset: 0xfff00000 }, byteOffset: 0 };

describe("order", () => {
  test("reads see what was launched before them, before and after the workers are up", () =>
    withBackend({}, async (backend) => {
      using t = bytes(backend, 100);
      fill(t, 7);
      expect(t.dataSync()).toEqual(new Uint8Array(100).fill(7));
      fill(t, 8);
      expect(await t.data()).toEqual(new Uint8Array(100).fill(8));
      fill(t, 9);
      expect(t.dataSync()[99]).toBe(9);
    }));

  test("a pending read is not changed by what is launched, written or disposed after it", () =>
    withBackend({}, async (backend) => {
      for (const n of [1000, 8 * MB]) {
        const t = bytes(backend, n);
        fill(t, 1);
        const first = t.data();
        fill(t, 2);
        const second = t.data();
        t.copyFrom(new Uint8Array(n).fill(3));
        const third = t.data();
        t.dispose();
        using reuse = bytes(backend, n);
        fill(reuse, 4);
        for (const [value, read] of [
          [1, first],
          [2, second],
          [3, third],
        ] as const) {
          const data = await read;
          expect([data.length, data[0], data[n - 1], data.every((v) => v === value)]).toEqual([n, value, value, true]);
        }
        expect((await reuse.data())[n - 1]).toBe(4);
      }
    }));

  test("memory that is disposed and taken again under running kernels stays apart", () =>
    withBackend({ guards: false }, async (backend) => {
      const checks: Promise<void>[] = [];
      for (let i = 0; i < 200; i++) {
        using a = bytes(backend, 300_000);
        using b = bytes(backend, 300_000);
        a.copyFrom(new Uint8Array(300_000).fill(i & 255));
        backend.launch("copy", { src: a, dst: b, bytes: a.byteLength });
        if (i % 10 === 0) checks.push(b.data().then((d) => expect(d.every((v) => v === (i & 255))).toBe(true)));
      }
      await Promise.all(checks);
    }));

  test("a chain longer than the ring", () =>
    withBackend({ threads: 3 }, async (backend) => {
      using t = bytes(backend, 64);
      for (let i = 0; i < 20_000; i++) fill(t, i);
      expect((await t.data())[0]).toBe(19_999 & 255);
      for (let i = 0; i < 20_000; i++) fill(t, i + 1);
      expect(t.dataSync()[0]).toBe(20_000 & 255);
    }));
});

describe("the same bits for every number of workers", () => {
  test("1, 2, 3 and 8", async () => {
    const x = normals(300_001, "workers");
    const results: Buffer[] = [];
    for (const threads of [1, 2, 3, 8]) {
      await withBackend({ threads }, async (backend) => {
        using A = floats(backend, x);
        const [packed, state] = quantize4bit(A, { quantType: "nf4", compressStatistics: true });
        const [codes, state8] = quantizeBlockwise(A, { blocksize: 256 });
        const all = [packed, codes, ...state.tensors(), ...state8.tensors()];
        results.push(Buffer.concat(await Promise.all(all.map((t) => t.bytes()))));
        for (const t of all) t.dispose();
      });
    }
    expect(results[0]!.length).toBeGreaterThan(450_000);
    for (const r of results) expect(Buffer.compare(r, results[0]!)).toBe(0);
  });
});

describe("non-finite input", () => {
  test("the next read names the op and the first bad block; the one after works", () =>
    withBackend({}, async (backend) => {
      const x = normals(100_000, "nan");
      x[70_000] = Number.NaN;
      x[90_000] = Number.NEGATIVE_INFINITY;
      using A = floats(backend, x);
      const [packed, state] = quantize4bit(A, { quantType: "nf4" });
      const error = await packed.data().catch((e: unknown) => e);
      expect(error).toBeInstanceOf(NonFiniteError);
      expect(error).toMatchObject({ op: "quantize4bit", operand: "A", index: Math.floor(70_000 / 64), unit: "block" });
      expect((await state.absmax.data()).length).toBe(Math.ceil(100_000 / 64));
      const [codes, state8] = quantizeBlockwise(A, { blocksize: 4096 });
      expect(() => codes.dataSync()).toThrow(/block 17\b/);
      using R = A.reshape([10, 10_000]);
      const [q, scale] = int8VectorwiseQuant(R);
      expect(() => q.dataSync()).toThrow(/NaN or infinity in row 7/);
      for (const t of [packed, codes, q, scale, ...state.tensors(), ...state8.tensors()]) t.dispose();
    }));

  test("a read that was made before the launch is not blamed", () =>
    withBackend({}, async (backend) => {
      using A = floats(backend, Float32Array.of(1, Number.POSITIVE_INFINITY));
      const before = A.data();
      const [packed, state] = quantize4bit(A);
      expect((await before)[0]).toBe(1);
      await expect(backend.synchronize()).rejects.toThrow(NonFiniteError);
      await backend.synchronize();
      packed.dispose();
      state.dispose();
    }));

  for (const reads of [2, 200, 3000]) {
    test(`${reads} pending reads, each after a launch that meets something`, () =>
      withBackend({ threads: 2 }, async (backend) => {
        const x = new Float32Array(64 * 8);
        const all = Array.from({ length: 8 }, (_, block) => {
          x[block * 64] = Number.NaN;
          const A = floats(backend, x);
          x[block * 64] = 0;
          return A;
        });
        const answers: Promise<unknown>[] = [];
        const met = (error: NonFiniteError): number => error.index;
        for (let i = 0; i < reads; i++) {
          const A = all[i % 8]!;
          const [packed, state] = quantize4bit(A);
          answers.push(packed.data().then(() => "fine", met));
          if (i % 3 === 0) answers.push(packed.data().then(() => "fine", met));
          if (i % 1000 === 999) expect(() => packed.dataSync()).not.toThrow();
          packed.dispose();
          state.dispose();
        }
        const expected = Array.from({ length: reads }, (_, i) => (i % 3 === 0 ? [i % 8, "fine"] : [i % 8])).flat();
        expect(await Promise.all(answers)).toEqual(expected);
        await backend.synchronize();
        for (const A of all) A.dispose();
      }));
  }

  test("a fault is kept for the next read through more launches than the ring holds", () =>
    withBackend({}, async (backend) => {
      using A = floats(backend, Float32Array.of(1, Number.NaN));
      using t = bytes(backend, 64);
      for (const read of [() => t.data(), async () => t.dataSync(), () => backend.synchronize()]) {
        const [packed, state] = quantize4bit(A);
        for (let i = 0; i < 10_000; i++) fill(t, i);
        await expect(read()).rejects.toThrow(NonFiniteError);
        await read();
        packed.dispose();
        state.dispose();
      }
    }));

  test("allowNonFinite quantizes", () =>
    withBackend({}, async (backend) => {
      using A = floats(backend, Float32Array.of(1, Number.NaN, -2, Number.POSITIVE_INFINITY));
      for (const quantType of ["nf4", "fp4"] as const) {
        const [packed, state] = quantize4bit(A, { quantType, allowNonFinite: true });
        expect((await state.absmax.data())[0]).toBe(Number.POSITIVE_INFINITY);
        expect((await packed.data()).length).toBe(2);
        packed.dispose();
        state.dispose();
      }
    }));
});

describe("failure", () => {
  test("a trap rejects pending reads with the kernel's name, and the backend can be restarted", () =>
    withBackend({ guards: false }, async (backend) => {
      using kept = bytes(backend, 100);
      fill(kept, 5);
      await kept.data();
      using t = bytes(backend, 100);
      backend.launch("copy", { src: OUTSIDE, dst: t, bytes: 100 });
      const pending = [t.data(), t.data()];
      for (const read of pending) await expect(read).rejects.toThrow(/out of bounds in copy\(src=0xfff00000/);
      expect(backend.state).toBe("failed");
      expect(() => fill(t, 1)).toThrow(BackendError);
      expect(() => t.dataSync()).toThrow(BackendError);
      await expect(t.data()).rejects.toThrow(BackendError);
      await backend.restart();
      expect(backend.state).toBe("ready");
      expect((await kept.data())[99]).toBe(5);
      fill(t, 6);
      expect((await t.data())[0]).toBe(6);
    }));

  test("a trap before the workers are up and one under dataSync", () =>
    withBackend({ guards: false }, async (backend) => {
      using t = bytes(backend, 100);
      backend.launch("copy", { src: OUTSIDE, dst: t, bytes: 100 });
      expect(() => t.dataSync()).toThrow(/out of bounds in copy/);
      await backend.restart();
      fill(t, 1);
      await t.data();
      backend.launch("copy", { src: OUTSIDE, dst: t, bytes: 100 });
      expect(() => t.dataSync()).toThrow(/out of bounds in copy/);
      await backend.restart();
      fill(t, 2);
      expect(t.dataSync()[0]).toBe(2);
    }));

  for (const threads of [1, 2, 4]) {
    test(`a worker terminated in the middle of a kernel (${threads} workers)`, () =>
      withBackend({ threads, guards: false }, async (backend) => {
        using a = bytes(backend, 64 * MB);
        using b = bytes(backend, 64 * MB);
        fill(a, 3);
        await a.data();
        for (let i = 0; i < 300; i++) backend.launch("copy", { src: a, dst: b, bytes: a.byteLength });
        const read = b.data();
        void workers(backend)[0]!.terminate();
        await expect(read).rejects.toThrow(/worker thread \d+ exited/);
        await backend.restart();
        expect((await a.data())[64 * MB - 1]).toBe(3);
      }));
  }

  test("a worker lost while the main thread is blocked", () =>
    withBackend({ threads: 1, guards: false, stallTimeout: 300 }, async (backend) => {
      using a = bytes(backend, 64 * MB);
      using b = bytes(backend, 64 * MB);
      fill(a, 3);
      await a.data();
      for (let i = 0; i < 2000; i++) backend.launch("copy", { src: a, dst: b, bytes: a.byteLength });
      void workers(backend)[0]!.terminate();
      expect(() => b.dataSync()).toThrow(/no progress for 0.3 s: a worker was lost in copy/);
      await backend.restart();
      fill(b, 1);
      expect((await b.data())[0]).toBe(1);
    }));

  test("closing in the middle of a kernel; use after close", async () => {
    const backend = new CpuBackend({ threads: 2 });
    const a = bytes(backend, 64 * MB);
    for (let i = 0; i < 300; i++) fill(a, i);
    const read = a.data();
    await Promise.all([expect(read).rejects.toThrow(/closed/), backend.close()]);
    expect(backend.state).toBe("closed");
    expect(() => bytes(backend, 1)).toThrow(DisposedError);
    await expect(a.data()).rejects.toThrow(DisposedError);
    await expect(backend.restart()).rejects.toThrow(DisposedError);
    a.dispose();
    await backend.close();
  });
});

describe("memory", () => {
  test("out of memory says what was asked and what is free; smaller requests then work", () =>
    withBackend({ memoryLimit: 64 * MB, guards: false }, async (backend) => {
      using small = bytes(backend, 10 * MB);
      expect(() => bytes(backend, 100 * MB)).toThrow(OutOfMemoryError);
      expect(() => bytes(backend, 100 * MB)).toThrow(/104857600 bytes requested, \d+ of 67108864 bytes free.*tidy/);
      using _most = bytes(backend, 50 * MB);
      expect(() => bytes(backend, 10 * MB)).toThrow(OutOfMemoryError);
      fill(small, 9);
      expect((await small.data())[0]).toBe(9);
    }));

  test("an op that runs out of memory half way leaves nothing", () =>
    withBackend({ memoryLimit: 32 * MB, guards: false }, async (backend) => {
      using x = floats(backend, new Float32Array((20 * MB) / 4));
      using rest = bytes(backend, 8 * MB);
      const before = [backend.memory().bytes, liveTensors(backend)];
      expect(() => quantizeBlockwise(x, { blocksize: 32 })).toThrow(OutOfMemoryError);
      expect([backend.memory().bytes, liveTensors(backend)]).toEqual(before);
      fill(rest, 1);
      expect((await rest.data())[0]).toBe(1);
    }));

  test("a read or a constant that fails half way leaves nothing", () =>
    withBackend({}, async (backend) => {
      using t = bytes(backend, 100);
      fill(t, 1);
      const { reservedBytes } = backend.memory();
      const refuse = (): never => {
        throw new BackendError("cpu", "refused");
      };
      Object.assign(backend, { launch: refuse, write: refuse });
      await expect(t.data()).rejects.toThrow(/refused/);
      expect(() => backend.constant({}, () => new Uint8Array(8))).toThrow(/refused/);
      expect(backend.memory().reservedBytes).toBe(reservedBytes);
    }));

  test("10,000 rounds of create and dispose need no more memory than one", () =>
    withBackend({ guards: false }, async (backend) => {
      const round = (): void => {
        using t = bytes(backend, 1 * MB);
        fill(t, 1);
      };
      round();
      const { committedBytes } = backend.memory();
      for (let i = 0; i < 10_000; i++) round();
      expect(backend.memory().committedBytes).toBe(committedBytes);
      await backend.synchronize();
    }));

  test("kernels reach memory that has only just grown", () =>
    withBackend({ threads: 2, guards: false }, async (backend) => {
      using busy = bytes(backend, 3 * MB);
      await busy.data();
      for (let i = 0; i < 40; i++) {
        for (let j = 0; j < 1 + (i % 5); j++) fill(busy, i);
        using last = bytes(backend, 17 * MB + i * MB);
        const end = { storage: last.storage, byteOffset: last.byteLength - 64 };
        backend.launch("copy", { src: busy, dst: end, bytes: 64 });
        if (i % 8 === 0) expect((await last.data()).at(-1)).toBe(i);
      }
      await backend.synchronize();
    }));

  test("guards find an overrun", async () => {
    const backend = new CpuBackend({ threads: 1, guards: true });
    const t = bytes(backend, 100);
    backend.launch("fill", { dst: t, bytes: 104, value: 0 });
    expect(() => backend.checkGuards()).toThrow(/100 bytes into an allocation of 100 bytes/);
    await backend.close();
  });
});

describe("options", () => {
  test("threads", async () => {
    for (const threads of [0, -1, 1.5, MAX_THREADS + 1, Number.NaN]) {
      expect(() => new CpuBackend({ threads })).toThrow(ArgumentError);
    }
    process.env.HALFBYTE_THREADS = "3";
    const backend = new CpuBackend();
    expect(backend.threads).toBe(3);
    await backend.close();
    process.env.HALFBYTE_THREADS = "many";
    expect(() => new CpuBackend()).toThrow(/HALFBYTE_THREADS: expected an integer from 1 to 64, received many/);
    delete process.env.HALFBYTE_THREADS;
  });
});

describe("the process exits by itself", () => {
  const prelude = `import { tensor, quantize4bit, init } from "halfbyte"; const x = tensor(new Float32Array(1 << 20));`;
  const run = (code: string): string =>
    execFileSync(process.execPath, ["--input-type=module", "-e", `${prelude}\n${code}`], {
      encoding: "utf8",
      timeout: 20_000,
    });

  test("after a read, with workers idle", () => {
    expect(run(`console.log((await x.data()).length);`)).toBe("1048576\n");
  });
  test("with a read pending that nobody awaits, which is still answered", () => {
    expect(run(`quantize4bit(x)[0].data().then((d) => console.log(d.length));`)).toBe("524288\n");
  });
  test("a read made before anything was launched does not keep those after it from being answered", () => {
    const code = `const first = x.data(); const second = quantize4bit(x)[0].data(); console.log((await first).length, (await second).length);`;
    expect(run(code)).toBe("1048576 524288\n");
  });
  test("with kernels enqueued that nobody reads", () => {
    expect(run(`for (let i = 0; i < 50; i++) quantize4bit(x); console.log("done");`)).toBe("done\n");
  });
  test("with an unhandled failure, as a failure", () => {
    const code = `x.backend.launch("copy", { src: { storage: { offset: 0xfff00000 }, byteOffset: 0 }, dst: x, bytes: 8 }); await x.data();`;
    expect(() => run(code)).toThrow(/out of bounds in copy/);
  });
});
