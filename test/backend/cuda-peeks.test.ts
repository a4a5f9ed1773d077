/** Peeks of the cuda backend over the fake driver. */
import { describe, expect, test } from "vitest";
import type { Peek } from "#halfbyte/core/backend.js";
import { ArgumentError, BackendError, DisposedError } from "#halfbyte/core/errors.js";
import { at, fill, HERE, refusing, withCuda } from "../helpers/fake-backend.js";

describe.runIf(HERE)("peeks", () => {
  test("give the bytes as they were, in the stream's order", () =>
    withCuda({}, async (backend) => {
      const t = backend.allocate(1000);
      const peeks = [1, 2, 3].map((value) => {
        fill(backend, t, value);
        return backend.peek(t, 100, 16);
      });
      fill(backend, t, 9);
      expect(peeks[1]!.wait()).toEqual(new Uint8Array(16).fill(2));
      await backend.synchronize();
      expect(peeks.map((peek) => peek.poll()?.[15])).toEqual([1, 2, 3]);
      for (const peek of peeks) peek.drop();
      expect(peeks[2]!.poll()?.[0]).toBe(3);
      backend.release(t);
    }));

  test("slots and events come back: of those taken, dropped and left alone", () =>
    withCuda({}, async (backend) => {
      const t = backend.allocate(64);
      fill(backend, t, 5);
      backend.peek(t, 0, 64).wait();
      const { reservedBytes } = backend.memory();
      for (let i = 0; i < 500; i++) {
        const peek = backend.peek(t, 0, 64);
        if (i % 2) peek.drop();
        else peek.wait();
      }
      expect(backend.memory().reservedBytes).toBe(reservedBytes);
      const left = backend.peek(t, 0, 8);
      const dropped = backend.peek(t, 0, 8);
      dropped.drop();
      expect(() => dropped.wait()).toThrow("dropped");
      backend.release(t);
      await backend.close();
      expect(left.poll()).toBeUndefined();
      expect(() => backend.peek(t, 0, 8)).toThrow(DisposedError);
    }));

  test("a refused copy gives its slot back", () =>
    withCuda({}, async (backend) => {
      const t = backend.allocate(64);
      await refusing("copyToHost", 1, () => expect(() => backend.peek(t, 0, 8)).toThrow());
      await refusing("eventRecord", 1, () => expect(() => backend.peek(t, 0, 8)).toThrow());
      fill(backend, t, 7);
      expect(backend.peek(t, 8, 8).wait()).toEqual(new Uint8Array(8).fill(7));
      backend.release(t);
    }));

  test("1 to 64 bytes", () =>
    withCuda({}, async (backend) => {
      const t = backend.allocate(100);
      fill(backend, t, 3);
      for (const bytes of [65, 100, 0, -1, 1.5, Number.NaN]) {
        expect(() => backend.peek(t, 0, bytes)).toThrow(ArgumentError);
      }
      expect(() => backend.peek(t, 0, 65)).toThrow("[peek] bytes: expected an integer from 1 to 64, received 65");
      expect(backend.peek(t, 36, 64).wait()).toEqual(new Uint8Array(64).fill(3));
      expect(backend.peek(t, 99, 1).wait()).toEqual(Uint8Array.of(3));
      backend.release(t);
    }));

  test("of before a restart: what had not been taken is given up, and its slot comes back", () =>
    withCuda({}, async (backend) => {
      const t = backend.allocate(64);
      fill(backend, t, 1);
      const [taken, polled, waited, dropped] = [1, 2, 3, 4].map(() => backend.peek(t, 0, 8)) as [
        Peek,
        Peek,
        Peek,
        Peek,
      ];
      taken.wait();
      const { reservedBytes } = backend.memory();
      await backend.restart();
      for (let i = 0; i < 2; i++) {
        expect(() => polled.poll()).toThrow(BackendError);
        expect(() => waited.wait()).toThrow("the backend was restarted");
      }
      dropped.drop();
      expect(taken.poll()).toEqual(new Uint8Array(8).fill(1));
      fill(backend, t, 2);
      // As many as an allocation of slots holds.
      const peeks = Array.from({ length: 64 }, () => backend.peek(t, 0, 8));
      expect(peeks.every((peek) => peek.wait()[7] === 2)).toBe(true);
      expect(backend.memory().reservedBytes).toBe(reservedBytes);
      backend.release(t);
    }));

  test("a launch settles the reads of what it writes by way of addresses", () =>
    withCuda({}, async (backend) => {
      // More than there are slots: the rest of the read is pinned.
      const bytes = 80 << 20;
      const t = backend.allocate(bytes);
      const other = backend.allocate(64);
      fill(backend, t, 1);
      const read = backend.read(t, 0, bytes);
      const operands = { dst: at(other), bytes: 64, value: 0 };
      backend.launch("fill", operands, undefined, { reads: [], writes: [at(t)] });
      // What the kernel would do.
      (backend as unknown as { stream: { fill(...args: number[]): void } }).stream.fill(
        backend.addressOf(at(t)),
        2,
        bytes,
      );
      const data = await read;
      expect(data.every((byte) => byte === 1)).toBe(true);
      backend.release(t);
      backend.release(other);
    }));
});
