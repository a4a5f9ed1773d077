// Prints "passed failed skipped" of a result file: Vitest's JSON report, or an object with these counts. A run that failed
// without saying which test did counts as one failure; a run without any test as well.
import { readFileSync } from "node:fs";

const [file, status] = process.argv.slice(2);
const report = JSON.parse(readFileSync(file, "utf8"));
const passed = report.numPassedTests ?? report.passed;
const skipped = (report.numPendingTests ?? report.skipped ?? 0) + (report.numTodoTests ?? 0);
let failed = report.numFailedTests ?? report.failed;
if (failed === 0 && (status !== "0" || passed === 0)) failed = 1;
console.log(passed, failed, skipped);
