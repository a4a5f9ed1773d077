/** Which NVIDIA Jetson this is, and what is known of each: read from files, so that a container or a recorded tree serves too. */
import { release } from "node:os";
import { readSystemFile, systemPathExists } from "./system.js";

/** A system on a chip that Jetsons are made with. */
interface Soc {
  readonly family: string;
  /** Compute capability of its GPU: 87 for 8.7. */
  readonly architecture: number;
}

/** By the name after `nvidia,` in the device tree. */
export const SOCS = {
  tegra210: { family: "Nano", architecture: 53 },
  tegra186: { family: "TX2", architecture: 62 },
  tegra194: { family: "Xavier", architecture: 72 },
  tegra234: { family: "Orin", architecture: 87 },
  tegra264: { family: "Thor", architecture: 110 },
} as const satisfies Record<string, Soc>;
export type SocName = keyof typeof SOCS;

/** A Jetson that a model may have to fit on. */
export interface Board {
  readonly name: string;
  readonly soc: SocName;
  /** Of the whole module; the power mode may switch some off. */
  readonly multiprocessors: number;
  /** GiB of DRAM, shared by CPU and GPU. */
  readonly gigabytes: number;
  /** MiB that Linux has of them, the rest being carved out at boot: as tegrastats shows it. */
  readonly visibleMegabytes: number;
  /** No log of such a board was at hand: that of an Orin with as much DRAM is assumed. */
  readonly assumed?: true;
  /** What to know, as a sentence. */
  readonly note?: string;
}

const NO_NODE =
  "its last JetPack (4.6) has glibc 2.27, older than Node.js 20 needs: halfbyte does not run on it, and it has no kernels for its GPU";
const SUPER = "a Super (MAXN_SUPER, JetPack 6.2 and later) has the same memory and half as much bandwidth again";

/** MiB that Linux has on an Orin, by GiB: of public tegrastats logs; on 4 GB less what the 8 GB module loses. */
const VISIBLE = { 4: 4096 - 572, 8: 7620, 16: 15656, 32: 30697, 64: 62841 } as const;
const seen = (gigabytes: keyof typeof VISIBLE) => ({ gigabytes, visibleMegabytes: VISIBLE[gigabytes] });
const assumed = (gigabytes: keyof typeof VISIBLE) => ({ ...seen(gigabytes), assumed: true }) as const;

/** By the name that `halfbyte estimate --fits` takes. */
export const BOARDS = {
  "orin-nano-4gb": {
    name: "Orin Nano 4 GB",
    soc: "tegra234",
    multiprocessors: 4,
    ...assumed(4),
    note: SUPER,
  },
  "orin-nano-8gb": {
    name: "Orin Nano 8 GB",
    soc: "tegra234",
    multiprocessors: 8,
    ...seen(8),
    note: SUPER,
  },
  "orin-nx-8gb": {
    name: "Orin NX 8 GB",
    soc: "tegra234",
    multiprocessors: 8,
    ...assumed(8),
  },
  "orin-nx-16gb": {
    name: "Orin NX 16 GB",
    soc: "tegra234",
    multiprocessors: 8,
    ...seen(16),
  },
  "agx-orin-32gb": {
    name: "AGX Orin 32 GB",
    soc: "tegra234",
    multiprocessors: 14,
    ...seen(32),
  },
  "agx-orin-64gb": {
    name: "AGX Orin 64 GB",
    soc: "tegra234",
    multiprocessors: 16,
    ...seen(64),
  },
  "agx-thor": { name: "AGX Thor", soc: "tegra264", multiprocessors: 20, gigabytes: 128, visibleMegabytes: 125772 },
  "xavier-nx-8gb": {
    name: "Xavier NX 8 GB",
    soc: "tegra194",
    multiprocessors: 6,
    ...assumed(8),
  },
  "xavier-nx-16gb": {
    name: "Xavier NX 16 GB",
    soc: "tegra194",
    multiprocessors: 6,
    ...assumed(16),
  },
  "agx-xavier-32gb": {
    name: "AGX Xavier 32 GB",
    soc: "tegra194",
    multiprocessors: 8,
    ...assumed(32),
  },
  "agx-xavier-64gb": {
    name: "AGX Xavier 64 GB",
    soc: "tegra194",
    multiprocessors: 8,
    ...assumed(64),
  },
  tx2: { name: "TX2", soc: "tegra186", multiprocessors: 2, gigabytes: 8, visibleMegabytes: 7850, note: NO_NODE },
  nano: { name: "Nano", soc: "tegra210", multiprocessors: 1, gigabytes: 4, visibleMegabytes: 3956, note: NO_NODE },
} as const satisfies Record<string, Board>;
export type BoardName = keyof typeof BOARDS;

/**
 * What Ubuntu and the services of a booted board without a desktop hold: public logs of idle boards show 0.65 to 1.3 GiB. A
 * desktop takes about as much again.
 */
export const SYSTEM_BYTES = 2 ** 30;

