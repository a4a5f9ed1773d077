/**
 * Inputs for golden vectors: seeded, and the same bytes on every machine. Random numbers are integer arithmetic, and what
 * becomes a float uses additions and powers of two only, so nothing depends on a math library.
 */
import type { FloatDType } from "../core/dtype.js";
import { FP4_THRESHOLDS, FP4_VALUES, NF4_THRESHOLDS, NF4_VALUES } from "../quant/codebooks.js";
import { f32Step } from "./float-bits.js";

/** A generator of 32-bit words: "small fast counting", three words of state and a counter. */
export class Random {
  private readonly state: Uint32Array;

  /**
   * @param seed a safe integer, not negative
   * @param stream any text: each gives numbers of its own
   */
  constructor(seed: number, stream: string) {
    let hash = 0x811c9dc5; // FNV-1a
    for (let i = 0; i < stream.length; i++) hash = Math.imul(hash ^ stream.charCodeAt(i), 0x01000193);
    this.state = Uint32Array.of(seed % 2 ** 32, Math.floor(seed / 2 ** 32), hash, 1);
    for (let i = 0; i < 16; i++) this.next();
  }

  next(): number {
    const [a, b, c, counter] = this.state;
    const sum = (a + b + counter) >>> 0;
    this.state[0] = b ^ (b >>> 9);
    this.state[1] = c + (c << 3);
    this.state[2] = ((c << 21) | (c >>> 11)) + sum;
    this.state[3] = counter + 1;
    return sum;
  }

  /** About normally distributed, standard deviation 1, at most 6: the sum of twelve 16-bit integers, exact in float64. */
  normal(): number {
    let sum = 0;
    for (let i = 0; i < 6; i++) {
      const word = this.next();
      sum += (word & 0xffff) + (word >>> 16);
    }
    return (sum - 12 * 32767.5) / 65536;
  }

  sign(): number {
    return this.next() & 1 ? -1 : 1;
  }
}

/** Elements of an input: more than one block of every size, the last one not full, and an odd number. */
const LENGTH = 4609;
/** Elements of a section of the edge input. */
const SECTION = 64;
/** The shortest block size: each stretch of this length in `points` starts with a value of magnitude 1. */
const STRETCH = 32;
/** Heavy tails reach 2^10 standard deviations: float16 still holds them. */
const HEAVIEST = 10;

export const INPUT_KINDS = ["normal", "heavy", "edge", "points"] as const;
export type InputKind = (typeof INPUT_KINDS)[number];

/**
 * The float32 values of an input; rounding to the operand's dtype is the caller's.
 * - normal: standard normal, nearly
 * - heavy: the same, scaled by 2^k with probability 2^-(k+1)
 * - edge: one section of 64 elements each of the things that go wrong (see SECTIONS), among normal values
 * - points: every code and every decision boundary, and their neighbours, in blocks whose absmax is 1
 * @param codebooks those of 256 values whose points are wanted
 */
export function makeInput(
  kind: InputKind,
  dtype: FloatDType,
  random: Random,
  codebooks: readonly Float32Array[],
): Float32Array<ArrayBuffer> {
  switch (kind) {
    case "normal":
      return Float32Array.from({ length: LENGTH }, () => random.normal());
    case "heavy":
      return Float32Array.from(
        { length: LENGTH },
        () => random.normal() * 2 ** Math.min(Math.clz32(random.next()), HEAVIEST),
      );
    case "edge":
      return edge(dtype, random);
    case "points":
      return points(random, codebooks);
  }
}

/** Value of element i of a section. */
type Section = (i: number, random: Random) => number;

const SECTIONS: readonly Section[] = [
  // Zero blocks, of either sign.
  (i) => (i % 3 === 0 ? -0 : 0),
  // Constant blocks.
  () => 1.5,
  () => -2.25,
  // Only the outermost codes.
  (_, random) => random.sign(),
  // One value among zeros.
  (i) => (i === SECTION - 1 ? -3 : 0),
  // Tiny values; denormals of float16.
  (_, random) => random.normal() * 2 ** -100,
  (_, random) => random.normal() * 2 ** -20,
  // Denormals of float32 alone: zero blocks. Random, and the very smallest.
  (_, random) => random.normal() * 2 ** -130,
  (i, random) => random.sign() * i * 2 ** -149,
  // Blocks whose absmax is the smallest normal number, or not far above it: most elements are denormals.
  (i, random) => random.sign() * (i % STRETCH === 0 ? 2 ** -126 : i * 2 ** -132),
  (_, random) => random.normal() * 2 ** -125,
  // Every power of two down to the smallest.
  (i, random) => random.sign() * 2 ** (-2 * i),
];
/** Scale of the large values: not far below the largest of the dtype. */
const LARGE: Readonly<Record<FloatDType, number>> = { f32: 2 ** 120, bf16: 2 ** 120, f16: 2 ** 12 };

function edge(dtype: FloatDType, random: Random): Float32Array<ArrayBuffer> {
  const values = Float32Array.from({ length: LENGTH }, () => random.normal());
  const put = (section: Section, at: number): void => {
    for (let i = 0; i < SECTION; i++) values[at + i] = section(i, random);
  };
  SECTIONS.forEach((section, k) => {
    put(section, k * SECTION);
  });
  // At the end, where they spoil one block of every size only.
  put(() => random.normal() * LARGE[dtype], LENGTH - 1 - SECTION);
  return values;
}

function points(random: Random, codebooks: readonly Float32Array[]): Float32Array<ArrayBuffer> {
  const wanted = new Set<number>();
  const add = (value: number): void => {
    for (const v of [value, f32Step(value, -1), f32Step(value, 1)]) if (Math.abs(v) <= 1) wanted.add(v);
  };
  for (const value of [...NF4_VALUES, ...NF4_THRESHOLDS, ...FP4_VALUES]) add(value);
  for (const value of FP4_THRESHOLDS) {
    add(value);
    add(-value);
  }
  for (const code of codebooks) {
    code.forEach((value, i) => {
      add(value);
      if (i > 0) add(Math.fround(Math.fround(value + code[i - 1]!) * 0.5));
    });
  }
  const values: number[] = [];
  for (const value of wanted) {
    if (values.length % STRETCH === 0) values.push(random.sign());
    values.push(value);
  }
  if (values.length % 2 === 0) values.push(random.sign());
  return Float32Array.from(values);
}
