/** What the int8 and sparse products refuse. */
import { expect, test } from "vitest";
import type { FloatDType } from "#halfbyte/core/dtype.js";
import { liveTensors, Tensor } from "#halfbyte/core/tensor.js";
import {
  batchedIgemm,
  COOSparseTensor,
  cooZeros,
  getBackend,
  igemm,
  int8DoubleQuant,
  int8LinearMatmul,
  int8MixedScaledMm,
  int8MmDequant,
  int8ScaledMm,
  int8VectorwiseDequant,
  int8VectorwiseQuant,
  matmul,
  matmul4bit,
  matmul8bit,
  OutlierColumns,
  quantize4bit,
  spmmCoo,
  spmmCooVerySparse,
  tidy,
} from "#halfbyte/index.js";
import { withBackend } from "../helpers/backends.js";
import { gone, type Make, type Refusal, refuse } from "./refuse.js";

test("int8VectorwiseQuant and int8DoubleQuant", async () => {
  for (const [op, call] of [
    ["int8VectorwiseQuant", int8VectorwiseQuant],
    ["int8DoubleQuant", int8DoubleQuant],
  ] as const) {
    await refuse(op, (make) => [
      [() => call({} as Tensor), "ArgumentError", "A"],
      [() => call(make("i8", [2, 2])), "DTypeError", "A"],
      [() => call(make("f16", [])), "ShapeError", "A", "dimension"],
      [() => call(gone(make, "f16", [2, 2])), "DisposedError", "A"],
      [() => call(make("f16", [2, 2]), { threshold: -1 }), "ArgumentError", "threshold"],
      [() => call(make("f16", [2, 2]), { threshold: Number.NaN }), "ArgumentError", "threshold"],
      [() => call(make("f16", [2, 2]), { threshold: Number.POSITIVE_INFINITY }), "ArgumentError", "threshold"],
      [() => call(make("f16", [2, 2]), { threshold: "6" as unknown as number }), "ArgumentError", "threshold"],
      // 0 and infinity in float32.
      [() => call(make("f16", [2, 2]), { threshold: 1e-50 }), "ArgumentError", "threshold", "float32"],
      [() => call(make("f16", [2, 2]), { threshold: 1e39 }), "ArgumentError", "threshold", "float32"],
      [() => call(make("f16", [2, 2]), { threshold: -1e-50 }), "ArgumentError", "threshold"],
      [() => call(make("f16", [2, 2]), { allowNonFinite: "no" as never }), "ArgumentError", "allowNonFinite"],
    ]);
  }
});

test("int8LinearMatmul", async () => {
  await refuse("int8LinearMatmul", (make, other, keep) => {
    const [A, B] = [make("i8", [2, 3, 4]), make("i8", [5, 4])];
    const words = make("i32", [30]);
    return [
      [() => int8LinearMatmul(make("f16", [3, 4]), B), "DTypeError", "A", "i8"],
      [() => int8LinearMatmul(A, make("u8", [5, 4])), "DTypeError", "B"],
      [() => int8LinearMatmul(A, other("i8", [5, 4])), "DeviceError", "B"],
      [() => int8LinearMatmul(make("i8", []), B), "ShapeError", "A"],
      [() => int8LinearMatmul(A, make("i8", [4, 5])), "ShapeError", "B", "[N, 4]"],
      [() => int8LinearMatmul(A, make("i8", [1, 5, 4])), "ShapeError", "B"],
      [() => int8LinearMatmul(gone(make, "i8", [3, 4]), B), "DisposedError", "A"],
      [() => int8LinearMatmul(A, B, { out: make("f32", [2, 3, 5]) }), "DTypeError", "out", "i32"],
      [() => int8LinearMatmul(A, B, { out: keep(words.slice(1, 30)) }), "ShapeError", "out"],
      [() => int8LinearMatmul(A, B, { out: other("i32", [30]) }), "DeviceError", "out"],
    ];
  });
});

