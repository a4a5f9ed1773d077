/** The check of `optimizer` cases: steps from states that golden recorded, each judged by itself. Rules: docs/golden.md. */
import { DTYPE_BYTES, FLOAT_DTYPES, type FloatDType } from "../core/dtype.js";
import { OPTIMIZER_BLOCK, type OptimizerFamily } from "../core/optimizers.js";
import { ceilDiv } from "../core/shape.js";
import type { Tensor } from "../core/tensor.js";
import { zeros } from "../ops/create.js";
import {
  OPTIMIZER_NAMES,
  type OptimizerName,
  type OptimizerUpdateOptions,
  optimizerUpdate8bitBlockwise,
  optimizerUpdate32bit,
} from "../ops/optimizer.js";
import { Codebook } from "../quant/codebook.js";
import { searchCode } from "../quant/search-table.js";
import type { CaseRun } from "./case-run.js";
import type { GoldenCase, GoldenTensor } from "./cases.js";
import { f32Step, floatsOf } from "./float-bits.js";
import { type ModelState, modelStates, parameterBound } from "./optimizer-model.js";
import { blockwiseRule, type CodeRule, TIE_ULPS } from "./ties.js";

const PARTS = ["state1", "state2", "absmax1", "absmax2"] as const;
type Part = (typeof PARTS)[number];

/** Golden after one step. */
interface Recorded {
  readonly p: GoldenTensor<FloatDType>;
  readonly parts: Partial<Record<Part, GoldenTensor<"f32" | "u8">>>;
}
/** A parameter with its states on the device. */
type Live = { readonly p: Tensor } & Partial<Record<Part, Tensor>>;

/** What all steps of a case share. */
interface Setting {
  readonly name: OptimizerName;
  readonly family: OptimizerFamily;
  readonly bits: 8 | 32;
  readonly dtype: FloatDType;
  readonly n: number;
  readonly twoStates: boolean;
}

/** What 8-bit RMSprop and Adagrad of upstream do with weight decay: it moves the state, but not the gradient that is applied. */
const RAW_GRADIENT =
  "8-bit RMSprop and Adagrad with weight decay: golden's parameters move by the gradient without decay";

/**
 * Every recorded step whose state before is known (zeros, or recorded) from just that state, within bounds; and all steps in a
 * row from the beginning, of which the report says how far they drift.
 */
export async function checkOptimizer(run: CaseRun): Promise<void> {
  const { case_ } = run;
  const name = case_.choice("name", Object.keys(OPTIMIZER_NAMES) as OptimizerName[]);
  const family = OPTIMIZER_NAMES[name];
  const bits = case_.number("bits") === 8 ? 8 : 32;
  const p0 = await case_.operand("p0", FLOAT_DTYPES);
  const twoStates = family === "adam" || family === "ademamix";
  const setting: Setting = { name, family, bits, dtype: p0.dtype, n: case_.number("n"), twoStates };

  const beginning = (): Live => ({ p: run.upload(p0), ...zeroStates(run, setting) });
  const chain = beginning();
  let before: Recorded | undefined = { p: p0, parts: {} };
  let last: Recorded | undefined;
  let steps = 0;
  for (; case_.has(["steps", `${steps}`]); steps++) {
    const at = ["steps", `${steps}`];
    if (case_.number([...at, "step"]) !== steps + 1) case_.fail([...at, "step"], `is not ${steps + 1}`);
    const grad = await case_.tensor([...at, "grad"], FLOAT_DTYPES);
    const options = optionsOf(case_, steps + 1);
    const g = run.upload(grad);
    step(setting, g, chain, options);
    const recorded: Recorded | undefined = case_.has([...at, "p"]) ? await record(case_, at, setting) : undefined;
    if (before && recorded) {
      const live: Live = steps === 0 ? beginning() : uploadRecorded(run, before);
      step(setting, g, live, options);
      await judge(run, setting, options, { before, after: recorded, grad, live });
    }
    before = recorded;
    last = recorded ?? last;
  }
  if (steps === 0) case_.fail("steps", "has none");
  if (before && last === before && steps > 1) await measureDrift(run, setting, p0, before, chain, steps);
}

function zeroStates(run: CaseRun, { family, bits, n, twoStates }: Setting): Omit<Live, "p"> {
  const rows = family === "ademamix" ? [2] : [];
  const make = (shape: readonly number[], dtype: "f32" | "u8"): Tensor =>
    run.own(zeros(shape, { dtype, device: run.device }));
  const dtype = bits === 8 ? "u8" : "f32";
  const blocks = ceilDiv(n, OPTIMIZER_BLOCK);
  return {
    state1: make([...rows, n], dtype),
    ...(twoStates && { state2: make([n], dtype) }),
    ...(bits === 8 && { absmax1: make([...rows, blocks], "f32") }),
    ...(bits === 8 && twoStates && { absmax2: make([blocks], "f32") }),
  };
}

