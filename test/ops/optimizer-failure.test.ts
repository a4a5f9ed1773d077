/** Steps that fail: either nothing has moved and the step can be made again, or the stream has failed; the guard's books are right in both cases. */
import { describe, expect, test, vi } from "vitest";
import { CpuBackend } from "#halfbyte/backend/cpu/backend.js";
import { BackendError, OutOfMemoryError } from "#halfbyte/core/errors.js";
import { Tensor } from "#halfbyte/core/tensor.js";
import { Guard, MOST_UNRESOLVED } from "#halfbyte/ops/optimizer-guard.js";
import { launchStep, type StepTensors, UpdateList } from "#halfbyte/ops/optimizer-step.js";
import { withBackend } from "../helpers/backends.js";

const CONTEXT = { op: "Adam.step", operand: "grad", unit: "parameter" } as const;
const HYPER = { lr: 1e-2, beta1: 0.9, beta2: 0.999, eps: 1e-8, weightDecay: 0.01 };
const N = 5000;

/** A list with 32-bit states and one with 8-bit ones, as an optimizer steps them. */
class Run {
  step = 0;
  readonly guard: Guard;
  private readonly lists: readonly UpdateList[];
  private readonly tensors: readonly StepTensors[];
  private readonly gradients: readonly Tensor<"f32">[];

  constructor(
    readonly backend: CpuBackend,
    private readonly maxUnorm = 0,
  ) {
    const make = (value: number, n = N) =>
      Tensor.allocate(backend, "f32", [n]).copyFrom(new Float32Array(n).fill(value));
    const codes = (value: number) => Tensor.allocate(backend, "u8", [N]).copyFrom(new Uint8Array(N).fill(value));
    const blocks = Math.ceil(N / 256);
    this.lists = ([32, 8] as const).map(
      (bits) => new UpdateList(backend, { family: "adam", bits, dtype: "f32", gradDtype: "f32" }),
    );
    this.tensors = [
      { index: 0, p: make(1), g: make(0), state1: make(0), state2: make(0) },
      {
        ...{ index: 1, p: make(1), g: make(0), state1: codes(255), state2: codes(0) },
        ...{ absmax1: make(0, blocks), absmax2: make(0, blocks) },
      },
    ];
    this.gradients = [0.5, -2, Number.NaN].map((value) => make(value));
    this.guard = new Guard(backend, false, CONTEXT);
  }

  /** @param which gradient each list gets */
  advance(...which: readonly [number, number]): void {
    this.guard.settle();
    const steps = this.lists.map((list, i) => {
      const tensors = [{ ...this.tensors[i]!, g: this.gradients[which[i]!]! }];
      return { list, hyper: { ...HYPER, maxUnorm: this.maxUnorm, step: this.step + 1 }, tensors };
    });
    launchStep(steps, this.guard, CONTEXT, () => this.step--);
    this.step++;
  }

  bits(): string[] {
    const all = this.tensors.flatMap((t) => [t.p, t.state1, t.state2!, t.absmax1, t.absmax2]);
    return all.flatMap((t) => (t ? [Buffer.from(t.bytesSync()).toString("base64")] : []));
  }

  dispose(): void {
    this.guard.dispose();
    for (const list of this.lists) list.dispose();
    for (const t of this.tensors) for (const x of [t.p, t.g, t.state1, t.state2, t.absmax1, t.absmax2]) x?.dispose();
    for (const g of this.gradients) g.dispose();
  }
}

/** The states after good steps, by their number. */
async function expectedAfter(steps: number, maxUnorm = 0): Promise<string[]> {
  let bits: string[] = [];
  await withBackend({ threads: 1 }, (backend) => {
    const run = new Run(backend, maxUnorm);
    for (let i = 0; i < steps; i++) run.advance(i % 2 === 0 ? 0 : 1, 0);
    bits = run.bits();
    run.dispose();
  });
  return bits;
}

interface Inside {
  readonly arena: { allocate(...args: unknown[]): unknown };
  readonly stream: { drainSync(): void; head: number; low: number };
}
const inside = (backend: CpuBackend): Inside => backend as unknown as Inside;

