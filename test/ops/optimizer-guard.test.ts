/** Guards: steps with non-finite gradients write nothing and do not count, without the host ever waiting for them. */
import { execFileSync } from "node:child_process";
import { describe, expect, test } from "vitest";
import type { CpuBackend } from "#halfbyte/backend/cpu/backend.js";
import { NonFiniteError } from "#halfbyte/core/errors.js";
import { Tensor } from "#halfbyte/core/tensor.js";
import { Guard, MOST_UNRESOLVED } from "#halfbyte/ops/optimizer-guard.js";
import type { StepHyper } from "#halfbyte/ops/optimizer-scalars.js";
import { launchStep, type StepTensors, UpdateList } from "#halfbyte/ops/optimizer-step.js";
import { withBackend } from "../helpers/backends.js";
import { random } from "../helpers/random.js";

const CONTEXT = { op: "Adam.step", operand: "grad", unit: "parameter" } as const;
const HYPER = { lr: 1e-2, beta1: 0.9, beta2: 0.999, eps: 1e-8, weightDecay: 0.01 };
const N = 5000;

/** One Adam over a few tensors, as an optimizer runs it. */
class Run {
  step = 0;
  readonly guard: Guard | null;
  readonly lists: UpdateList[];
  readonly tensors: StepTensors[][];
  private readonly gradients: Tensor<"f32">[];

  constructor(
    readonly backend: CpuBackend,
    mode: "report" | "skip" | "none",
    lists = 1,
  ) {
    this.guard = mode === "none" ? null : new Guard(backend, mode === "report", CONTEXT);
    const make = (value: number) => Tensor.allocate(backend, "f32", [N]).copyFrom(new Float32Array(N).fill(value));
    const kind = { family: "adam", bits: 32, dtype: "f32", gradDtype: "f32" } as const;
    this.lists = Array.from({ length: lists }, () => new UpdateList(backend, kind));
    this.tensors = this.lists.map((_, i) => [{ index: i, p: make(1), g: make(0), state1: make(0), state2: make(0) }]);
    // Made beforehand: a write to a tensor in use waits for room, and would give the stream time.
    this.gradients = [0.5, -2, 1, Number.NaN].map(make);
  }

  /** @param bad which list gets a gradient with NaN */
  advance(i: number, bad = -1): void {
    this.guard?.settle();
    const step = ++this.step;
    const hyper: StepHyper = { ...HYPER, step };
    const steps = this.lists.map((list, k) => {
      const g = this.gradients[k === bad ? 3 : i % 3]!;
      return { list, hyper, tensors: this.tensors[k]!.map((t) => ({ ...t, g })) };
    });
    launchStep(steps, this.guard, CONTEXT, () => this.step--);
  }

  async states(): Promise<Float32Array[]> {
    const all = this.tensors.flat().flatMap(({ p, state1, state2 }) => [p, state1, state2!]);
    return Promise.all(all.map((t) => (t as Tensor<"f32">).data()));
  }

  dispose(): void {
    this.guard?.dispose();
    for (const list of this.lists) list.dispose();
    for (const t of this.tensors.flat()) for (const x of [t.p, t.g, t.state1, t.state2!]) x.dispose();
    for (const g of this.gradients) g.dispose();
  }
}

/** The same steps without those that are bad. */
async function without(backend: CpuBackend, total: number, isBad: (i: number) => boolean): Promise<Float32Array[]> {
  const run = new Run(backend, "none");
  for (let i = 0; i < total; i++) if (!isBad(i)) run.advance(i);
  const states = await run.states();
  run.dispose();
  return states;
}

