/** Making folders without `mkdir`'s `recursive`. */
import { existsSync } from "node:fs";
import { dirname } from "node:path";

/**
 * The folders that have to be made so that `path` exists, the outermost first. One by one, because Node 20's recursive mkdir
 * never returns where the first cannot be made (below /proc, say).
 */
export function missingFolders(path: string): string[] {
  const missing: string[] = [];
  for (let folder = path; !existsSync(folder); folder = dirname(folder)) missing.unshift(folder);
  return missing;
}
