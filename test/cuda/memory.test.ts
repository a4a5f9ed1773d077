import { expect, test } from "vitest";
import { CudaBackend } from "#halfbyte/backend/cuda/backend.js";
import { OutOfMemoryError } from "#halfbyte/core/errors.js";
import { liveTensors, type Tensor } from "#halfbyte/core/tensor.js";
import { quantizeBlockwise } from "#halfbyte/ops/blockwise.js";
import { quantize4bit } from "#halfbyte/ops/fourbit.js";
import { normals } from "../helpers/random.js";
import { bytes, driverFree, fill, floats, MB, onGpu, withCuda } from "./gpu.js";

/** What the driver may keep for itself between two looks. */
const SLACK = 64 * MB;

onGpu("out of memory", () => {
  test("more than the GPU has is refused by name, and less works afterwards", () =>
    withCuda({}, async (gpu) => {
      const { totalBytes } = gpu.info;
      let error: unknown;
      try {
        bytes(gpu, 2 * totalBytes);
      } catch (e) {
        error = e;
      }
      expect(error).toBeInstanceOf(OutOfMemoryError);
      expect(error).toMatchObject({ device: "cuda", requestedBytes: 2 * totalBytes });
      expect(gpu.state).toBe("ready");
      using small = bytes(gpu, MB);
      fill(small, 3);
      expect((await small.data()).at(-1)).toBe(3);
    }));

  test("the GPU can be filled to the brim and emptied again", async () => {
    const other = new CudaBackend();
    const before = driverFree(other);
    await withCuda(other.info.integrated ? { memoryLimit: 512 * MB } : {}, async (gpu) => {
      const chunk = Math.floor(gpu.memory().limitBytes / 12);
      const chunks: Tensor[] = [];
      expect(() => {
        for (let i = 0; i < 14; i++) chunks.push(bytes(gpu, chunk));
      }).toThrow(OutOfMemoryError);
      expect(chunks.length).toBeGreaterThan(8);
      // The last ones must be real memory.
      for (const t of chunks.slice(-2)) fill(t, 9);
      using small = bytes(gpu, MB);
      fill(small, 4);
      expect((await small.data())[0]).toBe(4);
      expect((await gpu.read(chunks.at(-1)!.storage, chunk - 10, 10))[9]).toBe(9);
      // Neighbours among the freed chunks do as one tensor only if their memory went back to the driver.
      for (const t of chunks) t.dispose();
      using large = bytes(gpu, 3 * chunk);
      fill(large, 5);
      expect((await gpu.read(large.storage, 3 * chunk - 1, 1))[0]).toBe(5);
    });
    expect(Math.abs(driverFree(other) - before)).toBeLessThan(SLACK);
    await other.close();
  });

  test("memoryLimit is kept", () =>
    withCuda({ memoryLimit: 64 * MB }, async (gpu) => {
      using small = bytes(gpu, 10 * MB);
      expect(() => bytes(gpu, 100 * MB)).toThrow(/104857600 bytes requested, \d+ of 67108864 bytes free.*tidy/);
      using _most = bytes(gpu, 40 * MB);
      expect(() => bytes(gpu, 30 * MB)).toThrow(OutOfMemoryError);
      fill(small, 9);
      expect((await small.data())[0]).toBe(9);
    }));

  test("an op that runs out of memory half way leaves nothing", () =>
    withCuda({ memoryLimit: 32 * MB }, async (gpu) => {
      using x = floats(gpu, new Float32Array((20 * MB) / 4));
      using rest = bytes(gpu, 8 * MB);
      const before = [gpu.memory().bytes, liveTensors(gpu)];
      expect(() => quantizeBlockwise(x, { blocksize: 32 })).toThrow(OutOfMemoryError);
      expect([gpu.memory().bytes, liveTensors(gpu)]).toEqual(before);
      fill(rest, 1);
      expect((await rest.data())[0]).toBe(1);
    }));
});

onGpu("memory stays flat", () => {
  test("ten thousand rounds of create and dispose", () =>
    withCuda({}, async (gpu) => {
      const x = floats(gpu, normals(300_000, "rounds"));
      const sizes = [100, 70_000, MB, 3 * MB + 5];
      const round = (i: number): void => {
        using t = bytes(gpu, sizes[i % sizes.length]!);
        fill(t, i);
        const [packed, state] = quantize4bit(x, { quantType: "nf4", compressStatistics: i % 2 === 0 });
        packed.dispose();
        state.dispose();
      };
      for (let i = 0; i < 50; i++) round(i);
      await gpu.synchronize();
      const { committedBytes } = gpu.memory();
      const free = driverFree(gpu);
      for (let i = 0; i < 10_000; i++) round(i);
      await gpu.synchronize();
      expect(gpu.memory().committedBytes).toBe(committedBytes);
      expect(Math.abs(driverFree(gpu) - free)).toBeLessThan(SLACK);
      x.dispose();
    }));

  test("thirty backends one after the other", async () => {
    const watcher = new CudaBackend();
    const free: number[] = [];
    for (let i = 0; i < 30; i++) {
      await withCuda({}, async (gpu) => {
        using x = floats(gpu, normals(5000, i));
        const [packed, state] = quantize4bit(x);
        expect((await packed.data()).length).toBe(2500);
        packed.dispose();
        state.dispose();
      });
      free.push(driverFree(watcher));
    }
    expect(Math.abs(free.at(-1)! - free[4]!)).toBeLessThan(SLACK);
    await watcher.close();
  });

  test("the device context can be taken and given back again and again", async () => {
    for (let i = 0; i < 5; i++) {
      await withCuda({}, async (gpu) => {
        using t = bytes(gpu, 1000);
        fill(t, i + 1);
        expect((await t.data())[999]).toBe(i + 1);
      });
    }
  });
});
