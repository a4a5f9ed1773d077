import { execFileSync } from "node:child_process";
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { totalmem } from "node:os";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { afterEach, describe, expect, test } from "vitest";
import { availableMemory, readSystemFile, systemPathExists } from "#halfbyte/backend/system.js";
import { temporaryFolder } from "../helpers/checkpoint.js";

const GIB = 2 ** 30;
const tree = (board: string): string => fileURLToPath(new URL(`../fixtures/jetson/${board}`, import.meta.url));

const folders: ReturnType<typeof temporaryFolder>[] = [];
afterEach(() => {
  for (const folder of folders.splice(0)) folder.remove();
});

/** A root folder with these files. */
function rootWith(files: Readonly<Record<string, string>>): string {
  const folder = temporaryFolder();
  folders.push(folder);
  for (const [path, text] of Object.entries(files)) {
    mkdirSync(dirname(join(folder.path, path)), { recursive: true });
    writeFileSync(join(folder.path, path), text);
  }
  return folder.path;
}

const MEMINFO = "MemTotal:       8000000 kB\nMemFree: 1000 kB\nMemAvailable:    6000000 kB\n";
const AVAILABLE = 1024 * 6_000_000;

describe("readSystemFile", () => {
  test("reads files whose size the system does not tell", () => {
    expect(readSystemFile("/proc/self/status")).toMatch(/^Name:\t/);
    expect(readSystemFile("/proc/meminfo")).toContain("MemTotal:");
  });

  test("an absent file, a folder and a pipe are undefined, and do not wait", () => {
    const root = rootWith({ "etc/here": "x" });
    execFileSync("mkfifo", [join(root, "etc/pipe")]);
    expect(readSystemFile("/etc/none", root)).toBeUndefined();
    expect(readSystemFile("/etc", root)).toBeUndefined();
    expect(readSystemFile("/etc/pipe", root)).toBe("");
    expect(readSystemFile("/etc/here", root)).toBe("x");
  });

  test("reads no more than the limit", () => {
    const text = "0123456789".repeat(20_000);
    const root = rootWith({ big: text });
    expect(readSystemFile("/big", root)).toBe(text);
    expect(readSystemFile("/big", root, 70_001)).toBe(text.slice(0, 70_001));
    expect(readSystemFile("/dev/zero", "/", 1000)?.length).toBe(1000);
  });

  test("systemPathExists", () => {
    const root = rootWith({ "dev/nvmap": "" });
    expect([systemPathExists("/dev/nvmap", root), systemPathExists("/dev/nothing", root)]).toEqual([true, false]);
  });
});

describe("availableMemory", () => {
  test("of this machine is between nothing and all of it", () => {
    const { bytes, totalBytes, source } = availableMemory();
    expect(bytes).toBeGreaterThan(0);
    expect(bytes).toBeLessThanOrEqual(totalBytes);
    expect(totalBytes).toBeLessThanOrEqual(totalmem());
    expect(source).not.toBe("os");
  });

  test("Orin Nano: MemAvailable; what the GPU holds is told and not subtracted again", () => {
    expect(availableMemory(tree("orin-nano-8gb"))).toEqual({
      bytes: 1024 * 6_512_340,
      totalBytes: 7620 * 2 ** 20,
      source: "meminfo",
      gpuBytes: 1024 * 312_456,
    });
  });

  test("AGX Orin: the tightest of the nested limits counts, inactive file pages as free", () => {
    // worker: 20 - 5 = 15 GiB; the service above it: 16 - (6 - 2) = 12 GiB; the slice has no limit.
    expect(availableMemory(tree("agx-orin-64gb"))).toMatchObject({
      bytes: 12 * GIB,
      totalBytes: 16 * GIB,
      source: "cgroup v2",
    });
  });

  test("a container with a cgroup of its own: the mount's root", () => {
    // 8 - (3 - 1).
    const expected = { bytes: 6 * GIB, totalBytes: 8 * GIB, source: "cgroup v2", gpuBytes: 1024 * 1_204_556 };
    expect(availableMemory(tree("agx-orin-container"))).toEqual(expected);
  });

  test("Xavier NX: cgroup v1 whose path on the host is not mounted", () => {
    // 4 - (3 - 1).
    const expected = { bytes: 2 * GIB, totalBytes: 4 * GIB, source: "cgroup v1" };
    expect(availableMemory(tree("xavier-nx"))).toMatchObject(expected);
  });

  test("Thor: no limit, no NvMapMemUsed", () => {
    expect(availableMemory(tree("thor"))).toEqual({
      bytes: 1024 * 118_234_560,
      totalBytes: 125_772 * 2 ** 20,
      source: "meminfo",
      gpuBytes: undefined,
    });
  });

  const v2 = (limit: string, use: string, stat = "", path = "/a"): Record<string, string> => ({
    "proc/meminfo": MEMINFO,
    "proc/self/cgroup": `0::${path}\n`,
    "sys/fs/cgroup/a/memory.max": limit,
    "sys/fs/cgroup/a/memory.current": use,
    "sys/fs/cgroup/a/memory.stat": stat,
  });
  const odd: [what: string, files: Record<string, string>, bytes: number, source: string][] = [
    ["no cgroup at all", { "proc/meminfo": MEMINFO }, AVAILABLE, "meminfo"],
    ["max is no limit", v2("max\n", "5\n"), AVAILABLE, "meminfo"],
    ["a limit above MemAvailable", v2(`${64 * GIB}`, "5"), AVAILABLE, "meminfo"],
    ["a limit that is used up", v2("1000", "5000"), 0, "cgroup v2"],
    ["more inactive than used", v2("1000", "5", "inactive_file 700\n"), 1000, "cgroup v2"],
    ["no memory.stat line", v2("1000", "400", "anon 3\n"), 600, "cgroup v2"],
    ["nonsense in the files", v2("many", "-3"), AVAILABLE, "meminfo"],
    ["a path outside the namespace", v2("1000", "400", "", "/../../other"), AVAILABLE, "meminfo"],
    ["no path may leave the mount", v2("1000", "400", "", "/a/../a"), AVAILABLE, "meminfo"],
    [
      "v1 without a limit",
      {
        "proc/meminfo": MEMINFO,
        "proc/self/cgroup": "5:cpuset,memory:/a\n",
        "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/a/memory.usage_in_bytes": "1000\n",
      },
      AVAILABLE,
      "meminfo",
    ],
    [
      "a kernel without MemAvailable",
      { "proc/meminfo": "MemTotal: 900 kB\nMemFree: 100 kB\nBuffers: 20 kB\nCached: 3 kB\n" },
      1024 * 123,
      "meminfo",
    ],
  ];
  for (const [what, files, bytes, source] of odd) {
    test(what, () => expect(availableMemory(rootWith(files))).toMatchObject({ bytes, source }));
  }

  test("without /proc/meminfo asks the operating system", () => {
    expect(availableMemory(rootWith({ x: "" }))).toMatchObject({ source: "os", totalBytes: totalmem() });
  });
});

test("every recorded tree says where it comes from", () => {
  for (const board of ["orin-nano-8gb", "agx-orin-64gb", "agx-orin-container", "xavier-nx", "thor"]) {
    expect(readFileSync(join(tree(board), "README"), "utf8")).toMatch(
      /^Made from documentation .*not recorded on a board/,
    );
  }
});
