/** The driver of this process and the GPUs it knows. */
import { ArgumentError, CudaUnavailableError } from "../../core/errors.js";
import type { CudaAddon } from "./addon.js";
import { cudaVersionName } from "./images.js";
import { check, loadAddon } from "./load.js";

/** What a GPU is, as its driver says. */
export interface CudaDevice {
  /** The driver's number of it, from 0. CUDA_VISIBLE_DEVICES renumbers. */
  readonly ordinal: number;
  readonly name: string;
  /** 32 hex digits. */
  readonly uuid: string;
  /** 87 for compute capability 8.7. */
  readonly architecture: number;
  readonly multiprocessors: number;
  /** The most bytes of shared memory that a block of threads may ask for. */
  readonly sharedBytesPerBlock: number;
  readonly totalBytes: number;
  /** Shares its memory with the host, as on a Jetson. */
  readonly integrated: boolean;
  /** The CUDA version the driver was made for: 13000 for 13.0. */
  readonly driverVersion: number;
  /** Has memory whose pages the driver moves between host and GPU. */
  readonly managedMemory: boolean;
  /** Host and GPU may touch managed memory at the same time: pages then move one by one, when they are used or prefetched. */
  readonly concurrentManagedAccess: boolean;
  readonly memoryPools: boolean;
}

/** CUdevice_attribute. */
const ATTRIBUTE = {
  multiprocessors: 16,
  integrated: 18,
  capabilityMajor: 75,
  capabilityMinor: 76,
  managedMemory: 83,
  concurrentManagedAccess: 89,
  sharedBytesPerBlock: 97,
  memoryPools: 115,
} as const;

/**
 * What paged memory is on a GPU. `on demand`: managed memory, pages move when they are used or prefetched. `whole`: managed memory that
 * the driver has on the GPU as a whole when a kernel runs, so never more than the GPU has, and without prefetch (Windows, WSL).
 * `plain`: device memory.
 */
export type Paging = "on demand" | "whole" | "plain";

export function pagingOf({ integrated, managedMemory, concurrentManagedAccess }: CudaDevice): Paging {
  if (integrated || !managedMemory) return "plain";
  return concurrentManagedAccess ? "on demand" : "whole";
}

/** The same in words. */
export function describePaging(device: CudaDevice): string {
  switch (pagingOf(device)) {
    case "on demand":
      return "managed memory: its pages move between host and GPU, are prefetched, and count against the host's memory";
    case "whole":
      return "managed memory that must fit on the GPU: this driver cannot page on demand (concurrentManagedAccess is 0)";
    case "plain":
      return device.integrated
        ? "plain device memory: host and GPU share their memory, so there is nothing to page"
        : "plain device memory: this GPU has no managed memory";
  }
}

/** CUresult, as far as this backend tells them apart. */
export const CUDA_STATUS = {
  outOfMemory: 2,
  notFound: 500,
  notReady: 600,
} as const;

/** The oldest driver supported: JetPack 5's. */
export const LOWEST_DRIVER = 11040;

export interface CudaDriver {
  readonly addon: CudaAddon;
  /** The file that was asked for; "libcuda.so.1" unless another was named. */
  readonly library: string;
  /** 13000 for 13.0. */
  readonly version: number;
}

const DEFAULT_LIBRARY = "libcuda.so.1";

let opened: string | undefined;
let driver: CudaDriver | undefined;

/**
 * The driver, opened and initialised: once per process, whoever asks first.
 * @param library the driver library; default HALFBYTE_CUDA_LIBRARY, else libcuda.so.1
 * @throws CudaUnavailableError with what is missing
 */
export function openDriver(library?: string): CudaDriver {
  if (driver && library === undefined) return driver;
  const wanted = library ?? (process.env.HALFBYTE_CUDA_LIBRARY || DEFAULT_LIBRARY);
  if (opened !== undefined && opened !== wanted) {
    throw new CudaUnavailableError(
      "driver-error",
      `this process has already opened ${opened}, ${wanted} was asked for`,
      "A process opens one driver library: name it before the first use, or start another process.",
    );
  }
  if (driver) return driver;
  const addon = loadAddon();
  check(addon, "open", addon.open(wanted));
  opened = wanted;
  // Before `init`, which an old driver may refuse with less to say.
  check(addon, "driverVersion", addon.driverVersion());
  const version = addon.results[0]!;
  if (version < LOWEST_DRIVER) {
    throw new CudaUnavailableError(
      "driver-too-old",
      `the driver is for CUDA ${cudaVersionName(version)}, the oldest supported is for ${cudaVersionName(LOWEST_DRIVER)}`,
      "Update the NVIDIA driver, on a Jetson JetPack.",
    );
  }
  check(addon, "init", addon.init());
  driver = { addon, library: wanted, version };
  return driver;
}

/** The GPUs of this machine. Opens the driver. @throws CudaUnavailableError, CudaError */
export function listDevices(library?: string): CudaDevice[] {
  const from = openDriver(library);
  const { addon } = from;
  check(addon, "deviceCount", addon.deviceCount());
  const count = addon.results[0]!;
  return Array.from({ length: count }, (_, ordinal) => describeDevice(from, ordinal));
}

/**
 * One GPU.
 * @throws CudaUnavailableError when there is none, ArgumentError when there is none of this number, CudaError
 */
export function findDevice(from: CudaDriver, ordinal: number): CudaDevice {
  const { addon } = from;
  check(addon, "deviceCount", addon.deviceCount());
  const count = addon.results[0]!;
  if (count === 0) {
    throw new CudaUnavailableError(
      "no-device",
      "the driver knows no GPU",
      "Look at CUDA_VISIBLE_DEVICES: it may hide them all.",
    );
  }
  if (!Number.isInteger(ordinal) || ordinal < 0 || ordinal >= count) {
    throw new ArgumentError("cuda", "device", `the number of a GPU, 0 to ${count - 1}`, String(ordinal));
  }
  return describeDevice(from, ordinal);
}

function describeDevice({ addon, version }: CudaDriver, ordinal: number): CudaDevice {
  const identity: { name?: string; uuid?: string } = {};
  check(addon, "deviceIdentity", addon.deviceIdentity(ordinal, identity));
  const totalBytes = addon.results[0]!;
  const attribute = (name: keyof typeof ATTRIBUTE): number => {
    check(addon, "deviceAttribute", addon.deviceAttribute(ordinal, ATTRIBUTE[name]));
    return addon.results[0]!;
  };
  return {
    ordinal,
    name: identity.name ?? "",
    uuid: identity.uuid ?? "",
    architecture: attribute("capabilityMajor") * 10 + attribute("capabilityMinor"),
    multiprocessors: attribute("multiprocessors"),
    sharedBytesPerBlock: attribute("sharedBytesPerBlock"),
    totalBytes,
    integrated: attribute("integrated") !== 0,
    driverVersion: version,
    managedMemory: attribute("managedMemory") !== 0,
    concurrentManagedAccess: attribute("concurrentManagedAccess") !== 0,
    memoryPools: attribute("memoryPools") !== 0,
  };
}
