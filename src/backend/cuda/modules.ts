/** The kernel images of one backend: each family is loaded when it is first used, each entry found when it is first launched. */
import { BackendError } from "../../core/errors.js";
import type { KernelFamily } from "../../core/kernels.js";
import { CUDA_STATUS, type CudaDevice } from "./device.js";
import { selectImage } from "./images.js";
import type { Launch } from "./launch.js";
import type { CudaStream } from "./stream.js";

/** CUfunction_attribute: how much dynamic shared memory a launch may ask for. */
const MAX_DYNAMIC_SHARED = 8;
/** What a kernel gets without asking. */
const DEFAULT_SHARED = 48 << 10;

export interface Entry {
  readonly func: number;
  /** Dynamic shared memory it is allowed. */
  shared: number;
  /** For a launch whose blocks walk: how many the GPU runs at once. */
  readonly resident: number;
}

interface LoadedFamily {
  readonly module: number;
  /** `fourbit sm_87 cubin, nvrtc 11.8.89`. */
  readonly description: string;
}

export class KernelModules {
  private readonly families = new Map<KernelFamily, LoadedFamily>();
  private readonly entries = new Map<string, Entry>();

  constructor(
    private readonly stream: CudaStream,
    private readonly device: CudaDevice,
    private readonly folder: string,
    /** Called when a family has been loaded, before its first launch. */
    private readonly loaded: (family: KernelFamily) => void,
  ) {}

  /** Descriptions of the images that are loaded. */
  get descriptions(): string[] {
    return [...this.families.values()].map(({ description }) => description);
  }

  /** What a launch launches. @throws NoKernelImageError, FormatError, BackendError */
  entry(family: KernelFamily, launch: Launch): Entry {
    const entry = this.entries.get(launch.entry) ?? this.find(family, launch);
    if (launch.shared > entry.shared) {
      this.allow(entry.func, launch.shared);
      entry.shared = launch.shared;
    }
    return entry;
  }

  /** Only when nothing is under way. */
  close(): void {
    for (const { module } of this.families.values()) this.stream.addon.moduleUnload(module);
    this.families.clear();
    this.entries.clear();
  }

  private find(family: KernelFamily, { entry: name, block, shared, walks }: Launch): Entry {
    const { stream } = this;
    const { module, description } = this.families.get(family) ?? this.load(family);
    const status = stream.retry(() => stream.addon.moduleFunction(module, name));
    if (status === CUDA_STATUS.notFound) {
      throw new BackendError("cuda", `the image ${description} has no entry ${name}`);
    }
    stream.check("moduleFunction", status);
    const func = stream.addon.results[0]!;
    // What does not fit yet is resident nowhere.
    if (shared > DEFAULT_SHARED) this.allow(func, shared);
    let resident = Number.POSITIVE_INFINITY;
    if (walks) {
      stream.check("functionOccupancy", stream.addon.functionOccupancy(func, block, shared));
      resident = Math.max(1, stream.addon.results[0]!) * this.device.multiprocessors;
    }
    const entry = { func, shared: Math.max(shared, DEFAULT_SHARED), resident };
    this.entries.set(name, entry);
    return entry;
  }

  private allow(func: number, shared: number): void {
    const { stream } = this;
    stream.check("functionSetAttribute", stream.addon.functionSetAttribute(func, MAX_DYNAMIC_SHARED, shared));
  }

  private load(family: KernelFamily): LoadedFamily {
    const { stream } = this;
    const { architecture, driverVersion } = this.device;
    const { bytes, description } = selectImage(this.folder, family, architecture, driverVersion);
    const status = stream.retry(() => stream.addon.moduleLoad(bytes));
    if (status !== 0) throw stream.error("moduleLoad", status, description);
    const loaded = { module: stream.addon.results[0]!, description };
    this.families.set(family, loaded);
    try {
      this.loaded(family);
    } catch (error) {
      // The next launch begins again, and warms up before it.
      this.families.delete(family);
      this.entries.clear();
      stream.addon.moduleUnload(loaded.module);
      throw error;
    }
    return loaded;
  }
}
