/** Checks that ops share, where a case list has no place for them. */
import { expect, test } from "vitest";
import {
  ArgumentError,
  dequantize4bit,
  dequantizeBlockwise,
  int8VectorwiseDequant,
  quantize4bit,
  quantizeBlockwise,
  zeros,
} from "#halfbyte/index.js";

test("an output that shares bytes with another operand is refused by name, and one beside it is not", () => {
  const refused = (run: () => unknown, words: string): void => {
    expect(run).toThrow(ArgumentError);
    expect(run).toThrow(`expected memory apart from ${words}`);
  };
  const all = zeros([4096]);
  const A = all.slice(0, 1024);
  refused(() => quantize4bit(A, { absmax: all.slice(1000, 1016) }), "A, received a tensor that shares bytes with A");
  refused(() => quantizeBlockwise(A, { blocksize: 64, absmax: all.slice(1023, 1039) }), "A");
  quantize4bit(A, { absmax: all.slice(1024, 1040) });
  const storage = zeros([256], { dtype: "f32" });
  refused(
    () => quantize4bit(A, { quantStorage: "f32", out: storage.slice(0, 128), absmax: storage.slice(127, 143) }),
    "out",
  );

  const halves = zeros([4096], { dtype: "bf16" });
  const [packed, state] = quantize4bit(halves.slice(0, 2048), { quantStorage: "bf16", out: halves.slice(2048, 2560) });
  refused(() => dequantize4bit(packed, state, { out: halves.slice(1024, 3072) }), "A");
  dequantize4bit(packed, state, { out: halves.slice(0, 2048) });
  const scales = zeros([64]);
  refused(
    () =>
      dequantizeBlockwise(zeros([64], { dtype: "u8" }), undefined, {
        absmax: scales.slice(0, 1),
        blocksize: 64,
        out: scales,
      }),
    "absmax",
  );
  refused(
    () => int8VectorwiseDequant(zeros([64, 1], { dtype: "i8" }), scales, { out: scales.reshape([64, 1]) }),
    "stats",
  );
});
