/** `halfbyte inspect`. */
import type { Command } from "commander";
import { type InspectedTensor, inspectModel, type ModelInspection } from "../checkpoint/inspect.js";
import { jsonOption } from "./options.js";
import { fields, formatBytes, formatCount, formatDims, print, printJson, table } from "./output.js";

export function registerInspect(program: Command): void {
  const command = program
    .command("inspect")
    .description("list a model's tensors: dtypes, shapes, quantization, sizes on disk and in memory")
    .argument("<PATH>", "a Hugging Face folder or a .gguf file")
    .action(async (path: string, { json = false }: { json?: boolean }) => {
      const model = await inspectModel(path);
      if (json) printJson(model);
      else print(describe(model));
    });
  jsonOption(command);
}

function describe(model: ModelInspection): string {
  // Files hold wide elements first; people look for layers.
  const sorted = [...model.tensors].sort((a, b) => a.name.localeCompare(b.name, "en", { numeric: true }));
  const rows = sorted.map((tensor) => [
    tensor.name,
    formatDims(tensor.shape),
    storage(tensor),
    tensor.bitsPerWeight.toFixed(2),
    formatBytes(tensor.diskBytes),
    formatBytes(tensor.memoryBytes),
  ]);
  const tensors = table(
    [
      { title: "tensor" },
      { title: "shape", align: "right" },
      { title: "stored as" },
      { title: "bits", align: "right" },
      { title: "on disk", align: "right" },
      { title: "in memory", align: "right" },
    ],
    rows,
  );
  return `${tensors}\n\n${fields(totals(model))}`;
}

function totals(model: ModelInspection): [string, string][] {
  const kinds = new Map<string, { count: number; parameters: number }>();
  for (const { stored, parameters } of model.tensors) {
    const kind = kinds.get(stored) ?? { count: 0, parameters: 0 };
    kinds.set(stored, { count: kind.count + 1, parameters: kind.parameters + parameters });
  }
  const mixture = [...kinds].map(([stored, k]) => `${k.count} ${stored} (${formatCount(k.parameters)})`).join(", ");
  const architecture = model.architecture ?? model.modelType ?? "unknown architecture";
  return [
    ["model", `${model.path} (${model.kind}, ${architecture})`],
    ["tensors", `${model.tensors.length}: ${mixture}`],
    ["quantization", model.kind === "gguf" ? "GGUF's own types" : quantization(model.quantization)],
    ["weights", `${formatCount(model.parameters)}, ${model.bitsPerWeight.toFixed(2)} bits each`],
    ["on disk", formatBytes(model.diskBytes)],
    ["in memory", `${formatBytes(model.memoryBytes)} as transformers loads it`],
    ["other files", model.sidecars.length === 0 ? "none" : model.sidecars.join(", ")],
    ...model.notes.map((note): [string, string] => ["note", note]),
  ];
}

function storage({ stored, blocksize, doubleQuant }: InspectedTensor): string {
  if (blocksize === undefined) return stored;
  return `${stored}/${blocksize}${doubleQuant ? " nested" : ""}`;
}

function quantization(config: ModelInspection["quantization"]): string {
  if (config === null) return "none in config.json";
  if ("method" in config) return `${config.method} (not of bitsandbytes: tensors are listed as they are stored)`;
  const { type, computeDType, doubleQuant, skipModules } = config;
  const kept = skipModules && skipModules.length > 0 ? `, skips ${skipModules.join(", ")}` : "";
  if (type === "int8") return `bitsandbytes int8${kept}`;
  return `bitsandbytes ${type}${doubleQuant ? ", double quantization" : ""}, computes in ${computeDType}${kept}`;
}
