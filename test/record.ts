/**
 * Prints one line per case: a hash of the bits that the cpu backend gives. Runs without a test runner, so that it can run
 * anywhere (under an emulator, say): two machines agree when their lines do. Usage: node build/test/record.js [threads]
 */
import { createHash } from "node:crypto";
import { CpuBackend } from "#halfbyte/backend/cpu/backend.js";
import { allCases } from "./cases/index.js";
import { runCase } from "./cases/run.js";

const backend = new CpuBackend({ threads: Number(process.argv[2] ?? 2) });
for (const c of allCases()) {
  const hash = createHash("sha256");
  for (const [name, bytes] of Object.entries(runCase(backend, c, c.inputs()))) hash.update(name).update(bytes);
  console.log(`${c.id} ${hash.digest("hex").slice(0, 16)}`);
}
await backend.close();
