/** The operand structs as the CUDA kernels see them: the registry's fields at 8-byte addresses, and what the backend adds. */
import { KERNELS, type KernelName, operandLayout } from "../../core/kernels.js";

export const ADDRESS_BYTES = 8;
/** The most that a CUDA kernel takes as operands. */
export const MAX_OPERAND_BYTES = 4096;

/**
 * Where a kernel that checks for non-finite values finds the fault word (a device address) and the upper half of what it
 * writes there: the smallest `faultKey * 2^32 + block` wins. Both follow the operands.
 */
export interface FaultFields {
  readonly word: number;
  readonly key: number;
}

export interface CudaLayout {
  /** By field of the registry. */
  readonly offsets: Readonly<Record<string, number>>;
  readonly fault: FaultFields | undefined;
  readonly bytes: number;
}

export function cudaLayout(kernel: KernelName): CudaLayout {
  const { offsets, bytes } = operandLayout(kernel, ADDRESS_BYTES);
  if (!("allowNonFinite" in KERNELS[kernel])) return { offsets, fault: undefined, bytes };
  return { offsets, fault: { word: bytes, key: bytes + ADDRESS_BYTES }, bytes: bytes + 2 * ADDRESS_BYTES };
}
