/**
 * The compiled kernels of a folder: its manifest, and which image a GPU and its driver can run. An image is SASS for one
 * architecture (a cubin) or PTX, which the driver compiles for any later architecture.
 */
import { createHash } from "node:crypto";
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { FormatError, NoKernelImageError } from "../../core/errors.js";

/** One image, as the manifest records it. */
export interface KernelImage {
  readonly family: string;
  /** In the manifest's folder. */
  readonly file: string;
  readonly kind: "cubin" | "ptx";
  /** 87 for sm_87 or compute_87. */
  readonly architecture: number;
  /** `nvrtc 11.8.89`. */
  readonly compiler: string;
  /** The compiler's CUDA version, 11080 for 11.8. */
  readonly cuda: number;
  /** What it was compiled with. */
  readonly options: readonly string[];
  readonly sha256: string;
  readonly bytes: number;
}

export interface KernelManifest {
  readonly format: 1;
  /** A hash of kernel sources and compile options: scripts/kernel-sources.mjs. */
  readonly sources: string;
  readonly images: readonly KernelImage[];
}

export interface SelectedImage {
  /** A cubin, or PTX with the zero that ends it. */
  readonly bytes: Uint8Array;
  /** `fourbit sm_87 cubin, nvrtc 11.8.89`. */
  readonly description: string;
}

const MANIFEST = "manifest.json";
const REBUILD = "reinstall halfbyte, or run `npm run build:kernels` in its sources";
const RUN_ON_CPU = 'run on cpu (device: "cpu")';
/** The oldest architecture that kernels are written for. */
const LEAST_ARCHITECTURE = 70;
/** The newest one that toolkits of CUDA 13 have dropped. */
const LAST_OF_CUDA_12 = 72;

/** `sm_87` for 87. */
export function architectureName(architecture: number): string {
  return `sm_${architecture}`;
}

/** `13.0` for 13000. */
export function cudaVersionName(version: number): string {
  return `${Math.floor(version / 1000)}.${Math.floor((version % 1000) / 10)}`;
}

/** What an image is code for: `sm_87`, `compute_80 (PTX)`. */
export function targetName({ kind, architecture }: Pick<KernelImage, "kind" | "architecture">): string {
  return kind === "cubin" ? architectureName(architecture) : `compute_${architecture} (PTX)`;
}

/** `fourbit sm_87 cubin, nvrtc 11.8.89`; `fourbit compute_80 PTX, nvrtc 11.8.89`. */
export function describeImage({ family, kind, architecture, compiler }: KernelImage): string {
  const target = kind === "cubin" ? `${architectureName(architecture)} cubin` : `compute_${architecture} PTX`;
  return `${family} ${target}, ${compiler}`;
}

/**
 * The manifest of a folder of images, or undefined where there is none.
 * @throws {FormatError} not a manifest that this version reads
 */
export function readManifest(folder: string): KernelManifest | undefined {
  const path = join(folder, MANIFEST);
  if (!existsSync(path)) return undefined;
  let parsed: unknown;
  try {
    parsed = JSON.parse(readFileSync(path, "utf8"));
  } catch (error) {
    throw new FormatError("kernels", path, `cannot be read (${(error as Error).message}): ${REBUILD}`, {
      cause: error,
    });
  }
  return checkManifest(path, parsed);
}

/**
 * Every image of a folder, as its manifest lists them; none where there is no folder or manifest. The files are not opened.
 * @throws {FormatError} not a manifest that this version reads
 */
export function listImages(folder: string): readonly KernelImage[] {
  return readManifest(folder)?.images ?? [];
}

/**
 * The best image of a family for a GPU: SASS for just its architecture, else the newest PTX that is not newer than the GPU,
 * in each case only what the driver can load. The file's hash is checked.
 * @param folder holds the images and their manifest
 * @param architecture the GPU's, 87 for compute capability 8.7
 * @param driverVersion the driver's CUDA version, 13000 for 13.0
 * @throws {NoKernelImageError} no image serves: it says what there is and what to do
 * @throws {FormatError} a manifest or file that is not as it was built
 */
export function selectImage(
  folder: string,
  family: string,
  architecture: number,
  driverVersion: number,
): SelectedImage {
  const manifest = readManifest(folder);
  if (!manifest) {
    const advice = `${folder} has no kernels: run \`npm run build:kernels\` (or -- --nvcc with a CUDA toolkit), or ${RUN_ON_CPU}`;
    throw new NoKernelImageError(architectureName(architecture), [], advice);
  }
  const images = manifest.images.filter((image) => image.family === family);
  if (images.length === 0) {
    const families = [...new Set(manifest.images.map((image) => image.family))].join(", ");
    const problem = `no images of the family ${family} (there are: ${families || "none"}): ${REBUILD}`;
    throw new FormatError("kernels", join(folder, MANIFEST), problem);
  }
  const fitting = images.filter((image) => fits(image, architecture));
  const best = fitting.filter((image) => loads(image, driverVersion)).sort(byPreference)[0];
  if (!best) throw noImage(images, fitting, architecture, driverVersion);
  return { bytes: readImage(folder, best), description: describeImage(best) };
}

/** Whether the GPU runs such code. SASS of another minor number would do on some pairs of GPUs; no Tegra is in one. */
function fits(image: KernelImage, architecture: number): boolean {
  return image.kind === "cubin" ? image.architecture === architecture : image.architecture <= architecture;
}

