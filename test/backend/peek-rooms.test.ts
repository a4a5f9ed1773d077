/** Peeks whose memory was taken ahead, and what restarts count. */
import { describe, expect, test } from "vitest";
import type { Backend } from "#halfbyte/core/backend.js";
import { ArgumentError, BackendError, OutOfMemoryError } from "#halfbyte/core/errors.js";
import { withBackend } from "../helpers/backends.js";
import { at, HERE, refusing, withCuda } from "../helpers/fake-backend.js";

async function rooms(backend: Backend): Promise<void> {
  const t = backend.allocate(64);
  backend.launch("fill", { dst: at(t), bytes: 64, value: 0x05050505 });
  backend.reservePeek().drop();
  const { reservedBytes } = backend.memory();
  for (let i = 0; i < 200; i++) {
    const [used, other] = [backend.reservePeek(), backend.reservePeek()];
    expect(backend.peek(t, 60, 4, used).wait()).toEqual(new Uint8Array(4).fill(5));
    other.drop();
    other.drop();
    for (const gone of [used, other]) expect(() => backend.peek(t, 0, 4, gone)).toThrow(BackendError);
  }
  for (const bytes of [0, 65, 1.5]) {
    expect(() => backend.peek(t, 0, bytes, backend.reservePeek())).toThrow(ArgumentError);
  }
  expect(backend.memory().reservedBytes).toBe(reservedBytes);
  expect(backend.epoch).toBe(0);
  const left = backend.reservePeek();
  const [before, taken] = [backend.peek(t, 0, 8), backend.peek(t, 0, 8)];
  taken.wait();
  await backend.restart();
  for (const look of [() => before.poll(), () => before.wait()]) expect(look).toThrow("the backend was restarted");
  before.drop();
  expect(taken.poll()).toEqual(taken.wait());
  expect(backend.epoch).toBe(1);
  expect(backend.peek(t, 0, 64, left).wait().length).toBe(64);
  backend.release(t);
  const last = backend.reservePeek();
  await backend.close();
  last.drop();
}

test("rooms of peeks are used once and come back: cpu", () => withBackend({}, rooms));

describe.runIf(HERE)("cuda", () => {
  test("rooms of peeks are used once and come back", () => withCuda({}, rooms));

  test("a peek with a room needs no memory", () =>
    withCuda({}, async (backend) => {
      const t = backend.allocate(64);
      const room = backend.reservePeek();
      await refusing("hostAllocate", 2, () =>
        refusing("eventCreate", 2, () => {
          expect(backend.peek(t, 0, 8, room).wait().length).toBe(8);
        }),
      );
      await refusing("copyToHost", 1, () =>
        expect(() => backend.peek(t, 0, 8, backend.reservePeek())).toThrow("copyToHost"),
      );
      backend.release(t);
    }));

  test("without memory there is no room", () =>
    withCuda({}, async (backend) => {
      await refusing("hostAllocate", 2, () => expect(() => backend.reservePeek()).toThrow(OutOfMemoryError));
      backend.reservePeek().drop();
    }));

  test("a kernel that was loaded is launched without loading anything", () =>
    withCuda({}, async (backend) => {
      const t = backend.allocate(64);
      const operands = { guard: at(t), allowNonFinite: 0 };
      await refusing("moduleLoad", 2, () => expect(() => backend.load("gradientVerdict", operands)).toThrow());
      backend.load("gradientVerdict", operands);
      await refusing("moduleLoad", 2, () =>
        refusing("moduleFunction", 2, () =>
          refusing("memoryAllocate", 2, () => backend.launch("gradientVerdict", operands)),
        ),
      );
      backend.release(t);
    }));
});