/** Makes the n-th call of a method throw. */
function failing<T extends object>(target: T, method: keyof T & string, n: number, error: () => Error) {
  const original = (target as Record<string, unknown>)[method] as (...args: unknown[]) => unknown;
  const state = { calls: 0, restore: () => void Object.assign(target, { [method]: original }) };
  Object.assign(target, {
    [method](this: unknown, ...args: unknown[]) {
      if (state.calls++ === n) throw error();
      return original.apply(target, args);
    },
  });
  return state;
}

const outOfMemory = () => new OutOfMemoryError("cpu", 64, 0, 0);

describe("steps that fail", () => {
  // The device's own memory, whoever asks for it; then the backend's calls by which something may be taken.
  for (const place of ["arena", "allocate", "constant", "reservePeek", "load", "write"] as const) {
    for (const ahead of [false, true]) {
      test(`for want of memory (${place}, ${ahead ? "the stream is busy" : "idle"}) have moved nothing, and are made again`, async () => {
        const maxUnorm = 0.01;
        const expected = await expectedAfter(2, maxUnorm);
        let failures = 0;
        for (let n = 0; ; n++) {
          let reached = 0;
          await withBackend({ threads: 1, guards: false }, (backend) => {
            const run = new Run(backend, maxUnorm);
            const before = run.bits();
            const busy = Tensor.allocate(backend, "u8", [1 << 22]);
            const target = place === "arena" ? inside(backend).arena : backend;
            const method = place === "arena" ? "allocate" : place;
            const spy = failing(target, method as never, n, outOfMemory);
            let error: unknown;
            if (ahead) backend.launch("fill", { dst: busy, bytes: busy.byteLength, value: 0 });
            try {
              run.advance(0, 0);
            } catch (thrown) {
              error = thrown;
            }
            reached = spy.calls;
            spy.restore();
            if (error) {
              failures++;
              expect(error, `${place} ${n}`).toBeInstanceOf(OutOfMemoryError);
              expect(run.bits(), `${place} ${n}`).toEqual(before);
              expect([run.step, run.guard.unresolved]).toEqual([0, 0]);
              run.advance(0, 0);
            }
            run.advance(1, 0);
            expect(run.bits(), `${place} ${n}: made again`).toEqual(expected);
            run.guard.resolve();
            expect([run.step, run.guard.known]).toEqual([2, 0]);
            busy.dispose();
            run.dispose();
          });
          if (reached <= n) break;
        }
        expect(failures).toBeGreaterThan(0);
      });
    }
  }

  test("in a launch, with a gradient that is not finite, are counted nowhere", async () => {
    const expected = await expectedAfter(2);
    const counts: number[] = [];
    for (const method of ["launch", "peek"] as const) {
      let n = 0;
      for (let failed = true; failed; n++) {
        await withBackend({ threads: 1 }, async (backend) => {
          const run = new Run(backend);
          run.advance(0, 0);
          const before = run.bits();
          const spy = failing(backend, method, n, () => new BackendError("cpu", "a device that fails"));
          failed = false;
          try {
            // The first list's gradient: a step that ends between the checks has found it.
            run.advance(2, 0);
          } catch (error) {
            expect(error).toBeInstanceOf(BackendError);
            failed = true;
          }
          spy.restore();
          expect(run.bits(), `${method} ${n}`).toEqual(before);
          run.guard.resolve();
          expect([run.step, run.guard.known], `${method} ${n}`).toEqual(failed ? [1, 0] : [1, 1]);
          expect(await run.guard.skipped()).toBe(failed ? 0 : 1);
          run.advance(1, 0);
          run.advance(2, 1);
          expect(run.bits(), `${method} ${n}: the next step`).toEqual(expected);
          run.guard.resolve();
          expect([run.step, run.guard.known], `${method} ${n}`).toEqual(failed ? [2, 1] : [2, 2]);
          run.dispose();
        });
      }
      counts.push(n - 1);
    }
    // Two checks, a verdict and two updates at least; one peek.
    expect(counts[0]).toBeGreaterThanOrEqual(5);
    expect(counts[1]).toBe(1);
  });

  test("with outcomes under way before them leave those alone", () =>
    withBackend({}, async (backend) => {
      const run = new Run(backend);
      for (const bad of [false, true, false, true]) run.advance(bad ? 2 : 0, 0);
      const spy = failing(backend, "peek", 0, () => new BackendError("cpu", "a device that fails"));
      expect(() => run.advance(2, 0)).toThrow(BackendError);
      spy.restore();
      run.advance(1, 0);
      run.guard.resolve();
      expect([run.step, run.guard.known, await run.guard.skipped()]).toEqual([3, 2, 2]);
      run.dispose();
    }));
});

