/** NVRTC, the CUDA compiler as a library, from pinned Python wheels: fetched by pip, checked, unpacked into build/nvrtc. */
import { execFile } from "node:child_process";
import { createHash } from "node:crypto";
import { createReadStream, existsSync, mkdirSync, mkdtempSync, readdirSync, renameSync, rmSync } from "node:fs";
import { join } from "node:path";
import { pipeline } from "node:stream/promises";
import { promisify } from "node:util";
import { ROOT } from "./kernel-sources.mjs";

const run = promisify(execFile);
const CACHE = join(ROOT, "build/nvrtc");
export const PYTHON = process.env.HALFBYTE_PYTHON || "python3";

/** The wheels for linux-x64, by version. */
const WHEELS = {
  "11.8.89": {
    name: "nvidia-cuda-nvrtc-cu11",
    sha256: "a8d02f3cba345be56b1ffc3e74d8f61f02bb758dd31b0f20e12277a5a244f756",
  },
  "12.6.85": {
    name: "nvidia-cuda-nvrtc-cu12",
    sha256: "800927308ccc5dd6246d3f61f7fcef2ed7ec4e59e199090d360d3293f78bd5a2",
  },
  "13.0.88": {
    name: "nvidia-cuda-nvrtc",
    sha256: "ad9b6d2ead2435f11cbb6868809d2adeeee302e9bb94bcf0539c7a40d80e8575",
  },
};

/** NVRTC cannot be had here. */
export class NvrtcMissing extends Error {}

/**
 * The libraries of one version, fetched at the first use.
 * @param {string} version one of the pinned ones
 * @returns {Promise<{ library: string, builtins: string }>}
 * @throws {NvrtcMissing} why it cannot be had
 */
export async function nvrtc(version) {
  const wheel = WHEELS[version];
  if (!wheel)
    throw new NvrtcMissing(`NVRTC ${version} is not pinned here (there are: ${Object.keys(WHEELS).join(", ")})`);
  if (process.platform !== "linux" || process.arch !== "x64") {
    throw new NvrtcMissing(`the pinned NVRTC wheels are for linux-x64, this is ${process.platform}-${process.arch}`);
  }
  const folder = join(CACHE, version);
  if (!existsSync(folder)) await fetchWheel(version, wheel, folder);
  return { library: find(folder, /^libnvrtc\.so\.\d+/), builtins: find(folder, /^libnvrtc-builtins\.so\.\d+/) };
}

function find(folder, pattern) {
  const paths = readdirSync(folder, { recursive: true, encoding: "utf8" });
  const path = paths.find((candidate) => pattern.test(candidate.split("/").at(-1)));
  if (!path) throw new NvrtcMissing(`${folder} has no ${pattern.source}: delete it and try again`);
  return join(folder, path);
}

async function fetchWheel(version, { name, sha256 }, folder) {
  mkdirSync(CACHE, { recursive: true });
  const partial = mkdtempSync(`${folder}.`);
  try {
    console.log(`fetching ${name} ${version}`);
    await python(["-m", "pip", "download", "--quiet", "--no-deps", "--dest", partial, `${name}==${version}`]);
    const file = readdirSync(partial).find((path) => path.endsWith(".whl"));
    if (!file) throw new NvrtcMissing(`pip download ${name}==${version} brought no wheel`);
    const found = await hashOf(join(partial, file));
    if (found !== sha256) throw new NvrtcMissing(`${file} has sha256 ${found}, ${sha256} is pinned`);
    await python(["-m", "zipfile", "-e", join(partial, file), partial]);
    rmSync(join(partial, file));
    renameSync(partial, folder);
  } finally {
    rmSync(partial, { recursive: true, force: true });
  }
}

async function python(args) {
  try {
    await run(PYTHON, args, { maxBuffer: 2 ** 26 });
  } catch (error) {
    const words = String(error.stderr ?? "").trim() || error.message;
    throw new NvrtcMissing(`${PYTHON} ${args.slice(0, 3).join(" ")}: ${words}`);
  }
}

async function hashOf(path) {
  const hash = createHash("sha256");
  await pipeline(createReadStream(path), hash);
  return hash.digest("hex");
}
