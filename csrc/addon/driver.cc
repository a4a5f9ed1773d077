#include "driver.h"

#include <dlfcn.h>

#include <cstdio>

#include "glibc.h"

namespace cuda {

void* Driver::openLibrary(const char* path, char* detail, size_t size) {
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    const char* words = dlerror();
    snprintf(detail, size, "%s", words ? words : path);
  }
  return library;
}

bool Driver::find(void* library, char* detail, size_t size) {
#define HALFBYTE_FIND(member, symbol, parameters)                          \
  member = reinterpret_cast<Result(*) parameters>(dlsym(library, symbol)); \
  if (!member) {                                                           \
    snprintf(detail, size, "%s", symbol);                                  \
    return false;                                                          \
  }
  HALFBYTE_DRIVER(HALFBYTE_FIND)
#undef HALFBYTE_FIND
#define HALFBYTE_FIND(member, symbol, parameters) \
  member = reinterpret_cast<Result(*) parameters>(dlsym(library, symbol));
  HALFBYTE_DRIVER_MANAGED(HALFBYTE_FIND)
#undef HALFBYTE_FIND
  return true;
}

}  // namespace cuda
