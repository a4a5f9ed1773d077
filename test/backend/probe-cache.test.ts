/** What the probe looks at before it starts anything: traces of a GPU, and the file that remembers successes. */
import {
  mkdirSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  symlinkSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, test, vi } from "vitest";
import { type ProbeSuccess, type ProbeTarget, readCache, writeCache } from "#halfbyte/backend/cuda/probe-cache.js";
import { findTraces } from "#halfbyte/backend/cuda/traces.js";
import { temporaryFolder } from "../helpers/checkpoint.js";
import { FAKE_ORIN } from "../helpers/cuda-scene.js";

let folder: ReturnType<typeof temporaryFolder>;
beforeEach(() => {
  folder = temporaryFolder();
});
afterEach(() => {
  vi.unstubAllEnvs();
  folder.remove();
});

function touch(path: string, text = ""): string {
  mkdirSync(join(path, ".."), { recursive: true });
  writeFileSync(path, text);
  return path;
}

describe("traces of a GPU", () => {
  test("none on an empty machine, and none that only sounds like one", () => {
    expect(findTraces(folder.file("nowhere"))).toEqual({ gpu: false, any: false });
    for (const name of ["null", "nvme0", "nvram", "xnvmap", "nvidia", "video0"]) touch(folder.file(`dev/${name}`));
    touch(folder.file("usr/lib/x86_64-linux-gnu/libcuda.so"));
    expect(findTraces(folder.path)).toEqual({ gpu: false, any: false });
  });

  for (const name of ["nvidiactl", "nvidia0", "nvidia12", "nvmap", "nvgpu", "nvhost-ctrl-gpu"]) {
    test(`/dev/${name} is a GPU`, () => {
      touch(folder.file(`dev/${name}`));
      expect(findTraces(folder.path)).toEqual({ gpu: true, any: true });
    });
  }

  test("a driver library without a device file is a trace but no GPU", () => {
    touch(folder.file("usr/lib/aarch64-linux-gnu/nvidia/libcuda.so.1"));
    expect(findTraces(folder.path)).toEqual({ gpu: false, any: true });
  });

  test("WSL's device file is a GPU of NVIDIA's only beside the library from Windows", () => {
    touch(folder.file("dev/dxg"));
    expect(findTraces(folder.path)).toEqual({ gpu: false, any: false });
    touch(folder.file("usr/lib/wsl/lib/libcuda.so.1"));
    expect(findTraces(folder.path)).toEqual({ gpu: true, any: true });
  });

  test("cuda-compat, which CUDA's images have on any machine, is none", () => {
    touch(folder.file("usr/local/cuda/compat/libcuda.so.1"));
    expect(findTraces(folder.path)).toEqual({ gpu: false, any: false });
  });

  test("LD_LIBRARY_PATH is looked at", () => {
    touch(folder.file("opt/driver/libcuda.so.1"));
    expect(findTraces(folder.path).any).toBe(false);
    vi.stubEnv("LD_LIBRARY_PATH", "/else:/opt/driver");
    expect(findTraces(folder.path)).toEqual({ gpu: false, any: true });
  });
});

