/** Checks that ops share. Everything is checked here, before anything is allocated or launched. */
import type { Backend } from "../core/backend.js";
import { type DType, FLOAT_DTYPES, type FloatDType } from "../core/dtype.js";
import { ArgumentError, DeviceError, DisposedError, DTypeError, ShapeError } from "../core/errors.js";
import { formatShape, type Shape, sameShape, sizeOf } from "../core/shape.js";
import { Tensor } from "../core/tensor.js";
import { BLOCKSIZES } from "../quant/types.js";

/** @throws ArgumentError, DisposedError, DTypeError, DeviceError */
export function checkTensor<D extends DType>(
  op: string,
  operand: string,
  value: unknown,
  dtypes: readonly D[],
  backend?: Backend,
): asserts value is Tensor<D> {
  if (!(value instanceof Tensor)) {
    throw new ArgumentError(op, operand, "a Tensor", value === null ? "null" : typeof value);
  }
  if (value.isDisposed) throw new DisposedError(`${operand} ${value}`, op);
  if (!(dtypes as readonly DType[]).includes(value.dtype)) {
    throw new DTypeError(op, operand, dtypes.join(" or "), value.dtype);
  }
  if (backend && value.backend !== backend) {
    throw new DeviceError(
      op,
      operand,
      `a tensor on ${backend.device} like the other operands`,
      `one on ${value.device}`,
    );
  }
}

export function checkFloat(op: string, operand: string, value: unknown): asserts value is Tensor<FloatDType> {
  checkTensor(op, operand, value, FLOAT_DTYPES);
}

/** @throws ArgumentError */
export function checkFlag(op: string, option: string, value: boolean): void {
  if (typeof value !== "boolean") throw new ArgumentError(op, option, "true or false", String(value));
}

/** A bias, if there is one: one element of the result's dtype per column. @throws as `checkTensor`, ShapeError */
export function checkBias(op: string, bias: unknown, columns: number, dtype: FloatDType, backend: Backend): void {
  if (bias === undefined || bias === null) return;
  checkTensor(op, "bias", bias, [dtype], backend);
  checkVector(op, "bias", bias, columns);
}

/** @throws ShapeError unless the tensor has one dimension of this length */
export function checkVector(op: string, operand: string, vector: Tensor, length: number): void {
  if (vector.shape.length !== 1 || vector.size !== length) {
    throw new ShapeError(op, operand, `[${length}]`, formatShape(vector.shape));
  }
}

/** A as rows of its last dimension: their number and length. @throws ShapeError */
export function rowsOf(op: string, operand: string, A: Tensor): [number, number] {
  const { shape } = A;
  const last = shape.length - 1;
  if (last < 0) throw new ShapeError(op, operand, "at least one dimension", formatShape(shape));
  let rows = 1;
  for (let i = 0; i < last; i++) rows *= shape[i]!;
  return [rows, shape[last]!];
}

/** A shape with another last dimension. */
export function withLast(shape: Shape, size: number): Shape {
  const other = shape.slice();
  other[other.length - 1] = size;
  return other;
}

/** @throws ArgumentError */
export function checkBlocksize(op: string, blocksize: number): void {
  if (!(BLOCKSIZES as readonly number[]).includes(blocksize)) {
    throw new ArgumentError(op, "blocksize", `one of ${BLOCKSIZES.join(", ")}`, String(blocksize));
  }
}

/** @throws ArgumentError */
export function checkChoice<T extends string>(op: string, option: string, value: T, choices: readonly T[]): void {
  if (!choices.includes(value)) throw new ArgumentError(op, option, choices.join(" or "), String(value));
}

/**
 * The tensor an op writes to: the caller's `out` after checks (same number of elements; any shape; no byte in common with the
 * other operands, which kernels read while they write), or, without it, a new one. Null is as good as undefined.
 * @throws as `checkTensor`, ShapeError, ArgumentError (overlap)
 */
export function output<D extends DType>(
  op: string,
  operand: string,
  given: Tensor | null | undefined,
  backend: Backend,
  dtype: D,
  shape: Shape,
  others: Readonly<Record<string, Tensor | null | undefined>>,
): Tensor<D> {
  if (given === undefined || given === null) return Tensor.allocate(backend, dtype, shape);
  checkTensor(op, operand, given, [dtype], backend);
  if (given.size !== sizeOf(shape)) {
    throw new ShapeError(
      op,
      operand,
      `${sizeOf(shape)} elements as in ${formatShape(shape)}`,
      formatShape(given.shape),
    );
  }
  for (const [name, other] of Object.entries(others)) {
    if (other && given.overlaps(other)) {
      throw new ArgumentError(op, operand, `memory apart from ${name}`, `a tensor that shares bytes with ${name}`);
    }
  }
  return sameShape(given.shape, shape) ? given : given.reshape(shape);
}

/** @throws ArgumentError when a tensor comes twice or two have a byte in common. @param nameOf how errors name the tensor at a place */
export function checkApart(op: string, tensors: readonly Tensor[], nameOf: (i: number) => string): void {
  const first = new Map<Tensor, number>();
  const groups = new Map<unknown, number[]>();
  for (const [i, tensor] of tensors.entries()) {
    const before = first.get(tensor);
    if (before !== undefined) {
      throw new ArgumentError(
        op,
        nameOf(i),
        `memory apart from ${nameOf(before)}`,
        `the same tensor as ${nameOf(before)}`,
      );
    }
    first.set(tensor, i);
    if (tensor.size === 0) continue;
    const group = groups.get(tensor.storage);
    if (group) group.push(i);
    else groups.set(tensor.storage, [i]);
  }
  for (const group of groups.values()) {
    // In order of place, only neighbours can overlap.
    group.sort((a, b) => tensors[a]!.byteOffset - tensors[b]!.byteOffset);
    for (let k = 1; k < group.length; k++) {
      const [before, after] = [group[k - 1]!, group[k]!];
      if (!tensors[before]!.overlaps(tensors[after]!)) continue;
      const [low, high] = before < after ? [before, after] : [after, before];
      const received = `a tensor that shares bytes with ${nameOf(low)}`;
      throw new ArgumentError(op, nameOf(high), `memory apart from ${nameOf(low)}`, received);
    }
  }
}
