/**
 * The main job on a real model: fetches SmolLM2-135M-Instruct (Apache-2.0, as GGUF, 94 MB, once), quantizes it to NF4 and
 * says what came out. Run by `npm run demo`; `npm run demo -- --model PATH` takes any Hugging Face folder or GGUF file.
 */
import { basename, join, relative } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { quantizeModel } from "../dist/checkpoint/quantize.js";
import { fields, formatBytes, formatCount, formatPercent, formatSeconds, table } from "../dist/cli/output.js";
import { progressBar } from "../dist/cli/progress.js";
import { Interrupted, interruptible } from "../dist/cli/signals.js";
import { fetchModel } from "./fetch-model.mjs";

const ROOT = fileURLToPath(new URL("../", import.meta.url));
/** Ignored by git. */
const MODELS = join(ROOT, "models");

async function demo() {
  const { values } = parseArgs({ options: { model: { type: "string" } } });
  const src = values.model ?? (await interruptible((signal) => fetchModel(MODELS, signal)));
  const name = basename(src).replace(/(\.Q\d\w*)?\.gguf$/, "");
  const out = join(MODELS, `${name}-nf4`);

  console.log(`quantizing ${shown(src)} to NF4\n`);
  const bar = progressBar("quantizing", false);
  const report = await interruptible((signal) =>
    quantizeModel(src, out, { type: "nf4", force: true, errors: true, signal, onProgress: (p) => bar.update(p) }),
  ).finally(() => bar.stop());

  console.log(layerTable(report.quantized));
  const peak = formatBytes(1024 * process.resourceUsage().maxRSS);
  const half = formatBytes(2 * report.parameters);
  const quantizedShare = formatPercent(report.quantizedParameters / report.parameters);
  console.log(`
${fields([
  [
    "weights",
    `${formatCount(report.parameters)}, ${quantizedShare} of them quantized to ${report.bitsPerWeight.toFixed(2)} bits each`,
  ],
  ["sizes", `${formatBytes(report.source.bytes)} source, ${half} in 16 bits, ${formatBytes(report.bytes)} now`],
  ["error", `${formatPercent(report.error.relative)} of the weights' RMS, largest ${report.error.max.toPrecision(3)}`],
  [
    "time",
    `${formatSeconds(report.seconds)} (${formatCount(report.parameters / report.seconds)} weights/s), ${peak} of memory at most`,
  ],
  ["written", shown(out)],
  ...report.notes.map((note) => ["note", note]),
])}

Next: load it in transformers (pip install torch transformers accelerate bitsandbytes), from ${ROOT}

  from transformers import AutoModelForCausalLM, AutoTokenizer
  tokenizer = AutoTokenizer.from_pretrained("${shown(out)}")
  model = AutoModelForCausalLM.from_pretrained("${shown(out)}", device_map="auto")
  prompt = tokenizer("The capital of France is", return_tensors="pt").to(model.device)
  print(tokenizer.decode(model.generate(**prompt, max_new_tokens=20)[0]))

or look at it here: node dist/cli/main.js inspect ${shown(out)}`);
}

/** Relative error in percent: a line per layer, a column per matrix; the worst ten where names do not tell layers. */
function layerTable(tensors) {
  const layers = new Map();
  const modules = new Set();
  for (const { name, error } of tensors) {
    const match = /\.(?:layers|h|blocks?)\.(\d+)\.(.+)\.weight$/.exec(name);
    if (!match) continue;
    const module = match[2].split(".").at(-1);
    modules.add(module);
    if (!layers.has(match[1])) layers.set(match[1], new Map());
    layers.get(match[1]).set(module, error.relative);
  }
  const percent = (value) => (value === undefined ? "" : (100 * value).toFixed(2));
  if (layers.size === 0) {
    const worst = [...tensors].sort((a, b) => b.error.relative - a.error.relative).slice(0, 10);
    const columns = [{ title: "tensor (the worst ten)" }, { title: "relative error, %", align: "right" }];
    return table(
      columns,
      worst.map(({ name, error }) => [name, percent(error.relative)]),
    );
  }
  const columns = [{ title: "layer" }, ...[...modules].map((title) => ({ title, align: "right" }))];
  const rows = [...layers]
    .sort(([a], [b]) => a - b)
    .map(([layer, errors]) => [layer, ...[...modules].map((module) => percent(errors.get(module)))]);
  return `relative error per layer, in % (RMS of the error over RMS of the weights)\n${table(columns, rows)}`;
}

/** A path as one would type it here. */
function shown(path) {
  const short = relative(process.cwd(), path);
  return short.startsWith("..") ? path : short;
}

try {
  await demo();
} catch (error) {
  console.error(`halfbyte: ${error.message}`);
  process.exitCode = error instanceof Interrupted ? error.exitCode : 1;
}
