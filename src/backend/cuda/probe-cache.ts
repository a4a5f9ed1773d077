/**
 * The file that remembers probes which succeeded, so that a program starts without one. An answer holds as long as everything it
 * was found with is the same: this package and its addon, the kernels, the driver's library, the device, the boot. Whatever goes
 * wrong here is ignored: without the file there is a probe more.
 */
import { createHash } from "node:crypto";
import { mkdirSync, readFileSync, renameSync, rmSync, statSync, writeFileSync } from "node:fs";
import { homedir } from "node:os";
import { dirname, isAbsolute, join } from "node:path";
import { VERSION } from "../../core/version.js";
import { readSystemFile } from "../system.js";
import type { CudaDevice } from "./device.js";

/** What a probe is about. */
export interface ProbeTarget {
  readonly device: number;
  /** The folder with the kernel images. */
  readonly kernels: string;
  /** The driver's library as it is asked for, where that is not the usual one. */
  readonly library: string | undefined;
  /** The addon's file. */
  readonly addon: string;
}

/** A probe that succeeded. */
export interface ProbeSuccess {
  readonly ok: true;
  readonly device: CudaDevice;
  readonly images: readonly string[];
  readonly milliseconds: number;
}

interface Entry {
  readonly key: string;
  /** The driver's library that was opened, and its stamp. */
  readonly library: string;
  readonly stamp: string;
  readonly success: ProbeSuccess;
}

const FORMAT = 1;
/** Devices, drivers and versions that are remembered side by side. */
const MAX_ENTRIES = 16;
/** What decides which library and which device the driver gives. */
const ENVIRONMENT = [
  "LD_LIBRARY_PATH",
  "LD_PRELOAD",
  "CUDA_VISIBLE_DEVICES",
  "CUDA_DEVICE_ORDER",
  "NVIDIA_VISIBLE_DEVICES",
];

/** A remembered success for exactly this target, or undefined. */
export function readCache(target: ProbeTarget): ProbeSuccess | undefined {
  try {
    const key = keyOf(target);
    const entry = load().find((entry) => entry.key === key);
    return entry && stampOf(entry.library) === entry.stamp ? entry.success : undefined;
  } catch {
    return undefined;
  }
}

/** Remembers a success. @param library the driver's library that was opened, links resolved */
export function writeCache(target: ProbeTarget, library: string, success: ProbeSuccess): void {
  try {
    const key = keyOf(target);
    const entry: Entry = { key, library, stamp: stampOf(library), success };
    const others = load().filter((entry) => entry.key !== key);
    save([entry, ...others].slice(0, MAX_ENTRIES));
  } catch {
    // A read-only home, a full disk: the next process probes again.
  }
}

function cacheFile(): string {
  const xdg = process.env.XDG_CACHE_HOME;
  return join(xdg && isAbsolute(xdg) ? xdg : join(homedir(), ".cache"), "halfbyte", "probe.json");
}

function load(): Entry[] {
  try {
    const file = cacheFile();
    const stat = statSync(file);
    // In a folder that several users share, what another one has written is no answer, nor is a pipe.
    if (!stat.isFile() || stat.uid !== process.geteuid?.()) return [];
    const { format, entries } = JSON.parse(readFileSync(file, "utf8")) as {
      format?: unknown;
      entries?: unknown;
    };
    return format === FORMAT && Array.isArray(entries) ? entries.filter(isEntry) : [];
  } catch {
    return [];
  }
}

function save(entries: readonly Entry[]): void {
  const file = cacheFile();
  mkdirSync(dirname(file), { recursive: true, mode: 0o700 });
  const beside = `${file}.${process.pid}.tmp`;
  try {
    // Never through a link that somebody has put there.
    writeFileSync(beside, JSON.stringify({ format: FORMAT, entries }), { flag: "wx", mode: 0o600 });
    renameSync(beside, file);
  } finally {
    rmSync(beside, { force: true });
  }
}

function isEntry(value: unknown): value is Entry {
  if (typeof value !== "object" || value === null) return false;
  const { key, library, stamp, success } = value as Partial<Record<keyof Entry, unknown>>;
  if (typeof key !== "string" || typeof library !== "string" || typeof stamp !== "string") return false;
  if (typeof success !== "object" || success === null) return false;
  const { ok, device, images } = success as Partial<Record<keyof ProbeSuccess, unknown>>;
  return ok === true && typeof device === "object" && device !== null && Array.isArray(images);
}

function keyOf({ device, kernels, library, addon }: ProbeTarget): string {
  const facts = [
    VERSION,
    process.arch,
    device,
    library ?? null,
    addon,
    stampOf(addon),
    kernels,
    readFileSync(join(kernels, "manifest.json"), "utf8"),
    readSystemFile("/proc/sys/kernel/random/boot_id") ?? null,
    // A driver that is exchanged without a reboot.
    readSystemFile("/proc/driver/nvidia/version") ?? null,
    stampOf("/etc/ld.so.cache"),
    ENVIRONMENT.map((name) => process.env[name] ?? null),
  ];
  return createHash("sha256").update(JSON.stringify(facts)).digest("hex");
}

/** Changes when the file does. */
function stampOf(file: string): string {
  const stat = statSync(file, { throwIfNoEntry: false });
  return stat ? `${stat.size} ${stat.mtimeMs}` : "absent";
}
