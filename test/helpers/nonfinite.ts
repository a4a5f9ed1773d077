/**
 * What is reported of non-finite input, and when: a story told to a backend, and what it answers. Two backends that answer alike
 * mean the same by it.
 */
import type { Backend } from "#halfbyte/core/backend.js";
import { NonFiniteError } from "#halfbyte/core/errors.js";
import { Tensor } from "#halfbyte/core/tensor.js";
import { quantizeBlockwise } from "#halfbyte/ops/blockwise.js";
import { quantize4bit } from "#halfbyte/ops/fourbit.js";
import { matmul8bit } from "#halfbyte/ops/igemm.js";
import { int8DoubleQuant, int8VectorwiseQuant } from "#halfbyte/ops/int8.js";
import { normals, random } from "./random.js";

const { NaN: NAN, POSITIVE_INFINITY: INF } = Number;

/** Every step as `what: answer`. Everything is disposed at the end. */
export async function nonFiniteStory(backend: Backend): Promise<string[]> {
  const log: string[] = [];
  const owned: { dispose(): void }[] = [];
  const own = <T extends { dispose(): void }>(value: T): T => {
    owned.push(value);
    return value;
  };
  const input = (n: number, bad: Record<number, number>, dtype: "f32" | "f16" | "bf16" = "f32"): Tensor => {
    const x = normals(n, `story${n}`);
    for (const [at, value] of Object.entries(bad)) x[Number(at)] = value;
    return own(Tensor.allocate(backend, dtype, [n]).copyFrom(x));
  };
  const tell = async (what: string, body: () => unknown): Promise<void> => {
    try {
      await body();
      log.push(`${what}: fine`);
    } catch (error) {
      if (!(error instanceof NonFiniteError)) throw error;
      log.push(`${what}: ${error.op} ${error.operand} ${error.unit} ${error.index}`);
    }
  };
  const four = (x: Tensor, options: Parameters<typeof quantize4bit>[1] = {}): Tensor => {
    const [packed, state] = quantize4bit(x, options);
    own(state);
    return own(packed);
  };
  const eight = (x: Tensor, options: Parameters<typeof quantizeBlockwise>[1] = {}): Tensor => {
    const [codes, state] = quantizeBlockwise(x, options);
    own(state);
    return own(codes);
  };
  const rows = (x: Tensor, shape: [number, number], allowNonFinite = false): Tensor => {
    const [q, scale] = int8VectorwiseQuant(own(x.reshape(shape)), { allowNonFinite });
    own(scale);
    return own(q);
  };

  const thresholded = (x: Tensor, shape: [number, number], allowNonFinite = false): Tensor => {
    const results = int8VectorwiseQuant(own(x.reshape(shape)), { threshold: 6, allowNonFinite });
    for (const result of results) if (result) own(result);
    return results[0];
  };
  const twice = (x: Tensor, shape: [number, number]): Tensor => {
    const results = int8DoubleQuant(own(x.reshape(shape)));
    for (const result of results) if (result) own(result);
    return results[1];
  };
  const weight = own(Tensor.allocate(backend, "i8", [8, 100])).copyFrom(new Int8Array(800).fill(3));
  const scales = own(Tensor.allocate(backend, "f32", [8])).copyFrom(new Float32Array(8).fill(2));
  const product = (x: Tensor, threshold: number): Tensor =>
    own(matmul8bit(own(x.reshape([x.size / 100, 100])), weight, scales, { threshold }));

  const good = input(100_000, {});
  const late = input(100_000, { 70000: NAN, 70001: INF, 90000: -INF });
  const early = input(100_000, { 130: INF });
  const last = input(99_999, { 99998: NAN });
  const many = input(500_000, Object.fromEntries(Array.from({ length: 60 }, (_, i) => [499_999 - 8000 * i, NAN])));

  await tell("fp4, several bad blocks", () => four(late).data());
  await tell("the read after", () => own(four(good)).data());
  await tell("nf4, the first block", () => four(early, { quantType: "nf4", blocksize: 32 }).dataSync());
  await tell("the last element", () => four(last).data());
  await tell("sixty bad blocks", () => four(many, { blocksize: 4096 }).data());
  await tell("8-bit, by table", () => eight(late, { blocksize: 256 }).data());
  await tell("8-bit, exact", () => eight(late, { blocksize: 4096, search: "exact" }).dataSync());
  await tell("8-bit, nested", () => eight(early, { nested: true, blocksize: 64 }).data());
  await tell("4-bit, nested", () => four(late, { compressStatistics: true }).data());
  await tell("rows", () => rows(late, [10, 10_000]).data());
  await tell("one long row", () => rows(late, [1, 100_000]).data());
  await tell("many short rows", () => rows(late, [20_000, 5]).dataSync());
  for (const dtype of ["f16", "bf16"] as const) {
    const half = input(50_000, { 33333: -INF, 44444: NAN }, dtype);
    await tell(`${dtype}: fp4`, () => four(half).data());
    await tell(`${dtype}: 8-bit`, () => eight(half, { blocksize: 512 }).data());
    await tell(`${dtype}: rows`, () => rows(half, [500, 100]).data());
  }

  await tell("rows with a threshold, which infinity is above", () => thresholded(early, [1000, 100]).data());
  await tell("rows with a threshold, NaN", () => thresholded(late, [1000, 100]).data());
  await tell("rows and columns", () => twice(late, [1000, 100]).data());
  await tell("int8 product", () => product(late, 0).data());
  await tell("int8 product with a threshold", () => product(early, 6).data());
  const half = input(10_000, { 7777: 1e6 });
  await tell("int8 product of what f16 does not hold", () => product(half, 0).data());
  await tell("and with a threshold", () => product(half, 6).data());
  await tell("int8 product of finite numbers", () => product(good, 6).data());

  const first = four(late);
  eight(early, { blocksize: 64 });
  await tell("of two launches the first is reported, though its block is later", () => first.data());
  await tell("and only that one", () => first.data());
  four(early);
  const innocent = four(good);
  await tell("a read of something else meets it", () => innocent.data());
  await tell("once", () => innocent.data());
  four(late);
  await tell("synchronize meets it", () => backend.synchronize());
  await tell("synchronize again", () => backend.synchronize());
  four(late);
  await tell("readSync meets it", () => innocent.dataSync());
  await tell("readSync again", () => innocent.dataSync());

  const before = good.data();
  const faulty = four(late);
  await tell("a read made before the launch is not blamed", () => before);
  await tell("the one after is", () => faulty.data());
  four(late);
  const reads = [innocent.data(), innocent.data(), innocent.data()];
  const answers = await Promise.allSettled(reads);
  log.push(`three reads pending: ${answers.map((a) => a.status).join(", ")}`);

  await tell("allowed: 4-bit", () => four(late, { allowNonFinite: true }).data());
  await tell("allowed: 8-bit, nested", () => eight(late, { allowNonFinite: true, nested: true }).data());
  await tell("allowed: rows", () => rows(late, [10, 10_000], true).data());
  await tell("allowed: rows with a threshold", () => thresholded(late, [10, 10_000], true).data());
  four(late, { allowNonFinite: true });
  four(early);
  four(early, { allowNonFinite: true });
  await tell("forbidden between two that are allowed", () => backend.synchronize());

  const next = random("story");
  for (let i = 0; i < 300; i++) {
    const x = [good, late, early, many][next() % 4]!;
    const kind = next() % 3;
    const out = kind === 0 ? four(x) : kind === 1 ? eight(x, { blocksize: 128 }) : rows(x, [x.size / 100, 100]);
    if (i % 7 === 6) await tell(`round ${i}`, () => (next() & 1 ? out.data() : out.dataSync()));
    if (i % 50 === 49) for (const t of owned.splice(owned.indexOf(innocent) + 1)) t.dispose();
  }
  await tell("the end", () => backend.synchronize());
  for (const t of owned) t.dispose();
  return log;
}
