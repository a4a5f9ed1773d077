/** The addon and the fake driver, compiled with a sanitizer of g++, for tests that run Node.js with both. */
import { execFileSync, spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import { existsSync, mkdirSync, readdirSync, readFileSync, renameSync } from "node:fs";
import { dirname, isAbsolute, join } from "node:path";

const ROOT = join(import.meta.dirname, "../..");
const DRIVER = join(import.meta.dirname, "fake-cuda");
const ADDON = join(ROOT, "csrc/addon");
const HEADERS = join(ROOT, "node_modules/node-api-headers/include");
const FLAGS = ["-std=c++17", "-O1", "-g", "-fPIC", "-shared", "-pthread", "-fno-omit-frame-pointer"];

/** What g++ is told, and the libraries that must be in the process before everything else. */
const KINDS = {
  thread: { flags: ["-fsanitize=thread"], libraries: ["libtsan.so"] },
  address: { flags: ["-fsanitize=address,undefined"], libraries: ["libasan.so", "libubsan.so"] },
} as const;
export type Sanitizer = keyof typeof KINDS;

export interface Sanitized {
  /** For `loadAddon`. */
  readonly root: string;
  readonly library: string;
  /** How Node.js is started: ThreadSanitizer does not get on with random addresses. */
  readonly command: readonly [string, ...string[]];
  readonly env: Readonly<Record<string, string>>;
}

const COMMAND = ["setarch", "-R", process.execPath] as const;

function environment(kind: Sanitizer): Record<string, string> {
  return {
    LD_PRELOAD: preloads(kind).join(" "),
    // Node.js itself is not instrumented: what it does without locks that are known is nothing to report, nor what it keeps.
    TSAN_OPTIONS: "ignore_noninstrumented_modules=1",
    ASAN_OPTIONS: "detect_leaks=0",
    UBSAN_OPTIONS: "print_stacktrace=1 halt_on_error=1",
  };
}

const preloads = (kind: Sanitizer): string[] =>
  KINDS[kind].libraries.map((name) => execFileSync("g++", [`-print-file-name=${name}`], { encoding: "utf8" }).trim());

/** Why a sanitizer cannot be used here, for titles of skipped tests; "" when it can. */
export function sanitizerMissing(kind: Sanitizer): string {
  if (process.platform !== "linux" || spawnSync("g++", ["--version"]).status !== 0) return "it needs Linux and g++";
  if (!existsSync(join(ADDON, "generated/abi.h"))) return "the addon is not built (npm run build:addon)";
  const { libraries } = KINDS[kind];
  if (!preloads(kind).every(isAbsolute)) return `g++ comes without ${libraries.join(" and ")}`;
  const [command, ...args] = COMMAND;
  const tried = spawnSync(command, [...args, "-e", ""], { env: { ...process.env, ...environment(kind) } });
  return tried.status === 0 ? "" : `Node.js does not start with ${libraries[0]} (${tried.error ?? tried.stderr})`;
}

/** Builds both, once for the same sources. */
export function sanitizedAddon(kind: Sanitizer): Sanitized {
  const flags = [...FLAGS, ...KINDS[kind].flags];
  const [addon, driver] = [ADDON, DRIVER].map((folder) =>
    readdirSync(folder, { recursive: true, encoding: "utf8" })
      .filter((file) => /\.(cc|h)$/.test(file))
      .sort()
      .map((file) => join(folder, file)),
  ) as [string[], string[]];
  const hash = createHash("sha256").update([...flags, process.arch].join(" "));
  for (const source of [...addon, ...driver]) hash.update(readFileSync(source));
  const root = join(ROOT, "build/sanitized", `${kind}-${hash.digest("hex").slice(0, 16)}`);
  const library = join(root, "libcuda.so.1");
  build(library, driver, flags);
  const file = join(root, "build/addon", `linux-${process.arch}`, "Release/halfbyte.node");
  build(file, addon, [...flags, "-fvisibility=hidden", "-isystem", HEADERS]);
  return { root, library, command: COMMAND, env: environment(kind) };
}

function build(file: string, sources: readonly string[], flags: readonly string[]): void {
  if (existsSync(file)) return;
  mkdirSync(dirname(file), { recursive: true });
  const part = `${file}.${process.pid}`;
  const units = sources.filter((source) => source.endsWith(".cc"));
  execFileSync("g++", [...flags, ...units, "-o", part], { stdio: ["ignore", "inherit", "inherit"] });
  renameSync(part, file);
}
