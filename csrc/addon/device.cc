// The library, devices and the context.
#include <cstdio>
#include <cstring>
#include <initializer_list>

#include "addon.h"

namespace {

// Not behind `entry`: it is what makes the calling environment the owner.
Status openFor(Call& call) {
  char path[sizeof addon.libraryPath] = "libcuda.so.1";
  if (!call.isUndefined(0) && !call.string(0, "path", path, sizeof path)) return call.status;
  if (addon.library) {
    if (strcmp(path, addon.libraryPath) == 0) return 0;
    return addon.fail(abi::badArgument, "argument 1 (path): %.4000s is open already", addon.libraryPath);
  }
  void* library = cuda::Driver::openLibrary(path, addon.detail, sizeof addon.detail);
  if (!library) return abi::noLibrary;
  if (!addon.driver.find(library, addon.detail, sizeof addon.detail)) return abi::missingSymbol;
  snprintf(addon.libraryPath, sizeof addon.libraryPath, "%s", path);
  addon.library = library;
  return 0;
}

napi_value open(napi_env env, napi_callback_info info) {
  napi_env current = nullptr;
  const bool claimed = addon.owner.compare_exchange_strong(current, env);
  if (!claimed && current != env) return toNumber(env, abi::wrongThread);
  addon.detail[0] = 0;
  Call call(env, info);
  const Status status = openFor(call);
  if (claimed) {
    if (status) {
      addon.owner.store(nullptr);
    } else {
      napi_add_env_cleanup_hook(env, cleanUp, nullptr);
    }
  }
  return toNumber(env, status);
}

napi_value detail(napi_env env, napi_callback_info) {
  const napi_env owner = addon.owner.load();
  napi_value value = nullptr;
  napi_create_string_utf8(env, !owner || owner == env ? addon.detail : "", NAPI_AUTO_LENGTH, &value);
  return value;
}

const char* wordsFor(abi::Status status) {
  switch (status) {
    case abi::badArgument:
      return "an argument has the wrong type or range";
    case abi::badHandle:
      return "what the handle stood for does not exist, or no more";
    case abi::wrongThread:
      return "the driver library was opened by another thread";
    case abi::noLibrary:
      return "the driver library cannot be opened";
    case abi::missingSymbol:
      return "the driver library lacks a function";
    case abi::outOfHostMemory:
      return "host memory, handles or threads are exhausted";
    case abi::closed:
      return "the driver library has not been opened";
    case abi::notSupported:
      return "the library has no algorithm for this product";
  }
  return "unknown status";
}

const char* nameFor(Status status) {
  switch (status) {
#define HALFBYTE_NAME(name, number) \
  case number:                      \
    return #name;
    HALFBYTE_BINDING(HALFBYTE_NAME)
#undef HALFBYTE_NAME
  }
  return "unknown";
}

napi_value describe(napi_env env, napi_callback_info info) {
  Call call(env, info);
  Status status;
  const char *name = "unknown", *words = "unknown status";
  if (call.integer(0, "status", INT32_MIN, INT32_MAX, &status)) {
    if (status < 0) {
      name = nameFor(status);
      words = wordsFor(static_cast<abi::Status>(status));
      blas::describe(status, &name, &words);
    } else if (addon.admits(env) == 0) {
      const char *driverName = nullptr, *driverWords = nullptr;
      if (addon.driver.getErrorName(status, &driverName) == 0 && driverName) name = driverName;
      if (addon.driver.getErrorString(status, &driverWords) == 0 && driverWords) words = driverWords;
    }
  }
  napi_value pair = nullptr, value;
  napi_create_array_with_length(env, 2, &pair);
  if (napi_create_string_utf8(env, name, NAPI_AUTO_LENGTH, &value) == napi_ok) napi_set_element(env, pair, 0, value);
  if (napi_create_string_utf8(env, words, NAPI_AUTO_LENGTH, &value) == napi_ok) napi_set_element(env, pair, 1, value);
  return pair;
}

Status init(Call&) { return addon.driver.init(0); }

Status driverVersion(Call&) {
  int version = 0;
  const Status status = addon.driver.driverGetVersion(&version);
  addon.results[0] = version;
  return status;
}

Status deviceCount(Call&) {
  int count = 0;
  const Status status = addon.driver.deviceGetCount(&count);
  addon.results[0] = count;
  return status;
}

// The device of the call's first argument.
Status deviceOf(Call& call, cuda::Device* device) {
  int ordinal;
  if (!call.integer(0, "device", 0, INT32_MAX, &ordinal)) return call.status;
  return addon.driver.deviceGet(device, ordinal);
}

Status deviceAttribute(Call& call) {
  cuda::Device device;
  int attribute, value = 0;
  if (!call.integer(1, "attribute", 0, INT32_MAX, &attribute)) return call.status;
  if (const Status status = deviceOf(call, &device)) return status;
  const Status status = addon.driver.deviceGetAttribute(&value, attribute, device);
  addon.results[0] = value;
  return status;
}

bool setString(napi_env env, napi_value object, const char* name, const char* text) {
  napi_value value;
  if (napi_create_string_utf8(env, text, NAPI_AUTO_LENGTH, &value) == napi_ok &&
      napi_set_named_property(env, object, name, value) == napi_ok) {
    return true;
  }
  // A frozen object, a setter that throws.
  napi_value error;
  napi_get_and_clear_last_exception(env, &error);
  return false;
}

Status deviceIdentity(Call& call) {
  cuda::Device device;
  napi_value identity;
  if (!call.object(1, "identity", &identity)) return call.status;
  if (const Status status = deviceOf(call, &device)) return status;
  size_t bytes = 0;
  char name[256] = "";
  cuda::Uuid uuid = {};
  if (const Status status = addon.driver.deviceTotalMem(&bytes, device)) return status;
  if (const Status status = addon.driver.deviceGetName(name, sizeof name - 1, device)) return status;
  if (const Status status = addon.driver.deviceGetUuid(&uuid, device)) return status;
  char digits[2 * sizeof uuid.bytes + 1];
  for (size_t i = 0; i < sizeof uuid.bytes; i++) snprintf(digits + 2 * i, 3, "%02x", uuid.bytes[i]);
  addon.results[0] = static_cast<double>(bytes);
  if (setString(call.env, identity, "name", name) && setString(call.env, identity, "uuid", digits)) return 0;
  return addon.fail(abi::badArgument, "argument 2 (identity): expected an object that takes name and uuid");
}

Status retainContext(Call& call) {
  cuda::Device device;
  cuda::Context context = nullptr;
  if (const Status status = deviceOf(call, &device)) return status;
  if (addon.context) return addon.fail(abi::badArgument, "the context of device %d is retained already", addon.device);
  if (const Status status = addon.driver.primaryContextRetain(&context, device)) return status;
  if (const Status status = addon.driver.contextSetCurrent(context)) {
    addon.driver.primaryContextRelease(device);
    return status;
  }
  addon.context = context;
  addon.device = device;
  return 0;
}

Status releaseContextOf(Call&) { return releaseContext(); }

const Entry kEntries[] = {
    {"open", open},
    {"detail", detail},
    {"describe", describe},
    {"init", entry<init>},
    {"driverVersion", entry<driverVersion>},
    {"deviceCount", entry<deviceCount>},
    {"deviceAttribute", entry<deviceAttribute>},
    {"deviceIdentity", entry<deviceIdentity>},
    {"retainContext", entry<retainContext>},
    {"releaseContext", entry<releaseContextOf>},
};

void destroy(const Slot& slot) {
  const cuda::Driver& driver = addon.driver;
  switch (slot.kind) {
    case Kind::host:
      driver.memFreeHost(slot.object);
      break;
    case Kind::stream:
      driver.streamDestroy(slot.as<cuda::Stream>());
      break;
    case Kind::event:
      driver.eventDestroy(slot.as<cuda::Event>());
      break;
    case Kind::module:
      driver.moduleUnload(slot.as<cuda::Module>());
      break;
    case Kind::function:
    case Kind::none:
      break;
  }
}

}  // namespace

