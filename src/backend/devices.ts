/** The backends of this process: made on first use, or by `init` with options. */
import type { Backend, DeviceMemory, DeviceName } from "../core/backend.js";
import { ArgumentError, DeviceError } from "../core/errors.js";
import { liveTensors } from "../core/tensor.js";
import { CpuBackend, type CpuOptions } from "./cpu/backend.js";

/** Why `cuda` cannot be used in this version: one text for errors and `halfbyte doctor`. */
export const CUDA_MISSING = "this version of halfbyte has no cuda backend yet";

export interface InitOptions extends CpuOptions {
  /** `auto` takes the best device there is. Default `auto`. */
  readonly device?: "auto" | DeviceName;
}

const backends = new Map<DeviceName, Backend>();

/**
 * Makes the default backend with options. Without it the first tensor makes one with the defaults.
 * @throws DeviceError when the device is unknown or not available, ArgumentError when the backend exists already
 */
export async function init(options: InitOptions = {}): Promise<Backend> {
  const { device = "auto", ...cpu } = options;
  const name = resolveDevice("init", device);
  if (backends.has(name)) {
    throw new ArgumentError("init", "device", "a device that is not in use yet (call shutdown() first)", name);
  }
  const backend = new CpuBackend(cpu);
  backends.set(name, backend);
  return backend;
}

/** The backend of a device, made on first use. @throws DeviceError */
export function getBackend(device: "auto" | DeviceName = "auto"): Backend {
  const name = resolveDevice("device", device);
  let backend = backends.get(name);
  if (!backend) {
    backend = new CpuBackend();
    backends.set(name, backend);
  }
  return backend;
}

/** Closes every backend: workers stop, memory goes, tensors become unusable. The next use starts afresh. */
export async function shutdown(): Promise<void> {
  const all = [...backends.values()];
  backends.clear();
  await Promise.all(all.map((backend) => backend.close()));
}

/** Makes a backend that has failed usable again. Tensors stay; results that were not finished are undefined. */
export async function restart(device: "auto" | DeviceName = "auto"): Promise<void> {
  await getBackend(device).restart();
}

/** Memory of a device, and the tensors that are neither disposed nor collected. */
export interface MemoryReport extends DeviceMemory {
  readonly tensors: number;
}

/** What every device in use holds. */
export function memory(): Partial<Record<DeviceName, MemoryReport>> {
  return Object.fromEntries(
    [...backends].map(([name, backend]) => [name, { ...backend.memory(), tensors: liveTensors(backend) }]),
  );
}

function resolveDevice(op: string, device: string): DeviceName {
  if (device === "auto" || device === "cpu") return "cpu";
  if (device === "cuda")
    throw new DeviceError(op, "device", "a device that is available (cpu)", `cuda: ${CUDA_MISSING}`);
  throw new DeviceError(op, "device", "auto, cpu or cuda", String(device));
}
