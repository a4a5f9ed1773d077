// Products by cuBLASLt: opening the library, plans, and multiplying.
#include "blas.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <initializer_list>

#include "addon.h"
#include "glibc.h"

namespace blas {

namespace {

struct Types {
  int operand, result, compute, scale;
  uint32_t operandBytes, resultBytes;
  const void *one, *zero;
};

const float kOneF = 1, kZeroF = 0;
const int32_t kOneI = 1, kZeroI = 0;

// By abi::Dtype.
bool typesOf(uint32_t dtype, bool wide, Types* types) {
  switch (dtype) {
    case abi::dtypeF32:
      *types = {kFloat32, kFloat32, kCompute32F, kFloat32, 4, 4, &kOneF, &kZeroF};
      return true;
    case abi::dtypeF16:
      *types = {kFloat16, wide ? kFloat32 : kFloat16, kCompute32F, kFloat32, 2, wide ? 4u : 2u, &kOneF, &kZeroF};
      return true;
    case abi::dtypeBf16:
      *types = {kBfloat16, wide ? kFloat32 : kBfloat16, kCompute32F, kFloat32, 2, wide ? 4u : 2u, &kOneF, &kZeroF};
      return true;
    case abi::dtypeI8:
      *types = {kInt8, kInt32, kCompute32I, kInt32, 1, 4, &kOneI, &kZeroI};
      return true;
  }
  return false;
}

uint64_t hashOf(const Product& product) {
  uint64_t words[sizeof product / sizeof(uint64_t)], hash = 0;
  memcpy(words, &product, sizeof product);
  for (const uint64_t word : words) {
    hash = (hash ^ word) * 0x9e3779b97f4a7c15u;
    hash ^= hash >> 32;
  }
  return hash;
}

uint32_t alignmentAt(const Product& product, int which) { return 1u << (product.alignments >> (8 * which) & 0xff); }

// What the library says when it has nothing for a product, rather than that something is wrong.
bool refuses(Result result) {
  return result == kNotSupported || result == kInvalidValue || result == kArchMismatch;
}

void text(const Product& p, char* words, size_t size) {
  snprintf(words, size,
           "dtype %u, m %u, n %u, k %u, batch %u, transposes %u %u, bias %u, rows %u %u %u, strides %llu %llu %llu, "
           "alignments %u %u %u %u, workspace %llu, wide %u",
           p.dtype, p.m, p.n, p.k, p.batch, p.transposeA, p.transposeB, p.hasBias, p.lda, p.ldb, p.ldy,
           static_cast<unsigned long long>(p.strideA), static_cast<unsigned long long>(p.strideB),
           static_cast<unsigned long long>(p.strideY), alignmentAt(p, 0), alignmentAt(p, 1), alignmentAt(p, 2),
           alignmentAt(p, 3), static_cast<unsigned long long>(p.workspaceBytes), static_cast<unsigned>(p.wide));
}

}  // namespace

bool Library::find(void* library, char* detail, size_t size) {
#define HALFBYTE_FIND(member, symbol, parameters)                          \
  member = reinterpret_cast<Result(*) parameters>(dlsym(library, symbol)); \
  if (!member) {                                                           \
    snprintf(detail, size, "%s", symbol);                                  \
    return false;                                                          \
  }
  HALFBYTE_BLAS(HALFBYTE_FIND)
#undef HALFBYTE_FIND
  return true;
}

bool describe(int status, const char** name, const char** words) {
  switch (abi::blasStatus - status) {
#define HALFBYTE_CASE(number, symbol, text) \
  case number:                              \
    *name = "CUBLAS_STATUS_" #symbol;       \
    *words = text;                          \
    return true;
    HALFBYTE_BLAS_RESULT(HALFBYTE_CASE)
#undef HALFBYTE_CASE
  }
  return false;
}

bool Blas::step(const char* call, Result result) {
  call_ = call;
  result_ = result;
  return result == 0;
}

int Blas::failed(const Product& product) {
  char words[512];
  text(product, words, sizeof words);
  if (result_ == 0) return addon.fail(abi::notSupported, "%s found no algorithm: %s", call_, words);
  const Status status = refuses(result_)                             ? abi::notSupported
                        : result_ > 0 && result_ <= kLargestResult ? abi::blasStatus - result_
                                                                     : abi::blasStatus;
  return addon.fail(status, "%s answered %d: %s", call_, result_, words);
}

int Blas::open(const char* path, int version[3], const char** file) {
  const bool same = opened_ && strcmp(path, path_) == 0;
  if (handle_ && !same)
    return addon.fail(abi::badArgument, "argument 1 (path): %.4000s is open already", path_);
  Library found = library_;
  void* library = same ? opened_ : nullptr;
  if (!library) {
    library = cuda::Driver::openLibrary(path, addon.detail, sizeof addon.detail);
    if (!library) return abi::noLibrary;
    // It stays open though it is of no use, as every library does.
    if (!found.find(library, addon.detail, sizeof addon.detail)) return abi::missingSymbol;
  }
  const auto fails = [this](const char* words) {
    return addon.fail(result_ > 0 && result_ <= kLargestResult ? abi::blasStatus - result_ : abi::blasStatus,
                      "%s answered %d%s", call_, result_, words);
  };
  for (const int property : {kMajor, kMinor, kPatch}) {
    if (!step("cublasLtGetProperty", found.getProperty(property, version + property))) return fails("");
  }
  Dl_info place;
  if (dladdr(reinterpret_cast<void*>(found.matmul), &place) && place.dli_fname) *file = place.dli_fname;
  if (version[kMajor] < 11) {
    return addon.fail(abi::noLibrary, "it is cuBLASLt %d.%d, the oldest supported is 11", version[kMajor],
                      version[kMinor]);
  }
  if (!handle_) {
    if (!step("cublasLtCreate", found.create(&handle_))) {
      handle_ = nullptr;
      return fails(": the driver is too old for it, or the GPU's memory exhausted");
    }
  }
  library_ = found;
  opened_ = library;
  major_ = version[kMajor];
  snprintf(path_, sizeof path_, "%s", path);
  return 0;
}

// Row-major y is column-major y^T = op(b)^T op(a)^T: the library's A is our b, and its rows are our columns.
bool Blas::build(const Product& p, const Places& at, Plan* plan) {
  Types t;
  if (!typesOf(p.dtype, p.wide, &t)) return false;
  const Library& f = library_;
  const auto operation = [&](int attribute, auto value) {
    return step("cublasLtMatmulDescSetAttribute", f.operationSet(plan->operation, attribute, &value, sizeof value));
  };
  const auto layout = [&](Layout* made, int type, uint64_t rows, uint64_t cols, int64_t ld, uint64_t stride) {
    if (!step("cublasLtMatrixLayoutCreate", f.layoutCreate(made, type, rows, cols, ld))) {
      *made = nullptr;
      return false;
    }
    const auto count = static_cast<int32_t>(p.batch);
    const auto elements = static_cast<int64_t>(stride);
    return p.batch == 1 ||
           (step("cublasLtMatrixLayoutSetAttribute", f.layoutSet(*made, kBatchCount, &count, sizeof count)) &&
            step("cublasLtMatrixLayoutSetAttribute", f.layoutSet(*made, kBatchStride, &elements, sizeof elements)));
  };
  if (!step("cublasLtMatmulDescCreate", f.operationCreate(&plan->operation, t.compute, t.scale))) {
    plan->operation = nullptr;
    return false;
  }
  if (!operation(kTransA, p.transposeB ? kTransposed : kPlain) ||
      !operation(kTransB, p.transposeA ? kTransposed : kPlain) ||
      // The heuristic looks at the bias's alignment.
      (p.hasBias && (!operation(kEpilogue, uint32_t{kEpilogueBias}) || !operation(kBiasPointer, at.bias))) ||
      !layout(&plan->a, t.operand, p.transposeB ? p.k : p.n, p.transposeB ? p.n : p.k, p.ldb, p.strideB) ||
      !layout(&plan->b, t.operand, p.transposeA ? p.m : p.k, p.transposeA ? p.k : p.m, p.lda, p.strideA) ||
      !layout(&plan->y, t.result, p.n, p.m, p.ldy, p.strideY)) {
    return false;
  }
  Preference preference = nullptr;
  if (!step("cublasLtMatmulPreferenceCreate", f.preferenceCreate(&preference))) return false;
  const bool chosen = choose(p, preference, plan);
  f.preferenceDestroy(preference);
  return chosen;
}

bool Blas::choose(const Product& p, Preference preference, Plan* plan) {
  const Library& f = library_;
  const auto prefer = [&](int attribute, auto value) {
    return step("cublasLtMatmulPreferenceSetAttribute", f.preferenceSet(preference, attribute, &value, sizeof value));
  };
  constexpr int kMost = 4;
  Heuristic found[kMost];
  memset(found, 0, sizeof found);
  int count = 0;
  if (!prefer(kMaxWorkspace, p.workspaceBytes) || !prefer(kReductionMask, uint32_t{kReduceComputeType}) ||
      !prefer(kAlignmentA, alignmentAt(p, 1)) || !prefer(kAlignmentB, alignmentAt(p, 0)) ||
      !prefer(kAlignmentC, alignmentAt(p, 2)) || !prefer(kAlignmentD, alignmentAt(p, 2)) ||
      (p.hasBias && major_ < 12 && !prefer(kEpilogueMask, uint32_t{kEpilogueBias})) ||
      !step("cublasLtMatmulAlgoGetHeuristic", f.heuristic(handle_, plan->operation, plan->a, plan->b, plan->y, plan->y,
                                                          preference, kMost, found, &count))) {
    return false;
  }
  for (int i = 0; i < count && i < kMost; i++) {
    if (found[i].state != 0 || found[i].workspace > p.workspaceBytes) continue;
    plan->chosen = found[i];
    return true;
  }
  return false;
}

void Blas::clear(Plan* plan) {
  if (plan->operation) library_.operationDestroy(plan->operation);
  for (Layout layout : {plan->a, plan->b, plan->y}) {
    if (layout) library_.layoutDestroy(layout);
  }
  memset(plan, 0, sizeof *plan);
}

int Blas::refuse(Plan* plan) {
  const Product product = plan->product;
  const uint64_t hash = plan->hash, used = plan->used;
  clear(plan);
  plan->product = product;
  plan->hash = hash;
  plan->used = used;
  plan->refused = true;
  return failed(product);
}

int Blas::find(const Product& product, const Places& at, bool* planned, Plan** found) {
  const uint64_t hash = hashOf(product);
  Plan* oldest = plans_;
  for (Plan& plan : plans_) {
    if (plan.used && plan.hash == hash && memcmp(&plan.product, &product, sizeof product) == 0) {
      *found = &plan;
      if (!plan.refused) return 0;
      char words[512];
      text(product, words, sizeof words);
      return addon.fail(abi::notSupported, "refused before: %s", words);
    }
    if (plan.used < oldest->used) oldest = &plan;
  }
  *planned = true;
  clear(oldest);
  const bool built = build(product, at, oldest);
  oldest->product = product;
  oldest->hash = hash;
  oldest->used = uses_;
  *found = oldest;
  if (built) return 0;
  if (result_ == 0 || refuses(result_)) return refuse(oldest);
  const Status status = failed(product);
  clear(oldest);
  return status;
}

int Blas::multiply(const Product& product, const Places& at, cuda::Stream stream, bool* planned, const Plan** used) {
  uses_++;
  Plan* plan = nullptr;
  if (const Status status = find(product, at, planned, &plan)) return status;
  *used = plan;
  plan->used = uses_;
  if (product.hasBias && !step("cublasLtMatmulDescSetAttribute",
                               library_.operationSet(plan->operation, kBiasPointer, &at.bias, sizeof at.bias))) {
    return failed(product);
  }
  Types t;
  typesOf(product.dtype, product.wide, &t);
  const cuda::Address workspace = plan->chosen.workspace ? at.workspace : 0;
  if (step("cublasLtMatmul",
           library_.matmul(handle_, plan->operation, t.one, at.b, plan->a, at.a, plan->b, t.zero, at.y, plan->y, at.y,
                           plan->y, &plan->chosen.algorithm, workspace, plan->chosen.workspace, stream))) {
    return 0;
  }
  return refuses(result_) ? refuse(plan) : failed(product);
}

void Blas::release() {
  if (!handle_) return;
  for (Plan& plan : plans_) clear(&plan);
  library_.destroy(handle_);
  handle_ = nullptr;
}

}  // namespace blas

