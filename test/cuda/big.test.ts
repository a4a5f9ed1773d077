/**
 * Tensors beyond 4 GiB and beyond 2^32 elements: every offset that was 32 bits wide somewhere would show. The input repeats with a
 * period that is no power of two, so that what lies 2^32 away is something else; slices round the places where 31 and 32
 * bits end are held against the cpu. About 40 GB of GPU memory.
 */
import { expect, type TestContext, test } from "vitest";
import type { CudaBackend } from "#halfbyte/backend/cuda/backend.js";
import type { Backend } from "#halfbyte/core/backend.js";
import { DTYPE_BYTES } from "#halfbyte/core/dtype.js";
import { tidy } from "#halfbyte/core/scope.js";
import { Tensor } from "#halfbyte/core/tensor.js";
import { dequantizeBlockwise, quantizeBlockwise } from "#halfbyte/ops/blockwise.js";
import { dequantize4bit, quantize4bit } from "#halfbyte/ops/fourbit.js";
import { int8VectorwiseDequant, int8VectorwiseQuant } from "#halfbyte/ops/int8.js";
import { mean } from "#halfbyte/ops/sum.js";
import { normals } from "../helpers/random.js";
import * as scalar from "../helpers/scalar.js";
import { bytes, fill, onGpu, withBoth, withCuda } from "./gpu.js";

/** Elements of a period: whole blocks of 4,096, and rows of 4,099. */
const PERIOD = 4096 * 4099;
/** A little more than 2^32 elements; whole rows of 4,099, and no whole block at the end. */
const N = 4099 * Math.ceil((2 ** 32 + 3_000_000) / 4099);
/** Elements of a slice that is checked: whole blocks and rows. */
const CHECKED = 4096 * 4099;

/** The first elements of the slices that are checked: multiples of `unit`, round where 31 and 32 bits end, in bytes and elements. */
function places(unit: number, itemsize: number): number[] {
  const edges = [0, 2 ** 31, 2 ** 32, 2 ** 31 / itemsize, 2 ** 32 / itemsize, 2 ** 33 / itemsize];
  const starts = edges.map((edge) => Math.max(0, Math.floor((edge - CHECKED / 2) / unit) * unit));
  const last = Math.floor((N - CHECKED / 2) / unit) * unit;
  return [...new Set([...starts.filter((start) => start + CHECKED < N), last])];
}

/** `count` elements that repeat `period`, made on the device by copies that double. */
function repeat(period: Tensor, count: number): Tensor {
  const { backend, dtype } = period;
  const x = Tensor.allocate(backend, dtype, [count]);
  const item = DTYPE_BYTES[dtype];
  backend.launch("copy", { src: period, dst: x, bytes: period.byteLength });
  for (let done = period.size; done < count; done *= 2) {
    const dst = { storage: x.storage, byteOffset: done * item };
    backend.launch("copy", { src: x, dst, bytes: Math.min(done, count - done) * item });
  }
  return x;
}

function periodOn(backend: Backend, values: Float32Array, dtype: "f32" | "bf16"): Tensor {
  const wide = Tensor.allocate(backend, "f32", [values.length]).copyFrom(values);
  return dtype === "f32" ? wide : wide.to(dtype);
}

/** Elements [start, start + count) of the repeated period, on the cpu. */
function part(
  cpu: Backend,
  values: Float32Array<ArrayBuffer>,
  dtype: "f32" | "bf16",
  start: number,
  count: number,
): Tensor {
  const at = start % PERIOD;
  const two = new Float32Array(count);
  for (let i = 0, from = at; i < count; from = 0) {
    const some = values.subarray(from, from + count - i);
    two.set(some, i);
    i += some.length;
  }
  return periodOn(cpu, two, dtype);
}

function same(actual: Tensor, from: number, expected: Tensor, what: string): void {
  const got = actual
    .reshape([actual.size])
    .slice(from, from + expected.size)
    .bytesSync();
  const want = expected.bytesSync();
  if (Buffer.compare(got, want) === 0) return;
  const at = want.findIndex((byte, i) => byte !== got[i]);
  expect.fail(`${what}: byte ${at} of the slice at element ${from}: expected ${want[at]}, got ${got[at]}`);
}

/** Runs `body` for every slice; each on the cpu by itself. */
function eachPlace(unit: number, itemsize: number, body: (start: number, count: number) => void): void {
  for (const start of places(unit, itemsize)) tidy(() => body(start, Math.min(CHECKED, N - start)));
}

function needs({ skip }: TestContext, gpu: CudaBackend, gigabytes: number): void {
  const { totalBytes, name } = gpu.info;
  skip(totalBytes < gigabytes * 1e9, `${name} has less than ${gigabytes} GB`);
}

