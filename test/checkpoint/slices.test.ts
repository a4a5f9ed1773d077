import { describe, expect, it } from "vitest";
import { runJobs } from "#halfbyte/checkpoint/jobs.js";
import { pipeline, readSlices, SLICE_ELEMENTS, type Slice } from "#halfbyte/checkpoint/slices.js";
import type { ModelSource, SourceTensor } from "#halfbyte/formats/source.js";

/** A source of one bf16 tensor whose elements count up, modulo 65536. */
function counting(shape: readonly number[], onRead?: () => void): { source: ModelSource; tensor: SourceTensor } {
  const tensor: SourceTensor = { name: "t", dtype: "BF16", shape };
  const perRow = shape.slice(1).reduce((a, b) => a * b, 1);
  const source = {
    async readRows(_: string, begin: number, end: number) {
      onRead?.();
      const words = Uint16Array.from({ length: (end - begin) * perRow }, (_, i) => begin * perRow + i);
      return new Uint8Array(words.buffer);
    },
  } as unknown as ModelSource;
  return { source, tensor };
}

async function collect(slices: AsyncIterable<Slice>): Promise<Slice[]> {
  const all: Slice[] = [];
  for await (const slice of slices) all.push(slice);
  return all;
}

const wordsOf = ({ bytes }: Slice): Uint16Array =>
  new Uint16Array(bytes.buffer, bytes.byteOffset, bytes.byteLength / 2);

describe("readSlices", () => {
  const S = SLICE_ELEMENTS;
  const cases: [shape: number[], multiple: number][] = [
    [[7], 64],
    [[3, 5], 32],
    [[0, 5], 32],
    [[5, 0], 32],
    [[], 64],
    [[1000, 4097], 4096],
    [[999, 4096], 64],
    [[4, S + 1], 4096],
    [[2, 2 * S + 33], 64],
    [[3, 3, 1001], 1],
  ];
  for (const [shape, multiple] of cases) {
    it(`[${shape}] in multiples of ${multiple}: every element once, in order`, async () => {
      const { source, tensor } = counting(shape);
      const slices = await collect(readSlices(source, tensor, { multiple }));
      const total = shape.reduce((a, b) => a * b, 1);
      let at = 0;
      for (const [i, slice] of slices.entries()) {
        expect(slice.begin).toBe(at);
        expect(slice.elements).toBeLessThanOrEqual(Math.max(S, multiple));
        if (i < slices.length - 1) expect(slice.elements % multiple).toBe(0);
        const words = wordsOf(slice);
        expect(words.length).toBe(slice.elements);
        expect(words.every((word, k) => word === ((at + k) & 0xffff))).toBe(true);
        at += slice.elements;
      }
      expect(at).toBe(total);
    });
  }

  it("gives the transpose, also of a matrix that takes several passes", async () => {
    for (const [rows, cols] of [
      [5, 3],
      [2100, 9001],
    ] as const) {
      const { source, tensor } = counting([rows, cols]);
      let at = 0;
      for (const slice of await collect(readSlices(source, tensor, { multiple: 64, transposed: true }))) {
        const expected = wordsOf(slice).map((_, k) => ((at + k) % rows) * cols + Math.floor((at + k) / rows));
        expect(Buffer.compare(Buffer.from(slice.bytes), Buffer.from(expected.buffer))).toBe(0);
        at += slice.elements;
      }
      expect(at).toBe(rows * cols);
    }
  });

  it("reads one piece ahead and no further", async () => {
    let reads = 0;
    const { source, tensor } = counting([8, S], () => reads++);
    const slices = readSlices(source, tensor, { multiple: 64 });
    await slices.next();
    expect(reads).toBe(2);
    await slices.next();
    expect(reads).toBe(3);
    await slices.return();
  });

  it("stops with the signal's reason", async () => {
    const controller = new AbortController();
    const { source, tensor } = counting([8, S]);
    const slices = readSlices(source, tensor, { multiple: 64, signal: controller.signal });
    await slices.next();
    controller.abort(new Error("enough"));
    await expect(slices.next()).rejects.toThrow("enough");
  });
});

describe("pipeline", () => {
  const { source, tensor } = counting([8, SLICE_ELEMENTS]);
  const slices = () => readSlices(source, tensor, { multiple: 64 });

  it("writes in order though slices compute at different speeds, two at a time", async () => {
    const written: number[] = [];
    let computing = 0;
    let most = 0;
    await pipeline(
      slices(),
      async ({ begin }) => {
        most = Math.max(most, ++computing);
        await new Promise((resolve) => setTimeout(resolve, (begin / SLICE_ELEMENTS) % 2 === 0 ? 8 : 1));
        computing--;
        return begin;
      },
      async (begin) => void written.push(begin / SLICE_ELEMENTS),
    );
    expect(written).toEqual([0, 1, 2, 3, 4, 5, 6, 7]);
    expect(most).toBe(2);
  });

  it("ends with the error of a computation or of a write, and leaves nothing running", async () => {
    let running = 0;
    const compute = async ({ begin }: Slice) => {
      running++;
      await new Promise((resolve) => setTimeout(resolve, 2));
      running--;
      if (begin === 3 * SLICE_ELEMENTS) throw new Error("compute 3");
    };
    await expect(pipeline(slices(), compute, async () => {})).rejects.toThrow("compute 3");
    expect(running).toBe(0);
    const write = async (_: unknown, { begin }: Slice) => {
      if (begin === 2 * SLICE_ELEMENTS) throw new Error("write 2");
    };
    await expect(pipeline(slices(), async () => {}, write)).rejects.toThrow("write 2");
  });
});

describe("runJobs", () => {
  const wait = () => new Promise<void>((resolve) => setTimeout(resolve, 1));

  it("runs all, in order of start, within the bound on weights", async () => {
    const started: number[] = [];
    let weight = 0;
    let most = 0;
    const weights = [1, 9, 3, 30, 2, 2, 2, 20, 5, 1].map((millions) => millions << 20);
    await runJobs(
      weights.map((w, i) => ({
        weight: w,
        async run() {
          started.push(i);
          weight += w;
          // The heaviest runs alone.
          if (w > 24 << 20) expect(weight).toBe(w);
          else most = Math.max(most, weight);
          await wait();
          weight -= w;
        },
      })),
    );
    expect(started).toEqual(weights.map((_, i) => i));
    expect(most).toBeLessThanOrEqual(24 << 20);
    expect(most).toBeGreaterThan(9 << 20);
  });

  it("starts nothing after a failure, waits for what runs, and gives the first error", async () => {
    const ended: number[] = [];
    let started = 0;
    const jobs = Array.from({ length: 50 }, (_, i) => ({
      weight: 1,
      async run() {
        started++;
        await wait();
        ended.push(i);
        if (i >= 3) throw new Error(`job ${i}`);
      },
    }));
    await expect(runJobs(jobs)).rejects.toThrow("job 3");
    expect(started).toBeLessThan(20);
    expect(ended.length).toBe(started);
  });
});
