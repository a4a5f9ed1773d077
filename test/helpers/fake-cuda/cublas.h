// cuBLASLt over the fake driver's memory and streams: the entry points that the addon uses, in plain loops. Strict: what a
// wrong caller could pass (a size of an attribute, a stale object, an algorithm of another product, a reduction that rounds
// in between) is CUBLAS_STATUS_INTERNAL_ERROR, which the backend takes for a failure and not for "not supported"; objects
// that are alive when the context ends abort. fake-cuda.cc lists what the environment can tell it.
#pragma once

#include <type_traits>
#include <utility>

#include "state.h"

namespace {

enum : Result {
  kBlasNotInitialized = 1,
  kBlasExecutionFailed = 13,
  kBlasMisuse = 14,
  kBlasNotSupported = 15,
};
enum : int { kF32 = 0, kF16 = 2, kI8 = 3, kI32 = 10, kBf16 = 14 };

struct BlasHandle {};

struct Operation {
  int compute, scale;
  int32_t transA = 0, transB = 0;
  uint32_t epilogue = 1;
  Address bias = 0;
};

struct Layout {
  int type;
  uint64_t rows, cols;
  int64_t ld;
  int32_t batch = 1;
  int64_t stride = 0;

  uint64_t bytes() const { return type == kI8 ? 1 : type == kF16 || type == kBf16 ? 2 : 4; }
  bool holds() const { return rows && cols && ld >= static_cast<int64_t>(rows) && batch >= 1; }
  bool covered(Address address) const {
    const uint64_t last = (batch - 1) * static_cast<uint64_t>(stride) + (cols - 1) * ld + rows;
    return covers(address, last * bytes());
  }
};

struct Preference {
  uint64_t workspace = 0;
  uint32_t reductions = 7, alignA = 256, alignB = 256, alignC = 256, alignD = 256, epilogues = 1;
};

struct Algorithm {
  uint64_t product, alignA, alignB, alignC, alignD, workspace, unused[2];
};
struct Heuristic {
  Algorithm algorithm;
  size_t workspace;
  Result state;
  float waves;
  int reserved[4];
};

// Live objects of each kind.
template <typename T>
std::set<T*>& live() {
  static auto* objects = new std::set<T*>;
  return *objects;
}

int blasVersion(int part) {
  int version[3] = {};
  sscanf(text("BLAS_VERSION", "12.6.4").c_str(), "%d.%d.%d", version, version + 1, version + 2);
  return version[part];
}

// What BLAS_FAIL says of a function: "cublasLtMatmul=13".
Result blasFailure(const char* function) {
  const std::string fail = text("BLAS_FAIL", ""), name = std::string(function) + "=";
  return fail.rfind(name, 0) == 0 ? std::stoi(fail.substr(name.size())) : kOk;
}

struct EnterBlas : Enter {
  explicit EnterBlas(const char* function) {
    if (status == kOk) {
      status = blasFailure(function);
    } else {
      status = status == driver.fault ? Result{kBlasExecutionFailed} : Result{kBlasNotInitialized};
    }
  }
};

template <typename T, typename... Rest>
Result makeBlas(T** made, Rest... rest) {
  *made = new T{rest...};
  live<T>().insert(*made);
  driver.blasObjects++;
  return kOk;
}

template <typename T>
Result endBlas(T* object) {
  if (!live<T>().erase(object)) return kBlasMisuse;
  driver.blasObjects--;
  delete object;
  return kOk;
}

template <typename T>
Result take(T* into, const void* value, size_t bytes) {
  if (!value || bytes != sizeof(T)) return kBlasMisuse;
  memcpy(into, value, bytes);
  return kOk;
}

// Which product an algorithm was chosen for.
uint64_t productOf(const Operation& o, const Layout& a, const Layout& b, const Layout& c) {
  uint64_t hash = o.compute * 31 + o.transA * 7 + o.transB * 3 + o.epilogue;
  for (const Layout* l : {&a, &b, &c}) {
    const uint64_t words[] = {uint64_t(l->type), l->rows, l->cols, uint64_t(l->ld), uint64_t(l->batch), uint64_t(l->stride)};
    for (const uint64_t word : words) hash = (hash ^ word) * 0x100000001b3u;
  }
  return hash;
}

Result checkProduct(const Operation& o, const Layout& a, const Layout& b, const Layout& c, const Layout& d) {
  const uint64_t rows = o.transA ? a.cols : a.rows, inner = o.transA ? a.rows : a.cols;
  const uint64_t innerB = o.transB ? b.cols : b.rows, cols = o.transB ? b.rows : b.cols;
  const bool integers = a.type == kI8;
  if (!a.holds() || !b.holds() || !c.holds() || inner != innerB || c.rows != rows || c.cols != cols) return kBlasMisuse;
  if (productOf(o, a, b, c) != productOf(o, a, b, d) || a.batch != c.batch || b.batch != c.batch) return kBlasMisuse;
  if (a.type != b.type || (integers ? c.type != kI32 : c.type != a.type && c.type != kF32)) return kBlasMisuse;
  if (o.compute != (integers ? 72 : 68) || o.scale != (integers ? kI32 : kF32)) return kBlasMisuse;
  if (o.epilogue != 1 && (o.epilogue != 4 || !o.bias)) return kBlasMisuse;
  if (integers && (o.epilogue != 1 || !o.transA || o.transB || inner % 4 || a.ld % 4 || b.ld % 4 || c.ld % 4))
    return kBlasNotSupported;
  return kOk;
}

float widen(int type, const void* from, uint64_t at) {
  if (type == kF32) return static_cast<const float*>(from)[at];
  const uint32_t bits = static_cast<const uint16_t*>(from)[at];
  uint32_t wide = bits << 16;
  if (type == kF16) {
    if ((bits & 0x7c00) == 0) return (bits & 0x8000 ? -1.0f : 1.0f) * static_cast<float>(bits & 0x3ff) / 16777216.0f;
    wide = (bits & 0x8000) << 16 | ((bits & 0x7fff) + (112 << 10)) << 13;
  }
  float value;
  memcpy(&value, &wide, 4);
  return value;
}

// For finite values of the type's normal range.
void narrow(int type, void* to, uint64_t at, float value) {
  if (type == kF32) {
    static_cast<float*>(to)[at] = value;
    return;
  }
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const int drop = type == kF16 ? 13 : 16;
  const uint32_t sign = bits >> 16 & 0x8000;
  uint32_t rest = bits & 0x7fffffff;
  rest = (rest + (1u << (drop - 1)) - 1 + (rest >> drop & 1)) >> drop;
  if (type == kF16) rest = rest > 112 << 10 ? rest - (112 << 10) : 0;
  static_cast<uint16_t*>(to)[at] = static_cast<uint16_t>(sign | rest);
}

void multiply(const Operation& o, const Layout& la, const Layout& lb, const Layout& ld, Address a, Address b, Address d) {
  const uint64_t inner = o.transA ? la.rows : la.cols;
  for (int batch = 0; batch < ld.batch; batch++) {
    const void* pa = reinterpret_cast<char*>(a) + batch * la.stride * la.bytes();
    const void* pb = reinterpret_cast<char*>(b) + batch * lb.stride * lb.bytes();
    void* pd = reinterpret_cast<char*>(d) + batch * ld.stride * ld.bytes();
    for (uint64_t col = 0; col < ld.cols; col++) {
      for (uint64_t row = 0; row < ld.rows; row++) {
        const auto atA = [&](uint64_t i) { return o.transA ? i + row * la.ld : row + i * la.ld; };
        const auto atB = [&](uint64_t i) { return o.transB ? col + i * lb.ld : i + col * lb.ld; };
        const uint64_t at = row + col * ld.ld;
        if (la.type == kI8) {
          int32_t sum = 0;
          for (uint64_t i = 0; i < inner; i++)
            sum += static_cast<const int8_t*>(pa)[atA(i)] * static_cast<const int8_t*>(pb)[atB(i)];
          static_cast<int32_t*>(pd)[at] = sum;
          continue;
        }
        float sum = 0;
        for (uint64_t i = 0; i < inner; i++) sum += widen(la.type, pa, atA(i)) * widen(lb.type, pb, atB(i));
        if (o.epilogue == 4) sum += widen(ld.type, reinterpret_cast<void*>(o.bias), row);
        narrow(ld.type, pd, at, sum);
      }
    }
  }
}

}  // namespace

