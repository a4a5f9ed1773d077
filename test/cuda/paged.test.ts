/** Paged memory on a real GPU: at most 2 GB of it, whatever the GPU has. An integrated GPU has plain memory in its place. */
import { expect, test } from "vitest";
import { CudaBackend } from "#halfbyte/backend/cuda/backend.js";
import { pagingOf } from "#halfbyte/backend/cuda/device.js";
import type { Backend } from "#halfbyte/core/backend.js";
import { DTYPE_ID } from "#halfbyte/core/dtype.js";
import { OutOfMemoryError } from "#halfbyte/core/errors.js";
import type { KernelName } from "#halfbyte/core/kernels.js";
import { QUANT_TYPE_ID } from "#halfbyte/core/kernels.js";
import { Tensor } from "#halfbyte/core/tensor.js";
import { Adam8bit, Adam32bit, type Optimizer, PagedAdam8bit, PagedAdam32bit } from "#halfbyte/index.js";
import { normals, random } from "../helpers/random.js";
import { disposeDict } from "../optim/scene.js";
import { bytes, driverFree, fill, GB, MB, onGpu, program, said, withBoth, withCuda } from "./gpu.js";

/** What the driver may keep for itself between two looks. */
const SLACK = 64 * MB;
/** The same after many allocations of managed memory, whose chunks of 2 MiB it gives back when it likes: a part of what went through. */
const MANAGED_SLACK = 256 * MB;

const paged = (backend: Backend, n: number): Tensor<"u8"> => Tensor.allocate(backend, "u8", [n], true);
const prefetch = (...tensors: Tensor[]): void => tensors[0]!.backend.prefetch(tensors.map(({ storage }) => storage));
const copy = (src: Tensor, dst: Tensor): void => dst.backend.launch("copy", { src, dst, bytes: dst.byteLength });
const onDemand = (gpu: CudaBackend): boolean => pagingOf(gpu.info) === "on demand";

/** Bytes that differ from place to place and from seed to seed. */
function pattern(n: number, seed: number): Uint8Array<ArrayBuffer> {
  const next = random(seed);
  const page = Uint8Array.from({ length: 65_537 }, next);
  const result = new Uint8Array(n);
  for (let at = 0; at < n; at += page.length) result.set(page.subarray(0, Math.min(page.length, n - at)), at);
  return result;
}
/** So many that the moments of two parameters in 32 bits are too many to be brought to the GPU together. */
const ELEMENTS = 20_000_000;
const parameter = (backend: Backend, seed: number): Tensor<"f32"> => {
  const page = normals(1_000_003, seed);
  const values = new Float32Array(ELEMENTS);
  for (let at = 0; at < ELEMENTS; at += page.length) values.set(page.subarray(0, ELEMENTS - at), at);
  return Tensor.allocate(backend, "f32", [ELEMENTS]).copyFrom(values);
};
const same = (a: Uint8Array, b: Uint8Array): boolean => Buffer.compare(a, b) === 0;
const uniform = (data: Uint8Array, value: number): boolean => same(data, new Uint8Array(data.length).fill(value));

/** Waits until the driver has all paged memory back. */
async function returned(gpu: CudaBackend): Promise<void> {
  const { arena } = gpu as unknown as { arena: { paged?: { committedBytes: number } } };
  await expect.poll(() => arena.paged?.committedBytes ?? 0, { timeout: 20_000 }).toBe(0);
}

