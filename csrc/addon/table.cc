#include "table.h"

#include <cstdlib>
#include <cstring>

bool Handles::grow() {
  if (size_ == kLastSize) return false;
  const uint32_t size = size_ ? size_ * 2 : kFirstSize;
  auto* slots = static_cast<Slot*>(realloc(slots_, size * sizeof(Slot)));
  if (!slots) return false;
  memset(slots + size_, 0, (size - size_) * sizeof(Slot));
  slots_ = slots;
  for (; size_ < size; size_++) {
    slots_[size_].generation = 1;
    pushFree(size_);
  }
  return true;
}

void Handles::pushFree(uint32_t index) {
  slots_[index].nextFree = kNone;
  if (lastFree_ == kNone) {
    firstFree_ = index;
  } else {
    slots_[lastFree_].nextFree = index;
  }
  lastFree_ = index;
}

Slot* Handles::take(Kind kind) {
  if (firstFree_ == kNone && !grow()) return nullptr;
  Slot* slot = slots_ + firstFree_;
  firstFree_ = slot->nextFree;
  if (firstFree_ == kNone) lastFree_ = kNone;
  slot->kind = kind;
  slot->object = nullptr;
  slot->extra = 0;
  slot->watches = 0;
  slot->doomed = false;
  return slot;
}

void Handles::drop(Slot* slot) {
  slot->generation = next(slot->generation);
  slot->kind = Kind::none;
  slot->object = nullptr;
  pushFree(indexOf(slot));
}

size_t Allocations::above(cuda::Address address) const {
  size_t low = 0, high = count_;
  while (low < high) {
    const size_t middle = (low + high) / 2;
    if (items_[middle].address <= address) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

bool Allocations::reserve() {
  if (count_ < capacity_) return true;
  const size_t capacity = capacity_ ? capacity_ * 2 : 64;
  void* items = realloc(items_, capacity * sizeof(Allocation));
  if (!items) return false;
  items_ = static_cast<Allocation*>(items);
  capacity_ = capacity;
  return true;
}

void Allocations::add(cuda::Address address, uint64_t bytes) {
  const size_t at = above(address);
  memmove(items_ + at + 1, items_ + at, (count_ - at) * sizeof(Allocation));
  items_[at] = {address, bytes};
  count_++;
}

bool Allocations::remove(cuda::Address address) {
  const size_t at = above(address);
  if (at == 0 || items_[at - 1].address != address) return false;
  memmove(items_ + at - 1, items_ + at, (count_ - at) * sizeof(Allocation));
  count_--;
  return true;
}

bool Allocations::contain(cuda::Address address, uint64_t bytes) const {
  const size_t at = above(address);
  if (at == 0) return false;
  const Allocation& found = items_[at - 1];
  const uint64_t offset = address - found.address;
  return offset <= found.bytes && bytes <= found.bytes - offset;
}

bool Allocations::takeLast(cuda::Address* address) {
  if (count_ == 0) return false;
  *address = items_[--count_].address;
  return true;
}
