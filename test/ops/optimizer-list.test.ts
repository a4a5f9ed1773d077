/** Lists of tensors in device memory: what is written when, and that a step on many tensors is that on each. */
import { describe, expect, test } from "vitest";
import type { CpuBackend } from "#halfbyte/backend/cpu/backend.js";
import { type DType, FLOAT_DTYPES, type FloatDType } from "#halfbyte/core/dtype.js";
import { DisposedError } from "#halfbyte/core/errors.js";
import {
  LIST_RECORD,
  LIST_RECORD_BYTES,
  OPTIMIZER_FAMILIES,
  type OptimizerFamily,
  STEP_SCALARS,
  type StepScalar,
} from "#halfbyte/core/optimizers.js";
import { Tensor } from "#halfbyte/core/tensor.js";
import { type ListTensors, TensorList } from "#halfbyte/ops/optimizer-list.js";
import { roundTo, type StateBits, type StepHyper, stepScalars } from "#halfbyte/ops/optimizer-scalars.js";
import { launchStep, type StepTensors, UpdateList } from "#halfbyte/ops/optimizer-step.js";
import { withBackend } from "../helpers/backends.js";
import { makeList } from "../helpers/optimizer-list.js";
import { normals, random } from "../helpers/random.js";
import { round } from "../helpers/scalar.js";
import { stepRow } from "../helpers/scalar-optimizer.js";

const SIZES = [1, 255, 0, 4096, 4097, 100_003, 0, 256, 8192];
const CONTEXT = { op: "test", operand: "grad", unit: "parameter" } as const;

function uniform(seed: number): () => number {
  const next = random(seed);
  return () => next() / 2 ** 32;
}

/** Counts the bytes of every write. */
function spyWrites(backend: CpuBackend): number[] {
  const writes: number[] = [];
  const { write } = backend;
  backend.write = function (dst, offset, src) {
    writes.push(src.byteLength);
    write.call(this, dst, offset, src);
  };
  return writes;
}

/** Makes tensors that are disposed in the end, and entries of lists. */
function maker(backend: CpuBackend) {
  const made: Tensor[] = [];
  const make = <D extends DType>(dtype: D, n: number): Tensor<D> => {
    const t = Tensor.allocate(backend, dtype, [n]);
    made.push(t);
    return t;
  };
  const entry = (n: number, index: number): StepTensors => ({
    index,
    p: make("f32", n),
    g: make("f32", n),
    state1: make("f32", n),
    state2: index % 3 === 0 ? undefined : make("f32", n),
  });
  const dispose = () => {
    for (const t of made) t.dispose();
  };
  return { make, entry, dispose };
}

/** The device has what a list made by hand has. */
function expectList(list: TensorList, tensors: readonly ListTensors[]): void {
  const { backend } = list;
  const byHand = makeList(
    backend,
    tensors.map((t) => ({ ...t, n: t.g.size })),
  );
  expect([list.records, list.count]).toEqual([byHand.records, byHand.count]);
  const bytes = (at: typeof list.list, length: number) => backend.readSync(at.storage, at.byteOffset, length);
  expect(bytes(list.list, list.records * LIST_RECORD_BYTES)).toEqual(byHand.list.bytesSync());
  expect(bytes(list.chunks, list.count * 4)).toEqual(byHand.chunks.bytesSync());
  byHand.list.dispose();
  byHand.chunks.dispose();
}

const withList = (body: (list: TensorList, parts: ReturnType<typeof maker>, writes: number[]) => void) =>
  withBackend({}, (backend) => {
    const parts = maker(backend);
    const list = new TensorList(backend);
    try {
      body(list, parts, spyWrites(backend));
    } finally {
      list.dispose();
      parts.dispose();
    }
  });

