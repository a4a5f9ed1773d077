// What JavaScript may name: driver objects by handle, device memory by address. Both are looked up before the driver
// sees them, so that a stale or invented number is a status and not a crash.
#pragma once

#include <cstddef>
#include <cstdint>

#include "driver.h"

enum class Kind : uint8_t { none, host, stream, event, module, function };

struct Slot {
  void* object;
  // host: its bytes. function: its module's handle.
  uint64_t extra;
  // event: watches that have not been reported. A destroyed event is doomed, without a handle, until there are none.
  uint32_t watches;
  uint32_t nextFree;
  uint16_t generation;
  Kind kind;
  bool doomed;

  template <typename T>
  T as() const {
    return static_cast<T>(object);
  }
};

// A handle is a slot's index below its generation. Free slots are reused oldest first, so that a number comes back as
// late as can be.
class Handles {
 public:
  // A slot of this kind without an object yet, or null when host memory or numbers are exhausted. Moves slots.
  Slot* take(Kind kind);
  void drop(Slot* slot);
  uint32_t handleOf(const Slot* slot) const { return static_cast<uint32_t>(slot->generation) << 16 | indexOf(slot); }
  uint32_t indexOf(const Slot* slot) const { return static_cast<uint32_t>(slot - slots_); }
  Slot* at(uint32_t index) { return slots_ + index; }
  uint32_t size() const { return size_; }

  Slot* find(uint32_t handle, Kind kind) {
    const uint32_t index = handle & 0xffff;
    if (index >= size_) return nullptr;
    Slot* slot = slots_ + index;
    return slot->generation == handle >> 16 && slot->kind == kind && !slot->doomed ? slot : nullptr;
  }

 private:
  static constexpr uint32_t kFirstSize = 256, kLastSize = 65536;
  static constexpr uint32_t kNone = UINT32_MAX;
  // Never 0, so that 0 is no handle.
  static uint16_t next(uint16_t generation) { return generation == UINT16_MAX ? 1 : generation + 1; }
  bool grow();
  void pushFree(uint32_t index);

  Slot* slots_ = nullptr;
  uint32_t size_ = 0;
  uint32_t firstFree_ = kNone, lastFree_ = kNone;
};

// Live device memory, ordered by address.
class Allocations {
 public:
  // Room for one more; false when host memory is exhausted.
  bool reserve();
  void add(cuda::Address address, uint64_t bytes);
  // Whether `address` was an allocation's first byte.
  bool remove(cuda::Address address);
  // Whether [address, address + bytes) lies inside one allocation.
  bool contain(cuda::Address address, uint64_t bytes) const;
  // Takes any allocation out; false when there is none.
  bool takeLast(cuda::Address* address);

 private:
  struct Allocation {
    cuda::Address address;
    uint64_t bytes;
  };
  // Index of the first allocation that begins above `address`.
  size_t above(cuda::Address address) const;

  Allocation* items_ = nullptr;
  size_t count_ = 0, capacity_ = 0;
};
