import type { Backend } from "#halfbyte/core/backend.js";
import { DTYPE_ID, type FloatDType } from "#halfbyte/core/dtype.js";
import type { Tensor } from "#halfbyte/core/tensor.js";
import { clipGradNorm } from "#halfbyte/ops/gradient.js";
import { CONTEXT, makeList } from "../helpers/optimizer-list.js";
import { round } from "../helpers/scalar.js";
import { clip, sumSquares, tensorNorms } from "../helpers/scalar-optimizer.js";
import { type Case, caseId, EXTREMES, FLOATS, floats, framed, framedHost, type Host, type Kind } from "./case.js";
import { f32s } from "./optimizer-scenes.js";

const SIZES = [0, 1, 255, 256, 257, 0, 4095, 4096, 4097, 12_289];
const NAME = "clipGradNorm";

const gradients = (dtype: FloatDType, sizes: readonly number[], kind: Kind, id: string): Record<string, Host> =>
  Object.fromEntries(sizes.map((n, t) => [`g${t}`, floats(dtype, n, kind, `${id} ${t}`)]));

const leads = (sizes: readonly number[], lead: number): Record<string, number> =>
  Object.fromEntries(sizes.map((_, t) => [`g${t}`, lead === 0 ? 0 : (lead * 5 + t) % 9]));

/** The gradients in frames: they are written. */
function stage(inputs: Record<string, Tensor>, sizes: readonly number[], lead: number, backend: Backend) {
  return sizes.map((_, t) => {
    const src = inputs[`g${t}`]!;
    const frame = framed(backend, src.dtype, src.shape, leads(sizes, lead)[`g${t}`]!);
    if (src.byteLength > 0) backend.launch("copy", { src, dst: frame.view, bytes: src.byteLength });
    return frame;
  });
}

const bases = (frames: readonly { base: Tensor }[]): Record<string, Tensor> =>
  Object.fromEntries(frames.map(({ base }, t) => [`g${t}`, base]));

function scaled(host: Host, factor: number): Host {
  const dtype = host.dtype as FloatDType;
  return { ...host, values: Array.from(host.values, (x) => round(dtype, Math.fround(x * factor))) };
}

/** What torch.nn.utils.clip_grad_norm_ does, by the public function. */
function clipCase(dtype: FloatDType, sizes: readonly number[], kind: Kind, maxNorm: number, lead = 0): Case {
  const length = sizes.length > 3 ? `list=${sizes.length}` : `n=${sizes.join("+")}`;
  const id = caseId(NAME, dtype, length, kind, `max=${maxNorm}`, ...(lead ? [`view=${lead}`] : []));
  return {
    id,
    primitive: NAME,
    dtype,
    inputs: () => gradients(dtype, sizes, kind, id),
    run: (inputs, backend) => {
      const frames = stage(inputs, sizes, lead, backend);
      const norm = clipGradNorm(
        frames.map(({ view }) => view as Tensor<FloatDType>),
        maxNorm,
      );
      return { ...bases(frames), norm };
    },
    expected: (inputs) => {
      const hosts = sizes.map((_, t) => inputs[`g${t}`]!);
      const each = hosts.map(({ values }) => tensorNorms(sumSquares(values), 1)[0]!);
      const [norm, factor] = clip(each, maxNorm);
      const frames = hosts.map((host, t): [string, Host] => [
        `g${t}`,
        framedHost(scaled(host, factor!), leads(sizes, lead)[`g${t}`]!),
      ]);
      return { ...Object.fromEntries(frames), norm: { dtype: "f32", shape: [], values: [norm!] } };
    },
  };
}

/** Gradients of all dtypes together, in the order of f32, f16 and bf16. */
function mixedClipCase(sizes: readonly number[]): Case {
  const id = caseId(NAME, "mixed", `list=${sizes.length}`);
  const dtypeOf = (t: number): FloatDType => FLOATS[(t * 2) % 3]!;
  const order = FLOATS.flatMap((dtype) => sizes.flatMap((_, t) => (dtypeOf(t) === dtype ? [t] : [])));
  return {
    id,
    primitive: NAME,
    dtype: "f32",
    inputs: () => Object.fromEntries(sizes.map((n, t) => [`g${t}`, floats(dtypeOf(t), n, "normal", `${id} ${t}`)])),
    run: (inputs, backend) => {
      const frames = stage(inputs, sizes, 1, backend);
      const norm = clipGradNorm(
        frames.map(({ view }) => view),
        0.5,
      );
      return { ...bases(frames), norm };
    },
    expected: (inputs) => {
      const hosts = sizes.map((_, t) => inputs[`g${t}`]!);
      const [norm, factor] = clip(
        order.map((t) => tensorNorms(sumSquares(hosts[t]!.values), 1)[0]!),
        0.5,
      );
      const frames = hosts.map((host, t): [string, Host] => [
        `g${t}`,
        framedHost(scaled(host, factor!), leads(sizes, 1)[`g${t}`]!),
      ]);
      return { ...Object.fromEntries(frames), norm: { dtype: "f32", shape: [], values: [norm!] } };
    },
  };
}

