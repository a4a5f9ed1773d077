/** What the 4-bit and dense products refuse, and what products give for operands without elements. */
import { expect, test } from "vitest";
import { Tensor } from "#halfbyte/core/tensor.js";
import {
  COOSparseTensor,
  gemv4bit,
  igemm,
  int8LinearMatmul,
  int8ScaledMm,
  matmul,
  matmul4bit,
  matmul4bitBackward,
  matmul8bit,
  QuantState,
  quantize4bit,
  quantizeBlockwise,
  spmmCoo,
  tidy,
} from "#halfbyte/index.js";
import { sliceRows } from "#halfbyte/ops/matmul4bit.js";
import { withBackend } from "../helpers/backends.js";
import { gone, type Keep, type Make, type Refusal, refuse } from "./refuse.js";

const [N, K] = [6, 64];

/** What every op with a 4-bit weight refuses about it; `call` takes packed codes and state. */
function weightRefusals(
  make: Make,
  other: Make,
  keep: Keep,
  call: (B: Tensor, state: QuantState) => unknown,
): readonly Refusal[] {
  const weight = make("f32", [N, K]);
  const [B, state] = quantize4bit(weight, { quantType: "nf4", blocksize: 64 });
  const [BN, nested] = quantize4bit(weight, { quantType: "nf4", blocksize: 64, compressStatistics: true });
  const [BW, wide] = quantize4bit(weight, { quantType: "nf4", quantStorage: "f32" });
  const [Q, blockwise] = quantizeBlockwise(weight, { blocksize: 64 });
  const [B3, cube] = quantize4bit(keep(weight.reshape([2, 3, K])), { quantType: "nf4" });
  keep([weight, B, state, BN, nested, BW, wide, Q, blockwise, B3, cube]);
  const fields = (from: QuantState) => ({
    absmax: from.absmax,
    shape: from.shape,
    dtype: from.dtype,
    blocksize: from.blocksize,
    quantType: from.quantType!,
  });
  const plain = (changes: object) => new QuantState({ ...fields(state), ...changes });
  const double = (changes: object) =>
    new QuantState({ ...fields(nested), offset: nested.offset!, state2: nested.state2!, ...changes });
  const inner = (changes: object) =>
    double({
      state2: new QuantState({
        absmax: nested.state2!.absmax,
        shape: nested.state2!.shape,
        dtype: "f32",
        blocksize: nested.state2!.blocksize,
        code: nested.state2!.code!,
        ...changes,
      }),
    });
  return [
    [() => call(null as unknown as Tensor, state), "ArgumentError", "B", "a Tensor"],
    [() => call(gone(make, "u8", B.shape), state), "DisposedError", "B"],
    [() => call(other("u8", B.shape), state), "DeviceError", "B"],
    [() => call(make("u8", [B.size - 1, 1]), state), "ShapeError", "B", `hold ${N * K} codes`],
    [() => call(make("u8", [B.size + 1, 1]), state), "ShapeError", "B"],
    [() => call(make("f32", [N * K - 1]), wide), "ShapeError", "B", `${(N * K) / 8} f32 elements`],
    [() => call(B, undefined as unknown as QuantState), "ArgumentError", "state", "a QuantState"],
    [() => call(B, fields(state) as unknown as QuantState), "ArgumentError", "state", "a QuantState"],
    [() => call(Q, blockwise), "ArgumentError", "state", "one of quantize4bit"],
    [() => call(B3, cube), "ShapeError", "state.shape", "[N, K]"],
    [() => call(B, plain({ shape: [N * K] })), "ShapeError", "state.shape"],
    [() => call(B, plain({ shape: [-N, -K] })), "ShapeError", "state.shape"],
    [() => call(B, plain({ shape: [N / 4, K * 4] })), "ShapeError", "state.shape"],
    [() => call(B, plain({ blocksize: 48 })), "ArgumentError", "blocksize"],
    [() => call(B, plain({ blocksize: 128 })), "ArgumentError", "absmax", "3 scales"],
    [() => call(B, plain({ absmax: make("f32", [N + 1]) })), "ArgumentError", "absmax", "7"],
    [() => call(B, plain({ absmax: make("u8", [N]) })), "DTypeError", "state.absmax", "f32"],
    [() => call(B, plain({ absmax: other("f32", [N]) })), "DeviceError", "state.absmax"],
    [() => call(B, plain({ absmax: gone(make, "f32", [N]) })), "DisposedError", "state.absmax"],
    [() => call(B, plain({ offset: make("f32", []) })), "ArgumentError", "state", "nested"],
    [() => call(BN, double({ offset: undefined })), "ArgumentError", "state", "offset"],
    [() => call(BN, double({ state2: undefined })), "ArgumentError", "state", "state2"],
    [() => call(BN, inner({ code: undefined })), "ArgumentError", "state", "code"],
    [() => call(BN, inner({ absmax: make("u8", [1]) })), "DTypeError", "state.state2.absmax"],
    [() => call(BN, inner({ absmax: make("f32", [2]) })), "ArgumentError", "absmax", "1 scales"],
    [() => call(BN, inner({ absmax: other("f32", [1]) })), "DeviceError", "state.state2.absmax"],
    [() => call(BN, inner({ blocksize: 100 })), "ArgumentError", "blocksize"],
    [() => call(BN, double({ absmax: make("f32", [N]) })), "DTypeError", "state.absmax", "u8"],
    [() => call(BN, double({ absmax: make("u8", [N + 1]) })), "ArgumentError", "absmax"],
    [() => call(BN, double({ offset: make("f32", [2]) })), "ShapeError", "state.offset", "one element"],
    [() => call(BN, double({ offset: make("f16", []) })), "DTypeError", "state.offset"],
    [() => call(BN, double({ offset: other("f32", []) })), "DeviceError", "state.offset"],
  ];
}