describe("lists", () => {
  test("records and chunks are those of a list by hand", () =>
    withList((list, { entry }) => {
      for (const sizes of [[5], [0], [100_003], SIZES]) {
        const tensors = sizes.map((n, i) => entry(n, 7 * i));
        list.update(tensors);
        expectList(list, tensors);
      }
    }));

  test("what has not changed is not written", () =>
    withList((list, { make, entry }, writes) => {
      const tensors = Array.from({ length: 100 }, (_, i) => entry(i === 3 ? 5000 : 10 + i, i));
      list.update(tensors);
      expect(writes).toEqual([101 * 4, 100 * LIST_RECORD_BYTES]);
      writes.length = 0;
      list.update(tensors.map((t) => ({ ...t })));
      expect(writes).toEqual([]);
      const swap = (...places: number[]) => {
        for (const i of places) tensors[i] = { ...tensors[i]!, g: make("f32", tensors[i]!.g.size) };
        list.update(tensors);
        const sizes = writes.splice(0);
        expectList(list, tensors);
        writes.length = 0;
        return sizes;
      };
      expect(swap(42)).toEqual([LIST_RECORD_BYTES]);
      expect(swap(0, 99)).toEqual([LIST_RECORD_BYTES, LIST_RECORD_BYTES]);
      expect(swap(10, 13)).toEqual([4 * LIST_RECORD_BYTES]);
      expect(swap(...tensors.keys())).toEqual([100 * LIST_RECORD_BYTES]);
      // Another state or index is a change as well.
      tensors[5] = { ...tensors[5]!, index: 500 };
      tensors[6] = { ...tensors[6]!, state2: make("f32", tensors[6]!.g.size) };
      list.update(tensors);
      expect(writes.splice(0)).toEqual([2 * LIST_RECORD_BYTES]);
      expectList(list, tensors);
    }));

  test("lists grow, shrink and change sizes", () =>
    withList((list, { entry }, writes) => {
      const next = uniform(5);
      const pool = Array.from({ length: 60 }, (_, i) => entry(SIZES[i % SIZES.length]! + (i % 5), i));
      let tensors: StepTensors[] = [];
      for (let round = 0; round < 60; round++) {
        const kind = Math.floor(next() * 5);
        if (kind === 0) tensors = tensors.slice(0, Math.floor(next() * (tensors.length + 1)));
        else if (kind === 1) tensors = pool.slice(0, Math.floor(next() * pool.length));
        else if (kind === 2) tensors = tensors.filter(() => next() < 0.7);
        else if (kind === 3) tensors = [...tensors, ...pool.filter((t) => !tensors.includes(t) && next() < 0.1)];
        else tensors = [...tensors].reverse();
        list.update(tensors);
        expectList(list, tensors);
      }
      list.update(pool);
      writes.length = 0;
      // Fewer at the end: neither records nor chunks of the others change.
      list.update(pool.slice(0, 40));
      expect(writes).toEqual([]);
      expectList(list, pool.slice(0, 40));
    }));

  test("addresses beyond 32 bits", () =>
    withList((list, { entry }) => {
      const { backend } = list;
      const { addressOf } = backend;
      backend.addressOf = (address) => 2 ** 47 + 2 ** 32 - 256 + addressOf.call(backend, address);
      const tensors = [entry(4, 0), entry(9, 1), entry(3, 2)];
      list.update(tensors);
      const bytes = backend.readSync(list.list.storage, list.list.byteOffset, 3 * LIST_RECORD_BYTES);
      const view = new DataView(bytes.buffer);
      for (const [i, t] of tensors.entries()) {
        const at = (place: "p" | "g") => Number(view.getBigUint64(i * LIST_RECORD_BYTES + LIST_RECORD[place], true));
        expect([at("p"), at("g")]).toEqual([backend.addressOf(t.p), backend.addressOf(t.g)]);
      }
    }));

  test("an update that failed is made up for", () =>
    withList((list, { make, entry }) => {
      const { backend } = list;
      let tensors = Array.from({ length: 8 }, (_, i) => entry(5000 * i, i));
      list.update(tensors);
      const gone = entry(20, 3);
      gone.state1.dispose();
      expect(() => list.update([...tensors.slice(4), gone])).toThrow(DisposedError);
      list.update(tensors);
      expectList(list, tensors);
      tensors[2]!.state1.dispose();
      expect(() => list.update(tensors), "disposed since").toThrow(DisposedError);
      tensors = tensors.map((t, i) => (i === 2 ? { ...t, state1: make("f32", t.g.size) } : t));
      for (const fails of [0, 1]) {
        const { write } = backend;
        let calls = 0;
        backend.write = function (dst, offset, src) {
          if (calls++ === fails) throw new Error("no memory");
          write.call(this, dst, offset, src);
        };
        const others = [...tensors].reverse();
        expect(() => list.update(others)).toThrow("no memory");
        backend.write = write;
        list.update(tensors);
        expectList(list, tensors);
      }
    }));
});

