import { cpSync, mkdirSync, rmSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { afterEach, describe, expect, test } from "vitest";
import { BOARDS, boardMemory, describeJetson, detectJetson, jetpackOf, SOCS } from "#halfbyte/backend/jetson.js";
import { temporaryFolder } from "../helpers/checkpoint.js";

const tree = (board: string): string => fileURLToPath(new URL(`../fixtures/jetson/${board}`, import.meta.url));

const folders: ReturnType<typeof temporaryFolder>[] = [];
afterEach(() => {
  for (const folder of folders.splice(0)) folder.remove();
});

/** A copy of a recorded tree in which some files are others, or (undefined) are missing. */
function changed(board: string, files: Readonly<Record<string, string | undefined>>): string {
  const folder = temporaryFolder();
  folders.push(folder);
  if (board !== "") cpSync(tree(board), folder.path, { recursive: true });
  for (const [path, text] of Object.entries(files)) {
    const file = join(folder.path, path);
    if (text === undefined) rmSync(file, { recursive: true });
    else {
      mkdirSync(dirname(file), { recursive: true });
      writeFileSync(file, text);
    }
  }
  return folder.path;
}

describe("detectJetson on recorded trees", () => {
  test("Orin Nano 8 GB, JetPack 6.2", () => {
    const jetson = detectJetson(tree("orin-nano-8gb"));
    expect(jetson).toEqual({
      isJetson: true,
      model: "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super",
      soc: "tegra234",
      architecture: 87,
      l4t: "36.4.3",
      jetpack: { version: "6.2", exact: true, cuda: "12.6" },
      package: "6.2+b77",
      powerMode: "2 (MAXN_SUPER)",
      kernel: "5.15.148-tegra",
      container: false,
      gpuNodes: true,
    });
    expect(describeJetson(jetson)).toBe(
      "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super (tegra234), " +
        "L4T 36.4.3, JetPack 6.2 with CUDA 12.6, power mode 2 (MAXN_SUPER)",
    );
  });

  test("AGX Orin, JetPack 5: another name beside the chip's in the device tree", () => {
    expect(detectJetson(tree("agx-orin-64gb"))).toMatchObject({
      soc: "tegra234",
      architecture: 87,
      l4t: "35.4.1",
      jetpack: { version: "5.1.2", exact: true, cuda: "11.4" },
      package: undefined,
      powerMode: "0 (MAXN)",
      container: false,
      gpuNodes: true,
    });
  });

  test("a container without NVIDIA's runtime: no L4T, no nodes, said so", () => {
    const jetson = detectJetson(tree("agx-orin-container"));
    expect(jetson).toMatchObject({
      isJetson: true,
      architecture: 87,
      l4t: undefined,
      jetpack: undefined,
      container: true,
      gpuNodes: false,
    });
    expect(describeJetson(jetson)).toBe("NVIDIA Jetson AGX Orin Developer Kit (tegra234), L4T not known");
  });

  test("Xavier NX: the kernel's name from /proc/version, the container from its cgroup", () => {
    expect(detectJetson(tree("xavier-nx"))).toMatchObject({
      architecture: 72,
      l4t: "35.6.0",
      jetpack: { version: "5.1.4", cuda: "11.4" },
      kernel: "5.10.216-tegra",
      container: true,
    });
  });

  test("Thor", () => {
    expect(detectJetson(tree("thor"))).toMatchObject({
      architecture: 110,
      jetpack: { version: "7.1", exact: true, cuda: "13.0" },
      gpuNodes: true,
    });
  });
});

describe("what is missing or unknown", () => {
  test("a machine that is none", () => {
    const root = changed("", { "proc/version": "Linux version 6.1.0-13-arm64 (x)" });
    expect(detectJetson(root)).toMatchObject({
      isJetson: false,
      soc: undefined,
      architecture: undefined,
      l4t: undefined,
    });
  });

  test("L4T from its package where /etc/nv_tegra_release is absent", () => {
    const jetson = detectJetson(changed("orin-nano-8gb", { "etc/nv_tegra_release": undefined }));
    expect(jetson).toMatchObject({ l4t: "36.4.3", jetpack: { version: "6.2" } });
  });

  test("a package that was removed does not count", () => {
    const status = "Package: nvidia-jetpack\nStatus: deinstall ok config-files\nVersion: 6.0\n";
    expect(detectJetson(changed("orin-nano-8gb", { "var/lib/dpkg/status": status })).package).toBeUndefined();
    const other = "Package: nvidia-jetpack-dev\nStatus: install ok installed\nVersion: 6.0\n";
    expect(detectJetson(changed("orin-nano-8gb", { "var/lib/dpkg/status": other })).package).toBeUndefined();
  });

  test("only the kernel's name", () => {
    const jetson = detectJetson(changed("", { "proc/sys/kernel/osrelease": "4.9.337-tegra\n" }));
    expect(jetson).toMatchObject({ isJetson: true, model: undefined, architecture: undefined, l4t: undefined });
    expect(describeJetson(jetson)).toBe("a Jetson, L4T not known");
  });

  test("a chip that is not known has no architecture", () => {
    const root = changed("thor", { "proc/device-tree/compatible": "nvidia,p9999-0000\0nvidia,tegra999\0" });
    expect(detectJetson(root)).toMatchObject({ soc: "tegra999", architecture: undefined });
    const odd = changed("thor", { "proc/device-tree/compatible": "nvidia,constructor\0" });
    expect(detectJetson(odd)).toMatchObject({ isJetson: true, soc: undefined });
  });

  test("a file of another shape", () => {
    const root = changed("orin-nano-8gb", { "etc/nv_tegra_release": "something else\n", "var/lib/dpkg/status": "" });
    expect(detectJetson(root).l4t).toBeUndefined();
  });

  test("a power mode without a name, and none", () => {
    expect(detectJetson(changed("orin-nano-8gb", { "etc/nvpmodel.conf": "" })).powerMode).toBe("2");
    expect(detectJetson(changed("orin-nano-8gb", { "var/lib/nvpmodel": undefined })).powerMode).toBeUndefined();
  });
});

describe("L4T to JetPack", () => {
  const known: [l4t: string, jetpack: string, cuda: string][] = [
    ["32.7.1", "4.6.1", "10.2"],
    ["35.1.0", "5.0.2", "11.4"],
    ["35.4.1", "5.1.2", "11.4"],
    ["36.3.0", "6.0", "12.2"],
    ["36.4", "6.1", "12.6"],
    ["36.4.0", "6.1", "12.6"],
    ["36.4.4", "6.2.1", "12.6"],
    ["38.2.0", "7.0", "13.0"],
    ["39.2", "7.2", "13.2"],
  ];
  for (const [l4t, version, cuda] of known) {
    test(`${l4t} is JetPack ${version}`, () => expect(jetpackOf(l4t)).toEqual({ version, exact: true, cuda }));
  }

  test("a version that is in no list is named by its series, without a CUDA", () => {
    expect(jetpackOf("36.9.1")).toEqual({ version: "6", exact: false, cuda: undefined });
    const root = changed("thor", { "etc/nv_tegra_release": "# R38 (release), REVISION: 9.0, GCID: 1\n" });
    expect(describeJetson(detectJetson(root))).toContain("L4T 38.9.0, a JetPack 7 that this version does not know");
  });

  test("a series that is not known is not guessed at", () => {
    expect(jetpackOf("52.1.0")).toBeUndefined();
    expect(jetpackOf("28.2.1")).toBeUndefined();
    const root = changed("thor", { "etc/nv_tegra_release": "# R52 (release), REVISION: 1.0, GCID: 1\n" });
    expect(describeJetson(detectJetson(root))).toContain("L4T 52.1.0, of a JetPack that this version does not know");
  });
});

test("every board has a known chip, and less memory than its module", () => {
  for (const board of Object.values(BOARDS)) {
    expect(SOCS).toHaveProperty(board.soc);
    const { bytes, totalBytes } = boardMemory(board);
    expect(totalBytes).toBeLessThan(board.gigabytes * 2 ** 30);
    expect(bytes).toBeLessThan(totalBytes);
    expect(bytes).toBeGreaterThan(0.6 * board.gigabytes * 2 ** 30);
  }
});