function uploadRecorded(run: CaseRun, { p, parts }: Recorded): Live {
  const live: Partial<Record<Part, Tensor>> = {};
  for (const part of PARTS) if (parts[part]) live[part] = run.upload(parts[part]);
  return { p: run.upload(p), ...live };
}

async function record(
  case_: GoldenCase,
  at: readonly string[],
  { bits, dtype, twoStates }: Setting,
): Promise<Recorded> {
  const parts: Partial<Record<Part, GoldenTensor<"f32" | "u8">>> = {};
  for (const part of PARTS) {
    const scale = part.startsWith("absmax");
    if ((scale && bits === 32) || (part.endsWith("2") && !twoStates)) continue;
    parts[part] = await case_.tensor([...at, part], [bits === 8 && !scale ? "u8" : "f32"]);
  }
  return { p: await case_.tensor([...at, "p"], [dtype]), parts };
}

/** The options of a step; AdEMAMix's schedules as upstream's optimizer computes them (docs/numerics.md). */
function optionsOf(case_: GoldenCase, step: number): Required<OptimizerUpdateOptions> {
  const hyper = (key: string): number => case_.number(["hyper", key]);
  const some = (...path: string[]): number => case_.numberOrNull(["hyper", ...path]) ?? 0;
  const [beta1, beta2] = [some("betas", "0"), some("betas", "1")];
  let [beta3, alpha] = [some("betas", "2"), some("alpha")];
  const [tAlpha, tBeta3] = [some("t_alpha"), some("t_beta3")];
  if (tAlpha > 0) alpha = Math.min((step * alpha) / tAlpha, alpha);
  if (tBeta3 > 0) {
    const [ln1, ln3] = [Math.log(beta1), Math.log(beta3)];
    const done = step / tBeta3;
    beta3 = Math.min(Math.exp((ln1 * ln3) / ((1 - done) * ln3 + done * ln1)), beta3);
  }
  return {
    ...{ step, beta1, beta2, beta3, alpha },
    lr: hyper("lr"),
    eps: hyper("eps"),
    weightDecay: hyper("weight_decay"),
    gnormScale: 1,
    maxUnorm: some("max_unorm"),
    skipZeros: case_.flag(["hyper", "skip_zeros"]),
    allowNonFinite: false,
  };
}

function step({ name, bits, twoStates }: Setting, g: Tensor, live: Live, options: OptimizerUpdateOptions): void {
  const { p, state1, absmax1 } = live;
  const [state2, absmax2] = twoStates ? [live.state2!, live.absmax2] : [null, null];
  if (bits === 32) optimizerUpdate32bit(name, g, p, state1!, state2, options);
  else optimizerUpdate8bitBlockwise(name, g, p, state1!, state2, absmax1!, absmax2 ?? null, options);
}

interface Judged {
  readonly before: Recorded;
  readonly after: Recorded;
  readonly grad: GoldenTensor<FloatDType>;
  /** What was computed from `before`. */
  readonly live: Live;
}

async function judge(run: CaseRun, setting: Setting, options: Required<OptimizerUpdateOptions>, judged: Judged) {
  const { family, bits, dtype, n } = setting;
  const { before, after, live } = judged;
  const model = modelOf(setting, options, judged);
  const rows = family === "ademamix" ? 2 : 1;
  for (const [k, state] of model.entries()) {
    const first = k < rows;
    const [part, row] = first ? (["state1", k] as const) : (["state2", 0] as const);
    const got = slice(await floatsOrCodes(live[part]!), row, n);
    const golden = after.parts[part]!;
    const expected = slice(elementsOf(golden), row, n);
    if (bits === 32) run.close(golden, expected, got, (i) => state.bound[i]!);
    else await judgeCodes(run, setting, { judged, part, row, state, expected, got });
  }
  const p = floatsOf(dtype, await live.p.bytes());
  const old = floatsOf(dtype, before.p.bytes);
  const golden = floatsOf(dtype, after.p.bytes);
  if (bits === 8 && options.weightDecay > 0 && (family === "rmsprop" || family === "adagrad")) {
    judgeRawGradient(run, setting, options, { judged, state: model[0]!, p, old, golden });
  } else run.close(after.p, golden, p, (i) => parameterBound(family, dtype, old[i]!, golden[i]!));
}

