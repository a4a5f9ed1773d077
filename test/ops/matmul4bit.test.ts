import { expect, test } from "vitest";
import { DTYPE_ID } from "#halfbyte/core/dtype.js";
import { ACTIVATION_BLOCK } from "#halfbyte/core/kernels.js";
import { tidy } from "#halfbyte/core/scope.js";
import { Tensor } from "#halfbyte/core/tensor.js";
import { FLOATS, floats, hostBytes } from "../cases/case.js";
import { withBackend } from "../helpers/backends.js";
import { runCases } from "../helpers/run-cases.js";
import { quantizeActivations } from "../helpers/scalar-int8.js";

runCases("matmul4bit");

// Only the cpu has this kernel, and no op shows what it gives.
test("activations of the fast path: codes and scales, bit for bit", () =>
  withBackend({}, (backend) => {
    for (const dtype of FLOATS) {
      for (const kind of ["normal", "edge", "huge", "denormal", "wild", "nonfinite"] as const) {
        for (const [rows, cols] of [
          [1, 1],
          [3, 31],
          [5, 32],
          [7, 333],
          [2, 4099],
        ] as const) {
          const x = floats(dtype, rows * cols, kind, `activations ${rows}x${cols}`);
          const expected = quantizeActivations(x.values, rows, cols, ACTIVATION_BLOCK);
          const [q, scale] = tidy(() => {
            const input = Tensor.allocate(backend, dtype, [rows, cols]);
            backend.write(input.storage, 0, hostBytes(x));
            const codes = Tensor.allocate(backend, "i8", [expected.q.length]);
            const scales = Tensor.allocate(backend, "f32", [expected.scale.length]);
            const operands = { x: input, q: codes, scale: scales, rows, cols, dtype: DTYPE_ID[dtype] };
            backend.launch("quantizeActivations", operands);
            return [codes.dataSync(), scales.dataSync()];
          });
          expect(q, `${dtype} ${kind} ${rows}x${cols}`).toEqual(expected.q);
          expect(scale, `${dtype} ${kind} ${rows}x${cols}`).toEqual(expected.scale);
        }
      }
    }
  }));
