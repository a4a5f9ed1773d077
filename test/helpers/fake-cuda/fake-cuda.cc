// A CUDA driver without a GPU, for tests: the entry points that the addon uses, over host memory. Device memory is
// malloc'd; each stream is a thread that does its work in order, so what is asynchronous on a GPU is asynchronous here.
// Strict where a driver may be lenient: a call without a current context, a stale handle, a range outside an allocation
// are errors, a call after the process began to exit (a real driver may crash) aborts.
//
// Environment variables, all HALFBYTE_FAKE_CUDA_...:
//   INIT=segv | abort | hang | STATUS   what cuInit does; 34, as the toolkit's stub does, cuDriverGetVersion too
//   VERSION=13000                       cuDriverGetVersion
//   DEVICES=1                           0: cuInit returns CUDA_ERROR_NO_DEVICE
//   CAPABILITY=8.7  SHARED=166912  INTEGRATED=1  MULTIPROCESSORS=8  NAME=Fake Orin  POOLS=1
//   MANAGED=0                           concurrentManagedAccess; without it managed memory takes device memory, and can be
//                                       neither advised about nor prefetched
//   MANAGED_MEMORY=1                    0: there is none
//   MANAGED_LIMIT=8589934592            bytes of managed memory where MANAGED is 1
//   ADVISE=STATUS  PREFETCH=STATUS      cuMemAdvise, cuMemPrefetchAsync fail so
//   MEMORY=8589934592                   bytes of device memory; more is CUDA_ERROR_OUT_OF_MEMORY
//   HOST_MEMORY=8589934592              the same of page-locked memory
//   DELAY_MS=0                          what each launch, copy and fill takes
//   MODULE=STATUS                       cuModuleLoadDataEx fails so (209: no code for the GPU), with a compiler log
//   LAUNCH=STATUS                       cuLaunchKernel fails so at once
//   FAULT_AT=N                          the Nth launch of the process runs into an illegal address (700), which sticks
//   BLAS_VERSION=12.6.4                 cublasLtGetProperty; the library is cuBLASLt as well
//   BLAS_FAIL=cublasLtMatmul=13         that function fails so
//   BLAS_FOUND=none                     no algorithm for any product
//   BLAS_WORKSPACE=0                    bytes that its algorithms need
//   REPORT=FILE                         gets a line "allocations=0 hosts=0 streams=0 events=0 modules=0" whenever the
//                                       context goes: what was still alive
//
// Any text or ELF is a module. If the text has ".entry", or the ELF ".text.NAME" sections, only those functions exist;
// otherwise every identifier does that does not begin with "missing". Kernels do nothing, but for
//   fake_store { u64 address; u32 value; u32 words }   stores words
//   fake_sleep { u32 milliseconds }
//   fake_fault { }                                     an illegal address, which sticks
// Compiled with -DFAKE_CUDA_OLD it lacks cuEventElapsedTime and cublasLtMatmulPreferenceSetAttribute, with
// -DFAKE_CUDA_UNMANAGED the functions of managed memory.
#include <unistd.h>

#include <csignal>

#include "cublas.h"
#include "state.h"

#define CUDA extern "C" __attribute__((visibility("default"))) Result
#define ENTER(...)            \
  Enter entered{__VA_ARGS__}; \
  if (entered.status != kOk) return entered.status

CUDA cuInit(unsigned flags) {
  const std::string how = text("INIT", "");
  if (how == "segv") raise(SIGSEGV);
  if (how == "abort") abort();
  while (how == "hang") pause();
  if (!how.empty()) return std::stoi(how);
  if (flags) return kInvalidValue;
  if (number("DEVICES", 1) == 0) return kNoDevice;
  Enter entered(false);
  if (!driver.initialized) atexit(atExit);
  driver.initialized = true;
  return kOk;
}

CUDA cuDriverGetVersion(int* version) {
  if (text("INIT", "") == "34") return 34;
  *version = static_cast<int>(number("VERSION", 13000));
  return kOk;
}

CUDA cuGetErrorName(Result status, const char** name) {
  const Words* words = find(status);
  *name = words ? words->name : nullptr;
  return words ? kOk : kInvalidValue;
}

CUDA cuGetErrorString(Result status, const char** string) {
  const Words* words = find(status);
  *string = words ? words->words : nullptr;
  return words ? kOk : kInvalidValue;
}

