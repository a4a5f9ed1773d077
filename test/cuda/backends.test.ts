import { expect, test } from "vitest";
import { CudaBackend } from "#halfbyte/backend/cuda/backend.js";
import type { Backend } from "#halfbyte/core/backend.js";
import { tidy } from "#halfbyte/core/scope.js";
import { Tensor } from "#halfbyte/core/tensor.js";
import { dequantizeBlockwise, quantizeBlockwise } from "#halfbyte/ops/blockwise.js";
import { dequantize4bit, quantize4bit } from "#halfbyte/ops/fourbit.js";
import { expectNothingLeft } from "../helpers/backends.js";
import { normals } from "../helpers/random.js";
import { bytes, fill, floats, onGpu, withBoth } from "./gpu.js";

/** Launches a round of everything; the bytes come later. */
function everything(backend: Backend, seed: number): Promise<Buffer> {
  const results = tidy(() => {
    const A = floats(backend, normals(200_003, seed));
    const [packed, state] = quantize4bit(A, { quantType: "nf4", compressStatistics: true });
    const [codes, state8] = quantizeBlockwise(A, { blocksize: 256 });
    const y = dequantize4bit(packed, state);
    return [
      packed,
      ...state.tensors(),
      codes,
      ...state8.tensors(),
      y,
      dequantizeBlockwise(codes, state8),
      y.to("bf16"),
    ];
  });
  const reads = results.map((t) => t.bytes());
  for (const t of results) t.dispose();
  return Promise.all(reads).then((all) => Buffer.concat(all));
}

onGpu("several backends in one program", () => {
  test("two cuda backends and a cpu, interleaved, give the same bits", () =>
    withBoth(async (gpu, cpu) => {
      const second = new CudaBackend();
      for (let i = 0; i < 10; i++) {
        const [a, b, c] = await Promise.all([everything(gpu, i), everything(second, i), everything(cpu, i)]);
        expect(a.length).toBeGreaterThan(1_000_000);
        expect(Buffer.compare(a, c), `round ${i}`).toBe(0);
        expect(Buffer.compare(b, c), `round ${i}`).toBe(0);
      }
      expectNothingLeft(second);
      await second.close();
    }));

  test("closing one leaves the other at work", async () => {
    const [one, two] = [new CudaBackend(), new CudaBackend()];
    const pending = everything(two, 1);
    await one.close();
    const expected = await pending;
    expect(Buffer.compare(await everything(two, 1), expected)).toBe(0);
    using t = bytes(two, 100);
    fill(t, 5);
    expect(t.dataSync()[99]).toBe(5);
    await two.close();
  });

  test("tensors cross between devices, to themselves and rounded on the way", () =>
    withBoth(async (gpu, cpu) => {
      const values = normals(100_001, "cross");
      using onCpu = floats(cpu, values);
      using onGpu = Tensor.allocate(gpu, "f32", [values.length]);
      onGpu.copyFrom(onCpu);
      expect(Buffer.compare(await onGpu.bytes(), Buffer.from(values.buffer))).toBe(0);
      using half = Tensor.allocate(gpu, "bf16", [values.length]);
      half.copyFrom(onCpu);
      using back = Tensor.allocate(cpu, "bf16", [values.length]);
      back.copyFrom(onGpu);
      using same = onCpu.to("bf16");
      expect(Buffer.compare(await half.bytes(), await same.bytes())).toBe(0);
      expect(Buffer.compare(await back.bytes(), await same.bytes())).toBe(0);
    }));
});
