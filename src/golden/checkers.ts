/** What is done with a case, by its `op`. Every op of the registry has a checker; a gap says why. */
import { FLOAT_DTYPES, type FloatDType } from "../core/dtype.js";
import type { Tensor } from "../core/tensor.js";
import { dequantizeBlockwise, nest, quantizeBlockwise } from "../ops/blockwise.js";
import { dequantize4bit, quantize4bit } from "../ops/fourbit.js";
import type { PRIMITIVES, PrimitiveName } from "../ops/registry.js";
import { Codebook } from "../quant/codebook.js";
import { createDynamicMap, get4bitType } from "../quant/codebooks.js";
import { QuantState } from "../quant/state.js";
import { formatQuantState } from "../quant/state-json.js";
import { NESTED_BLOCKSIZE, QUANT_TYPES } from "../quant/types.js";
import { type CaseRun, scaledBy } from "./case-run.js";
import type { GoldenTensor } from "./cases.js";
import { CODEBOOK_NAMES, CODEBOOKS } from "./codebooks.js";
import { floatsOf, ulpsApart, withoutSigns } from "./float-bits.js";
import { checkOptimizer } from "./optimizer-checkers.js";
import { checkGemm4bit, checkInt8 } from "./product-checkers.js";
import { blockwiseRule, type CodeRule, fourBitRule, TIE_ULPS } from "./ties.js";

/** Runs a case and notes what it finds. @throws CaseError, UnsupportedError (the case counts as not run) and what ops throw */
export type Checker = (run: CaseRun) => Promise<void>;

/** An op of golden files that this version cannot run. */
export interface Missing {
  readonly missing: string;
}

type RegistryOp = Extract<(typeof PRIMITIVES)[PrimitiveName]["golden"], string>;
type FileOp =
  | "quantize_4bit_nested"
  | "Linear4bit"
  | "Linear8bitLt"
  | "Embedding8bit"
  | "EmbeddingNF4"
  | "EmbeddingFP4";

const MODULES: Missing = { missing: "this version has no modules" };

const CHECKERS: Readonly<Record<RegistryOp | FileOp, Checker | Missing>> = {
  codebook: checkCodebook,
  quantize_4bit: checkQuantize4bit,
  quantize_blockwise: checkQuantizeBlockwise,
  quantize_4bit_nested: checkNested,
  int8: checkInt8,
  gemm_4bit: checkGemm4bit,
  optimizer: checkOptimizer,
  Linear4bit: MODULES,
  Linear8bitLt: MODULES,
  Embedding8bit: MODULES,
  EmbeddingNF4: MODULES,
  EmbeddingFP4: MODULES,
};

export function checkerOf(op: string): Checker | Missing {
  const table: Readonly<Record<string, Checker | Missing>> = CHECKERS;
  return (Object.hasOwn(table, op) && table[op]) || { missing: "unknown op" };
}

const OWN_CODES = "decoding the codes computed here";
const GOLDEN_CODES = "decoding the golden codes";

async function checkCodebook(run: CaseRun): Promise<void> {
  const code = await run.case_.tensor("code", ["f32"]);
  const name = run.case_.choice("name", CODEBOOK_NAMES);
  run.equalBytes(code, new Uint8Array(CODEBOOKS[name]().buffer));
}

async function checkQuantize4bit(run: CaseRun): Promise<void> {
  const { case_ } = run;
  const input = await case_.operand("input", FLOAT_DTYPES);
  const quantType = case_.choice("quant_type", QUANT_TYPES);
  const blocksize = case_.number("blocksize");
  const [goldenPacked, goldenAbsmax] = [await case_.tensor("packed", ["u8"]), await case_.tensor("absmax", ["f32"])];
  const dequant = case_.has("dequant") ? await case_.tensor("dequant", [input.dtype]) : undefined;

  const [packed, state] = run.own(quantize4bit(run.upload(input), { quantType, blocksize }));
  await run.equal(goldenAbsmax, state.absmax);
  const ties = await compareFourBit(run, input, goldenPacked, packed, goldenAbsmax, state);
  if (dequant) {
    const goldenState = new QuantState({ ...state, absmax: run.upload(goldenAbsmax) });
    await compareDecoded(run, dequant, ties, [run.upload(goldenPacked), goldenState], [packed, state]);
  }
}

async function checkQuantizeBlockwise(run: CaseRun): Promise<void> {
  const { case_ } = run;
  const signed = await case_.operand("input", FLOAT_DTYPES);
  const input = case_.flag("abs_input") ? { ...signed, bytes: withoutSigns(signed.dtype, signed.bytes) } : signed;
  const blocksize = case_.number("blocksize");
  const code = floatsOf("f32", (await case_.tensor("code", ["f32"])).bytes);
  const [goldenCodes, goldenAbsmax] = [await case_.tensor("q", ["u8"]), await case_.tensor("absmax", ["f32"])];
  const dequant = case_.has("dequant") ? await case_.tensor("dequant", [input.dtype]) : undefined;

  const [q, state] = run.own(quantizeBlockwise(run.upload(input), { code, blocksize }));
  await run.equal(goldenAbsmax, state.absmax);
  const rule = blockwiseRule(code);
  const got = await q.bytes();
  const ties = run.codes({
    golden: goldenCodes,
    shape: q.shape,
    expected: goldenCodes.bytes,
    got,
    rule,
    ...scaledBy(floatsOf(input.dtype, input.bytes), floatsOf("f32", goldenAbsmax.bytes), blocksize),
  });
  if (dequant) {
    const decode = (codes: Tensor, absmax: Tensor): Tensor =>
      run.own(dequantizeBlockwise(codes, undefined, { absmax, code, blocksize, dtype: input.dtype }));
    const golden = decode(run.upload(goldenCodes), run.upload(goldenAbsmax));
    // The same wrong elements need no second line.
    if (await run.equal(dequant, golden, GOLDEN_CODES)) {
      await run.equal(dequant, decode(q, state.absmax), OWN_CODES, ties);
    }
  }
}

