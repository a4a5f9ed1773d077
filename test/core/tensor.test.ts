import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { CpuBackend } from "#halfbyte/backend/cpu/backend.js";
import { cudaMissing } from "#halfbyte/backend/devices.js";
import { DTYPES, type DType } from "#halfbyte/core/dtype.js";
import { ArgumentError, DeviceError, DisposedError, DTypeError, ShapeError } from "#halfbyte/core/errors.js";
import { liveTensors, Tensor } from "#halfbyte/core/tensor.js";
import { HAS_FLOAT16_ARRAY } from "#halfbyte/core/typedarray.js";
import { init, keep, memory, shutdown, tensor, tidy, zeros } from "#halfbyte/index.js";
import { quantize4bit } from "#halfbyte/ops/fourbit.js";
import { withBackend } from "../helpers/backends.js";

beforeAll(async () => {
  await init({ threads: 2, guards: true });
});
afterAll(() => shutdown());

describe("creation", () => {
  test("from every array, to every dtype, and back", async () => {
    const cases: [Parameters<typeof tensor>[0], DType, ArrayLike<number>][] = [
      [[1, -2, 0.5], "f32", [1, -2, 0.5]],
      [Float64Array.of(1, 1 / 3), "f32", [1, Math.fround(1 / 3)]],
      [Int8Array.of(-128, 127), "i8", [-128, 127]],
      [Uint8Array.of(0, 255), "u8", [0, 255]],
      [Int32Array.of(-(2 ** 31), 2 ** 31 - 1), "i32", [-(2 ** 31), 2 ** 31 - 1]],
    ];
    for (const [data, dtype, values] of cases) {
      using t = tensor(data);
      expect([t.dtype, [...t.shape], [...((await t.data()) as ArrayLike<number> & Iterable<number>)]]).toEqual([
        dtype,
        [data.length],
        values,
      ]);
    }
    using half = tensor(Uint16Array.of(0x3c00, 0xc000), { dtype: "f16" });
    using wide = half.to("f32");
    expect([...wide.dataSync()]).toEqual([1, -2]);
    expect([...(half.dataSync() as Uint16Array)]).toEqual(HAS_FLOAT16_ARRAY ? [1, -2] : [0x3c00, 0xc000]);
    using bf = tensor([1, 1 + 2 ** -8, 1 + 3 * 2 ** -8], { dtype: "bf16" });
    expect([...bf.dataSync()]).toEqual([0x3f80, 0x3f80, 0x3f82]);
    using ints = tensor([1, 2, 3, 4], { dtype: "i8", shape: [2, 2] });
    expect([[...ints.shape], [...ints.dataSync()]]).toEqual([
      [2, 2],
      [1, 2, 3, 4],
    ]);
    using none = tensor([], { shape: [0, 3] });
    expect((await none.data()).length).toBe(0);
    using z = zeros([3, 3], { dtype: "i32" });
    expect([...z.dataSync()]).toEqual(new Array(9).fill(0));
  });

  test("what does not fit is an error that says so, and nothing is kept", () => {
    const before = memory().cpu!.tensors;
    expect(() => tensor(Uint16Array.of(1))).toThrow(
      /dtype: expected f16 or bf16 for this array, received Uint16Array\(1\)/,
    );
    expect(() => tensor([1, 2], { shape: [3] })).toThrow(ShapeError);
    expect(() => tensor([1], { shape: [-1] })).toThrow(ShapeError);
    expect(() => tensor([1.5], { dtype: "i8" })).toThrow(/data\[0\]: expected an integer that i8 holds, received 1.5/);
    expect(() => tensor([300], { dtype: "u8" })).toThrow(ArgumentError);
    expect(() => tensor(Float32Array.of(1), { dtype: "i8" })).toThrow(DTypeError);
    expect(() => tensor(Int32Array.of(1), { dtype: "u8" })).toThrow(DTypeError);
    expect(() => tensor([1], { dtype: "f64" as DType })).toThrow(DTypeError);
    if (cudaMissing()) expect(() => tensor([1], { device: "cuda" })).toThrow(DeviceError);
    expect(() => tensor([1], { device: "tpu" as "cpu" })).toThrow(/auto, cpu or cuda/);
    expect(memory().cpu!.tensors).toBe(before);
  });

  test("copyFrom between parts of one tensor that overlap moves them as they were", async () => {
    for (const [from, to] of [
      [0, 1],
      [3, 1],
      [0, 0],
    ] as const) {
      using all = tensor(Float32Array.from({ length: 10_000 }, (_, i) => i));
      const length = 9_000;
      using source = all.slice(from, from + length);
      using target = all.slice(to, to + length);
      target.copyFrom(source);
      const expected = Array.from({ length: 10_000 }, (_, i) => (i >= to && i < to + length ? i - to + from : i));
      expect([...(await all.data())]).toEqual(expected);
    }
  });

  test("copyFrom overwrites, checks its length, and takes tensors", async () => {
    using t = tensor([1, 2, 3]);
    t.copyFrom([4, 5, 6]);
    expect([...(await t.data())]).toEqual([4, 5, 6]);
    expect(() => t.copyFrom([1])).toThrow(/expected 3 elements for shape \[3\], received 1/);
    using other = tensor([7, 8, 9], { dtype: "bf16" });
    t.copyFrom(other);
    expect([...t.dataSync()]).toEqual([7, 8, 9]);
    other.copyFrom([0.1, 0.2, 0.3]);
    using back = other.to("f32");
    expect([...back.dataSync()]).toEqual([0.10009765625, 0.2001953125, 0.30078125]);
  });
});