test("int8MmDequant and int8ScaledMm", async () => {
  await refuse("int8MmDequant", (make, other, keep) => {
    const A = make("i32", [2, 3, 5]);
    const [rows, cols] = [make("f32", [6]), make("f32", [5])];
    const call = (options: object) => () => int8MmDequant(A, rows, cols, options);
    const joint = make("f32", [35]);
    const [out, scales] = keep([joint.slice(0, 30), joint.slice(29, 35)]);
    return [
      [() => int8MmDequant(make("i8", [6, 5]), rows, cols), "DTypeError", "A", "i32"],
      [() => int8MmDequant(make("i32", []), rows, cols), "ShapeError", "A"],
      [() => int8MmDequant(A, cols, cols), "ShapeError", "rowStats", "6 scales"],
      [() => int8MmDequant(A, rows, rows), "ShapeError", "colStats", "5 scales"],
      [() => int8MmDequant(A, make("f16", [6]), cols), "DTypeError", "rowStats"],
      [() => int8MmDequant(A, rows, other("f32", [5])), "DeviceError", "colStats"],
      [() => int8MmDequant(A, gone(make, "f32", [6]), cols), "DisposedError", "rowStats"],
      [call({ dtype: "i8" }), "ArgumentError", "dtype", "f32"],
      [call({ bias: make("f32", [5]) }), "DTypeError", "bias", "f16"],
      [call({ dtype: "f32", bias: make("f16", [5]) }), "DTypeError", "bias", "f32"],
      [call({ bias: make("f16", [6]) }), "ShapeError", "bias"],
      [call({ out: make("f32", [30]) }), "DTypeError", "out"],
      [call({ out: make("f16", [31]) }), "ShapeError", "out"],
      [() => int8MmDequant(A, scales, cols, { dtype: "f32", out }), "ArgumentError", "out", "apart from rowStats"],
    ];
  });
  await refuse("int8ScaledMm", (make, other) => {
    const [A, B] = [make("i8", [3, 4]), make("i8", [5, 4])];
    const [rows, cols] = [make("f32", [3]), make("f32", [5])];
    return [
      [() => int8ScaledMm(make("f16", [3, 4]), B, rows, cols), "DTypeError", "A"],
      [() => int8ScaledMm(A, make("i8", [5, 3]), rows, cols), "ShapeError", "B"],
      [() => int8ScaledMm(A, other("i8", [5, 4]), rows, cols), "DeviceError", "B"],
      [() => int8ScaledMm(A, B, cols, cols), "ShapeError", "rowStats"],
      [() => int8ScaledMm(A, B, rows, rows), "ShapeError", "colStats"],
      [() => int8ScaledMm(A, B, rows, make("i32", [5])), "DTypeError", "colStats"],
      [() => int8ScaledMm(A, B, rows, cols, { dtype: "u8" as FloatDType }), "ArgumentError", "dtype"],
      [() => int8ScaledMm(A, B, rows, cols, { bias: make("bf16", [5]) }), "DTypeError", "bias"],
      [() => int8ScaledMm(A, B, rows, cols, { out: make("f16", [14]) }), "ShapeError", "out"],
    ];
  });
});

