/** What A x B means for shapes: shared by the dense and the integer product. */
import { ShapeError } from "../core/errors.js";
import { formatShape, type Shape, sameShape, sizeOf } from "../core/shape.js";
import type { Tensor } from "../core/tensor.js";

/** A product as a kernel takes it: `batch` times m x k by k x n. */
export interface GemmShape {
  readonly m: number;
  readonly n: number;
  readonly k: number;
  readonly batch: number;
  /** One B serves every batch. */
  readonly shared: boolean;
  /** Of the result. */
  readonly shape: Shape;
}

/**
 * The shapes of A [..., M, K] (transposed: [..., K, M]) and B [..., K, N] or [K, N] (transposed: [..., N, K] or [N, K]).
 * A that lies as it is used and one B for all of it are one product of batch * M rows.
 * @throws ShapeError
 */
export function gemmShape(op: string, A: Tensor, B: Tensor, transposeA: boolean, transposeB: boolean): GemmShape {
  for (const [operand, { shape }] of [["A", A] as const, ["B", B] as const]) {
    if (shape.length < 2) throw new ShapeError(op, operand, "at least two dimensions", formatShape(shape));
  }
  const lead = A.shape.slice(0, -2);
  const [rowsA, colsA] = A.shape.slice(-2) as [number, number];
  const [rowsB, colsB] = B.shape.slice(-2) as [number, number];
  const [m, k] = transposeA ? [colsA, rowsA] : [rowsA, colsA];
  const [n, kB] = transposeB ? [rowsB, colsB] : [colsB, rowsB];
  if (k !== kB) {
    const side = transposeB ? "columns" : "rows";
    throw new ShapeError(op, "B", `${k} ${side}, as A ${formatShape(A.shape)} has`, formatShape(B.shape));
  }
  const leadB = B.shape.slice(0, -2);
  const shared = leadB.length === 0;
  if (!shared && !sameShape(lead, leadB)) {
    const expected = `two dimensions, or the leading ones of A, ${formatShape(lead)}`;
    throw new ShapeError(op, "B", expected, formatShape(B.shape));
  }
  const batch = sizeOf(lead);
  const shape = [...lead, m, n];
  if (shared && !transposeA) return { m: batch * m, n, k, batch: 1, shared: false, shape };
  return { m, n, k, batch, shared: shared && batch !== 1, shape };
}
