/** The checks of products: `gemm_4bit` and `int8`. Rules: docs/golden.md. */
import { FLOAT_DTYPES } from "../core/dtype.js";
import { Tensor } from "../core/tensor.js";
import { int8LinearMatmul, int8MixedScaledMm, int8MmDequant, int8ScaledMm, matmul8bit } from "../ops/igemm.js";
import { int8DoubleQuant, int8VectorwiseQuant, OutlierColumns } from "../ops/int8.js";
import { gemv4bit, matmul4bit } from "../ops/matmul4bit.js";
import { QuantState } from "../quant/state.js";
import { QUANT_TYPES } from "../quant/types.js";
import { type CaseRun, scaledBy } from "./case-run.js";
import type { Field, GoldenTensor } from "./cases.js";
import { floatsOf } from "./float-bits.js";
import { INT8_RULE } from "./ties.js";

/** Products of golden's own codes, with and without bias, by their error against the float64 product. */
export async function checkGemm4bit(run: CaseRun): Promise<void> {
  const { case_ } = run;
  const A = await case_.operand("A", FLOAT_DTYPES);
  const packed = await case_.tensor("packed", ["u8"]);
  const bias = await case_.tensor("bias", [A.dtype]);
  const out = await case_.tensor("out", [A.dtype]);
  const outBias = await case_.tensor("out_bias", [A.dtype]);
  const reference = floatsOf("f32", (await case_.tensor("ref64", ["f32"])).bytes);
  const stated = case_.number("rel_err");

  const [x, weight, state] = [run.upload(A), run.upload(packed), await goldenState(run)];
  await run.accurate(out, run.own(matmul4bit(x, weight, state)), reference, { stated });
  if (A.shape[0] === 1) {
    await run.accurate(out, run.own(gemv4bit(x, weight, state)), reference, { stated, how: "gemv4bit" });
  }
  const added = floatsOf(A.dtype, bias.bytes);
  const biased = Float64Array.from(reference, (value, i) => value + added[i % added.length]!);
  await run.accurate(outBias, run.own(matmul4bit(x, weight, state, { bias: run.upload(bias) })), biased);
}

/** The state of a case, from the tensors of its serialized form. */
async function goldenState(run: CaseRun): Promise<QuantState> {
  const { case_ } = run;
  const quantType = case_.choice("quant_type", QUANT_TYPES);
  const nested = case_.flag("nested");
  const upload = async (key: string, dtype: "f32" | "u8"): Promise<readonly [string, Tensor]> => [
    key,
    run.upload(await case_.tensor(["state", key], [dtype])),
  ];
  const dict = Object.fromEntries([
    await upload("absmax", nested ? "u8" : "f32"),
    await upload("quant_map", "f32"),
    await upload(`quant_state.bitsandbytes__${quantType}`, "u8"),
    ...(nested ? [await upload("nested_absmax", "f32"), await upload("nested_quant_map", "f32")] : []),
  ]);
  const state = run.own(await QuantState.fromDict(dict));
  if (state.blocksize !== case_.number("blocksize")) {
    case_.fail("blocksize", `is ${case_.number("blocksize")}, but the state says ${state.blocksize}`);
  }
  return state;
}

/**
 * Codes and scales of weights and activations, and every product, each from golden's own codes. A case may leave out the
 * activations, or what is computed from them.
 */
export async function checkInt8(run: CaseRun): Promise<void> {
  const { case_ } = run;
  const threshold = case_.number("threshold");
  const W = await case_.tensor("W", ["f16"]);
  const [CB, SCB] = [await case_.tensor("CB", ["i8"]), await case_.tensor("SCB", ["f32"])];
  const [codes, scales] = run.own(int8VectorwiseQuant(run.upload(W)));
  await compareRows(run, W, [CB, codes], [SCB, scales]);
  if (case_.has("A")) await checkActivations(run, threshold, run.upload(CB), run.upload(SCB));
}

