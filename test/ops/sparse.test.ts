import { afterAll, describe, expect, test } from "vitest";
import { memory, shutdown } from "#halfbyte/backend/devices.js";
import { ArgumentError, ShapeError } from "#halfbyte/core/errors.js";
import { tensor } from "#halfbyte/ops/create.js";
import { cooZeros, spmmCoo } from "#halfbyte/ops/sparse.js";
import { DEVICES } from "../helpers/backends.js";
import { runCases } from "../helpers/run-cases.js";

runCases("sparse");

afterAll(shutdown);
for (const { device, missing } of DEVICES) {
  // It makes tensors on a device by its name, so it is no case of the list.
  describe.skipIf(missing)(`cooZeros on ${device}${missing ? ` (skipped: ${missing})` : ""}`, () => {
    test("makes entries of zero, to be filled", async () => {
      for (const dtype of ["f32", "f16", "bf16"] as const) {
        using coo = cooZeros(3, 4, 2, { dtype, device });
        expect(coo).toMatchObject({ rows: 3, cols: 4, nnz: 2 });
        expect(coo.values.dtype).toBe(dtype);
        for (const part of coo.tensors()) {
          expect(part.shape).toEqual([2]);
          expect(await part.bytes()).toEqual(new Uint8Array(part.byteLength));
        }
        coo.rowidx.copyFrom(Int32Array.of(0, 2));
        coo.colidx.copyFrom(Int32Array.of(1, 3));
        coo.values.copyFrom([2, -3]);
        using B = tensor([1, 10, 2, 20, 3, 30, 4, 40], { dtype, shape: [4, 2], device });
        using y = spmmCoo(coo, B);
        using wide = y.to("f32");
        expect(await wide.data()).toEqual(Float32Array.of(4, 40, 0, 0, -12, -120));
      }
      using half = cooZeros(1, 1, 0, { device });
      expect(half.values.dtype).toBe("f16");
      half.dispose();
      expect(() => cooZeros(0, 4, 1, { device })).toThrow(ArgumentError);
      expect(() => cooZeros(-1, 4, 1, { device })).toThrow(ShapeError);
      expect(memory()[device]?.tensors).toBe(0);
    });
  });
}