#define BLAS extern "C" __attribute__((visibility("default"))) Result
#define ENTER_BLAS(function)   \
  EnterBlas entered(function); \
  if (entered.status != kOk) return entered.status
#define ALIVE(object) \
  if (!live<std::remove_pointer_t<decltype(object)>>().count(object)) return kBlasMisuse

BLAS cublasLtGetProperty(int property, int* value) {
  if (const Result failure = blasFailure("cublasLtGetProperty")) return failure;
  if (property < 0 || property > 2) return kBlasMisuse;
  *value = blasVersion(property);
  return kOk;
}

BLAS cublasLtCreate(BlasHandle** handle) {
  ENTER_BLAS("cublasLtCreate");
  return makeBlas(handle);
}

BLAS cublasLtDestroy(BlasHandle* handle) {
  Enter entered;
  return endBlas(handle);
}

BLAS cublasLtMatmulDescCreate(Operation** operation, int compute, int scale) {
  ENTER_BLAS("cublasLtMatmulDescCreate");
  return makeBlas(operation, compute, scale);
}

BLAS cublasLtMatmulDescDestroy(Operation* operation) {
  Enter entered;
  return endBlas(operation);
}

BLAS cublasLtMatmulDescSetAttribute(Operation* operation, int attribute, const void* value, size_t bytes) {
  ENTER_BLAS("cublasLtMatmulDescSetAttribute");
  ALIVE(operation);
  switch (attribute) {
    case 3:
      return take(&operation->transA, value, bytes);
    case 4:
      return take(&operation->transB, value, bytes);
    case 7:
      return take(&operation->epilogue, value, bytes);
    case 8:
      return take(&operation->bias, value, bytes);
  }
  return kBlasMisuse;
}