/** The mean of the scales is accepted within TIE_ULPS, everything after it has to follow from golden's mean. */
async function checkNested(run: CaseRun): Promise<void> {
  const { case_ } = run;
  const input = await case_.operand("input", FLOAT_DTYPES);
  const quantType = case_.choice("quant_type", QUANT_TYPES);
  const blocksize = case_.number("blocksize");
  const goldenPacked = await case_.tensor("packed", ["u8"]);
  const goldenOffset = await case_.tensor("offset", ["f32"]);
  const dequant = await case_.tensor("dequant", [input.dtype]);
  const goldenAbsmax = await case_.tensor(["state", "absmax"], ["u8"]);
  const quantMap = await case_.tensor(["state", "quant_map"], ["f32"]);
  const nestedAbsmax = await case_.tensor(["state", "nested_absmax"], ["f32"]);
  const nestedQuantMap = await case_.tensor(["state", "nested_quant_map"], ["f32"]);
  const json = await case_.tensor(["state", `quant_state.bitsandbytes__${quantType}`], ["u8"]);

  const x = run.upload(input);
  const offset = run.upload(goldenOffset, []);
  const options = { quantType, blocksize };
  const [, whole] = run.own(quantize4bit(x, { ...options, compressStatistics: true }));
  await compareOffset(run, goldenOffset, whole.offset!);

  const [packed, plain] = run.own(quantize4bit(x, options));
  const scales = await plain.absmax.bytes();
  const nested = run.own(
    new QuantState({ ...plain, ...nest(plain.absmax as Tensor<"f32">, NESTED_BLOCKSIZE, offset) }),
  );
  const ties = await compareFourBit(run, input, goldenPacked, packed, { bytes: scales }, plain);

  await run.equal(nestedAbsmax, nested.state2!.absmax);
  const mean = floatsOf("f32", goldenOffset.bytes)[0]!;
  const rest = floatsOf("f32", scales).map((scale) => scale - mean);
  run.codes({
    golden: goldenAbsmax,
    shape: nested.absmax.shape,
    expected: goldenAbsmax.bytes,
    got: await nested.absmax.bytes(),
    rule: blockwiseRule(Codebook.dynamic().values),
    ...scaledBy(rest, floatsOf("f32", nestedAbsmax.bytes), NESTED_BLOCKSIZE),
  });
  run.equalBytes(quantMap, bytesOf(get4bitType(quantType)));
  run.equalBytes(nestedQuantMap, bytesOf(createDynamicMap()));
  const nestedMeta = { blocksize: NESTED_BLOCKSIZE, dtype: "f32", offset: mean } as const;
  const meta = { ...options, dtype: input.dtype, shape: input.shape, nested: nestedMeta };
  run.equalBytes(json, formatQuantState(meta));

  const state2 = new QuantState({ ...nested.state2!, absmax: run.upload(nestedAbsmax) });
  const goldenState = new QuantState({ ...nested, absmax: run.upload(goldenAbsmax), offset, state2 });
  await compareDecoded(run, dequant, ties, [run.upload(goldenPacked), goldenState], [packed, nested]);
}

/** Compares packed nibbles one by one, the pad of an odd length included. */
async function compareFourBit(
  run: CaseRun,
  input: GoldenTensor<FloatDType>,
  golden: GoldenTensor<"u8">,
  packed: Tensor,
  absmax: Pick<GoldenTensor, "bytes">,
  { quantType, blocksize }: QuantState,
): Promise<ReadonlySet<number>> {
  const rule: CodeRule = fourBitRule(quantType!);
  return run.codes({
    golden,
    shape: packed.shape,
    expected: nibbles(golden.bytes),
    got: nibbles(await packed.bytes()),
    rule,
    ...scaledBy(floatsOf(input.dtype, input.bytes), floatsOf("f32", absmax.bytes), blocksize),
  });
}

/** The codes of packed bytes, high nibble first. */
function nibbles(packed: Uint8Array): Uint8Array {
  const codes = new Uint8Array(2 * packed.length);
  packed.forEach((byte, i) => {
    codes[2 * i] = byte >> 4;
    codes[2 * i + 1] = byte & 15;
  });
  return codes;
}

/** Decodes golden's own codes, and those computed here, where they are not ties. */
async function compareDecoded(
  run: CaseRun,
  dequant: GoldenTensor,
  ties: ReadonlySet<number>,
  golden: readonly [Tensor, QuantState],
  own: readonly [Tensor, QuantState],
): Promise<void> {
  // The same wrong elements need no second line.
  if (await run.equal(dequant, run.own(dequantize4bit(...golden)), GOLDEN_CODES)) {
    await run.equal(dequant, run.own(dequantize4bit(...own)), OWN_CODES, ties);
  }
}

async function compareOffset(run: CaseRun, golden: GoldenTensor, offset: Tensor): Promise<void> {
  const bits = (bytes: Uint8Array): number => new DataView(bytes.buffer, bytes.byteOffset).getUint32(0, true);
  const got = await offset.bytes();
  const apart = ulpsApart("f32", bits(golden.bytes), bits(got));
  if (apart > TIE_ULPS) run.equalBytes(golden, got, `${apart} ulp apart, ${TIE_ULPS} are allowed`);
}

function bytesOf(values: Float32Array<ArrayBuffer>): Uint8Array {
  return new Uint8Array(values.buffer);
}
