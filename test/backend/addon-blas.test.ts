/** Products by cuBLASLt: the addon against the fake library, which checks every argument and multiplies in plain loops. */
import { existsSync } from "node:fs";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import {
  BINDING,
  BLAS_COMMAND,
  BLAS_STATUS,
  BLAS_WORDS,
  COMMAND_OPERANDS,
  type CudaAddon,
  type Status,
} from "#halfbyte/backend/cuda/addon.js";
import { cudaLayout } from "#halfbyte/backend/cuda/layout.js";
import { addonPath, loadAddon } from "#halfbyte/backend/cuda/load.js";
import { DTYPE_BYTES, DTYPE_ID } from "#halfbyte/core/dtype.js";
import { KERNEL_NAMES } from "#halfbyte/core/kernels.js";
import { fakeCuda } from "../helpers/fake-cuda.js";
import { fromBytes, matrices, type ProductShape, productShape, resultType, toBytes } from "../helpers/matrices.js";

const library = fakeCuda();
const built = existsSync(addonPath());
if (!built) console.log("skipped: there is no native addon (npm run build:addon)");
const here = built && library !== undefined;

const DTYPES = ["f32", "f16", "bf16"] as const;
const BOTH = [false, true];
/** Addresses are multiples of this. */
const SLOT = 1 << 20;
const WORKSPACE = 4 << 20;
/** Plans that the addon keeps. */
const PLANS = 64;

test("the words of a product lie past every kernel's operands", () => {
  for (const kernel of KERNEL_NAMES) expect(COMMAND_OPERANDS + cudaLayout(kernel).bytes).toBeLessThan(BLAS_COMMAND);
});

