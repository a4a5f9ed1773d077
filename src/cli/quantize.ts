/** `halfbyte quantize`. */
import { type Command, Option } from "commander";
import {
  COMPUTE_DTYPES,
  type ComputeDtype,
  checkSettings,
  QUANTIZE_TYPES,
  type QuantizeType,
} from "../checkpoint/plan.js";
import { type QuantizeReport, quantizeModel } from "../checkpoint/quantize.js";
import { skipMatcher } from "../formats/bnb-modules.js";
import { parseSize } from "../formats/safetensors-shards.js";
import { BLOCKSIZES } from "../quant/types.js";
import { checked, type DeviceOptions, deviceOption, jsonOption, threadsOption, useDevice } from "./options.js";
import { fields, formatBytes, formatCount, formatSeconds, print, printJson } from "./output.js";
import { progressBar } from "./progress.js";
import { interruptible } from "./signals.js";

interface Options extends DeviceOptions {
  readonly type: QuantizeType;
  readonly blocksize?: string;
  readonly doubleQuant?: boolean;
  readonly computeDtype: ComputeDtype;
  readonly skip: readonly string[];
  readonly maxShardSize?: number;
  readonly force?: boolean;
  readonly json?: boolean;
}

export function registerQuantize(program: Command): void {
  const command = program
    .command("quantize")
    .description("quantize a model into a folder that transformers + bitsandbytes load")
    .argument("<SRC>", "a Hugging Face folder or a .gguf file")
    .argument("<OUT>", "the folder to make")
    .addOption(new Option("--type <TYPE>", "what weights become").choices(QUANTIZE_TYPES).default("nf4"))
    .addOption(
      new Option("--blocksize <N>", "weights that share a scale (default: 64; not for int8)").choices(
        BLOCKSIZES.map(String),
      ),
    )
    .option("--double-quant", "quantize the scales as well (not for int8)")
    .addOption(
      new Option("--compute-dtype <DTYPE>", "what weights are rounded to first, and the rest is stored in")
        .choices(COMPUTE_DTYPES)
        .default("bfloat16"),
    )
    .addOption(
      new Option("--skip <PATTERN>", "leave these modules alone: a name, the end of one, or a regular expression")
        .argParser(collectPattern)
        .default([], "none"),
    )
    .addOption(
      new Option("--max-shard-size <S>", 'bytes of weights per file, as "500MB" (default: 5GB)').argParser(
        checked((text) => parseSize(text)),
      ),
    )
    .option("--force", "replace the model in OUT if there is one")
    .action(run);
  jsonOption(threadsOption(deviceOption(command)));
}

export const collectPattern = (text: string, before: readonly string[]): readonly string[] => [
  ...before,
  checked((pattern: string) => {
    skipMatcher([pattern]);
    return pattern;
  })(text),
];

async function run(src: string, out: string, options: Options, command: Command): Promise<void> {
  const { json = false, device, threads, blocksize, force = false, ...rest } = options;
  if (options.type === "int8" && (blocksize !== undefined || options.doubleQuant)) {
    const name = blocksize !== undefined ? "--blocksize" : "--double-quant";
    command.error(`error: ${name} is not for --type int8, which has one scale per row`);
  }
  const settings = { ...rest, ...(blocksize === undefined ? {} : { blocksize: Number(blocksize) }) };
  checkSettings(settings);
  await useDevice({ device, threads });
  const bar = progressBar("quantizing", json);
  let report: QuantizeReport;
  try {
    report = await interruptible((signal) =>
      quantizeModel(src, out, { ...settings, force, signal, onProgress: (progress) => bar.update(progress) }),
    );
  } finally {
    bar.stop();
  }
  const peakMemoryBytes = 1024 * process.resourceUsage().maxRSS;
  if (json) printJson({ ...report, peakMemoryBytes });
  else print(summary(report, peakMemoryBytes));
}

function summary(report: QuantizeReport, peakMemoryBytes: number): string {
  const { source, type, parameters, quantizedParameters, quantized, kept, bytes, seconds, files } = report;
  const how = report.blocksize === undefined ? "one scale per row" : `blocks of ${report.blocksize}`;
  const nested = report.doubleQuant ? ", double quantization" : "";
  const shards = files.filter((file) => file.endsWith(".safetensors")).length;
  const keptBytes = kept.reduce((sum, tensor) => sum + tensor.bytes, 0);
  return fields([
    ["source", `${source.path} (${source.kind}, ${formatCount(parameters)} weights, ${formatBytes(source.bytes)})`],
    [
      "quantized",
      `${quantized.length} tensors, ${formatCount(quantizedParameters)} weights to ${type}, ${how}${nested}: ` +
        `${report.bitsPerWeight.toFixed(2)} bits per weight`,
    ],
    ["kept", `${kept.length} tensors in ${report.computeDtype}, ${formatBytes(keptBytes)}`],
    ["written", `${report.out} (${formatBytes(bytes)} in ${shards} ${shards === 1 ? "file" : "files"})`],
    [
      "took",
      `${formatSeconds(seconds)} (${formatCount(parameters / seconds)} weights/s), ` +
        `${formatBytes(peakMemoryBytes)} of memory at most${report.device === "cpu" ? "" : `, on ${report.device}`}`,
    ],
    ...report.notes.map((note) => ["note", note] as const),
  ]);
}
