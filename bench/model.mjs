// The whole process: `halfbyte quantize` of a model to NF4 beside transformers + bitsandbytes doing the same, wall time and peak
// memory of each. Usage: node bench/model.mjs SRC [--peer] [--rounds N]   SRC a Hugging Face folder (a .gguf without --peer)
import { spawnSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { parseArgs } from "node:util";

const { values, positionals } = parseArgs({
  allowPositionals: true,
  options: { peer: { type: "boolean", default: false }, rounds: { type: "string", default: "3" } },
});
const [source] = positionals;
if (!source) throw new Error("usage: node bench/model.mjs SRC [--peer]");

const folder = mkdtempSync(join(tmpdir(), "halfbyte-model-"));
const usage = join(folder, "usage");
const report = `import { writeFileSync } from "node:fs"; process.on("exit", () => writeFileSync(${JSON.stringify(usage)}, String(process.resourceUsage().maxRSS)));`;

function timed(command, args) {
  const start = performance.now();
  const { status, stderr } = spawnSync(command, args, { encoding: "utf8" });
  if (status !== 0) throw new Error(`${command} failed:\n${stderr}`);
  return { seconds: (performance.now() - start) / 1000, megabytes: Number(readFileSync(usage, "utf8")) / 1024 };
}

const best = (list) => list.reduce((a, b) => (b.seconds < a.seconds ? b : a));
const show = (name, { seconds, megabytes }) =>
  console.log(`${name}: ${seconds.toFixed(2)} s, peak ${megabytes.toFixed(0)} MB`);

try {
  const ours = [];
  const theirs = [];
  for (let round = 0; round < Number(values.rounds); round++) {
    const out = join(folder, `ours-${round}`);
    const preload = `data:text/javascript,${encodeURIComponent(report)}`;
    ours.push(
      timed(process.execPath, [
        "--import",
        preload,
        "dist/cli/main.js",
        "quantize",
        source,
        out,
        "--type",
        "nf4",
        "--json",
      ]),
    );
    if (values.peer) {
      const python = process.env.HALFBYTE_PYTHON ?? "python3";
      theirs.push(timed(python, ["bench/peer_model.py", source, join(folder, `theirs-${round}`), usage]));
    }
  }
  show("halfbyte quantize --type nf4", best(ours));
  if (theirs.length > 0) {
    const [a, b] = [best(ours), best(theirs)];
    show("transformers + bitsandbytes", b);
    console.log(
      `1/${(b.seconds / a.seconds).toFixed(1)} of the time, 1/${(b.megabytes / a.megabytes).toFixed(1)} of the memory`,
    );
  }
} finally {
  rmSync(folder, { recursive: true });
}