describe.runIf(here)("cuBLASLt", () => {
  let addon: CudaAddon;
  let stream: number;
  let host: number;
  /** a, b, bias, y and the workspace, SLOT bytes each but for the last. */
  let base: number;

  const made = (status: Status): number => {
    expect([status, addon.detail()]).toEqual([0, ""]);
    return addon.results[0]!;
  };
  const ok = (status: Status): void => void made(status);
  const refused = (status: Status, expected: number, detail: RegExp): void => {
    expect([status, addon.detail()]).toEqual([expected, expect.stringMatching(detail)]);
  };
  /** The fake library reads its environment at every call. */
  const told = (name: string, value: string, body: () => void): void => {
    process.env[`HALFBYTE_FAKE_CUDA_${name}`] = value;
    try {
      body();
    } finally {
      delete process.env[`HALFBYTE_FAKE_CUDA_${name}`];
    }
  };

  const write = (to: number, bytes: Uint8Array): void => {
    if (bytes.length === 0) return;
    ok(addon.hostWrite(host, 0, bytes));
    ok(addon.copyFromHost(to, host, 0, bytes.length, stream));
    ok(addon.streamSynchronize(stream));
  };
  const read = (from: number, bytes: number): Uint8Array => {
    const result = new Uint8Array(bytes);
    ok(addon.copyToHost(host, 0, from, bytes, stream));
    ok(addon.streamSynchronize(stream));
    ok(addon.hostRead(host, 0, result));
    return result;
  };

  type Words = Partial<Record<keyof typeof BLAS_WORDS, number>>;
  const WIDE = new Set(["strideA", "strideB", "strideY", "a", "b", "bias", "y", "workspace"]);
  function command(shape: ProductShape, more: Words = {}): void {
    const { m, n, k, batch, lda, ldb, ldy, transposeA, transposeB, sharedB } = shape;
    const words: Required<Words> = {
      dtype: DTYPE_ID[shape.dtype],
      transposeA: Number(transposeA),
      transposeB: Number(transposeB),
      m,
      n,
      k,
      batch,
      lda,
      ldb,
      ldy,
      stream,
      workspaceBytes: WORKSPACE,
      strideA: (transposeA ? k : m) * lda,
      strideB: sharedB ? 0 : (transposeB ? n : k) * ldb,
      strideY: m * ldy,
      a: base,
      b: base + SLOT,
      bias: shape.bias ? base + 2 * SLOT : 0,
      y: base + 3 * SLOT,
      workspace: base + 4 * SLOT,
      wide: 0,
      ...more,
    };
    const target = new Uint32Array(addon.command, BLAS_COMMAND, 32);
    for (const [name, value] of Object.entries(words)) {
      const at = BLAS_WORDS[name as keyof Words];
      target[at] = value;
      if (WIDE.has(name)) target[at + 1] = value / 2 ** 32;
    }
  }

  /** Multiplies `offset` bytes into each slot, and compares every element of y, also those between its rows. */
  function multiply(shape: ProductShape, offset = 0): void {
    const { a, b, bias, y } = matrices(shape, JSON.stringify(shape));
    write(base + offset, toBytes(shape.dtype, a));
    write(base + SLOT + offset, toBytes(shape.dtype, b));
    write(base + 2 * SLOT + offset, toBytes(shape.dtype, bias));
    const type = resultType(shape);
    const untouched = toBytes(
      type,
      y.map(() => 77),
    );
    write(base + 3 * SLOT + offset, untouched);
    command(shape, {
      a: base + offset,
      b: base + SLOT + offset,
      bias: shape.bias ? base + 2 * SLOT + offset : 0,
      y: base + 3 * SLOT + offset,
    });
    ok(addon.blasMatmul());
    const expected = y.map((value) => (Number.isNaN(value) ? 77 : value));
    const found = fromBytes(type, read(base + 3 * SLOT + offset, y.length * DTYPE_BYTES[type]));
    expect(found, JSON.stringify(shape)).toEqual(expected);
  }

  beforeAll(() => {
    addon = loadAddon();
    expect(addon.blasMatmul()).toBe(BINDING.closed);
    expect(addon.blasOpen(library!, {})).toBe(BINDING.closed);
    ok(addon.open(library));
    ok(addon.init());
    expect(addon.blasOpen(library!, {})).toBe(201);
    ok(addon.retainContext(0));
    stream = made(addon.streamCreate());
    host = made(addon.hostAllocate(SLOT));
    base = made(addon.memoryAllocate(4 * SLOT + WORKSPACE));
    refused(addon.blasMatmul(), BINDING.closed, /blasOpen comes first/);
  });
  // The fake driver aborts when an object of the library outlives the context.
  afterAll(() => ok(addon.releaseContext()));

  test("a library that is missing, lacks a function, is too old or does not start is not open", () => {
    refused(addon.blasOpen("/none/libcublasLt.so", {}), BINDING.noLibrary, /libcublasLt\.so: cannot open/);
    refused(addon.blasOpen(fakeCuda("old")!, {}), BINDING.missingSymbol, /^cublasLtMatmulPreferenceSetAttribute$/);
    told("BLAS_VERSION", "10.2.3", () => refused(addon.blasOpen(library!, {}), BINDING.noLibrary, /10\.2, the oldest/));
    told("BLAS_FAIL", "cublasLtGetProperty=1", () =>
      refused(addon.blasOpen(library!, {}), BLAS_STATUS - 1, /^cublasLtGetProperty answered 1$/),
    );
    const identity: { file?: string } = {};
    told("BLAS_FAIL", "cublasLtCreate=1", () =>
      refused(addon.blasOpen(library!, identity), BLAS_STATUS - 1, /^cublasLtCreate answered 1: the driver is too old/),
    );
    expect(identity.file).toBe(library);
    expect([...addon.results.subarray(0, 3)]).toEqual([12, 6, 4]);
    expect(addon.describe(BLAS_STATUS - 1)).toEqual([
      "CUBLAS_STATUS_NOT_INITIALIZED",
      "cuBLASLt could not be initialized",
    ]);
    expect(addon.describe(BLAS_STATUS - 15)[0]).toBe("CUBLAS_STATUS_NOT_SUPPORTED");
    expect(addon.describe(BLAS_STATUS - 200)).toEqual(["unknown", "unknown status"]);
    expect(addon.describe(BLAS_STATUS)).toEqual(["unknown", "unknown status"]);
    refused(addon.blasOpen(5 as never, {}), BINDING.badArgument, /path/);
    refused(addon.blasOpen(library!, null as never), BINDING.badArgument, /identity/);
    expect(addon.blasMatmul()).toBe(BINDING.closed);
  });

  test("it opens, one at a time", () => {
    const identity: { file?: string } = {};
    ok(addon.blasOpen(library!, identity));
    expect([...addon.results.subarray(0, 3)]).toEqual([12, 6, 4]);
    expect(identity.file).toBe(library);
    ok(addon.blasOpen(library!, identity));
    refused(addon.blasOpen("/other.so", identity), BINDING.badArgument, /is open already/);
    const throwing = { set file(_: string) { throw new Error("no"); } }; // biome-ignore format: one line
    refused(addon.blasOpen(library!, throwing), BINDING.badArgument, /takes file/);
  });

  test.each(DTYPES)("every transpose, with and without bias, one and many, dense and strided: %s", (dtype) => {
    for (const transposeA of BOTH) {
      for (const transposeB of BOTH) {
        for (const bias of BOTH) {
          for (const [batch, sharedB] of [
            [1, false],
            [3, false],
            [3, true],
          ] as const) {
            // biome-ignore format: one line
            const given = { dtype, m: 5, n: 7, k: 9, batch, sharedB, transposeA, transposeB, bias };
            multiply(productShape(given));
            multiply(productShape({ ...given, lda: 12, ldb: 11, ldy: 10 }), 64);
          }
        }
      }
    }
  });

  test.each(DTYPES)("a single row, column, element, and sizes past a tile: %s", (dtype) => {
    for (const m of [1, 2, 33]) {
      for (const n of [1, 3, 65]) {
        for (const k of [1, 31, 64]) multiply(productShape({ dtype, m, n, k, bias: n > 1 }));
      }
    }
  });

  test("int8 gives exact int32", () => {
    for (const batch of [1, 4]) multiply(productShape({ dtype: "i8", m: 6, n: 8, k: 12, batch, transposeB: true }));
    multiply(productShape({ dtype: "i8", m: 6, n: 8, k: 12, transposeB: true, lda: 16, ldb: 20, ldy: 12 }));
  });

  test("what the library has no algorithm for is not supported, and stays so without asking again", () => {
    const odd = productShape({ dtype: "i8", m: 6, n: 8, k: 13, transposeB: true });
    command(odd);
    refused(addon.blasMatmul(), BINDING.notSupported, /GetHeuristic answered 15: dtype 3, m 6, n 8, k 13/);
    expect(addon.results[0]).toBe(1);
    refused(addon.blasMatmul(), BINDING.notSupported, /^refused before: dtype 3, m 6/);
    expect(addon.results[0]).toBe(0);
    command(productShape({ dtype: "i8", m: 6, n: 8, k: 12, transposeB: true }), { a: base + 2 });
    refused(addon.blasMatmul(), BINDING.notSupported, /alignments 2 256 256 256/);
    const fresh = productShape({ m: 11, n: 12, k: 13 });
    command(fresh);
    told("BLAS_FOUND", "none", () =>
      refused(addon.blasMatmul(), BINDING.notSupported, /GetHeuristic found no algorithm: .*m 11, n 12, k 13/),
    );
    refused(addon.blasMatmul(), BINDING.notSupported, /refused before/);
    // More workspace than there is.
    told("BLAS_WORKSPACE", String(WORKSPACE + 1), () => {
      command(productShape({ m: 12, n: 12, k: 13 }));
      refused(addon.blasMatmul(), BINDING.notSupported, /found no algorithm/);
    });
  });

  test("an algorithm's workspace is handed on", () => {
    write(base + 4 * SLOT, new Uint8Array(1001).fill(0xcd));
    told("BLAS_WORKSPACE", "1000", () => {
      multiply(productShape({ m: 21, n: 22, k: 23 }));
      expect(read(base + 4 * SLOT, 1001)).toEqual(Uint8Array.from([...new Array(1000).fill(0x5a), 0xcd]));
      command(productShape({ m: 22, n: 22, k: 23 }), { workspaceBytes: 999 });
      refused(addon.blasMatmul(), BINDING.notSupported, /workspace 999/);
      command(productShape({ m: 22, n: 22, k: 23 }));
      made(addon.blasMatmul());
      expect([...addon.results.subarray(0, 3)]).toEqual([1, 1000, 0.5]);
    });
    command(productShape({ m: 23, n: 22, k: 23 }), { workspaceBytes: 0, workspace: 0 });
    made(addon.blasMatmul());
  });

  test("plans are kept, the longest unused one is given up for a new one", () => {
    const shape = (m: number): ProductShape => productShape({ m, n: 3, k: 4 });
    const planned = (m: number): boolean => {
      command(shape(m));
      return made(addon.blasMatmul()) === 1;
    };
    const first = 100;
    for (let m = first; m < first + PLANS; m++) expect(planned(m)).toBe(true);
    for (let m = first; m < first + PLANS; m++) expect(planned(m)).toBe(false);
    expect(planned(first)).toBe(false);
    expect(planned(first + PLANS)).toBe(true);
    expect(planned(first)).toBe(false);
    expect(planned(first + 1)).toBe(true);
    for (let m = first; m < first + 3 * PLANS; m++) multiply(shape(m));
    // All that a plan depends on.
    const again = (shape: ProductShape, more: Words = {}): number => {
      command(shape, more);
      return made(addon.blasMatmul());
    };
    const plain = productShape({ m: 8, n: 8, k: 8, batch: 2 });
    expect(again(plain)).toBe(1);
    const others: [ProductShape, Words?][] = [
      [{ ...plain, dtype: "f16" }],
      [{ ...plain, m: 7 }],
      [{ ...plain, n: 7 }],
      [{ ...plain, k: 7 }],
      [{ ...plain, batch: 3 }],
      [{ ...plain, transposeA: true }],
      [{ ...plain, transposeB: true }],
      [{ ...plain, bias: true }],
      [{ ...plain, sharedB: true }],
      [{ ...plain, lda: 9 }],
      [{ ...plain, ldb: 9 }],
      [{ ...plain, ldy: 9 }],
      [plain, { workspaceBytes: 512 }],
      [plain, { a: base + 64 }],
      [plain, { b: base + SLOT + 64 }],
      [plain, { y: base + 3 * SLOT + 64 }],
      [plain, { strideA: 128 }],
      [plain, { strideY: 128 }],
    ];
    for (const [other, more] of others) expect([other, more, again(other, more)]).toEqual([other, more, 1]);
    for (const [other, more] of others) expect([other, more, again(other, more)]).toEqual([other, more, 0]);
    // Other addresses of the same alignment.
    expect(again(plain, { a: base + 256, b: base + SLOT + 512, y: base + 3 * SLOT + 1024 })).toBe(0);
    const biased = { ...plain, bias: true };
    expect(again(biased, { bias: base + 2 * SLOT + 256 })).toBe(0);
  });

  test("16-bit operands give float32 sums where that is asked for, and another plan", () => {
    for (const dtype of ["f16", "bf16"] as const) {
      const shape = productShape({ dtype, m: 5, n: 7, k: 9, transposeB: true });
      multiply(shape);
      const { y } = matrices(shape, JSON.stringify(shape));
      write(base + 3 * SLOT, toBytes("f32", y));
      command(shape, { wide: 1 });
      ok(addon.blasMatmul());
      expect(addon.results[0], "planned anew").toBe(1);
      ok(addon.streamSynchronize(stream));
      expect(fromBytes("f32", read(base + 3 * SLOT, y.length * 4))).toEqual(y);
    }
  });

  test("a plan's bias is that of the call", () => {
    const shape = productShape({ m: 2, n: 3, k: 4, bias: true });
    multiply(shape);
    multiply(shape, 256);
  });

  test("a call that fails is named with the product, and leaves nothing", () => {
    const calls = [
      "cublasLtMatmulDescCreate",
      "cublasLtMatmulDescSetAttribute",
      "cublasLtMatrixLayoutCreate",
      "cublasLtMatrixLayoutSetAttribute",
      "cublasLtMatmulPreferenceCreate",
      "cublasLtMatmulPreferenceSetAttribute",
      "cublasLtMatmulAlgoGetHeuristic",
      "cublasLtMatmul",
    ];
    for (const [i, call] of calls.entries()) {
      const shape = productShape({ m: 300 + i, n: 5, k: 6, batch: 2, bias: true });
      for (const result of [1, 3, 13, 14]) {
        command(shape);
        told("BLAS_FAIL", `${call}=${result}`, () =>
          refused(
            addon.blasMatmul(),
            BLAS_STATUS - result,
            new RegExp(`^${call} answered ${result}: dtype 0, m ${300 + i}, n 5`),
          ),
        );
        multiply(shape);
        expect(addon.describe(BLAS_STATUS - result)[0]).toMatch(/^CUBLAS_STATUS_[A-Z_]+$/);
        // So that it is planned anew.
        for (let m = 1; m <= PLANS; m++) multiply(productShape({ m, n: 1, k: 1 }));
      }
      command(shape);
      told("BLAS_FAIL", `${call}=1000`, () => refused(addon.blasMatmul(), BLAS_STATUS, /answered 1000/));
    }
    for (const result of [7, 8, 15]) {
      const shape = productShape({ m: 400 + result, n: 5, k: 6 });
      command(shape);
      told("BLAS_FAIL", `cublasLtMatmul=${result}`, () => {
        refused(addon.blasMatmul(), BINDING.notSupported, new RegExp(`^cublasLtMatmul answered ${result}`));
      });
      refused(addon.blasMatmul(), BINDING.notSupported, /^refused before/);
    }
  });

  test("what does not fit is refused before the library sees it", () => {
    const shape = productShape({ m: 8, n: 8, k: 8, batch: 2, bias: true });
    const wrong = (more: Words, detail: RegExp, status: number = BINDING.badArgument): void => {
      command(shape, more);
      refused(addon.blasMatmul(), status, detail);
    };
    wrong({ dtype: 4 }, /dtype: there is no product of 4/);
    wrong({ stream: 5 }, /no stream 5/, BINDING.badHandle);
    for (const size of ["m", "n", "k", "batch"] as const) {
      wrong({ [size]: 0 }, /^[aby]: .* elements/);
      wrong({ [size]: 2 ** 31 }, /^[aby]: .* elements/);
      wrong({ [size]: 2 ** 31 - 1 }, /^[aby]: .* elements/);
    }
    wrong({ lda: 7 }, /^a: 2 x 8 x 8 elements, 7 from row to row/);
    wrong({ ldb: 7 }, /^b: /);
    wrong({ ldy: 7 }, /^y: /);
    wrong({ ldy: 2 ** 32 - 1 }, /^y: /);
    wrong({ a: 12345 }, /^a: .*not inside an allocation/);
    wrong({ a: 0 }, /^a: /);
    wrong({ b: base + 4 * SLOT + WORKSPACE - 4 }, /^b: .*not inside an allocation/);
    wrong({ y: base + 4 * SLOT + WORKSPACE - 508 }, /^y: /);
    wrong({ bias: base + 4 * SLOT + WORKSPACE - 28 }, /^bias: /);
    wrong({ a: base + 2 }, /^a: /);
    wrong({ strideA: 2 ** 52 }, /^a: /);
    wrong({ strideB: 2 ** 22 }, /^b: /);
    wrong({ strideY: 63 }, /^y: matrices 63 elements apart overlap/);
    wrong({ workspace: base + 4 * SLOT + 512 }, /^workspace: 4194304 bytes/);
    wrong({ workspace: 0 }, /^workspace: /);
  });

  test("the handle goes with the context and comes back with another", () => {
    for (let i = 0; i < 3; i++) {
      ok(addon.releaseContext());
      expect(addon.blasMatmul()).toBe(BINDING.closed);
      expect(addon.blasOpen(library!, {})).toBe(201);
      ok(addon.retainContext(0));
      expect(addon.blasMatmul()).toBe(BINDING.closed);
      stream = made(addon.streamCreate());
      host = made(addon.hostAllocate(SLOT));
      base = made(addon.memoryAllocate(4 * SLOT + WORKSPACE));
      // A library of CUDA 11 is told which epilogue its algorithms must have.
      told("BLAS_VERSION", i === 1 ? "11.6.5" : "13.0.0", () => {
        ok(addon.blasOpen(library!, {}));
        multiply(productShape({ dtype: "bf16", m: 3, n: 4, k: 5, bias: true }));
        multiply(productShape({ dtype: "i8", m: 4, n: 4, k: 4, transposeB: true }));
      });
    }
  });
});