/** Bytes that Linux has on a board, and what of them is left to one program. */
export function boardMemory(board: Board): { readonly totalBytes: number; readonly bytes: number } {
  const totalBytes = 2 ** 20 * board.visibleMegabytes;
  return { totalBytes, bytes: totalBytes - SYSTEM_BYTES };
}

/** JetPacks by the version of L4T (Jetson Linux) in them. */
const JETPACKS: Readonly<Record<string, string>> = {
  "32.6.1": "4.6",
  "32.7.1": "4.6.1",
  "32.7.2": "4.6.2",
  "32.7.3": "4.6.3",
  "32.7.4": "4.6.4",
  "32.7.5": "4.6.5",
  "32.7.6": "4.6.6",
  "34.1": "5.0 DP",
  "34.1.1": "5.0.1 DP",
  "35.1": "5.0.2",
  "35.2.1": "5.1",
  "35.3.1": "5.1.1",
  "35.4.1": "5.1.2",
  "35.5": "5.1.3",
  "35.6": "5.1.4",
  "35.6.1": "5.1.5",
  "35.6.2": "5.1.5",
  "36.2": "6.0 DP",
  "36.3": "6.0",
  "36.4": "6.1",
  "36.4.3": "6.2",
  "36.4.4": "6.2.1",
  "36.4.7": "6.2.1",
  "36.5": "6.2.2",
  "38.2": "7.0",
  "38.2.1": "7.0",
  "38.4": "7.1",
  "39.2": "7.2",
};

/** By series: what JetPack of it there is, and the CUDA its board comes with. The first that is not above the version counts. */
const SERIES: readonly { readonly from: readonly [number, number]; readonly jetpack: string; readonly cuda: string }[] =
  [
    { from: [39, 0], jetpack: "7", cuda: "13.2" },
    { from: [38, 0], jetpack: "7", cuda: "13.0" },
    { from: [36, 4], jetpack: "6", cuda: "12.6" },
    { from: [36, 0], jetpack: "6", cuda: "12.2" },
    { from: [34, 0], jetpack: "5", cuda: "11.4" },
    { from: [32, 0], jetpack: "4", cuda: "10.2" },
  ];
/** The newest series whose CUDA is known; a later one is not guessed at. */
const NEWEST_SERIES = 39;

export interface JetPack {
  /** `6.2`; only the series (`6`) when this version of L4T is in no list. */
  readonly version: string;
  readonly exact: boolean;
  /** The CUDA it ships: `12.6`. Not known of a version that is in no list. */
  readonly cuda: string | undefined;
}

/** The JetPack that a version of L4T belongs to, undefined for one of no known series. */
export function jetpackOf(l4t: string): JetPack | undefined {
  const [major = 0, minor = 0] = l4t.split(".").map(Number);
  if (major > NEWEST_SERIES) return undefined;
  const series = SERIES.find(({ from: [a, b] }) => major > a || (major === a && minor >= b));
  if (!series) return undefined;
  // 36.3.0 and 36.3 are the same.
  const version = JETPACKS[l4t.replace(/(\.0)+$/, "")];
  if (version === undefined) return { version: series.jetpack, exact: false, cuda: undefined };
  return { version, exact: true, cuda: series.cuda };
}

/** What was found. */
export interface Jetson {
  readonly isJetson: boolean;
  /** As the device tree says it: `NVIDIA Jetson AGX Orin Developer Kit`. */
  readonly model: string | undefined;
  /** `tegra234`. */
  readonly soc: string | undefined;
  /** Compute capability that the GPU must have, 87 for 8.7; undefined for a chip that is not known. */
  readonly architecture: number | undefined;
  /** `36.4.3`; undefined where nothing says it (in a container without the file, say). */
  readonly l4t: string | undefined;
  readonly jetpack: JetPack | undefined;
  /** The version of the nvidia-jetpack package, when it is installed: `6.2+b77`. */
  readonly package: string | undefined;
  /** `2 (MAXN_SUPER)`, when it can be read. */
  readonly powerMode: string | undefined;
  readonly kernel: string;
  readonly container: boolean;
  /** Whether the device nodes of the GPU are there. A container has them only with NVIDIA's runtime. */
  readonly gpuNodes: boolean;
}

/** One of them is there for each driver: nvgpu of L4T 32 to 36 (two layouts), and the open driver of Thor. */
const GPU_NODES = ["/dev/nvhost-ctrl-gpu", "/dev/nvgpu", "/dev/nvidia0"];

/** Of /var/lib/dpkg/status: some megabytes on a full board. */
const MAX_PACKAGES_BYTES = 1 << 24;

/**
 * Looks for the marks of a Jetson: the device tree's `compatible`, /etc/nv_tegra_release, a kernel named `tegra`. On anything else
 * `isJetson` is false.
 * @param root stands for `/`
 */
