/**
 * What the operating system tells in files: read through one function with a root folder, so that a recorded tree can stand
 * in for the machine. Nothing here runs a program or writes.
 */
import { closeSync, constants, openSync, readSync, statSync } from "node:fs";
import { freemem, totalmem } from "node:os";
import { join } from "node:path";

/** Enough for every file of /proc and /sys that is read here. */
const MAX_FILE_BYTES = 1 << 20;
const CHUNK_BYTES = 1 << 16;
const CGROUP_MOUNT = "/sys/fs/cgroup";

/**
 * The text of a system file, at most `limit` bytes of it (files of /proc have no size to go by); undefined when it is absent or
 * may not be read.
 * @param root stands for `/`
 */
export function readSystemFile(path: string, root = "/", limit = MAX_FILE_BYTES): string | undefined {
  let file: number;
  try {
    // Without O_NONBLOCK a pipe of that name would wait for a writer.
    file = openSync(join(root, path), constants.O_RDONLY | (constants.O_NONBLOCK ?? 0));
  } catch {
    return undefined;
  }
  try {
    const chunks: Buffer[] = [];
    let length = 0;
    while (length < limit) {
      const chunk = Buffer.alloc(Math.min(CHUNK_BYTES, limit - length));
      const read = readSync(file, chunk, 0, chunk.length, null);
      if (read === 0) break;
      chunks.push(chunk.subarray(0, read));
      length += read;
    }
    return Buffer.concat(chunks, length).toString("utf8");
  } catch {
    return undefined;
  } finally {
    closeSync(file);
  }
}

/** Whether a file, folder or device node of the system is there. */
export function systemPathExists(path: string, root = "/"): boolean {
  try {
    statSync(join(root, path));
    return true;
  } catch {
    return false;
  }
}

/** Memory that this process can still take. */
export interface AvailableMemory {
  readonly bytes: number;
  /** Of the machine, or the cgroup's limit where that is lower. */
  readonly totalBytes: number;
  /** Which of them `bytes` comes from. `os`: there is no /proc/meminfo. */
  readonly source: "meminfo" | "cgroup v1" | "cgroup v2" | "os";
  /**
   * What the integrated GPU of a Jetson holds, of all processes. Its pages are not in MemAvailable any more and no cgroup is
   * charged for them, so they are never subtracted from `bytes`. Undefined where the kernel does not say it.
   */
  readonly gpuBytes: number | undefined;
}

/**
 * MemAvailable, so memory that is free or can be reclaimed without swapping, capped by what the limits of this process's
 * cgroup and of those above it leave. Inactive file pages count as free there: the kernel drops them before it runs out.
 * On an integrated GPU this, not the driver's figure, is what an allocation can have.
 * @param root stands for `/`
 */
export function availableMemory(root = "/"): AvailableMemory {
  const meminfo = readMeminfo(root);
  const total = meminfo.get("MemTotal");
  if (total === undefined) return { bytes: freemem(), totalBytes: totalmem(), source: "os", gpuBytes: undefined };
  // Kernels before 3.14 have no MemAvailable.
  const sum = (...names: readonly string[]): number =>
    names.reduce((bytes, name) => bytes + (meminfo.get(name) ?? 0), 0);
  let memory: AvailableMemory = {
    bytes: Math.min(total, meminfo.get("MemAvailable") ?? sum("MemFree", "Buffers", "Cached")),
    totalBytes: total,
    source: "meminfo",
    gpuBytes: meminfo.get("NvMapMemUsed"),
  };
  for (const { limit, free, version } of cgroupLimits(root)) {
    const totalBytes = Math.min(memory.totalBytes, limit);
    memory = free < memory.bytes ? { ...memory, totalBytes, bytes: free, source: version } : { ...memory, totalBytes };
  }
  return memory;
}

function readMeminfo(root: string): ReadonlyMap<string, number> {
  const text = readSystemFile("/proc/meminfo", root) ?? "";
  return new Map(
    [...text.matchAll(/^(\w+):\s+(\d+) kB$/gm)].map(([, name, kilobytes]) => [name!, 1024 * Number(kilobytes)]),
  );
}

interface CgroupLimit {
  readonly version: "cgroup v1" | "cgroup v2";
  readonly limit: number;
  /** What the limit leaves. */
  readonly free: number;
}

/** How a version of cgroups spells what is needed. */
const CGROUPS = {
  "cgroup v2": {
    folder: CGROUP_MOUNT,
    limit: "memory.max",
    use: "memory.current",
    reclaimable: "inactive_file",
  },
  "cgroup v1": {
    folder: `${CGROUP_MOUNT}/memory`,
    limit: "memory.limit_in_bytes",
    use: "memory.usage_in_bytes",
    reclaimable: "total_inactive_file",
  },
} as const;

/**
 * The memory limits of this process's cgroup and its ancestors. In a container /proc/self/cgroup may name a path of the host that is
 * not mounted here: then the mount's own root is the container's cgroup, the last of the ancestors.
 */
function cgroupLimits(root: string): CgroupLimit[] {
  const limits: CgroupLimit[] = [];
  for (const line of (readSystemFile("/proc/self/cgroup", root) ?? "").split("\n")) {
    const [, id, controllers, path] = /^(\d+):([^:]*):(\/.*)$/.exec(line) ?? [];
    if (id === undefined || controllers === undefined || path === undefined) continue;
    if (id === "0" && controllers === "") limits.push(...limitsAlong("cgroup v2", path, root));
    else if (controllers.split(",").includes("memory")) limits.push(...limitsAlong("cgroup v1", path, root));
  }
  return limits;
}

function limitsAlong(version: CgroupLimit["version"], path: string, root: string): CgroupLimit[] {
  const names = CGROUPS[version];
  const parts = path.split("/").filter((part) => part !== "");
  // A cgroup outside of the namespace reads `/../name`: nothing of it can be seen but the mount's root.
  const depth = parts.includes("..") ? 0 : parts.length;
  const limits: CgroupLimit[] = [];
  for (let n = depth; n >= 0; n--) {
    const file = (name: string): string | undefined =>
      readSystemFile([names.folder, ...parts.slice(0, n), name].join("/"), root)?.trim();
    const limit = file(names.limit);
    const use = file(names.use);
    // The root cgroup has neither; "max" is no limit.
    if (limit === undefined || use === undefined || !/^\d+$/.test(limit) || !/^\d+$/.test(use)) continue;
    const stat = new RegExp(`^${names.reclaimable} (\\d+)$`, "m").exec(file("memory.stat") ?? "");
    const used = Math.max(0, Number(use) - Number(stat?.[1] ?? 0));
    limits.push({ version, limit: Number(limit), free: Math.max(0, Number(limit) - used) });
  }
  return limits;
}
