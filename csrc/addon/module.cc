// Modules, their functions, and launching.
#include <cstdlib>
#include <cstring>

#include "addon.h"

namespace {

template <typename T>
T field(const Bytes& bytes, uint64_t offset) {
  T value;
  memcpy(&value, bytes.data + offset, sizeof value);
  return value;
}

// The driver is told where an image begins but not where it ends: whether what its ELF headers point to lies inside.
bool isWholeElf(const Bytes& image) {
  constexpr unsigned char kMagic[] = {0x7f, 'E', 'L', 'F', 2, 1};
  constexpr uint32_t kHeaderBytes = 64, kSegmentBytes = 56, kSectionBytes = 64, kNoBits = 8;
  const auto inside = [&image](uint64_t offset, uint64_t bytes) {
    return offset <= image.length && bytes <= image.length - offset;
  };
  if (image.length < kHeaderBytes || memcmp(image.data, kMagic, sizeof kMagic) != 0) return false;
  const auto segments = field<uint64_t>(image, 32), sections = field<uint64_t>(image, 40);
  const uint64_t segmentCount = field<uint16_t>(image, 56), sectionCount = field<uint16_t>(image, 60);
  if (segmentCount &&
      (field<uint16_t>(image, 54) != kSegmentBytes || !inside(segments, segmentCount * kSegmentBytes))) {
    return false;
  }
  for (uint64_t at = segments; at < segments + segmentCount * kSegmentBytes; at += kSegmentBytes) {
    if (!inside(field<uint64_t>(image, at + 8), field<uint64_t>(image, at + 32))) return false;
  }
  const uint64_t namesIndex = field<uint16_t>(image, 62);
  if (field<uint16_t>(image, 58) != kSectionBytes || namesIndex >= sectionCount ||
      !inside(sections, sectionCount * kSectionBytes)) {
    return false;
  }
  const uint64_t names = field<uint64_t>(image, sections + namesIndex * kSectionBytes + 24);
  const uint64_t namesBytes = field<uint64_t>(image, sections + namesIndex * kSectionBytes + 32);
  if (!inside(names, namesBytes) || namesBytes == 0 || image.data[names + namesBytes - 1] != 0) return false;
  for (uint64_t at = sections; at < sections + sectionCount * kSectionBytes; at += kSectionBytes) {
    if (field<uint32_t>(image, at) >= namesBytes) return false;
    if (field<uint32_t>(image, at + 4) == kNoBits) continue;
    if (!inside(field<uint64_t>(image, at + 24), field<uint64_t>(image, at + 32))) return false;
  }
  return true;
}

// PTX is ASCII. Anything else the driver would take for a binary format.
bool isText(const Bytes& image) {
  for (size_t i = 0; i < image.length; i++) {
    const unsigned char c = image.data[i];
    if ((c < ' ' || c > '~') && (c < '\t' || c > '\r')) return false;
  }
  return image.length != 0;
}

Status moduleLoad(Call& call) {
  Bytes image;
  if (!call.bytes(0, "image", &image)) return call.status;
  // PTX may come with the NUL that ends it.
  if (image.length && image.data[image.length - 1] == 0 && isText({image.data, image.length - 1})) image.length--;
  auto* copy = static_cast<unsigned char*>(malloc(image.length + 1));
  if (!copy) return abi::outOfHostMemory;
  if (image.length) memcpy(copy, image.data, image.length);
  copy[image.length] = 0;
  // The copy is what is checked: another thread may write to shared memory meanwhile.
  image.data = copy;
  if (!isText(image) && !isWholeElf(image)) {
    free(copy);
    return addon.fail(cuda::kInvalidImage, "neither a whole cubin nor PTX (%zu bytes)", image.length);
  }
  Slot* slot = addon.handles.take(Kind::module);
  if (!slot) {
    free(copy);
    return abi::outOfHostMemory;
  }
  int options[] = {cuda::kJitErrorLogBuffer, cuda::kJitErrorLogBufferSizeBytes};
  void* values[] = {addon.detail, reinterpret_cast<void*>(sizeof addon.detail - 1)};
  cuda::Module module = nullptr;
  const Status status = addon.driver.moduleLoadDataEx(&module, copy, 2, options, values);
  free(copy);
  if (status) {
    addon.handles.drop(slot);
    return status;
  }
  addon.detail[0] = 0;
  slot->object = module;
  addon.results[0] = addon.handles.handleOf(slot);
  return 0;
}

Status moduleUnload(Call& call) {
  Slot* module;
  if (!call.handle(0, "module", Kind::module, &module)) return call.status;
  const uint32_t handle = addon.handles.handleOf(module);
  for (uint32_t i = 0; i < addon.handles.size(); i++) {
    Slot* slot = addon.handles.at(i);
    if (slot->kind == Kind::function && slot->extra == handle) addon.handles.drop(slot);
  }
  const Status status = addon.driver.moduleUnload(module->as<cuda::Module>());
  addon.handles.drop(module);
  return status;
}

Status moduleFunction(Call& call) {
  Slot* module;
  char name[1024];
  if (!call.handle(0, "module", Kind::module, &module) || !call.string(1, "name", name, sizeof name))
    return call.status;
  const uint32_t handle = addon.handles.handleOf(module);
  cuda::Function function = nullptr;
  if (const Status status = addon.driver.moduleGetFunction(&function, module->as<cuda::Module>(), name)) return status;
  Slot* slot = addon.handles.take(Kind::function);
  if (!slot) return abi::outOfHostMemory;
  slot->object = function;
  slot->extra = handle;
  addon.results[0] = addon.handles.handleOf(slot);
  return 0;
}

Status functionAttribute(Call& call) {
  Slot* function;
  int attribute, value = 0;
  if (!call.handle(0, "func", Kind::function, &function) || !call.integer(1, "attribute", 0, INT32_MAX, &attribute)) {
    return call.status;
  }
  const Status status = addon.driver.funcGetAttribute(&value, attribute, function->as<cuda::Function>());
  addon.results[0] = value;
  return status;
}

Status functionSetAttribute(Call& call) {
  Slot* function;
  int attribute, value;
  if (!call.handle(0, "func", Kind::function, &function) || !call.integer(1, "attribute", 0, INT32_MAX, &attribute) ||
      !call.integer(2, "value", INT32_MIN, INT32_MAX, &value)) {
    return call.status;
  }
  return addon.driver.funcSetAttribute(function->as<cuda::Function>(), attribute, value);
}

Status functionOccupancy(Call& call) {
  Slot* function;
  int block, blocks = 0;
  unsigned shared;
  if (!call.handle(0, "func", Kind::function, &function) || !call.integer(1, "block", 1, INT32_MAX, &block) ||
      !call.integer(2, "shared", 0, UINT32_MAX, &shared)) {
    return call.status;
  }
  const Status status = addon.driver.occupancy(&blocks, function->as<cuda::Function>(), block, shared);
  addon.results[0] = blocks;
  return status;
}

Status launchCommand() {
  const auto* word = reinterpret_cast<const uint32_t*>(addon.command);
  const Slot* function = addon.handles.find(word[abi::commandFunc], Kind::function);
  const Slot* stream = addon.handles.find(word[abi::commandStream], Kind::stream);
  if (!function) return addon.fail(abi::badHandle, "there is no function %u, or no more", word[abi::commandFunc]);
  if (!stream) return addon.fail(abi::badHandle, "there is no stream %u, or no more", word[abi::commandStream]);
  if (word[abi::commandOperandBytes] > abi::maxOperandBytes) {
    return addon.fail(abi::badArgument, "operands: expected at most %u bytes, received %u", abi::maxOperandBytes,
                      word[abi::commandOperandBytes]);
  }
  void* params[] = {addon.command + abi::commandOperands};
  return addon.driver.launchKernel(function->as<cuda::Function>(), word[abi::commandGrid], 1, 1,
                                   word[abi::commandBlock], 1, 1, word[abi::commandShared], stream->as<cuda::Stream>(),
                                   params, nullptr);
}

// Without `Call`: there are no arguments, and this is the one call whose cost counts.
napi_value launch(napi_env env, napi_callback_info) {
  if (const Status refused = addon.admits(env)) return toNumber(env, refused);
  addon.detail[0] = 0;
  return toNumber(env, launchCommand());
}

const Entry kEntries[] = {
    {"moduleLoad", entry<moduleLoad>},
    {"moduleUnload", entry<moduleUnload>},
    {"moduleFunction", entry<moduleFunction>},
    {"functionAttribute", entry<functionAttribute>},
    {"functionSetAttribute", entry<functionSetAttribute>},
    {"functionOccupancy", entry<functionOccupancy>},
    {"launch", launch},
};

}  // namespace

bool exportModule(napi_env env, napi_value exports) {
  return exportAll(env, exports, kEntries, sizeof kEntries / sizeof *kEntries);
}
