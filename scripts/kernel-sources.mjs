/**
 * What makes a CUDA kernel compute what it does, as hashes: the sources and compile options (a manifest of images records
 * that), and with the launch geometry the whole fingerprint (a record of a run on a GPU holds that). Comments and layout do
 * not count: see lex.mjs.
 */
import { createHash } from "node:crypto";
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { join, resolve } from "node:path";
import { tokens } from "./lex.mjs";

export const ROOT = resolve(import.meta.dirname, "..");

/**
 * How every kernel is compiled, beside its architecture: IEEE division and square root, denormals kept, and no contraction,
 * so that the GPU's roundings are the cpu's.
 */
export const COMPILE_OPTIONS = Object.freeze([
  "--std=c++17",
  "-default-device",
  "-fmad=false",
  "-prec-div=true",
  "-prec-sqrt=true",
  "-ftz=false",
]);

const KERNELS = "csrc/kernels";
/** Grids, block sizes and operand offsets. */
export const GEOMETRY = [
  ...["kernels", "launch", "layout", "plans-dense", "plans-int8", "plans-matmul4bit", "plans-optimizer"].map(
    (name) => `src/backend/cuda/${name}.ts`,
  ),
  "src/core/product-paths.ts",
  "src/core/optimizers.ts",
];

/**
 * The kernel sources below a root folder: `families` (names of the .cu files, sorted) and `headers` (paths below
 * csrc/kernels, as the sources include them, sorted).
 * @param {string} [root]
 */
export function kernelFiles(root = ROOT) {
  const folder = join(root, KERNELS);
  const files = existsSync(folder)
    ? readdirSync(folder, { recursive: true, encoding: "utf8" })
        .map((path) => path.replaceAll("\\", "/"))
        .sort()
    : [];
  const families = files.filter((path) => /^[^/]+\.cu$/.test(path)).map((path) => path.slice(0, -".cu".length));
  const headers = files.filter((path) => /\.(?:cuh|h)$/.test(path));
  if (families.length === 0) throw new Error(`${folder} has no kernels`);
  if (!headers.some((path) => path.startsWith("generated/"))) {
    throw new Error(`${join(folder, "generated")} is missing: run \`npm run generate\` first`);
  }
  return { folder, families, headers };
}

/**
 * A hash of the kernels' sources, their headers (generated ones too) and the compile options.
 * @param {{ root?: string, options?: readonly string[] }} [from]
 * @returns {string} sha256, hexadecimal
 */
export function kernelSources({ root = ROOT, options = COMPILE_OPTIONS } = {}) {
  const { families, headers } = kernelFiles(root);
  const paths = [...families.map((family) => `${family}.cu`), ...headers].map((path) => `${KERNELS}/${path}`);
  return hash({ options, files: paths.map((path) => normalized(root, path, "cpp")) });
}

/**
 * A hash of all that decides what a kernel computes: `kernelSources` and the launch geometry.
 * @param {{ root?: string, options?: readonly string[] }} [from]
 * @returns {string} sha256, hexadecimal
 */
export function kernelFingerprint({ root = ROOT, options = COMPILE_OPTIONS } = {}) {
  const geometry = GEOMETRY.map((path) => normalized(root, path, "ts"));
  return hash({ sources: kernelSources({ root, options }), geometry });
}

function normalized(root, path, language) {
  try {
    return [path, tokens(readFileSync(join(root, path), "utf8"), language)];
  } catch (error) {
    throw new Error(`${path}: ${error.message}`, { cause: error });
  }
}

function hash(value) {
  return createHash("sha256").update(JSON.stringify(value)).digest("hex");
}
