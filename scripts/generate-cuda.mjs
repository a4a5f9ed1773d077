/** What csrc/kernels includes from csrc/kernels/generated: operand structs and constants, from the sources in dist. */
import { GEOMETRY } from "../dist/backend/cuda/kernels.js";
import { cudaLayout } from "../dist/backend/cuda/layout.js";
import { DTYPE_ID } from "../dist/core/dtype.js";
import {
  INT8_INVERSE,
  INT8_TINY,
  KERNEL_NAMES,
  KERNELS,
  QUANT_TYPE_ID,
  SUM_CHUNK,
  SUM_LANES,
} from "../dist/core/kernels.js";
import { FP4_RANKS, FP4_THRESHOLDS, FP4_VALUES, NF4_THRESHOLDS, NF4_VALUES } from "../dist/quant/codebooks.js";
import { SEARCH_HEADER, SEARCH_SHIFT } from "../dist/quant/search-table.js";
import { isWord, OPTIMIZER_CONSTANTS } from "./optimizer-constants.mjs";

const C_TYPE = { in: "const void*", out: "void*", size: "unsigned long long", u32: "unsigned", f32: "float" };

// NVRTC has no offsetof; nvcc checks the same header.
const OFFSET_IS = [
  "#ifdef __CUDACC_RTC__",
  '#define OFFSET_IS(type, field, at) static_assert(true, "")',
  "#else",
  '#define OFFSET_IS(type, field, at) static_assert(__builtin_offsetof(type, field) == at, "")',
  "#endif",
].join("\n");

export function cudaOperands() {
  const structs = KERNEL_NAMES.map((kernel) => {
    const { offsets, fault, bytes } = cudaLayout(kernel);
    const name = kernel[0].toUpperCase() + kernel.slice(1);
    const fields = Object.entries(KERNELS[kernel]).map(([field, type]) => [field, C_TYPE[type], offsets[field]]);
    if (fault) {
      fields.push(["faultWord", "unsigned long long*", fault.word], ["faultKey", "unsigned", fault.key]);
    }
    const checks = fields.map(([field, , at]) => `OFFSET_IS(${name}, ${field}, ${at});`);
    return [
      `struct ${name} {`,
      ...fields.map(([field, type]) => `  ${type} ${field};`),
      "};",
      ...checks,
      `static_assert(sizeof(${name}) == ${bytes}, "");`,
    ].join("\n");
  });
  return `#pragma once\n\n${OFFSET_IS}\n\n${structs.join("\n\n")}\n`;
}

/** A float32 in C that is read back exactly. */
function float(value) {
  const text = Object.is(value, -0) ? "-0.0" : String(value);
  return `${/[.e]/.test(text) ? text : `${text}.0`}f`;
}

const array = (type, name, values) => `__constant__ const ${type} ${name}[${values.length}] = {${values.join(", ")}};`;
const u32 = (name, value) => `constexpr unsigned ${name} = ${value};`;

/**
 * A scaled value's bin is floor(rint(4 * (s * scale + shift)) / 4), 0 to 31, so that no bin holds more than one threshold:
 * adding 2^21 in float32 leaves that sum, in quarters, in the low bits.
 */
const KEYS = { NF4: { scale: 15, shift: 16 }, FP4: { scale: 31, shift: 0 } };

/** Half to even. */
export function rint(x) {
  const floor = Math.floor(x);
  const rest = x - floor;
  return rest < 0.5 || (rest === 0.5 && floor % 2 === 0) ? floor : floor + 1;
}

/** What the excess over a threshold is multiplied by, then saturated, to give 0 or 1: the least excess makes more than 1. */
const EXCESS = 2 ** 40;

/** By bin: its threshold (2, which nothing scaled exceeds, where there is none) times -EXCESS, and how many thresholds lie below the bin. */
function bins(name, thresholds) {
  const { scale, shift } = KEYS[name];
  const keys = Array.from(thresholds, (t) => Math.floor(rint(4 * (t * scale + shift)) / 4));
  if (new Set(keys).size !== keys.length || keys.some((k) => k < 0 || k > 31)) throw new Error(`${name}: bins`);
  const least = Math.min(...Array.from(thresholds, (t) => 2 ** (Math.floor(Math.log2(Math.abs(t))) - 24)));
  if (least * EXCESS < 1) throw new Error(`${name}: a value may exceed a threshold by ${least}`);
  const all = Array.from({ length: 32 }, (_, bin) => bin);
  return [
    `constexpr float ${name}_KEY_SCALE = ${float(scale)};`,
    `constexpr float ${name}_KEY_SHIFT = ${float(shift)};`,
    array(
      "float",
      `${name}_BIN_THRESHOLD`,
      all.map((bin) => float(-EXCESS * (keys.includes(bin) ? thresholds[keys.indexOf(bin)] : 2))),
    ),
    array(
      "float",
      `${name}_BIN_RANK`,
      all.map((bin) => float(keys.filter((k) => k < bin).length)),
    ),
  ];
}