test("matmul4bit", async () => {
  await refuse("matmul4bit", (make, other, keep) => {
    const weight = make("f32", [N, K]);
    const [B, state] = quantize4bit(weight, { quantType: "fp4" });
    keep([B, state]);
    const A = make("f16", [3, K]);
    const call = (options: object) => () => matmul4bit(A, B, state, options);
    const joint = make("f16", [3 * K + N]);
    const both = keep([joint.slice(0, 3 * K), joint.slice(3 * K - 1, 3 * K - 1 + N)]);
    const lying = keep(both[0].reshape([3, K]));
    const view = keep(joint.slice(3 * K - 18, 3 * K));
    return [
      ...weightRefusals(make, other, keep, (packed, given) => matmul4bit(A, packed, given)),
      [() => matmul4bit([1] as unknown as Tensor, B, state), "ArgumentError", "A", "a Tensor"],
      [() => matmul4bit(gone(make, "f16", [3, K]), B, state), "DisposedError", "A"],
      [() => matmul4bit(make("i8", [3, K]), B, state), "DTypeError", "A", "bf16"],
      [() => matmul4bit(make("f16", []), B, state), "ShapeError", "A", "dimension"],
      [() => matmul4bit(make("f16", [3, N]), B, state), "ShapeError", "A", "64 columns"],
      [() => matmul4bit(make("f16", [K, 3]), B, state), "ShapeError", "A"],
      [call({ bias: 1 }), "ArgumentError", "bias", "a Tensor"],
      [call({ bias: make("f32", [N]) }), "DTypeError", "bias", "f16"],
      [call({ bias: make("f16", [K]) }), "ShapeError", "bias", "[6]"],
      [call({ bias: make("f16", [1, N]) }), "ShapeError", "bias"],
      [call({ bias: other("f16", [N]) }), "DeviceError", "bias"],
      [call({ bias: gone(make, "f16", [N]) }), "DisposedError", "bias"],
      [call({ mode: "quick" }), "ArgumentError", "mode", "exact or fast"],
      [call({ out: make("f32", [3, N]) }), "DTypeError", "out"],
      [call({ out: make("f16", [3, N + 1]) }), "ShapeError", "out"],
      [call({ out: other("f16", [3, N]) }), "DeviceError", "out"],
      [call({ out: gone(make, "f16", [3, N]) }), "DisposedError", "out"],
      [() => matmul4bit(lying, B, state, { out: view }), "ArgumentError", "out", "apart from A"],
      [() => matmul4bit(A, B, state, { bias: both[1], out: view }), "ArgumentError", "out", "apart from bias"],
    ];
  });
});

