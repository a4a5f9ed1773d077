/**
 * Compiles asm/ to dist/backend/cpu/kernels.wasm. `--text` writes the module as text beside it, for inspection.
 */
import { existsSync, mkdirSync } from "node:fs";
import { fileURLToPath } from "node:url";
import asc from "assemblyscript/asc";

const ROOT = fileURLToPath(new URL("..", import.meta.url));
const OUT = "dist/backend/cpu/kernels.wasm";
const LAYOUT = new URL("../dist/backend/cpu/layout.js", import.meta.url);

/** The module's constants lie above the backend's control words. */
const { ASM_MEMORY_BASE = 1 << 20 } = existsSync(LAYOUT) ? await import(LAYOUT.href) : {};
/** The memory is imported; these only have to admit whatever the backend makes (64 KiB pages). */
const PAGES = "65536";

const args = ["asm/index.ts", "--baseDir", ROOT, "--outFile", OUT];
if (process.argv.includes("--text")) args.push("--textFile", OUT.replace(/wasm$/, "wat"));
args.push("-O3", "--noAssert", "--runtime", "stub", "--enable", "simd,threads,bulk-memory");
args.push("--importMemory", "--sharedMemory", "--initialMemory", "16", "--maximumMemory", PAGES);
args.push("--memoryBase", String(ASM_MEMORY_BASE));
// "Exchange of v128 values": between our own files only.
args.push("--disableWarning", "112");

mkdirSync(new URL("../dist/backend/cpu/", import.meta.url), { recursive: true });
const { error, stdout, stderr } = await asc.main(args);
process.stdout.write(stdout.toString());
process.stderr.write(stderr.toString());
if (error) {
  console.error(error.message);
  process.exit(1);
}
