/**
 * The cuda backend's products by cuBLASLt, over the real addon, the fake driver and its fake cuBLASLt. Our own kernels do nothing there:
 * a product that is right was the library's, one that leaves y as it was is what an own kernel would have got.
 */
import { mkdtempSync, rmSync, symlinkSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, expect, test } from "vitest";
import { BINDING, BLAS_STATUS } from "#halfbyte/backend/cuda/addon.js";
import type { CudaBackend, CudaOptions } from "#halfbyte/backend/cuda/backend.js";
import { LEAST_WORK } from "#halfbyte/backend/cuda/blas.js";
import { openDriver } from "#halfbyte/backend/cuda/device.js";
import { READ_SLOT, READ_SLOTS_INTEGRATED } from "#halfbyte/backend/cuda/reads.js";
import { describeBlas } from "#halfbyte/cli/doctor-cuda.js";
import { DTYPE_BYTES, DTYPE_ID } from "#halfbyte/core/dtype.js";
import { CudaError } from "#halfbyte/core/errors.js";
import {
  at,
  fakeBackend,
  fill,
  HERE,
  LIBRARY,
  refusing,
  textImages,
  uniform,
  withCuda,
} from "../helpers/fake-backend.js";
import { fakeCuda } from "../helpers/fake-cuda.js";
import { fromBytes, matrices, type ProductShape, productShape, resultType, toBytes } from "../helpers/matrices.js";
import { runScript } from "../helpers/script.js";

const MB = 1 << 20;
const UNTOUCHED = 77;
const FAKE = "HALFBYTE_FAKE_CUDA_";

const withBlas = (body: (backend: CudaBackend) => Promise<void> | void, options: CudaOptions = {}): Promise<void> =>
  withCuda({ blas: LIBRARY!, ...options }, body);

/** With variables of the environment set: the fake library reads them at every call, the backend when it looks for a library. */
async function told(variables: Record<string, string>, body: () => Promise<unknown> | unknown): Promise<void> {
  const before = Object.keys(variables).map((name) => [name, process.env[name]] as const);
  Object.assign(process.env, variables);
  try {
    await body();
  } finally {
    for (const [name, value] of before) {
      if (value === undefined) delete process.env[name];
      else process.env[name] = value;
    }
  }
}

/** Launches a product; what y holds afterwards, and what it should when the library was asked. */
async function multiply(backend: CudaBackend, shape: ProductShape): Promise<{ found: number[]; expected: number[] }> {
  const { a, b, bias, y } = matrices(shape, "backend");
  const { dtype, m, n, k, batch, ldy } = shape;
  const type = resultType(shape);
  const place = (bytes: Uint8Array): ReturnType<CudaBackend["allocate"]> => {
    const storage = backend.allocate(bytes.length);
    backend.write(storage, 0, bytes);
    return storage;
  };
  const operands = [
    toBytes(dtype, a),
    toBytes(dtype, b),
    toBytes(dtype, bias),
    toBytes(
      type,
      y.map(() => UNTOUCHED),
    ),
  ];
  const [inA, inB, inBias, out] = operands.map(place);
  const sizes = { a: at(inA!), b: at(inB!), y: at(out!), m, n, k, batch };
  if (dtype === "i8") backend.launch("igemm", sizes);
  else {
    backend.launch("matmul", {
      ...sizes,
      bias: shape.bias ? at(inBias!) : null,
      ldy,
      dtype: DTYPE_ID[dtype],
      transposeA: Number(shape.transposeA),
      transposeB: Number(shape.transposeB),
      sharedB: Number(shape.sharedB),
    });
  }
  const found = fromBytes(type, await backend.read(out!, 0, y.length * DTYPE_BYTES[type]));
  for (const storage of [inA, inB, inBias, out]) backend.release(storage!);
  return { found, expected: y.map((value) => (Number.isNaN(value) ? UNTOUCHED : value)) };
}

async function byLibrary(backend: CudaBackend, shape: ProductShape): Promise<void> {
  const { found, expected } = await multiply(backend, shape);
  expect(found, JSON.stringify(shape)).toEqual(expected);
}
async function byOwnKernel(backend: CudaBackend, shape: ProductShape): Promise<void> {
  const { found } = await multiply(backend, shape);
  expect(
    found.every((value) => value === UNTOUCHED),
    JSON.stringify(shape),
  ).toBe(true);
}

