/** One door to every kind of model. */
import { stat } from "node:fs/promises";
import { extname } from "node:path";
import { FormatError } from "../core/errors.js";
import { type GgufModelSource, openGgufModel } from "../formats/gguf-model.js";
import { openHfFolder } from "../formats/hf-folder.js";
import type { ModelSource } from "../formats/source.js";

/** A model as `openModel` gives it: `kind` tells the two apart. */
export type Model = (ModelSource & { readonly kind: "safetensors" }) | GgufModelSource;

/**
 * Opens a Hugging Face folder (config.json and safetensors) or a GGUF file. Only headers are read; close it when done.
 * @throws FormatError naming the file when it is missing or malformed, UnsupportedError for what cannot be read
 */
export async function openModel(path: string): Promise<Model> {
  const found = await stat(path).catch((cause: NodeJS.ErrnoException) => {
    const problem = cause.code === "ENOENT" ? "does not exist" : `cannot be opened: ${cause.message}`;
    throw new FormatError("checkpoint", path, problem, { cause });
  });
  if (found.isDirectory()) return (await openHfFolder(path)) as Model;
  if ([".safetensors", ".json", ".bin"].includes(extname(path))) {
    throw new FormatError("checkpoint", path, "is one file of a model: pass the folder that holds it");
  }
  return openGgufModel(path);
}
