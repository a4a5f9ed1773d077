import { expect, test } from "vitest";
import type { Tensor } from "#halfbyte/core/tensor.js";
import { dequantize4bit, quantize4bit } from "#halfbyte/ops/fourbit.js";
import { normals, random } from "../helpers/random.js";
import { bytes, fill, floats, MB, onGpu, withBoth, withCuda } from "./gpu.js";

onGpu("order", () => {
  test("a pending read is not changed by what is launched, written or disposed after it", () =>
    withCuda({}, async (gpu) => {
      for (const n of [1000, 8 * MB, 100 * MB]) {
        const t = bytes(gpu, n);
        fill(t, 1);
        const first = t.data();
        fill(t, 2);
        const second = t.data();
        t.copyFrom(new Uint8Array(n).fill(3));
        const third = t.data();
        t.dispose();
        using reuse = bytes(gpu, n);
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

  test("memory that is disposed and taken again while kernels run stays apart", () =>
    withBoth(async (gpu, cpu) => {
      const values = [0, 1, 2, 3].map((i) => normals(300_000, `apart${i}`));
      const expected = values.map((x) => {
        using A = floats(cpu, x);
        const [packed, state] = quantize4bit(A, { quantType: "nf4" });
        using y = dequantize4bit(packed, state);
        packed.dispose();
        state.dispose();
        return y.bytesSync();
      });
      const checks: Promise<void>[] = [];
      for (let i = 0; i < 400; i++) {
        using A = floats(gpu, values[i & 3]!);
        const [packed, state] = quantize4bit(A, { quantType: "nf4" });
        using y = dequantize4bit(packed, state);
        packed.dispose();
        state.dispose();
        if (i % 8 === i % 3) {
          checks.push(y.bytes().then((b) => expect(Buffer.compare(b, expected[i & 3]!), `round ${i}`).toBe(0)));
        }
      }
      expect(checks.length).toBeGreaterThan(20);
      await Promise.all(checks);
    }));

  test("a chain of a hundred thousand launches", () =>
    withCuda({}, async (gpu) => {
      using t = bytes(gpu, 64);
      for (let i = 0; i < 100_000; i++) fill(t, i);
      expect((await t.data())[0]).toBe(99_999 & 255);
    }));

  test("random writes, fills, copies, reads and disposals give the bytes that a plain array has", () =>
    withCuda({}, async (gpu) => {
      const next = random("soak");
      const size = (): number => [1, 100, 5000, 70_000, 600_000, 5_000_000][next() % 6]! + (next() % 7);
      const slots = Array.from({ length: 6 }, () => make(size()));
      const reads: Promise<void>[] = [];
      function make(n: number): { t: Tensor<"u8">; mirror: Uint8Array } {
        const t = bytes(gpu, n);
        fill(t, 0);
        return { t, mirror: new Uint8Array(n) };
      }
      for (let step = 0; step < 1500; step++) {
        const slot = slots[next() % slots.length]!;
        const other = slots[next() % slots.length]!;
        const { t, mirror } = slot;
        const kind = next() % 6;
        const begin = next() % mirror.length;
        const length = 1 + (next() % (mirror.length - begin));
        if (kind === 0) {
          const value = next() & 255;
          using view = t.slice(begin, begin + length);
          fill(view, value);
          mirror.fill(value, begin, begin + length);
        } else if (kind === 1) {
          const data = new Uint8Array(length).fill(next() & 255);
          data[0] = step & 255;
          gpu.write(t.storage, begin, data);
          mirror.set(data, begin);
          data.fill(0xee);
        } else if (kind === 2 && other !== slot) {
          const n = Math.min(length, other.mirror.length);
          gpu.launch("copy", { src: other.t, dst: { storage: t.storage, byteOffset: begin }, bytes: n });
          mirror.set(other.mirror.subarray(0, n), begin);
        } else if (kind === 3) {
          t.dispose();
          Object.assign(slot, make(size()));
        } else if (kind === 4) {
          const want = Buffer.from(mirror.subarray(begin, begin + length));
          const read = gpu.read(t.storage, begin, length);
          reads.push(read.then((got) => expect(Buffer.compare(got, want), `step ${step}`).toBe(0)));
          if (reads.length > 40) await Promise.all(reads.splice(0));
        } else {
          expect(Buffer.compare(gpu.readSync(t.storage, begin, length), mirror.subarray(begin, begin + length))).toBe(
            0,
          );
        }
      }
      await Promise.all(reads);
      for (const { t } of slots) t.dispose();
    }));
});
