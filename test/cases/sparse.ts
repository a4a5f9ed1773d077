import type { FloatDType } from "#halfbyte/core/dtype.js";
import type { Tensor } from "#halfbyte/core/tensor.js";
import { COOSparseTensor, spmmCoo, spmmCooVerySparse } from "#halfbyte/ops/sparse.js";
import { sumBound } from "../helpers/bounds.js";
import { random } from "../helpers/random.js";
import * as scalar from "../helpers/scalar-int8.js";
import { type Case, caseId, FLOATS, framedParts, framedPartsHost, type Host } from "./case.js";
import { codes, matrix, scales, vector } from "./product-inputs.js";

interface Spec {
  readonly op: "spmmCoo" | "spmmCooVerySparse";
  readonly dtype: FloatDType;
  readonly rows: number;
  readonly cols: number;
  readonly n: number;
  readonly nnz: number;
  /** B in int8 codes with a scale per column. */
  readonly codes?: boolean;
  /** All entries in the last row. */
  readonly heavy?: boolean;
  /** Some entries have a row or a column that is not there. */
  readonly outside?: boolean;
  readonly view?: number;
  readonly large?: boolean;
}

function sparseCase(s: Spec): Case {
  const { op, dtype, rows, cols, n, nnz, view } = s;
  const words = [s.codes && "i8", s.heavy && "heavy", s.outside && "outside", view !== undefined && `view=${view}`];
  const named = words.filter((word) => typeof word === "string");
  const id = caseId(op, dtype, `${rows}x${cols}`, `n=${n}`, `nnz=${nnz}`, ...named);
  const behind = ((view ?? 0) * 5) % 16;
  return {
    id,
    primitive: op,
    dtype: s.codes ? "i8" : dtype,
    bounded: true,
    ...(s.large && { large: true }),
    ...(view !== undefined && { lead: { rowidx: view % 3, colidx: view % 4, values: view, B: view + 1, stats: view } }),
    inputs: () => {
      const next = random(id);
      // Several entries for one place now and then, and rows without any.
      const rowidx = Int32Array.from({ length: nnz }, () => (s.heavy ? rows - 1 : next() % rows)).sort();
      const colidx = Int32Array.from({ length: nnz }, () => next() % cols);
      if (s.outside) {
        rowidx.set([-(2 ** 31), -1, -1]);
        rowidx.set([rows, rows + 1, 2 ** 31 - 1], nnz - 3);
        for (let i = 0; i < nnz; i += 4) colidx[i] = [-1, cols, 2 ** 31 - 1, -(2 ** 31)][(i / 4) % 4]!;
      }
      return {
        rowidx: { dtype: "i32", shape: [nnz], values: rowidx },
        colidx: { dtype: "i32", shape: [nnz], values: colidx },
        values: vector(dtype, nnz, `${id} values`),
        B: s.codes ? codes([cols, n], `${id} B`) : matrix(dtype, [cols, n], `${id} B`),
        ...(s.codes && { stats: scales(n, `${id} stats`, 2) }),
      };
    },
    run: ({ rowidx, colidx, values, B, stats }, backend): Record<string, Tensor> => {
      const frame = view === undefined ? undefined : framedParts(backend, dtype, [rows, n], behind);
      const coo = new COOSparseTensor(
        rows,
        cols,
        rowidx as Tensor<"i32">,
        colidx as Tensor<"i32">,
        values as Tensor<FloatDType>,
      );
      const out = frame?.view as Tensor<FloatDType> | undefined;
      const y = op === "spmmCoo" ? spmmCoo(coo, B!, { out }) : spmmCooVerySparse(coo, B!, { out, dequantStats: stats });
      return frame ? { y, before: frame.before, behind: frame.behind } : { y };
    },
    expected: ({ rowidx, colidx, values, B, stats }): Record<string, Host> => {
      const rowStats = new Float32Array(cols).fill(127);
      const b = stats ? scalar.int8MmDequant(B!.values, rowStats, stats.values, undefined, dtype) : B!.values;
      const y = new Float64Array(rows * n);
      const magnitude = new Float64Array(rows * n);
      const count = new Float64Array(rows);
      for (let e = 0; e < nnz; e++) {
        const [r, c] = [rowidx!.values[e]!, colidx!.values[e]!];
        if (r < 0 || r >= rows || c < 0 || c >= cols) continue;
        count[r]!++;
        for (let j = 0; j < n; j++) {
          const term = values!.values[e]! * b[c * n + j]!;
          y[r * n + j]! += term;
          magnitude[r * n + j]! += Math.abs(term);
        }
      }
      const bound = y.map((value, i) =>
        sumBound(dtype, {
          value,
          magnitude: magnitude[i]!,
          squares: 0,
          count: count[Math.floor(i / n)]!,
          activations: 0,
        }),
      );
      return {
        y: { dtype, shape: [rows, n], values: y, bound },
        ...(view !== undefined && framedPartsHost(dtype, behind)),
      };
    },
  };
}

export function* sparseCases(): Generator<Case> {
  for (const dtype of FLOATS) {
    for (const op of ["spmmCoo", "spmmCooVerySparse"] as const) {
      for (const n of [1, 3, 4, 7, 8, 9, 16, 33, 64, 65, 300]) {
        yield sparseCase({ op, dtype, rows: 17, cols: 23, n, nnz: 60 });
        yield sparseCase({ op, dtype, rows: 70, cols: 40, n, nnz: 5 });
      }
      for (const nnz of [0, 1, 2, 63, 64, 65, 1000]) yield sparseCase({ op, dtype, rows: 65, cols: 33, n: 20, nnz });
      yield sparseCase({ op, dtype, rows: 5, cols: 9, n: 40, nnz: 700, heavy: true });
      for (const n of [4, 33]) yield sparseCase({ op, dtype, rows: 17, cols: 23, n, nnz: 90, outside: true });
      yield sparseCase({ op, dtype, rows: 0, cols: 9, n: 4, nnz: 0 });
      yield sparseCase({ op, dtype, rows: 5, cols: 0, n: 4, nnz: 0 });
      yield sparseCase({ op, dtype, rows: 5, cols: 9, n: 0, nnz: 3 });
      for (const view of [1, 2, 3, 7, 8]) yield sparseCase({ op, dtype, rows: 19, cols: 31, n: 37, nnz: 90, view });
      yield sparseCase({ op, dtype, rows: 1000, cols: 500, n: 130, nnz: 20_000, large: true });
    }
    const op = "spmmCooVerySparse" as const;
    for (const n of [1, 5, 16, 65]) yield sparseCase({ op, dtype, rows: 17, cols: 23, n, nnz: 60, codes: true });
    for (const view of [1, 3]) yield sparseCase({ op, dtype, rows: 19, cols: 31, n: 37, nnz: 90, codes: true, view });
  }
  yield sparseCase({ op: "spmmCoo", dtype: "f16", rows: 70_001, cols: 9, n: 3, nnz: 5000, large: true });
}
