#include "addon.h"

Addon addon;

namespace {

// Both buffers are the addon's own memory, so that detaching them in JavaScript leaves no dangling pointer here.
bool exportBuffers(napi_env env, napi_value exports) {
  napi_value command, buffer, results;
  return napi_create_external_arraybuffer(env, addon.command, abi::commandOperands + abi::maxOperandBytes, nullptr,
                                          nullptr, &command) == napi_ok &&
         napi_set_named_property(env, exports, "command", command) == napi_ok &&
         napi_create_external_arraybuffer(env, addon.results, sizeof addon.results, nullptr, nullptr, &buffer) ==
             napi_ok &&
         napi_create_typedarray(env, napi_float64_array, sizeof addon.results / sizeof(double), buffer, 0, &results) ==
             napi_ok &&
         napi_set_named_property(env, exports, "results", results) == napi_ok;
}

}  // namespace

NAPI_MODULE_INIT() {
  if (!exportBuffers(env, exports) || !exportDevice(env, exports) || !exportMemory(env, exports) ||
      !exportStream(env, exports) || !exportModule(env, exports) || !exportBlas(env, exports)) {
    // Runtimes with a memory cage (Electron) refuse memory that is not V8's.
    napi_throw_error(env, nullptr, "its memory cannot be shared with JavaScript here");
    return nullptr;
  }
  return exports;
}