async function checkActivations(run: CaseRun, threshold: number, CB: Tensor, SCB: Tensor): Promise<void> {
  const { case_ } = run;
  const A = await case_.tensor("A", ["f16"]);
  const [goldenCodes, goldenScales] = [await case_.tensor("CA", ["i8"]), await case_.tensor("SCA", ["f32"])];
  const [x, CA, SCA] = [run.upload(A), run.upload(goldenCodes), run.upload(goldenScales)];
  const [codes, scales, columns] = run.own(int8VectorwiseQuant(x, { threshold }));
  await compareRows(run, A, [goldenCodes, codes], [goldenScales, scales]);
  const outlierCols = await compareColumns(run, columns);
  if (case_.has("double")) await compareDouble(run, A, x, threshold);

  const bias = case_.has("bias") ? run.upload(await case_.tensor("bias", ["f16"])) : undefined;
  if (case_.has("C32")) {
    const C32 = await case_.tensor("C32", ["i32"]);
    await run.equal(C32, run.own(int8LinearMatmul(CA, CB)));
    if (case_.has("dequant_bias")) {
      const dequant = await case_.tensor("dequant_bias", ["f16"]);
      await run.equal(dequant, run.own(int8MmDequant(run.upload(C32), SCA, SCB, { bias })));
      await run.equal(dequant, run.own(int8ScaledMm(CA, CB, SCA, SCB, { bias })), "in one call");
    }
  }
  if (case_.has("matmul")) {
    const matmul = await case_.tensor("matmul", ["f16"]);
    const reference = floatsOf("f32", (await case_.tensor("ref64", ["f32"])).bytes);
    await run.accurate(matmul, run.own(matmul8bit(x, CB, SCB, { threshold, bias })), reference);
    const mixed = run.own(int8MixedScaledMm(x, CA, CB, SCA, SCB, { outlierCols, bias }));
    await run.accurate(matmul, mixed, reference, { how: "from the golden codes" });
  }
}

/** Golden's and the computed tensor. */
type Pair<D extends "i8" | "f32"> = readonly [golden: GoldenTensor<D>, computed: Tensor];

async function compareRows(
  run: CaseRun,
  input: GoldenTensor<"f16">,
  [goldenCodes, codes]: Pair<"i8">,
  [goldenScales, scales]: Pair<"f32">,
): Promise<void> {
  await run.equal(goldenScales, scales);
  run.codes({
    golden: goldenCodes,
    shape: codes.shape,
    expected: new Int8Array(goldenCodes.bytes.buffer),
    got: new Int8Array((await codes.bytes()).buffer),
    rule: INT8_RULE,
    ...scaledBy(floatsOf("f16", input.bytes), floatsOf("f32", goldenScales.bytes), input.shape.at(-1)!),
  });
}

/** @returns golden's columns, as an operand; null where there are none */
async function compareColumns(run: CaseRun, columns: OutlierColumns | null): Promise<OutlierColumns | null> {
  const field: Field = "outlier_cols";
  const found = columns && (await columns.indices());
  if (!run.case_.has(field)) {
    if (found && found.length > 0) run.fail({ field, name: null }, `is missing, computed ${found.length} columns`);
    return null;
  }
  const golden = await run.case_.tensor(field, ["i32"]);
  run.equalBytes(golden, found ? new Uint8Array(found.buffer) : new Uint8Array());
  if (!columns) return null;
  const { columns: all, count } = columns;
  const list = new Int32Array(golden.bytes.buffer);
  const padded = Int32Array.from({ length: all.size }, (_, i) => list[i] ?? -1);
  const upload = (like: Tensor<"i32">, values: Int32Array): Tensor<"i32"> =>
    Tensor.allocate(like.backend, "i32", like.shape).copyFrom(values);
  return run.own(new OutlierColumns(upload(all, padded), upload(count, Int32Array.of(list.length))));
}

async function compareDouble(run: CaseRun, A: GoldenTensor<"f16">, x: Tensor, threshold: number): Promise<void> {
  const part = async <D extends "i8" | "f32">(key: string, dtype: D): Promise<GoldenTensor<D>> =>
    run.case_.tensor(["double", key], [dtype]);
  const [row, rowStats] = [await part("row", "i8"), await part("row_stats", "f32")];
  const [byRow, byColumn, rowScales, columnScales] = run.own(int8DoubleQuant(x, { threshold }));
  await compareRows(run, A, [row, byRow], [rowStats, rowScales]);
  if (!run.case_.has(["double", "col"])) return;
  await run.equal(await part("col_stats", "f32"), columnScales);
  await run.equal(await part("col", "i8"), byColumn);
}
