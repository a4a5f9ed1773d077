/** halfbyte: k-bit quantization for Node.js. */
export type { CpuOptions } from "./backend/cpu/backend.js";
export type { CudaOptions } from "./backend/cuda/backend.js";
export type { CudaDevice } from "./backend/cuda/device.js";
export { type ProbeOptions, type ProbeResult, probeCuda, probeCudaSync } from "./backend/cuda/probe.js";
export {
  type DeviceChoice,
  getBackend,
  type InitOptions,
  init,
  type MemoryReport,
  memory,
  restart,
  shutdown,
} from "./backend/devices.js";
// Whole models and files.
export {
  type ComparedTensor,
  type CompareOptions,
  type ComparisonReport,
  compareModels,
} from "./checkpoint/compare.js";
export {
  type EstimateOptimizer,
  type EstimateOptions,
  type EstimatePart,
  type EstimateType,
  estimateModel,
  type LoraTargets,
  type ModelEstimate,
} from "./checkpoint/estimate.js";
export { type InspectedTensor, inspectModel, type ModelInspection } from "./checkpoint/inspect.js";
export { type Model, openModel } from "./checkpoint/open.js";
export {
  type QuantizeOptions,
  type QuantizeProgress,
  type QuantizeReport,
  quantizeModel,
} from "./checkpoint/quantize.js";
export type { Backend, BackendState, DeviceMemory, DeviceName } from "./core/backend.js";
export { DTYPES, type DType, FLOAT_DTYPES, type FloatDType } from "./core/dtype.js";
export * from "./core/errors.js";
export type { ProductMode } from "./core/product-paths.js";
export { keep, tidy } from "./core/scope.js";
export type { Shape } from "./core/shape.js";
export { Tensor } from "./core/tensor.js";
export { type DataOf, HAS_FLOAT16_ARRAY, type TensorLike } from "./core/typedarray.js";
export { type GgufModelSource, openGgufModel } from "./formats/gguf-model.js";
export { openHfFolder } from "./formats/hf-folder.js";
export { SafetensorsFile, type TensorEntry } from "./formats/safetensors.js";
export { SafetensorsWriter, type TensorDeclaration } from "./formats/safetensors-writer.js";
export type { ModelSource, SafetensorsDType, SourceTensor } from "./formats/source.js";
export { type CheckGoldenOptions, checkGolden } from "./golden/check.js";
export type { GoldenFailure, GoldenReport, OpTally } from "./golden/report.js";
export { type WriteGoldenOptions, type WrittenGolden, writeGolden } from "./golden/write.js";
export {
  type CodeSearch,
  type DequantizeBlockwiseOptions,
  dequantizeBlockwise,
  type QuantizeBlockwiseOptions,
  quantizeBlockwise,
} from "./ops/blockwise.js";
export { empty, fromBytes, type TensorOptions, tensor, zeros } from "./ops/create.js";
export {
  type Dequantize4bitOptions,
  dequantize4bit,
  dequantizeFp4,
  dequantizeNf4,
  type Quantize4bitOptions,
  quantize4bit,
  quantizeFp4,
  quantizeNf4,
} from "./ops/fourbit.js";
export {
  batchedIgemm,
  type IgemmOptions,
  type Int8MixedScaledMmOptions,
  type Int8MmDequantOptions,
  type IntegerOptions,
  igemm,
  int8LinearMatmul,
  int8MixedScaledMm,
  int8MmDequant,
  int8ScaledMm,
  type Matmul8bitOptions,
  matmul8bit,
} from "./ops/igemm.js";
export {
  type Int8VectorwiseDequantOptions,
  type Int8VectorwiseQuantOptions,
  int8DoubleQuant,
  int8VectorwiseDequant,
  int8VectorwiseQuant,
  OutlierColumns,
} from "./ops/int8.js";
export { type MatmulOptions, matmul } from "./ops/matmul.js";
export {
  type Gemv4bitOptions,
  gemv4bit,
  type Matmul4bitOptions,
  matmul4bit,
  matmul4bitBackward,
} from "./ops/matmul4bit.js";
export {
  COOSparseTensor,
  type CooZerosOptions,
  cooZeros,
  type SpmmCooOptions,
  type SpmmCooVerySparseOptions,
  spmmCoo,
  spmmCooVerySparse,
} from "./ops/sparse.js";
export { mean } from "./ops/sum.js";
export { Codebook } from "./quant/codebook.js";
export { createDynamicMap, createFp8Map, createLinearMap, createNormalMap, get4bitType } from "./quant/codebooks.js";
export { QuantState, type QuantStateDict } from "./quant/state.js";
export type { QuantType } from "./quant/types.js";
