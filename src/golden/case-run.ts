/** One case while it runs: its tensors on the device, what was compared, what was found. */
import type { DeviceName } from "../core/backend.js";
import { DTYPE_BYTES, type DType, type FloatDType, isFloat } from "../core/dtype.js";
import type { Disposable } from "../core/scope.js";
import { formatShape, type Shape, sameShape, sizeOf } from "../core/shape.js";
import type { Tensor } from "../core/tensor.js";
import { fromBytes } from "../ops/create.js";
import type { GoldenCase, GoldenTensor } from "./cases.js";
import { bitsAt, floatsOf, hex, numberOf, ulpsApart } from "./float-bits.js";
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
  /** The codes that are right for element i, where more than the scale is uncertain. */
  readonly allowed?: (i: number) => ReadonlySet<number>;
}

const NONE: ReadonlySet<number> = new Set();

/** The error of a product may be this many times golden's. */
export const ERROR_RATIO = 1.02;

/** Value and scale of element i, as a code comparison wants them. */
export function scaledBy(values: Float32Array, scales: Float32Array, blocksize: number) {
  return {
    value: (i: number) => values[i]!,
    absmax: (i: number) => scales[Math.floor(i / blocksize)]!,
    count: values.length,
  };
}

/** ||x - reference|| / ||reference||, Euclidean norms, in float64. */
export function relativeError(x: ArrayLike<number>, reference: ArrayLike<number>): number {
  let [difference, norm] = [0, 0];
  for (let i = 0; i < reference.length; i++) {
    difference += (x[i]! - reference[i]!) ** 2;
    norm += reference[i]! ** 2;
  }
  return difference === 0 ? 0 : Math.sqrt(difference / norm);
}

export class CaseRun {
  ties = 0;
  /** Comparisons made: a case without any has not passed. */
  comparisons = 0;
  readonly failures: GoldenFailure[] = [];
  /** Rules of golden's that are known to be others (see GoldenDifference). */
  readonly differences = new Set<string>();
  readonly drift: { readonly what: string; readonly off: number }[] = [];
  private readonly held: Disposable[] = [];

  constructor(
    readonly case_: GoldenCase,
    readonly device: DeviceName,
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
  codes({
    golden,
    shape,
    expected,
    got,
    rule,
    value,
    absmax,
    count,
    allowed: of,
  }: CodeComparison): ReadonlySet<number> {
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
        const allowed = of ? of(index) : allowedCodes(rule, value(index), absmax(index));
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

  /**
   * Compares a product by its error: the relative error against `reference` may be ERROR_RATIO times golden's own, measured the
   * same way, or `stated`, if that is more.
   * @returns whether it is accurate enough
   */
  async accurate(
    golden: GoldenTensor<FloatDType>,
    got: Tensor,
    reference: ArrayLike<number>,
    { how = "", stated = 0 } = {},
  ): Promise<boolean> {
    if (!this.sameShape(golden, got.shape)) return false;
    this.comparisons++;
    const theirs = floatsOf(golden.dtype, golden.bytes);
    const ours = floatsOf(golden.dtype, await got.bytes());
    const allowed = ERROR_RATIO * Math.max(stated, relativeError(theirs, reference));
    const error = relativeError(ours, reference);
    if (error <= allowed) return true;
    const off = (x: Float32Array, i: number): number => Math.abs(x[i]! - reference[i]!);
    let limit = 0;
    for (let i = 0; i < theirs.length; i++) limit = Math.max(limit, off(theirs, i));
    let mismatches = 0;
    let worst = 0;
    for (let i = 0; i < ours.length; i++) {
      if (!(off(ours, i) <= limit)) mismatches++;
      if (!(off(ours, i) <= off(ours, worst))) worst = i;
    }
    const problem = `relative error ${error.toExponential(3)}, ${allowed.toExponential(3)} is allowed${how && ` (${how})`}`;
    const element = { index: worst, expected: reference[worst]!, got: ours[worst]! };
    return this.fail(golden, problem, ours.length, mismatches, element);
  }

  /**
   * Compares floats that may be apart by a bound for each.
   * @param how what was computed, where the field alone does not say it
   * @returns whether they are close enough
   */
  close(
    golden: GoldenTensor,
    expected: ArrayLike<number>,
    got: ArrayLike<number>,
    bound: (i: number) => number,
    how = "",
  ): boolean {
    this.comparisons++;
    let mismatches = 0;
    let worst = 0;
    let distance = 0;
    for (let i = 0; i < expected.length; i++) {
      const off = Math.abs(got[i]! - expected[i]!);
      if (off <= bound(i)) continue;
      mismatches++;
      const times = Number.isNaN(off) ? Number.POSITIVE_INFINITY : off / bound(i);
      if (times > distance) [distance, worst] = [times, i];
    }
    if (mismatches === 0) return true;
    const problem = `${mismatches} of ${expected.length} elements too far off, up to ${distance.toPrecision(3)} times the bound`;
    const element = { index: worst, expected: expected[worst]!, got: got[worst]! };
    return this.fail(golden, problem + (how && ` (${how})`), expected.length, mismatches, element);
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
