/** The cuda backend over the real addon and the fake driver: everything but the kernels is the real thing. */
import { createHash } from "node:crypto";
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { expect } from "vitest";
import type { CudaAddon } from "#halfbyte/backend/cuda/addon.js";
import { CudaBackend, type CudaOptions } from "#halfbyte/backend/cuda/backend.js";
import { openDriver } from "#halfbyte/backend/cuda/device.js";
import { addonPath } from "#halfbyte/backend/cuda/load.js";
import { type Address, KERNEL_FAMILY, type Storage } from "#halfbyte/core/kernels.js";
import { fakeCuda } from "./fake-cuda.js";

export const LIBRARY = fakeCuda();
const built = existsSync(addonPath());
if (!built) console.log("skipped: there is no native addon (npm run build:addon)");
/** Whether there are an addon and a fake driver; if not, the reason was printed. */
export const HERE = built && LIBRARY !== undefined;

/** A folder of images that only the fake driver takes: every entry exists and does nothing. */
export function textImages(text = "any text is a module to the fake driver"): string {
  const folder = mkdtempSync(join(tmpdir(), "halfbyte-images-"));
  process.on("exit", () => rmSync(folder, { recursive: true, force: true }));
  const sha256 = createHash("sha256").update(text).digest("hex");
  const images = [...new Set(Object.values(KERNEL_FAMILY))].map((family) => {
    writeFileSync(join(folder, `${family}.ptx`), text);
    const file = { family, file: `${family}.ptx`, bytes: text.length, sha256 };
    return { ...file, kind: "ptx", architecture: 80, compiler: "text 1.0", cuda: 11080, options: [] };
  });
  writeFileSync(join(folder, "manifest.json"), JSON.stringify({ format: 1, sources: sha256, images }));
  return folder;
}

let images: string | undefined;
export function fakeBackend(options: CudaOptions = {}): CudaBackend {
  images ??= textImages();
  return new CudaBackend({ library: LIBRARY!, kernels: images, blas: false, ...options });
}

/** Runs `body` with a backend; afterwards the driver must have got everything back. */
export async function withCuda(
  options: CudaOptions,
  body: (backend: CudaBackend) => Promise<void> | void,
): Promise<void> {
  const folder = mkdtempSync(join(tmpdir(), "halfbyte-cuda-"));
  const report = join(folder, "report");
  const backend = fakeBackend(options);
  process.env.HALFBYTE_FAKE_CUDA_REPORT = report;
  try {
    await body(backend);
    await backend.close();
    const left = existsSync(report) && readFileSync(report, "utf8");
    expect(left).toBe("allocations=0 hosts=0 streams=0 events=0 modules=0\n");
  } finally {
    delete process.env.HALFBYTE_FAKE_CUDA_REPORT;
    rmSync(folder, { recursive: true });
    await backend.close();
  }
}

/** Makes a function of the addon answer `status` for as long as `body` runs, without doing anything; `after` calls are still served. */
export async function refusing(
  call: keyof CudaAddon,
  status: number,
  body: () => Promise<unknown> | unknown,
  after = 0,
): Promise<void> {
  const { addon } = openDriver();
  const original = addon[call] as (...args: unknown[]) => number;
  let left = after;
  Object.assign(addon, { [call]: (...args: unknown[]) => (left-- > 0 ? original(...args) : status) });
  try {
    await body();
  } finally {
    Object.assign(addon, { [call]: original });
  }
}

export const at = (storage: Storage, byteOffset = 0): Address => ({ storage, byteOffset });

/** Fills `bytes` of a storage with one value. */
export function fill(backend: CudaBackend, storage: Storage, value: number, bytes = storage.bytes): void {
  backend.launch("fill", { dst: at(storage), bytes, value: Math.imul(value & 255, 0x01010101) >>> 0 });
}

/** Whether all bytes are `value`; comparing millions one by one through `expect` takes seconds. */
export function uniform(bytes: Uint8Array, value: number): boolean {
  return Buffer.compare(bytes, Buffer.alloc(bytes.length, value)) === 0;
}
