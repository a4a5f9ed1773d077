/** How the dense, int8 and sparse products are launched where no library takes them. */
import type { KernelName } from "../../core/kernels.js";
import { ceilDiv } from "../../core/shape.js";
import { dtypeName, type Launch, launch, type Plan } from "./launch.js";

/** Threads of a block and what they take; csrc/kernels gets these generated. */
export const DENSE_GEOMETRY = {
  /** Rows, and columns, of the tiles of results that a block makes. */
  LARGE_TILE: 128,
  SMALL_TILE: 64,
  TILE_THREADS: 128,
  /** Bytes of k that a tile on tensor cores takes in a step, and steps in shared memory. */
  TILE_STEP: 64,
  TILE_STAGES: 4,
  /** Threads of a large tile in float32, words of k that lanes take in a step, steps in shared memory. */
  FLOAT_THREADS: 256,
  LANE_STEP: 8,
  LANE_STAGES: 4,
  /** A block of `transpose` moves squares of this many 4-byte words of x and of y. */
  TRANSPOSE_THREADS: 256,
  TRANSPOSE_TILE: 32,
  /** `int8MmDequant` without outliers: rows that a thread takes of one vector of columns. */
  MM_DEQUANT_THREADS: 256,
  MM_DEQUANT_ROWS: 4,
  /** With outliers: rows and columns of a block's tile, and outlier columns that it gathers at a time. */
  OUTLIER_TILE: 128,
  OUTLIER_COLUMNS: 32,
  /** Finding the outlier columns is one block's. */
  COMPACT_THREADS: 1024,
  /** Making them 0 takes a warp for each row. */
  ZERO_THREADS: 256,
  /** Quantization by columns: columns of a block that looks for maxima, rows of a thread that makes codes. */
  COLUMN_THREADS: 512,
  COLUMN_STRIP: 32,
  COLUMN_ROWS: 4,
  /** `spmmCoo`: a thread has this many columns of y. */
  SPARSE_THREADS: 128,
  SPARSE_COLUMNS: 4,
} as const;
const G = DENSE_GEOMETRY;

type Names = "matmul" | "igemm" | "transpose" | "int8MmDequant" | "spmmCoo";

/** Elements of 16 bytes. */
export const vectorOf = (o: { dtype: number }): number => (dtypeName(o) === "f32" ? 4 : 8);

/** Fewer large tiles than this leave multiprocessors idle that small ones would keep busy. */
const ENOUGH_LARGE_TILES = 96;

const FLOAT_BYTES = 4;

interface Tiles {
  readonly size: "large" | "small";
  readonly count: number;
  readonly edge: number;
}

function tiles(o: { m: number; n: number; batch: number }): Tiles {
  const of = (edge: number): number => ceilDiv(o.m, edge) * ceilDiv(o.n, edge) * o.batch;
  const large = of(G.LARGE_TILE);
  if (large >= ENOUGH_LARGE_TILES) return { size: "large", count: large, edge: G.LARGE_TILE };
  return { size: "small", count: of(G.SMALL_TILE), edge: G.SMALL_TILE };
}

/** Shared memory of a tile on tensor cores; what replaces them on sm_72 needs less. */
const tileShared = ({ edge }: Tiles): number => G.TILE_STAGES * 2 * edge * G.TILE_STEP;
/** On lanes; lines are padded by four words. */
const laneShared = ({ edge }: Tiles): number => G.LANE_STAGES * G.LANE_STEP * 2 * (edge + 4) * FLOAT_BYTES;

const layout = (o: { transposeA: number; transposeB: number }): string =>
  `${o.transposeA ? "t" : "n"}${o.transposeB ? "t" : "n"}`;

function mmDequant(o: Parameters<Plan<"int8MmDequant">>[0]): Launch | undefined {
  const entry = `int8MmDequant_${dtypeName(o)}`;
  if (o.columns) {
    const count = ceilDiv(o.m, G.OUTLIER_TILE) * ceilDiv(o.n, G.OUTLIER_TILE);
    return launch(`${entry}_outliers`, count, G.MM_DEQUANT_THREADS);
  }
  const threads = ceilDiv(o.m, G.MM_DEQUANT_ROWS) * ceilDiv(o.n, vectorOf(o));
  return launch(entry, ceilDiv(threads, G.MM_DEQUANT_THREADS), G.MM_DEQUANT_THREADS);
}

export const DENSE_PLANS: { readonly [K in Names & KernelName]: Plan<K> } = {
  matmul: (o) => {
    const all = tiles(o);
    const entry = `matmul_${dtypeName(o)}_${layout(o)}_${all.size}`;
    if (dtypeName(o) !== "f32") return launch(entry, all.count, G.TILE_THREADS, false, tileShared(all));
    const threads = all.size === "large" ? G.FLOAT_THREADS : G.TILE_THREADS;
    return launch(entry, all.count, threads, false, laneShared(all));
  },
  igemm: (o) => {
    const all = tiles(o);
    return launch(`igemm_${all.size}`, all.count, G.TILE_THREADS, false, tileShared(all));
  },
  transpose: (o) => {
    const edge = (G.TRANSPOSE_TILE * FLOAT_BYTES) / o.itemsize;
    const count = ceilDiv(o.rows, edge) * ceilDiv(o.cols, edge) * o.batch;
    return launch(`transpose_${o.itemsize}`, count, G.TRANSPOSE_THREADS);
  },
  int8MmDequant: mmDequant,
  spmmCoo: (o) => {
    const across = ceilDiv(o.n, G.SPARSE_THREADS * G.SPARSE_COLUMNS);
    return launch(`spmmCoo_${dtypeName(o)}`, o.rows * across, G.SPARSE_THREADS);
  },
};
