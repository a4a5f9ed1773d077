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
export type { ClipGradNormOptions } from "./ops/gradient.js";
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
  type OptimizerName,
  type OptimizerUpdateOptions,
  optimizerUpdate8bitBlockwise,
  optimizerUpdate32bit,
} from "./ops/optimizer.js";
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
export {
  Adagrad,
  Adagrad8bit,
  Adagrad32bit,
  Adam,
  Adam8bit,
  Adam32bit,
  AdamW,
  AdamW8bit,
  AdamW32bit,
  AdEMAMix,
  AdEMAMix8bit,
  AdEMAMix32bit,
  LAMB,
  LAMB8bit,
  LAMB32bit,
  LARS,
  LARS8bit,
  LARS32bit,
  Lion,
  Lion8bit,
  Lion32bit,
  PagedAdagrad,
  PagedAdagrad8bit,
  PagedAdagrad32bit,
  PagedAdam,
  PagedAdam8bit,
  PagedAdam32bit,
  PagedAdamW,
  PagedAdamW8bit,
  PagedAdamW32bit,
  PagedAdEMAMix,
  PagedAdEMAMix8bit,
  PagedAdEMAMix32bit,
  PagedLAMB,
  PagedLAMB8bit,
  PagedLAMB32bit,
  PagedLARS,
  PagedLARS8bit,
  PagedLARS32bit,
  PagedLion,
  PagedLion8bit,
  PagedLion32bit,
  PagedRMSprop,
  PagedRMSprop8bit,
  PagedRMSprop32bit,
  PagedSGD,
  PagedSGD8bit,
  PagedSGD32bit,
  RMSprop,
  RMSprop8bit,
  RMSprop32bit,
  SGD,
  SGD8bit,
  SGD32bit,
} from "./optim/classes.js";
// Optimizers.
export { clipGradNorm } from "./optim/clip.js";
export { GlobalOptimManager, type Override as HyperOverride } from "./optim/manager.js";
export { Optimizer } from "./optim/optimizer.js";
export type {
  AdagradOptions,
  AdamOptions,
  AdEMAMixOptions,
  BitsOption,
  CommonOptions as OptimizerOptions,
  Hyper as HyperParameters,
  LambOptions,
  LionOptions,
  NamedParam,
  PagedOption,
  ParamGroup,
  ParamGroupOptions,
  Params as OptimizerParams,
  RMSpropOptions,
  SGDOptions,
} from "./optim/options.js";
export type { OptimizerStateDict, ParameterStateDict, SavedGroup } from "./optim/state-dict.js";
export { Codebook } from "./quant/codebook.js";
export { createDynamicMap, createFp8Map, createLinearMap, createNormalMap, get4bitType } from "./quant/codebooks.js";
export { QuantState, type QuantStateDict } from "./quant/state.js";
export type { QuantType } from "./quant/types.js";
