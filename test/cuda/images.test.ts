import { copyFileSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { expect, test } from "vitest";
import { CudaBackend, kernelFolder } from "#halfbyte/backend/cuda/backend.js";
import type { KernelImage, KernelManifest } from "#halfbyte/backend/cuda/images.js";
import { CudaError, FormatError, NoKernelImageError } from "#halfbyte/core/errors.js";
import { Tensor } from "#halfbyte/core/tensor.js";
import { temporaryFolder } from "../helpers/checkpoint.js";
import { bytes, caught, fill, onGpu } from "./gpu.js";

/** An architecture that this GPU has not and that the package has code for. */
const other = (architecture: number): number => (architecture === 87 ? 110 : 87);

/** Runs a conversion with a folder of images that `change` makes of the package's, then something that needs no image. */
async function convertWith(
  change: (images: KernelImage[], architecture: number) => KernelImage[],
  spoil?: (file: Buffer) => Buffer,
): Promise<{ error: Error; architecture: number }> {
  const folder = temporaryFolder();
  const source = kernelFolder();
  const manifest = JSON.parse(readFileSync(join(source, "manifest.json"), "utf8")) as KernelManifest;
  const probe = new CudaBackend();
  const { architecture } = probe.info;
  await probe.close();
  const images = change([...manifest.images], architecture);
  writeFileSync(folder.file("manifest.json"), JSON.stringify({ ...manifest, images }));
  for (const { file } of images) {
    if (spoil) writeFileSync(folder.file(file), spoil(readFileSync(join(source, file))));
    else copyFileSync(join(source, file), folder.file(file));
  }
  const gpu = new CudaBackend({ kernels: folder.path });
  try {
    using t = bytes(gpu, 1000);
    using x = Tensor.allocate(gpu, "f16", [1000]);
    fill(x, 0);
    const error = await caught(() => x.to("f32").dispose());
    expect(gpu.imagesInUse()).toEqual([]);
    expect(gpu.state).toBe("ready");
    fill(t, 6);
    expect((await t.data())[999]).toBe(6);
    return { error, architecture };
  } finally {
    await gpu.close();
    folder.remove();
  }
}

const foreign = (images: readonly KernelImage[], architecture: number): KernelImage[] =>
  images.filter((i) => i.kind === "cubin" && i.architecture === other(architecture));

onGpu("kernel images", () => {
  test("a package without code for this GPU says which GPU it is and what there is", async () => {
    const { error, architecture } = await convertWith(foreign);
    expect(error).toBeInstanceOf(NoKernelImageError);
    const [own, there] = [`sm_${architecture}`, `sm_${other(architecture)}`];
    expect(error).toMatchObject({ architecture: own, available: [there] });
    expect(error.message).toContain(`no kernels for ${own} (there are: ${there})`);
  });

  test("code of another GPU under a false name is the driver's refusal, by name", async () => {
    const { error } = await convertWith((images, architecture) =>
      foreign(images, architecture).map((image) => ({ ...image, architecture })),
    );
    expect(error).toBeInstanceOf(CudaError);
    expect(error).toMatchObject({ call: "moduleLoad", status: 209, statusName: "CUDA_ERROR_NO_BINARY_FOR_GPU" });
    expect(error.message).toMatch(/convert sm_\d+ cubin/);
  });

  test("a file that is not as it was built is refused before the driver sees it", async () => {
    const { error } = await convertWith(
      (images) => images,
      (file) => file.subarray(0, file.length - 100),
    );
    expect(error).toBeInstanceOf(FormatError);
    expect(error.message).toMatch(/sha256/);
  });

  test("a folder without images says how to make them", async () => {
    const { error } = await convertWith(() => []);
    expect(error.message).toMatch(/build:kernels|reinstall/);
  });
});