onGpu("beyond 32 bits", () => {
  test("fills, copies, writes and reads of five billion bytes", (context) =>
    withCuda({}, async (gpu) => {
      needs(context, gpu, 15);
      const n = 5_000_000_007;
      using a = bytes(gpu, n);
      using b = bytes(gpu, n);
      const at = (t: Tensor, i: number): number => gpu.readSync(t.storage, i, 1)[0]!;
      fill(a, 1);
      fill(b, 2);
      using end = a.slice(2 ** 32 + 77, n - 3);
      fill(end, 3);
      gpu.write(a.storage, 2 ** 32 + 5, Uint8Array.of(9, 8));
      const spots = [
        0,
        77,
        2 ** 31,
        2 ** 32 - 1,
        2 ** 32,
        2 ** 32 + 5,
        2 ** 32 + 6,
        2 ** 32 + 76,
        2 ** 32 + 77,
        n - 4,
        n - 3,
      ];
      const values = [1, 1, 1, 1, 1, 9, 8, 1, 3, 3, 1];
      expect(spots.map((i) => at(a, i))).toEqual(values);
      gpu.launch("copy", { src: a, dst: b, bytes: n });
      expect(spots.map((i) => at(b, i))).toEqual(values);
      expect(await gpu.read(b.storage, 2 ** 32 + 4, 4)).toEqual(Uint8Array.of(1, 9, 8, 1));
      using word = a.slice(0, n - 7);
      gpu.launch("fill", { dst: word, bytes: n - 7, value: 0x04030201 });
      expect([2 ** 32, 2 ** 32 + 1, 2 ** 32 + 2, 2 ** 32 + 3].map((i) => at(a, i))).toEqual([1, 2, 3, 4]);
    }));

  test("nf4 of more than 2^32 bfloat16 elements, there and back", (context) =>
    withBoth((gpu, cpu) => {
      needs(context, gpu, 40);
      const values = normals(PERIOD, "big nf4", 0.05);
      tidy(() => {
        const x = repeat(periodOn(gpu, values, "bf16"), N);
        const [packed, state] = quantize4bit(x, { quantType: "nf4" });
        const y = dequantize4bit(packed, state);
        eachPlace(4096, 2, (start, count) => {
          const [codes, own] = quantize4bit(part(cpu, values, "bf16", start, count), { quantType: "nf4" });
          same(packed, start / 2, codes, "packed");
          same(state.absmax, start / 64, own.absmax, "absmax");
          same(y, start, dequantize4bit(codes, own), "decoded");
        });
      });
    }));

  test("8-bit codes of more than 2^32 bfloat16 elements, there and back", (context) =>
    withBoth((gpu, cpu) => {
      needs(context, gpu, 40);
      const values = normals(PERIOD, "big 8-bit", 0.05);
      tidy(() => {
        const x = repeat(periodOn(gpu, values, "bf16"), N);
        const [codes, state] = quantizeBlockwise(x, { blocksize: 256 });
        const y = dequantizeBlockwise(codes, state);
        eachPlace(4096, 2, (start, count) => {
          const [q, own] = quantizeBlockwise(part(cpu, values, "bf16", start, count), { blocksize: 256 });
          same(codes, start, q, "codes");
          same(state.absmax, start / 256, own.absmax, "absmax");
          same(y, start, dequantizeBlockwise(q, own), "decoded");
        });
      });
    }));

  test("int8 rows of more than 2^32 bfloat16 elements, there and back", (context) =>
    withBoth((gpu, cpu) => {
      needs(context, gpu, 40);
      const cols = 4099;
      const values = normals(PERIOD, "big rows", 0.05);
      tidy(() => {
        const x = repeat(periodOn(gpu, values, "bf16"), N).reshape([N / cols, cols]);
        const [q, scale] = int8VectorwiseQuant(x);
        const y = int8VectorwiseDequant(q, scale, { dtype: "bf16" });
        eachPlace(cols, 2, (start, count) => {
          const rows = part(cpu, values, "bf16", start, count).reshape([count / cols, cols]);
          const [codes, own] = int8VectorwiseQuant(rows);
          same(q, start, codes, "codes");
          same(scale, start / cols, own, "scales");
          same(y, start, int8VectorwiseDequant(codes, own, { dtype: "bf16" }), "decoded");
        });
      });
    }));

  test("conversions of more than 2^32 elements", (context) =>
    withBoth((gpu, cpu) => {
      needs(context, gpu, 40);
      const values = normals(PERIOD, "big convert", 50);
      tidy(() => {
        const x = repeat(periodOn(gpu, values, "bf16"), N);
        const small = x.to("i8");
        const wide = x.to("f32");
        eachPlace(4096, 4, (start, count) => {
          const own = part(cpu, values, "bf16", start, count);
          same(small, start, own.to("i8"), "i8");
          same(wide, start, own.to("f32"), "f32");
        });
      });
    }));

  test("the mean of more than 2^32 bytes of float32", (context) =>
    withCuda({}, (gpu) => {
      needs(context, gpu, 10);
      // Chunks of the summation tree repeat with the period, so the reference need not add a billion numbers.
      const n = 64 * PERIOD + 1025;
      const values = normals(PERIOD, "big mean");
      const sums = scalar.chunkSums(values);
      const level: number[] = [];
      for (let i = 0; i < 64; i++) for (const sum of sums) level.push(sum);
      level.push(...scalar.chunkSums(values.subarray(0, 1025)));
      let sum: ArrayLike<number> = level;
      while (sum.length > 1) sum = scalar.chunkSums(sum);
      const expected = Math.fround(sum[0]! / n);
      tidy(() => {
        const x = repeat(periodOn(gpu, values, "f32"), n);
        expect(x.byteLength).toBeGreaterThan(2 ** 32);
        expect(mean(x).dataSync()[0]).toBe(expected);
      });
    }));
});