CUDA cuDeviceGetCount(int* count) {
  ENTER(false);
  *count = static_cast<int>(number("DEVICES", 1));
  return kOk;
}

CUDA cuDeviceGet(int* device, int ordinal) {
  ENTER(false);
  if (ordinal < 0 || static_cast<uint64_t>(ordinal) >= number("DEVICES", 1)) return kInvalidDevice;
  *device = ordinal;
  return kOk;
}

CUDA cuDeviceGetAttribute(int* value, int attribute, int) {
  ENTER(false);
  const std::string capability = text("CAPABILITY", "8.7");
  switch (attribute) {
    case 1:  // threads of a block
      *value = 1024;
      break;
    case 10:  // warp
      *value = 32;
      break;
    case 16:
      *value = static_cast<int>(number("MULTIPROCESSORS", 8));
      break;
    case 18:
      *value = static_cast<int>(number("INTEGRATED", 1));
      break;
    case 39:  // threads of a multiprocessor
      *value = 1536;
      break;
    case 75:
      *value = std::stoi(capability);
      break;
    case 76:
      *value = std::stoi(capability.substr(capability.find('.') + 1));
      break;
    case 83:
      *value = static_cast<int>(number("MANAGED_MEMORY", 1));
      break;
    case 89:
      *value = static_cast<int>(number("MANAGED", 0));
      break;
    case 97:  // shared memory of a block
      *value = static_cast<int>(number("SHARED", 163 * 1024));
      break;
    case 115:
      *value = static_cast<int>(number("POOLS", 1));
      break;
    default:
      if (attribute < 1 || attribute > 200) return kInvalidValue;
      *value = 0;
  }
  return kOk;
}

CUDA cuDeviceGetName(char* name, int length, int) {
  ENTER(false);
  snprintf(name, length, "%s", text("NAME", "Fake Orin").c_str());
  return kOk;
}

CUDA cuDeviceGetUuid(unsigned char* uuid, int device) {
  ENTER(false);
  for (int i = 0; i < 16; i++) uuid[i] = static_cast<unsigned char>(0xf0 + i + device);
  return kOk;
}

CUDA cuDeviceTotalMem_v2(size_t* bytes, int) {
  ENTER(false);
  *bytes = number("MEMORY", uint64_t{8} << 30);
  return kOk;
}

CUDA cuDevicePrimaryCtxRetain(void** context, int) {
  ENTER(false);
  driver.retained++;
  *context = &contextTag;
  return kOk;
}

CUDA cuDevicePrimaryCtxRelease_v2(int) {
  ENTER(false);
  if (driver.retained == 0) return kInvalidContext;
  if (--driver.retained == 0) endContext(entered.lock);
  return kOk;
}

CUDA cuDevicePrimaryCtxGetState(int, unsigned* flags, int* active) {
  ENTER(false);
  *flags = 0;
  *active = driver.retained != 0;
  return kOk;
}

CUDA cuCtxSetCurrent(void* context) {
  ENTER(false);
  if (context && (context != &contextTag || driver.retained == 0)) return kInvalidContext;
  current = context != nullptr;
  return kOk;
}

CUDA cuMemGetInfo_v2(size_t* available, size_t* total) {
  ENTER();
  *total = number("MEMORY", uint64_t{8} << 30);
  *available = *total - driver.used;
  return kOk;
}

CUDA cuMemAlloc_v2(Address* address, size_t bytes) {
  ENTER();
  if (bytes == 0) return kInvalidValue;
  const uint64_t total = number("MEMORY", uint64_t{8} << 30);
  if (bytes > total || driver.used > total - bytes) return kOutOfMemory;
  void* memory = nullptr;
  if (posix_memalign(&memory, 512, bytes) != 0) return kOutOfMemory;
  // Nobody may count on zeros.
  memset(memory, 0xcd, bytes < (4 << 20) ? bytes : 4 << 20);
  *address = reinterpret_cast<Address>(memory);
  driver.memory[*address] = bytes;
  driver.used += bytes;
  return kOk;
}

