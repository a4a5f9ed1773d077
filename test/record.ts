/**
 * Prints one line per case: a hash of the bits that the cpu backend gives. Runs without a test runner, so that it can run
 * anywhere (under an emulator, say, and therefore without the large cases): two machines agree when their lines do.
 * Usage: node build/test/record.js [threads]
 */
import { CpuBackend } from "#halfbyte/backend/cpu/backend.js";
import { allCases } from "./cases/index.js";
import { outputsHash, runCase } from "./cases/run.js";

const backend = new CpuBackend({ threads: Number(process.argv[2] ?? 2) });
for (const c of allCases()) if (!c.large) console.log(`${c.id} ${outputsHash(runCase(backend, c, c.inputs()))}`);
await backend.close();
