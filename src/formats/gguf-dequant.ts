/**
 * Dequantization of ggml tensor types to float32, bit for bit what the Python package gguf 0.19 gives
 * (gguf.quants.dequantize); where a scale is infinite or NaN, NaN where that gives NaN.
 *
 * Every formula is one product of small integers and binary16 scales, and at most one sum. The products fit float32's
 * 24 bits and the sums a double's 53, so computing in doubles and rounding once, at the store into the Float32Array,
 * is the float32 arithmetic of the reference, whatever the order of its operations.
 */
import { ArgumentError, UnsupportedError } from "../core/errors.js";
import { GGML_TYPES, type GgmlType } from "./gguf-types.js";

/** Writes `blocks` blocks of `src` as float32 values to `dst`. */
type Decoder = (src: Uint8Array, dst: Float32Array, blocks: number) => void;

let halfValues: Float32Array | undefined;

/** The value of every binary16 pattern. */
function halfTable(): Float32Array {
  if (halfValues) return halfValues;
  halfValues = new Float32Array(65536);
  for (let bits = 0; bits < 65536; bits++) {
    const sign = bits & 0x8000 ? -1 : 1;
    const exponent = (bits >> 10) & 31;
    const fraction = bits & 1023;
    let magnitude: number;
    if (exponent === 0) magnitude = fraction * 2 ** -24;
    else if (exponent < 31) magnitude = (1024 + fraction) * 2 ** (exponent - 25);
    else magnitude = fraction === 0 ? Number.POSITIVE_INFINITY : Number.NaN;
    halfValues[bits] = sign * magnitude;
  }
  return halfValues;
}

const decodeF32: Decoder = (src, dst, blocks) => {
  new Uint8Array(dst.buffer, dst.byteOffset, 4 * blocks).set(src.subarray(0, 4 * blocks));
};

const decodeF16: Decoder = (src, dst, blocks) => {
  const half = halfTable();
  for (let i = 0; i < blocks; i++) dst[i] = half[src[2 * i]! | (src[2 * i + 1]! << 8)]!;
};

const decodeBF16: Decoder = (src, dst, blocks) => {
  const bits = new Uint32Array(dst.buffer, dst.byteOffset, blocks);
  for (let i = 0; i < blocks; i++) bits[i] = (src[2 * i]! << 16) | (src[2 * i + 1]! << 24);
};

const decodeQ4_0: Decoder = (src, dst, blocks) => {
  const half = halfTable();
  for (let b = 0, s = 0, o = 0; b < blocks; b++, s += 18, o += 32) {
    const d = half[src[s]! | (src[s + 1]! << 8)]!;
    for (let i = 0; i < 16; i++) {
      const pair = src[s + 2 + i]!;
      dst[o + i] = d * ((pair & 15) - 8);
      dst[o + 16 + i] = d * ((pair >> 4) - 8);
    }
  }
};

const decodeQ4_1: Decoder = (src, dst, blocks) => {
  const half = halfTable();
  for (let b = 0, s = 0, o = 0; b < blocks; b++, s += 20, o += 32) {
    const d = half[src[s]! | (src[s + 1]! << 8)]!;
    const m = half[src[s + 2]! | (src[s + 3]! << 8)]!;
    for (let i = 0; i < 16; i++) {
      const pair = src[s + 4 + i]!;
      dst[o + i] = d * (pair & 15) + m;
      dst[o + 16 + i] = d * (pair >> 4) + m;
    }
  }
};

// In the 5-bit types the fifth bits of elements 0..31 are the bits of one little-endian word.

const decodeQ5_0: Decoder = (src, dst, blocks) => {
  const half = halfTable();
  for (let b = 0, s = 0, o = 0; b < blocks; b++, s += 22, o += 32) {
    const d = half[src[s]! | (src[s + 1]! << 8)]!;
    const high = src[s + 2]! | (src[s + 3]! << 8) | (src[s + 4]! << 16) | (src[s + 5]! << 24);
    for (let i = 0; i < 16; i++) {
      const pair = src[s + 6 + i]!;
      dst[o + i] = d * (((pair & 15) | (((high >>> i) & 1) << 4)) - 16);
      dst[o + 16 + i] = d * (((pair >> 4) | (((high >>> (i + 16)) & 1) << 4)) - 16);
    }
  }
};

