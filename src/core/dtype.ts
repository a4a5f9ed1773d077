/** Element types: their names, sizes and host representations. */

/** The element types a tensor can have. `f16` is IEEE binary16, `bf16` is bfloat16 (the top half of a binary32). */
export const DTYPES = ["f32", "f16", "bf16", "i8", "u8", "i32"] as const;
export type DType = (typeof DTYPES)[number];

/** The floating-point element types: what every quantizer accepts. */
export const FLOAT_DTYPES = ["f32", "f16", "bf16"] as const;
export type FloatDType = (typeof FLOAT_DTYPES)[number];

/** The dtypes of gradients that a parameter takes. */
export function gradientDTypes(dtype: FloatDType): readonly FloatDType[] {
  return dtype === "f32" ? FLOAT_DTYPES : ["f32", dtype];
}

/** Bytes per element. */
export const DTYPE_BYTES: Readonly<Record<DType, number>> = { f32: 4, f16: 2, bf16: 2, i8: 1, u8: 1, i32: 4 };

/** The number a kernel sees for a dtype: its position in `DTYPES`. asm/ and csrc/ get theirs generated from it. */
export const DTYPE_ID: Readonly<Record<DType, number>> = Object.fromEntries(DTYPES.map((d, i) => [d, i])) as Record<
  DType,
  number
>;

/** The names PyTorch prints, as quant states and config files hold them. */
export const TORCH_NAME: Readonly<Record<DType, string>> = {
  f32: "float32",
  f16: "float16",
  bf16: "bfloat16",
  i8: "int8",
  u8: "uint8",
  i32: "int32",
};

/** The dtype that PyTorch calls `name` ("bfloat16"), or undefined. */
export function dtypeFromTorch(name: string): DType | undefined {
  return DTYPES.find((d) => TORCH_NAME[d] === name);
}

export function isDType(value: unknown): value is DType {
  return typeof value === "string" && (DTYPES as readonly string[]).includes(value);
}

export function isFloat(dtype: DType): dtype is FloatDType {
  return dtype === "f32" || dtype === "f16" || dtype === "bf16";
}
