// The addon's one state and what every function of its interface (src/backend/cuda/addon.ts) is made of.
#pragma once

#define NAPI_VERSION 8
#include <node_api.h>

#include <atomic>

#include "blas.h"
#include "completion.h"
#include "driver.h"
#include "generated/abi.h"
#include "table.h"

using Status = int;

// One per process. It belongs to the environment that called `open`, hence to that environment's thread.
struct Addon {
  // A kernel that takes more than `abi::maxOperandBytes` must not make the driver read past the end: CUDA's limit is
  // 32,764.
  alignas(64) unsigned char command[abi::commandOperands + 32768];
  double results[4];
  char detail[8192];
  char libraryPath[4096];

  std::atomic<napi_env> owner;
  void* library;
  cuda::Driver driver;
  // Null while no device is retained.
  cuda::Context context;
  cuda::Device device;
  Handles handles;
  Allocations allocations;
  Completion completion;
  blas::Blas products;

  // Success when this environment may call the driver.
  Status admits(napi_env env) const {
    const napi_env current = owner.load(std::memory_order_relaxed);
    if (current == env) return 0;
    return current ? abi::wrongThread : abi::closed;
  }

  // Puts words into `detail` and returns `status`.
  __attribute__((format(printf, 3, 4))) Status fail(Status status, const char* format, ...);
};

extern Addon addon;

struct Bytes {
  unsigned char* data;
  size_t length;
};

// The arguments of one call. Each getter checks one of them; when it returns false, `status` says why.
class Call {
 public:
  Call(napi_env env, napi_callback_info info);

  bool integer(int at, const char* name, double low, double high, double* value);
  template <typename T>
  bool integer(int at, const char* name, double low, double high, T* value) {
    double number;
    if (!integer(at, name, low, high, &number)) return false;
    *value = static_cast<T>(number);
    return true;
  }
  bool boolean(int at, const char* name, bool* value);
  // At most `size` - 1 bytes of UTF-8 without NUL.
  bool string(int at, const char* name, char* value, size_t size);
  bool bytes(int at, const char* name, Bytes* value);
  bool function(int at, const char* name, napi_value* value);
  bool object(int at, const char* name, napi_value* value);
  bool handle(int at, const char* name, Kind kind, Slot** slot);
  // A range of one live allocation: an address at `at`, its length at `bytesAt`.
  bool range(int at, const char* name, int bytesAt, cuda::Address* address, uint64_t* bytes);
  bool isUndefined(int at) const;

  const napi_env env;
  Status status = 0;

 private:
  static constexpr int kMost = 5;
  bool wrong(int at, const char* name, const char* expected);
  napi_valuetype typeOf(int at) const;
  napi_value arguments_[kMost];
};

constexpr double kMaxInteger = 9007199254740991.0;

napi_value toNumber(napi_env env, Status status);

// A function of the interface, as N-API calls it.
template <Status (*body)(Call&)>
napi_value entry(napi_env env, napi_callback_info info) {
  if (const Status refused = addon.admits(env)) return toNumber(env, refused);
  addon.detail[0] = 0;
  Call call(env, info);
  return toNumber(env, body(call));
}

struct Entry {
  const char* name;
  napi_callback callback;
};

// Each file's share of the interface.
bool exportDevice(napi_env env, napi_value exports);
bool exportMemory(napi_env env, napi_value exports);
bool exportStream(napi_env env, napi_value exports);
bool exportModule(napi_env env, napi_value exports);
bool exportBlas(napi_env env, napi_value exports);
bool exportAll(napi_env env, napi_value exports, const Entry* entries, size_t count);

// The owning environment ends; `open` adds this as its hook.
void cleanUp(void*);

// Ends the completion thread, destroys what handles stand for and releases the context, if there is one.
Status releaseContext();