const PLAIN = productShape({ m: 32, n: 33, k: 34 });
const INTEGERS = productShape({ dtype: "i8", m: 32, n: 40, k: 32, transposeB: true });

describe.runIf(HERE)("products", () => {
  test("have the library's numbers, whatever the operands", () =>
    withBlas(async (backend) => {
      for (const dtype of ["f32", "f16", "bf16"] as const) {
        for (const transposeA of [false, true]) {
          for (const transposeB of [false, true]) {
            const given = { dtype, m: 12, n: 20, k: 50, batch: 4, transposeA, transposeB };
            // The driver's stand-in runs no kernels, so nothing adds a 16-bit bias.
            await byLibrary(backend, productShape({ ...given, bias: dtype === "f32" }));
            await byLibrary(backend, productShape({ ...given, sharedB: true }));
            const slice = { ...given, m: 64, batch: 1, ldy: 30 };
            await byLibrary(backend, productShape(slice));
            // A bias that a kernel adds is added to whole rows.
            if (dtype === "f32") await byLibrary(backend, productShape({ ...slice, bias: true }));
            else await byOwnKernel(backend, productShape({ ...slice, bias: true }));
          }
        }
      }
      await byLibrary(backend, INTEGERS);
      await byLibrary(backend, productShape({ dtype: "i8", m: 16, n: 40, k: 32, batch: 3, transposeB: true }));
      expect(backend.blasVersion()).toBe(`12.6.4 (${LIBRARY})`);
      expect(backend.blasMissing()).toBeUndefined();
      expect(describeBlas(backend)).toMatchObject({ status: "info", detail: `cuBLASLt 12.6.4 (${LIBRARY})` });
    }));

  test("go to our own kernel when they are small, or the library has nothing for them", () =>
    withBlas(async (backend) => {
      const side = Math.cbrt(LEAST_WORK);
      await byLibrary(backend, productShape({ m: side, n: side, k: side }));
      await byOwnKernel(backend, productShape({ m: side, n: side, k: side - 1 }));
      for (let i = 0; i < 2; i++) await byOwnKernel(backend, { ...INTEGERS, k: 33, lda: 33, ldb: 33 });
      await byLibrary(backend, INTEGERS);
      await told({ [`${FAKE}BLAS_FOUND`]: "none" }, () => byOwnKernel(backend, productShape({ m: 50, n: 50, k: 50 })));
      // Remembered: the same product is not asked about again, so its bits do not change half way.
      await byOwnKernel(backend, productShape({ m: 50, n: 50, k: 50 }));
      const nothing = at(backend.allocate(4));
      const empty = { a: nothing, b: nothing, y: nothing, m: 0, n: 64, k: 1 << 20, batch: 1 };
      expect(() => backend.launch("igemm", empty)).not.toThrow();
    }));

  test("wait for reads of what they overwrite", () =>
    withBlas(async (backend) => {
      const rows = (READ_SLOT * (READ_SLOTS_INTEGRATED + 1)) / 4096;
      const [a, b, y] = [backend.allocate(4 * rows), backend.allocate(4096), backend.allocate(4096 * rows)];
      fill(backend, a!, 0);
      fill(backend, b!, 0);
      fill(backend, y!, 5);
      const before = backend.read(y!, 0, y!.bytes);
      const sizes = { m: rows, n: 1024, k: 1, batch: 1, ldy: 1024, dtype: DTYPE_ID.f32 };
      const flags = { transposeA: 0, transposeB: 0, sharedB: 0 };
      backend.launch("matmul", { a: at(a!), b: at(b!), bias: null, y: at(y!), ...sizes, ...flags });
      expect(uniform(await before, 5)).toBe(true);
      expect(uniform(await backend.read(y!, 0, y!.bytes), 0)).toBe(true);
    }));

  test("two backends share the library, each with its workspace", () =>
    withBlas(async (first) => {
      const second = fakeBackend({ blas: LIBRARY! });
      await byLibrary(first, PLAIN);
      await byLibrary(second, PLAIN);
      await second.close();
      await byLibrary(first, PLAIN);
    }));

  test.each([
    ["1", 4 * MB],
    ["0", 32 * MB],
  ])("the workspace is reserved with the first product (integrated: %s)", async (integrated, bytes) => {
    await told({ [`${FAKE}INTEGRATED`]: integrated }, () =>
      withBlas(async (backend) => {
        const { reservedBytes } = backend.memory();
        await backend.synchronize();
        expect(backend.memory().reservedBytes).toBe(reservedBytes);
        await byLibrary(backend, PLAIN);
        expect(backend.memory().reservedBytes - reservedBytes).toBeGreaterThanOrEqual(bytes);
        expect(backend.memory().reservedBytes - reservedBytes).toBeLessThan(bytes + 16 * MB);
        expect(backend.memory()).toMatchObject({ bytes: 0, allocations: 0 });
      }),
    );
  });
});