describe("the file of successes", () => {
  const success: ProbeSuccess = {
    ok: true,
    device: FAKE_ORIN,
    images: ["fourbit sm_87 cubin, nvrtc 11.8.89"],
    milliseconds: 321,
  };
  let target: ProbeTarget;
  let library: string;
  const file = (): string => folder.file("cache/halfbyte/probe.json");

  beforeEach(() => {
    vi.stubEnv("XDG_CACHE_HOME", folder.file("cache"));
    const addon = touch(folder.file("addon.node"), "addon");
    const kernels = folder.file("kernels");
    touch(join(kernels, "manifest.json"), "{}");
    library = touch(folder.file("libcuda.so.1"), "driver");
    target = { device: 0, kernels, library: undefined, addon };
    writeCache(target, library, success);
  });

  test("gives back what was written, and leaves nothing beside it", () => {
    expect(readCache(target)).toEqual(success);
    expect(readdirSync(folder.file("cache/halfbyte"))).toEqual(["probe.json"]);
  });

  const later = new Date(Date.now() + 5000);
  const changes: [what: string, change: () => void][] = [
    ["another device", () => Object.assign(target, { device: 1 })],
    ["a named library", () => Object.assign(target, { library: "other.so" })],
    ["another folder of kernels", () => Object.assign(target, { kernels: folder.path })],
    ["other kernels", () => touch(join(target.kernels, "manifest.json"), '{"format":1}')],
    ["no kernels", () => Object.assign(target, { kernels: folder.file("none") })],
    ["a new addon of the same size", () => utimesSync(target.addon, later, later)],
    ["an addon of another size", () => touch(target.addon, "addon!")],
    ["a new driver of the same size", () => utimesSync(library, later, later)],
    ["a driver that is gone", () => rmSync(library)],
    ["CUDA_VISIBLE_DEVICES", () => vi.stubEnv("CUDA_VISIBLE_DEVICES", "1")],
    ["LD_LIBRARY_PATH", () => vi.stubEnv("LD_LIBRARY_PATH", "/opt")],
    ["a cache elsewhere", () => vi.stubEnv("XDG_CACHE_HOME", folder.file("other"))],
    ["a file cut short", () => touch(file(), readFileSync(file(), "utf8").slice(0, -20))],
    ["a file of something else", () => touch(file(), "[null, 1]")],
    ["a file of another format", () => touch(file(), readFileSync(file(), "utf8").replace('"format":1', '"format":2'))],
    ["entries of another shape", () => touch(file(), readFileSync(file(), "utf8").replace('"ok":true', '"ok":"yes"'))],
  ];
  for (const [what, change] of changes) {
    test(`does not hold for ${what}`, () => {
      expect(readCache(target)).toEqual(success);
      change();
      expect(readCache(target)).toBeUndefined();
    });
  }

  test("keeps several, the latest sixteen", () => {
    for (let device = 1; device <= 16; device++) writeCache({ ...target, device }, library, success);
    expect(readCache(target)).toBeUndefined();
    for (let device = 1; device <= 16; device++) expect(readCache({ ...target, device })).toEqual(success);
  });

  test("is for its owner alone, and another user's is not believed", () => {
    expect(statSync(file()).mode & 0o777).toBe(0o600);
    expect(statSync(folder.file("cache/halfbyte")).mode & 0o777).toBe(0o700);
    const other = vi.spyOn(process as Required<typeof process>, "geteuid").mockReturnValue(54321);
    try {
      expect(readCache(target)).toBeUndefined();
    } finally {
      other.mockRestore();
    }
    expect(readCache(target)).toEqual(success);
  });

  test("is never written through a link", () => {
    const victim = touch(folder.file("victim"), "precious");
    symlinkSync(victim, `${file()}.${process.pid}.tmp`);
    writeCache({ ...target, device: 1 }, library, success);
    expect(readFileSync(victim, "utf8")).toBe("precious");
    writeCache({ ...target, device: 1 }, library, success);
    expect(readCache({ ...target, device: 1 })).toEqual(success);
  });

  test("nothing is thrown where it cannot be written or read", () => {
    vi.stubEnv("XDG_CACHE_HOME", touch(folder.file("occupied"), "a file"));
    expect(() => writeCache(target, library, success)).not.toThrow();
    expect(readCache(target)).toBeUndefined();
    mkdirSync(folder.file("odd/halfbyte/probe.json"), { recursive: true });
    vi.stubEnv("XDG_CACHE_HOME", folder.file("odd"));
    expect(() => writeCache(target, library, success)).not.toThrow();
    expect(readCache(target)).toBeUndefined();
    expect(readdirSync(folder.file("odd/halfbyte"))).toEqual(["probe.json"]);
  });

  test("a relative XDG_CACHE_HOME is ignored", () => {
    vi.stubEnv("XDG_CACHE_HOME", "relative");
    vi.stubEnv("HOME", folder.file("home"));
    writeCache(target, library, success);
    expect(readdirSync(folder.file("home/.cache/halfbyte"))).toEqual(["probe.json"]);
  });
});
