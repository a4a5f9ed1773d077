/** Which kernel image a GPU and its driver get, over made-up folders of images. */
import { createHash } from "node:crypto";
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import {
  describeImage,
  type KernelImage,
  listImages,
  readManifest,
  selectImage,
} from "#halfbyte/backend/cuda/images.js";
import { CudaUnavailableError, FormatError, NoKernelImageError } from "#halfbyte/core/errors.js";

let folder: string;
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), "halfbyte-images-"));
});
afterEach(() => rmSync(folder, { recursive: true }));

const SOURCES = "5".repeat(64);
const CUDA = { "nvrtc 11.8.89": 11080, "nvrtc 12.6.85": 12060, "nvrtc 13.0.88": 13000 };
type Compiler = keyof typeof CUDA;

/** Writes an image's file, its content its description. */
function image(target: string, compiler: Compiler = "nvrtc 11.8.89", family = "fourbit"): KernelImage {
  const kind = target.startsWith("sm_") ? "cubin" : "ptx";
  const content = Buffer.from(`${family} ${target} by ${compiler}`);
  const file = `${family}.${target}.${compiler.replace(" ", "-")}.${kind}`;
  writeFileSync(join(folder, file), content);
  return {
    family,
    file,
    kind,
    architecture: Number(/\d+/.exec(target)![0]),
    compiler,
    cuda: CUDA[compiler],
    options: ["-fmad=false"],
    sha256: createHash("sha256").update(content).digest("hex"),
    bytes: content.length,
  };
}

function manifest(images: readonly unknown[], rest: object = {}): void {
  writeFileSync(join(folder, "manifest.json"), JSON.stringify({ format: 1, sources: SOURCES, images, ...rest }));
}

/** As the package has them. */
function release(): void {
  manifest([image("sm_87"), image("sm_72"), image("sm_110", "nvrtc 13.0.88"), image("compute_80")]);
}

const select = (architecture: number, driver: number): string =>
  selectImage(folder, "fourbit", architecture, driver).description;

function failure(run: () => unknown): Error {
  try {
    run();
  } catch (error) {
    return error as Error;
  }
  return expect.fail("nothing was thrown");
}

describe("the package's images", () => {
  test.each([
    ["Xavier, JetPack 5", 72, 11040, "fourbit sm_72 cubin, nvrtc 11.8.89"],
    ["Orin, JetPack 5", 87, 11040, "fourbit sm_87 cubin, nvrtc 11.8.89"],
    ["Orin, JetPack 6", 87, 12060, "fourbit sm_87 cubin, nvrtc 11.8.89"],
    ["Orin, JetPack 7", 87, 13020, "fourbit sm_87 cubin, nvrtc 11.8.89"],
    ["Thor, JetPack 7", 110, 13000, "fourbit sm_110 cubin, nvrtc 13.0.88"],
    ["A100", 80, 11080, "fourbit compute_80 PTX, nvrtc 11.8.89"],
    ["RTX 3090", 86, 12040, "fourbit compute_80 PTX, nvrtc 11.8.89"],
    ["H200", 90, 13000, "fourbit compute_80 PTX, nvrtc 11.8.89"],
    ["a Thor whose driver is of CUDA 12", 110, 12090, "fourbit compute_80 PTX, nvrtc 11.8.89"],
  ])("%s", (_, architecture, driver, expected) => {
    release();
    expect(select(architecture, driver)).toBe(expected);
  });

  test("the bytes are the file's; PTX ends with a zero", () => {
    release();
    const text = (architecture: number) =>
      Buffer.from(selectImage(folder, "fourbit", architecture, 12060).bytes).toString();
    expect(text(87)).toBe("fourbit sm_87 by nvrtc 11.8.89");
    expect(text(90)).toBe("fourbit compute_80 by nvrtc 11.8.89\0");
  });

  test("are listed without opening their files", () => {
    release();
    rmSync(join(folder, listImages(folder)[0]!.file));
    expect(listImages(folder).map(describeImage)).toContain("fourbit sm_110 cubin, nvrtc 13.0.88");
    expect(readManifest(folder)?.sources).toBe(SOURCES);
  });
});

describe("the choice", () => {
  test("SASS of another architecture is never taken, not even of the same major number", () => {
    manifest([image("sm_80"), image("sm_86"), image("compute_80")]);
    expect(select(87, 12060)).toBe("fourbit compute_80 PTX, nvrtc 11.8.89");
  });

  test("the newest PTX that is not newer than the GPU", () => {
    manifest([image("compute_90"), image("compute_80"), image("compute_86")]);
    expect(select(89, 12060)).toBe("fourbit compute_86 PTX, nvrtc 11.8.89");
  });

  test("PTX is not newer than the driver, down to the minor number", () => {
    manifest([image("compute_86", "nvrtc 12.6.85"), image("compute_80")]);
    expect(select(87, 12060)).toBe("fourbit compute_86 PTX, nvrtc 12.6.85");
    expect(select(87, 12050)).toBe("fourbit compute_80 PTX, nvrtc 11.8.89");
  });

  test("SASS is of the driver's major number or an older one", () => {
    manifest([image("sm_87", "nvrtc 12.6.85")]);
    expect(select(87, 13000)).toBe("fourbit sm_87 cubin, nvrtc 12.6.85");
    expect(select(87, 12020)).toBe("fourbit sm_87 cubin, nvrtc 12.6.85");
    expect(() => select(87, 11080)).toThrow(NoKernelImageError);
  });

  test("of two cubins the newer compiler's that loads", () => {
    manifest([image("sm_87"), image("sm_87", "nvrtc 13.0.88"), image("sm_87", "nvrtc 12.6.85")]);
    expect(select(87, 13000)).toBe("fourbit sm_87 cubin, nvrtc 13.0.88");
    expect(select(87, 12020)).toBe("fourbit sm_87 cubin, nvrtc 12.6.85");
    expect(select(87, 11040)).toBe("fourbit sm_87 cubin, nvrtc 11.8.89");
  });

  test("a family gets its own image", () => {
    manifest([image("sm_87"), image("sm_87", "nvrtc 11.8.89", "sum")]);
    expect(selectImage(folder, "sum", 87, 12060).description).toBe("sum sm_87 cubin, nvrtc 11.8.89");
  });
});