describe.runIf(HERE)("no library", () => {
  const missing = (options: CudaOptions, reason: RegExp, environment: Record<string, string> = {}): Promise<void> =>
    told(environment, () =>
      withCuda(options, async (backend) => {
        await byOwnKernel(backend, PLAIN);
        await byOwnKernel(backend, INTEGERS);
        expect(backend.blasVersion()).toBeUndefined();
        expect(backend.blasMissing()).toMatch(reason);
        expect(describeBlas(backend).detail).toMatch(/^own kernels, no cuBLASLt: /);
        expect(backend.memory().reservedBytes).toBeLessThan(4 * MB + 16 * MB);
      }),
    );

  test("it is turned off", async () => {
    await missing({ blas: false }, /turned off/);
    await missing({ blas: false }, /turned off/, { HALFBYTE_CUBLASLT: LIBRARY! });
    await missing({ blas: undefined }, /turned off/, { HALFBYTE_CUBLASLT: "off" });
  });

  test("it is not there, lacks a function, is too old, does not start", async () => {
    await missing({ blas: "/none/libcublasLt.so" }, /^\/none\/libcublasLt\.so: noLibrary, .*cannot open/);
    await missing({ blas: undefined }, /^\/none\/x\.so: noLibrary/, { HALFBYTE_CUBLASLT: "/none/x.so" });
    await missing({ blas: fakeCuda("old")! }, /missingSymbol, cublasLtMatmulPreferenceSetAttribute$/);
    await missing({ blas: LIBRARY! }, /noLibrary, it is cuBLASLt 10\.2/, { [`${FAKE}BLAS_VERSION`]: "10.2.3" });
    const fails = { [`${FAKE}BLAS_FAIL`]: "cublasLtCreate=1" };
    await missing({ blas: LIBRARY! }, /CUBLAS_STATUS_NOT_INITIALIZED, cublasLtCreate answered 1/, fails);
  });

  test("it opens but cannot multiply", async () => {
    for (const fail of ["cublasLtMatmul=8", "cublasLtMatmul=13", "cublasLtMatmulAlgoGetHeuristic=14"]) {
      const reason = new RegExp(`^12\\.6\\.4 .*: a first small product failed .*${fail.replace("=", " answered ")}`);
      await missing({ blas: LIBRARY! }, reason, { [`${FAKE}BLAS_FAIL`]: fail });
    }
  });

  test("there is no memory for its workspace", () =>
    missing({ blas: LIBRARY!, memoryLimit: 5 * MB }, /there is no memory for its workspace$/));
});