test("int8MixedScaledMm and matmul8bit", async () => {
  await refuse("int8MixedScaledMm", (make, other, keep) => {
    const [A, CA, CB] = [make("bf16", [3, 4]), make("i8", [3, 4]), make("i8", [5, 4])];
    const [SCA, SCB] = [make("f32", [3]), make("f32", [5])];
    const call = (options: object) => () => int8MixedScaledMm(A, CA, CB, SCA, SCB, options);
    const outliers = (columns: Tensor, count: Tensor) =>
      call({ outlierCols: new OutlierColumns(columns as Tensor<"i32">, count as Tensor<"i32">) });
    const [list, one] = [make("i32", [4]), make("i32", [1])];
    const frame = make("bf16", [15]);
    const bias = keep(frame.slice(10, 15));
    return [
      [() => int8MixedScaledMm(CA, CA, CB, SCA, SCB), "DTypeError", "A"],
      [() => int8MixedScaledMm(make("bf16", [3, 5]), CA, CB, SCA, SCB), "ShapeError", "A", "as CA"],
      [() => int8MixedScaledMm(make("bf16", [4, 3]), CA, CB, SCA, SCB), "ShapeError", "A", "as CA"],
      [
        () => int8MixedScaledMm(make("bf16", [5, 0]), make("i8", [3, 0]), make("i8", [5, 0]), SCA, SCB),
        "ShapeError",
        "A",
        "[3, 0]",
      ],
      [() => int8MixedScaledMm(make("bf16", []), CA, CB, SCA, SCB), "ShapeError", "A"],
      [() => int8MixedScaledMm(A, A, CB, SCA, SCB), "DTypeError", "CA"],
      [() => int8MixedScaledMm(A, other("i8", [3, 4]), CB, SCA, SCB), "DeviceError", "CA"],
      [() => int8MixedScaledMm(A, CA, make("i8", [5, 3]), SCA, SCB), "ShapeError", "CB"],
      [() => int8MixedScaledMm(A, CA, CB, SCB, SCB), "ShapeError", "SCA"],
      [() => int8MixedScaledMm(A, CA, CB, SCA, SCA), "ShapeError", "SCB"],
      [call({ outlierCols: list }), "ArgumentError", "outlierCols", "OutlierColumns"],
      [call({ outlierCols: 0 }), "ArgumentError", "outlierCols", "OutlierColumns"],
      [call({ outlierCols: false }), "ArgumentError", "outlierCols", "OutlierColumns"],
      [outliers(make("i32", [3]), one), "ShapeError", "outlierCols.columns", "[4]"],
      [outliers(list, make("i32", [2])), "ShapeError", "outlierCols.count"],
      [outliers(make("u8", [4]), one), "DTypeError", "outlierCols.columns"],
      [outliers(list, other("i32", [1])), "DeviceError", "outlierCols.count"],
      [outliers(gone(make, "i32", [4]), one), "DisposedError", "outlierCols.columns"],
      [call({ bias: make("f16", [5]) }), "DTypeError", "bias", "bf16"],
      [call({ out: make("f16", [15]) }), "DTypeError", "out"],
      [call({ bias, out: frame }), "ArgumentError", "out", "apart from bias"],
    ];
  });
  await refuse("matmul8bit", (make, other) => {
    const [A, CB, SCB] = [make("f32", [3, 4]), make("i8", [5, 4]), make("f32", [5])];
    const call = (options: object) => () => matmul8bit(A, CB, SCB, options);
    return [
      [() => matmul8bit(CB, CB, SCB), "DTypeError", "A"],
      [() => matmul8bit(make("f32", []), CB, SCB), "ShapeError", "A"],
      [() => matmul8bit(A, make("u8", [5, 4]), SCB), "DTypeError", "CB"],
      [() => matmul8bit(A, make("i8", [4, 5]), SCB), "ShapeError", "CB", "[N, 4]"],
      [() => matmul8bit(A, other("i8", [5, 4]), SCB), "DeviceError", "CB"],
      [() => matmul8bit(A, CB, make("f32", [4])), "ShapeError", "SCB", "5 scales"],
      [() => matmul8bit(A, CB, gone(make, "f32", [5])), "DisposedError", "SCB"],
      [call({ threshold: -6 }), "ArgumentError", "threshold"],
      [call({ threshold: 1e-50 }), "ArgumentError", "threshold", "float32"],
      [call({ allowNonFinite: "no" }), "ArgumentError", "allowNonFinite", "true or false"],
      [call({ bias: 0 }), "ArgumentError", "bias", "a Tensor"],
      [call({ out: false }), "ArgumentError", "out", "a Tensor"],
      [call({ bias: make("f16", [5]) }), "DTypeError", "bias"],
      [call({ out: make("f32", [16]) }), "ShapeError", "out"],
      [call({ out: SCB }), "ShapeError", "out"],
    ];
  });
});

