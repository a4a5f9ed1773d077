/** `halfbyte compare`. */
import type { Command } from "commander";
import { type ComparedTensor, type ComparisonReport, compareModels } from "../checkpoint/compare.js";
import { type DeviceOptions, deviceOption, jsonOption, threadsOption, useDevice } from "./options.js";
import {
  EXIT_FAILURE,
  fields,
  formatCount,
  formatDims,
  formatError,
  formatPercent,
  formatSeconds,
  print,
  printJson,
  table,
} from "./output.js";
import { progressBar } from "./progress.js";
import { interruptible } from "./signals.js";

interface Options extends DeviceOptions {
  readonly json?: boolean;
}

export function registerCompare(program: Command): void {
  const command = program
    .command("compare")
    .description("error of a quantized model's weights: max, RMS, relative, bits per weight; the worst ten")
    .argument("<ORIGINAL>", "the model that was quantized: a Hugging Face folder or a .gguf file")
    .argument("<QUANTIZED>", "what became of it")
    .action(run);
  jsonOption(threadsOption(deviceOption(command)));
}

async function run(original: string, quantized: string, { device, threads, json = false }: Options): Promise<void> {
  await useDevice({ device, threads });
  const bar = progressBar("comparing", json);
  let report: ComparisonReport;
  try {
    report = await interruptible((signal) =>
      compareModels(original, quantized, { signal, onProgress: (progress) => bar.update(progress) }),
    );
  } finally {
    bar.stop();
  }
  if (json) printJson(report);
  else print(describe(report));
  // Shapes that differ are not the same model; a tied head that only one of the two stores is.
  if (report.mismatched.length > 0) process.exitCode = EXIT_FAILURE;
}

function describe(report: ComparisonReport): string {
  const { total, tensors, worst } = report;
  const byName = new Map(tensors.map((tensor) => [tensor.name, tensor]));
  const changed = tensors.filter(({ quantized }) => quantized).length;
  return [
    `the worst ${worst.length} of ${tensors.length} tensors, by relative error`,
    errorTable(worst.map((name) => byName.get(name)!)),
    "",
    fields([
      ["quantized", `${changed} tensors, ${formatCount(total.parameters)} weights`],
      ["bits per weight", total.bitsPerWeight.toFixed(2)],
      ["relative error", formatPercent(total.relative)],
      ["RMS error", formatError(total.rms)],
      ["max error", formatError(total.max)],
      ["took", formatSeconds(report.seconds)],
      ...named("only in the original", report.onlyOriginal),
      ...named("only in the quantized", report.onlyQuantized),
      ...report.mismatched.map(({ name, original, quantized }): [string, string] => [
        "shapes differ",
        `${name}: ${formatDims(original)} and ${formatDims(quantized)}`,
      ]),
    ]),
  ].join("\n");
}

function named(label: string, names: readonly string[]): [string, string][] {
  if (names.length === 0) return [];
  const more = names.length > 5 ? ` and ${names.length - 5} more` : "";
  return [[label, names.slice(0, 5).join(", ") + more]];
}

/** Errors of some tensors, a line each. */
function errorTable(tensors: readonly ComparedTensor[]): string {
  return table(
    [
      { title: "tensor" },
      { title: "shape", align: "right" },
      { title: "stored as" },
      { title: "bits", align: "right" },
      { title: "relative", align: "right" },
      { title: "RMS", align: "right" },
      { title: "max", align: "right" },
    ],
    tensors.map((tensor) => [
      tensor.name,
      formatDims(tensor.shape),
      tensor.stored,
      tensor.bitsPerWeight.toFixed(2),
      formatPercent(tensor.relative),
      formatError(tensor.rms),
      formatError(tensor.max),
    ]),
  );
}