describe.runIf(HERE)("a product that fails", () => {
  test("is an error that names the library's status, the call and the kernel; the backend goes on", () =>
    withBlas(async (backend) => {
      await byLibrary(backend, PLAIN);
      for (const [result, name] of [
        [1, "NOT_INITIALIZED"],
        [3, "ALLOC_FAILED"],
        [13, "EXECUTION_FAILED"],
        [14, "INTERNAL_ERROR"],
      ] as const) {
        await told({ [`${FAKE}BLAS_FAIL`]: `cublasLtMatmul=${result}` }, async () => {
          const error = await multiply(backend, PLAIN).catch((thrown: unknown) => thrown);
          expect(error).toBeInstanceOf(CudaError);
          const expected = { call: "blasMatmul", status: BLAS_STATUS - result, statusName: `CUBLAS_STATUS_${name}` };
          expect(error).toMatchObject(expected);
          expect((error as CudaError).message).toMatch(
            new RegExp(
              `cublasLtMatmul answered ${result}: dtype 0, m 32, n 33, .* in matmul\\(a=0x\\w+, .*m=32, n=33, k=34, batch=1, ldy=33`,
            ),
          );
        });
        expect(backend.state).toBe("ready");
        await byLibrary(backend, PLAIN);
      }
    }));

  test("for want of memory is tried again once cached memory was given back", () =>
    withBlas(async (backend) => {
      await byLibrary(backend, PLAIN);
      backend.release(backend.allocate(20 * MB));
      const { committedBytes } = backend.memory();
      const { addon } = openDriver();
      const original = addon.blasMatmul;
      let calls = 0;
      Object.assign(addon, { blasMatmul: () => (calls++ === 0 ? BLAS_STATUS - 3 : original()) });
      try {
        await byLibrary(backend, PLAIN);
      } finally {
        Object.assign(addon, { blasMatmul: original });
      }
      expect(calls).toBe(2);
      expect(backend.memory().committedBytes).toBeLessThan(committedBytes - 10 * MB);
    }));

  test("because of an argument is no reason to fall back", () =>
    withBlas(async (backend) => {
      await byLibrary(backend, PLAIN);
      await refusing("blasMatmul", BINDING.badArgument, async () => {
        await expect(multiply(backend, PLAIN)).rejects.toMatchObject({ statusName: "badArgument" });
      });
    }));
});

describe.runIf(HERE)("in a process of its own", () => {
  const images = HERE ? textImages() : "";
  const PROGRAM = `
    import { CudaBackend } from "#halfbyte/backend/cuda/backend.js";
    const backend = new CudaBackend({ kernels: ${JSON.stringify(images)} });
    const s = backend.allocate(64 * 64 * 4), at = { storage: s, byteOffset: 0 };
    const multiply = () => backend.launch("igemm", { a: at, b: at, y: at, m: 64, n: 64, k: 64, batch: 1 });`;

  test("the newest library that the driver can have is taken, and one that is of no use is passed by", async () => {
    const folder = mkdtempSync(join(tmpdir(), "halfbyte-blas-"));
    try {
      symlinkSync(fakeCuda("old")!, join(folder, "libcublasLt.so.13"));
      symlinkSync(LIBRARY!, join(folder, "libcublasLt.so.12"));
      const taken = async (version: string): Promise<[string | null, string | null]> => {
        const program = `${PROGRAM} give([backend.blasVersion() ?? null, backend.blasMissing() ?? null]); await backend.close();`;
        const { given } = await runScript<[string | null, string | null]>(program, {
          HALFBYTE_CUDA_LIBRARY: LIBRARY!,
          HALFBYTE_CUBLASLT: undefined,
          LD_LIBRARY_PATH: folder,
          [`${FAKE}VERSION`]: version,
        });
        return given;
      };
      const found = [expect.stringMatching(/^12\.6\.4 \(/), null];
      expect(await taken("12060")).toEqual(found);
      expect(await taken("13000")).toEqual(found);
    } finally {
      rmSync(folder, { recursive: true });
    }
  });

  test("a fault of the device is reported as that", async () => {
    const { given } = await runScript<{ message: string; state: string }>(
      `${PROGRAM}
      multiply();
      backend.launch("convert", { x: at, y: at, n: 8, from: 0, to: 1 });
      try { for (;;) { multiply(); await new Promise((resolve) => setTimeout(resolve, 1)); } }
      catch (error) { give({ message: error.message, state: backend.state }); }
      await backend.close();`,
      {
        HALFBYTE_CUDA_LIBRARY: LIBRARY!,
        HALFBYTE_CUBLASLT: LIBRARY!,
        [`${FAKE}FAULT_AT`]: "1",
        [`${FAKE}INTEGRATED`]: "0",
      },
    );
    expect(given.state).toBe("failed");
    expect(given.message).toMatch(/CUDA_ERROR_ILLEGAL_ADDRESS \(700\).*one of the last launched: .*igemm\(a=0x/);
  });
});
