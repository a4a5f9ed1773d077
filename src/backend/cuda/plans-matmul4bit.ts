/** How the 4-bit products are launched. Which path a product takes is said in src/core/product-paths.ts. */
import { DTYPES, type FloatDType } from "../../core/dtype.js";
import type { KernelName, Operands } from "../../core/kernels.js";
import {
  hasWideBlocks,
  isRegular,
  MOST_TILE_ROWS,
  MOST_VECTOR_ROWS,
  type ProductShape,
  TILE_CHUNK,
  TILE_CUTS,
  tileCut,
} from "../../core/product-paths.js";
import { ceilDiv } from "../../core/shape.js";
import { dtypeName, type Launch, launch, type Plan, SHARED_BASE, unsupported, WARP } from "./launch.js";

/** `tiles` by the most rows of activations: the rows of the weight and the groups of warps of a block. */
function cuts(): Record<string, number> {
  return Object.fromEntries(
    TILE_CUTS.flatMap(({ most, rows, groups }) => [
      [`MATMUL4BIT_TILE${most}_ROWS`, rows],
      [`MATMUL4BIT_TILE${most}_GROUPS`, groups],
    ]),
  );
}

/** Threads of a block and what they take; csrc/kernels gets these generated. */
export const MATMUL4BIT_GEOMETRY = {
  MATMUL4BIT_VECTOR_THREADS: 512,
  MATMUL4BIT_TILE_CHUNK: TILE_CHUNK,
  MATMUL4BIT_TILE_STAGES: 3,
  ...cuts(),
  MATMUL4BIT_PLAIN_THREADS: 256,
  /** Rows of activations that `plain` takes at a time. */
  MATMUL4BIT_PLAIN_ROWS: 8,
} as const;
const G = MATMUL4BIT_GEOMETRY;

/** The look-up tables of `vector` and `tiles`. */
const TABLE_BYTES = 256 * 256;
const FRAGMENT_ROWS = 16;
/** Weights with no more columns than this have four warps to a row in `vector`, if they have rows enough for the others. */
const SHORT_COLUMNS = 2048;
const SHORT_ROWS = 64;

type Names = "matmul4bit" | "matmul4bitTransposed" | "quantizeActivations" | "matmul4bitFast";
const INTEGERS = "the fast product is the cpu's: a GPU multiplies at least as fast in floating point";
const DECODED = "a gradient is multiplied with the decoded weight by the dense product";

const isAligned = (o: { byteOffset: number } | null): boolean => o === null || o.byteOffset % 16 === 0;

function shapeOf(o: Operands<"matmul4bit">): ProductShape {
  const aligned = isAligned(o.a) && isAligned(o.packed);
  return { m: o.m, n: o.n, k: o.k, dtype: DTYPES[o.dtype]! as FloatDType, blocksize: o.blocksize, aligned };
}

function plain(o: Operands<"matmul4bit">): Launch | undefined {
  const rows = G.MATMUL4BIT_PLAIN_THREADS / WARP;
  const grid = ceilDiv(o.n, rows) * ceilDiv(o.m, G.MATMUL4BIT_PLAIN_ROWS) * o.splits;
  return launch(`matmul4bit_plain_${dtypeName(o)}`, grid, G.MATMUL4BIT_PLAIN_THREADS);
}

function vector(o: Operands<"matmul4bit">, wide: boolean): Launch | undefined {
  // Of eight columns of activations, two (or four) belong to one row.
  const tiles = ceilDiv(o.m, wide ? 4 : 2);
  // A short k would leave most of sixteen warps without a chunk.
  const short = wide && tiles === 1 && o.k <= SHORT_COLUMNS && o.n >= SHORT_ROWS;
  const warps = short ? 4 : G.MATMUL4BIT_VECTOR_THREADS / WARP;
  const rows = (FRAGMENT_ROWS * G.MATMUL4BIT_VECTOR_THREADS) / WARP / warps;
  const name = `matmul4bit_vector_${dtypeName(o)}_${wide ? "wide" : "narrow"}_${tiles}_${warps}`;
  const shared = SHARED_BASE + TABLE_BYTES;
  return launch(name, ceilDiv(o.n, rows), G.MATMUL4BIT_VECTOR_THREADS, true, shared, () => plain(o));
}

function tiles(o: Operands<"matmul4bit">): Launch | undefined {
  const { most, rows, groups } = tileCut(o.m);
  const fragments = most > 32 ? 4 : 2;
  const threads = (rows / (FRAGMENT_ROWS * fragments)) * groups * WARP;
  const stages = TABLE_BYTES + groups * G.MATMUL4BIT_TILE_STAGES * most * TILE_CHUNK * 2;
  const sums = groups * rows * most * Float32Array.BYTES_PER_ELEMENT;
  const shared = SHARED_BASE + Math.max(stages, sums);
  const name = `matmul4bit_tiles_${dtypeName(o)}_${most}`;
  return launch(name, ceilDiv(o.n, rows) * o.splits, threads, false, shared, () => plain(o));
}

export const MATMUL4BIT_PLANS: { readonly [K in Names & KernelName]: Plan<K> } = {
  matmul4bit: (o) => {
    if (o.m === 0 || o.n === 0) return undefined;
    const shape = shapeOf(o);
    if (!isRegular(shape) || o.m > MOST_TILE_ROWS) return plain(o);
    const wide = hasWideBlocks(shape);
    if (o.splits === 1 && o.m <= (wide ? MOST_VECTOR_ROWS : MOST_VECTOR_ROWS / 2)) return vector(o, wide);
    return o.code === null ? tiles(o) : plain(o);
  },
  matmul4bitTransposed: unsupported("matmul4bitTransposed", DECODED),
  quantizeActivations: unsupported("quantizeActivations", INTEGERS),
  matmul4bitFast: unsupported("matmul4bitFast", INTEGERS),
};