/** Every kernel by itself, from one list. */
function kernelsCase(dtype: FloatDType, kind: Kind, lead: number): Case {
  const id = caseId(NAME, dtype, `list=${SIZES.length}`, kind, "kernels", ...(lead ? [`view=${lead}`] : []));
  const records = SIZES.length;
  return {
    id,
    primitive: NAME,
    dtype,
    inputs: () => ({ ...gradients(dtype, SIZES, kind, id), factor: f32s([0.3]) }),
    run: (inputs, backend) => {
      const frames = stage(inputs, SIZES, lead, backend);
      const all = makeList(
        backend,
        SIZES.map((n, t) => ({ n, index: t, g: frames[t]!.view })),
      );
      const { list, chunks, count, reached } = all;
      const gradDtype = DTYPE_ID[dtype];
      const partial = framed(backend, "f32", [count], 1);
      const norms = framed(backend, "f32", [records], 3);
      const result = framed(backend, "f32", [2], 1);
      const of = { list, chunks, count, gradDtype };
      backend.launch("gradientSumSquares", { ...of, partial: partial.view }, CONTEXT, reached());
      const sums = { list, partial: partial.view, norms: norms.view, records, width: 1 };
      backend.launch("tensorNorms", sums, CONTEXT, reached());
      const whole = { norms: norms.view, result: result.view, count: records, maxNorm: 1, errors: 0 };
      backend.launch("clipCoefficient", whole, CONTEXT);
      backend.launch("scaleGradients", { ...of, factor: inputs.factor! }, CONTEXT, reached("g"));
      return { ...bases(frames), partial: partial.base, norms: norms.base, result: result.base };
    },
    expected: (inputs) => {
      const hosts = SIZES.map((_, t) => inputs[`g${t}`]!);
      const sums = hosts.map(({ values }) => sumSquares(values));
      const each = sums.map((sum) => tensorNorms(sum, 1)[0]!);
      const factor = Math.fround(0.3);
      const frames = hosts.map((host, t): [string, Host] => [
        `g${t}`,
        framedHost(scaled(host, factor), leads(SIZES, lead)[`g${t}`]!),
      ]);
      return {
        ...Object.fromEntries(frames),
        partial: framedHost(f32s(sums.flatMap((sum) => [...sum])), 1),
        norms: framedHost(f32s(each), 3),
        result: framedHost(f32s([...clip(each, 1)]), 1),
      };
    },
  };
}

/** Sums of made-up chunks, as a tensor of billions of elements has them, and the norm of many tensors. */
function sumsCase(chunks: readonly number[], width: number, kind: Kind): Case {
  const id = caseId(NAME, "f32", `chunks=${chunks.join("+")}`, `width=${width}`, kind);
  const total = chunks.reduce((a, b) => a + b, 0);
  return {
    id,
    primitive: NAME,
    dtype: "f32",
    inputs: () => {
      const x = floats("f32", total * width, kind, id);
      return { partial: { ...x, values: Array.from(x.values, Math.abs) } };
    },
    run: (inputs, backend) => {
      const { list } = makeChunkedList(backend, chunks);
      const records = chunks.length;
      const norms = framed(backend, "f32", [records * width], 1);
      const [result, kept] = [framed(backend, "f32", [2], 0), framed(backend, "f32", [2], 0)];
      const sums = { list, partial: inputs.partial!, norms: norms.view, records, width };
      backend.launch("tensorNorms", sums, CONTEXT);
      const whole = { norms: norms.view, count: records * width, maxNorm: 0.5 };
      backend.launch("clipCoefficient", { ...whole, result: result.view, errors: 0 }, CONTEXT);
      backend.launch("clipCoefficient", { ...whole, result: kept.view, errors: 1 }, CONTEXT);
      return { norms: norms.base, result: result.base, kept: kept.base };
    },
    expected: ({ partial }) => {
      let at = 0;
      const each = chunks.flatMap((count) => {
        const part = Array.from(partial!.values).slice(at, at + count * width);
        at += count * width;
        return [...tensorNorms(part, width)];
      });
      const [result, kept] = [false, true].map((errors) => framedHost(f32s([...clip(each, 0.5, errors)]), 0));
      return { norms: framedHost(f32s(each), 1), result: result!, kept: kept! };
    },
  };
}

/** Records that say they have so many chunks; nobody looks at their gradients. */
function makeChunkedList(backend: Backend, chunks: readonly number[]) {
  return makeList(
    backend,
    chunks.map((count, index) => ({ n: Math.max(0, count * 4096 - (index % 3)), index })),
  );
}

