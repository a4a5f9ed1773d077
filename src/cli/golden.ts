/** `halfbyte golden check` and `halfbyte golden write`. */
import { type Command, Option } from "commander";
import type { DeviceChoice } from "../backend/devices.js";
import { checkGolden } from "../golden/check.js";
import { type GoldenFailure, type GoldenReport, isPassed, type OpTally, totals } from "../golden/report.js";
import { writeGolden } from "../golden/write.js";
import { deviceOption, integer, jsonOption } from "./options.js";
import { EXIT_FAILURE, formatBytes, print, printJson } from "./output.js";
import { interruptible } from "./signals.js";

interface CheckOptions {
  readonly device?: DeviceChoice;
  readonly case?: string;
  readonly json?: boolean;
}

interface WriteOptions {
  readonly seed: number;
  readonly force?: boolean;
  readonly json?: boolean;
}

export function registerGolden(program: Command): void {
  const golden = program
    .command("golden")
    .description("results of other implementations to compare with, and our own for them");
  const check = golden
    .command("check")
    .description("run every golden file; exit 1 on a mismatch that is not a proven tie, or when nothing was run")
    .argument("<DIR>", "folder with golden .safetensors files")
    .option("--case <FILE:INDEX>", "run one case only")
    .action(runCheck);
  const write = golden
    .command("write")
    .description("write golden vectors of the cpu reference")
    .argument("<DIR>", "folder for the file; made if it is not there")
    .addOption(
      new Option("--seed <N>", "the same seed gives the same bytes")
        .argParser(integer(0, Number.MAX_SAFE_INTEGER))
        .makeOptionMandatory(),
    )
    .option("--force", "overwrite vectors that come from elsewhere")
    .action(runWrite);
  jsonOption(deviceOption(check));
  jsonOption(write);
}

async function runCheck(dir: string, { device, case: only, json = false }: CheckOptions): Promise<void> {
  const onOp = (op: string, tally: Readonly<OpTally>): void => print(formatOp(op, tally));
  const report = await interruptible((signal) =>
    checkGolden(dir, { device, only, signal, onOp: json ? undefined : onOp }),
  );
  if (json) printJson(report);
  else print(formatFindings(report, dir, device));
  if (!isPassed(report)) process.exitCode = EXIT_FAILURE;
}

async function runWrite(dir: string, { seed, force, json = false }: WriteOptions): Promise<void> {
  const written = await interruptible((signal) => writeGolden(dir, { seed, force, signal }));
  if (json) printJson(written);
  else {
    print(`${written.path}: ${written.cases} cases, ${formatBytes(written.bytes)}`);
    print(`next: halfbyte golden check ${shellWord(dir)}`);
  }
}

/** `quantize_4bit          144 passed    0 failed    0 not run   14 ties` */
function formatOp(op: string, { passed, failed, notRun, ties }: Readonly<OpTally>): string {
  const count = (n: number, what: string): string => `${String(n).padStart(5)} ${what}`;
  const counts = [count(passed, "passed"), count(failed, "failed"), count(notRun, "not run"), count(ties, "ties")];
  return `${op.padEnd(22)}${counts.join("")}`;
}

/** Everything after the table: the gaps, the mismatches, the verdict. */
function formatFindings(report: GoldenReport, dir: string, device: DeviceChoice | undefined): string {
  const lines: string[] = [];
  for (const { op, cases, reason } of report.notRun) {
    lines.push(`not run: ${op}, ${cases} ${cases === 1 ? "case" : "cases"}: ${reason}`);
  }
  for (const { op, cases, rule } of report.differences) {
    lines.push(`known difference: ${op}, ${cases} ${cases === 1 ? "case" : "cases"}: ${rule}`);
  }
  for (const { op, what, cases, worst, at } of report.drift) {
    lines.push(`not judged: ${op}, ${what} drift by up to ${worst.toExponential(1)} (${at}, of ${cases})`);
  }
  let last = "";
  for (const failure of report.failures) {
    const id = `${failure.file}:${failure.case}`;
    if (id !== last) {
      const option = device === undefined ? "" : ` --device ${device}`;
      lines.push("", `${failure.op} ${id}`);
      lines.push(`  rerun: halfbyte golden check ${shellWord(dir)}${option} --case ${shellWord(id)}`);
      last = id;
    }
    lines.push(...formatFailure(failure).map((line) => `  ${line}`));
  }
  const { passed, failed, notRun, ties } = totals(report);
  const verdict = isPassed(report) ? "passed" : passed + failed === 0 ? "FAILED: no case was run" : "FAILED";
  lines.push("", `${verdict}: ${passed} passed, ${failed} failed, ${notRun} not run, ${ties} ties proved`);
  return lines.join("\n");
}

function formatFailure({ field, tensor, problem, worst }: GoldenFailure): string[] {
  const about = field === null ? "" : tensor === null ? `${field}: ` : `${field} (${tensor}): `;
  const lines = [`${about}${problem}`];
  if (worst) {
    const bits = worst.expectedBits ? `, ${worst.expectedBits} and ${worst.gotBits}, ${worst.ulps} ulp apart` : "";
    const scaled =
      worst.scaled === undefined ? "" : `, value ${worst.value} / absmax ${worst.absmax} = ${worst.scaled}`;
    lines.push(`  worst at ${worst.index}: expected ${worst.expected}, got ${worst.got}${bits}${scaled}`);
  }
  return lines;
}

/** A word as a shell takes it back. */
function shellWord(text: string): string {
  return /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
}
