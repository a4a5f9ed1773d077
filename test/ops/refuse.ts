/** Calls that must be refused: by the error's class and operand, with nothing allocated or launched. */
import { expect } from "vitest";
import type { CpuBackend } from "#halfbyte/backend/cpu/backend.js";
import type { DType } from "#halfbyte/core/dtype.js";
import type { TensorHolder } from "#halfbyte/core/scope.js";
import { liveTensors, Tensor } from "#halfbyte/core/tensor.js";
import { withBackend } from "../helpers/backends.js";

export type Kind = "ArgumentError" | "ShapeError" | "DTypeError" | "DeviceError" | "DisposedError";
/** What is called, the error's class, its operand, and words of its message. */
export type Refusal = readonly [run: () => unknown, kind: Kind, operand: string, words?: string];
export type Make = (dtype: DType, shape: readonly number[]) => Tensor;

/** Has the tensors of a value disposed in the end. */
export type Keep = <T extends TensorHolder | readonly TensorHolder[]>(value: T) => T;

/** Runs a list of calls that must throw, on a backend that counts launches; `other` makes tensors on a second backend. */
export async function refuse(
  op: string,
  list: (make: Make, other: Make, keep: Keep) => readonly Refusal[],
): Promise<void> {
  await withBackend({}, async (backend) =>
    withBackend({}, (second) => {
      const held = new Set<Tensor>();
      const keep: Keep = (value) => {
        const holders: readonly TensorHolder[] = Array.isArray(value) ? value : [value];
        for (const holder of holders) for (const tensor of holder.tensors()) held.add(tensor as Tensor);
        return value;
      };
      const on =
        (where: CpuBackend): Make =>
        (dtype, shape) =>
          keep(Tensor.allocate(where, dtype, shape));
      const refusals = list(on(backend), on(second), keep);
      expect(refusals.length).toBeGreaterThan(2);
      const launches: string[] = [];
      for (const each of [backend, second]) each.launch = (kernel) => void launches.push(kernel);
      // Tensors that the test does not know of.
      const unknown = () =>
        [backend, second].map((each) => {
          const known = [...held].filter((tensor) => !tensor.isDisposed && tensor.backend === each);
          return liveTensors(each) - known.length;
        });
      for (const [i, [run, kind, operand, words = ""]] of refusals.entries()) {
        const where = `${op} refusal ${i} (${operand})`;
        let error: unknown;
        try {
          run();
        } catch (thrown) {
          error = thrown;
        }
        expect(error, where).toMatchObject(kind === "DisposedError" ? { name: kind } : { name: kind, op, operand });
        expect((error as Error).message, where).toMatch(`[${op}] ${operand}`);
        expect((error as Error).message, where).toContain(words);
        expect(unknown(), where).toEqual([0, 0]);
        expect(launches, where).toEqual([]);
      }
      for (const tensor of held) tensor.dispose();
    }),
  );
}

/** A tensor that was disposed. */
export function gone(make: Make, dtype: DType, shape: readonly number[]): Tensor {
  const t = make(dtype, shape);
  t.dispose();
  return t;
}
