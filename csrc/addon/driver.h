// The CUDA driver API as far as the addon calls it, found at run time. The prototypes are declared here, so nothing of
// CUDA is needed to build, nor linked.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cuda {

using Result = int;
using Device = int;
using Address = uint64_t;
using Context = struct OpaqueContext*;
using Stream = struct OpaqueStream*;
using Event = struct OpaqueEvent*;
using Module = struct OpaqueModule*;
using Function = struct OpaqueFunction*;
struct Uuid {
  unsigned char bytes[16];
};

constexpr Result kInvalidImage = 200;
constexpr Result kInvalidContext = 201;
constexpr unsigned kStreamNonBlocking = 1;
constexpr unsigned kEventBlockingSync = 1;
constexpr unsigned kEventDisableTiming = 2;
constexpr unsigned kMemAttachGlobal = 1;
constexpr int kJitErrorLogBuffer = 5;
constexpr int kJitErrorLogBufferSizeBytes = 6;

// Member, exported name, parameters. Every one is in the driver since CUDA 11.4.
#define HALFBYTE_DRIVER(X)                                                                                \
  X(init, "cuInit", (unsigned flags))                                                                     \
  X(driverGetVersion, "cuDriverGetVersion", (int* version))                                               \
  X(getErrorName, "cuGetErrorName", (Result error, const char** name))                                    \
  X(getErrorString, "cuGetErrorString", (Result error, const char** words))                               \
  X(deviceGet, "cuDeviceGet", (Device * device, int ordinal))                                             \
  X(deviceGetCount, "cuDeviceGetCount", (int* count))                                                     \
  X(deviceGetAttribute, "cuDeviceGetAttribute", (int* value, int attribute, Device device))               \
  X(deviceGetName, "cuDeviceGetName", (char* name, int length, Device device))                            \
  X(deviceGetUuid, "cuDeviceGetUuid", (Uuid * uuid, Device device))                                       \
  X(deviceTotalMem, "cuDeviceTotalMem_v2", (size_t* bytes, Device device))                                \
  X(primaryContextRetain, "cuDevicePrimaryCtxRetain", (Context * context, Device device))                 \
  X(primaryContextRelease, "cuDevicePrimaryCtxRelease_v2", (Device device))                               \
  X(primaryContextState, "cuDevicePrimaryCtxGetState", (Device device, unsigned* flags, int* active))     \
  X(contextSetCurrent, "cuCtxSetCurrent", (Context context))                                              \
  X(memGetInfo, "cuMemGetInfo_v2", (size_t* free, size_t* total))                                         \
  X(memAlloc, "cuMemAlloc_v2", (Address * address, size_t bytes))                                         \
  X(memFree, "cuMemFree_v2", (Address address))                                                           \
  X(memHostAlloc, "cuMemHostAlloc", (void** host, size_t bytes, unsigned flags))                          \
  X(memFreeHost, "cuMemFreeHost", (void* host))                                                           \
  X(memcpyHtoDAsync, "cuMemcpyHtoDAsync_v2", (Address to, const void* from, size_t bytes, Stream stream)) \
  X(memcpyDtoHAsync, "cuMemcpyDtoHAsync_v2", (void* to, Address from, size_t bytes, Stream stream))       \
  X(memcpyDtoDAsync, "cuMemcpyDtoDAsync_v2", (Address to, Address from, size_t bytes, Stream stream))     \
  X(memsetD8Async, "cuMemsetD8Async", (Address to, unsigned char value, size_t count, Stream stream))     \
  X(memsetD32Async, "cuMemsetD32Async", (Address to, unsigned value, size_t count, Stream stream))        \
  X(streamCreate, "cuStreamCreate", (Stream * stream, unsigned flags))                                    \
  X(streamDestroy, "cuStreamDestroy_v2", (Stream stream))                                                 \
  X(streamSynchronize, "cuStreamSynchronize", (Stream stream))                                            \
  X(streamQuery, "cuStreamQuery", (Stream stream))                                                        \
  X(eventCreate, "cuEventCreate", (Event * event, unsigned flags))                                        \
  X(eventDestroy, "cuEventDestroy_v2", (Event event))                                                     \
  X(eventRecord, "cuEventRecord", (Event event, Stream stream))                                           \
  X(eventQuery, "cuEventQuery", (Event event))                                                            \
  X(eventSynchronize, "cuEventSynchronize", (Event event))                                                \
  X(eventElapsedTime, "cuEventElapsedTime", (float* milliseconds, Event start, Event end))                \
  X(moduleLoadDataEx, "cuModuleLoadDataEx",                                                               \
    (Module * module, const void* image, unsigned options, int* option, void** values))                   \
  X(moduleUnload, "cuModuleUnload", (Module module))                                                      \
  X(moduleGetFunction, "cuModuleGetFunction", (Function * function, Module module, const char* name))     \
  X(funcGetAttribute, "cuFuncGetAttribute", (int* value, int attribute, Function function))               \
  X(funcSetAttribute, "cuFuncSetAttribute", (Function function, int attribute, int value))                \
  X(occupancy, "cuOccupancyMaxActiveBlocksPerMultiprocessor",                                             \
    (int* blocks, Function function, int threads, size_t shared))                                         \
  X(launchKernel, "cuLaunchKernel",                                                                       \
    (Function function, unsigned gridX, unsigned gridY, unsigned gridZ, unsigned blockX, unsigned blockY, \
     unsigned blockZ, unsigned shared, Stream stream, void** params, void** extra))

// Managed memory, which nothing else needs: a driver that lacks one of these serves the rest, and the member is null. The
// names are those of CUDA 8: CUDA 13's header maps the last two to _v2, whose location is a struct that older drivers do
// not know, while every driver exports these.
#define HALFBYTE_DRIVER_MANAGED(X)                                                              \
  X(memAllocManaged, "cuMemAllocManaged", (Address * address, size_t bytes, unsigned flags))    \
  X(memAdvise, "cuMemAdvise", (Address address, size_t bytes, int advice, Device device))       \
  X(memPrefetchAsync, "cuMemPrefetchAsync", (Address address, size_t bytes, Device to, Stream stream))

struct Driver {
#define HALFBYTE_MEMBER(member, symbol, parameters) Result(*member) parameters;
  HALFBYTE_DRIVER(HALFBYTE_MEMBER)
  HALFBYTE_DRIVER_MANAGED(HALFBYTE_MEMBER)
#undef HALFBYTE_MEMBER

  // Both say in `detail` what went wrong. A library that lacks a function stays open: a driver does not like to be
  // closed.
  static void* openLibrary(const char* path, char* detail, size_t size);
  bool find(void* library, char* detail, size_t size);
};

}  // namespace cuda
