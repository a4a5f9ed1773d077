/** The command from outside: `node dist/cli/main.js`, as users run it. */
import { type ChildProcess, spawn } from "node:child_process";
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";

export const MAIN = fileURLToPath(new URL("../../dist/cli/main.js", import.meta.url));

export interface Outcome {
  readonly code: number | null;
  readonly stdout: string;
  readonly stderr: string;
}

export interface RunOptions {
  readonly env?: Record<string, string>;
  /** A shell's words before `node`, as `ulimit -f 100;`. */
  readonly prelude?: string;
  /** Options of Node itself. */
  readonly node?: readonly string[];
  /** Called once the process runs. */
  readonly onStart?: (child: ChildProcess) => void;
}

/** Runs `halfbyte` with these arguments; nothing is a terminal. */
export function halfbyte(
  args: readonly string[],
  { env = {}, prelude, node = [], onStart }: RunOptions = {},
): Promise<Outcome> {
  const command = prelude === undefined ? process.execPath : "bash";
  const words =
    prelude === undefined
      ? [...node, MAIN, ...args]
      : ["-c", `${prelude} exec "$@"`, "-", process.execPath, ...node, MAIN, ...args];
  const child = spawn(command, words, { env: { ...process.env, ...env }, stdio: ["ignore", "pipe", "pipe"] });
  let stdout = "";
  let stderr = "";
  child.stdout.setEncoding("utf8").on("data", (text: string) => {
    stdout += text;
  });
  child.stderr.setEncoding("utf8").on("data", (text: string) => {
    stderr += text;
  });
  onStart?.(child);
  return new Promise((resolve, reject) => {
    child.on("error", reject);
    child.on("close", (code) => resolve({ code, stdout, stderr }));
  });
}

/** The one JSON object that `--json` prints; anything else on stdout is an error. */
export function parseOnly(stdout: string): Record<string, unknown> {
  if (!/^\{[^\n]*\}\n$/.test(stdout)) throw new Error(`not exactly one JSON object on one line: ${stdout}`);
  return JSON.parse(stdout) as Record<string, unknown>;
}

/** Names in a folder, hidden ones too. */
export function listing(folder: string): string[] {
  return existsSync(folder) ? readdirSync(folder).sort() : [];
}

/** Every file of a folder by name. */
export function contents(folder: string): Map<string, Buffer> {
  return new Map(listing(folder).map((file) => [file, readFileSync(join(folder, file))]));
}

/** Resolves when `condition` holds. */
export async function until(condition: () => boolean, seconds = 30): Promise<void> {
  const end = Date.now() + 1000 * seconds;
  while (!condition()) {
    if (Date.now() > end) throw new Error("waited too long");
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
}
