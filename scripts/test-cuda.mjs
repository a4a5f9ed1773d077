// The whole case list on the GPU against the cpu, bit for bit, then the bad days (test/cuda), then test/cuda-record.json.
//
//   npm run test:cuda [-- OPTIONS], or node scripts/test-cuda.mjs --no-build where there is no compiler
//     --no-build       what `npm run build` and `tsc -p tsconfig.record.json` make is there
//     --filter TEXT    only the cases whose id contains it; nothing is recorded
//     --cases          only the cases; nothing is recorded
//     --bad-days       only the bad days; nothing is recorded
//     --sanitize       also compute-sanitizer: memcheck, racecheck, initcheck
//     --again          after a run of everything in which only bad days failed: just their files once more, on the same kernels and
//                      GPU; what passed is taken from build/cuda/record.failed.json
//     --rehearse       a cpu in the GPU's place, for the sake of these programs; nothing is recorded
//
// Nothing stops at the first failure. After a failure the record stays as it is, build/cuda/record.failed.json has what there
// was, and the exit code is 1.
import { spawn, spawnSync } from "node:child_process";
import { existsSync, mkdirSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { delimiter, join, resolve } from "node:path";
import { parseArgs } from "node:util";

const root = resolve(import.meta.dirname, "..");
const { values: options } = parseArgs({
  options: {
    "no-build": { type: "boolean", default: false },
    filter: { type: "string", default: "" },
    cases: { type: "boolean", default: false },
    "bad-days": { type: "boolean", default: false },
    sanitize: { type: "boolean", default: false },
    again: { type: "boolean", default: false },
    rehearse: { type: "boolean", default: false },
  },
});
const CASES = "build/test/cuda-cases.js";
const SANITIZE = "build/test/cuda-sanitize.js";
/** A case may take this long before its process is taken for hung. */
const PATIENCE_MS = 120_000;
/** Processes that may end before their last case; a GPU that fails more often than that is not worth more time. */
const MOST_DEATHS = 40;
/** Processes that share the cases of one of the sanitizer's tools. */
const SANITIZER_SHARDS = 4;
/** Failures that are printed. */
const SHOWN = 12;

process.chdir(root);
if (!options["no-build"]) {
  for (const command of ["npm run --silent build", "npx tsc -p tsconfig.record.json"]) {
    if (spawnSync(command, { shell: true, stdio: "inherit" }).status !== 0) process.exit(1);
  }
}
// The fingerprint covers them, and they are not in git.
if (!existsSync("csrc/kernels/generated")) spawnSync(process.execPath, ["scripts/generate.mjs"], { stdio: "inherit" });
const folder = join(root, "build", "cuda");
const failedRecord = join(folder, "record.failed.json");
const last = options.again ? JSON.parse(readFileSync(failedRecord, "utf8")) : undefined;
rmSync(folder, { recursive: true, force: true });
mkdirSync(folder, { recursive: true });
const { groupCases, readRecord, recordPath, ungroupCases, writeRecord } = await import(
  "../build/test/helpers/cuda-record.js"
);
const { kernelFingerprint } = await import("./kernel-sources.mjs");
const { cudaMissing } = await import("../dist/backend/devices.js");

// A driver that a rehearsal names by HALFBYTE_CUDA_LIBRARY need not compute anything.
const missing = options.rehearse ? undefined : cudaMissing();
if (missing) {
  console.error(`test:cuda needs a GPU: ${missing}`);
  process.exit(1);
}
const began = Date.now();
const seconds = (since) => ((Date.now() - since) / 1000).toFixed(1);
const failures = [];
const skipped = [];
function fail(text) {
  failures.push(text);
  if (failures.length <= SHOWN) console.log(`FAILED ${text}\n`);
  else if (failures.length === SHOWN + 1)
    console.log("... more failures: build/cuda/record.failed.json has them all\n");
}

/** Runs a program and gives its status, output and whether it had to be killed; `alive()` says when it last did something. */
function run(command, args, { env = {}, quiet = true, patience = PATIENCE_MS } = {}) {
  return new Promise((done) => {
    const child = spawn(command, args, { env: { ...process.env, ...env }, stdio: ["ignore", "pipe", "pipe"] });
    let output = "";
    let seen = Date.now();
    let hung = false;
    for (const stream of [child.stdout, child.stderr]) {
      stream.setEncoding("utf8").on("data", (text) => {
        output = (output + text).slice(-200_000);
        if (!quiet) process.stdout.write(text);
        seen = Date.now();
      });
    }
    const watch = setInterval(() => {
      if (Date.now() - seen < patience) return;
      hung = true;
      child.kill("SIGKILL");
    }, 1000);
    child.on("error", (error) => {
      output += String(error);
    });
    child.on("close", (code, signal) => {
      clearInterval(watch);
      done({ code, how: hung ? `nothing for ${patience / 1000} s` : (signal ?? `exit code ${code}`), output });
    });
  });
}

/** All cases in processes that replace each other when the device fails. Hashes by id, and what the GPU is. */
async function runCases(how, filter = options.filter) {
  const started = Date.now();
  const hashes = new Map();
  const before = failures.length;
  let about;
  let images = [];
  let from = 0;
  for (let round = 0; ; round++) {
    const file = join(folder, `cases-${how ? how.slice(2) : "alone"}-${round}.jsonl`);
    const args = [CASES, "--out", file, "--from", String(from), "--filter", filter];
    // Progress is in the file, so the program prints nothing while all is well: patience covers all of it.
    const flags = [...(how ? [how] : []), ...(options.rehearse ? ["--rehearse"] : [])];
    const { code, how: end, output } = await run(process.execPath, [...args, ...flags], { patience: 2 * PATIENCE_MS });
    const lines = existsSync(file)
      ? readFileSync(file, "utf8")
          .split("\n")
          .slice(0, -1)
          .map((line) => JSON.parse(line))
      : [];
    let open = [];
    let ended = false;
    for (const line of lines) {
      if (line.about) about = line.about;
      else if (line.ids) {
        open = line.ids;
        from = line.at + line.ids.length;
      } else if (line.end) {
        ended = true;
        images = line.images;
      } else {
        open = open.filter((id) => id !== line.id);
        if (line.failure) fail(line.failure);
        else hashes.set(line.id, line.hash);
      }
    }
    if (ended) {
      if (code !== 0) fail(`${CASES} ${flags.join(" ")}: ${end} after the last case\n${tail(output)}`);
      break;
    }
    if (open.length > 0) {
      const again = open.map((id) => `  node ${CASES} ${flags.join(" ")} --case '${id}'`);
      fail(`the process ended (${end}) with ${open.length} cases under way\n${again.join("\n")}\n${tail(output)}`);
    }
    if (open.length === 0 && code !== 3) fail(`${CASES} ${flags.join(" ")}: ${end}\n${tail(output)}`);
    if (lines.length < 2 || round === MOST_DEATHS) {
      fail(`${CASES}: given up after ${round + 1} processes at case ${from}\n${tail(output)}`);
      break;
    }
  }
  const count = hashes.size + failures.length - before;
  console.log(
    `${count} cases${how ? `, ${how.slice(2)}` : ""}: ${failures.length - before} failures (${seconds(started)} s)`,
  );
  return { hashes, about, images };
}

const isPassed = (results) => results && Object.values(results).every((result) => result === "passed");

/** What the last run found, if it was of these kernels on this GPU and only bad days failed. The GPU says so by a single case. */
async function takeUp() {
  const { about } = await runCases(undefined, "mean:f32:n=1");
  const same = ["gpu", "architecture", "driver"].every((key) => about?.[key] === last[key]);
  const others = last.failures.filter((text) => !/^[\w-]+\.test\.ts: /.test(text));
  if (last.fingerprint !== fingerprint || !same || others.length > 0 || Object.keys(last.cases).length === 0) {
    throw new Error(`--again: ${failedRecord} is of other kernels or another GPU, or more than bad days failed`);
  }
  return { hashes: ungroupCases(last.cases), about, images: last.images };
}

const tail = (text) => text.trimEnd().split("\n").slice(-15).join("\n");

/** The tests of test/cuda, each file in a process of its own. How each test ended, by file and name. */
async function runBadDays() {
  const tests = {};
  const files = readdirSync("test/cuda").filter((name) => name.endsWith(".test.ts"));
  for (const file of files.filter((name) => !last || !isPassed(last.tests[name]))) {
    const started = Date.now();
    const own = await runTestFile(file);
    const results = Object.values(own);
    const passed = results.filter((result) => result === "passed").length;
    console.log(`test/cuda/${file}: ${passed} of ${results.length} passed (${seconds(started)} s)`);
    tests[file] = own;
  }
  return tests;
}

async function runTestFile(file) {
  const report = join(folder, `${file}.json`);
  const args = ["run", `test/cuda/${file}`, "--reporter=default", "--reporter=json", `--outputFile.json=${report}`];
  const env = { HALFBYTE_TEST_CUDA: options.rehearse ? "rehearse" : "1", NO_COLOR: "1", FORCE_COLOR: undefined };
  const { how, output } = await run(process.execPath, ["node_modules/vitest/vitest.mjs", ...args], { env });
  if (!existsSync(report)) {
    fail(`vitest ${args.slice(0, 2).join(" ")}: ${how}\n${tail(output)}`);
    return {};
  }
  const own = {};
  for (const { status, message, assertionResults } of JSON.parse(readFileSync(report, "utf8")).testResults) {
    for (const { fullName, title, status: result, failureMessages, duration } of assertionResults) {
      own[title] = result;
      if (result === "failed") {
        // The report for programs has no differences between values: those are in the one for people.
        const told = output
          .split(/^ FAIL {2}/m)
          .find((part) => part.startsWith(`test/cuda/${file} > `) && part.includes(title));
        const words = (told ?? failureMessages.join("\n")).split("\n").slice(0, 40).join("\n");
        const again = `HALFBYTE_TEST_CUDA=1 npx vitest run test/cuda/${file} -t ${JSON.stringify(title)}`;
        fail(`${file}: ${fullName} (${Math.round(duration ?? 0)} ms)\n${words}\n  ${again}`);
      } else if (result !== "passed") skipped.push(`${file}: ${title}`);
    }
    if (status === "failed" && assertionResults.length === 0) fail(`${file}: ${message}`);
  }
  return own;
}

async function runSanitizer(date) {
  const home = process.env.CUDA_HOME ?? "/usr/local/cuda";
  const places = [...(process.env.PATH ?? "").split(delimiter), join(home, "bin"), join(home, "compute-sanitizer")];
  const program = places.map((place) => join(place, "compute-sanitizer")).find((path) => existsSync(path));
  if (!program) {
    fail("compute-sanitizer is not installed");
    return [];
  }
  const tools = ["memcheck", "racecheck", "initcheck"];
  return (await Promise.all(tools.map((tool) => runTool(program, tool, date)))).filter(Boolean);
}

/** What one tool says of all cases, which several processes share: it is the host that takes the time. */
async function runTool(program, tool, date) {
  const started = Date.now();
  const args = ["--tool", tool, "--error-exitcode", "9", process.execPath, SANITIZE];
  // Racecheck looks at shared memory only, where no operand can plant anything.
  if (tool !== "racecheck") {
    const planted = await run(program, [...args, "--plant", tool], { patience: 5 * PATIENCE_MS });
    if (planted.code === 0) fail(`compute-sanitizer ${tool} does not see a planted fault`);
  }
  const shards = await Promise.all(
    Array.from({ length: SANITIZER_SHARDS }, (_, shard) =>
      run(program, [...args, "--shard", `${shard}/${SANITIZER_SHARDS}`], { patience: 5 * PATIENCE_MS }),
    ),
  );
  let count = 0;
  const summaries = new Set();
  let clean = true;
  for (const [shard, { code, how, output }] of shards.entries()) {
    const summary = /(?:ERROR|RACECHECK) SUMMARY: (.*)/.exec(output)?.[1] ?? "no summary";
    const cases = /^(\d+) cases, \d+ failures$/m.exec(output);
    count += Number(cases?.[1] ?? 0);
    summaries.add(summary);
    if (code === 0) continue;
    clean = false;
    const words = cases?.[0] ?? "the program did not end";
    fail(`compute-sanitizer ${tool}, shard ${shard}: ${how}, ${summary}, ${words}\n${output.slice(0, 4000)}`);
  }
  const result = `${[...summaries].join(", ")}; ${count} cases, ${clean ? "0 failures" : "failures"}`;
  console.log(`compute-sanitizer ${tool}: ${result} (${seconds(started)} s)`);
  return clean ? { tool, result, date } : undefined;
}

const all = !options.cases && !options["bad-days"];
const date = new Date().toISOString();
const fingerprint = kernelFingerprint();
let ran = { hashes: new Map(), about: undefined, images: [] };
if (last) {
  ran = await takeUp();
} else if (all || options.cases) {
  ran = await runCases(undefined);
  if (ran.about) console.log(`${ran.about.gpu}, ${ran.about.architecture}, driver ${ran.about.driver}`);
  const again = await runCases("--pipelined");
  for (const [id, hash] of again.hashes) {
    const first = ran.hashes.get(id);
    if (first !== undefined && first !== hash) fail(`${id}: other bits when many cases run together`);
  }
  // Dense products of a library stand in for our own kernels, which other machines need.
  await runCases("--own");
}
const tests = options["bad-days"] || (all && !options.rehearse) ? { ...last?.tests, ...(await runBadDays()) } : {};
let sanitizer = options.sanitize ? await runSanitizer(date) : (last?.sanitizer ?? []);
if (!options.sanitize && !last) {
  // What the sanitizer said about these very kernels stays true.
  const path = recordPath(root);
  const recorded = existsSync(path) ? readRecord(path) : undefined;
  if (recorded?.fingerprint === fingerprint) sanitizer = recorded.sanitizer;
}
const record = {
  format: 1,
  ...(ran.about ?? { gpu: "unknown", architecture: "unknown", driver: "unknown" }),
  date,
  node: process.version,
  fingerprint,
  images: ran.images,
  tests,
  sanitizer,
  cases: groupCases(ran.hashes),
};
console.log(`${failures.length} failures, ${seconds(began)} s`);
if (failures.length > 0) {
  writeRecord(failedRecord, { ...record, failures });
  console.log(`not recorded; see ${failedRecord}`);
  process.exitCode = 1;
} else if (skipped.length > 0) {
  console.log(`nothing recorded: this GPU was not up to\n${skipped.join("\n")}`);
} else if (all && options.filter === "" && !options.rehearse) {
  writeRecord(recordPath(root), record);
  console.log(`recorded in ${recordPath(root)}`);
} else {
  console.log("nothing recorded: not everything was run on a GPU");
}