BLAS cublasLtMatrixLayoutCreate(Layout** layout, int type, uint64_t rows, uint64_t cols, int64_t ld) {
  ENTER_BLAS("cublasLtMatrixLayoutCreate");
  return makeBlas(layout, type, rows, cols, ld);
}

BLAS cublasLtMatrixLayoutDestroy(Layout* layout) {
  Enter entered;
  return endBlas(layout);
}

BLAS cublasLtMatrixLayoutSetAttribute(Layout* layout, int attribute, const void* value, size_t bytes) {
  ENTER_BLAS("cublasLtMatrixLayoutSetAttribute");
  ALIVE(layout);
  if (attribute == 5) return take(&layout->batch, value, bytes);
  if (attribute == 6) return take(&layout->stride, value, bytes);
  return kBlasMisuse;
}

BLAS cublasLtMatmulPreferenceCreate(Preference** preference) {
  ENTER_BLAS("cublasLtMatmulPreferenceCreate");
  return makeBlas(preference);
}

BLAS cublasLtMatmulPreferenceDestroy(Preference* preference) {
  Enter entered;
  return endBlas(preference);
}

#ifndef FAKE_CUDA_OLD
BLAS cublasLtMatmulPreferenceSetAttribute(Preference* preference, int attribute, const void* value, size_t bytes) {
  ENTER_BLAS("cublasLtMatmulPreferenceSetAttribute");
  ALIVE(preference);
  switch (attribute) {
    case 1:
      return take(&preference->workspace, value, bytes);
    case 3:
      return take(&preference->reductions, value, bytes);
    case 5:
      return take(&preference->alignA, value, bytes);
    case 6:
      return take(&preference->alignB, value, bytes);
    case 7:
      return take(&preference->alignC, value, bytes);
    case 8:
      return take(&preference->alignD, value, bytes);
    case 11:
      return blasVersion(0) < 12 ? take(&preference->epilogues, value, bytes) : kBlasMisuse;
  }
  return kBlasMisuse;
}
#endif

