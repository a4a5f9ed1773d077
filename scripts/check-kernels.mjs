/**
 * Whether the kernel images are what they should be, without a GPU: every family for every architecture, made of the sources
 * as they are, with an entry for each launch that src/backend/cuda/kernels.ts can plan, in a format that the drivers take.
 *
 *   check-kernels.mjs              the package's images and nvcc's (after build:kernels and build:kernels -- --nvcc)
 *   check-kernels.mjs --release    the package's alone
 *   check-kernels.mjs --nvcc       nvcc's alone
 */
import { createHash } from "node:crypto";
import { existsSync, readdirSync, readFileSync, statSync } from "node:fs";
import { join } from "node:path";
import { parseArgs } from "node:util";
import { cudaVersionName, describeImage, readManifest, selectImage } from "../dist/backend/cuda/images.js";
import { CUDA_KERNELS } from "../dist/backend/cuda/kernels.js";
import { DTYPE_ID, FLOAT_DTYPES } from "../dist/core/dtype.js";
import { BackendError, UnsupportedError } from "../dist/core/errors.js";
import { KERNEL_FAMILY, KERNEL_NAMES, KERNELS, QUANT_TYPE_ID } from "../dist/core/kernels.js";
import { OPTIMIZER_FAMILY_ID } from "../dist/core/optimizers.js";
import { readCubin, readPtx } from "./cubin.mjs";
import { kernelFiles, kernelSources, ROOT } from "./kernel-sources.mjs";

/** Of cubins that every driver from CUDA 11 on loads; CUDA 13 writes 0x41. */
const OS_ABI = 0x33;
/** The architecture that this package is for: on it, no kernel may spill more than two registers. */
const MAIN_ARCHITECTURE = 87;
const MOST_FRAME_BYTES = 8;
const PACKAGE_LIMIT = 25e6;

const FOLDERS = {
  release: {
    folder: "dist/backend/cuda/kernels",
    targets: ["sm_72", "compute_80", "sm_87", "sm_110"],
    /** What each of JetPack's drivers, and a desktop's, gets for a GPU. */
    drivers: [
      { architecture: 72, driver: 11040, wants: "sm_72 cubin" },
      { architecture: 87, driver: 11040, wants: "sm_87 cubin" },
      { architecture: 87, driver: 12020, wants: "sm_87 cubin" },
      { architecture: 87, driver: 12060, wants: "sm_87 cubin" },
      { architecture: 87, driver: 13020, wants: "sm_87 cubin" },
      { architecture: 110, driver: 13000, wants: "sm_110 cubin" },
      { architecture: 80, driver: 11080, wants: "compute_80 PTX" },
      { architecture: 90, driver: 13000, wants: "compute_80 PTX" },
    ],
  },
  nvcc: { folder: "build/kernels-nvcc", targets: ["compute_80", "sm_87"], drivers: [] },
};

const failures = [];
const fail = (words) => failures.push(words);

/** GPUs below this have entries of their own for some launches. */
const NEW_ARCHITECTURE = 80;

/** Every entry that a launch can name, by family, on GPUs that are new or old. */
function plannedEntries(old) {
  const entries = new Map();
  for (const kernel of KERNEL_NAMES) {
    for (const operands of operandsOf(kernel)) {
      const plan = planOf(kernel, operands);
      if (plan === undefined || plan === "driver") continue;
      const family = KERNEL_FAMILY[kernel];
      const { entry } = (old && plan.fallback?.()) || plan;
      entries.set(family, (entries.get(family) ?? new Set()).add(entry));
    }
  }
  return entries;
}

/** Nothing where the sizes are beyond a launch, and for a kernel that is the cpu's alone. */
function planOf(kernel, operands) {
  try {
    return CUDA_KERNELS[kernel](operands);
  } catch (error) {
    if (error instanceof BackendError || error instanceof UnsupportedError) return undefined;
    throw error;
  }
}

/** Operands of a kernel in every combination that an entry's name may depend on. */
function operandsOf(kernel) {
  let all = [{}];
  for (const [field, type] of Object.entries(KERNELS[kernel])) {
    all = valuesOf(field, type).flatMap((value) => all.map((operands) => ({ ...operands, [field]: value })));
  }
  return all;
}

/** Operands that may be missing. */
const OPTIONAL = ["bias", "code", "columns", "offset", "outliers"];
/** Sizes of products that their paths part at; of anything else, three. */
const SIZES = {
  m: [1, 4, 8, 16, 32, 64, 1000, 1 << 24],
  n: [64, 1000, 1 << 20],
  k: [999, 1000, 1056, 4096],
  batch: [1],
};

function valuesOf(field, type) {
  const address = { storage: { bytes: 1, arena: 0, offset: 0 }, byteOffset: 0 };
  if (type === "in" || type === "out") return OPTIONAL.includes(field) ? [null, address] : [address];
  if (type === "size") return SIZES[field] ?? [1, 1000, 1 << 24];
  switch (field) {
    case "from":
    case "to":
      return Object.values(DTYPE_ID);
    case "family":
      return Object.values(OPTIMIZER_FAMILY_ID);
    case "dtype":
    case "gradDtype":
      return FLOAT_DTYPES.map((dtype) => DTYPE_ID[dtype]);
    case "quantType":
      return Object.values(QUANT_TYPE_ID);
    case "itemsize":
      return [1, 2, 4];
    case "blocksize":
      return [32, 64, 128, 256, 512, 1024, 2048, 4096];
    case "blocksize2":
      return [256];
    case "splits":
      return [1, 2];
    default:
      return [0, 1];
  }
}