export function detectJetson(root = "/"): Jetson {
  const compatible = (readSystemFile("/proc/device-tree/compatible", root) ?? "").split("\0").filter((s) => s !== "");
  const tegra = compatible.findLast((name) => /^nvidia,tegra\d+$/.test(name));
  const soc = tegra?.slice("nvidia,".length);
  const kernel = kernelRelease(root);
  const packages = new Lazy(() => readSystemFile("/var/lib/dpkg/status", root, MAX_PACKAGES_BYTES) ?? "");
  const released = l4tRelease(root);
  const isJetson = soc !== undefined || released !== undefined || kernel.includes("tegra");
  const l4t =
    released ?? (isJetson ? packageVersion(packages.value, "nvidia-l4t-core")?.replace(/-.*/, "") : undefined);
  return {
    isJetson,
    model: readSystemFile("/proc/device-tree/model", root)?.replace(/[\0\n]+$/, "") || undefined,
    soc,
    architecture: soc !== undefined && Object.hasOwn(SOCS, soc) ? SOCS[soc as SocName].architecture : undefined,
    l4t,
    jetpack: l4t === undefined ? undefined : jetpackOf(l4t),
    package: isJetson ? packageVersion(packages.value, "nvidia-jetpack") : undefined,
    powerMode: powerMode(root),
    kernel,
    container: inContainer(root),
    gpuNodes: GPU_NODES.some((path) => systemPathExists(path, root)),
  };
}

/** Computes once, when it is needed. */
class Lazy<T> {
  private made: { readonly value: T } | undefined;
  constructor(private readonly make: () => T) {}
  get value(): T {
    this.made ??= { value: this.make() };
    return this.made.value;
  }
}

/** A recorded tree of a board may have either file; the machine itself always answers. */
function kernelRelease(root: string): string {
  const recorded = readSystemFile("/proc/sys/kernel/osrelease", root)?.trim();
  return (
    recorded ||
    /^Linux version (\S+)/.exec(readSystemFile("/proc/version", root) ?? "")?.[1] ||
    (root === "/" ? release() : "")
  );
}

/** `# R36 (release), REVISION: 4.3, ...` */
function l4tRelease(root: string): string | undefined {
  const text = readSystemFile("/etc/nv_tegra_release", root) ?? "";
  const [, major, revision] = /^# R(\d+) \(release\), REVISION: (\d+(?:\.\d+)*)/.exec(text) ?? [];
  return major === undefined ? undefined : `${major}.${revision}`;
}

/** The version of a Debian package that is installed. */
function packageVersion(status: string, name: string): string | undefined {
  const begin = `\n${status}`.indexOf(`\nPackage: ${name}\n`);
  if (begin < 0) return undefined;
  const stanza = status.slice(begin).split("\n\n", 1)[0]!;
  if (!/^Status: install ok installed$/m.test(stanza)) return undefined;
  return /^Version: (\S+)$/m.exec(stanza)?.[1];
}

/** What nvpmodel keeps in files, so that it need not be run (and asked for a password). */
function powerMode(root: string): string | undefined {
  const id = /\bpmode:0*(\d+)/.exec(readSystemFile("/var/lib/nvpmodel/status", root) ?? "")?.[1];
  if (id === undefined) return undefined;
  const names = readSystemFile("/etc/nvpmodel.conf", root) ?? "";
  const name = new RegExp(`<\\s*POWER_MODEL\\s+ID=${id}\\s+NAME=(\\S+)`).exec(names)?.[1];
  return name === undefined ? id : `${id} (${name})`;
}

function inContainer(root: string): boolean {
  if (systemPathExists("/.dockerenv", root) || systemPathExists("/run/.containerenv", root)) return true;
  return /\/(docker|lxc|kubepods|libpod|containerd)[/-]/.test(readSystemFile("/proc/1/cgroup", root) ?? "");
}

/** One line: model, L4T and JetPack, or what of them is known. */
export function describeJetson({ model, soc, l4t, jetpack, package: installed, powerMode }: Jetson): string {
  const family = soc !== undefined && Object.hasOwn(SOCS, soc) ? SOCS[soc as SocName].family : undefined;
  const board = model ?? (family === undefined ? "a Jetson" : `a Jetson ${family}`);
  const chip = soc === undefined ? "" : ` (${soc})`;
  return [
    `${board}${chip}`,
    describeRelease(l4t, jetpack, installed),
    ...(powerMode ? [`power mode ${powerMode}`] : []),
  ].join(", ");
}

function describeRelease(l4t: string | undefined, jetpack: JetPack | undefined, installed: string | undefined): string {
  if (l4t === undefined) return installed === undefined ? "L4T not known" : `JetPack ${installed}, L4T not known`;
  if (jetpack === undefined) return `L4T ${l4t}, of a JetPack that this version does not know`;
  if (jetpack.exact) return `L4T ${l4t}, JetPack ${jetpack.version} with CUDA ${jetpack.cuda}`;
  return `L4T ${l4t}, a JetPack ${jetpack.version} that this version does not know`;
}
