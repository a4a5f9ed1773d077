/**
 * The device kernels, each declared once: its name and the fields of its operand struct. A backend packs the struct in
 * this order; asm/ and csrc/ get the offsets generated from here, so the three cannot disagree. A backend's kernel table
 * is a total mapped type over `KernelName`: a kernel that is missing on one backend does not compile.
 */

/**
 * `in` and `out` are device addresses (`out`: the kernel writes there, and may read); `size` is an element or byte count of
 * the device's address width; `u32` and `f32` are plain words.
 */
export type FieldType = "in" | "out" | "size" | "u32" | "f32";

export const KERNELS = {
  /** dst[0..bytes) = src[0..bytes); the ranges do not overlap. */
  copy: { src: "in", dst: "out", bytes: "size" },
  /** dst[0..bytes) = the four bytes of `value`, repeated. */
  fill: { dst: "out", bytes: "size", value: "u32" },
  /** y[i] = x[i] as dtype `to`: nearest even into f16/bf16, truncated and saturated into integers. */
  convert: { x: "in", y: "out", n: "size", from: "u32", to: "u32" },
  /** One level of the summation tree: y[c] = sum of the 1,024 elements of chunk c, in f64 (x is f32, or f64 partials). */
  sumChunks: { x: "in", y: "out", n: "size", wide: "u32" },
  /** y[0] = f32(the rest of the tree over the f64 x[0..sums) / n); at most SUM_CHUNK^2 sums. */
  meanOfSums: { x: "in", y: "out", sums: "size", n: "size" },
  /** q[i] = index of the code nearest to (x[i] - offset) / absmax(block). Unit: block. */
  quantizeBlockwise: {
    x: "in",
    q: "out",
    absmax: "out",
    code: "in",
    table: "in",
    offset: "in",
    n: "size",
    blocksize: "u32",
    dtype: "u32",
    allowNonFinite: "u32",
  },
  /** y[i] = code[q[i]] * absmax(block) + offset, rounded to dtype. Unit: block. */
  dequantizeBlockwise: {
    q: "in",
    absmax: "in",
    code: "in",
    offset: "in",
    y: "out",
    n: "size",
    blocksize: "u32",
    dtype: "u32",
  },
  /** packed nibbles (first element high) of the nearest NF4 or FP4 codes. Unit: block. */
  quantize4bit: {
    x: "in",
    packed: "out",
    absmax: "out",
    n: "size",
    blocksize: "u32",
    dtype: "u32",
    quantType: "u32",
    allowNonFinite: "u32",
  },
  /** y[i] = code(nibble i) * absmax(block), rounded to dtype. Unit: block. */
  dequantize4bit: {
    packed: "in",
    absmax: "in",
    y: "out",
    n: "size",
    blocksize: "u32",
    dtype: "u32",
    quantType: "u32",
  },
  /** q[r, c] = rint(x[r, c] * (127 * (1 / absmax(row r)))), scale[r] = absmax(row r). Unit: row. */
  int8VectorwiseQuant: {
    x: "in",
    q: "out",
    scale: "out",
    rows: "size",
    cols: "size",
    dtype: "u32",
    allowNonFinite: "u32",
  },
  /** y[r, c] = q[r, c] * scale[r] * f32(1/127), rounded to dtype. Unit: row. */
  int8VectorwiseDequant: { q: "in", scale: "in", y: "out", rows: "size", cols: "size", dtype: "u32" },
} as const satisfies Record<string, Record<string, FieldType>>;

export type KernelName = keyof typeof KERNELS;
export const KERNEL_NAMES = Object.keys(KERNELS) as KernelName[];

/** The file in asm/ and csrc/kernels/ that holds each kernel. */
export const KERNEL_FAMILY = {
  copy: "memory",
  fill: "memory",
  convert: "convert",
  sumChunks: "sum",
  meanOfSums: "sum",
  quantizeBlockwise: "blockwise",
  dequantizeBlockwise: "blockwise",
  quantize4bit: "fourbit",
  dequantize4bit: "fourbit",
  int8VectorwiseQuant: "int8",
  int8VectorwiseDequant: "int8",
} as const satisfies Record<KernelName, string>;
export type KernelFamily = (typeof KERNEL_FAMILY)[KernelName];

/** The number that asm/ and csrc/ know a 4-bit type by. */
export const QUANT_TYPE_ID = { nf4: 0, fp4: 1 } as const;

/** Below this absmax, int8 rows are quantized with x and absmax both times 2^64, so that 127 / absmax does not overflow. */
export const INT8_TINY = 1e-30;

/** Elements of one chunk of the summation tree, and its lanes (see docs/architecture.md, "The summation tree"). */
export const SUM_CHUNK = 1024;
export const SUM_LANES = 32;

/** A place in device memory: a tensor is one, a raw allocation with an offset is one. */
export interface Address {
  readonly storage: Storage;
  readonly byteOffset: number;
}

/** A device allocation. `arena` and `offset` mean something to its backend only. */
export interface Storage {
  readonly bytes: number;
  readonly arena: number;
  readonly offset: number;
}

type FieldValue<F extends FieldType> = F extends "in" | "out" ? Address | null : number;
/** The operands of kernel K, by name. */
export type Operands<K extends KernelName> = {
  readonly [F in keyof (typeof KERNELS)[K]]: (typeof KERNELS)[K][F] extends FieldType
    ? FieldValue<(typeof KERNELS)[K][F]>
    : never;
};

const FIELD_BYTES = (address: 4 | 8): Record<FieldType, number> => ({
  in: address,
  out: address,
  size: address,
  u32: 4,
  f32: 4,
});

/** Byte offsets of a kernel's fields for a device with 4- or 8-byte addresses, each field on its natural alignment. */
export function operandLayout(kernel: KernelName, address: 4 | 8): { offsets: Record<string, number>; bytes: number } {
  const width = FIELD_BYTES(address);
  const offsets: Record<string, number> = {};
  let at = 0;
  for (const [field, type] of Object.entries(KERNELS[kernel]) as [string, FieldType][]) {
    const bytes = width[type];
    at = Math.ceil(at / bytes) * bytes;
    offsets[field] = at;
    at += bytes;
  }
  return { offsets, bytes: Math.ceil(at / address) * address };
}
