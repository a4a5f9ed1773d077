/** QuantState: what is needed to decode a quantized tensor. */
import type { FloatDType } from "../core/dtype.js";
import type { Shape } from "../core/shape.js";
import type { Tensor } from "../core/tensor.js";
import type { Codebook } from "./codebook.js";

export type QuantType = "nf4" | "fp4";

export interface QuantStateFields {
  /** f32 scales, one per block; u8 codes of them when `state2` is there. */
  readonly absmax: Tensor;
  /** Shape of the tensor that was quantized. */
  readonly shape: Shape;
  /** dtype that decoding gives: the dtype of the tensor that was quantized. */
  readonly dtype: FloatDType;
  readonly blocksize: number;
  /** nf4 or fp4; absent for 8-bit blockwise codes, which use `code`. */
  readonly quantType?: QuantType;
  /** Codebook of 8-bit blockwise codes. */
  readonly code?: Codebook;
  /** Double quantization: the mean that was taken off absmax (one f32) and the state that decodes absmax. */
  readonly offset?: Tensor<"f32">;
  readonly state2?: QuantState;
}

/**
 * The state that `quantize4bit` and `quantizeBlockwise` return beside the codes, as bitsandbytes' class of that name.
 * It owns its tensors: dispose it when the codes go.
 */
export class QuantState implements QuantStateFields {
  readonly absmax: Tensor;
  readonly shape: Shape;
  readonly dtype: FloatDType;
  readonly blocksize: number;
  readonly quantType?: QuantType;
  readonly code?: Codebook;
  readonly offset?: Tensor<"f32">;
  readonly state2?: QuantState;

  constructor(fields: QuantStateFields) {
    this.absmax = fields.absmax;
    this.shape = Object.freeze([...fields.shape]);
    this.dtype = fields.dtype;
    this.blocksize = fields.blocksize;
    this.quantType = fields.quantType;
    this.code = fields.code;
    this.offset = fields.offset;
    this.state2 = fields.state2;
  }

  /** True when absmax is itself quantized (`compressStatistics`, "double quantization"). */
  get nested(): boolean {
    return this.state2 !== undefined;
  }

  /** Every tensor it owns. */
  tensors(): Tensor[] {
    const own: Tensor[] = [this.absmax];
    if (this.offset) own.push(this.offset);
    return this.state2 ? [...own, ...this.state2.tensors()] : own;
  }

  dispose(): void {
    for (const tensor of this.tensors()) tensor.dispose();
  }

  [Symbol.dispose](): void {
    this.dispose();
  }
}