/**
 * Whether the driver takes it. SASS loads on drivers of the compiler's major version and later: within one, NVIDIA keeps
 * drivers and toolkits compatible both ways. PTX is text that an older driver's compiler does not know.
 */
function loads(image: KernelImage, driverVersion: number): boolean {
  if (image.kind === "ptx") return image.cuda <= driverVersion;
  return Math.floor(image.cuda / 1000) <= Math.floor(driverVersion / 1000);
}

/** SASS first, then the newest architecture, then the newest compiler. */
function byPreference(a: KernelImage, b: KernelImage): number {
  if (a.kind !== b.kind) return a.kind === "cubin" ? -1 : 1;
  return b.architecture - a.architecture || b.cuda - a.cuda;
}

function noImage(
  images: readonly KernelImage[],
  fitting: readonly KernelImage[],
  architecture: number,
  driverVersion: number,
): NoKernelImageError {
  const name = architectureName(architecture);
  const available = [...new Set([...images].sort((a, b) => a.architecture - b.architecture).map(targetName))];
  return new NoKernelImageError(name, available, advise(fitting, architecture, driverVersion));
}

function advise(fitting: readonly KernelImage[], architecture: number, driverVersion: number): string {
  const name = architectureName(architecture);
  if (fitting.length > 0) {
    const least = Math.min(
      ...fitting.map(({ kind, cuda }) => (kind === "ptx" ? cuda : Math.floor(cuda / 1000) * 1000)),
    );
    const has = `the driver is of CUDA ${cudaVersionName(driverVersion)}, the package's code for this GPU needs ${cudaVersionName(least)}`;
    return `${has}: update the driver (on a Jetson, JetPack), build kernels with this machine's toolkit (${buildFor(name)}), or ${RUN_ON_CPU}`;
  }
  if (architecture < LEAST_ARCHITECTURE)
    return `halfbyte needs ${architectureName(LEAST_ARCHITECTURE)} or later: ${RUN_ON_CPU}`;
  const toolkit = architecture <= LAST_OF_CUDA_12 ? "a CUDA toolkit up to 12.9" : "a CUDA toolkit that knows it";
  return `build kernels for ${name} with ${toolkit} (${buildFor(name)}), or ${RUN_ON_CPU}`;
}

function buildFor(name: string): string {
  return `in halfbyte's sources, \`npm run build:kernels -- --nvcc --arch ${name}\`, then HALFBYTE_KERNELS=build/kernels-nvcc`;
}

function readImage(folder: string, image: KernelImage): Uint8Array {
  const path = join(folder, image.file);
  let bytes: Buffer;
  try {
    bytes = readFileSync(path);
  } catch (error) {
    throw new FormatError("kernels", path, `cannot be read (${(error as Error).message}): ${REBUILD}`, {
      cause: error,
    });
  }
  const sha256 = createHash("sha256").update(bytes).digest("hex");
  if (bytes.length !== image.bytes || sha256 !== image.sha256) {
    const problem = `${bytes.length} bytes with sha256 ${sha256}, the manifest has ${image.bytes} with ${image.sha256}: ${REBUILD}`;
    throw new FormatError("kernels", path, problem);
  }
  // The driver reads PTX as a C string.
  return image.kind === "ptx" ? Buffer.concat([bytes, Buffer.alloc(1)]) : bytes;
}

const isText = (value: unknown): value is string => typeof value === "string" && value !== "";
const isCount = (value: unknown): value is number => Number.isSafeInteger(value) && (value as number) > 0;
const isHash = (value: unknown): value is string => typeof value === "string" && /^[0-9a-f]{64}$/.test(value);
const isTexts = (value: unknown): value is string[] =>
  Array.isArray(value) && value.every((item) => typeof item === "string");

/** The fields of an image, each with what it must be. */
const IMAGE_FIELDS: { readonly [F in keyof KernelImage]: readonly [words: string, test: (value: unknown) => boolean] } =
  {
    family: ["a name", isText],
    // A plain name: a manifest does not reach out of its folder.
    file: ["a file name", (value) => isText(value) && /^[\w.-]+$/.test(value) && !value.startsWith(".")],
    kind: ["cubin or ptx", (value) => value === "cubin" || value === "ptx"],
    architecture: ["a positive integer", isCount],
    compiler: ["a name", isText],
    cuda: ["a positive integer", isCount],
    options: ["a list of strings", isTexts],
    sha256: ["64 hexadecimal digits", isHash],
    bytes: ["a positive integer", isCount],
  };

function checkManifest(path: string, value: unknown): KernelManifest {
  const fail = (problem: string): never => {
    throw new FormatError("kernels", path, `${problem}: ${REBUILD}`);
  };
  if (!isRecord(value)) return fail("expected an object");
  if (value.format !== 1) fail(`expected format 1, received ${show(value.format)}`);
  if (!isHash(value.sources)) fail(`sources: expected 64 hexadecimal digits, received ${show(value.sources)}`);
  if (!Array.isArray(value.images)) return fail("images: expected a list");
  for (const [index, image] of (value.images as unknown[]).entries()) {
    if (!isRecord(image)) return fail(`images[${index}]: expected an object`);
    for (const [field, [words, test]] of Object.entries(IMAGE_FIELDS)) {
      if (!test(image[field])) fail(`images[${index}].${field}: expected ${words}, received ${show(image[field])}`);
    }
  }
  return value as unknown as KernelManifest;
}

function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function show(value: unknown): string {
  const text = JSON.stringify(value) ?? "nothing";
  return text.length > 80 ? `${text.slice(0, 77)}...` : text;
}