Status releaseContext() {
  if (!addon.context) return 0;
  addon.completion.hold(false);
  addon.completion.stop();
  // Work may still use memory and modules. After a fault this and all the rest fails at once, which changes nothing.
  for (const Kind kind : {Kind::stream, Kind::event, Kind::module, Kind::function, Kind::host}) {
    for (uint32_t i = 0; i < addon.handles.size(); i++) {
      Slot* slot = addon.handles.at(i);
      if (slot->kind != kind) continue;
      if (kind == Kind::stream) addon.driver.streamSynchronize(slot->as<cuda::Stream>());
      destroy(*slot);
      addon.handles.drop(slot);
    }
  }
  addon.products.release();
  for (cuda::Address address; addon.allocations.takeLast(&address);) addon.driver.memFree(address);
  addon.context = nullptr;
  const Status status = addon.driver.primaryContextRelease(addon.device);
  // Another user of the driver on this thread, a second copy of the package say, may go on in the same context.
  unsigned flags;
  int active = 0;
  addon.driver.primaryContextState(addon.device, &flags, &active);
  if (!active) addon.driver.contextSetCurrent(nullptr);
  return status;
}

bool exportDevice(napi_env env, napi_value exports) {
  return exportAll(env, exports, kEntries, sizeof kEntries / sizeof *kEntries);
}
