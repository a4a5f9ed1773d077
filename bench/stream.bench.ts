/** The cost of the stream itself: launches in a chain, one kernel from enqueue to result, start-up. */
import { CpuBackend } from "#halfbyte/backend/cpu/backend.js";
import { Tensor } from "#halfbyte/core/tensor.js";
import { lowerQuartile } from "./harness.js";

export interface StreamResult {
  readonly name: string;
  readonly threads: number;
  readonly microseconds: number;
}

const CHAIN = 10_000;

export async function measureStream(threads: number): Promise<StreamResult[]> {
  const started = performance.now();
  const backend = new CpuBackend({ threads });
  try {
    const t = Tensor.allocate(backend, "u8", [64]);
    const tiny = (): void => backend.launch("fill", { dst: t, bytes: 64, value: 0 });
    tiny();
    await t.data();
    const startup = (performance.now() - started) * 1000;
    const chains: number[] = [];
    const reads: number[] = [];
    for (let round = 0; round < 25; round++) {
      const start = performance.now();
      for (let i = 0; i < CHAIN; i++) tiny();
      await backend.synchronize();
      if (round >= 5) chains.push(((performance.now() - start) * 1000) / CHAIN);
    }
    for (let round = 0; round < 500; round++) {
      const start = performance.now();
      tiny();
      await t.data();
      reads.push((performance.now() - start) * 1000);
    }
    return [
      { name: `launch in a chain of ${CHAIN}, warm`, threads, microseconds: lowerQuartile(chains) },
      { name: "one launch, enqueue to result", threads, microseconds: lowerQuartile(reads) },
      { name: "backend start to first result", threads, microseconds: startup },
    ];
  } finally {
    await backend.close();
  }
}