/** x with `bits` significant bits, nearest even. */
function significant(x, bits) {
  if (x === 0) return 0;
  const unit = 2 ** (Math.floor(Math.log2(Math.abs(x))) - bits + 1);
  return rint(x / unit) * unit;
}

/**
 * A 4-bit type's values for products of which a block's scale is applied to the sum: all times the factor from (0.5, 1] for
 * which they are closest to what a 16-bit type with `bits` significant bits holds, and what takes the factor off again.
 */
function unscaled(name, values, bits) {
  const STEPS = 50_000;
  let best = { error: Number.POSITIVE_INFINITY };
  for (let step = 1; step <= STEPS; step++) {
    const codes = Array.from(values, (v) => significant(v * (0.5 + (0.5 * step) / STEPS), bits));
    const dot = codes.reduce((sum, c, i) => sum + c * values[i], 0);
    const factor = dot / codes.reduce((sum, c) => sum + c * c, 0);
    const error = codes.reduce((sum, c, i) => sum + (c * factor - values[i]) ** 2, 0);
    if (error < best.error) best = { error, codes, factor: Math.fround(factor) };
  }
  return [
    array("float", `${name}_CODES`, best.codes.map(float)),
    `constexpr float ${name}_FACTOR = ${float(best.factor)};`,
  ];
}

export function cudaConstants() {
  const lines = [
    "#pragma once",
    "",
    "// Element types",
    ...Object.entries(DTYPE_ID).map(([dtype, id]) => u32(`DTYPE_${dtype.toUpperCase()}`, id)),
    "",
    "// 4-bit types",
    ...Object.entries(QUANT_TYPE_ID).map(([type, id]) => u32(`QUANT_${type.toUpperCase()}`, id)),
    array("float", "NF4_VALUES", Array.from(NF4_VALUES, float)),
    array("float", "NF4_THRESHOLDS", Array.from(NF4_THRESHOLDS, float)),
    u32("NF4_PAD", NF4_VALUES.indexOf(0)),
    array("float", "FP4_VALUES", Array.from(FP4_VALUES, float)),
    array("float", "FP4_THRESHOLDS", Array.from(FP4_THRESHOLDS, float)),
    `constexpr unsigned FP4_RANKS[8] = {${FP4_RANKS.join(", ")}};`,
    u32("FP4_PAD", FP4_RANKS[0]),
    ...unscaled("NF4_BF16", NF4_VALUES, 8),
    ...unscaled("NF4_F16", NF4_VALUES, 11),
    ...unscaled("FP4_BF16", FP4_VALUES, 8),
    ...unscaled("FP4_F16", FP4_VALUES, 11),
    `constexpr float BIN_EXCESS = ${float(EXCESS)};`,
    ...bins("NF4", NF4_THRESHOLDS),
    ...bins("FP4", FP4_THRESHOLDS),
    "",
    "// 8-bit search, src/quant/search-table.ts",
    u32("SEARCH_SHIFT", SEARCH_SHIFT),
    u32("SEARCH_HEADER", SEARCH_HEADER),
    "",
    "/* Below this absmax, x and absmax are both taken times 2^64, so that 127 / absmax does not overflow. */",
    `constexpr float INT8_TINY = ${float(INT8_TINY)};`,
    `constexpr float INT8_INVERSE = ${float(INT8_INVERSE)};`,
    "",
    "// Geometry, src/backend/cuda/kernels.ts",
    ...Object.entries(GEOMETRY).map(([name, value]) => u32(name, value)),
    "",
    "// Summation tree",
    u32("SUM_CHUNK", SUM_CHUNK),
    u32("SUM_LANES", SUM_LANES),
    "",
    "// Optimizers, src/core/optimizers.ts",
    ...OPTIMIZER_CONSTANTS.map(([name, value]) =>
      isWord(value) ? u32(name, value) : `constexpr float ${name} = ${float(Math.fround(value))};`,
    ),
  ];
  return lines.join("\n") + "\n";
}
