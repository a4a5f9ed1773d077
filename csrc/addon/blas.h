// cuBLASLt as far as the addon calls it, found at run time like the driver and as optional as nothing else. Prototypes and
// numbers are the same in cuBLAS 11, 12 and 13, so one addon serves them all; descriptors are opaque and the library's to
// allocate, because their sizes are not.
#pragma once

#include <cstddef>
#include <cstdint>

#include "driver.h"

namespace blas {

using Result = int;
using Handle = struct OpaqueHandle*;
using Operation = struct OpaqueOperation*;
using Layout = struct OpaqueLayout*;
using Preference = struct OpaquePreference*;

struct Algorithm {
  uint64_t data[8];
};
struct Heuristic {
  Algorithm algorithm;
  size_t workspace;
  Result state;
  float waves;
  int reserved[4];
};
static_assert(sizeof(Heuristic) == 96, "cublasLtMatmulHeuristicResult_t");

// cublasStatus_t: number, what follows CUBLAS_STATUS_ in its name, words.
#define HALFBYTE_BLAS_RESULT(X)                                                            \
  X(1, NOT_INITIALIZED, "cuBLASLt could not be initialized")                               \
  X(3, ALLOC_FAILED, "cuBLASLt could not allocate memory")                                 \
  X(7, INVALID_VALUE, "cuBLASLt was given an unsupported value")                           \
  X(8, ARCH_MISMATCH, "cuBLASLt has no code for this GPU")                                 \
  X(11, MAPPING_ERROR, "cuBLASLt could not access GPU memory")                             \
  X(13, EXECUTION_FAILED, "the GPU failed to execute what cuBLASLt launched")              \
  X(14, INTERNAL_ERROR, "an operation inside cuBLASLt failed")                             \
  X(15, NOT_SUPPORTED, "cuBLASLt does not support this product")                           \
  X(16, LICENSE_ERROR, "cuBLASLt found no license")
enum : Result { kInvalidValue = 7, kArchMismatch = 8, kNotSupported = 15, kLargestResult = 255 };

// libraryPropertyType
enum : int { kMajor = 0, kMinor = 1, kPatch = 2 };
// cudaDataType
enum : int { kFloat32 = 0, kFloat16 = 2, kInt8 = 3, kInt32 = 10, kBfloat16 = 14 };
// cublasComputeType_t. 32F never rounds float32 operands to TF32.
enum : int { kCompute32F = 68, kCompute32I = 72 };
// cublasOperation_t
enum : int32_t { kPlain = 0, kTransposed = 1 };
// cublasLtMatmulDescAttributes_t, cublasLtEpilogue_t
enum : int { kTransA = 3, kTransB = 4, kEpilogue = 7, kBiasPointer = 8 };
enum : uint32_t { kEpilogueBias = 4 };
// cublasLtMatrixLayoutAttribute_t
enum : int { kBatchCount = 5, kBatchStride = 6 };
// cublasLtMatmulPreferenceAttributes_t. kEpilogueMask is in cuBLAS 11 only, where algorithms are left out that the mask
// does not ask for.
enum : int {
  kMaxWorkspace = 1,
  kReductionMask = 3,
  kAlignmentA = 5,
  kAlignmentB = 6,
  kAlignmentC = 7,
  kAlignmentD = 8,
  kEpilogueMask = 11
};
// cublasLtReductionScheme_t: the parts of a split sum are kept in float32 (int32) and added by a step of its own. Not 1 (in
// place) and 4, which round the parts to the output's type.
enum : uint32_t { kReduceComputeType = 2 };

// Member, exported name, parameters. Every one is in cuBLAS since 11.0.
#define HALFBYTE_BLAS(X)                                                                                              \
  X(getProperty, "cublasLtGetProperty", (int property, int* value))                                                   \
  X(create, "cublasLtCreate", (Handle * handle))                                                                      \
  X(destroy, "cublasLtDestroy", (Handle handle))                                                                      \
  X(operationCreate, "cublasLtMatmulDescCreate", (Operation * operation, int compute, int scale))                     \
  X(operationDestroy, "cublasLtMatmulDescDestroy", (Operation operation))                                             \
  X(operationSet, "cublasLtMatmulDescSetAttribute",                                                                   \
    (Operation operation, int attribute, const void* value, size_t bytes))                                            \
  X(layoutCreate, "cublasLtMatrixLayoutCreate", (Layout * layout, int type, uint64_t rows, uint64_t cols, int64_t ld)) \
  X(layoutDestroy, "cublasLtMatrixLayoutDestroy", (Layout layout))                                                    \
  X(layoutSet, "cublasLtMatrixLayoutSetAttribute", (Layout layout, int attribute, const void* value, size_t bytes))    \
  X(preferenceCreate, "cublasLtMatmulPreferenceCreate", (Preference * preference))                                    \
  X(preferenceDestroy, "cublasLtMatmulPreferenceDestroy", (Preference preference))                                    \
  X(preferenceSet, "cublasLtMatmulPreferenceSetAttribute",                                                            \
    (Preference preference, int attribute, const void* value, size_t bytes))                                          \
  X(heuristic, "cublasLtMatmulAlgoGetHeuristic",                                                                      \
    (Handle handle, Operation operation, Layout a, Layout b, Layout c, Layout d, Preference preference, int most,     \
     Heuristic * found, int* count))                                                                                  \
  X(matmul, "cublasLtMatmul",                                                                                         \
    (Handle handle, Operation operation, const void* alpha, cuda::Address a, Layout layoutA, cuda::Address b,         \
     Layout layoutB, const void* beta, cuda::Address c, Layout layoutC, cuda::Address d, Layout layoutD,              \
     const Algorithm* algorithm, cuda::Address workspace, size_t workspaceBytes, cuda::Stream stream))

struct Library {
#define HALFBYTE_MEMBER(member, symbol, parameters) Result(*member) parameters;
  HALFBYTE_BLAS(HALFBYTE_MEMBER)
#undef HALFBYTE_MEMBER