const HYPER: StepHyper = {
  lr: 1e-3,
  beta1: 0.9,
  beta2: 0.999,
  beta3: 0.9999,
  alpha: 5,
  eps: 1e-8,
  weightDecay: 0.01,
  step: 3,
};

describe("scalars", () => {
  test("rows are those of the reference", () => {
    for (const family of OPTIMIZER_FAMILIES) {
      for (const bits of [8, 32] as const) {
        for (const dtype of FLOAT_DTYPES) {
          for (const step of [1, 2, 10, 1000, 123_456_789]) {
            for (const more of [{}, { weightDecay: 0, gnormScale: 0.25 }, { tAlpha: 100, tBeta3: 1000 }]) {
              // The reference rounds Lion's decay otherwise.
              if (family === "lion" && bits === 8) continue;
              const hyper = { ...HYPER, step, ...more };
              const row = stepScalars(family, hyper, bits, dtype);
              const expected = stepRow(family, hyper, bits, dtype);
              for (const [name, at] of Object.entries(STEP_SCALARS)) {
                const where = `${family} ${bits} ${dtype} step ${step} ${JSON.stringify(more)} ${name}`;
                expect(row[at], where).toBe(Math.fround(expected[name as StepScalar]));
              }
            }
          }
        }
      }
    }
  });

  test("8-bit Lion multiplies the sign by lr in the parameters' dtype, and decays by lr itself", () => {
    const row = (bits: StateBits, dtype: FloatDType) => stepScalars("lion", { ...HYPER, lr: 1e-4 }, bits, dtype);
    expect(row(8, "bf16")[STEP_SCALARS.step]).toBe(round("bf16", Math.fround(1e-4)));
    expect(row(8, "f16")[STEP_SCALARS.step]).toBe(round("f16", Math.fround(1e-4)));
    expect(row(32, "bf16")[STEP_SCALARS.step]).toBe(Math.fround(1e-4));
    expect(row(8, "bf16")[STEP_SCALARS.decay]).toBe(row(32, "f32")[STEP_SCALARS.decay]);
  });

  test("rounding to a dtype", () => {
    const next = uniform(9);
    const edges = [0, 65504, 65519, 65520, 2 ** -14, 2 ** -24, 2 ** -25, 1.5 * 2 ** -25, 2 ** -149, 1, 1 - 2 ** -24];
    for (const value of [...edges, ...Array.from({ length: 5000 }, () => 2 ** (next() * 60 - 40))]) {
      const x = Math.fround(value);
      for (const dtype of FLOAT_DTYPES) expect(roundTo(dtype, x), `${dtype} ${x}`).toBe(round(dtype, x));
    }
  });

  test("AdEMAMix's schedules end where they should", () => {
    const at = (step: number, name: "alpha" | "beta3") =>
      stepScalars("ademamix", { ...HYPER, tAlpha: 10, tBeta3: 10, step }, 32, "f32")[STEP_SCALARS[name]]!;
    expect([1, 5, 10, 11].map((step) => at(step, "alpha"))).toEqual([0.5, 2.5, 5, 5]);
    expect([10, 11, 1000].map((step) => at(step, "beta3"))).toEqual(Array(3).fill(Math.fround(0.9999)));
    const steps = Array.from({ length: 10 }, (_, i) => at(i + 1, "beta3"));
    expect(steps.every((b, i) => b > (steps[i - 1] ?? 0.9))).toBe(true);
    // Its half-life is linear in the step.
    const half = (beta: number) => 1 / Math.log(beta);
    expect(half(at(5, "beta3")) / (half(0.9) + half(0.9999))).toBeCloseTo(0.5, 2);
  });
});

