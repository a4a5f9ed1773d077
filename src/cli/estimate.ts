/** `halfbyte estimate`. */
import { type Command, Option } from "commander";
import { probeCuda } from "../backend/cuda/probe.js";
import { BOARDS, type Board, type BoardName, boardMemory, SYSTEM_BYTES } from "../backend/jetson.js";
import { availableMemory } from "../backend/system.js";
import {
  ESTIMATE_TYPES,
  type EstimateOptimizer,
  type EstimateType,
  estimateModel,
  KV_DTYPES,
  type KvDtype,
  LORA_TARGETS,
  type LoraTargets,
  type ModelEstimate,
  OPTIMIZERS,
} from "../checkpoint/estimate.js";
import { COMPUTE_DTYPES, type ComputeDtype } from "../checkpoint/plan.js";
import { BLOCKSIZES } from "../quant/types.js";
import { integer, jsonOption } from "./options.js";
import { EXIT_FAILURE, fields, formatBytes, formatCount, print, printJson, table } from "./output.js";
import { collectPattern } from "./quantize.js";

/** `--fits` with this word means the machine that the command runs on. */
const HERE = "here";
const TARGETS = [...(Object.keys(BOARDS) as BoardName[]), HERE] as const;
type Target = (typeof TARGETS)[number];

const MAX_CONTEXT = 2 ** 24;
const MAX_BATCH = 2 ** 16;
const MAX_RANK = 2 ** 16;

interface Options {
  readonly type?: EstimateType;
  readonly blocksize?: string;
  readonly doubleQuant?: boolean;
  readonly computeDtype?: ComputeDtype;
  readonly skip?: readonly string[];
  readonly context?: number;
  readonly batch?: number;
  readonly kvDtype?: KvDtype;
  readonly train?: boolean;
  readonly loraRank?: number;
  readonly loraTargets?: LoraTargets;
  readonly optimizer?: EstimateOptimizer;
  readonly fits?: Target;
  readonly json?: boolean;
}

/** The memory that an estimate is held against. */
interface Memory {
  readonly target: Target;
  /** `Orin Nano 8 GB`, `this machine`, a GPU's name. */
  readonly name: string;
  /** What a program can have. */
  readonly bytes: number;
  /** Of the machine or GPU. */
  readonly totalBytes: number;
  /** Where the figures come from. */
  readonly source: string;
  readonly note?: string;
}

export function registerEstimate(program: Command): void {
  const command = program
    .command("estimate")
    .description("memory that a model needs for inference or QLoRA, and whether a Jetson or this machine has it")
    .argument("<MODEL>", "a Hugging Face folder or a .gguf file; its weights are not read")
    .addOption(
      new Option("--fits <BOARD>", "exit 1 when the memory of this Jetson (or `here`) is not enough").choices(TARGETS),
    )
    .addOption(new Option("--type <TYPE>", "what weights become (default: nf4)").choices(ESTIMATE_TYPES))
    .addOption(
      new Option("--blocksize <N>", "weights that share a scale (default: 64)").choices(BLOCKSIZES.map(String)),
    )
    .option("--double-quant", "quantize the scales as well")
    .addOption(
      new Option("--compute-dtype <DTYPE>", "of products and of what is not quantized (default: bfloat16)").choices(
        COMPUTE_DTYPES,
      ),
    )
    .addOption(
      new Option("--skip <PATTERN>", "modules that are not quantized, as of quantize")
        .argParser(collectPattern)
        .default([], "none"),
    )
    .addOption(
      new Option("--context <N>", "tokens of a sequence (default: 2048, or the model's limit)").argParser(
        integer(1, MAX_CONTEXT),
      ),
    )
    .addOption(new Option("--batch <N>", "sequences at a time (default: 1)").argParser(integer(1, MAX_BATCH)))
    .addOption(new Option("--kv-dtype <DTYPE>", "of the KV cache (default: the compute dtype)").choices(KV_DTYPES))
    .option("--train", "QLoRA training instead of inference")
    .addOption(new Option("--lora-rank <R>", "with --train (default: 16)").argParser(integer(1, MAX_RANK)))
    .addOption(new Option("--lora-targets <WHICH>", "linear layers with adapters (default: all)").choices(LORA_TARGETS))
    .addOption(new Option("--optimizer <NAME>", "of the adapters (default: adam)").choices(OPTIMIZERS))
    .action(run);
  jsonOption(command);
}

