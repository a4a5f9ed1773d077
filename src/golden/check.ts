/** Runs golden files: results of other implementations, compared with what a device computes. Rules: docs/golden.md. */
import { type DeviceChoice, openBackend } from "../backend/devices.js";
import type { DeviceName } from "../core/backend.js";
import {
  ArgumentError,
  BackendError,
  DisposedError,
  HalfbyteError,
  OutOfMemoryError,
  UnsupportedError,
} from "../core/errors.js";
import { CaseRun } from "./case-run.js";
import { CaseError, closeAll, EXTENSION, type GoldenCase, type GoldenFile, openGoldenFiles } from "./cases.js";
import { checkerOf } from "./checkers.js";
import type { GoldenDifference, GoldenDrift, GoldenFailure, GoldenReport, OpTally } from "./report.js";

export interface CheckGoldenOptions {
  /** Default: as `getBackend`. */
  readonly device?: DeviceChoice | undefined;
  /** Stops between two cases. */
  readonly signal?: AbortSignal;
  /** Only one case: `FILE:INDEX`, the file with or without its extension. */
  readonly only?: string;
  /** Called when the last case of an op is done. */
  readonly onOp?: (op: string, tally: Readonly<OpTally>) => void;
}

interface Outcome extends Pick<CaseRun, "failures" | "ties" | "differences" | "drift"> {
  /** Why the case was not run, or not completely. */
  readonly notRun?: string;
}

/**
 * Runs every golden file of a folder: each `*.safetensors` whose metadata lists cases.
 *
 * Scales and decoded values must be equal bit for bit, codes as well, except at ties, which are proved and counted. A case
 * whose tensors are missing or of the wrong kind has failed; one of an unknown op, or with tensors that no check of this
 * version looks at, is not run.
 *
 * @throws FormatError (folder without golden files, malformed file), ArgumentError (`only` names no case), DeviceError,
 *   BackendError, OutOfMemoryError, and the signal's reason
 */
export async function checkGolden(dir: string, options: CheckGoldenOptions = {}): Promise<GoldenReport> {
  const { device } = await openBackend(options.device);
  const files = await openGoldenFiles(dir);
  try {
    const ops = new Map<string, OpTally>();
    const failures: GoldenFailure[] = [];
    const gaps = new Map<string, { op: string; cases: number; reason: string }>();
    const differences = new Map<string, GoldenDifference>();
    const drift = new Map<string, GoldenDrift>();
    for (const [op, cases] of byOp(selectCases(files, options.only))) {
      const tally: OpTally = { passed: 0, failed: 0, notRun: 0, ties: 0 };
      ops.set(op, tally);
      for (const case_ of cases) {
        options.signal?.throwIfAborted();
        const outcome = await runCase(case_, device);
        failures.push(...outcome.failures);
        tally.ties += outcome.ties;
        for (const rule of outcome.differences) {
          const key = JSON.stringify([op, rule]);
          differences.set(key, { op, rule, cases: (differences.get(key)?.cases ?? 0) + 1 });
        }
        for (const { what, off } of outcome.drift) {
          const key = JSON.stringify([op, what]);
          const { cases: before, ...most } = drift.get(key) ?? { op, what, cases: 0, worst: -1, at: "" };
          drift.set(key, { ...(off > most.worst ? { op, what, worst: off, at: case_.id } : most), cases: before + 1 });
        }
        if (outcome.failures.length > 0) tally.failed++;
        else if (outcome.notRun === undefined) tally.passed++;
        else {
          tally.notRun++;
          const key = JSON.stringify([op, outcome.notRun]);
          const gap = gaps.get(key) ?? { op, cases: 0, reason: outcome.notRun };
          gap.cases++;
          gaps.set(key, gap);
        }
      }
      options.onOp?.(op, tally);
    }
    return {
      ops: Object.fromEntries(ops),
      failures,
      notRun: [...gaps.values()],
      differences: [...differences.values()],
      drift: [...drift.values()],
    };
  } finally {
    await closeAll(files);
  }
}

function selectCases(files: readonly GoldenFile[], only: string | undefined): GoldenCase[] {
  const all = files.flatMap((file) => file.cases);
  if (only === undefined) return all;
  const at = only.lastIndexOf(":");
  const name = only.slice(0, Math.max(at, 0));
  const file = name.endsWith(EXTENSION) ? name : name + EXTENSION;
  const found = all.filter((case_) => case_.id === `${file}:${only.slice(at + 1)}`);
  if (found.length > 0) return found;
  const known = files.map((f) => `${f.name}:0..${f.cases.length - 1}`).join(", ");
  throw new ArgumentError("checkGolden", "case", `one of ${known}`, only);
}

function byOp(cases: readonly GoldenCase[]): Map<string, GoldenCase[]> {
  const groups = new Map<string, GoldenCase[]>();
  for (const case_ of cases) {
    const group = groups.get(case_.op);
    if (group) group.push(case_);
    else groups.set(case_.op, [case_]);
  }
  return groups;
}

async function runCase(case_: GoldenCase, device: DeviceName): Promise<Outcome> {
  const checker = checkerOf(case_.op);
  if ("missing" in checker) {
    return { failures: [], ties: 0, differences: new Set(), drift: [], notRun: checker.missing };
  }
  const run = new CaseRun(case_, device);
  let notRun: string | undefined;
  try {
    await checker(run);
    const unread = case_.unread();
    if (unread.length > 0) notRun = `no check yet for ${unread.join(", ")}`;
    else if (run.comparisons === 0) run.fail(null, "nothing in this case could be compared");
  } catch (error) {
    if (error instanceof UnsupportedError) notRun = error.message;
    else if (error instanceof CaseError) run.fail({ field: error.field, name: error.tensor }, error.problem);
    else if (isAboutTheCase(error)) run.fail(null, error.message);
    else throw error;
  } finally {
    run.dispose();
  }
  return { failures: run.failures, ties: run.ties, differences: run.differences, drift: run.drift, notRun };
}

/** Operands that an op refuses are the case's fault; a device that fails is not. */
function isAboutTheCase(error: unknown): error is HalfbyteError {
  const fatal = [BackendError, OutOfMemoryError, DisposedError].some((kind) => error instanceof kind);
  return error instanceof HalfbyteError && !fatal;
}