test("igemm and batchedIgemm", async () => {
  await refuse("igemm", (make, other) => {
    const [A, B] = [make("i8", [2, 3, 4]), make("i8", [4, 5])];
    return [
      [() => igemm(make("i32", [3, 4]), B), "DTypeError", "A"],
      [() => igemm(A, make("f32", [4, 5])), "DTypeError", "B"],
      [() => igemm(A, other("i8", [4, 5])), "DeviceError", "B"],
      [() => igemm(gone(make, "i8", [3, 4]), B), "DisposedError", "A"],
      [() => igemm(make("i8", [4]), B), "ShapeError", "A"],
      [() => igemm(A, B, { transposedB: true }), "ShapeError", "B", "4 columns"],
      [() => igemm(A, B, { transposedA: true }), "ShapeError", "B", "3 rows"],
      [() => igemm(A, B, { transposedA: 0 as unknown as boolean }), "ArgumentError", "transposedA"],
      [() => igemm(A, make("i8", [3, 4, 5])), "ShapeError", "B"],
      [() => igemm(A, B, { out: make("i32", [2, 3, 4]) }), "ShapeError", "out"],
      [() => igemm(A, B, { out: make("f32", [2, 3, 5]) }), "DTypeError", "out"],
      [() => igemm(A, make("i8", [2, 2, 5]), { out: make("i32", [4, 5]) }), "ShapeError", "B", "4 rows"],
      [() => igemm(A, make("i8", [1, 3, 5])), "ShapeError", "B", "4 rows"],
      [() => igemm(A, make("i8", [2, 3, 5]), { transposedA: 0 as never }), "ArgumentError", "transposedA"],
      [() => igemm(A, make("i8", [2, 3, 5]), { transposedB: true }), "ShapeError", "B", "4 columns"],
      [() => igemm(A, make("i8", [2, 3, 5]), { out: make("i32", [5, 5]) }), "ShapeError", "out", "20 elements"],
    ];
  });
  await refuse("batchedIgemm", (make) => {
    const [A, B] = [make("i8", [2, 3, 4]), make("i8", [2, 4, 5])];
    return [
      [() => batchedIgemm(make("i8", [3, 4]), B), "ShapeError", "A", "three dimensions"],
      [() => batchedIgemm(A, make("i8", [4, 5])), "ShapeError", "B", "three dimensions"],
      [() => batchedIgemm(A, make("i8", [3, 4, 5])), "ShapeError", "B"],
      [() => batchedIgemm(A, make("u8", [2, 4, 5])), "DTypeError", "B"],
      [() => batchedIgemm(A, make("i8", [2, 3, 5])), "ShapeError", "B", "4 rows"],
      [() => batchedIgemm(A, B, { transposedB: 1 as never }), "ArgumentError", "transposedB"],
      [() => batchedIgemm(A, B, { out: make("i32", [3, 5]) }), "ShapeError", "out"],
    ];
  });
});

