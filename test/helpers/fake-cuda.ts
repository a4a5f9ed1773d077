/** The fake CUDA driver, for tests without a GPU: fake-cuda/fake-cuda.cc says what it can be told by environment variables. */
import { execFileSync, spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import { existsSync, mkdirSync, readFileSync, renameSync, rmSync } from "node:fs";
import { join } from "node:path";

const SOURCES = ["fake-cuda.cc", "cublas.h", "state.h"].map((file) => join(import.meta.dirname, "fake-cuda", file));
const FOLDER = join(import.meta.dirname, "../../build/fake-cuda");
const FLAGS = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-pthread"];

let said = false;

/**
 * The library's path, built when its source has changed; `undefined`, with the reason printed, where there is no compiler.
 * Use it as `HALFBYTE_CUDA_LIBRARY` or `CudaOptions.library`; it is cuBLASLt too, for `HALFBYTE_CUBLASLT` or `CudaOptions.blas`.
 * @param variant `"old"`: a driver, and a cuBLASLt, that lack a function the addon needs; `"unmanaged"`: a driver that lacks those of
 *   managed memory
 */
export function fakeCuda(variant?: "old" | "unmanaged"): string | undefined {
  // A real cuBLASLt beside the fake driver would bring the real one. Tests that want the fake one name it.
  process.env.HALFBYTE_CUBLASLT ??= "off";
  const flags = variant ? [...FLAGS, `-DFAKE_CUDA_${variant.toUpperCase()}`] : FLAGS;
  const hash = createHash("sha256").update([...flags, process.arch].join(" "));
  for (const source of SOURCES) hash.update(readFileSync(source));
  const library = join(FOLDER, `libcuda-fake-${hash.digest("hex").slice(0, 16)}.so`);
  if (existsSync(library)) return library;
  if (process.platform !== "linux" || spawnSync("g++", ["--version"]).status !== 0) {
    if (!said) console.log("skipped: the fake CUDA driver needs Linux and g++");
    said = true;
    return undefined;
  }
  mkdirSync(FOLDER, { recursive: true });
  const part = `${library}.${process.pid}`;
  try {
    execFileSync("g++", [...flags, SOURCES[0]!, "-o", part], { stdio: ["ignore", "inherit", "inherit"] });
    renameSync(part, library);
  } finally {
    rmSync(part, { force: true });
  }
  return library;
}
