/**
 * How each kernel's work is split on the cpu: what a unit is, how many there are, how many make a part. Sizes alone
 * decide, so results do not depend on the number of workers. A part is about 64k elements: long enough to hide the
 * claim, short enough to balance, and one WebAssembly call each so that optimised code is entered soon.
 */
import type { KernelName, Operands } from "../../core/kernels.js";
import { SUM_CHUNK } from "../../core/kernels.js";
import { OPTIMIZER_CHUNK } from "../../core/optimizers.js";
import { ceilDiv } from "../../core/shape.js";
import {
  DEQUANT_TILE,
  IGEMM_PANEL,
  IGEMM_ROWS,
  MATMUL_PANEL,
  MATMUL_ROWS,
  MATMUL_WIDE,
  MATMUL_WIDEST,
  MATMUL_WIDTH,
  PRODUCT_COLUMNS,
  PRODUCT_ROWS,
  SPMM_WIDTH,
  TRANSPOSE_TILE,
  TRANSPOSED_COLUMNS,
} from "./layout.js";

const PART_ELEMENTS = 65536;
const PART_BYTES = 1 << 20;
/** Multiplications of a part of a product, which take some 30 µs. */
const PART_PRODUCTS = 1 << 19;

export interface Partition<K extends KernelName> {
  /** Work items of a launch; 0 launches nothing. */
  units(o: Operands<K>): number;
  /** Work items of a part. */
  per(o: Operands<K>): number;
}

const blocks = (o: { n: number; blocksize: number }): number => ceilDiv(o.n, o.blocksize);
const blocksPer = (o: { blocksize: number }): number => Math.max(1, Math.floor(PART_ELEMENTS / o.blocksize));
const rowsPer = (o: { cols: number }): number => Math.max(1, Math.floor(PART_ELEMENTS / Math.max(1, o.cols)));

/** Square tiles that make a quarter of a usual part: an element costs more than in other kernels. */
const tilesPer = (rows: number, side: number): number =>
  Math.max(1, Math.floor(PART_ELEMENTS / 4 / (Math.min(rows, side) * side)));
/** Tiles of at most `rows` x `columns` sums over k each. */
const productsPer = ({ m, k }: { m: number; k: number }, rows: number, columns: number): number =>
  Math.max(1, Math.floor(PART_PRODUCTS / (Math.ceil(m / ceilDiv(m, rows)) * columns * Math.max(1, k))));

/** Outputs of a product with a 4-bit weight: tiles of PRODUCT_COLUMNS by at most PRODUCT_ROWS. */
const codeTiles = (o: { m: number; n: number }): number => ceilDiv(o.m, PRODUCT_ROWS) * ceilDiv(o.n, PRODUCT_COLUMNS);
/** Tiles of a part: one, or with a single row of activations about PART_ELEMENTS of the weight. */
const codeTilesPer = (o: { m: number; k: number }): number =>
  o.m > 1 ? 1 : Math.min(64, Math.max(1, Math.floor(PART_ELEMENTS / (PRODUCT_COLUMNS * Math.max(1, o.k)))));

const matmulTiles = (o: { m: number; n: number; batch: number }): number =>
  o.batch * ceilDiv(o.m, MATMUL_ROWS) * ceilDiv(o.n, MATMUL_PANEL);

/** Chunks of a list: half a usual part, because an element of an optimizer costs more. */
const chunks = {
  units: (o: { count: number }) => o.count,
  per: () => PART_ELEMENTS / 2 / OPTIMIZER_CHUNK,
};

export const CPU_KERNELS: { readonly [K in KernelName]: Partition<K> } = {
  copy: { units: (o) => o.bytes, per: () => PART_BYTES },
  fill: { units: (o) => o.bytes, per: () => PART_BYTES },
  convert: { units: (o) => o.n, per: () => PART_ELEMENTS },
  sumChunks: { units: (o) => ceilDiv(o.n, SUM_CHUNK), per: () => PART_ELEMENTS / SUM_CHUNK },
  meanOfSums: { units: () => 1, per: () => 1 },
  sumPartials: { units: (o) => o.rows, per: rowsPer },
  quantizeBlockwise: { units: blocks, per: blocksPer },
  dequantizeBlockwise: { units: blocks, per: blocksPer },
  quantize4bit: { units: blocks, per: blocksPer },
  dequantize4bit: { units: blocks, per: blocksPer },
  int8VectorwiseQuant: { units: (o) => o.rows, per: rowsPer },
  int8VectorwiseDequant: { units: (o) => o.rows, per: rowsPer },
  int8OutlierColumns: { units: () => 1, per: () => 1 },
  int8ZeroColumns: { units: (o) => o.rows, per: rowsPer },
  int8ColumnStats: { units: (o) => o.cols, per: () => 128 },
  int8ColumnQuant: { units: (o) => o.rows, per: rowsPer },
  igemm: {
    units: (o) => o.batch * ceilDiv(o.m, IGEMM_ROWS) * ceilDiv(o.n, IGEMM_PANEL),
    per: (o) => productsPer(o, IGEMM_ROWS, IGEMM_PANEL),
  },
  transpose: {
    units: (o) => o.batch * ceilDiv(o.rows, TRANSPOSE_TILE) * ceilDiv(o.cols, TRANSPOSE_TILE),
    per: (o) => tilesPer(o.rows, TRANSPOSE_TILE),
  },
  int8MmDequant: {
    units: (o) => ceilDiv(o.m, DEQUANT_TILE) * ceilDiv(o.n, DEQUANT_TILE),
    per: (o) => tilesPer(o.m, DEQUANT_TILE),
  },
  matmul4bit: { units: codeTiles, per: codeTilesPer },
  matmul4bitTransposed: {
    units: (o) => ceilDiv(o.m, PRODUCT_ROWS) * ceilDiv(o.k, TRANSPOSED_COLUMNS),
    per: () => 1,
  },
  quantizeActivations: { units: (o) => o.rows, per: rowsPer },
  matmul4bitFast: { units: codeTiles, per: codeTilesPer },
  matmul: {
    units: matmulTiles,
    per: (o) => {
      // As many panels as a tile takes, while there are parts enough.
      const most = o.transposeB || o.m > 16 ? MATMUL_WIDTH : o.m > 2 ? MATMUL_WIDE : MATMUL_WIDEST;
      const parts = most === MATMUL_WIDTH ? 64 : most === MATMUL_WIDE ? 16 : 8;
      const together = Math.min(most / MATMUL_PANEL, Math.floor(matmulTiles(o) / parts));
      return Math.max(together, productsPer(o, MATMUL_ROWS, MATMUL_PANEL));
    },
  },
  spmmCoo: {
    units: (o) => o.rows * ceilDiv(o.n, SPMM_WIDTH),
    per: (o) => Math.max(1, Math.min(64, Math.floor((PART_ELEMENTS * o.rows) / (SPMM_WIDTH * Math.max(1, o.nnz))))),
  },
  optimizerUpdate32bit: chunks,
  optimizerUpdate8bitBlockwise: chunks,
  optimizerNorms32bit: chunks,
  optimizerNorms8bitBlockwise: chunks,
  optimizerRatios: { units: (o) => o.records, per: () => 64 },
  gradientCheck: chunks,
  gradientVerdict: { units: () => 1, per: () => 1 },
  gradientSumSquares: chunks,
  tensorNorms: { units: (o) => o.records, per: () => 8 },
  clipCoefficient: { units: () => 1, per: () => 1 },
  scaleGradients: chunks,
};