#ifndef FAKE_CUDA_UNMANAGED
CUDA cuMemAllocManaged(Address* address, size_t bytes, unsigned flags) {
  ENTER();
  if (number("MANAGED_MEMORY", 1) == 0) return kNotSupported;
  if (bytes == 0 || flags != 1) return kInvalidValue;
  const bool onDemand = number("MANAGED", 0) != 0;
  const uint64_t total = onDemand ? number("MANAGED_LIMIT", uint64_t{8} << 30) : number("MEMORY", uint64_t{8} << 30);
  const uint64_t used = onDemand ? driver.managedUsed : driver.used;
  if (bytes > total || used > total - bytes) return kOutOfMemory;
  void* memory = nullptr;
  if (posix_memalign(&memory, 65536, bytes) != 0) return kOutOfMemory;
  // Nobody may count on zeros.
  memset(memory, 0xcd, bytes < (4 << 20) ? bytes : 4 << 20);
  *address = reinterpret_cast<Address>(memory);
  driver.memory[*address] = bytes;
  driver.managed[*address] = onDemand;
  (onDemand ? driver.managedUsed : driver.used) += bytes;
  return kOk;
}

// What a hint may be about: managed memory, and a device that moves pages, or the host (-1).
static Result checkHint(Address address, size_t bytes, int device) {
  if (device != -1 && (device < 0 || static_cast<uint64_t>(device) >= number("DEVICES", 1))) return kInvalidDevice;
  if (number("MANAGED", 0) == 0) return kInvalidDevice;
  if (!bytes || !covers(address, bytes)) return kInvalidValue;
  return driver.managed.count(std::prev(driver.memory.upper_bound(address))->first) ? kOk : kInvalidValue;
}

CUDA cuMemAdvise(Address address, size_t bytes, int advice, int device) {
  ENTER();
  if (const auto status = static_cast<Result>(number("ADVISE", 0))) return status;
  if (advice < 1 || advice > 6) return kInvalidValue;
  return checkHint(address, bytes, device);
}

CUDA cuMemPrefetchAsync(Address address, size_t bytes, int device, Stream* stream) {
  ENTER();
  if (!driver.streams.count(stream)) return kInvalidHandle;
  if (const auto status = static_cast<Result>(number("PREFETCH", 0))) return status;
  if (const Result wrong = checkHint(address, bytes, device)) return wrong;
  // As on a GPU, pages are touched when the stream gets there: memory that has gone by then is found out.
  enqueueWork(stream, [=] {
    const std::lock_guard<std::mutex> lock(driver.mutex);
    if (!covers(address, bytes)) driver.fault = kIllegalAddress;
  });
  return kOk;
}
#endif

// As on a GPU, memory goes when work under way is done.
static void waitForAll(std::unique_lock<std::mutex>& lock) {
  driver.changed.wait(lock, [] {
    for (auto* stream : driver.streams) {
      if (!idle(stream)) return false;
    }
    return true;
  });
}

CUDA cuMemFree_v2(Address address) {
  ENTER();
  const auto found = driver.memory.find(address);
  if (found == driver.memory.end()) return kInvalidValue;
  waitForAll(entered.lock);
  const auto managed = driver.managed.find(address);
  const bool onDemand = managed != driver.managed.end() && managed->second;
  (onDemand ? driver.managedUsed : driver.used) -= found->second;
  if (managed != driver.managed.end()) driver.managed.erase(managed);
  driver.memory.erase(found);
  free(reinterpret_cast<void*>(address));
  return kOk;
}

CUDA cuMemHostAlloc(void** host, size_t bytes, unsigned) {
  ENTER();
  if (bytes == 0) return kInvalidValue;
  const uint64_t total = number("HOST_MEMORY", uint64_t{8} << 30);
  if (bytes > total || driver.hostUsed > total - bytes) return kOutOfMemory;
  if (posix_memalign(host, 4096, bytes) != 0) return kOutOfMemory;
  driver.hosts[static_cast<char*>(*host)] = bytes;
  driver.hostUsed += bytes;
  return kOk;
}

CUDA cuMemFreeHost(void* host) {
  ENTER();
  const auto found = driver.hosts.find(static_cast<char*>(host));
  if (found == driver.hosts.end()) return kInvalidValue;
  waitForAll(entered.lock);
  driver.hostUsed -= found->second;
  driver.hosts.erase(found);
  free(host);
  return kOk;
}

static Result copy(Stream* stream, void* to, const void* from, size_t bytes, bool inside) {
  if (!driver.streams.count(stream)) return kInvalidHandle;
  if (!inside) return kInvalidValue;
  enqueueWork(stream, [=] { memcpy(to, from, bytes); });
  return kOk;
}

