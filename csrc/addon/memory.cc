// Device memory, managed memory, page-locked host memory, copies and fills.
#include <cstring>

#include "addon.h"

namespace {

Status memoryInfo(Call&) {
  size_t free = 0, total = 0;
  const Status status = addon.driver.memGetInfo(&free, &total);
  addon.results[0] = static_cast<double>(free);
  addon.results[1] = static_cast<double>(total);
  return status;
}

template <typename Allocate>
Status allocate(Call& call, Allocate from) {
  uint64_t bytes;
  cuda::Address address = 0;
  if (!call.integer(0, "bytes", 1, kMaxInteger, &bytes)) return call.status;
  if (!addon.allocations.reserve()) return abi::outOfHostMemory;
  if (const Status status = from(&address, bytes)) return status;
  if (address > static_cast<uint64_t>(kMaxInteger) - bytes) {
    addon.driver.memFree(address);
    return addon.fail(abi::badArgument, "the driver's address does not fit a number");
  }
  addon.allocations.add(address, bytes);
  addon.results[0] = static_cast<double>(address);
  return 0;
}

Status memoryAllocate(Call& call) { return allocate(call, addon.driver.memAlloc); }

Status lacking(const char* symbol) { return addon.fail(abi::missingSymbol, "%s", symbol); }

Status memoryAllocateManaged(Call& call) {
  if (!addon.driver.memAllocManaged) return lacking("cuMemAllocManaged");
  return allocate(call, [](cuda::Address* address, size_t bytes) {
    return addon.driver.memAllocManaged(address, bytes, cuda::kMemAttachGlobal);
  });
}

// The device of a number that JavaScript gives, or the host.
bool place(Call& call, int at, cuda::Device* device) {
  int ordinal;
  if (!call.integer(at, "device", abi::host, INT32_MAX, &ordinal)) return false;
  *device = abi::host;
  if (ordinal != abi::host) call.status = addon.driver.deviceGet(device, ordinal);
  return call.status == 0;
}

Status memoryAdvise(Call& call) {
  cuda::Address address;
  uint64_t bytes;
  int advice;
  cuda::Device device;
  if (!addon.driver.memAdvise) return lacking("cuMemAdvise");
  if (!call.range(0, "address", 1, &address, &bytes) || !call.integer(2, "advice", 1, INT32_MAX, &advice) ||
      !place(call, 3, &device)) {
    return call.status;
  }
  return addon.driver.memAdvise(address, bytes, advice, device);
}

Status memoryPrefetch(Call& call) {
  cuda::Address address;
  uint64_t bytes;
  cuda::Device to;
  Slot* stream;
  if (!addon.driver.memPrefetchAsync) return lacking("cuMemPrefetchAsync");
  if (!call.range(0, "address", 1, &address, &bytes) || !call.handle(3, "stream", Kind::stream, &stream) ||
      !place(call, 2, &to)) {
    return call.status;
  }
  return addon.driver.memPrefetchAsync(address, bytes, to, stream->as<cuda::Stream>());
}

Status memoryFree(Call& call) {
  cuda::Address address;
  if (!call.integer(0, "address", 0, kMaxInteger, &address)) return call.status;
  if (addon.allocations.remove(address)) return addon.driver.memFree(address);
  return addon.fail(abi::badHandle, "argument 1 (address): nothing is allocated at %llu",
                    static_cast<unsigned long long>(address));
}

Status hostAllocate(Call& call) {
  uint64_t bytes;
  if (!call.integer(0, "bytes", 1, kMaxInteger, &bytes)) return call.status;
  Slot* slot = addon.handles.take(Kind::host);
  if (!slot) return abi::outOfHostMemory;
  if (const Status status = addon.driver.memHostAlloc(&slot->object, bytes, 0)) {
    addon.handles.drop(slot);
    return status;
  }
  slot->extra = bytes;
  addon.results[0] = addon.handles.handleOf(slot);
  return 0;
}

Status hostFree(Call& call) {
  Slot* slot;
  if (!call.handle(0, "host", Kind::host, &slot)) return call.status;
  const Status status = addon.driver.memFreeHost(slot->object);
  addon.handles.drop(slot);
  return status;
}

// Bytes of page-locked memory: a handle at `at`, then an offset.
bool hostRange(Call& call, int at, uint64_t bytes, unsigned char** host) {
  Slot* slot;
  uint64_t offset;
  if (!call.handle(at, "host", Kind::host, &slot) || !call.integer(at + 1, "offset", 0, kMaxInteger, &offset))
    return false;
  if (offset <= slot->extra && bytes <= slot->extra - offset) {
    *host = static_cast<unsigned char*>(slot->object) + offset;
    return true;
  }
  call.status = addon.fail(abi::badArgument,
                           "argument %d (offset): %llu bytes at %llu are not inside the %llu of the host memory",
                           at + 2, static_cast<unsigned long long>(bytes), static_cast<unsigned long long>(offset),
                           static_cast<unsigned long long>(slot->extra));
  return false;
}

Status hostRead(Call& call) {
  Bytes into;
  unsigned char* host;
  if (!call.bytes(2, "into", &into) || !hostRange(call, 0, into.length, &host)) return call.status;
  if (into.length) memcpy(into.data, host, into.length);
  return 0;
}

Status hostWrite(Call& call) {
  Bytes from;
  unsigned char* host;
  if (!call.bytes(2, "from", &from) || !hostRange(call, 0, from.length, &host)) return call.status;
  if (from.length) memcpy(host, from.data, from.length);
  return 0;
}

Status copyFromHost(Call& call) {
  cuda::Address to;
  uint64_t bytes;
  unsigned char* host;
  Slot* stream;
  if (!call.range(0, "to", 3, &to, &bytes) || !hostRange(call, 1, bytes, &host) ||
      !call.handle(4, "stream", Kind::stream, &stream)) {
    return call.status;
  }
  return addon.driver.memcpyHtoDAsync(to, host, bytes, stream->as<cuda::Stream>());
}

Status copyToHost(Call& call) {
  cuda::Address from;
  uint64_t bytes;
  unsigned char* host;
  Slot* stream;
  if (!call.range(2, "from", 3, &from, &bytes) || !hostRange(call, 0, bytes, &host) ||
      !call.handle(4, "stream", Kind::stream, &stream)) {
    return call.status;
  }
  return addon.driver.memcpyDtoHAsync(host, from, bytes, stream->as<cuda::Stream>());
}

Status copyOnDevice(Call& call) {
  cuda::Address to, from;
  uint64_t bytes;
  Slot* stream;
  if (!call.range(0, "to", 2, &to, &bytes) || !call.range(1, "from", 2, &from, &bytes) ||
      !call.handle(3, "stream", Kind::stream, &stream)) {
    return call.status;
  }
  return addon.driver.memcpyDtoDAsync(to, from, bytes, stream->as<cuda::Stream>());
}

Status fill8(Call& call) {
  cuda::Address to;
  uint64_t bytes;
  unsigned char value;
  Slot* stream;
  if (!call.range(0, "to", 2, &to, &bytes) || !call.integer(1, "value", 0, UINT8_MAX, &value) ||
      !call.handle(3, "stream", Kind::stream, &stream)) {
    return call.status;
  }
  return addon.driver.memsetD8Async(to, value, bytes, stream->as<cuda::Stream>());
}

Status fill32(Call& call) {
  cuda::Address to;
  uint64_t bytes;
  unsigned value;
  Slot* stream;
  if (!call.range(0, "to", 2, &to, &bytes) || !call.integer(1, "value", 0, UINT32_MAX, &value) ||
      !call.handle(3, "stream", Kind::stream, &stream)) {
    return call.status;
  }
  if ((to | bytes) % 4 != 0) return addon.fail(abi::badArgument, "address and bytes: expected multiples of 4");
  return addon.driver.memsetD32Async(to, value, bytes / 4, stream->as<cuda::Stream>());
}

const Entry kEntries[] = {
    {"memoryInfo", entry<memoryInfo>},
    {"memoryAllocate", entry<memoryAllocate>},
    {"memoryAllocateManaged", entry<memoryAllocateManaged>},
    {"memoryAdvise", entry<memoryAdvise>},
    {"memoryPrefetch", entry<memoryPrefetch>},
    {"memoryFree", entry<memoryFree>},
    {"hostAllocate", entry<hostAllocate>},
    {"hostFree", entry<hostFree>},
    {"hostRead", entry<hostRead>},
    {"hostWrite", entry<hostWrite>},
    {"copyFromHost", entry<copyFromHost>},
    {"copyToHost", entry<copyToHost>},
    {"copyOnDevice", entry<copyOnDevice>},
    {"fill8", entry<fill8>},
    {"fill32", entry<fill32>},
};

}  // namespace

bool exportMemory(napi_env env, napi_value exports) {
  return exportAll(env, exports, kEntries, sizeof kEntries / sizeof *kEntries);
}