function checkFolder({ folder, targets, drivers }, sources) {
  const path = join(ROOT, folder);
  const manifest = readManifest(path);
  if (!manifest) return fail(`${folder}: no manifest`);
  if (manifest.sources !== sources) fail(`${folder}: made of other sources or options than these`);
  const families = kernelFiles().families;
  for (const family of families) {
    for (const target of targets) {
      const image = manifest.images.find((i) => i.family === family && targetOf(i) === target);
      if (!image) fail(`${folder}: no ${target} of ${family}`);
    }
    for (const { architecture, driver, wants } of drivers) {
      const { description } = selectImage(path, family, architecture, driver);
      if (!description.startsWith(`${family} ${wants},`)) {
        fail(
          `${folder}: sm_${architecture} with a driver of CUDA ${cudaVersionName(driver)} gets ${description}, not ${wants}`,
        );
      }
    }
  }
  const rows = manifest.images.map((image) =>
    checkImage(path, image, plannedOf(image).get(image.family) ?? new Set(), families),
  );
  console.log(`${folder}\n${rows.join("\n")}\n`);
}

const targetOf = ({ kind, architecture }) => `${kind === "ptx" ? "compute" : "sm"}_${architecture}`;

function plannedOf({ architecture }) {
  return architecture < NEW_ARCHITECTURE ? plannedOnOld : planned;
}

function checkImage(folder, image, planned, families) {
  const what = describeImage(image);
  const bad = (words) => fail(`${what}: ${words}`);
  const bytes = readFileSync(join(folder, image.file));
  const sha256 = createHash("sha256").update(bytes).digest("hex");
  if (sha256 !== image.sha256 || bytes.length !== image.bytes) bad("the file is not the manifest's");
  if (!families.includes(image.family)) bad("csrc/kernels has no such family");
  const found = image.kind === "ptx" ? readPtx(bytes.toString()) : readCubin(bytes);
  if (found.architecture !== image.architecture) bad(`is code for ${found.architecture}`);
  const names = found.entries.map(({ name }) => name);
  const missing = [...planned].filter((entry) => !names.includes(entry));
  if (missing.length > 0) bad(`lacks ${missing.join(", ")}`);
  const unused = names.filter((name) => !planned.has(name));
  const notes = unused.length > 0 ? `; never launched: ${unused.join(", ")}` : "";
  return `  ${what}: ${names.length} entries, ${image.kind === "ptx" ? checkPtx(found, image, bad) : checkCubin(found, image, bad)}${notes}`;
}

function checkPtx({ version }, image, bad) {
  // PTX's version grows with CUDA's: 7.8 came with 11.8, 9.0 with 13.0. A driver takes no newer one than it knows.
  if (image.cuda < 12000 && Number(version) > 7.8) bad(`is PTX ${version}, which drivers of CUDA 11.8 do not know`);
  return `PTX ${version}`;
}

function checkCubin({ osAbi, abiVersion, entries, frameBytes }, image, bad) {
  if (image.cuda < 13000 && osAbi !== OS_ABI)
    bad(`has ELF OS/ABI 0x${osAbi.toString(16)}, not 0x${OS_ABI.toString(16)}`);
  if (image.architecture === MAIN_ARCHITECTURE && frameBytes > MOST_FRAME_BYTES)
    bad(`spills: a stack frame of ${frameBytes} bytes`);
  const registers = Math.max(...entries.map((entry) => entry.registers ?? 0));
  const frame = frameBytes > 0 ? `stack frame ${frameBytes} bytes (spills)` : "no spills";
  return `OS/ABI 0x${osAbi.toString(16)} version ${abiVersion}, up to ${registers} registers, ${frame}`;
}

/** Bytes of the package, before it is compressed. */
function packageBytes() {
  const files = ["dist", "prebuilds"].flatMap((folder) => {
    const path = join(ROOT, folder);
    return existsSync(path)
      ? readdirSync(path, { recursive: true, encoding: "utf8" }).map((file) => join(path, file))
      : [];
  });
  return files.map((file) => statSync(file)).reduce((sum, stat) => sum + (stat.isFile() ? stat.size : 0), 0);
}

const { values } = parseArgs({ options: { release: { type: "boolean" }, nvcc: { type: "boolean" } } });
const chosen = Object.keys(FOLDERS).filter((name) => values[name] || !(values.release || values.nvcc));
const planned = plannedEntries(false);
const plannedOnOld = plannedEntries(true);
const families = kernelFiles().families;
for (const family of planned.keys()) if (!families.includes(family)) fail(`csrc/kernels has no ${family}.cu`);
for (const name of chosen) checkFolder(FOLDERS[name], kernelSources());

if (chosen.includes("release")) {
  const bytes = packageBytes();
  if (bytes > PACKAGE_LIMIT) fail(`dist and prebuilds have ${bytes} bytes, more than ${PACKAGE_LIMIT}`);
}

for (const failure of failures) console.error(`FAILED: ${failure}`);
const entries = [...planned.values()].reduce((sum, names) => sum + names.size, 0);
console.log(
  `${entries} entries of ${planned.size} families: ${failures.length === 0 ? "all there" : `${failures.length} failures`}`,
);
process.exitCode = failures.length === 0 ? 0 : 1;
