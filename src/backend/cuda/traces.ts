/** Whether this machine looks as if it had an NVIDIA GPU or driver: a few looks at files, long before anything is loaded. */
import { readdirSync } from "node:fs";
import { join } from "node:path";
import { systemPathExists } from "../system.js";

/** Device files of the driver for discrete GPUs and for Jetsons. */
const DEVICE_FILE = /^(nvidiactl|nvidia\d+|nvmap|nvgpu.*|nvhost.*)$/;

/** Every WSL has this one, whatever the GPU: it is a trace of NVIDIA's only together with the library that comes from Windows. */
const WSL_DEVICE_FILE = "dxg";
const WSL_FOLDER = "/usr/lib/wsl/lib";

/**
 * Where the driver's library lies: Debian's and Red Hat's folders, containers', Jetson's, WSL's. Not cuda-compat's: CUDA's images
 * have that without any GPU, and where there is one its device files or another folder say so.
 */
const LIBRARY_FOLDERS = [
  "/usr/lib/x86_64-linux-gnu",
  "/usr/lib/aarch64-linux-gnu",
  "/usr/lib/aarch64-linux-gnu/nvidia",
  "/usr/lib/aarch64-linux-gnu/tegra",
  "/usr/lib64",
  "/usr/lib",
  "/usr/local/nvidia/lib64",
  WSL_FOLDER,
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
  const files = devices(root);
  const hasLibrary = (folder: string): boolean => systemPathExists(join(folder, LIBRARY), root);
  const gpu =
    files.some((name) => DEVICE_FILE.test(name)) || (files.includes(WSL_DEVICE_FILE) && hasLibrary(WSL_FOLDER));
  return { gpu, any: gpu || libraryFolders().some(hasLibrary) };
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
