/**
 * The storage types of ggml tensors and the value types of GGUF metadata, with their sizes.
 * Source: the GGUF specification (ggml, docs/gguf.md) and the size table of the Python package gguf 0.19.
 */

/** How a tensor type is stored: its number in the file, elements per block, bytes per block. */
export interface GgmlLayout {
  readonly id: number;
  readonly blockElements: number;
  readonly blockBytes: number;
}

const layout = (id: number, blockElements: number, blockBytes: number): GgmlLayout => ({
  id,
  blockElements,
  blockBytes,
});

/** Every tensor type that gguf 0.19 knows. A row of a tensor is a whole number of blocks. */
export const GGML_TYPES = {
  F32: layout(0, 1, 4),
  F16: layout(1, 1, 2),
  Q4_0: layout(2, 32, 18),
  Q4_1: layout(3, 32, 20),
  Q5_0: layout(6, 32, 22),
  Q5_1: layout(7, 32, 24),
  Q8_0: layout(8, 32, 34),
  Q8_1: layout(9, 32, 40),
  Q2_K: layout(10, 256, 84),
  Q3_K: layout(11, 256, 110),
  Q4_K: layout(12, 256, 144),
  Q5_K: layout(13, 256, 176),
  Q6_K: layout(14, 256, 210),
  Q8_K: layout(15, 256, 292),
  IQ2_XXS: layout(16, 256, 66),
  IQ2_XS: layout(17, 256, 74),
  IQ3_XXS: layout(18, 256, 98),
  IQ1_S: layout(19, 256, 50),
  IQ4_NL: layout(20, 32, 18),
  IQ3_S: layout(21, 256, 110),
  IQ2_S: layout(22, 256, 82),
  IQ4_XS: layout(23, 256, 136),
  I8: layout(24, 1, 1),
  I16: layout(25, 1, 2),
  I32: layout(26, 1, 4),
  I64: layout(27, 1, 8),
  F64: layout(28, 1, 8),
  IQ1_M: layout(29, 256, 56),
  BF16: layout(30, 1, 2),
  TQ1_0: layout(34, 256, 54),
  TQ2_0: layout(35, 256, 66),
  MXFP4: layout(39, 32, 17),
  NVFP4: layout(40, 64, 36),
  Q1_0: layout(41, 128, 18),
} as const;

/** A tensor type by its ggml name ("Q4_K"). */
export type GgmlType = keyof typeof GGML_TYPES;

const TYPE_BY_ID: ReadonlyMap<number, GgmlType> = new Map(
  (Object.keys(GGML_TYPES) as GgmlType[]).map((name) => [GGML_TYPES[name].id, name]),
);

/** The tensor type with this number in the file, or undefined. */
export function ggmlTypeFromId(id: number): GgmlType | undefined {
  return TYPE_BY_ID.get(id);
}

/** The numbers of the metadata value types. */
export const GGUF_VALUE = {
  uint8: 0,
  int8: 1,
  uint16: 2,
  int16: 3,
  uint32: 4,
  int32: 5,
  float32: 6,
  bool: 7,
  string: 8,
  array: 9,
  uint64: 10,
  int64: 11,
  float64: 12,
} as const;

/** Arrays of fixed-size numbers are typed arrays; 64-bit integers are numbers where safe, bigints elsewhere. */
export type GgufArray =
  | readonly GgufValue[]
  | Uint8Array
  | Int8Array
  | Uint16Array
  | Int16Array
  | Uint32Array
  | Int32Array
  | Float32Array
  | Float64Array;

/** A metadata value as it is read. */
export type GgufValue = string | number | bigint | boolean | GgufArray;