namespace {

Status blasOpen(Call& call) {
  char path[sizeof addon.libraryPath];
  napi_value identity;
  if (!call.string(0, "path", path, sizeof path) || !call.object(1, "identity", &identity)) return call.status;
  if (!addon.context) return cuda::kInvalidContext;
  int version[3] = {};
  const char* file = path;
  const Status status = addon.products.open(path, version, &file);
  for (int i = 0; i < 3; i++) addon.results[i] = version[i];
  napi_value value;
  if (napi_create_string_utf8(call.env, file, NAPI_AUTO_LENGTH, &value) != napi_ok ||
      napi_set_named_property(call.env, identity, "file", value) != napi_ok) {
    napi_value error;
    napi_get_and_clear_last_exception(call.env, &error);
    if (status == 0) return addon.fail(abi::badArgument, "argument 2 (identity): expected an object that takes file");
  }
  return status;
}

// A matrix of `batch` x `rows` x `cols` elements of `bytes` inside one allocation.
struct Extent {
  const char* name;
  cuda::Address address;
  uint64_t rows, cols, ld, stride, batch;
  uint32_t bytes;

  Status check() const {
    uint64_t elements, more, total;
    if (rows == 0 || cols == 0 || rows > INT32_MAX || cols > INT32_MAX || ld > INT32_MAX || batch == 0 ||
        batch > INT32_MAX || ld < cols) {
      return addon.fail(abi::badArgument, "%s: %llu x %llu x %llu elements, %llu from row to row", name,
                        static_cast<unsigned long long>(batch), static_cast<unsigned long long>(rows),
                        static_cast<unsigned long long>(cols), static_cast<unsigned long long>(ld));
    }
    if (__builtin_mul_overflow(batch - 1, stride, &more) ||
        __builtin_add_overflow(more, (rows - 1) * ld + cols, &elements) ||
        __builtin_mul_overflow(elements, bytes, &total) || address % bytes != 0 ||
        !addon.allocations.contain(address, total)) {
      return addon.fail(abi::badArgument,
                        "%s: %llu x %llu x %llu elements of %u bytes at %llu, %llu from row to row and %llu from "
                        "matrix to matrix, are not inside an allocation",
                        name, static_cast<unsigned long long>(batch), static_cast<unsigned long long>(rows),
                        static_cast<unsigned long long>(cols), bytes, static_cast<unsigned long long>(address),
                        static_cast<unsigned long long>(ld), static_cast<unsigned long long>(stride));
    }
    return 0;
  }
};

// The largest power of two, up to 2^8, that divides both.
uint32_t alignmentOf(cuda::Address address, uint64_t strideBytes) {
  return static_cast<uint32_t>(__builtin_ctzll(address | strideBytes | 256));
}

Status multiplyCommand() {
  if (!addon.products.isOpen()) return addon.fail(abi::closed, "blasOpen comes first");
  const unsigned char* command = addon.command + abi::blasCommand;
  const auto word = [command](uint32_t at) {
    uint32_t value;
    memcpy(&value, command + at * sizeof value, sizeof value);
    return value;
  };
  const auto wide = [command](uint32_t at) {
    uint64_t value;
    memcpy(&value, command + at * sizeof(uint32_t), sizeof value);
    return value;
  };
  const blas::Places at = {wide(abi::blasA), wide(abi::blasB), wide(abi::blasBias), wide(abi::blasY),
                           wide(abi::blasWorkspace)};
  blas::Product p = {};
  p.dtype = word(abi::blasDtype);
  p.transposeA = word(abi::blasTransposeA) != 0;
  p.transposeB = word(abi::blasTransposeB) != 0;
  p.hasBias = at.bias != 0;
  p.wide = word(abi::blasWide) != 0;
  p.m = word(abi::blasM);
  p.n = word(abi::blasN);
  p.k = word(abi::blasK);
  p.batch = word(abi::blasBatch);
  p.lda = word(abi::blasLda);
  p.ldb = word(abi::blasLdb);
  p.ldy = word(abi::blasLdy);
  p.strideA = p.batch == 1 ? 0 : wide(abi::blasStrideA);
  p.strideB = p.batch == 1 ? 0 : wide(abi::blasStrideB);
  p.strideY = p.batch == 1 ? 0 : wide(abi::blasStrideY);
  p.workspaceBytes = word(abi::blasWorkspaceBytes);
  blas::Types t;
  if (!blas::typesOf(p.dtype, p.wide, &t)) return addon.fail(abi::badArgument, "dtype: there is no product of %u", p.dtype);
  const Slot* stream = addon.handles.find(word(abi::blasStream), Kind::stream);
  if (!stream) return addon.fail(abi::badHandle, "there is no stream %u, or no more", word(abi::blasStream));
  const uint64_t m = p.m, n = p.n, k = p.k;
  const Extent extents[] = {
      {"a", at.a, p.transposeA ? k : m, p.transposeA ? m : k, p.lda, p.strideA, p.batch, t.operandBytes},
      {"b", at.b, p.transposeB ? n : k, p.transposeB ? k : n, p.ldb, p.strideB, p.batch, t.operandBytes},
      {"y", at.y, m, n, p.ldy, p.strideY, p.batch, t.resultBytes},
      {"bias", at.bias, 1, n, n, 0, 1, t.resultBytes},
  };
  for (int i = 0; i < (p.hasBias ? 4 : 3); i++) {
    if (const Status status = extents[i].check()) return status;
  }
  if (p.workspaceBytes && !addon.allocations.contain(at.workspace, p.workspaceBytes)) {
    return addon.fail(abi::badArgument, "workspace: %llu bytes at %llu are not inside an allocation",
                      static_cast<unsigned long long>(p.workspaceBytes),
                      static_cast<unsigned long long>(at.workspace));
  }
  if (p.batch > 1 && p.strideY < (m - 1) * p.ldy + n) {
    return addon.fail(abi::badArgument, "y: matrices %llu elements apart overlap",
                      static_cast<unsigned long long>(p.strideY));
  }
  p.alignments = alignmentOf(at.a, p.strideA * t.operandBytes) | alignmentOf(at.b, p.strideB * t.operandBytes) << 8 |
                 alignmentOf(at.y, p.strideY * t.resultBytes) << 16 | alignmentOf(at.bias, 0) << 24;
  bool planned = false;
  const blas::Plan* plan = nullptr;
  const Status status = addon.products.multiply(p, at, stream->as<cuda::Stream>(), &planned, &plan);
  addon.results[0] = planned;
  addon.results[1] = plan ? static_cast<double>(plan->chosen.workspace) : 0;
  addon.results[2] = plan ? plan->chosen.waves : 0;
  return status;
}

// Without `Call`, as a launch.
napi_value blasMatmul(napi_env env, napi_callback_info) {
  if (const Status refused = addon.admits(env)) return toNumber(env, refused);
  addon.detail[0] = 0;
  return toNumber(env, multiplyCommand());
}

const Entry kEntries[] = {{"blasOpen", entry<blasOpen>}, {"blasMatmul", blasMatmul}};

}  // namespace

bool exportBlas(napi_env env, napi_value exports) {
  return exportAll(env, exports, kEntries, sizeof kEntries / sizeof *kEntries);
}
