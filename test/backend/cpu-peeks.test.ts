/** Peeks of the cpu backend. */
import { describe, expect, test } from "vitest";
import { BackendError, DisposedError, NonFiniteError } from "#halfbyte/core/errors.js";
import { Tensor } from "#halfbyte/core/tensor.js";
import { quantize4bit } from "#halfbyte/ops/fourbit.js";
import { withBackend } from "../helpers/backends.js";

function fill(t: Tensor, value: number): void {
  t.backend.launch("fill", { dst: t, bytes: t.byteLength, value: Math.imul(value & 255, 0x01010101) >>> 0 });
}

describe("peeks", () => {
  test("give the bytes as they were, before and after the workers are up", () =>
    withBackend({}, async (backend) => {
      const t = Tensor.allocate(backend, "u8", [1 << 20]);
      const look = () =>
        [1, 2, 3].map((value) => {
          fill(t, value);
          return backend.peek(t.storage, 1000, 16);
        });
      // No worker has started yet: this thread does the work, up to what is waited for.
      const first = look();
      expect(first[1]!.wait()).toEqual(new Uint8Array(16).fill(2));
      expect(first[0]!.poll()).toEqual(new Uint8Array(16).fill(1));
      await backend.synchronize();
      expect(first[2]!.poll()?.[3]).toBe(3);
      const second = look();
      fill(t, 9);
      t.dispose();
      expect(second[2]!.wait()).toEqual(new Uint8Array(16).fill(3));
      second[0]!.drop();
      expect(second[1]!.poll()?.[0]).toBe(2);
      expect(second[1]!.poll()?.[0]).toBe(2);
    }));

  test("arrive without the event loop", () =>
    withBackend({}, async (backend) => {
      const t = Tensor.allocate(backend, "u8", [100]);
      fill(t, 1);
      await t.data();
      fill(t, 2);
      const peek = backend.peek(t.storage, 0, 4);
      const until = performance.now() + 10_000;
      while (peek.poll() === undefined && performance.now() < until);
      expect(peek.poll()).toEqual(new Uint8Array(4).fill(2));
      t.dispose();
    }));

  test("leave faults to reads, and their memory is given back", () =>
    withBackend({}, async (backend) => {
      const x = Tensor.allocate(backend, "f32", [64]).copyFrom(new Float32Array(64).fill(Number.NaN));
      const before = backend.memory().reservedBytes;
      const [q, state] = quantize4bit(x);
      for (let i = 0; i < 100; i++) {
        const peek = backend.peek(x.storage, 0, 64);
        if (i % 2) peek.wait();
        else peek.drop();
      }
      await expect(q.data()).rejects.toThrow(NonFiniteError);
      expect(backend.memory().reservedBytes).toBe(before);
      for (const t of [x, q, ...state.tensors()]) (t as Tensor).dispose();
    }));

  test("fail with the stream, and end with the backend", () =>
    withBackend({}, async (backend) => {
      const t = Tensor.allocate(backend, "u8", [64]);
      const outside = { storage: { bytes: 64, arena: 0, offset: 0xfff00000 }, byteOffset: 0 };
      backend.launch("fill", { dst: outside, bytes: 64, value: 0 });
      const peek = backend.peek(t.storage, 0, 8);
      expect(() => peek.wait()).toThrow(BackendError);
      expect(() => peek.poll()).toThrow(BackendError);
      peek.drop();
      await backend.restart();
      fill(t, 4);
      expect(backend.peek(t.storage, 0, 8).wait()).toEqual(new Uint8Array(8).fill(4));
      const left = backend.peek(t.storage, 0, 8);
      t.dispose();
      await backend.close();
      left.drop();
      expect(() => backend.peek(t.storage, 0, 8)).toThrow(DisposedError);
    }));
});
