/** The dense product. Numerics: docs/numerics.md, "Dense products". */
import { DTYPE_ID, FLOAT_DTYPES, type FloatDType } from "../core/dtype.js";
import { tidy } from "../core/scope.js";
import type { Tensor } from "../core/tensor.js";
import { checkBias, checkFlag, checkFloat, checkTensor, output } from "./check.js";
import { gemmShape } from "./gemm-shape.js";
import { fillRows } from "./rows.js";

export const matmulPrimitives = {
  matmul: {
    upstream: "torch.matmul",
    family: "matmul",
    kernels: ["matmul"],
    dtypes: FLOAT_DTYPES,
    golden: { none: "PyTorch computes it upstream; checked against float64" },
    summary: "dense product of two tensors, batched, either one transposed, with bias",
  },
} as const;

export interface MatmulOptions {
  /** `[N]` of A's dtype, added in float32 before the one rounding. */
  readonly bias?: Tensor | null | undefined;
  /** A tensor of A's dtype for the result. */
  readonly out?: Tensor | null | undefined;
  /** A holds [..., K, M]. Default false. */
  readonly transposeA?: boolean;
  /** B holds [..., N, K], as the weight of torch.nn.Linear. Default false. */
  readonly transposeB?: boolean;
}

/**
 * y[..., m, n] = sum over k of A[..., m, k] * B[..., k, n] (+ bias[n]): float32 sums in an order that sizes alone decide, rounded
 * once to A's dtype. On cuda a library may choose the order.
 *
 * @param A f32, f16 or bf16 `[..., M, K]`, or with `transposeA` `[..., K, M]`
 * @param B of A's dtype, `[..., K, N]` with A's leading dimensions or `[K, N]` for all of A; with `transposeB` `[..., N, K]` or `[N, K]`
 * @returns `[..., M, N]` of A's dtype; the bias or zeros where K is 0
 * @throws DTypeError, ShapeError, ArgumentError (out shares memory with an operand), DisposedError, DeviceError, OutOfMemoryError
 */
export function matmul<D extends FloatDType>(A: Tensor<D>, B: Tensor, options?: MatmulOptions): Tensor<D>;
export function matmul(A: Tensor, B: Tensor, options?: MatmulOptions): Tensor<FloatDType>;
export function matmul(A: Tensor, B: Tensor, options: MatmulOptions = {}): Tensor<FloatDType> {
  const op = "matmul";
  const { bias, transposeA = false, transposeB = false } = options;
  checkFloat(op, "A", A);
  const { backend, dtype } = A;
  checkTensor(op, "B", B, [dtype], backend);
  checkFlag(op, "transposeA", transposeA);
  checkFlag(op, "transposeB", transposeB);
  const { m, n, k, batch, shared, shape } = gemmShape(op, A, B, transposeA, transposeB);
  checkBias(op, bias, n, dtype, backend);
  return tidy(() => {
    const y = output(op, "out", options.out, backend, dtype, shape, { A, B, bias });
    if (y.size === 0) return y;
    if (k === 0) {
      fillRows(y, bias ?? undefined);
      return y;
    }
    backend.launch("matmul", {
      a: A,
      b: B,
      bias: bias ?? null,
      y,
      m,
      n,
      k,
      batch,
      ldy: n,
      dtype: DTYPE_ID[dtype],
      transposeA: transposeA ? 1 : 0,
      transposeB: transposeB ? 1 : 0,
      sharedB: shared ? 1 : 0,
    });
    return y;
  });
}
