/**
 * The program that `probeCuda` starts: takes the device, runs kernels, checks their numbers, says on a descriptor of its own what
 * it does and what it found. Argument: a JSON object with the device's ordinal and the folder with kernels, and the library
 * where that is not the usual one.
 */
import { writeSync } from "node:fs";
import { basename } from "node:path";
import { CudaBackend } from "../backend/cuda/backend.js";
import { findDevice, openDriver } from "../backend/cuda/device.js";
import { listImages, selectImage } from "../backend/cuda/images.js";
import { type ChildResult, PROBE_FD, type ProbeMessage, type ProbeRequest } from "../backend/cuda/probe.js";
import { readSystemFile } from "../backend/system.js";
import {
  ArgumentError,
  CudaError,
  CudaUnavailableError,
  FormatError,
  NoKernelImageError,
  OutOfMemoryError,
} from "../core/errors.js";
import { selfCheck } from "./selfcheck.js";

/** Some blocks and the beginning of another; odd. Enough for several thread blocks of every kernel. */
const ELEMENTS = 3 * 4096 + 64 + 37;

/** What the driver says of code that it cannot load: CUDA_ERROR_INVALID_IMAGE, NO_BINARY_FOR_GPU, INVALID_PTX, UNSUPPORTED_PTX_VERSION. */
const NOT_FOR_THIS_GPU = [200, 209, 218, 222];

const say = (message: ProbeMessage): void => void writeSync(PROBE_FD, `${JSON.stringify(message)}\n`);

let device: ReturnType<typeof findDevice> | undefined;

async function probe({ device: ordinal, kernels, library }: ProbeRequest): Promise<ChildResult> {
  say({ at: "the driver was opened" });
  const driver = openDriver(library);
  device = findDevice(driver, ordinal);
  say({ at: "the device was taken" });
  const backend = new CudaBackend({ device: ordinal, kernels, ...(library === undefined ? {} : { library }) });
  const families = [...new Set(listImages(kernels).map(({ family }) => family))];
  const { architecture, driverVersion } = device;
  const images = families.map((family) => selectImage(kernels, family, architecture, driverVersion).description);
  say({ at: "kernels were run" });
  const { elements, wrong } = await selfCheck(backend, ELEMENTS);
  say({ at: "the device was given back" });
  await backend.close();
  if (wrong === undefined) return { ok: true, device, images, library: loadedLibrary(driver.library) };
  return {
    ok: false,
    reason: "probe-mismatch",
    detail: `${device.name} (sm_${device.architecture}) computes wrong numbers: of NF4 of ${elements} elements ${wrong}`,
    advice: "Do not trust this GPU with this driver; report it with the output of halfbyte doctor --json.",
    device,
  };
}

function refusal(error: unknown): ChildResult {
  const found = device && { device };
  if (error instanceof CudaUnavailableError) {
    const { reason, detail, advice } = error;
    const available = error instanceof NoKernelImageError && { available: error.available };
    return { ok: false, reason, detail, advice, ...found, ...available };
  }
  if (error instanceof OutOfMemoryError) {
    const detail = `out of memory: ${error.requestedBytes} bytes requested, ${error.freeBytes} of ${error.limitBytes} bytes free`;
    const advice = "End what else holds the GPU's memory; on a Jetson that is the memory of the whole system.";
    return { ok: false, reason: "driver-error", detail, advice, ...found };
  }
  const detail = (error instanceof Error ? error.message : String(error)).replace(/\.$/, "");
  if (error instanceof ArgumentError) {
    return { ok: false, reason: "no-device", detail, advice: "Pass the number of a GPU that is there.", ...found };
  }
  if (error instanceof FormatError) {
    const advice = "Install halfbyte again, or in a clone run npm run build:kernels.";
    return { ok: false, reason: "no-kernel-image", detail, advice, ...found };
  }
  if (error instanceof CudaError && NOT_FOR_THIS_GPU.includes(error.status)) {
    const advice =
      "Update the driver, or build the kernels for this GPU (npm run build:kernels in halfbyte's sources).";
    return { ok: false, reason: "no-kernel-image", detail, advice, ...found };
  }
  const advice = "See whether the GPU has memory left and works otherwise (dmesg, tegrastats or nvidia-smi).";
  return { ok: false, reason: "driver-error", detail, advice, ...found };
}

/** The file behind the library's name, as it is mapped into this process. */
function loadedLibrary(name: string): string | null {
  const stem = basename(name).replace(/\.so.*$/, ".so");
  const maps = readSystemFile("/proc/self/maps", "/", 1 << 24) ?? "";
  const files = maps.matchAll(/^\S+ \S+ \S+ \S+ \S+ +(\/.*)$/gm);
  return [...files].map(([, file]) => file!).find((file) => basename(file).startsWith(stem)) ?? null;
}

let result: ChildResult;
try {
  result = await probe(JSON.parse(process.argv[2]!) as ProbeRequest);
} catch (error) {
  result = refusal(error);
}
say(result);
// Whatever the driver has left running: its own exit handlers are the last thing that is tried.
process.exit(0);