test("a nested state's parts may not lie in the output", async () => {
  await refuse("matmul4bit", (make, _, keep) => {
    const [B, state] = quantize4bit(make("f32", [N, K]), { quantType: "nf4", compressStatistics: true });
    keep([B, state]);
    const A = make("f32", [1, K]);
    const frame = make("f32", [N]);
    const nested = (changes: object) =>
      new QuantState({
        absmax: state.absmax,
        shape: state.shape,
        dtype: "f32",
        blocksize: 64,
        quantType: "nf4",
        offset: state.offset!,
        state2: state.state2!,
        ...changes,
      });
    const inFrame = keep([frame.slice(2, 3), frame.slice(5, 6)]);
    const offset = nested({ offset: inFrame[0] });
    const { shape, blocksize, code } = state.state2!;
    const state2 = nested({
      state2: new QuantState({ absmax: inFrame[1], shape, dtype: "f32", blocksize, code: code! }),
    });
    return [
      [() => matmul4bit(A, B, offset, { out: frame }), "ArgumentError", "out", "apart from state.offset"],
      [() => matmul4bit(A, B, state2, { out: frame }), "ArgumentError", "out", "apart from state.state2.absmax"],
      [
        () => matmul4bit(A, B, state, { out: keep(keep(A.reshape([K])).slice(0, N)) }),
        "ArgumentError",
        "out",
        "from A",
      ],
    ];
  });
});

test("gemv4bit", async () => {
  await refuse("gemv4bit", (make, other, keep) => {
    const [B, state] = quantize4bit(make("f32", [N, K]), { quantType: "nf4" });
    keep([B, state]);
    const A = make("f32", [K]);
    return [
      ...weightRefusals(make, other, keep, (packed, given) => gemv4bit(A, packed, given)),
      [() => gemv4bit(make("f32", [2, K]), B, state), "ShapeError", "A", "one row"],
      [() => gemv4bit(make("f32", [0, K]), B, state), "ShapeError", "A", "one row"],
      [() => gemv4bit(make("u8", [K]), B, state), "DTypeError", "A"],
      [() => gemv4bit(make("f32", [K + 1]), B, state), "ShapeError", "A"],
      [() => gemv4bit(A, B, state, { out: make("f16", [N]) }), "DTypeError", "out"],
      [() => gemv4bit(A, B, state, { out: make("f32", [N, 2]) }), "ShapeError", "out"],
    ];
  });
});

test("matmul4bitBackward", async () => {
  await refuse("matmul4bitBackward", (make, other, keep) => {
    const [B, state] = quantize4bit(make("f32", [N, K]), { quantType: "nf4" });
    keep([B, state]);
    const grad = make("bf16", [2, N]);
    const joint = make("bf16", [2 * N + 2 * K - 1]);
    const apart = keep([joint.slice(0, 2 * N), joint.slice(2 * N - 1, 2 * N - 1 + 2 * K)]);
    const lying = keep(apart[0].reshape([2, N]));
    return [
      ...weightRefusals(make, other, keep, (packed, given) => matmul4bitBackward(grad, packed, given)),
      [() => matmul4bitBackward(make("bf16", [2, K]), B, state), "ShapeError", "grad", "6 columns"],
      [() => matmul4bitBackward(make("i32", [2, N]), B, state), "DTypeError", "grad"],
      [() => matmul4bitBackward(make("bf16", []), B, state), "ShapeError", "grad"],
      [() => matmul4bitBackward(gone(make, "bf16", [2, N]), B, state), "DisposedError", "grad"],
      [() => matmul4bitBackward(grad, B, state, { out: make("f16", [2, K]) as Tensor<"bf16"> }), "DTypeError", "out"],
      [() => matmul4bitBackward(grad, B, state, { out: make("bf16", [2, N]) }), "ShapeError", "out"],
      [() => matmul4bitBackward(lying, B, state, { out: apart[1] }), "ArgumentError", "out", "apart from grad"],
    ];
  });
});