describe("steps", () => {
  /** Tensors with contents that only the seed decides. */
  function filled(backend: CpuBackend, family: OptimizerFamily, bits: StateBits, n: number, seed: number): StepTensors {
    const rows = family === "ademamix" ? 2 : 1;
    const two = family === "adam" || family === "ademamix";
    const make = (dtype: DType, size: number, scale: number, offset: number): Tensor => {
      const t = Tensor.allocate(backend, dtype, [size]);
      const values = normals(size, seed + offset);
      if (dtype === "u8") return t.copyFrom(Uint8Array.from(values, (x) => 128 + 40 * x));
      return t.copyFrom(Float32Array.from(values, (x) => Math.abs(x) * scale));
    };
    const state = bits === 8 ? "u8" : "f32";
    const blocks = Math.ceil(n / 256);
    return {
      index: seed,
      p: make("f32", n, 1, 0) as Tensor<FloatDType>,
      g: make("f32", n, 0.1, 1) as Tensor<FloatDType>,
      state1: make(state, rows * n, 0.1, 2),
      state2: two ? make(state, n, 0.01, 3) : undefined,
      absmax1: bits === 8 ? (make("f32", rows * blocks, 0.1, 4) as Tensor<"f32">) : undefined,
      absmax2: bits === 8 && two ? (make("f32", blocks, 0.01, 5) as Tensor<"f32">) : undefined,
    };
  }
  const PLACES = ["p", "g", "state1", "state2", "absmax1", "absmax2"] as const;
  const dispose = (t: StepTensors): void => {
    for (const place of PLACES) t[place]?.dispose();
  };

  test.each(OPTIMIZER_FAMILIES)("of many tensors are those of each by itself: %s", (family) =>
    withBackend({}, async (backend) => {
      for (const bits of [32, 8] as const) {
        for (const maxUnorm of [0, 0.01]) {
          const hyper = { ...HYPER, maxUnorm };
          const make = () => SIZES.map((n, i) => filled(backend, family, bits, n, 100 * i));
          const [together, alone] = [make(), make()];
          const kind = { family, bits, dtype: "f32", gradDtype: "f32" } as const;
          const list = new UpdateList(backend, kind);
          launchStep([{ list, tensors: together, hyper }], null, CONTEXT);
          // Right after the launch, as the memory of the list is given back and taken again.
          list.dispose();
          for (const tensors of alone) {
            const single = new UpdateList(backend, kind);
            launchStep([{ list: single, tensors: [tensors], hyper }], null, CONTEXT);
            single.dispose();
          }
          for (const [i, t] of together.entries()) {
            for (const place of PLACES) {
              const where = `${bits} maxUnorm ${maxUnorm} tensor ${i} ${place}`;
              const [a, b] = [t, alone[i]!].map((of) => of[place]?.bytesSync() ?? new Uint8Array(0));
              expect(Buffer.compare(a!, b!), where).toBe(0);
            }
          }
          for (const t of [...together, ...alone]) dispose(t);
        }
      }
    }),
  );

  test("keep their order with reads and writes of the host", () =>
    withBackend({ guards: false }, async (backend) => {
      const n = 300_000;
      const kind = { family: "lion", bits: 32, dtype: "f32", gradDtype: "f32" } as const;
      const make = (value: number) => Tensor.allocate(backend, "f32", [n]).copyFrom(new Float32Array(n).fill(value));
      const t: StepTensors = { index: 0, p: make(0), g: make(1), state1: make(0) };
      const list = new UpdateList(backend, kind);
      const hyper = { ...HYPER, lr: 1, weightDecay: 0 };
      const reads: Promise<Float32Array>[] = [];
      for (let i = 0; i < 6; i++) {
        // A large read is pinned; the step that follows must not be seen by it, and the write after that not by the step.
        reads.push((t.p as Tensor<"f32">).data());
        launchStep([{ list, tensors: [t], hyper }], null, CONTEXT);
        t.g.copyFrom(new Float32Array(n).fill(i % 2 === 0 ? 1 : 2));
      }
      t.g.dispose();
      const again = make(-1);
      reads.push((t.p as Tensor<"f32">).data());
      for (const [i, read] of reads.entries()) {
        const data = await read;
        expect([data[0], data[n - 1], new Set(data).size], `read ${i}`).toEqual([0 - i, 0 - i, 1]);
      }
      again.dispose();
      list.dispose();
      dispose(t);
    }));
});
