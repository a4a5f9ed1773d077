/** The codebooks that golden files name. */
import { createDynamicMap, createFp8Map, createLinearMap, createNormalMap, get4bitType } from "../quant/codebooks.js";

/** By the name that a `codebook` case has. */
export const CODEBOOKS = {
  dynamic: () => createDynamicMap(),
  udynamic: () => createDynamicMap(false),
  linear: () => createLinearMap(),
  ulinear: () => createLinearMap(false),
  fp8_e5m2: () => createFp8Map(true, 5, 2),
  fp8_e4m3: () => createFp8Map(true, 4, 3),
  normal: () => createNormalMap(),
  nf4: () => get4bitType("nf4"),
  fp4: () => get4bitType("fp4"),
} as const satisfies Record<string, () => Float32Array<ArrayBuffer>>;
export type CodebookName = keyof typeof CODEBOOKS;
export const CODEBOOK_NAMES = Object.keys(CODEBOOKS) as CodebookName[];
