/** The backends of this process: made on first use, or by `init` with options. */
import type { Backend, DeviceMemory, DeviceName } from "../core/backend.js";
import { ArgumentError, BackendError, CudaUnavailableError, DeviceError, OutOfMemoryError } from "../core/errors.js";
import { liveTensors } from "../core/tensor.js";
import { CpuBackend, type CpuOptions } from "./cpu/backend.js";
import { CudaBackend, type CudaOptions } from "./cuda/backend.js";
import { type ProbeResult, probeCuda, probeCudaSync, unavailable } from "./cuda/probe.js";
import { findTraces } from "./cuda/traces.js";

/** `auto` is cuda where it works, else cpu. */
export const DEVICE_CHOICES = ["auto", "cpu", "cuda"] as const satisfies readonly ("auto" | DeviceName)[];
export type DeviceChoice = (typeof DEVICE_CHOICES)[number];

/** Options of both backends: each takes those that it has. */
export interface InitOptions extends CpuOptions, Omit<CudaOptions, "device"> {
  /** Default: HALFBYTE_DEVICE, else `auto`. */
  readonly device?: DeviceChoice | undefined;
  /** Which GPU, by the driver's number. Default 0. */
  readonly ordinal?: number | undefined;
  /** Most bytes that the backend may take from the device. Default: what the device has; cpu: 4 GiB. */
  readonly memoryLimit?: number;
  /** Surround every allocation with known bytes and check them on release: finds kernels that overrun. Slow. */
  readonly guards?: boolean;
}

const backends = new Map<DeviceName, Backend>();
/** The device of the last `init`: the default from then on. */
let chosen: DeviceName | undefined;
/** What `auto` was found to be. */
let automatic: DeviceName | undefined;
let warned = false;

/**
 * Makes a backend with options; its device becomes the default one. Without `init` the first tensor makes a backend with the
 * defaults. Whether cuda works is found out by a probe in a process of its own (`probeCuda`), without blocking the thread.
 * @throws DeviceError when the device is unknown, CudaUnavailableError when it is not available, ArgumentError when the backend
 *   exists already or an option is wrong
 */
export async function init(options: InitOptions = {}): Promise<Backend> {
  const choice = choiceOf("init", options.device);
  const { ordinal, library, kernels } = options;
  const probed = choice === "cpu" ? undefined : await probeCuda({ device: ordinal, library, kernels });
  const backend = make("init", choice, options, probed, (name) => {
    throw new ArgumentError("init", "device", "a device that is not in use yet (call shutdown() first)", name);
  });
  chosen = backend.device;
  return backend;
}

/**
 * The backend of a device, made on first use. The first use that may mean cuda probes the GPU and blocks the thread meanwhile;
 * `await init()` does it without.
 * @param device default: that of the last `init`, else HALFBYTE_DEVICE, else `auto`
 * @throws DeviceError, CudaUnavailableError
 */
export function getBackend(device?: DeviceChoice): Backend {
  const choice = choiceOf("device", device ?? chosen);
  return existing(choice) ?? make("device", choice, {}, choice === "cpu" ? undefined : probeCudaSync());
}

/** `getBackend` that does not block while the GPU is probed. For those who are asynchronous anyway. */
export async function openBackend(device?: DeviceChoice): Promise<Backend> {
  const choice = choiceOf("device", device ?? chosen);
  const backend = existing(choice);
  if (backend) return backend;
  const probed = choice === "cpu" ? undefined : await probeCuda();
  return existing(choice) ?? make("device", choice, {}, probed);
}

/** Why the cuda backend cannot be used here, or undefined when it can. Blocks while the GPU is probed. */
export function cudaMissing(): string | undefined {
  const probed = probeCudaSync();
  return probed.ok ? undefined : probed.detail;
}

/** Closes every backend: workers stop, memory goes, tensors become unusable. The next use starts afresh. */
export async function shutdown(): Promise<void> {
  const all = [...backends.values()];
  backends.clear();
  chosen = undefined;
  automatic = undefined;
  await Promise.all(all.map((backend) => backend.close()));
}

/**
 * Makes a backend that has failed usable again. Tensors stay; results that were not finished are undefined.
 * @throws BackendError for a GPU that has failed: CUDA then refuses the whole process
 */
export async function restart(device?: DeviceChoice): Promise<void> {
  await (await openBackend(device)).restart();
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

/** @throws DeviceError for an unknown device, ArgumentError when it comes from HALFBYTE_DEVICE */
function choiceOf(op: string, device: string | undefined): DeviceChoice {
  const env = process.env.HALFBYTE_DEVICE;
  const value = device ?? (env || "auto");
  const choice = DEVICE_CHOICES.find((known) => known === value);
  if (choice) return choice;
  const expected = DEVICE_CHOICES.join(", ").replace(/, (?=\w+$)/, " or ");
  if (device === undefined) throw new ArgumentError(op, "HALFBYTE_DEVICE", expected, value);
  throw new DeviceError(op, "device", expected, String(device));
}

function existing(choice: DeviceChoice): Backend | undefined {
  const name = choice === "auto" ? automatic : choice;
  return name && backends.get(name);
}

/**
 * @param probed what the probe found, where the choice may mean cuda
 * @param inUse called when the device that was found has a backend, instead of taking that
 */
function make(
  op: string,
  choice: DeviceChoice,
  options: InitOptions,
  probed: ProbeResult | undefined,
  inUse?: (name: DeviceName) => never,
): Backend {
  const take = (name: DeviceName, start: () => Backend): Backend => {
    let backend = backends.get(name);
    if (backend) inUse?.(name);
    backend ??= start();
    backends.set(name, backend);
    if (choice === "auto") automatic = name;
    return backend;
  };
  if (probed?.ok) {
    try {
      return take("cuda", () => startCuda(options));
    } catch (error) {
      if (choice === "cuda" || !isAboutTheDevice(error)) throw error;
      fallBack(error.message, options);
    }
  } else if (probed) {
    if (choice === "cuda") throw unavailable(probed, op);
    if (probed.reason !== "worker-thread") fallBack(unavailable(probed, op).message, options);
  }
  return take("cpu", () => new CpuBackend(options));
}

function startCuda({ ordinal: device, kernels, library, memoryLimit, guards }: InitOptions): Backend {
  return new CudaBackend({ device, kernels, library, memoryLimit, guards });
}

/** A GPU that the probe found in order may still have no memory left, say. Wrong options are not its fault. */
function isAboutTheDevice(error: unknown): error is Error {
  return [CudaUnavailableError, BackendError, OutOfMemoryError].some((kind) => error instanceof kind);
}

/** Says once why `auto` is not cuda, but not where nobody would expect it: on a machine without an NVIDIA GPU. */
function fallBack(why: string, { library }: InitOptions): void {
  const expected = findTraces().gpu || library !== undefined || process.env.HALFBYTE_CUDA_LIBRARY;
  if (warned || !expected) return;
  warned = true;
  process.emitWarning(`the cpu is used: ${why}`, { type: "HalfbyteWarning", code: "HALFBYTE_CUDA_FALLBACK" });
}