  // Says in `detail` which function is missing.
  bool find(void* library, char* detail, size_t size);
};

// A product of row-major matrices, y = op(a) op(b) + bias, as far as a plan depends on it. All of it is compared as bytes:
// no padding.
struct Product {
  uint32_t dtype, transposeA, transposeB, hasBias;
  uint32_t m, n, k, batch;
  // Elements from row to row.
  uint32_t lda, ldb, ldy;
  // Of the addresses, as powers of two up to 256: a, b, y and bias, a byte each.
  uint32_t alignments;
  // Elements from matrix to matrix; 0 for a single one.
  uint64_t strideA, strideB, strideY;
  uint64_t workspaceBytes;
  // y is float32 where a and b are of 16 bits.
  uint64_t wide;
};
static_assert(sizeof(Product) == 88, "no padding");

struct Places {
  cuda::Address a, b, bias, y, workspace;
};

// Descriptors of a product and the algorithm that the library chose, or that it has none.
struct Plan {
  Product product;
  uint64_t hash;
  // When it was used last; 0: this place is free.
  uint64_t used;
  bool refused;
  Operation operation;
  Layout a, b, y;
  Heuristic chosen;
};

class Blas {
 public:
  // Opens the library and makes its handle in the current context, which has at most one. `version` gets major, minor and
  // patch as soon as they are known, `file` where the library was found.
  int open(const char* path, int version[3], const char** file);
  bool isOpen() const { return handle_ != nullptr; }
  // Enqueues a product; `planned` says whether it needed a new plan.
  int multiply(const Product& product, const Places& at, cuda::Stream stream, bool* planned, const Plan** used);
  // Destroys the plans and the handle. The library stays open: it has threads and exit handlers of its own.
  void release();

 private:
  static constexpr int kPlans = 64;
  int find(const Product& product, const Places& at, bool* planned, Plan** found);
  bool build(const Product& product, const Places& at, Plan* plan);
  bool choose(const Product& product, Preference preference, Plan* plan);
  // Notes which call failed.
  bool step(const char* call, Result result);
  // The status of the step that failed, for a product.
  int failed(const Product& product);
  int refuse(Plan* plan);
  void clear(Plan* plan);

  Library library_;
  void* opened_;
  char path_[4096];
  int major_;
  Handle handle_;
  Plan plans_[kPlans];
  uint64_t uses_;
  const char* call_;
  Result result_;
};

// The name and words of a status of cuBLASLt, abi::blasStatus - cublasStatus_t; false when it is none.
bool describe(int status, const char** name, const char** words);

}  // namespace blas
