/**
 * Random launches, reads, writes, disposals and growth on a backend's stream, every read checked: `npm run soak -- --seconds 60`.
 * Exit 1 when a byte is wrong or the stream fails. Options: --seconds N (of each), --threads 1,2,4, --seed N, --device cuda
 */
import { parseArgs } from "node:util";
import { CpuBackend } from "#halfbyte/backend/cpu/backend.js";
import { CudaBackend } from "#halfbyte/backend/cuda/backend.js";
import type { Backend } from "#halfbyte/core/backend.js";
import { Tensor } from "#halfbyte/core/tensor.js";

const { values: options } = parseArgs({
  options: {
    seconds: { type: "string", default: "20" },
    threads: { type: "string", default: "1,2,4" },
    device: { type: "string", default: "cpu" },
    seed: { type: "string", default: String(Date.now() % 1e6) },
  },
});

const SIZES = [64, 4096, 70_000, 300_000, 3_000_000];

interface Buffer {
  readonly tensor: Tensor<"u8">;
  /** What every byte of it is, after all that has been launched. */
  value: number;
}

/** @param threads of the cpu; 0 is the GPU */
async function soak(threads: number, seconds: number, seed: number): Promise<number> {
  let state = seed >>> 0;
  const below = (n: number): number => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return Math.floor((state / 2 ** 32) * n);
  };
  const backend: Backend = threads === 0 ? new CudaBackend() : new CpuBackend({ threads });
  const buffers: Buffer[] = SIZES.map((n) => ({ tensor: Tensor.allocate(backend, "u8", [n]), value: 0 }));
  for (const { tensor } of buffers) backend.launch("fill", { dst: tensor, bytes: tensor.size, value: 0 });
  const pending: Promise<void>[] = [];
  let commands = 0;
  let reads = 0;
  let wrong = 0;
  const check = (data: Uint8Array, value: number): void => {
    reads++;
    if (data.some((byte) => byte !== value)) wrong++;
  };

  const launch = (): void => {
    commands++;
    const target = buffers[below(SIZES.length)]!;
    const other = buffers[below(SIZES.length)]!;
    const bytes = target.tensor.size;
    const kind = below(4);
    if (kind < 2) {
      target.value = below(256);
      const value = Math.imul(target.value, 0x01010101) >>> 0;
      backend.launch("fill", { dst: target.tensor, bytes, value });
    } else if (kind === 2 && bytes <= other.tensor.size) {
      target.value = other.value;
      if (target !== other) backend.launch("copy", { src: other.tensor, dst: target.tensor, bytes });
    } else {
      using copy = Tensor.allocate(backend, "u8", [bytes]);
      const { value } = target;
      backend.launch("copy", { src: target.tensor, dst: copy, bytes });
      if (below(20) === 0) pending.push(copy.data().then((data) => check(data, value)));
    }
  };

  for (const end = performance.now() + seconds * 1000; performance.now() < end; ) {
    for (let i = 1 + below(200); i > 0; i--) launch();
    const what = below(10);
    const some = buffers[below(SIZES.length)]!;
    if (what < 3) await Promise.all(pending.splice(0));
    else if (what === 3) check(some.tensor.dataSync(), some.value);
    else if (what === 4) await new Promise((resolve) => setTimeout(resolve, below(3)));
    else if (what === 5) {
      some.value = below(256);
      some.tensor.copyFrom(new Uint8Array(some.tensor.size).fill(some.value));
    }
  }
  await Promise.all(pending);
  await backend.close();
  const where = threads === 0 ? "cuda" : `${threads} workers`;
  console.log(`${where}, seed ${seed}: ${commands} commands, ${reads} reads, ${wrong} wrong`);
  return wrong;
}

let wrong = 0;
for (const threads of options.device === "cuda" ? [0] : options.threads.split(",").map(Number)) {
  wrong += await soak(threads, Number(options.seconds), Number(options.seed));
}
if (wrong > 0) process.exitCode = 1;