describe("a restart", () => {
  /** Work that takes the stream a while. */
  function hold(backend: CpuBackend): Tensor {
    const busy = Tensor.allocate(backend, "u8", [1 << 28]);
    for (let i = 0; i < 20; i++) backend.launch("fill", { dst: busy, bytes: busy.byteLength, value: 0 });
    return busy;
  }

  test("loses the writes of a list, and the list knows", () =>
    withBackend({ guards: false }, async (backend) => {
      const make = (value: number) => Tensor.allocate(backend, "f32", [N]).copyFrom(new Float32Array(N).fill(value));
      const kind = { family: "lion", bits: 32, dtype: "f32", gradDtype: "f32" } as const;
      const list = new UpdateList(backend, kind);
      const hyper = { ...HYPER, lr: 1, weightDecay: 0, step: 1 };
      const parts = [0, 1].map((index) => ({ index, p: make(0), state1: make(0) }));
      const [first, second] = [0, 1].map(() => [make(1), make(1)]);
      const step = (gradients: readonly Tensor<"f32">[]) =>
        launchStep([{ list, tensors: parts.map((t, i) => ({ ...t, g: gradients[i]! })), hyper }], null, CONTEXT);
      step(first!);
      await backend.synchronize();
      const busy = hold(backend);
      step(second!);
      const { head, low } = inside(backend).stream;
      expect(head - low, "the writes are on their way").toBeGreaterThan(3);
      const { epoch } = backend;
      await backend.restart();
      expect(backend.epoch).toBe(epoch + 1);
      for (const { p, state1 } of parts) for (const t of [p, state1]) t.copyFrom(new Float32Array(N));
      // What the device's list names still.
      for (const g of first!) g.copyFrom(new Float32Array(N).fill(-1));
      step(second!);
      for (const { p } of parts) expect((p as Tensor<"f32">).dataSync()[0]).toBe(-1);
      for (const t of [busy, ...first!, ...second!, ...parts.flatMap(({ p, state1 }) => [p, state1])]) t.dispose();
      list.dispose();
    }));

  test("in the middle of a step leaves nothing found", () =>
    withBackend({ guards: false }, async (backend) => {
      const run = new Run(backend);
      run.advance(0, 0);
      await backend.synchronize();
      const { launch } = backend;
      let busy: Tensor | undefined;
      backend.launch = function (this: CpuBackend, kernel: string, ...args: unknown[]) {
        if (kernel === "gradientVerdict") {
          inside(backend).stream.drainSync();
          backend.launch = launch;
          busy = hold(backend);
        }
        return (launch as (...args: unknown[]) => void).call(backend, kernel, ...args);
      } as typeof launch;
      run.advance(2, 0);
      await backend.restart();
      const before = run.bits();
      run.step = 1;
      run.advance(1, 0);
      run.guard.resolve();
      expect([run.step, run.guard.known]).toEqual([2, 0]);
      expect(run.bits()).not.toEqual(before);
      expect(run.bits()).toEqual(await expectedAfter(2));
      busy!.dispose();
      run.dispose();
    }));

  test("does not make outcomes of what was under way", () =>
    withBackend({ guards: false }, async (backend) => {
      const run = new Run(backend);
      run.advance(0, 0);
      const busy = hold(backend);
      for (let i = 0; i < 5; i++) run.advance(2, 0);
      await backend.restart();
      const step = run.step;
      run.guard.settle();
      expect([run.guard.unresolved, run.step]).toEqual([0, step]);
      expect(await run.guard.skipped()).toBe(run.guard.known);
      busy.dispose();
      run.dispose();
    }));

  test("loses constants on their way, and they are written again", () =>
    withBackend({ guards: false }, async (backend) => {
      const key = {};
      const busy = hold(backend);
      // Their memory is still in use by the fills.
      const constant = new Uint8Array(300_000).fill(7);
      const taken = Tensor.allocate(backend, "u8", [constant.length]);
      backend.launch("fill", { dst: taken, bytes: taken.byteLength, value: 0 });
      taken.dispose();
      const spy = vi.spyOn(inside(backend).stream, "drainSync").mockImplementation(() => {});
      const storage = backend.constant(key, () => constant);
      spy.mockRestore();
      await backend.restart();
      expect(backend.constant(key, () => constant)).toBe(storage);
      expect(Buffer.compare(backend.readSync(storage, 0, constant.length), constant)).toBe(0);
      busy.dispose();
    }));
});