test("sparse products", async () => {
  const coo = (make: Make, dtype: FloatDType = "f16") =>
    new COOSparseTensor(
      3,
      4,
      make("i32", [2]) as Tensor<"i32">,
      make("i32", [2]) as Tensor<"i32">,
      make(dtype, [2]) as Tensor<FloatDType>,
    );
  await refuse("COOSparseTensor", (make, other) => {
    const [index, values] = [make("i32", [2]) as Tensor<"i32">, make("f16", [2]) as Tensor<FloatDType>];
    return [
      [() => new COOSparseTensor(-1, 4, index, index, values), "ShapeError", "shape"],
      [() => new COOSparseTensor(3, 0.5, index, index, values), "ShapeError", "shape"],
      [() => new COOSparseTensor(3, 4, make("i32", [3]) as Tensor<"i32">, index, values), "ShapeError", "rowidx"],
      [() => new COOSparseTensor(3, 4, index, make("f32", [2]) as never, values), "DTypeError", "colidx"],
      [() => new COOSparseTensor(3, 4, index, index, make("i8", [2]) as never), "DTypeError", "values"],
      [() => new COOSparseTensor(3, 4, index, index, make("f16", [2, 1]) as never), "ShapeError", "values"],
      [() => new COOSparseTensor(3, 4, index, other("i32", [2]) as never, values), "DeviceError", "colidx"],
      [() => new COOSparseTensor(3, 4, 3, index, index, values), "ShapeError", "values", "[3]"],
      [() => new COOSparseTensor(3, 4, 2, index, make("i32", [1]) as never, values), "ShapeError", "colidx", "[2]"],
      [() => new COOSparseTensor(3, 4, index, index, undefined as never), "ArgumentError", "values"],
    ];
  });
  await refuse("spmmCoo", (make, other) => {
    const [A, B] = [coo(make), make("f16", [4, 5])];
    return [
      [() => spmmCoo({} as COOSparseTensor, B), "ArgumentError", "cooA", "COOSparseTensor"],
      [() => spmmCoo(A, make("f32", [4, 5])), "DTypeError", "B", "f16"],
      [() => spmmCoo(A, make("f16", [3, 5])), "ShapeError", "B", "[4, N]"],
      [() => spmmCoo(A, make("f16", [4])), "ShapeError", "B"],
      [() => spmmCoo(A, other("f16", [4, 5])), "DeviceError", "B"],
      [() => spmmCoo(A, B, { out: make("f16", [14]) }), "ShapeError", "out"],
      [() => spmmCoo(A, B, { out: make("f32", [3, 5]) as never }), "DTypeError", "out"],
    ];
  });
  await refuse("spmmCooVerySparse", (make, other) => {
    const [A, codes, stats] = [coo(make), make("i8", [4, 5]), make("f32", [5])];
    return [
      [() => spmmCooVerySparse(A, make("u8", [4, 5])), "DTypeError", "B", "i8"],
      [() => spmmCooVerySparse(A, make("i8", [5, 4])), "ShapeError", "B"],
      [() => spmmCooVerySparse(A, codes), "ArgumentError", "dequantStats", "a scale per column"],
      [() => spmmCooVerySparse(A, make("f16", [4, 5]), { dequantStats: stats }), "ArgumentError", "dequantStats"],
      [() => spmmCooVerySparse(A, codes, { dequantStats: make("f32", [4]) }), "ShapeError", "dequantStats"],
      [() => spmmCooVerySparse(A, codes, { dequantStats: make("f16", [5]) }), "DTypeError", "dequantStats"],
      [() => spmmCooVerySparse(A, codes, { dequantStats: other("f32", [5]) }), "DeviceError", "dequantStats"],
      [() => spmmCooVerySparse(A, codes, { dequantStats: stats, out: make("f16", [3]) }), "ShapeError", "out"],
    ];
  });
  const before = liveTensors(getBackend("cpu"));
  const refused: Refusal[] = [
    [() => cooZeros(-1, 2, 0, { device: "cpu" }), "ShapeError", "shape"],
    [() => cooZeros(2, 2, 1.5, { device: "cpu" }), "ShapeError", "shape"],
    [() => cooZeros(0, 2, 1, { device: "cpu" }), "ArgumentError", "nnz"],
    [() => cooZeros(2, 2, 1, { device: "cpu", dtype: "i8" as FloatDType }), "ArgumentError", "dtype"],
  ];
  for (const [run, name, operand] of refused) {
    expect(run).toThrow(expect.objectContaining({ op: "cooZeros", name, operand }));
  }
  expect(liveTensors(getBackend("cpu"))).toBe(before);
});

test("a threshold is compared in float32, by rows and by columns", async () => {
  await withBackend({}, (backend) =>
    tidy(() => {
      // Between 3.3 and float32's 3.3, which is less.
      const A = Tensor.allocate(backend, "f32", [2, 2]).copyFrom(Float32Array.of(3.3, 1, 2, 3));
      for (const threshold of [3.3, Math.fround(3.3)]) {
        const [rows, columns, rowStats, columnStats, found] = int8DoubleQuant(A, { threshold });
        expect([...rows.dataSync()]).toEqual([0, 127, 0, 127]);
        expect([...columns.dataSync()]).toEqual([0, 42, 127, 127]);
        expect([...rowStats.dataSync()]).toEqual([1, 3]);
        expect([...columnStats.dataSync()]).toEqual([2, 3]);
        expect([...found!.columns.dataSync()]).toEqual([0, -1]);
      }
      const [, , rowStats, columnStats, found] = int8DoubleQuant(A, { threshold: -0 });
      expect([...rowStats.dataSync()]).toEqual([Math.fround(3.3), 3]);
      expect([...columnStats.dataSync()]).toEqual([Math.fround(3.3), 3]);
      expect(found).toBeNull();
    }),
  );
});

