/** How far a quantized tensor is from the original. */

/** Distances between a tensor and its original, both as float32. */
export interface TensorError {
  /** max |y - x| */
  readonly max: number;
  /** sqrt(mean (y - x)^2) */
  readonly rms: number;
  /** rms(y - x) / rms(x); 0 where both are 0, infinite where only x is. */
  readonly relative: number;
}

/** Adds up errors over the slices of a tensor, in float64 and in order: the result does not depend on timing. */
export class ErrorSum {
  private count = 0;
  private squares = 0;
  private reference = 0;
  private max = 0;

  /** @param x elements of the original @param y the same elements after quantization */
  add(x: Float32Array, y: Float32Array): void {
    let { squares, reference, max } = this;
    const n = x.length;
    for (let i = 0; i < n; i++) {
      const value = x[i]!;
      const distance = y[i]! - value;
      squares += distance * distance;
      reference += value * value;
      const size = distance < 0 ? -distance : distance;
      if (size > max) max = size;
    }
    Object.assign(this, { squares, reference, max });
    this.count += n;
  }

  /** Counts in another sum: for totals over tensors. */
  include(other: ErrorSum): void {
    this.count += other.count;
    this.squares += other.squares;
    this.reference += other.reference;
    this.max = Math.max(this.max, other.max);
  }

  get result(): TensorError {
    const relative = this.squares === 0 ? 0 : Math.sqrt(this.squares / this.reference);
    return { max: this.max, rms: this.count === 0 ? 0 : Math.sqrt(this.squares / this.count), relative };
  }
}