const decodeQ5_1: Decoder = (src, dst, blocks) => {
  const half = halfTable();
  for (let b = 0, s = 0, o = 0; b < blocks; b++, s += 24, o += 32) {
    const d = half[src[s]! | (src[s + 1]! << 8)]!;
    const m = half[src[s + 2]! | (src[s + 3]! << 8)]!;
    const high = src[s + 4]! | (src[s + 5]! << 8) | (src[s + 6]! << 16) | (src[s + 7]! << 24);
    for (let i = 0; i < 16; i++) {
      const pair = src[s + 8 + i]!;
      dst[o + i] = d * ((pair & 15) | (((high >>> i) & 1) << 4)) + m;
      dst[o + 16 + i] = d * ((pair >> 4) | (((high >>> (i + 16)) & 1) << 4)) + m;
    }
  }
};

const decodeQ8_0: Decoder = (src, dst, blocks) => {
  const half = halfTable();
  for (let b = 0, s = 0, o = 0; b < blocks; b++, s += 34, o += 32) {
    const d = half[src[s]! | (src[s + 1]! << 8)]!;
    for (let i = 0; i < 32; i++) dst[o + i] = ((src[s + 2 + i]! << 24) >> 24) * d;
  }
};

// The K types: superblocks of 256 elements in sub-blocks of 16 or 32, each with its own integer scale.

/** 16 scale bytes (low nibble scale, high nibble minimum), 64 bytes of 2-bit codes, d, dmin. */
const decodeQ2_K: Decoder = (src, dst, blocks) => {
  const half = halfTable();
  for (let b = 0, s = 0, o = 0; b < blocks; b++, s += 84, o += 256) {
    const d = half[src[s + 80]! | (src[s + 81]! << 8)]!;
    const dmin = half[src[s + 82]! | (src[s + 83]! << 8)]!;
    for (let sub = 0; sub < 16; sub++) {
      const scale = d * (src[s + sub]! & 15);
      const min = dmin * (src[s + sub]! >> 4);
      // Sub-blocks 2j and 2j+1 of each half are bits 2j of the same 32 bytes.
      const codes = s + 16 + (sub >> 3) * 32 + (sub & 1) * 16;
      const shift = sub & 6;
      const to = o + sub * 16;
      for (let i = 0; i < 16; i++) dst[to + i] = scale * ((src[codes + i]! >> shift) & 3) - min;
    }
  }
};

/** 32 bytes of third bits, 64 bytes of 2-bit codes, 16 six-bit scales in 12 bytes, d. A clear third bit subtracts 4. */
const decodeQ3_K: Decoder = (src, dst, blocks) => {
  const half = halfTable();
  for (let b = 0, s = 0, o = 0; b < blocks; b++, s += 110, o += 256) {
    const d = half[src[s + 108]! | (src[s + 109]! << 8)]!;
    for (let sub = 0; sub < 16; sub++) {
      const low = (src[s + 96 + (sub & 7)]! >> ((sub >> 3) * 4)) & 15;
      const top = (src[s + 104 + (sub & 3)]! >> ((sub >> 2) * 2)) & 3;
      const scale = d * ((low | (top << 4)) - 32);
      const codes = s + 32 + (sub >> 3) * 32 + (sub & 1) * 16;
      const thirds = s + (sub & 1) * 16;
      const shift = sub & 6;
      const bit = sub >> 1;
      const to = o + sub * 16;
      for (let i = 0; i < 16; i++) {
        const third = (src[thirds + i]! >> bit) & 1;
        dst[to + i] = scale * (((src[codes + i]! >> shift) & 3) + 4 * third - 4);
      }
    }
  }
};

/** Q4_K and Q5_K pack eight 6-bit scales and eight 6-bit minima into 12 bytes: the `sub`-th of each, from byte `at` on. */
function scaleOf(src: Uint8Array, at: number, sub: number): number {
  if (sub < 4) return src[at + sub]! & 63;
  return (src[at + sub + 4]! & 15) | ((src[at + sub - 4]! >> 2) & 0x30);
}

function minOf(src: Uint8Array, at: number, sub: number): number {
  if (sub < 4) return src[at + sub + 4]! & 63;
  return (src[at + sub + 4]! >> 4) | ((src[at + sub]! >> 2) & 0x30);
}

/** d, dmin, 12 bytes of scales and minima, 128 bytes of nibbles. */
const decodeQ4_K: Decoder = (src, dst, blocks) => {
  const half = halfTable();
  for (let b = 0, s = 0, o = 0; b < blocks; b++, s += 144, o += 256) {
    const d = half[src[s]! | (src[s + 1]! << 8)]!;
    const dmin = half[src[s + 2]! | (src[s + 3]! << 8)]!;
    for (let sub = 0; sub < 8; sub++) {
      const scale = d * scaleOf(src, s + 4, sub);
      const min = dmin * minOf(src, s + 4, sub);
      const codes = s + 16 + (sub >> 1) * 32;
      const shift = (sub & 1) * 4;
      const to = o + sub * 32;
      for (let i = 0; i < 32; i++) dst[to + i] = scale * ((src[codes + i]! >> shift) & 15) - min;
    }
  }
};

