/** Matrices of small integers, whose products are exact in every dtype and order of summation, and what a product of them is. */
import { DTYPE_BYTES, type DType, type FloatDType, isFloat } from "#halfbyte/core/dtype.js";
import { random } from "./random.js";
import { decode, encode } from "./scalar.js";

/** y[b, m, n] = op(a) op(b) + bias, row-major. */
export interface ProductShape {
  readonly dtype: "f32" | "f16" | "bf16" | "i8";
  readonly m: number;
  readonly n: number;
  readonly k: number;
  readonly batch: number;
  readonly transposeA: boolean;
  readonly transposeB: boolean;
  /** One b for all of the batch. */
  readonly sharedB: boolean;
  readonly bias: boolean;
  /** Elements from row to row; of y more than n is a column slice. */
  readonly lda: number;
  readonly ldb: number;
  readonly ldy: number;
}

/** A shape with what is not said: dense rows, one matrix, no transposes, no bias. */
export function productShape(shape: Partial<ProductShape> & Pick<ProductShape, "m" | "n" | "k">): ProductShape {
  const { m, n, k, transposeA = false, transposeB = false } = shape;
  return {
    dtype: "f32",
    batch: 1,
    transposeA,
    transposeB,
    sharedB: false,
    bias: false,
    lda: transposeA ? m : k,
    ldb: transposeB ? k : n,
    ldy: n,
    ...shape,
  };
}

export const resultType = ({ dtype }: ProductShape): DType => (dtype === "i8" ? "i32" : dtype);

/** Bytes of integers as elements of a dtype. */
export function toBytes(dtype: DType, values: ArrayLike<number>): Uint8Array {
  const bytes = DTYPE_BYTES[dtype];
  const view = new DataView(new ArrayBuffer(values.length * bytes));
  for (let i = 0; i < values.length; i++) {
    const bits = isFloat(dtype) ? encode(dtype, values[i]!) : values[i]!;
    if (bytes === 4) view.setUint32(4 * i, bits, true);
    else if (bytes === 2) view.setUint16(2 * i, bits, true);
    else view.setUint8(i, bits);
  }
  return new Uint8Array(view.buffer);
}

/** Elements of a dtype as numbers. */
export function fromBytes(dtype: DType, bytes: Uint8Array): number[] {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const size = DTYPE_BYTES[dtype];
  return Array.from({ length: bytes.byteLength / size }, (_, i) => {
    if (dtype === "i32") return view.getInt32(4 * i, true);
    if (dtype === "i8") return view.getInt8(i);
    return decode(dtype as FloatDType, size === 4 ? view.getUint32(4 * i, true) : view.getUint16(2 * i, true));
  });
}

export interface Matrices {
  readonly a: number[];
  readonly b: number[];
  readonly bias: number[];
  /** Rows of ldy elements each; NaN where nothing may be written. */
  readonly y: number[];
}

/** Elements from -2 to 2 and their product. With lda or ldb above the least, what lies between rows is 99. */
export function matrices(shape: ProductShape, seed: string): Matrices {
  const { m, n, k, batch, transposeA, transposeB, sharedB, lda, ldb, ldy } = shape;
  const next = random(seed);
  const small = (): number => (next() % 5) - 2;
  const rows = (count: number, cols: number, ld: number): number[] =>
    Array.from({ length: count * ld }, (_, i) => (i % ld < cols ? small() : 99));
  const [rowsA, colsA] = transposeA ? [k, m] : [m, k];
  const [rowsB, colsB] = transposeB ? [n, k] : [k, n];
  const a = rows(batch * rowsA, colsA, lda);
  const b = rows((sharedB ? 1 : batch) * rowsB, colsB, ldb);
  const bias = shape.bias ? rows(1, n, n) : [];
  const y = new Array<number>(batch * m * ldy).fill(Number.NaN);
  for (let i = 0; i < batch; i++) {
    const [fromA, fromB] = [i * rowsA * lda, sharedB ? 0 : i * rowsB * ldb];
    for (let row = 0; row < m; row++) {
      for (let col = 0; col < n; col++) {
        let sum = bias[col] ?? 0;
        for (let at = 0; at < k; at++) {
          const left = a[fromA + (transposeA ? at * lda + row : row * lda + at)]!;
          sum += left * b[fromB + (transposeB ? col * ldb + at : at * ldb + col)]!;
        }
        y[(i * m + row) * ldy + col] = sum;
      }
    }
  }
  return { a, b, bias, y };
}
