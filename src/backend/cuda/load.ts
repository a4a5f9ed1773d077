/** Finds and loads the native addon, and turns its statuses into errors. */
import { createRequire } from "node:module";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { isMainThread } from "node:worker_threads";
import { CudaError, type CudaUnavailableCause, CudaUnavailableError } from "../../core/errors.js";
import { systemPathExists } from "../system.js";
import { BINDING, type CudaAddon, type Status } from "./addon.js";

const PACKAGE = fileURLToPath(new URL("../../../", import.meta.url));
const ARCHITECTURES: readonly string[] = ["x64", "arm64"];

/**
 * The addon's file, or where it would be packed if there is none. What was built from source on this machine comes first.
 * @param root the package's folder
 */
export function addonPath(root = PACKAGE): string {
  const target = `linux-${process.arch}`;
  const built = join(root, "build", "addon", target, "Release", "halfbyte.node");
  return systemPathExists(built) ? built : join(root, "prebuilds", target, "halfbyte.node");
}

/**
 * The native addon's file for this machine and thread. Nothing is loaded.
 * @param root the package's folder
 * @throws CudaUnavailableError `platform`, `worker-thread` or `addon-missing`
 */
export function findAddon(root = PACKAGE): string {
  if (process.platform !== "linux" || !ARCHITECTURES.includes(process.arch)) {
    throw new CudaUnavailableError(
      "platform",
      `it needs Linux on x64 or arm64, this is ${process.platform} on ${process.arch}`,
      "Use the cpu.",
    );
  }
  if (!isMainThread) {
    throw new CudaUnavailableError(
      "worker-thread",
      "the CUDA driver is used on the main thread only, this is a worker thread",
      "Use the cpu in worker threads, or move the work to the main thread: launching does not block it.",
    );
  }
  const file = addonPath(root);
  if (!systemPathExists(file)) {
    throw new CudaUnavailableError(
      "addon-missing",
      `there is no native addon (${file})`,
      "Install the package again, or build the addon from its sources: npm run build:addon.",
    );
  }
  return file;
}

/**
 * The native addon; the driver library is not opened yet. Loading twice gives the same object.
 * @param root the package's folder
 * @throws CudaUnavailableError `platform`, `worker-thread` or `addon-missing`
 */
export function loadAddon(root = PACKAGE): CudaAddon {
  const file = findAddon(root);
  try {
    return createRequire(import.meta.url)(file) as CudaAddon;
  } catch (error) {
    const { code, message } = error as NodeJS.ErrnoException;
    const forbidden = code === "ERR_DLOPEN_DISABLED";
    throw new CudaUnavailableError(
      "platform",
      `the native addon does not load ${forbidden ? "in this process" : "on this system"} (${message.replace(/\.$/, "")})`,
      forbidden
        ? "Start Node.js without --no-addons, or with --allow-addons where it has --permission."
        : "Build it from its sources: npm run build:addon.",
    );
  }
}

/** The first calls of a driver: when one fails, there is none to be used. */
const FIRST_CALLS: Readonly<Partial<Record<keyof CudaAddon, string>>> = {
  driverVersion: "cuDriverGetVersion",
  init: "cuInit",
};

/** What they say about the machine, by CUresult. Anything else is a `driver-error`. */
const INIT_CAUSES: Readonly<Record<number, [CudaUnavailableCause, string]>> = {
  34: ["no-driver", "This is the toolkit's stub: put the driver's own libcuda.so.1 before it on the library path."],
  35: ["driver-too-old", "Update the NVIDIA driver, on a Jetson JetPack."],
  100: [
    "no-device",
    "Check that the GPU is visible (nvidia-smi, CUDA_VISIBLE_DEVICES, the container's --gpus or --runtime; on a Jetson the groups video and render).",
  ],
  803: ["driver-error", "Restart after an update of the driver, and take cuda-compat off the library path."],
  804: [
    "driver-error",
    "Take cuda-compat off the library path (LD_LIBRARY_PATH, /etc/ld.so.conf.d): not for this GPU.",
  ],
};

/**
 * Nothing for success; otherwise throws what the status means.
 * @param call the addon's function that returned it
 * @param kernel the kernel it was about
 * @throws CudaUnavailableError when the library, one of its functions or a device is missing, or the driver does not start
 * @throws CudaError else
 */
export function check(addon: CudaAddon, call: keyof CudaAddon, status: Status, kernel?: string): void {
  if (status !== 0) throw failure(addon, call, status, kernel);
}

function failure(addon: CudaAddon, call: keyof CudaAddon, status: Status, kernel: string | undefined): Error {
  const detail = addon.detail();
  const [name, words] = addon.describe(status);
  if (status === BINDING.noLibrary) {
    return new CudaUnavailableError(
      "no-driver",
      `the driver library cannot be opened (${detail})`,
      "Install the NVIDIA driver (on a Jetson it is part of JetPack; in a container, pass it in with --gpus all or --runtime nvidia).",
    );
  }
  if (status === BINDING.missingSymbol) {
    return new CudaUnavailableError(
      "driver-too-old",
      `the driver library lacks ${detail}`,
      "Update the NVIDIA driver, on a Jetson JetPack.",
    );
  }
  const first = FIRST_CALLS[call];
  if (first !== undefined && status > 0) {
    const [reason, advice] = INIT_CAUSES[status] ?? [
      "driver-error",
      "Look at dmesg and nvidia-smi; on a Jetson the user must be in the groups video and render; a restart mends a driver that was updated underneath its kernel module.",
    ];
    return new CudaUnavailableError(reason, `${first} failed with ${name} (${status}), ${words}`, advice);
  }
  return new CudaError(call, status, name, detail ? `${words}: ${detail}` : words, kernel);
}
