/** Filling results that no kernel computes: products over nothing. */
import type { Tensor } from "../core/tensor.js";

/** y = 0, or `row` in each of its rows: what a sum over no elements gives. */
export function fillRows(y: Tensor, row: Tensor | undefined): void {
  const { backend, storage, byteOffset, byteLength: bytes } = y;
  if (bytes === 0) return;
  if (!row) {
    backend.launch("fill", { dst: y, bytes, value: 0 });
    return;
  }
  backend.launch("copy", { src: row, dst: y, bytes: row.byteLength });
  // What is filled doubles with every launch.
  for (let filled = row.byteLength; filled < bytes; filled *= 2) {
    const dst = { storage, byteOffset: byteOffset + filled };
    backend.launch("copy", { src: y, dst, bytes: Math.min(filled, bytes - filled) });
  }
}