/** The new states in float64, from golden's old ones. */
function modelOf(setting: Setting, options: Required<OptimizerUpdateOptions>, { before, grad }: Judged): ModelState[] {
  const { family, bits, dtype, n, twoStates } = setting;
  const f32 = Math.fround;
  const { lr, beta1, beta2, beta3, eps, weightDecay } = options;
  const rounded = { lr: f32(lr), beta1: f32(beta1), beta2: f32(beta2), beta3: f32(beta3), eps: f32(eps) };
  const first = family === "momentum" && options.step === 1;
  const old: Float32Array[] = [];
  for (let k = 0; k < (family === "ademamix" ? 2 : 1) + (twoStates ? 1 : 0); k++) {
    const second = twoStates && k === (family === "ademamix" ? 2 : 1);
    old.push(decoded(before, second ? "state2" : "state1", second ? 0 : k, n, bits));
  }
  const p = floatsOf(dtype, before.p.bytes);
  return modelStates(
    { family, ...rounded, weightDecay: f32(weightDecay), first },
    p,
    floatsOf(grad.dtype, grad.bytes),
    old,
  );
}

interface JudgedCodes {
  readonly judged: Judged;
  readonly part: "state1" | "state2";
  readonly row: number;
  readonly state: ModelState;
  readonly expected: ArrayLike<number>;
  readonly got: ArrayLike<number>;
}

/** Scales within the bound of the element they come from; codes equal, or both right for a value within the state's bound. */
async function judgeCodes(run: CaseRun, { n }: Setting, { judged, part, row, state, expected, got }: JudgedCodes) {
  const { after, live } = judged;
  const scales = part === "state1" ? "absmax1" : "absmax2";
  const blocks = ceilDiv(n, OPTIMIZER_BLOCK);
  const golden = after.parts[scales]! as GoldenTensor<"f32">;
  const goldenScales = slice(floatsOf("f32", golden.bytes), row, blocks);
  const ownScales = slice(floatsOf("f32", await live[scales]!.bytes()), row, blocks);
  const widest = new Float64Array(blocks);
  for (let i = 0; i < n; i++) {
    const block = Math.floor(i / OPTIMIZER_BLOCK);
    widest[block] = Math.max(widest[block]!, state.bound[i]!);
  }
  run.close(golden, goldenScales, ownScales, (block) => widest[block]!);
  const rule = stateRule(part);
  const scale = (i: number): number => goldenScales[Math.floor(i / OPTIMIZER_BLOCK)]!;
  run.codes({
    golden: after.parts[part]!,
    shape: after.parts[part]!.shape,
    expected,
    got,
    rule,
    value: (i) => state.value[i]!,
    absmax: scale,
    count: n,
    allowed: (i) =>
      allowedBetween(rule, state.value[i]!, state.bound[i]!, scale(i), widest[Math.floor(i / OPTIMIZER_BLOCK)]!),
  });
}

/** The code of a scaled state: the signed map never gives a negative value the zero's code. */
function stateRule(part: "state1" | "state2"): CodeRule {
  const code = (part === "state1" ? Codebook.dynamic() : Codebook.dynamicUnsigned()).values;
  const rule = blockwiseRule(code);
  const decide = (s: number): number => {
    const nearest = searchCode(code, s);
    return part === "state1" && s < 0 && code[nearest] === 0 ? nearest - 1 : nearest;
  };
  return { ...rule, decide, flush: false };
}

/** Codes of all values within `bound` of `value` in a block with a scale that may be off by `scaleBound`. */
function allowedBetween(rule: CodeRule, value: number, bound: number, scale: number, scaleBound: number): Set<number> {
  if (!(scale > scaleBound)) return new Set();
  const extreme = (x: number, direction: 1 | -1): number => {
    const least = x * direction > 0 ? scale - scaleBound : scale + scaleBound;
    return rule.decide(f32Step(Math.fround(x / least), direction * (TIE_ULPS + 1)));
  };
  const [low, high] = [extreme(value - bound, -1), extreme(value + bound, 1)];
  return new Set(Array.from({ length: high - low + 1 }, (_, k) => low + k));
}

interface JudgedParameters {
  readonly judged: Judged;
  readonly state: ModelState;
  readonly p: Float32Array;
  readonly old: Float32Array;
  readonly golden: Float32Array;
}

