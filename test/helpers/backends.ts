/** The backends a test runs on. One that is not there is skipped with its reason in the output, never silently. */

import { expect } from "vitest";
import { CpuBackend, type CpuOptions } from "#halfbyte/backend/cpu/backend.js";
import { CUDA_MISSING } from "#halfbyte/backend/devices.js";
import type { DeviceName } from "#halfbyte/core/backend.js";
import { liveTensors } from "#halfbyte/core/tensor.js";

export const DEVICES: readonly { readonly device: DeviceName; readonly missing: string | undefined }[] = [
  { device: "cpu", missing: undefined },
  { device: "cuda", missing: CUDA_MISSING },
];

/** Runs `body` with a backend of its own that has guards round every allocation; then nothing may have leaked or overrun. */
export async function withBackend(
  options: CpuOptions,
  body: (backend: CpuBackend) => Promise<void> | void,
): Promise<void> {
  const backend = new CpuBackend({ threads: 2, guards: true, ...options });
  try {
    await body(backend);
    if (backend.state === "ready") {
      backend.checkGuards();
      expect(liveTensors(backend), "live tensors").toBe(0);
      expect(backend.memory().bytes, "bytes held").toBe(0);
    }
  } finally {
    await backend.close();
  }
}
