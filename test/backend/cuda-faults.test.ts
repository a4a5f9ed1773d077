/** How the cuda backend hears of non-finite input: the kernels of the fake driver do nothing, so the test writes what they would. */
import { describe, expect, test } from "vitest";
import { COMMAND_OPERANDS } from "#halfbyte/backend/cuda/addon.js";
import type { CudaBackend } from "#halfbyte/backend/cuda/backend.js";
import { cudaLayout } from "#halfbyte/backend/cuda/layout.js";
import type { LaunchContext } from "#halfbyte/core/backend.js";
import { CudaError, NonFiniteError } from "#halfbyte/core/errors.js";
import type { Storage } from "#halfbyte/core/kernels.js";
import { at, fill, HERE, refusing, uniform, withCuda } from "../helpers/fake-backend.js";

describe.runIf(HERE)("non-finite input", () => {
  const CONTEXT: LaunchContext = { op: "quantize4bit", operand: "A", unit: "block" };
  const ROWS: LaunchContext = { op: "int8VectorwiseQuant", operand: "B", unit: "row" };

  interface Reporter {
    /** Launches a kernel that may report, and returns the key it was given. */
    launch(context?: LaunchContext, allowNonFinite?: number): number;
    /** Writes the word, as the smallest of what kernels report. */
    report(...faults: [key: number, block: number][]): void;
    /** How many copies to the host there have been. */
    copies(): number;
  }

  function reporter(backend: CudaBackend): Reporter {
    const { command, stream } = backend as unknown as {
      command: Uint32Array;
      stream: { copyToHost(...args: number[]): void };
    };
    const { word, key } = cudaLayout("quantize4bit").fault!;
    const x = backend.allocate(1024);
    let copies = 0;
    const { copyToHost } = stream;
    stream.copyToHost = function (...args) {
      copies++;
      copyToHost.apply(this, args);
    };
    return {
      launch(context, allowNonFinite = 0) {
        const operands = { x: at(x), packed: at(x), absmax: at(x), n: 64, blocksize: 64, dtype: 0, quantType: 0 };
        backend.launch("quantize4bit", { ...operands, allowNonFinite }, context);
        return command[(COMMAND_OPERANDS + key) >> 2]!;
      },
      report(...faults) {
        const low = command[(COMMAND_OPERANDS + word) >> 2]!;
        const high = command[((COMMAND_OPERANDS + word) >> 2) + 1]!;
        const smallest = faults
          .map(([k, block]) => BigInt(k) * 2n ** 32n + BigInt(block))
          .reduce((a, b) => (a < b ? a : b));
        const there = { bytes: 8, reads: 0, address: high * 2 ** 32 + low };
        backend.write(there as unknown as Storage, 0, new Uint8Array(BigUint64Array.of(smallest).buffer));
      },
      copies: () => copies,
    };
  }

  test("the read after the launch rejects, the one after it does not; earlier ones are not blamed", () =>
    withCuda({}, async (backend) => {
      const { launch, report } = reporter(backend);
      const t = backend.allocate(100_000);
      fill(backend, t, 1);
      const before = backend.read(t, 0, 100_000);
      report([launch(CONTEXT), 1093]);
      const [first, second] = [backend.read(t, 0, 100_000), backend.read(t, 0, 8)];
      await expect(first).rejects.toMatchObject({ op: "quantize4bit", operand: "A", index: 1093, unit: "block" });
      await expect(first).rejects.toBeInstanceOf(NonFiniteError);
      expect((await second).length).toBe(8);
      expect(uniform(await before, 1)).toBe(true);
      expect(backend.state).toBe("ready");
    }));

  test("of several launches the first wins, of several blocks the lowest; the rest is forgotten", () =>
    withCuda({}, async (backend) => {
      const { launch, report } = reporter(backend);
      const t = backend.allocate(8);
      launch(CONTEXT);
      const [early, late] = [launch(ROWS), launch(CONTEXT)];
      expect(late).toBeGreaterThan(early);
      report([late, 0], [early, 70], [early, 2 ** 32 - 2]);
      await expect(backend.read(t, 0, 8)).rejects.toMatchObject({ op: "int8VectorwiseQuant", index: 70, unit: "row" });
      expect((await backend.read(t, 0, 8)).length).toBe(8);
      report([launch(ROWS), 4]);
      expect(() => backend.readSync(t, 0, 8)).toThrow(/\[int8VectorwiseQuant\] B: .* row 4/);
      backend.readSync(t, 0, 8);
      report([launch(CONTEXT), 5]);
      await expect(backend.synchronize()).rejects.toThrow(/block 5/);
      await backend.synchronize();
      report([launch(), 6]);
      await expect(backend.read(t, 0, 0)).rejects.toMatchObject({ op: "kernel", index: 6, unit: "block" });
    }));

  test("reads look at the word only after launches that may report", () =>
    withCuda({}, async (backend) => {
      const { launch, copies } = reporter(backend);
      const t = backend.allocate(8);
      await backend.read(t, 0, 8);
      expect(copies()).toBe(1);
      launch(CONTEXT);
      await backend.read(t, 0, 8);
      expect(copies()).toBe(3);
      await backend.read(t, 0, 8);
      expect(copies()).toBe(4);
      launch(CONTEXT, 1);
      await backend.read(t, 0, 8);
      expect(copies()).toBe(5);
    }));

  test("keys grow, up to their end", () =>
    withCuda({}, async (backend) => {
      const { launch, report } = reporter(backend);
      const t = backend.allocate(8);
      let last = -1;
      for (let i = 0; i < 1000; i++) {
        const key = launch(i & 1 ? CONTEXT : ROWS);
        expect(key).toBeGreaterThan(last);
        last = key;
      }
      const { faults } = backend as unknown as { faults: { launches: number } };
      faults.launches = 2 ** 24 - 3;
      const keys = [launch(CONTEXT), launch(CONTEXT), launch(ROWS), launch(CONTEXT)];
      expect(keys.map((key) => Math.floor(key / 256))).toEqual([3, 2, 2, 2].map((less) => 2 ** 24 - less));
      report([keys[3]!, 2 ** 32 - 1]);
      await expect(backend.read(t, 0, 8)).rejects.toMatchObject({ op: "quantize4bit", index: 2 ** 32 - 1 });
      expect(launch(CONTEXT)).toBeLessThan(256);
    }));

  test("a read that fails for another reason leaves its fault to the next", () =>
    withCuda({}, async (backend) => {
      const { launch, report } = reporter(backend);
      const t = backend.allocate(8);
      await backend.read(t, 0, 8);
      const OUT_OF_MEMORY = 2;
      report([launch(CONTEXT), 11]);
      await refusing("eventRecord", OUT_OF_MEMORY, () => expect(backend.read(t, 0, 8)).rejects.toThrow(CudaError));
      report([launch(ROWS), 12]);
      await refusing("eventRecord", OUT_OF_MEMORY, () => expect(() => backend.readSync(t, 0, 8)).toThrow(CudaError));
      report([launch(CONTEXT), 13]);
      await expect(backend.read(t, 0, 8)).rejects.toMatchObject({ op: "quantize4bit", index: 11 });
      await backend.read(t, 0, 8);
      report([launch(ROWS), 14]);
      await refusing("eventRecord", OUT_OF_MEMORY, () => expect(backend.synchronize()).rejects.toThrow(CudaError));
      await expect(backend.synchronize()).rejects.toMatchObject({ op: "int8VectorwiseQuant", index: 14 });
      report([launch(CONTEXT), 15]);
      const dropped = backend.read(t, 0, 8);
      await Promise.all([expect(dropped).rejects.toThrow(/restarted/), backend.restart()]);
      await backend.read(t, 0, 8);
    }));

  test("hundreds of reads pending, each with its own fault", () =>
    withCuda({}, async (backend) => {
      const { launch, report } = reporter(backend);
      const t = backend.allocate(100);
      const reads: Promise<unknown>[] = [];
      for (let i = 0; i < 1100; i++) {
        report([launch(CONTEXT), i]);
        reads.push(backend.read(t, 0, 100).catch((error: NonFiniteError) => error.index));
      }
      expect(await Promise.all(reads)).toEqual(reads.map((_, i) => i));
    }));
});