test("matmul", async () => {
  await refuse("matmul", (make, other, keep) => {
    const [A, B] = [make("f16", [2, 3, 4]), make("f16", [4, 5])];
    const call =
      (a: Tensor, b: Tensor, options: object = {}) =>
      () =>
        matmul(a, b, options);
    const joint = make("f16", [100]);
    const out = keep(joint.slice(0, 30));
    const tail = keep(keep(joint.slice(29, 49)).reshape([4, 5]));
    const bias = keep(joint.slice(25, 30));
    return [
      [call(undefined as unknown as Tensor, B), "ArgumentError", "A", "a Tensor"],
      [call(make("i8", [3, 4]), B), "DTypeError", "A"],
      [call(A, make("bf16", [4, 5])), "DTypeError", "B", "f16"],
      [call(A, other("f16", [4, 5])), "DeviceError", "B"],
      [call(A, gone(make, "f16", [4, 5])), "DisposedError", "B"],
      [call(make("f16", [4]), B), "ShapeError", "A", "two dimensions"],
      [call(A, make("f16", [4])), "ShapeError", "B", "two dimensions"],
      [call(A, make("f16", [5, 4])), "ShapeError", "B", "4 rows"],
      [call(A, B, { transposeB: true }), "ShapeError", "B", "4 columns"],
      [call(A, B, { transposeA: true }), "ShapeError", "B", "3 rows"],
      [call(A, B, { transposeB: 1 }), "ArgumentError", "transposeB"],
      [call(A, B, { transposeA: "yes" }), "ArgumentError", "transposeA"],
      [call(A, make("f16", [3, 4, 5])), "ShapeError", "B", "[2]"],
      [call(keep(A.reshape([6, 4])), make("f16", [2, 4, 5])), "ShapeError", "B"],
      [call(A, B, { bias: make("f32", [5]) }), "DTypeError", "bias"],
      [call(A, B, { bias: make("f16", [4]) }), "ShapeError", "bias"],
      [call(A, B, { bias: other("f16", [5]) }), "DeviceError", "bias"],
      [call(A, B, { out: make("f16", [2, 3, 4]) }), "ShapeError", "out", "30 elements"],
      [call(A, B, { out: make("f32", [2, 3, 5]) }), "DTypeError", "out"],
      [call(A, tail, { out }), "ArgumentError", "out", "apart from B"],
      [call(A, B, { out, bias }), "ArgumentError", "out", "apart from bias"],
    ];
  });
});

