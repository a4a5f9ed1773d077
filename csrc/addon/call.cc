// Arguments from JavaScript: whatever comes, it is checked and named.
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "addon.h"

Status Addon::fail(Status status, const char* format, ...) {
  va_list list;
  va_start(list, format);
  vsnprintf(detail, sizeof detail, format, list);
  va_end(list);
  return status;
}

Call::Call(napi_env e, napi_callback_info info) : env(e) {
  size_t count = kMost;
  // Arguments that were not passed come as undefined.
  if (napi_get_cb_info(env, info, &count, arguments_, nullptr, nullptr) != napi_ok)
    memset(arguments_, 0, sizeof arguments_);
}

napi_valuetype Call::typeOf(int at) const {
  napi_valuetype type = napi_undefined;
  if (arguments_[at]) napi_typeof(env, arguments_[at], &type);
  return type;
}

bool Call::isUndefined(int at) const { return typeOf(at) == napi_undefined; }

bool Call::wrong(int at, const char* name, const char* expected) {
  static const char* const kTypes[] = {"undefined", "null",      "a boolean",  "a number",    "a string",
                                       "a symbol",  "an object", "a function", "an external", "a bigint"};
  const napi_valuetype type = typeOf(at);
  double number;
  if (type == napi_number && napi_get_value_double(env, arguments_[at], &number) == napi_ok) {
    status =
        addon.fail(abi::badArgument, "argument %d (%s): expected %s, received %.17g", at + 1, name, expected, number);
  } else {
    const char* received = type <= napi_bigint ? kTypes[type] : "something else";
    status =
        addon.fail(abi::badArgument, "argument %d (%s): expected %s, received %s", at + 1, name, expected, received);
  }
  return false;
}

bool Call::integer(int at, const char* name, double low, double high, double* value) {
  if (napi_get_value_double(env, arguments_[at], value) == napi_ok && *value >= low && *value <= high &&
      *value == std::trunc(*value)) {
    return true;
  }
  char expected[96];
  snprintf(expected, sizeof expected, "an integer from %.0f to %.0f", low, high);
  return wrong(at, name, expected);
}

bool Call::boolean(int at, const char* name, bool* value) {
  return napi_get_value_bool(env, arguments_[at], value) == napi_ok || wrong(at, name, "a boolean");
}

bool Call::string(int at, const char* name, char* value, size_t size) {
  size_t length = 0, written = 0;
  if (napi_get_value_string_utf8(env, arguments_[at], nullptr, 0, &length) != napi_ok)
    return wrong(at, name, "a string");
  if (length < size && napi_get_value_string_utf8(env, arguments_[at], value, size, &written) == napi_ok &&
      strlen(value) == length) {
    return true;
  }
  char expected[96];
  snprintf(expected, sizeof expected, "a string of at most %zu bytes without NUL", size - 1);
  return wrong(at, name, expected);
}

bool Call::bytes(int at, const char* name, Bytes* value) {
  bool typed = false;
  napi_typedarray_type type = napi_int8_array;
  void* data = nullptr;
  if (arguments_[at] && napi_is_typedarray(env, arguments_[at], &typed) == napi_ok && typed &&
      napi_get_typedarray_info(env, arguments_[at], &type, &value->length, &data, nullptr, nullptr) == napi_ok &&
      type == napi_uint8_array) {
    value->data = static_cast<unsigned char*>(data);
    if (!data) value->length = 0;
    return true;
  }
  return wrong(at, name, "a Uint8Array");
}

bool Call::function(int at, const char* name, napi_value* value) {
  *value = arguments_[at];
  return typeOf(at) == napi_function || wrong(at, name, "a function");
}

bool Call::object(int at, const char* name, napi_value* value) {
  *value = arguments_[at];
  return typeOf(at) == napi_object || wrong(at, name, "an object");
}

bool Call::handle(int at, const char* name, Kind kind, Slot** slot) {
  uint32_t number;
  if (!integer(at, name, 0, UINT32_MAX, &number)) return false;
  *slot = addon.handles.find(number, kind);
  if (!*slot) status = addon.fail(abi::badHandle, "argument %d (%s): there is no %u, or no more", at + 1, name, number);
  return *slot;
}

bool Call::range(int at, const char* name, int bytesAt, cuda::Address* address, uint64_t* bytes) {
  if (!integer(at, name, 0, kMaxInteger, address) || !integer(bytesAt, "bytes", 0, kMaxInteger, bytes)) return false;
  if (addon.allocations.contain(*address, *bytes)) return true;
  status = addon.fail(abi::badArgument, "argument %d (%s): %llu bytes at %llu are not inside an allocation", at + 1,
                      name, static_cast<unsigned long long>(*bytes), static_cast<unsigned long long>(*address));
  return false;
}

napi_value toNumber(napi_env env, Status status) {
  napi_value value = nullptr;
  napi_create_int32(env, status, &value);
  return value;
}

bool exportAll(napi_env env, napi_value exports, const Entry* entries, size_t count) {
  for (size_t i = 0; i < count; i++) {
    napi_value function;
    if (napi_create_function(env, entries[i].name, NAPI_AUTO_LENGTH, entries[i].callback, nullptr, &function) !=
            napi_ok ||
        napi_set_named_property(env, exports, entries[i].name, function) != napi_ok) {
      return false;
    }
  }
  return true;
}
