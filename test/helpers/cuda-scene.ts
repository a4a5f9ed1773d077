/** A stage for the cuda backend without a GPU: the fake driver, images that it takes for kernels, a cache of its own. */
import { createHash } from "node:crypto";
import { existsSync, mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import type { CudaDevice } from "#halfbyte/backend/cuda/device.js";
import { addonPath } from "#halfbyte/backend/cuda/load.js";
import { writeCache } from "#halfbyte/backend/cuda/probe-cache.js";
import { KERNEL_FAMILY } from "#halfbyte/core/kernels.js";
import { fakeCuda } from "./fake-cuda.js";

const addon = addonPath();
const library = fakeCuda();

/** Why there is no stage, for titles of skipped tests; "" when there is one. */
export const NO_SCENE = !existsSync(addon)
  ? " (skipped: the addon is not built: npm run build:addon)"
  : library === undefined
    ? " (skipped: there is no fake driver)"
    : "";

/** The device of the fake driver. */
export const FAKE_ORIN: CudaDevice = {
  ordinal: 0,
  name: "Fake Orin",
  uuid: "0".repeat(32),
  architecture: 87,
  multiprocessors: 8,
  sharedBytesPerBlock: 166_912,
  totalBytes: 2 ** 33,
  integrated: true,
  driverVersion: 13000,
  managedMemory: true,
  concurrentManagedAccess: false,
  memoryPools: true,
};

export interface Scene {
  /** For a process that is to use the fake driver. */
  readonly env: Record<string, string>;
  readonly kernels: string;
  readonly library: string;
  /** Makes the next process with `env` believe that a probe has succeeded. */
  rememberSuccess(): void;
}

export interface SceneImage {
  readonly kind: "cubin" | "ptx";
  readonly architecture: number;
}

/** @param folder a temporary folder for all of it */
export function cudaScene(folder: string, image: SceneImage = { kind: "ptx", architecture: 80 }): Scene {
  const kernels = join(folder, "kernels");
  mkdirSync(kernels, { recursive: true });
  const text = "fake";
  const sha256 = createHash("sha256").update(text).digest("hex");
  const images = [...new Set(Object.values(KERNEL_FAMILY))].map((family) => {
    const file = `${family}.${image.kind}`;
    writeFileSync(join(kernels, file), text);
    return { ...image, family, file, compiler: "none 11.8", cuda: 11080, options: [], sha256, bytes: text.length };
  });
  writeFileSync(join(kernels, "manifest.json"), JSON.stringify({ format: 1, sources: "0".repeat(64), images }));
  const cache = join(folder, "cache");
  const env = { HALFBYTE_CUDA_LIBRARY: library!, HALFBYTE_KERNELS: kernels, XDG_CACHE_HOME: cache };
  return {
    env,
    kernels,
    library: library!,
    rememberSuccess() {
      const before = process.env.XDG_CACHE_HOME;
      process.env.XDG_CACHE_HOME = cache;
      try {
        const success = { ok: true, device: FAKE_ORIN, images: [], milliseconds: 1 } as const;
        writeCache({ device: 0, kernels, library, addon }, library!, success);
      } finally {
        if (before === undefined) delete process.env.XDG_CACHE_HOME;
        else process.env.XDG_CACHE_HOME = before;
      }
    },
  };
}