onGpu("paged memory", () => {
  test("holds what is written, whoever moves its pages", () =>
    withCuda({}, async (gpu) => {
      for (const n of [1, 4095, 65_537, 2 * MB + 1, 300 * MB]) {
        using a = paged(gpu, n);
        using b = bytes(gpu, n);
        using c = paged(gpu, n);
        const data = pattern(n, n);
        if (n % 2) prefetch(a, c);
        a.copyFrom(data);
        const early = a.bytes();
        copy(a, b);
        prefetch(a, c, a);
        copy(b, c);
        fill(a, 7);
        expect(same(await early, data), `${n} bytes`).toBe(true);
        expect(same(c.bytesSync(), data), `${n} bytes, copied`).toBe(true);
        expect(uniform(await a.bytes(), 7), `${n} bytes, filled`).toBe(true);
      }
      const { paging } = gpu.memory();
      // No hint was refused.
      expect(paging).toMatch(
        { "on demand": /prefetched.*host's memory$/, whole: /must fit.*is 0\)$/, plain: /^plain .*(page|memory)$/ }[
          pagingOf(gpu.info)
        ],
      );
    }));

  test("kernels give the cpu's bits on it", () =>
    withBoth(async (gpu, cpu) => {
      const n = 20 * MB + 8;
      const values = normals(n, "paged");
      const run = (backend: Backend): [Tensor, Tensor] => {
        using x = Tensor.allocate(backend, "f32", [n], true).copyFrom(values);
        const packed = paged(backend, n / 2);
        const absmax = Tensor.allocate(backend, "f32", [Math.ceil(n / 64)], true);
        prefetch(x, packed);
        const kind = { n, blocksize: 64, dtype: DTYPE_ID.f32, quantType: QUANT_TYPE_ID.nf4 };
        backend.launch("quantize4bit", { x, packed, absmax, ...kind, allowNonFinite: 1 });
        return [packed, absmax];
      };
      const [expected, got] = [run(cpu), run(gpu)];
      for (const [i, tensor] of got.entries()) {
        expect(same(await tensor.bytes(), expected[i]!.bytesSync())).toBe(true);
        tensor.dispose();
        expected[i]!.dispose();
      }
    }));

  /** Two steps, a load and one more step, in both classes. @param launches of the paged one's kernel in each step */
  const compareClasses = (
    plain: typeof Adam32bit | typeof Adam8bit,
    pages: typeof PagedAdam32bit | typeof PagedAdam8bit,
    kernel: KernelName,
    launches: number,
  ): Promise<void> =>
    withCuda({}, async (gpu) => {
      const params = [0, 1].map(() => [1, 2].map((seed) => parameter(gpu, seed)));
      const grads = [3, 4].map((seed) => parameter(gpu, seed));
      const before = await params[0]![0]!.bytes();
      const [a, b] = [new plain(params[0]!), new pages(params[1]!)];
      const updates = new Map<Optimizer, number>();
      let current: Optimizer;
      const launch = gpu.launch.bind(gpu);
      gpu.launch = (name, ...rest) => {
        if (name === kernel) updates.set(current, (updates.get(current) ?? 0) + 1);
        launch(name, ...rest);
      };
      const step = (): void => {
        // The order of the gradients changes with each step.
        for (const ps of params) for (const [i, p] of ps.entries()) p.grad = grads[(i + (updates.get(a) ?? 0)) % 2]!;
        for (current of [a, b]) current.step();
      };
      const compare = async (what: string): Promise<void> => {
        const dicts = [a, b].map((optimizer) => optimizer.stateDict());
        const tensors = params.map((ps, i) => [
          ...ps,
          ...Object.values(dicts[i]!.state).flatMap((entries) =>
            Object.values(entries).filter((value): value is Tensor => value instanceof Tensor),
          ),
        ]);
        expect(tensors[0]!.length).toBe(tensors[1]!.length);
        for (const [i, expected] of tensors[0]!.entries()) {
          const [x, y] = [await expected.bytes(), await tensors[1]![i]!.bytes()];
          expect(same(x, y), `${what}, tensor ${i} of ${expected.dtype}`).toBe(true);
        }
        for (const dict of dicts) disposeDict(dict);
      };
      step();
      step();
      expect([updates.get(a), updates.get(b)]).toEqual([2, 2 * launches]);
      await compare("2 steps");
      if (pagingOf(gpu.info) !== "plain") {
        // The moments of both parameters.
        expect(gpu.memory().pagedBytes).toBe(4 * ELEMENTS * (kernel === "optimizerUpdate32bit" ? 4 : 1));
      }
      const dict = b.stateDict();
      b.loadStateDict(dict);
      disposeDict(dict);
      await compare("loaded");
      step();
      await compare("a step after that");
      expect(await b.skippedSteps()).toBe(0);
      const changed = !same(await params[0]![0]!.bytes(), before);
      // The fake driver's kernels do nothing.
      expect(changed || process.env.HALFBYTE_TEST_CUDA === "rehearse").toBe(true);
      for (const each of [a, b, ...params.flat(), ...grads]) each.dispose();
      await returned(gpu);
    });

  test("PagedAdam32bit gives the bits of Adam32bit", () =>
    compareClasses(Adam32bit, PagedAdam32bit, "optimizerUpdate32bit", 2));

  test("PagedAdam8bit gives the bits of Adam8bit", () =>
    compareClasses(Adam8bit, PagedAdam8bit, "optimizerUpdate8bitBlockwise", 1));

  test("may be more than memoryLimit, and more than the GPU has left", ({ skip }) =>
    withCuda({ memoryLimit: 64 * MB }, async (gpu) => {
      if (!onDemand(gpu)) skip(gpu.memory().paging);
      const size = 256 * MB;
      const limited = gpu.memory().committedBytes;
      const all = Array.from({ length: 7 }, () => paged(gpu, size));
      expect(gpu.memory()).toMatchObject({ bytes: 7 * size, pagedBytes: 7 * size, committedBytes: limited });
      expect(() => bytes(gpu, 100 * MB)).toThrow(/104857600 bytes requested, \d+ of 67108864 bytes free/);
      // All but a gigabyte of the GPU is taken, so that pages have to make room for each other.
      const other = new CudaBackend();
      const taken: Tensor[] = [];
      try {
        for (let free = driverFree(other); free > GB + size; free = driverFree(other)) {
          taken.push(bytes(other, Math.min(16 * GB, free - GB)));
        }
        expect(driverFree(other)).toBeLessThan(1.5 * GB);
        for (const [i, t] of all.entries()) fill(t, i + 1);
        for (let round = 0; round < 3; round++) {
          for (let i = 0; i < all.length; i++) {
            prefetch(all[(i + 1) % 7]!);
            // Each becomes its neighbour's value of the round before.
            copy(all[(i + 1) % 7]!, all[i]!);
          }
        }
        const reads = all.map((t) => t.bytes());
        const values = [1, 2, 3, 4, 5, 6, 7];
        for (let round = 0; round < 3; round++) for (let i = 0; i < 7; i++) values[i] = values[(i + 1) % 7]!;
        for (const [i, read] of reads.entries()) expect(uniform(await read, values[i]!), `piece ${i}`).toBe(true);
        expect(gpu.state).toBe("ready");
      } finally {
        for (const t of [...taken, ...all]) t.dispose();
        await other.close();
      }
      await returned(gpu);
    }));

  test("released under running kernels, it goes back when they are done", () =>
    withCuda({}, async (gpu) => {
      const free = driverFree(gpu);
      using kept = paged(gpu, 64 * MB);
      const data = pattern(64 * MB, 3);
      kept.copyFrom(data);
      const reads: Promise<Uint8Array>[] = [];
      for (let round = 0; round < 5; round++) {
        using t = paged(gpu, 256 * MB);
        prefetch(t);
        for (let i = 0; i < 40; i++) fill(t, i + round);
        reads.push(gpu.read(t.storage, 255 * MB, 1000));
      }
      expect(gpu.memory().bytes).toBe(64 * MB);
      for (const [round, read] of reads.entries()) expect(uniform(await read, 39 + round)).toBe(true);
      expect(same(await kept.bytes(), data)).toBe(true);
      kept.dispose();
      await returned(gpu);
      if (onDemand(gpu)) expect(Math.abs(driverFree(gpu) - free)).toBeLessThan(SLACK);
    }));

  test("a thousand rounds of create and dispose leave nothing", () =>
    withCuda({}, async (gpu) => {
      const round = async (i: number): Promise<void> => {
        using t = paged(gpu, 1 + (i % 5) * 900_000);
        prefetch(t);
        fill(t, i);
        if (i % 50 === 0) expect((await gpu.read(t.storage, 0, 1))[0]).toBe(i & 255);
      };
      for (let i = 0; i < 50; i++) await round(i);
      await returned(gpu);
      const { committedBytes } = gpu.memory();
      const free = driverFree(gpu);
      for (let i = 0; i < 1000; i++) await round(i);
      await returned(gpu);
      expect(gpu.memory()).toMatchObject({ bytes: 0, pagedBytes: 0, committedBytes });
      // 1.8 GB have come and gone.
      expect(Math.abs(driverFree(gpu) - free)).toBeLessThan(MANAGED_SLACK);
    }));

  test("more than there is anywhere is refused by name, and less works afterwards", () =>
    withCuda({}, async (gpu) => {
      const much = 2 ** 50;
      let error: unknown;
      try {
        paged(gpu, much);
      } catch (e) {
        error = e;
      }
      expect(error).toBeInstanceOf(OutOfMemoryError);
      expect(error).toMatchObject({ device: expect.stringMatching(/^cuda/), requestedBytes: much });
      using small = paged(gpu, MB);
      fill(small, 3);
      expect((await small.data()).at(-1)).toBe(3);
    }));

  test("guards find an overrun", () =>
    withCuda({ guards: true }, (gpu) => {
      const t = paged(gpu, 1000);
      prefetch(t);
      fill(t, 1);
      gpu.checkGuards();
      gpu.launch("fill", { dst: t, bytes: 1001, value: 0 });
      expect(() => gpu.checkGuards()).toThrow(/1000 bytes into an allocation of 1000 bytes/);
      gpu.launch("fill", { dst: { storage: t.storage, byteOffset: 1000 }, bytes: 1, value: 0xa5a5a5a5 });
      t.dispose();
    }));

  test("a process may end with prefetches and kernels under way on it", () => {
    const ended = program(`const gpu = new CudaBackend(); const x = Tensor.allocate(gpu, "u8", [1 << 28], true);
      for (let i = 0; i < 50; i++) { gpu.prefetch([x.storage]); fill(x, i); } say("going"); process.exit(7);`);
    expect([ended.code, ended.signal, said(ended)], ended.stderr).toEqual([7, null, ["going"]]);
  });
});