describe("a host that is ahead", () => {
  test("writes on without waiting for the stream", () =>
    withBackend({ guards: false }, async (backend) => {
      const run = new Run(backend);
      run.advance(0, 0);
      await backend.synchronize();
      const busy = Tensor.allocate(backend, "u8", [1 << 28]);
      const { stream } = inside(backend);
      const drains = vi.spyOn(stream, "drainSync");
      for (let i = 0; i < 20; i++) backend.launch("fill", { dst: busy, bytes: busy.byteLength, value: 0 });
      const before = stream.head;
      // Other gradients at every step: the list and the scalars are written while the step before is on its way.
      for (let i = 0; i < MOST_UNRESOLVED - 1; i++) run.advance(i % 2 === 0 ? 1 : 0, 0);
      expect(drains).not.toHaveBeenCalled();
      expect(stream.low).toBeLessThan(before);
      drains.mockRestore();
      expect(run.bits()).toEqual(await expectedAfter(MOST_UNRESOLVED));
      busy.dispose();
      run.dispose();
    }));

  test("many small writes to what is in use arrive in order, whether there is room for them or not", () =>
    withBackend({ guards: false }, async (backend) => {
      const bytes = 40_000;
      const targets = Array.from({ length: 8 }, () => Tensor.allocate(backend, "u8", [bytes]));
      const sum = targets.map(() => 0);
      for (let round = 0; round < 200; round++) {
        const i = (round * 5) % targets.length;
        const length = 1 + ((round * 7919) % bytes);
        backend.launch("fill", { dst: targets[i]!, bytes, value: 0 });
        backend.write(targets[i]!.storage, bytes - length, new Uint8Array(length).fill(round));
        sum[i] = length * (round & 255);
      }
      for (const [i, t] of targets.entries()) {
        expect(
          t.bytesSync().reduce((a, b) => a + b, 0),
          `target ${i}`,
        ).toBe(sum[i]);
        t.dispose();
      }
    }));
});

test("an 8-bit optimizer whose code tables do not fit moves nothing", async () => {
  const { Adam8bit } = await import("#halfbyte/index.js");
  let refused = 0;
  for (let spare = 0; spare < 60_000; spare += 2048) {
    const backend = new CpuBackend({ threads: 1, memoryLimit: 8 << 20 });
    const make = (n: number) => Tensor.allocate(backend, "f32", [n]).copyFrom(new Float32Array(n).fill(1));
    const params = [make(100), make(5000)];
    for (const p of params) p.grad = make(p.size);
    const optimizer = new Adam8bit(params, { lr: 0.1 });
    const filler: Tensor[] = [];
    for (let size = 1 << 22; size >= 256; size >>= 1) {
      for (;;) {
        try {
          filler.push(Tensor.allocate(backend, "u8", [size]));
        } catch {
          break;
        }
      }
    }
    for (let freed = 0; freed < spare && filler.length > 0; ) {
      const t = filler.pop()!;
      freed += t.byteLength;
      t.dispose();
    }
    await backend.synchronize();
    let error: unknown;
    try {
      optimizer.step();
    } catch (thrown) {
      error = thrown;
    }
    const values = params.map((p) => p.dataSync()[0]!);
    await backend.close();
    if (!error) {
      expect(values.every((x) => x < 1)).toBe(true);
      break;
    }
    refused++;
    expect(error).toBeInstanceOf(OutOfMemoryError);
    expect(values, `${spare} bytes to spare`).toEqual([1, 1]);
  }
  expect(refused).toBeGreaterThan(0);
});
