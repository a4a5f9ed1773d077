import type { FloatDType } from "#halfbyte/core/dtype.js";
import type { Tensor } from "#halfbyte/core/tensor.js";
import { matmul } from "#halfbyte/ops/matmul.js";
import { product, sumBound, type Terms } from "../helpers/bounds.js";
import { type Case, caseId, FLOATS, framedParts, framedPartsHost, type Host } from "./case.js";
import { type Fill, matrix, scaleName, vector } from "./product-inputs.js";

interface Spec {
  readonly dtype: FloatDType;
  readonly m: number;
  readonly n: number;
  readonly k: number;
  readonly transposeA?: boolean;
  readonly transposeB?: boolean;
  readonly bias?: boolean;
  readonly batch?: readonly number[];
  /** One B for all batches. */
  readonly shared?: boolean;
  readonly view?: number;
  readonly fill?: Fill;
  readonly scale?: readonly [number, number];
  readonly large?: boolean;
}

function matmulCase(s: Spec): Case {
  const {
    dtype,
    m,
    n,
    k,
    transposeA = false,
    transposeB = false,
    batch = [],
    shared = false,
    view,
    scale = [1, 1],
  } = s;
  const words = [
    `${transposeA ? "t" : "n"}${transposeB ? "t" : "n"}`,
    batch.length > 0 && `b=${batch.join("x")}`,
    shared && "shared",
    s.bias && "bias",
    s.fill,
    s.scale && `scale=${s.scale.map(scaleName).join()}`,
    view !== undefined && `view=${view}`,
  ].filter((word) => typeof word === "string");
  const id = caseId("matmul", dtype, `m=${m}`, `n=${n}`, `k=${k}`, ...words);
  const batches = batch.reduce((a, b) => a * b, 1);
  const shape = [...batch, m, n];
  const behind = ((view ?? 0) * 5) % 16;
  return {
    id,
    primitive: "matmul",
    dtype,
    bounded: true,
    ...(s.large && { large: true }),
    ...(view !== undefined && { lead: { A: view, B: view + 1, bias: view } }),
    inputs: () => {
      const A = matrix(dtype, [batches * m, k], `${id} A`, s.fill, scale[0]);
      const B = matrix(dtype, [shared ? k : batches * k, n], `${id} B`, "signs", scale[1]);
      return {
        A: { ...A, shape: [...batch, ...(transposeA ? [k, m] : [m, k])] },
        B: { ...B, shape: [...(shared ? [] : batch), ...(transposeB ? [n, k] : [k, n])] },
        ...(s.bias && { bias: vector(dtype, n, `${id} bias`, 0.5) }),
      };
    },
    run: ({ A, B, bias }, backend): Record<string, Tensor> => {
      const frame = view === undefined ? undefined : framedParts(backend, dtype, shape, behind);
      const y = matmul(A!, B!, { transposeA, transposeB, bias, out: frame?.view });
      return frame ? { y, before: frame.before, behind: frame.behind } : { y };
    },
    expected: ({ A, B, bias }): Record<string, Host> => {
      const values = new Float64Array(batches * m * n);
      const bound = new Float64Array(values.length);
      for (let b = 0; b < batches; b++) {
        const [aStep, bStep] = [transposeA ? [1, m] : [k, 1], transposeB ? [1, k] : [n, 1]];
        const left = { values: A!.values, begin: b * m * k, rowStep: aStep[0]!, columnStep: aStep[1]! };
        const begin = shared ? 0 : b * k * n;
        const right = { values: B!.values, begin, rowStep: bStep[0]!, columnStep: bStep[1]! };
        const one = product([m, n, k], left, right, bias?.values, (t: Terms) => sumBound(dtype, t));
        values.set(one.values, b * m * n);
        bound.set(one.bound, b * m * n);
      }
      return { y: { dtype, shape, values, bound }, ...(view !== undefined && framedPartsHost(dtype, behind)) };
    },
  };
}

const ROWS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 33, 64, 65, 100, 130];
const DEPTHS = [1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 576, 1000, 4099];
const BOTH = [false, true] as const;

export function* matmulCases(): Generator<Case> {
  for (const dtype of FLOATS) {
    for (const transposeA of BOTH) {
      for (const transposeB of BOTH) {
        const how = { dtype, transposeA, transposeB };
        // A lies across in few places: half of the sweeps.
        const half = (sizes: readonly number[]) =>
          sizes.filter((_, i) => !transposeA || i % 2 === (transposeB ? 1 : 0));
        for (const m of half(ROWS)) {
          yield matmulCase({ ...how, m, n: 18, k: 45 });
          yield matmulCase({ ...how, m: 9, n: m, k: 72, bias: m % 2 === 0 });
        }
        for (const k of half(DEPTHS)) yield matmulCase({ ...how, m: 6, n: 10, k, bias: k % 2 === 0 });
        yield matmulCase({ ...how, m: 64, n: 128, k: 96, bias: true });
        yield matmulCase({ ...how, m: 5, n: 6, k: 7, batch: [3] });
        yield matmulCase({ ...how, m: 17, n: 33, k: 40, batch: [2, 3], bias: true });
        yield matmulCase({ ...how, m: 5, n: 6, k: 7, batch: [2, 2], shared: true });
        yield matmulCase({ ...how, m: 33, n: 17, k: 64, batch: [3], shared: true, bias: true });
        for (const view of [1, 2, 3, 7, 8]) {
          yield matmulCase({ ...how, m: 19, n: 23, k: 37, view, bias: view > 1 });
          yield matmulCase({ ...how, m: 16, n: 32, k: 64, view });
          if (view < 4) yield matmulCase({ ...how, m: 1, n: 23, k: 64, view });
        }
        for (const [m, n, k] of [
          [0, 3, 4],
          [3, 0, 4],
          [3, 4, 0],
        ] as const)
          yield matmulCase({ ...how, m, n, k, bias: true });
        yield matmulCase({ ...how, m: 3, n: 4, k: 0, batch: [2] });
        yield matmulCase({ ...how, m: 3, n: 4, k: 5, batch: [0] });
      }
    }
    for (const m of [1, 7, 40]) {
      yield matmulCase({ dtype, m, n: 20, k: 70, transposeB: true, fill: "nonfinite" });
      yield matmulCase({ dtype, m, n: 20, k: 70, transposeB: true, fill: "zeros", bias: true });
      yield matmulCase({ dtype, m, n: 20, k: 70, fill: "onehot" });
      // Results that overflow f16 and are denormal in it; exponents that only the others have.
      const scales =
        dtype === "f16"
          ? ([
              [30, 40],
              [2 ** -9, 2 ** -9],
            ] as const)
          : ([
              [2 ** 70, 2 ** 50],
              [2 ** -80, 2 ** -60],
            ] as const);
      for (const scale of scales) yield matmulCase({ dtype, m, n: 20, k: 70, scale });
    }
    yield matmulCase({ dtype, m: 130, n: 300, k: 1100, transposeB: true, bias: true, large: true });
    yield matmulCase({ dtype, m: 300, n: 130, k: 600, large: true });
  }
}