/** Golden by the rule that it follows, and what was computed here by ours, both in float64. */
function judgeRawGradient(
  run: CaseRun,
  { family, dtype }: Setting,
  options: Required<OptimizerUpdateOptions>,
  { judged, state, p, old, golden }: JudgedParameters,
): void {
  run.differences.add(RAW_GRADIENT);
  const raw = floatsOf(judged.grad.dtype, judged.grad.bytes);
  const f32 = Math.fround;
  const sides = [
    ["golden by its own rule", golden, 0],
    ["by the rule of docs/numerics.md", p, f32(options.weightDecay)],
  ] as const;
  for (const [how, got, decay] of sides) {
    const expected = new Float64Array(old.length);
    const bound = new Float64Array(old.length);
    for (let i = 0; i < old.length; i++) {
      const v = state.value[i]!;
      const root = Math.sqrt(v) + f32(options.eps);
      const update = (f32(options.lr) * (raw[i]! + decay * old[i]!)) / root;
      expected[i] = old[i]! - update;
      // The root moves by half of what its operand may, the gradient by a rounding of its terms.
      const terms = 2 ** -23 * (Math.abs(raw[i]!) + Math.abs(decay * old[i]!));
      const moved = f32(options.lr) * (terms / root) + Math.abs(update) * (state.bound[i]! / (2 * v));
      bound[i] = parameterBound(family, dtype, old[i]!, expected[i]!) + moved;
    }
    run.close(judged.after.p, expected, got, (i) => bound[i]!, how);
  }
}

/** How far all steps in a row are from golden: of the parameter's movement, or of the state. */
async function measureDrift(
  run: CaseRun,
  setting: Setting,
  p0: GoldenTensor<FloatDType>,
  after: Recorded,
  chain: Live,
  steps: number,
): Promise<void> {
  const { dtype, bits, n } = setting;
  if (run.differences.size > 0) return;
  const from = floatsOf(dtype, p0.bytes);
  const golden = floatsOf(dtype, after.p.bytes);
  const own = floatsOf(dtype, await chain.p.bytes());
  const what = `${steps} steps with ${bits}-bit states`;
  run.drift.push({ what: `${what}: parameters`, off: distance(own, golden) / distance(golden, from) });
  const bytes = async (part: Part): Promise<GoldenTensor<"f32" | "u8">> => {
    const like = after.parts[part]!;
    return { ...like, bytes: await chain[part]!.bytes() };
  };
  const parts: Recorded["parts"] = {};
  for (const part of PARTS) if (after.parts[part]) parts[part] = await bytes(part);
  for (const part of ["state1", "state2"] as const) {
    if (!after.parts[part]) continue;
    const rows = after.parts[part].bytes.length / DTYPE_BYTES[after.parts[part].dtype] / n;
    for (let row = 0; row < rows; row++) {
      const [theirs, ours] = [decoded(after, part, row, n, bits), decoded({ ...after, parts }, part, row, n, bits)];
      run.drift.push({ what: `${what}: states`, off: distance(ours, theirs) / distance(theirs, new Float32Array(n)) });
    }
  }
}

/** The Euclidean norm of a difference. */
function distance(a: Float32Array, b: Float32Array): number {
  return Math.sqrt(a.reduce((sum, x, i) => sum + (x - b[i]!) ** 2, 0));
}

/** A state's values; zeros where nothing was recorded. */
function decoded({ parts }: Recorded, part: "state1" | "state2", row: number, n: number, bits: 8 | 32): Float32Array {
  const golden = parts[part];
  if (!golden) return new Float32Array(n);
  if (bits === 32) return slice(floatsOf("f32", golden.bytes), row, n);
  const blocks = ceilDiv(n, OPTIMIZER_BLOCK);
  const scales = slice(floatsOf("f32", parts[part === "state1" ? "absmax1" : "absmax2"]!.bytes), row, blocks);
  const code = (part === "state1" ? Codebook.dynamic() : Codebook.dynamicUnsigned()).values;
  const codes = slice(golden.bytes, row, n);
  return Float32Array.from(codes, (q, i) => code[q]! * scales[Math.floor(i / OPTIMIZER_BLOCK)]!);
}

function slice<T extends Float32Array | Uint8Array>(all: T, row: number, n: number): T {
  return all.subarray(row * n, (row + 1) * n) as T;
}

function elementsOf({ dtype, bytes }: GoldenTensor<"f32" | "u8">): Float32Array | Uint8Array {
  return dtype === "f32" ? floatsOf("f32", bytes) : bytes;
}

async function floatsOrCodes(tensor: Tensor): Promise<Float32Array | Uint8Array> {
  const bytes = await tensor.bytes();
  return tensor.dtype === "f32" ? floatsOf("f32", bytes) : bytes;
}