describe("views", () => {
  test("reshape and slice share storage until the last is gone", async () => {
    const t = tensor([0, 1, 2, 3, 4, 5], { shape: [3, 2] });
    const bytes = memory().cpu!.bytes;
    const row = t.slice(1, 2);
    const flat = row.reshape([2]);
    t.dispose();
    row.dispose();
    expect([...(await flat.data())]).toEqual([2, 3]);
    expect(memory().cpu!.bytes).toBe(bytes);
    flat.dispose();
    expect(memory().cpu!.bytes).toBe(bytes - 24);
    using again = tensor([1, 2]);
    expect(() => again.reshape([3])).toThrow(ShapeError);
    expect(() => again.slice(1, 3)).toThrow(/0 <= begin <= end <= 2/);
    using scalar = tensor([1], { shape: [] });
    expect(() => scalar.slice(0, 1)).toThrow(ShapeError);
  });

  test("writing a view writes the tensor", () => {
    using t = tensor([0, 1, 2, 3]);
    using part = t.slice(1, 3);
    part.copyFrom([8, 9]);
    expect([...t.dataSync()]).toEqual([0, 8, 9, 3]);
  });
});

describe("lifetime", () => {
  test("use after dispose names the tensor and the call", async () => {
    const t = tensor([1, 2]);
    t.dispose();
    t.dispose();
    expect(t.isDisposed).toBe(true);
    expect(() => t.dataSync()).toThrow(/\[dataSync\] Tensor\(f32 \[2\] on cpu, disposed\): used after dispose/);
    await expect(t.data()).rejects.toThrow(DisposedError);
    for (const use of [() => t.to("f16"), () => t.reshape([2]), () => t.copyFrom([1, 2]), () => t.slice(0, 1)]) {
      expect(use).toThrow(DisposedError);
    }
    expect(() => quantize4bit(t)).toThrow(/\[quantize4bit\] A Tensor/);
  });

  test("tidy disposes what is made inside, except the result", () => {
    const before = memory().cpu!.tensors;
    const outside = tensor([1]);
    const { kept, list } = tidy(() => {
      tensor([2]);
      const inner = tidy(() => [tensor([3]), tensor([4])]);
      return { kept: tensor([5]), list: inner };
    });
    expect(memory().cpu!.tensors).toBe(before + 4);
    for (const t of [outside, kept, ...list]) t.dispose();
    const [packed, state] = tidy(() => quantize4bit(tensor(new Float32Array(1000)), { compressStatistics: true }));
    expect(memory().cpu!.tensors).toBe(before + 1 + state.tensors().length);
    packed.dispose();
    state.dispose();
    let escaped: Tensor | undefined;
    tidy(() => {
      escaped = keep(tensor([6]));
      tensor([7]);
    });
    expect([...(escaped!.dataSync() as Float32Array)]).toEqual([6]);
    escaped!.dispose();
    expect(() =>
      tidy(() => {
        tensor([1]);
        throw new RangeError("mine");
      }),
    ).toThrow("mine");
    expect(() => tidy(async () => tensor([1]))).toThrow(/a synchronous function/);
    expect(memory().cpu!.tensors).toBe(before);
  });

  test("using", () => {
    const before = memory().cpu!.tensors;
    {
      using t = tensor([1]);
      expect(t.size).toBe(1);
    }
    expect(memory().cpu!.tensors).toBe(before);
  });

  test("tensors that nobody disposed are found by the collector", async () => {
    const backend = new CpuBackend({ threads: 1 });
    const drop = (): void => {
      for (let i = 0; i < 100; i++) Tensor.allocate(backend, "u8", [1000]);
    };
    drop();
    const { gc } = globalThis;
    for (let i = 0; gc && i < 50 && liveTensors(backend) > 0; i++) {
      gc();
      await new Promise((resolve) => setTimeout(resolve, 10));
    }
    if (gc) expect([liveTensors(backend), backend.memory().bytes]).toEqual([0, 0]);
    else expect(liveTensors(backend)).toBe(100);
    await backend.close();
  });
});

describe("devices", () => {
  test("mixed devices are refused", () =>
    withBackend({}, (backend) => {
      using a = tensor(new Float32Array(64));
      using out = Tensor.allocate(backend, "u8", [32, 1]);
      expect(() => quantize4bit(a, { out })).toThrow(DeviceError);
    }));

  test("copyFrom carries elements between devices and leaves nothing behind", () =>
    withBackend({}, (backend) => {
      using a = tensor([1, 2.5, -3]);
      using b = Tensor.allocate(backend, "bf16", [3]).copyFrom(a);
      const before = [memory().cpu!.tensors, liveTensors(backend)];
      using c = tensor([0, 0, 0]).copyFrom(b);
      expect([...c.dataSync()]).toEqual([1, 2.5, -3]);
      expect([memory().cpu!.tensors - 1, liveTensors(backend)]).toEqual(before);
    }));

  test("init twice is refused", async () => {
    await expect(init()).rejects.toThrow(/call shutdown\(\) first/);
  });
});

test("every dtype has a size and survives a round trip of bytes", async () => {
  for (const dtype of DTYPES) {
    using t = zeros([5], { dtype });
    expect((await t.bytes()).length).toBe(t.byteLength);
  }
});
