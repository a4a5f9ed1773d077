/** Which path a 4-bit product takes. The one place that decides; docs/products.md has its table generated. */
import type { DeviceName } from "./backend.js";
import type { FloatDType } from "./dtype.js";
import { ceilDiv } from "./shape.js";

/**
 * `exact`, `fast`: the cpu's two modes. On cuda: `vector`, tensor cores on codes that are not scaled yet; `tiles`, tensor cores on
 * weights decoded on their way into registers; `plain`, float32 arithmetic for what the other two do not take; `dense`,
 * the weight decoded into scratch memory and a dense product.
 */
export type ProductPath = "exact" | "fast" | "vector" | "tiles" | "plain" | "dense";
export type ProductMode = "exact" | "fast";

/** The most rows of activations for each path of the cuda backend. */
export const MOST_VECTOR_ROWS = 8;
export const MOST_TILE_ROWS = 64;
/** A smaller weight is decoded and multiplied in less time than the blocks of threads of `tiles` take to begin. */
export const LEAST_TILE_ELEMENTS = 1 << 23;
/** In float32 and for irregular weights: few, because every eight rows decode the weight again. */
export const MOST_PLAIN_ROWS = 16;

/** The most decoded weight that the dense path holds at a time. */
export const DENSE_SLICE_BYTES = 512 << 20;

/** What a path is chosen by. */
export interface ProductShape {
  /** Rows of activations: the product of all dimensions but the last. */
  readonly m: number;
  readonly n: number;
  readonly k: number;
  readonly dtype: FloatDType;
  readonly blocksize: number;
  /** Activations and codes begin at multiples of 16 bytes. */
  readonly aligned: boolean;
}

/** Columns of a weight that one lane takes, whole, and the least rows of one. */
const LANE_COLUMNS = 32;
const LEAST_ROWS = 32;
/** Those paths count rows and columns in 32 bits. */
const BEYOND = 2 ** 31;

/** Whether the tensor cores' paths take a weight: their lanes load 32 codes of one row and one block at a time. */
export function isRegular({ n, k, dtype, aligned }: ProductShape): boolean {
  return dtype !== "f32" && n >= LEAST_ROWS && k % LANE_COLUMNS === 0 && aligned && Math.max(n, k) < BEYOND;
}

/** Whether 64 columns, beginning at a multiple of 64, belong to one block. */
export function hasWideBlocks({ k, blocksize }: Pick<ProductShape, "k" | "blocksize">): boolean {
  return k % 64 === 0 && blocksize >= 64;
}

export function productPath(device: DeviceName, shape: ProductShape, mode: ProductMode): ProductPath {
  if (device === "cpu") return mode;
  const { m } = shape;
  if (!isRegular(shape)) return m <= MOST_PLAIN_ROWS ? "plain" : "dense";
  if (m <= (hasWideBlocks(shape) ? MOST_VECTOR_ROWS : MOST_VECTOR_ROWS / 2)) return "vector";
  return m <= MOST_TILE_ROWS && shape.n * shape.k >= LEAST_TILE_ELEMENTS ? "tiles" : "dense";
}

/**
 * How `tiles` cuts the weight, by the most rows of activations that a cut is for: the rows of the weight of a block of threads, and the
 * groups of its warps that share k.
 */
export const TILE_CUTS = [
  { most: 16, rows: 128, groups: 4 },
  { most: 32, rows: 128, groups: 4 },
  { most: 64, rows: 256, groups: 2 },
] as const;

/** Columns that a warp of `tiles` takes at a time. */
export const TILE_CHUNK = 128;
/** Blocks of threads that a product is split into along k, if its rows give fewer. */
const ENOUGH_BLOCKS = 128;
/** Chunks that every group of warps is left with. */
const LEAST_CHUNKS = 2;

export function tileCut(m: number): (typeof TILE_CUTS)[number] {
  return TILE_CUTS.find(({ most }) => m <= most)!;
}

/** How many parts `tiles` splits k into: a power of two, by sizes alone. */
export function tileSplits({ m, n, k }: Pick<ProductShape, "m" | "n" | "k">): number {
  const { rows, groups } = tileCut(m);
  const chunks = ceilDiv(k, TILE_CHUNK);
  let splits = 1;
  while (ceilDiv(n, rows) * splits * 2 <= ENOUGH_BLOCKS && chunks >= splits * 2 * groups * LEAST_CHUNKS) splits *= 2;
  return splits;
}
