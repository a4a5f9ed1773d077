/** The backends a test runs on. One that is not there is skipped with its reason in the output, never silently. */

import { expect } from "vitest";
import { CpuBackend, type CpuOptions } from "#halfbyte/backend/cpu/backend.js";
import { CudaBackend } from "#halfbyte/backend/cuda/backend.js";
import { cudaMissing } from "#halfbyte/backend/devices.js";
import type { Backend, DeviceName } from "#halfbyte/core/backend.js";
import { liveTensors } from "#halfbyte/core/tensor.js";

export const DEVICES: readonly { readonly device: DeviceName; readonly missing: string | undefined }[] = [
  { device: "cpu", missing: undefined },
  { device: "cuda", missing: cudaMissing() },
];

/** What both backends are with guards on. */
export interface GuardedBackend extends Backend {
  /** @throws Error naming the first overrun */
  checkGuards(): void;
}

/** A backend of its own with guards round every allocation. */
export function makeBackend(device: DeviceName): GuardedBackend {
  return device === "cpu" ? new CpuBackend({ threads: 2, guards: true }) : new CudaBackend({ guards: true });
}

/** Runs `body` with a backend of its own that has guards round every allocation; then nothing may have leaked or overrun. */
export async function withBackend(
  options: CpuOptions,
  body: (backend: CpuBackend) => Promise<void> | void,
): Promise<void> {
  const backend = new CpuBackend({ threads: 2, guards: true, ...options });
  try {
    await body(backend);
    expectNothingLeft(backend);
  } finally {
    await backend.close();
  }
}

/** Nothing may have leaked or overrun, as far as a backend that still works can say. */
export function expectNothingLeft(backend: GuardedBackend): void {
  if (backend.state !== "ready") return;
  backend.checkGuards();
  expect(liveTensors(backend), "live tensors").toBe(0);
  expect(backend.memory().bytes, "bytes held").toBe(0);
}
