// What the fake driver keeps, and how its streams work. fake-cuda.cc has the entry points and says what this is for.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>

namespace {

using Result = int;
using Address = uint64_t;
using Clock = std::chrono::steady_clock;

enum : Result {
  kOk = 0,
  kInvalidValue = 1,
  kOutOfMemory = 2,
  kNotInitialized = 3,
  kNoDevice = 100,
  kInvalidDevice = 101,
  kInvalidImage = 200,
  kInvalidContext = 201,
  kInvalidHandle = 400,
  kNotFound = 500,
  kNotReady = 600,
  kIllegalAddress = 700,
  kNotSupported = 801,
};

std::string text(const char* name, const char* otherwise) {
  const char* value = getenv((std::string("HALFBYTE_FAKE_CUDA_") + name).c_str());
  return value ? value : otherwise;
}
uint64_t number(const char* name, uint64_t otherwise) {
  const std::string value = text(name, "");
  return value.empty() ? otherwise : std::stoull(value);
}

struct Mark {
  bool done = false;
  Clock::time_point time;
};

struct Stream {
  std::deque<std::function<void()>> queue;
  bool busy = false, quit = false;
  std::thread thread;
};

struct Event {
  unsigned flags;
  std::shared_ptr<Mark> mark;
};

struct Module {
  // Empty: every name.
  bool listed = false;
  std::set<std::string> entries;
};

struct Function {
  Module* module;
  std::string name;
  int maxShared = 48 * 1024;
};

struct Driver {
  std::mutex mutex;
  std::condition_variable changed;
  bool initialized = false, dead = false;
  int inside = 0;
  int retained = 0;
  Result fault = kOk;
  uint64_t launches = 0;
  // Live objects of cublas.h.
  int blasObjects = 0;
  uint64_t used = 0, hostUsed = 0, managedUsed = 0;
  std::map<Address, uint64_t> memory;
  // Which of it is managed memory, and whether its pages move on demand.
  std::map<Address, bool> managed;
  std::map<char*, uint64_t> hosts;
  std::set<Stream*> streams;
  std::set<Event*> events;
  std::set<Module*> modules;
  std::set<Function*> functions;
};

// Never destroyed: threads may outlive static objects.
Driver& driver = *new Driver;
thread_local bool current = false;
int contextTag;

[[noreturn]] void die(const char* what) {
  fprintf(stderr, "fake-cuda: %s\n", what);
  abort();
}

// A call of the driver: holds its lock, and knows whether the call may go on.
struct Enter {
  std::unique_lock<std::mutex> lock{driver.mutex};
  Result status = kOk;
  explicit Enter(bool needsContext = true) {
    if (driver.dead) die("called after the process began to exit");
    driver.inside++;
    if (!driver.initialized) {
      status = kNotInitialized;
    } else if (needsContext && !current) {
      status = kInvalidContext;
    } else if (needsContext) {
      status = driver.fault;
    }
  }
  ~Enter() {
    if (!lock.owns_lock()) lock.lock();
    driver.inside--;
  }
};

void atExit() {
  std::unique_lock<std::mutex> lock(driver.mutex);
  if (driver.inside) die("a thread was inside the driver when the process began to exit");
  driver.dead = true;
}

void work(Stream* stream) {
  std::unique_lock<std::mutex> lock(driver.mutex);
  for (;;) {
    driver.changed.wait(lock, [&] { return !stream->queue.empty() || stream->quit; });
    if (stream->queue.empty()) return;
    const auto task = std::move(stream->queue.front());
    stream->queue.pop_front();
    stream->busy = true;
    lock.unlock();
    task();
    lock.lock();
    stream->busy = false;
    driver.changed.notify_all();
  }
}

void enqueue(Stream* stream, std::function<void()> task) {
  stream->queue.push_back(std::move(task));
  driver.changed.notify_all();
}

// Work that takes time and is not done any more after a fault.
void enqueueWork(Stream* stream, std::function<void()> task) {
  enqueue(stream, [task = std::move(task)] {
    static const auto delay = std::chrono::milliseconds(number("DELAY_MS", 0));
    if (delay.count()) std::this_thread::sleep_for(delay);
    bool dead;
    {
      const std::lock_guard<std::mutex> lock(driver.mutex);
      dead = driver.fault != kOk;
    }
    if (!dead) task();
  });
}

void setFault(Result status) {
  const std::lock_guard<std::mutex> lock(driver.mutex);
  if (driver.fault == kOk) driver.fault = status;
}

bool idle(const Stream* stream) { return stream->queue.empty() && !stream->busy; }

bool covers(Address address, uint64_t bytes) {
  auto found = driver.memory.upper_bound(address);
  if (found == driver.memory.begin()) return false;
  --found;
  const uint64_t offset = address - found->first;
  return offset <= found->second && bytes <= found->second - offset;
}

bool coversHost(const void* host, uint64_t bytes) {
  auto* at = static_cast<char*>(const_cast<void*>(host));
  auto found = driver.hosts.upper_bound(at);
  if (found == driver.hosts.begin()) return false;
  --found;
  const uint64_t offset = at - found->first;
  return offset <= found->second && bytes <= found->second - offset;
}

void endStream(std::unique_lock<std::mutex>& lock, Stream* stream) {
  stream->quit = true;
  driver.streams.erase(stream);
  driver.changed.notify_all();
  lock.unlock();
  stream->thread.join();
  delete stream;
  lock.lock();
}

void report() {
  const std::string file = text("REPORT", "");
  if (file.empty()) return;
  FILE* out = fopen(file.c_str(), "a");
  if (!out) die("REPORT cannot be written");
  fprintf(out, "allocations=%zu hosts=%zu streams=%zu events=%zu modules=%zu\n", driver.memory.size(),
          driver.hosts.size(), driver.streams.size(), driver.events.size(), driver.modules.size());
  fclose(out);
}

void endContext(std::unique_lock<std::mutex>& lock) {
  report();
  if (driver.blasObjects) die("objects of cuBLASLt outlived the context");
  while (!driver.streams.empty()) endStream(lock, *driver.streams.begin());
  for (auto* event : driver.events) delete event;
  for (auto* function : driver.functions) delete function;
  for (auto* module : driver.modules) delete module;
  for (auto& [address, bytes] : driver.memory) free(reinterpret_cast<void*>(address));
  for (auto& [host, bytes] : driver.hosts) free(host);
  driver.events.clear();
  driver.functions.clear();
  driver.modules.clear();
  driver.memory.clear();
  driver.managed.clear();
  driver.hosts.clear();
  driver.used = driver.hostUsed = driver.managedUsed = 0;
  driver.fault = kOk;
}

template <typename T>
T word(const unsigned char* image, uint64_t at) {
  T value;
  memcpy(&value, image + at, sizeof value);
  return value;
}

// Names of the sections ".text.NAME" of an ELF file.
void readElf(const unsigned char* image, Module* module) {
  const auto sections = word<uint64_t>(image, 40);
  const auto size = word<uint16_t>(image, 58), count = word<uint16_t>(image, 60), names = word<uint16_t>(image, 62);
  const auto strings = word<uint64_t>(image, sections + uint64_t{names} * size + 24);
  for (unsigned i = 0; i < count; i++) {
    const std::string name =
        reinterpret_cast<const char*>(image + strings + word<uint32_t>(image, sections + i * size));
    if (name.rfind(".text.", 0) == 0) module->entries.insert(name.substr(6));
  }
  module->listed = !module->entries.empty();
}

void readText(const char* image, Module* module) {
  static const char* const kSpace = " \t\r\n";
  const std::string all = image;
  for (size_t at = 0; (at = all.find(".entry", at)) != std::string::npos;) {
    const size_t begin = all.find_first_not_of(kSpace, at + 6);
    if (begin == std::string::npos) break;
    at = all.find_first_of(" \t\r\n(", begin);
    module->entries.insert(all.substr(begin, at - begin));
    if (at == std::string::npos) break;
  }
  module->listed = !module->entries.empty();
}

void runKernel(const std::string& name, const std::string& operands) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(operands.data());
  if (name == "fake_fault") return setFault(kIllegalAddress);
  if (name == "fake_sleep") return std::this_thread::sleep_for(std::chrono::milliseconds(word<uint32_t>(bytes, 0)));
  if (name != "fake_store") return;
  const auto address = word<uint64_t>(bytes, 0);
  const auto value = word<uint32_t>(bytes, 8), words = word<uint32_t>(bytes, 12);
  {
    const std::lock_guard<std::mutex> lock(driver.mutex);
    if (!covers(address, uint64_t{words} * 4)) driver.fault = kIllegalAddress;
    if (driver.fault != kOk) return;
  }
  for (uint32_t i = 0; i < words; i++) reinterpret_cast<uint32_t*>(address)[i] = value;
}

struct Words {
  Result status;
  const char *name, *words;
};
const Words kWords[] = {
    {0, "CUDA_SUCCESS", "no error"},
    {1, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {2, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {3, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {34, "CUDA_ERROR_STUB_LIBRARY", "CUDA driver is a stub library"},
    {35, "CUDA_ERROR_INSUFFICIENT_DRIVER", "CUDA driver version is insufficient for CUDA runtime version"},
    {100, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {101, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {200, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {201, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {209, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"},
    {218, "CUDA_ERROR_INVALID_PTX", "a PTX JIT compilation failed"},
    {222, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION", "the provided PTX was compiled with an unsupported toolchain."},
    {400, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {500, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {600, "CUDA_ERROR_NOT_READY", "device not ready"},
    {700, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {701, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES", "too many resources requested for launch"},
    {719, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
    {801, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
    {999, "CUDA_ERROR_UNKNOWN", "unknown error"},
};

const Words* find(Result status) {
  for (const Words& words : kWords) {
    if (words.status == status) return &words;
  }
  return nullptr;
}

}  // namespace