BLAS cublasLtMatmulAlgoGetHeuristic(BlasHandle* handle, Operation* operation, Layout* a, Layout* b, Layout* c, Layout* d,
                                    Preference* preference, int most, Heuristic* found, int* count) {
  ENTER_BLAS("cublasLtMatmulAlgoGetHeuristic");
  ALIVE(handle);
  ALIVE(operation);
  ALIVE(preference);
  for (Layout* layout : {a, b, c, d}) ALIVE(layout);
  *count = 0;
  if (most < 1 || preference->reductions != 2) return kBlasMisuse;
  if (const Result wrong = checkProduct(*operation, *a, *b, *c, *d)) return wrong;
  const Preference& p = *preference;
  for (const uint32_t align : {p.alignA, p.alignB, p.alignC, p.alignD}) {
    if (!align || align > 256 || align & (align - 1)) return kBlasMisuse;
  }
  if (a->type == kI8 && (p.alignA < 4 || p.alignB < 4)) return kBlasNotSupported;
  if (operation->epilogue == 4 && blasVersion(0) < 12 && p.epilogues != 4) return kBlasNotSupported;
  // One whose state is bad, one that wants more than there is, and the one to take.
  const uint64_t workspace = number("BLAS_WORKSPACE", 0), product = productOf(*operation, *a, *b, *c);
  if (text("BLAS_FOUND", "") == "none") return kOk;
  for (int i = 0; i < 3 && i < most; i++) {
    found[i] = {};
    found[i].algorithm = {product, p.alignA, p.alignB, p.alignC, p.alignD, workspace, {}};
    found[i].workspace = i == 1 ? p.workspace + 1 : workspace;
    found[i].state = i == 0 ? Result{kBlasNotSupported} : Result{kOk};
    found[i].waves = 0.5f;
    if (i < 2) found[i].algorithm.product++;
    (*count)++;
  }
  return kOk;
}

BLAS cublasLtMatmul(BlasHandle* handle, Operation* operation, const void* alpha, Address a, Layout* layoutA, Address b,
                    Layout* layoutB, const void* beta, Address c, Layout* layoutC, Address d, Layout* layoutD,
                    const Algorithm* algorithm, Address workspace, size_t workspaceBytes, Stream* stream) {
  ENTER_BLAS("cublasLtMatmul");
  ALIVE(handle);
  ALIVE(operation);
  for (Layout* layout : {layoutA, layoutB, layoutC, layoutD}) ALIVE(layout);
  if (const Result wrong = checkProduct(*operation, *layoutA, *layoutB, *layoutC, *layoutD)) return wrong;
  if (!driver.streams.count(stream) || !algorithm || c != d) return kBlasMisuse;
  uint32_t one, zero;
  memcpy(&one, alpha, 4);
  memcpy(&zero, beta, 4);
  if (one != (operation->scale == kI32 ? 1u : 0x3f800000u) || zero != 0) return kBlasMisuse;
  if (algorithm->product != productOf(*operation, *layoutA, *layoutB, *layoutC)) return kBlasMisuse;
  if (a % algorithm->alignA || b % algorithm->alignB || c % algorithm->alignC || d % algorithm->alignD)
    return kBlasMisuse;
  if (workspaceBytes < algorithm->workspace || (workspaceBytes && !covers(workspace, workspaceBytes)) || workspace % 256)
    return kBlasMisuse;
  if (!layoutA->covered(a) || !layoutB->covered(b) || !layoutD->covered(d)) return kBlasMisuse;
  if (operation->epilogue == 4 && !covers(operation->bias, layoutD->rows * layoutD->bytes())) return kBlasMisuse;
  enqueueWork(stream, [o = *operation, la = *layoutA, lb = *layoutB, ld = *layoutD, a, b, d, workspace, workspaceBytes] {
    if (workspaceBytes) memset(reinterpret_cast<void*>(workspace), 0x5a, workspaceBytes);
    multiply(o, la, lb, ld, a, b, d);
  });
  return kOk;
}
