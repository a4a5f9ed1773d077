/** What a golden check found. Plain data: `--json` prints it as it is. */

/** Cases of one op. */
export interface OpTally {
  passed: number;
  failed: number;
  /** Cases of an op, or with parts, that this version does not have. */
  notRun: number;
  /** Codes that differ from the golden ones and are proved to be ties (see docs/golden.md). */
  ties: number;
}

/** The element that is furthest off. */
export interface WorstElement {
  readonly index: number;
  readonly expected: number;
  readonly got: number;
  /** Bit patterns of floats, which tell -0 from 0 and one NaN from another (JSON has neither). */
  readonly expectedBits?: string;
  readonly gotBits?: string;
  /** Distance of floats in units of the last place. */
  readonly ulps?: number;
  /** Of a code: the value that was quantized, the scale of its block, and their exact ratio. */
  readonly value?: number;
  readonly absmax?: number;
  readonly scaled?: number;
}

export interface GoldenFailure {
  readonly file: string;
  /** Index in the file's list of cases. */
  readonly case: number;
  readonly op: string;
  /** The case's key for the tensor (`packed`, `state.absmax`), where the problem is about one. */
  readonly field: string | null;
  /** The tensor's name in the file. */
  readonly tensor: string | null;
  readonly problem: string;
  readonly mismatches: number;
  /** Elements that were compared. */
  readonly elements: number;
  readonly worst: WorstElement | null;
}

/** Why cases were not run. */
export interface GoldenGap {
  readonly op: string;
  readonly cases: number;
  readonly reason: string;
}

/** Cases that passed although golden follows another rule in a part of them: one that is known, and that golden was held to. */
export interface GoldenDifference {
  readonly op: string;
  readonly cases: number;
  readonly rule: string;
}

/** How far several steps in a row lead away from golden's. Not judged: differences that are allowed feed the next step. */
export interface GoldenDrift {
  readonly op: string;
  /** What was done (`6 steps with 8-bit states`). */
  readonly what: string;
  readonly cases: number;
  /** The greatest, as a fraction of what it drifted from (docs/golden.md). */
  readonly worst: number;
  /** The case where it is. */
  readonly at: string;
}

export interface GoldenReport {
  readonly ops: Readonly<Record<string, Readonly<OpTally>>>;
  readonly failures: readonly GoldenFailure[];
  readonly notRun: readonly GoldenGap[];
  readonly differences: readonly GoldenDifference[];
  readonly drift: readonly GoldenDrift[];
}

/** The sum over all ops. */
export function totals(report: GoldenReport): OpTally {
  const sum: OpTally = { passed: 0, failed: 0, notRun: 0, ties: 0 };
  for (const tally of Object.values(report.ops)) {
    for (const key of ["passed", "failed", "notRun", "ties"] as const) sum[key] += tally[key];
  }
  return sum;
}

/** True when at least one case ran and none failed: a check that compared nothing has not passed. */
export function isPassed(report: GoldenReport): boolean {
  const { passed, failed } = totals(report);
  return passed > 0 && failed === 0;
}