CUDA cuMemcpyHtoDAsync_v2(Address to, const void* from, size_t bytes, Stream* stream) {
  ENTER();
  return copy(stream, reinterpret_cast<void*>(to), from, bytes, covers(to, bytes) && coversHost(from, bytes));
}

CUDA cuMemcpyDtoHAsync_v2(void* to, Address from, size_t bytes, Stream* stream) {
  ENTER();
  return copy(stream, to, reinterpret_cast<void*>(from), bytes, covers(from, bytes) && coversHost(to, bytes));
}

CUDA cuMemcpyDtoDAsync_v2(Address to, Address from, size_t bytes, Stream* stream) {
  ENTER();
  return copy(stream, reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes,
              covers(to, bytes) && covers(from, bytes));
}

CUDA cuMemsetD8Async(Address to, unsigned char value, size_t count, Stream* stream) {
  ENTER();
  if (!driver.streams.count(stream)) return kInvalidHandle;
  if (!covers(to, count)) return kInvalidValue;
  enqueueWork(stream, [=] { memset(reinterpret_cast<void*>(to), value, count); });
  return kOk;
}

CUDA cuMemsetD32Async(Address to, unsigned value, size_t count, Stream* stream) {
  ENTER();
  if (!driver.streams.count(stream)) return kInvalidHandle;
  if (to % 4 || !covers(to, count * 4)) return kInvalidValue;
  enqueueWork(stream, [=] {
    for (size_t i = 0; i < count; i++) reinterpret_cast<uint32_t*>(to)[i] = value;
  });
  return kOk;
}

CUDA cuStreamCreate(Stream** stream, unsigned flags) {
  ENTER();
  if (flags > 1) return kInvalidValue;
  *stream = new Stream;
  driver.streams.insert(*stream);
  (*stream)->thread = std::thread(work, *stream);
  return kOk;
}

CUDA cuStreamDestroy_v2(Stream* stream) {
  Enter entered;
  if (entered.status != kOk && entered.status != driver.fault) return entered.status;
  if (!driver.streams.count(stream)) return kInvalidHandle;
  endStream(entered.lock, stream);
  return driver.fault;
}

CUDA cuStreamSynchronize(Stream* stream) {
  ENTER();
  if (!driver.streams.count(stream)) return kInvalidHandle;
  driver.changed.wait(entered.lock, [&] { return idle(stream); });
  return driver.fault;
}

CUDA cuStreamQuery(Stream* stream) {
  ENTER();
  if (!driver.streams.count(stream)) return kInvalidHandle;
  return idle(stream) ? kOk : kNotReady;
}

CUDA cuEventCreate(Event** event, unsigned flags) {
  ENTER();
  if (flags > 3) return kInvalidValue;
  *event = new Event{flags, nullptr};
  driver.events.insert(*event);
  return kOk;
}

CUDA cuEventDestroy_v2(Event* event) {
  ENTER();
  if (!driver.events.erase(event)) return kInvalidHandle;
  delete event;
  return kOk;
}

CUDA cuEventRecord(Event* event, Stream* stream) {
  ENTER();
  if (!driver.events.count(event) || !driver.streams.count(stream)) return kInvalidHandle;
  event->mark = std::make_shared<Mark>();
  enqueue(stream, [mark = event->mark] {
    const std::lock_guard<std::mutex> lock(driver.mutex);
    mark->done = true;
    mark->time = Clock::now();
    driver.changed.notify_all();
  });
  return kOk;
}

CUDA cuEventQuery(Event* event) {
  ENTER();
  if (!driver.events.count(event)) return kInvalidHandle;
  return !event->mark || event->mark->done ? kOk : kNotReady;
}

CUDA cuEventSynchronize(Event* event) {
  ENTER();
  if (!driver.events.count(event)) return kInvalidHandle;
  if (const auto mark = event->mark) driver.changed.wait(entered.lock, [&] { return mark->done; });
  if (!driver.events.count(event)) die("an event was destroyed while a thread waited for it");
  return driver.fault;
}

#ifndef FAKE_CUDA_OLD
CUDA cuEventElapsedTime(float* milliseconds, Event* start, Event* end) {
  ENTER();
  for (auto* event : {start, end}) {
    if (!driver.events.count(event) || (event->flags & 2) || !event->mark) return kInvalidHandle;
  }
  if (!start->mark->done || !end->mark->done) return kNotReady;
  *milliseconds = std::chrono::duration<float, std::milli>(end->mark->time - start->mark->time).count();
  return kOk;
}
#endif