/** Where the first non-finite gradient is, over two lists of different dtypes; -1: nowhere. */
function checkCase(dtype: FloatDType, bad: readonly (readonly [tensor: number, element: number])[], allow = 1): Case {
  const other: FloatDType = dtype === "f32" ? "bf16" : "f32";
  const sizes = [257, 0, 8200, 1, 4096];
  const id = caseId(NAME, dtype, "check", bad.map(([t, i]) => `${t}.${i}`).join("+") || "finite");
  const index = (t: number): number => (t < sizes.length ? 90 - 10 * t : t - sizes.length);
  return {
    id,
    primitive: NAME,
    dtype,
    lead: { g2: 3, g4: 1 },
    inputs: () => {
      const all = [...sizes, ...sizes];
      const inputs: Record<string, Host> = { guard: { dtype: "i32", shape: [4], values: [-1, 7, 1, 3] } };
      all.forEach((n, t) => {
        const host = floats(t < sizes.length ? dtype : other, n, t % 2 ? "wild" : "huge", `${id} ${t}`);
        const values = Array.from(host.values);
        bad.forEach(([tensor, i], k) => {
          if (tensor === t) values[i] = [Number.NaN, Number.POSITIVE_INFINITY, Number.NEGATIVE_INFINITY][k % 3]!;
        });
        inputs[`g${t}`] = { ...host, values };
      });
      return inputs;
    },
    run: (inputs, backend) => {
      const guard = framed(backend, "i32", [4], 0);
      backend.launch("copy", { src: inputs.guard!, dst: guard.view, bytes: 16 });
      for (const half of [0, 1]) {
        const begin = half * sizes.length;
        const entries = sizes.map((n, t) => ({ n, index: index(t + begin), g: inputs[`g${t + begin}`]! }));
        const { list, chunks, count, reached } = makeList(backend, entries);
        const gradDtype = DTYPE_ID[half ? other : dtype];
        backend.launch("gradientCheck", { list, chunks, guard: guard.view, count, gradDtype }, CONTEXT, reached());
      }
      const checked = framed(backend, "i32", [4], 0);
      backend.launch("copy", { src: guard.view, dst: checked.view, bytes: 16 });
      backend.launch("gradientVerdict", { guard: guard.view, allowNonFinite: allow }, CONTEXT);
      return { checked: checked.base, guard: guard.base };
    },
    expected: () => {
      const words = (...values: number[]): Host => framedHost({ dtype: "i32", shape: [4], values }, 0);
      if (bad.length === 0) return { checked: words(-1, 7, 1, 3), guard: words(-1, 7, 0, 3) };
      const found = Math.min(...bad.map(([t]) => index(t)));
      return { checked: words(found, 7, 1, 3), guard: words(-1, 8, 1, found) };
    },
  };
}

export function* gradientCases(): Generator<Case> {
  for (const dtype of FLOATS) {
    for (const kind of ["normal", "edge", ...EXTREMES] as const) {
      yield kernelsCase(dtype, kind, 0);
      yield clipCase(dtype, [700, 0, 4097], kind, 1);
    }
    for (const lead of [1, 2, 4]) {
      yield kernelsCase(dtype, "edge", lead);
      yield clipCase(dtype, [4096, 300, 8200], "normal", 0.75, lead);
    }
    yield clipCase(dtype, SIZES, "normal", 1);
    yield clipCase(dtype, [1], "normal", 1e-9);
    yield clipCase(dtype, [5003], "normal", 1e9);
    yield clipCase(dtype, [0], "normal", 1);
    yield checkCase(dtype, []);
    for (const at of [0, 1, 255, 256] as const) yield checkCase(dtype, [[0, at]]);
    for (const at of [0, 4095, 4096, 8191, 8199] as const) yield checkCase(dtype, [[2, at]]);
    yield checkCase(dtype, [[3, 0]]);
    yield checkCase(dtype, [[4, 4095]]);
    yield checkCase(dtype, [
      [0, 4],
      [2, 17],
      [4, 3],
    ]);
    yield checkCase(dtype, [
      [9, 100],
      [5, 0],
      [2, 1],
    ]);
    yield { ...clipCase(dtype, [100_003, 5], "normal", 1), large: true };
    yield {
      ...clipCase(
        dtype,
        Array.from({ length: 300 }, (_, t) => t),
        "edge",
        1,
      ),
      large: true,
    };
  }
  yield mixedClipCase([300, 4097, 0, 1, 8200, 33, 256]);
  yield mixedClipCase(Array.from({ length: 40 }, (_, t) => 17 * t));
  for (const width of [1, 2]) {
    yield sumsCase([1, 0, 2, 3], width, "normal");
    yield sumsCase([1023, 1024, 1025], width, "normal");
    yield sumsCase([5000, 1, 2047, 0, 2049], width, "edge");
    for (const kind of EXTREMES) yield sumsCase([1500, 7], width, kind);
    yield sumsCase(
      Array.from({ length: 2500 }, (_, t) => t % 3),
      width,
      "normal",
    );
  }
}
