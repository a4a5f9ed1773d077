/** One case while it runs: its tensors on the device, what was compared, what was found. */
import type { DeviceName } from "../core/backend.js";
import { DTYPE_BYTES, type DType, isFloat } from "../core/dtype.js";
import type { Disposable } from "../core/scope.js";
import { formatShape, type Shape, sameShape, sizeOf } from "../core/shape.js";
import type { Tensor } from "../core/tensor.js";
import { fromBytes } from "../ops/create.js";
import type { GoldenCase, GoldenTensor } from "./cases.js";
import { bitsAt, hex, numberOf, ulpsApart } from "./float-bits.js";
import type { GoldenFailure, WorstElement } from "./report.js";
import { allowedCodes, type CodeRule } from "./ties.js";

/** Codes as small integers, with what is needed to prove a tie. */
export interface CodeComparison {
  readonly golden: GoldenTensor;
  /** Of the tensor that was computed. */
  readonly shape: Shape;
  readonly expected: ArrayLike<number>;
  readonly got: ArrayLike<number>;
  readonly rule: CodeRule;
  /** The value that code `i` stands for, as it was quantized. */
  readonly value: (i: number) => number;
  /** The scale of its block. */
  readonly absmax: (i: number) => number;
  /** Codes beyond this many are padding: no ties there. */
  readonly count: number;
}

const NONE: ReadonlySet<number> = new Set();

export class CaseRun {
  ties = 0;
  /** Comparisons made: a case without any has not passed. */
  comparisons = 0;
  readonly failures: GoldenFailure[] = [];
  private readonly held: Disposable[] = [];

  constructor(
    readonly case_: GoldenCase,
    private readonly device: DeviceName,
  ) {}

  /** Disposes it (or every member of a tuple) when the case is over. */
  own<T extends Disposable | readonly (Disposable | null)[]>(value: T): T {
    for (const item of Array.isArray(value) ? value : [value]) if (item) this.held.push(item);
    return value;
  }

  dispose(): void {
    for (const item of this.held) item.dispose();
  }

  /** A golden tensor on the device. */
  upload<D extends DType>({ bytes, dtype, shape }: GoldenTensor<D>, as: Shape = shape): Tensor<D> {
    return this.own(fromBytes(bytes, { dtype, shape: as, device: this.device }));
  }

  /**
   * Compares with a golden tensor bit for bit.
   * @param how what was computed, where the field alone does not say it
   * @param skip elements that may differ
   * @returns whether they are equal
   */
  async equal(golden: GoldenTensor, got: Tensor, how = "", skip: ReadonlySet<number> = NONE): Promise<boolean> {
    return this.sameShape(golden, got.shape) && this.equalBytes(golden, await got.bytes(), how, skip);
  }

  private sameShape(golden: GoldenTensor, shape: Shape): boolean {
    if (sameShape(golden.shape, shape)) return true;
    this.comparisons++;
    return this.fail(golden, `has shape ${formatShape(golden.shape)}, computed ${formatShape(shape)}`, sizeOf(shape));
  }

  equalBytes(golden: GoldenTensor, got: Uint8Array, how = "", skip: ReadonlySet<number> = NONE): boolean {
    this.comparisons++;
    const { dtype, bytes } = golden;
    const elements = bytes.length / DTYPE_BYTES[dtype];
    if (got.length !== bytes.length) {
      return this.fail(golden, `has ${elements} elements, computed ${got.length / DTYPE_BYTES[dtype]}`, elements);
    }
    if (Buffer.compare(got, bytes) === 0) return true;
    let mismatches = 0;
    let worst: WorstElement | null = null;
    let distance = -1;
    for (let index = 0; index < elements; index++) {
      const expectedBits = bitsAt(dtype, bytes, index);
      const gotBits = bitsAt(dtype, got, index);
      if (expectedBits === gotBits || skip.has(index)) continue;
      mismatches++;
      const expected = numberOf(dtype, expectedBits);
      const actual = numberOf(dtype, gotBits);
      const ulps = isFloat(dtype) ? ulpsApart(dtype, expectedBits, gotBits) : undefined;
      const off = ulps ?? Math.abs(expected - actual);
      if (off <= distance) continue;
      distance = off;
      worst = { index, expected, got: actual };
      if (ulps !== undefined) {
        worst = { ...worst, expectedBits: hex(dtype, expectedBits), gotBits: hex(dtype, gotBits), ulps };
      }
    }
    const problem = `${mismatches} of ${elements} elements differ${how && ` (${how})`}`;
    return mismatches === 0 || this.fail(golden, problem, elements, mismatches, worst);
  }

  /**
   * Compares codes: equal, or a proven tie.
   * @returns the indexes of the ties
   */
  codes({ golden, shape, expected, got, rule, value, absmax, count }: CodeComparison): ReadonlySet<number> {
    const ties = new Set<number>();
    if (!this.sameShape(golden, shape)) return ties;
    this.comparisons++;
    let mismatches = 0;
    let worst: WorstElement | null = null;
    let distance = -1;
    for (let index = 0; index < expected.length; index++) {
      const want = expected[index]!;
      const have = got[index]!;
      if (want === have) continue;
      if (index < count) {
        const allowed = allowedCodes(rule, value(index), absmax(index));
        if (allowed.has(want) && allowed.has(have)) {
          ties.add(index);
          continue;
        }
      }
      mismatches++;
      const off = Math.abs(rule.decode(want) - rule.decode(have));
      if (off <= distance) continue;
      distance = off;
      worst = { index, expected: want, got: have };
      if (index < count) {
        const scale = absmax(index);
        const x = value(index);
        worst = { ...worst, value: x, absmax: scale, scaled: (x * rule.factor) / scale };
      }
    }
    this.ties += ties.size;
    const problem = `${mismatches} of ${expected.length} codes differ`;
    if (mismatches > 0) this.fail(golden, problem, expected.length, mismatches, worst);
    return ties;
  }

  /** Notes a failure about a golden tensor. */
  fail(
    golden: { readonly field: string; readonly name: string | null } | null,
    problem: string,
    elements = 0,
    mismatches = elements,
    worst: WorstElement | null = null,
  ): false {
    const { op, index, file } = this.case_;
    const field = golden?.field ?? null;
    const tensor = golden?.name ?? null;
    this.failures.push({ file: file.name, case: index, op, field, tensor, problem, mismatches, elements, worst });
    return false;
  }
}