CUDA cuModuleLoadDataEx(Module** module, const void* image, unsigned count, int* options, void** values) {
  ENTER();
  if (const auto status = static_cast<Result>(number("MODULE", 0))) {
    char* log = nullptr;
    size_t size = 0;
    for (unsigned i = 0; i < count; i++) {
      if (options[i] == 5) log = static_cast<char*>(values[i]);
      if (options[i] == 6) size = reinterpret_cast<size_t>(values[i]);
    }
    if (log) snprintf(log, size, "fake compiler: no code for this GPU");
    return status;
  }
  const auto* bytes = static_cast<const unsigned char*>(image);
  if (!bytes[0]) return kInvalidImage;
  *module = new Module;
  if (bytes[0] == 0x7f) {
    readElf(bytes, *module);
  } else {
    readText(reinterpret_cast<const char*>(bytes), *module);
  }
  driver.modules.insert(*module);
  return kOk;
}

CUDA cuModuleUnload(Module* module) {
  ENTER();
  if (!driver.modules.count(module)) return kInvalidHandle;
  waitForAll(entered.lock);
  driver.modules.erase(module);
  for (auto at = driver.functions.begin(); at != driver.functions.end();) {
    if ((*at)->module == module) {
      delete *at;
      at = driver.functions.erase(at);
    } else {
      ++at;
    }
  }
  delete module;
  return kOk;
}

CUDA cuModuleGetFunction(Function** function, Module* module, const char* name) {
  ENTER();
  if (!driver.modules.count(module)) return kInvalidHandle;
  const bool identifier =
      name[0] && strspn(name, "_0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ") == strlen(name);
  if (module->listed ? !module->entries.count(name) : !identifier || strncmp(name, "missing", 7) == 0) return kNotFound;
  // A driver gives the same function for the same name.
  for (auto* known : driver.functions) {
    if (known->module == module && known->name == name) {
      *function = known;
      return kOk;
    }
  }
  *function = new Function{module, name};
  driver.functions.insert(*function);
  return kOk;
}

CUDA cuFuncGetAttribute(int* value, int attribute, Function* function) {
  ENTER();
  if (!driver.functions.count(function)) return kInvalidHandle;
  if (attribute < 0 || attribute > 15) return kInvalidValue;
  *value = attribute == 0 ? 1024 : attribute == 4 ? 32 : attribute == 8 ? function->maxShared : 0;
  return kOk;
}

CUDA cuFuncSetAttribute(Function* function, int attribute, int value) {
  ENTER();
  if (!driver.functions.count(function)) return kInvalidHandle;
  if (attribute != 8 || value < 0 || value > 163 * 1024) return kInvalidValue;
  function->maxShared = value;
  return kOk;
}

CUDA cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Function* function, int threads, size_t shared) {
  ENTER();
  if (!driver.functions.count(function)) return kInvalidHandle;
  if (threads < 1 || threads > 1024) return kInvalidValue;
  const int byThreads = 1536 / threads, byShared = shared ? static_cast<int>(163 * 1024 / shared) : byThreads;
  *blocks = byShared < byThreads ? byShared : byThreads;
  return kOk;
}

CUDA cuLaunchKernel(Function* function, unsigned gridX, unsigned gridY, unsigned gridZ, unsigned blockX,
                    unsigned blockY, unsigned blockZ, unsigned shared, Stream* stream, void** params, void** extra) {
  ENTER();
  if (!driver.functions.count(function) || !driver.streams.count(stream)) return kInvalidHandle;
  static const auto refused = static_cast<Result>(number("LAUNCH", 0));
  static const uint64_t faultAt = number("FAULT_AT", 0);
  if (refused) return refused;
  const uint64_t threads = uint64_t{blockX} * blockY * blockZ;
  if (!gridX || !gridY || !gridZ || !threads || threads > 1024 || !params || extra) return kInvalidValue;
  if (shared > static_cast<unsigned>(function->maxShared)) return kInvalidValue;
  const bool fault = ++driver.launches == faultAt;
  // The operands are the driver's as soon as the call returns.
  enqueueWork(stream, [fault, name = function->name, operands = std::string(static_cast<char*>(params[0]), 16)] {
    if (fault) return setFault(kIllegalAddress);
    runKernel(name, operands);
  });
  return kOk;
}