async function run(model: string, options: Options, command: Command): Promise<void> {
  const { json = false, fits, blocksize, ...rest } = options;
  for (const [option, name] of [
    ["loraRank", "--lora-rank"],
    ["loraTargets", "--lora-targets"],
    ["optimizer", "--optimizer"],
  ] as const) {
    if (options[option] !== undefined && !options.train) command.error(`error: ${name} is for --train`);
  }
  const estimate = await estimateModel(model, {
    ...rest,
    blocksize: blocksize === undefined ? undefined : Number(blocksize),
  });
  const memory = fits === undefined || fits === HERE ? await thisMachine() : boardTarget(fits);
  const fitting = estimate.totalBytes <= memory.bytes;
  if (json) printJson({ ...estimate, memory: { ...memory, fits: fitting } });
  else print(describe(estimate, memory, fitting));
  if (fits !== undefined && !fitting) process.exitCode = EXIT_FAILURE;
}

function boardTarget(target: BoardName): Memory {
  const board: Board = BOARDS[target];
  const seen = board.assumed ? "assumed of it, as an Orin's" : "that Linux shows on it";
  return {
    target,
    name: board.name,
    ...boardMemory(board),
    source: `${formatBytes(boardMemory(board).totalBytes)} ${seen}, less ${formatBytes(SYSTEM_BYTES)} for a system without a desktop`,
    ...(board.note === undefined ? {} : { note: board.note }),
  };
}

/** The GPU's own memory where it has some, else what is free of the machine's. */
async function thisMachine(): Promise<Memory> {
  const probe = await probeCuda();
  if (probe.ok && !probe.device.integrated) {
    const { name, totalBytes } = probe.device;
    return { target: HERE, name, bytes: totalBytes, totalBytes, source: "all of the GPU's memory" };
  }
  const { bytes, totalBytes, source } = availableMemory();
  const from =
    source === "meminfo"
      ? "free now"
      : source === "os"
        ? "free now, as the system says"
        : `that the limit of ${source} leaves`;
  return { target: HERE, name: "this machine", bytes, totalBytes, source: `${from}, of ${formatBytes(totalBytes)}` };
}

function describe(estimate: ModelEstimate, memory: Memory, fitting: boolean): string {
  const { path, use, context, batch, parameters, quantizedParameters, type, totalBytes, parts, notes } = estimate;
  const quantized = quantizedParameters === 0 ? `in ${type}` : `${formatCount(quantizedParameters)} of them ${type}`;
  const nested = estimate.doubleQuant ? " with double quantization" : "";
  const sequences = batch === 1 ? "1 sequence" : `${batch} sequences`;
  const head = fields([
    ["model", `${path} (${formatCount(parameters)} weights, ${quantized}${nested})`],
    ["use", `${use === "training" ? "QLoRA training" : "inference"}, ${sequences} of ${context} tokens`],
  ]);
  const rows = parts.map(({ name, bytes, certainty, how }) => [name, formatBytes(bytes), certainty, how]);
  const body = table(
    [{ title: "memory" }, { title: "", align: "right" }, { title: "" }, { title: "" }],
    [...rows, ["total", formatBytes(totalBytes), "", ""]],
  );
  const difference = formatBytes(Math.abs(memory.bytes - totalBytes));
  const verdict = fitting ? `fits, ${difference} to spare` : `does not fit, ${difference} too much`;
  const tail = fields([
    [
      memory.name,
      `${formatBytes(memory.bytes)} ${memory.target === HERE ? memory.source : `for one program: ${memory.source}`}`,
    ],
    ["verdict", verdict],
    ...[...notes, ...(memory.note === undefined ? [] : [memory.note])].map((note) => ["note", note] as const),
  ]);
  return [head, body, tail].join("\n\n");
}