describe("skipped steps", () => {
  const total = 1000;
  const next = random(3);
  const bad = new Set(
    Array.from({ length: total }, (_, i) => i).filter((i) => next() < 0.15 * 2 ** 32 || (i > 500 && i < 530)),
  );

  test("a synchronous loop is what it would be without them", () =>
    withBackend({}, async (backend) => {
      const run = new Run(backend, "skip");
      let most = 0;
      for (let i = 0; i < total; i++) {
        run.advance(i, bad.has(i) ? 0 : -1);
        most = Math.max(most, run.guard!.unresolved);
      }
      expect(most).toBeLessThanOrEqual(MOST_UNRESOLVED);
      expect(most).toBeGreaterThan(1);
      expect(await run.states()).toEqual(await without(backend, total, (i) => bad.has(i)));
      run.guard!.settle();
      expect([run.guard!.unresolved, run.guard!.known, run.step]).toEqual([0, bad.size, total - bad.size]);
      expect(await run.guard!.skipped()).toBe(bad.size);
      run.dispose();
    }));

  test("and so is one that waits now and then", () =>
    withBackend({ threads: 1 }, async (backend) => {
      const run = new Run(backend, "skip");
      for (let i = 0; i < 300; i++) {
        run.advance(i, bad.has(i) ? 0 : -1);
        if (i % 7 === 0) await backend.synchronize();
        if (i % 11 === 0) await new Promise((resolve) => setImmediate(resolve));
        if (i % 50 === 0) {
          run.guard!.resolve();
          expect(run.guard!.unresolved).toBe(0);
        }
      }
      expect(await run.states()).toEqual(await without(backend, 300, (i) => bad.has(i)));
      run.dispose();
    }));

  test("one gradient keeps all lists as they are", () =>
    withBackend({}, async (backend) => {
      const run = new Run(backend, "skip", 3);
      run.advance(0);
      const before = await run.states();
      for (const k of [0, 1, 2]) run.advance(1, k);
      expect(await run.states()).toEqual(before);
      run.guard!.resolve();
      expect(run.step).toBe(1);
      run.dispose();
    }));
});

describe("reported steps", () => {
  test("the next read rejects once, names the parameter, and the step is as if it had not been", () =>
    withBackend({}, async (backend) => {
      const run = new Run(backend, "report", 3);
      run.advance(0);
      run.advance(1, 2);
      // Polling for outcomes takes nobody's error.
      run.guard!.resolve();
      expect(run.step).toBe(1);
      run.advance(2);
      const error: unknown = await run.states().catch((e: unknown) => e);
      expect(error).toBeInstanceOf(NonFiniteError);
      expect(error).toMatchObject({ op: "Adam.step", operand: "grad", unit: "parameter", index: 2 });
      await run.states();
      const good = new Run(backend, "none", 3);
      good.advance(0);
      good.advance(2);
      expect(await run.states()).toEqual(await good.states());
      good.dispose();
      run.dispose();
    }));
});

describe("guards", () => {
  test("are given back with outcomes under way, and go on after a restart", () =>
    withBackend({}, async (backend) => {
      const run = new Run(backend, "skip");
      for (let i = 0; i < 5; i++) run.advance(i);
      await backend.restart();
      for (let i = 0; i < 5; i++) run.advance(i, i === 2 ? 0 : -1);
      run.guard!.resolve();
      expect(run.guard!.known).toBe(1);
      for (let i = 0; i < 5; i++) run.advance(i);
      run.dispose();
      await backend.synchronize();
    }));

  test("outcomes that nobody waits for keep no process alive", () => {
    const script = `
      import { CpuBackend } from "#halfbyte/backend/cpu/backend.js";
      import { Guard } from "#halfbyte/ops/optimizer-guard.js";
      import { Tensor } from "#halfbyte/core/tensor.js";
      const backend = new CpuBackend({ threads: 2 });
      const guard = new Guard(backend, true, { op: "step", operand: "grad", unit: "parameter" });
      const t = Tensor.allocate(backend, "u8", [1 << 28]);
      for (let i = 0; i < 10; i++) backend.launch("fill", { dst: t, bytes: t.byteLength, value: 0 });
      for (let i = 0; i < 3; i++) guard.attempt(() => {});
      process.on("exit", () => console.log(guard.unresolved));`;
    const out = execFileSync(process.execPath, ["--input-type=module", "-e", script], { timeout: 20_000 });
    expect(out.toString().trim()).toBe("3");
  });
});
