/** Whether this machine looks as if it had an NVIDIA GPU or driver: a few looks at files, long before anything is loaded. */
import { existsSync, readdirSync } from "node:fs";
import { join } from "node:path";

/** Device files of the driver for discrete GPUs, for Jetsons, and of WSL. */
const DEVICE_FILE = /^(nvidiactl|nvidia\d+|nvmap|nvgpu.*|nvhost.*|dxg)$/;

/** Where the driver's library lies: Debian's and Red Hat's folders, containers', Jetson's, WSL's. */
const LIBRARY_FOLDERS = [
  "/usr/lib/x86_64-linux-gnu",
  "/usr/lib/aarch64-linux-gnu",
  "/usr/lib/aarch64-linux-gnu/nvidia",
  "/usr/lib/aarch64-linux-gnu/tegra",
  "/usr/lib64",
  "/usr/lib",
  "/usr/local/nvidia/lib64",
  "/usr/local/cuda/compat",
  "/usr/lib/wsl/lib",
  "/run/opengl-driver/lib",
];
const LIBRARY = "libcuda.so.1";

export interface Traces {
  /** A device file is there: whoever has it expects its GPU to be used. */
  readonly gpu: boolean;
  /** A device file or the driver's library. */
  readonly any: boolean;
}

/**
 * Looks for device files and the driver's library. No trace means that there is nothing to load; a trace promises nothing.
 * @param root stands for `/`
 */
export function findTraces(root = "/"): Traces {
  const gpu = devices(root).some((name) => DEVICE_FILE.test(name));
  return { gpu, any: gpu || libraryFolders().some((folder) => existsSync(join(root, folder, LIBRARY))) };
}

function devices(root: string): string[] {
  try {
    return readdirSync(join(root, "dev"));
  } catch {
    return [];
  }
}

function libraryFolders(): string[] {
  const own = (process.env.LD_LIBRARY_PATH ?? "").split(":").filter((folder) => folder !== "");
  return [...own, ...LIBRARY_FOLDERS];
}