describe("no image", () => {
  test("the error names the GPU, what there is and what to do", () => {
    release();
    const error = failure(() => select(75, 13000)) as NoKernelImageError;
    expect(error).toBeInstanceOf(NoKernelImageError);
    expect(error).toBeInstanceOf(CudaUnavailableError);
    expect(error.architecture).toBe("sm_75");
    expect(error.available).toEqual(["sm_72", "compute_80 (PTX)", "sm_87", "sm_110"]);
    expect(error.message).toContain("no kernels for sm_75 (there are: sm_72, compute_80 (PTX), sm_87, sm_110)");
    expect(error.advice).toContain("npm run build:kernels -- --nvcc --arch sm_75");
    expect(error.advice).toContain("HALFBYTE_KERNELS=build/kernels-nvcc");
  });

  test("a GPU that toolkits of CUDA 13 have dropped", () => {
    release();
    expect((failure(() => select(70, 12090)) as NoKernelImageError).advice).toContain("a CUDA toolkit up to 12.9");
  });

  test.each([[53], [62]])("sm_%i is too old", (architecture) => {
    release();
    const { advice } = failure(() => select(architecture, 10020)) as NoKernelImageError;
    expect(advice).toBe('halfbyte needs sm_70 or later: run on cpu (device: "cpu")');
  });

  test("a driver that is too old for the only code", () => {
    release();
    const ptx = failure(() => select(86, 11040)) as NoKernelImageError;
    expect(ptx.advice).toMatch(/^the driver is of CUDA 11\.4, the package's code for this GPU needs 11\.8: update/);
    manifest([image("sm_87", "nvrtc 13.0.88")]);
    const sass = failure(() => select(87, 12060)) as NoKernelImageError;
    expect(sass.advice).toMatch(/^the driver is of CUDA 12\.6, the package's code for this GPU needs 13\.0: update/);
  });

  test.each([
    ["an empty folder", "."],
    ["no folder", "missing"],
  ])("%s", (_, path) => {
    const where = join(folder, path);
    const error = failure(() => selectImage(where, "fourbit", 87, 12060)) as NoKernelImageError;
    expect(error).toBeInstanceOf(NoKernelImageError);
    expect(error.available).toEqual([]);
    expect(error.message).toContain("no kernels for sm_87 (there are: none)");
    expect(error.advice).toContain(where);
    expect(error.advice).toContain("npm run build:kernels");
    expect(listImages(where)).toEqual([]);
  });
});

describe("a damaged folder", () => {
  const problem = (): string => {
    const error = failure(() => select(87, 12060));
    expect(error).toBeInstanceOf(FormatError);
    expect(error.message).toContain(folder);
    return (error as FormatError).problem;
  };

  test("a family that is missing", () => {
    manifest([image("sm_87", "nvrtc 11.8.89", "sum"), image("sm_72", "nvrtc 11.8.89", "sum")]);
    expect(problem()).toContain("no images of the family fourbit (there are: sum)");
  });

  test("a file that was changed, cut or removed", () => {
    const made = image("sm_87");
    manifest([made]);
    writeFileSync(join(folder, made.file), "fourbit sm_88 by nvrtc 11.8.89");
    expect(problem()).toContain(`the manifest has 30 with ${made.sha256}`);
    writeFileSync(join(folder, made.file), "");
    expect(problem()).toContain("0 bytes with sha256");
    rmSync(join(folder, made.file));
    expect(problem()).toContain("ENOENT");
  });

  test("a manifest that is not one", () => {
    writeFileSync(join(folder, "manifest.json"), '{"format": 1, "ima');
    expect(problem()).toContain("cannot be read");
    rmSync(join(folder, "manifest.json"));
    mkdirSync(join(folder, "manifest.json"));
    expect(problem()).toContain("cannot be read");
  });

  test.each<[string, object, string]>([
    ["a later format", { format: 2 }, "expected format 1, received 2"],
    ["no hash", { sources: "abc" }, 'sources: expected 64 hexadecimal digits, received "abc"'],
    ["no list", { images: {} }, "images: expected a list"],
    ["a number for an image", { images: [7] }, "images[0]: expected an object"],
  ])("%s", (_, rest, words) => {
    manifest([], rest);
    expect(problem()).toContain(words);
  });

  test.each<[keyof KernelImage, unknown]>([
    ["family", ""],
    ["file", "../fourbit.cubin"],
    ["file", "/etc/passwd"],
    ["file", ".."],
    ["kind", "fatbin"],
    ["architecture", "87"],
    ["architecture", 8.7],
    ["compiler", undefined],
    ["cuda", -1],
    ["options", "-fmad=false"],
    ["sha256", "A".repeat(64)],
    ["bytes", 0],
  ])("an image's %s of %j", (field, value) => {
    manifest([image("sm_72"), { ...image("sm_87"), [field]: value }]);
    expect(problem()).toContain(`images[1].${field}: expected`);
  });
});
