/** Code in a process of its own: for what a process does once (opening a driver, a warning) or does not survive. */
import { spawn } from "node:child_process";
import { fileURLToPath } from "node:url";

const ROOT = fileURLToPath(new URL("../..", import.meta.url));

export interface ScriptOutcome<T> {
  /** What `code` handed to `give`. */
  readonly given: T;
  readonly stderr: string;
  readonly milliseconds: number;
}

/**
 * Runs an ES module's text in Node; `give(value)` in it hands a value over (once, as JSON). The package is `#halfbyte/...`.
 * @param env added to the environment; undefined takes a variable out
 * @throws when it ends with anything but 0 or gives nothing
 */
export function runScript<T>(code: string, env: Record<string, string | undefined> = {}): Promise<ScriptOutcome<T>> {
  const prelude = `import { writeSync } from "node:fs"; const give = (value) => void writeSync(3, JSON.stringify(value));`;
  const started = performance.now();
  const child = spawn(process.execPath, ["--input-type=module", "-e", `${prelude}\n${code}`], {
    cwd: ROOT,
    env: { ...process.env, HALFBYTE_DEVICE: undefined, ...env },
    stdio: ["ignore", "ignore", "pipe", "pipe"],
  });
  let stderr = "";
  let given = "";
  child.stderr!.setEncoding("utf8").on("data", (text: string) => {
    stderr += text;
  });
  child.stdio[3]!.on("data", (text) => {
    given += text;
  });
  return new Promise((resolve, reject) => {
    child.on("error", reject);
    child.on("close", (status, signal) => {
      const milliseconds = performance.now() - started;
      if (status === 0 && given !== "") resolve({ given: JSON.parse(given) as T, stderr, milliseconds });
      else reject(new Error(`ended with ${signal ?? status}, gave ${given || "nothing"}: ${stderr}`));
    });
  });
}