test("null is as good as an option left out", async () => {
  await withBackend({}, (backend) =>
    tidy(() => {
      const make = (dtype: "f32" | "f16" | "i8", shape: readonly number[]): Tensor => {
        const numbers = Float32Array.from({ length: shape.reduce((a, b) => a * b, 1) }, (_, i) => (i % 7) - 2);
        return Tensor.allocate(backend, "f32", shape).copyFrom(numbers).to(dtype);
      };
      const [A, CA, CB] = [make("f32", [3, 64]), make("i8", [3, 64]), make("i8", [5, 64])];
      const [SCA, SCB] = [make("f32", [3]), make("f32", [5])];
      const [B, state] = quantize4bit(make("f32", [5, 64]), { quantType: "nf4" });
      const products = int8LinearMatmul(CA, CB);
      const entries = new COOSparseTensor(
        3,
        3,
        2,
        make("f32", [2]).to("i32"),
        make("f32", [2]).to("i32"),
        make("f32", [2]) as Tensor<"f32">,
      );
      const none: object = { bias: null, out: null, outlierCols: null, dequantStats: null };
      const calls: ((options: object) => Tensor)[] = [
        (options) => matmul(A, A, { transposeB: true, ...options }),
        (options) => matmul4bit(A, B, state, options),
        (options) => matmul4bit(A, B, state, { mode: "fast", ...options }),
        (options) => int8LinearMatmul(CA, CB, options),
        (options) => int8MmDequant(products, SCA, SCB, options),
        (options) => int8ScaledMm(CA, CB, SCA, SCB, options),
        (options) => int8MixedScaledMm(A, CA, CB, SCA, SCB, options),
        (options) => matmul8bit(A, CB, SCB, { threshold: 3, ...options }),
        (options) => int8VectorwiseDequant(CA, SCA, options),
        (options) => igemm(CA, CB, { transposedB: true, ...options }),
        (options) => batchedIgemm(CA.reshape([1, 3, 64]), CB.reshape([1, 5, 64]), { transposedB: true, ...options }),
        (options) => spmmCoo(entries, A, options),
        (options) => spmmCooVerySparse(entries, A, options),
        // Over nothing: the bias or zeros.
        (options) => matmul(make("f32", [2, 0]), make("f32", [0, 3]), options),
      ];
      for (const [i, call] of calls.entries()) {
        const [expected, got] = [call({}), call(none)];
        expect(got.shape, `call ${i}`).toEqual(expected.shape);
        expect(got.dataSync(), `call ${i}`).toEqual(expected.dataSync());
      }
    }),
  );
});

test("dtypes that a call does not name have the default's type, and named ones theirs", async () => {
  await withBackend({}, (backend) =>
    tidy(() => {
      const [A, B] = [Tensor.allocate(backend, "i8", [2, 4]), Tensor.allocate(backend, "i8", [3, 4])];
      const [rows, columns] = [Tensor.allocate(backend, "f32", [2]), Tensor.allocate(backend, "f32", [3])];
      const products = Tensor.allocate(backend, "i32", [2, 3]);
      const half: Tensor<"f16">[] = [
        int8MmDequant(products, rows, columns),
        int8MmDequant(products, rows, columns, { bias: null }),
        int8ScaledMm(A, B, rows, columns),
        int8ScaledMm(A, B, rows, columns, { dtype: "f16" }),
      ];
      const single: Tensor<"f32">[] = [
        int8VectorwiseDequant(A, rows),
        int8VectorwiseDequant(A, rows, { out: null }),
        int8MmDequant(products, rows, columns, { dtype: "f32" }),
        int8ScaledMm(A, B, rows, columns, { dtype: "f32" }),
      ];
      const brain: Tensor<"bf16">[] = [
        int8VectorwiseDequant(A, rows, { dtype: "bf16" }),
        // @ts-expect-error: a type alone does not choose the dtype
        int8MmDequant<"bf16">(products, rows, columns),
      ];
      expect(half.map(({ dtype }) => dtype)).toEqual(["f16", "f16", "f16", "f16"]);
      expect(single.map(({ dtype }) => dtype)).toEqual(["f32", "f32", "f32", "f32"]);
      expect(brain.map(({ dtype }) => dtype)).toEqual(["bf16", "f16"]);
    }),
  );
});
