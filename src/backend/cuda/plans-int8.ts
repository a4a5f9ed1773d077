/** How the kernels of LLM.int8() that look at columns are launched. */
import type { KernelName } from "../../core/kernels.js";
import { ceilDiv } from "../../core/shape.js";
import { dtypeName, launch, type Plan, WARP } from "./launch.js";
import { DENSE_GEOMETRY as G, vectorOf } from "./plans-dense.js";

type Names = "int8OutlierColumns" | "int8ZeroColumns" | "int8ColumnStats" | "int8ColumnQuant";

export const INT8_PLANS: { readonly [K in Names & KernelName]: Plan<K> } = {
  int8OutlierColumns: () => launch("int8OutlierColumns", 1, G.COMPACT_THREADS),
  int8ZeroColumns: (o) => launch("int8ZeroColumns", ceilDiv(o.rows, G.ZERO_THREADS / WARP), G.ZERO_THREADS),
  int8ColumnStats: (o) => launch(`int8ColumnStats_${dtypeName(o)}`, ceilDiv(o.cols, G.COLUMN_STRIP), G.COLUMN_THREADS),
  int8ColumnQuant: (o) => {
    const threads = ceilDiv(o.rows, G.COLUMN_ROWS) * ceilDiv(o.cols, vectorOf(o));
    return launch(`int8ColumnQuant_${dtypeName(o)}`, ceilDiv(threads, G.COLUMN_THREADS), G.COLUMN_THREADS);
  },
};