/** d, dmin, 12 bytes of scales and minima, 32 bytes of fifth bits, 128 bytes of nibbles. */
const decodeQ5_K: Decoder = (src, dst, blocks) => {
  const half = halfTable();
  for (let b = 0, s = 0, o = 0; b < blocks; b++, s += 176, o += 256) {
    const d = half[src[s]! | (src[s + 1]! << 8)]!;
    const dmin = half[src[s + 2]! | (src[s + 3]! << 8)]!;
    for (let sub = 0; sub < 8; sub++) {
      const scale = d * scaleOf(src, s + 4, sub);
      const min = dmin * minOf(src, s + 4, sub);
      const codes = s + 48 + (sub >> 1) * 32;
      const shift = (sub & 1) * 4;
      const to = o + sub * 32;
      for (let i = 0; i < 32; i++) {
        const fifth = (src[s + 16 + i]! >> sub) & 1;
        dst[to + i] = scale * (((src[codes + i]! >> shift) & 15) | (fifth << 4)) - min;
      }
    }
  }
};

/** 128 bytes of nibbles, 64 bytes of fifth and sixth bits, 16 signed scales, d. */
const decodeQ6_K: Decoder = (src, dst, blocks) => {
  const half = halfTable();
  for (let b = 0, s = 0, o = 0; b < blocks; b++, s += 210, o += 256) {
    const d = half[src[s + 208]! | (src[s + 209]! << 8)]!;
    for (let sub = 0; sub < 16; sub++) {
      const scale = d * ((src[s + 192 + sub]! << 24) >> 24);
      const within = sub & 7;
      const low = s + (sub >> 3) * 64 + (within & 3) * 16;
      const lowShift = (within >> 2) * 4;
      const top = s + 128 + (sub >> 3) * 32 + (within & 1) * 16;
      const topShift = within & 6;
      const to = o + sub * 16;
      for (let i = 0; i < 16; i++) {
        const code = ((src[low + i]! >> lowShift) & 15) | (((src[top + i]! >> topShift) & 3) << 4);
        dst[to + i] = scale * (code - 32);
      }
    }
  }
};

const DECODERS: { readonly [T in GgmlType]?: Decoder } = {
  F32: decodeF32,
  F16: decodeF16,
  BF16: decodeBF16,
  Q4_0: decodeQ4_0,
  Q4_1: decodeQ4_1,
  Q5_0: decodeQ5_0,
  Q5_1: decodeQ5_1,
  Q8_0: decodeQ8_0,
  Q2_K: decodeQ2_K,
  Q3_K: decodeQ3_K,
  Q4_K: decodeQ4_K,
  Q5_K: decodeQ5_K,
  Q6_K: decodeQ6_K,
};

/** The tensor types that `dequantizeGguf` reads. */
export const DEQUANTIZED_TYPES = Object.keys(DECODERS) as readonly GgmlType[];

/** Throws UnsupportedError, naming the type and those that are read, where `dequantizeGguf` has no decoder. */
export function checkDequantizable(type: GgmlType, tensor: string): void {
  if (DECODERS[type]) return;
  throw new UnsupportedError(
    `tensor '${tensor}' of GGUF type ${type}`,
    `types that can be dequantized are ${DEQUANTIZED_TYPES.join(", ")}`,
  );
}

/**
 * Dequantizes whole blocks.
 *
 * @param type the ggml type of `src`
 * @param src whole blocks as they are in the file
 * @returns float32 values, `src.length / blockBytes * blockElements` of them
 *
 * Throws UnsupportedError for a type without a decoder, ArgumentError when `src` does not end on a block.
 */
export function dequantizeGguf(type: GgmlType, src: Uint8Array): Float32Array<ArrayBuffer> {
  checkDequantizable(type, "src");
  const { blockElements, blockBytes } = GGML_TYPES[type];
  const blocks = src.byteLength / blockBytes;
  if (!Number.isInteger(blocks)) {
    throw new ArgumentError(
      "dequantizeGguf",
      "src",
      `whole ${type} blocks of ${blockBytes} bytes`,
      `${src.byteLength} bytes`,
    );
  }
  const dst = new Float32Array(blocks * blockElements);
  DECODERS[type]!(src, dst, blocks);
  return dst;
}
