/** `npm run bench [-- --json] [-- --peer] [-- --filter TEXT] [-- --threads 1,2] [-- --rounds N]` */
import { execFileSync } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { cpus, tmpdir } from "node:os";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { blockwiseBenches } from "./blockwise.bench.js";
import { convertBenches } from "./convert.bench.js";
import { fourbitBenches } from "./fourbit.bench.js";
import { input, measure, type Result } from "./harness.js";
import { int8Benches } from "./int8.bench.js";
import { measureStream, type StreamResult } from "./stream.bench.js";
import { sumBenches } from "./sum.bench.js";

const { values: options } = parseArgs({
  options: {
    json: { type: "boolean", default: false },
    peer: { type: "boolean", default: false },
    filter: { type: "string", default: "" },
    threads: { type: "string", default: "1,2" },
    rounds: { type: "string", default: "15" },
  },
});

/** bitsandbytes' native CPU library on the same array, one thread: milliseconds by operation (lower quartile). */
function peerTimes(): Record<string, number> {
  const folder = mkdtempSync(join(tmpdir(), "halfbyte-bench-"));
  try {
    const file = join(folder, "input.f32");
    writeFileSync(file, input());
    const python = process.env.HALFBYTE_PYTHON ?? "python3";
    const env = { ...process.env, OMP_NUM_THREADS: "1" };
    return JSON.parse(execFileSync(python, ["bench/peer.py", file], { encoding: "utf8", env })) as Record<
      string,
      number
    >;
  } finally {
    rmSync(folder, { recursive: true });
  }
}

const benches = [...blockwiseBenches, ...fourbitBenches, ...int8Benches, ...convertBenches, ...sumBenches].filter((b) =>
  b.name.includes(options.filter),
);
const threads = options.threads.split(",").map(Number);
const results: Result[] = [];
const stream: StreamResult[] = [];
for (const count of threads) {
  results.push(...(await measure(benches, count, Number(options.rounds))));
  if (!options.filter) stream.push(...(await measureStream(count)));
}
const peer = options.peer ? peerTimes() : {};
const machine = { cpu: cpus()[0]!.model.trim(), cores: cpus().length, node: process.version, arch: process.arch };

if (options.json) {
  console.log(JSON.stringify({ machine, results, stream, peer }, null, 1));
} else {
  console.log(
    `${machine.cpu}, ${machine.cores} cores, Node ${machine.node} ${machine.arch}; lower quartiles of ${options.rounds} rounds\n`,
  );
  const head = [
    "",
    ...threads.map((t) => `${t} worker${t > 1 ? "s" : ""}`),
    ...(threads.length > 1 ? ["speed-up"] : []),
  ];
  console.log(`| ${[...head, ...(options.peer ? ["bitsandbytes, 1 thread", "ours to theirs"] : [])].join(" | ")} |`);
  console.log(`|${"---|".repeat(head.length + (options.peer ? 2 : 0))}`);
  for (const name of new Set(results.map((r) => r.name))) {
    const own = results.filter((r) => r.name === name);
    const cells = own.map((r) => `${r.gelem.toFixed(2)} Gelem/s, ${(r.ofCopy * 100).toFixed(0)} % of copy`);
    const row = [name, ...cells];
    if (threads.length > 1) row.push(`${(own[0]!.milliseconds / own.at(-1)!.milliseconds).toFixed(2)}x`);
    if (options.peer) {
      const ms = own[0]!.peer === undefined ? undefined : peer[own[0]!.peer];
      const rate = ms && (own[0]!.gelem * own[0]!.milliseconds) / ms;
      row.push(rate ? `${rate.toFixed(2)} Gelem/s` : "-", rate ? `${(own[0]!.gelem / rate).toFixed(2)}x` : "-");
    }
    console.log(`| ${row.join(" | ")} |`);
  }
  if (stream.length > 0) console.log("");
  for (const { name, threads: count, microseconds } of stream) {
    console.log(`${name}, ${count} worker${count > 1 ? "s" : ""}: ${microseconds.toFixed(2)} µs`);
  }
}
