/** Codebooks are computed on the host: `src/quant/codebooks.ts`. Here they enter the registry. */
const family = "codebooks";
const golden = "codebook";

export const codebookPrimitives = {
  createDynamicMap: {
    upstream: "create_dynamic_map",
    family,
    kernels: [],
    dtypes: ["f32"],
    golden,
    summary: "the dynamic 8-bit data type: a sign, a unary exponent, a linear fraction",
  },
  createLinearMap: {
    upstream: "create_linear_map",
    family,
    kernels: [],
    dtypes: ["f32"],
    golden,
    summary: "evenly spaced codes",
  },
  createFp8Map: { upstream: "create_fp8_map", family, kernels: [], dtypes: ["f32"], golden, summary: "small floats" },
  createNormalMap: {
    upstream: "create_normal_map",
    family,
    kernels: [],
    dtypes: ["f32"],
    golden,
    summary: "quantiles of the normal distribution",
  },
  get4bitType: {
    upstream: "get_4bit_type",
    family,
    kernels: [],
    dtypes: ["f32"],
    golden,
    summary: "nf4, fp4, int4, af4",
  },
} as const;
