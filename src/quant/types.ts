/** What quantizers can be asked for: 4-bit types and block sizes. */

export const QUANT_TYPES = ["nf4", "fp4"] as const;
export type QuantType = (typeof QUANT_TYPES)[number];

/** Block sizes of every blockwise quantizer (32 with 8-bit codes is ours alone). */
export const BLOCKSIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096] as const;

/** Scales that share a scale under the double quantization of 4-bit states: the only size that bitsandbytes writes. */
export const NESTED_BLOCKSIZE = 256;