test("products over nothing are the bias or zeros, and empty ones launch no product", async () => {
  await withBackend({}, (backend) =>
    tidy(() => {
      const make: Make = (dtype, shape) => {
        const tensor = Tensor.allocate(backend, dtype, shape);
        backend.launch("fill", { dst: tensor, bytes: tensor.byteLength, value: 0 });
        return tensor;
      };
      const launches = new Set<string>();
      const launch = backend.launch.bind(backend);
      const products = [
        "matmul4bit",
        "matmul4bitFast",
        "matmul4bitTransposed",
        "matmul",
        "igemm",
        "int8MmDequant",
        "spmmCoo",
      ];
      backend.launch = (kernel, operands, context) => {
        if (products.includes(kernel)) launches.add(kernel);
        launch(kernel, operands, context);
      };
      const shapes: [number, number, number][] = [
        [0, 6, 64],
        [3, 0, 64],
        [3, 6, 0],
        [0, 0, 0],
        [5, 7, 0],
      ];
      for (const [m, n, k] of shapes) {
        const where = `${m} x ${n} x ${k}`;
        const [B, state] = quantize4bit(make("f32", [n, k]), { quantType: "nf4", compressStatistics: n === 7 });
        const numbers = Float32Array.from({ length: n }, (_, i) => i + 0.5);
        const bias = make("f32", [n]).copyFrom(numbers) as Tensor<"f32">;
        const rows = Array.from({ length: m }, () => Array.from(numbers)).flat();
        const A = make("f32", [m, k]);
        const zeros = new Array<number>(m * n).fill(0);
        const values = (y: Tensor) => Array.from(y.dataSync() as Iterable<number>);
        for (const mode of ["exact", "fast"] as const) {
          expect(values(matmul4bit(A, B, state, { bias, mode })), where).toEqual(rows);
          const out = make("f32", [m, n]).copyFrom(new Float32Array(m * n).fill(9));
          expect(values(matmul4bit(A, B, state, { mode, out })), where).toEqual(zeros);
        }
        expect(values(matmul(A, make("f32", [k, n]), { bias })), where).toEqual(rows);
        expect(values(matmul(A, make("f32", [n, k]), { transposeB: true })), where).toEqual(zeros);
        expect(values(igemm(make("i8", [m, k]), make("i8", [k, n]))), where).toEqual(zeros);
        expect(values(int8LinearMatmul(make("i8", [m, k]), make("i8", [n, k]))), where).toEqual(zeros);
        if (n === 0 || m === 0) {
          const back = matmul4bitBackward(make("f32", [m, n]), B, state);
          expect(values(back), where).toEqual(new Array<number>(m * k).fill(0));
          const scaled = int8ScaledMm(make("i8", [m, k]), make("i8", [n, k]), make("f32", [m]), make("f32", [n]));
          expect(scaled.shape, where).toEqual([m, n]);
          expect(matmul8bit(make("f16", [m, k]), make("i8", [n, k]), make("f32", [n])).shape).toEqual([m, n]);
        }
      }
      const entries = (size: number) =>
        new COOSparseTensor(
          3,
          4,
          make("i32", [size]) as never,
          make("i32", [size]) as never,
          make("f32", [size]) as never,
        );
      const full = Float32Array.of(1, 2, 3, 4, 5, 6);
      const out = make("f32", [3, 2]).copyFrom(full) as Tensor<"f32">;
      expect(Array.from(spmmCoo(entries(0), make("f32", [4, 2]) as Tensor<"f32">, { out }).dataSync())).toEqual([
        0, 0, 0, 0, 0, 0,
      ]);
      expect(spmmCoo(entries(2), make("f32", [4, 0])).shape).toEqual([3, 0]);
      expect([...launches]).toEqual([]);
    }),
  );
});

test("slices of a decoded weight begin with a block and a byte, and are about as long as asked", () => {
  for (const n of [1, 100, 128, 129, 1000, 4096, 28_672]) {
    for (const k of [1, 3, 64, 100, 576, 1535, 4096]) {
      for (const blocksize of [32, 64, 4096]) {
        for (const most of [0, 1, 200, 1024, 1e9]) {
          const slice = sliceRows(n, k, blocksize, most);
          const where = `${n} x ${k}, blocks of ${blocksize}, ${most} rows: ${slice}`;
          expect(slice >= 1 && slice <= n, where).toBe(true);
          if (slice < n) {
            expect((slice * k) % blocksize, where).toBe(0);
            expect(slice % 128, where).toBe(0);
            expect(slice <= Math.max(most, 128, blocksize), where).toBe(true);
          }
        }
      }
    }
  }
});
