// Streams, events, and watching events.
#include "addon.h"

namespace {

Status streamCreate(Call&) {
  Slot* slot = addon.handles.take(Kind::stream);
  if (!slot) return abi::outOfHostMemory;
  cuda::Stream stream = nullptr;
  if (const Status status = addon.driver.streamCreate(&stream, cuda::kStreamNonBlocking)) {
    addon.handles.drop(slot);
    return status;
  }
  slot->object = stream;
  addon.results[0] = addon.handles.handleOf(slot);
  return 0;
}

Status streamDestroy(Call& call) {
  Slot* slot;
  if (!call.handle(0, "stream", Kind::stream, &slot)) return call.status;
  const Status status = addon.driver.streamDestroy(slot->as<cuda::Stream>());
  addon.handles.drop(slot);
  return status;
}

Status streamSynchronize(Call& call) {
  Slot* slot;
  if (!call.handle(0, "stream", Kind::stream, &slot)) return call.status;
  return addon.driver.streamSynchronize(slot->as<cuda::Stream>());
}

Status streamQuery(Call& call) {
  Slot* slot;
  if (!call.handle(0, "stream", Kind::stream, &slot)) return call.status;
  return addon.driver.streamQuery(slot->as<cuda::Stream>());
}

Status eventCreate(Call& call) {
  bool timing;
  if (!call.boolean(0, "timing", &timing)) return call.status;
  Slot* slot = addon.handles.take(Kind::event);
  if (!slot) return abi::outOfHostMemory;
  cuda::Event event = nullptr;
  const unsigned flags = cuda::kEventBlockingSync | (timing ? 0 : cuda::kEventDisableTiming);
  if (const Status status = addon.driver.eventCreate(&event, flags)) {
    addon.handles.drop(slot);
    return status;
  }
  slot->object = event;
  addon.results[0] = addon.handles.handleOf(slot);
  return 0;
}

Status eventDestroy(Call& call) {
  Slot* slot;
  if (!call.handle(0, "event", Kind::event, &slot)) return call.status;
  // The completion thread may be waiting for it.
  if (slot->watches) {
    slot->doomed = true;
    return 0;
  }
  const Status status = addon.driver.eventDestroy(slot->as<cuda::Event>());
  addon.handles.drop(slot);
  return status;
}

Status eventRecord(Call& call) {
  Slot *event, *stream;
  if (!call.handle(0, "event", Kind::event, &event) || !call.handle(1, "stream", Kind::stream, &stream))
    return call.status;
  return addon.driver.eventRecord(event->as<cuda::Event>(), stream->as<cuda::Stream>());
}

Status eventQuery(Call& call) {
  Slot* slot;
  if (!call.handle(0, "event", Kind::event, &slot)) return call.status;
  return addon.driver.eventQuery(slot->as<cuda::Event>());
}

Status eventSynchronize(Call& call) {
  Slot* slot;
  if (!call.handle(0, "event", Kind::event, &slot)) return call.status;
  return addon.driver.eventSynchronize(slot->as<cuda::Event>());
}

Status eventElapsed(Call& call) {
  Slot *start, *end;
  float milliseconds = 0;
  if (!call.handle(0, "start", Kind::event, &start) || !call.handle(1, "end", Kind::event, &end)) return call.status;
  const Status status = addon.driver.eventElapsedTime(&milliseconds, start->as<cuda::Event>(), end->as<cuda::Event>());
  addon.results[0] = milliseconds;
  return status;
}

Status onCompleted(Call& call) {
  napi_value callback;
  if (!call.function(0, "completed", &callback)) return call.status;
  return addon.completion.listen(call.env, callback) ? 0 : abi::outOfHostMemory;
}

Status watch(Call& call) {
  Slot* event;
  double token;
  if (!call.handle(0, "event", Kind::event, &event) || !call.integer(1, "token", 0, kMaxInteger, &token))
    return call.status;
  if (!addon.completion.listening()) return addon.fail(abi::badArgument, "nothing listens: onCompleted comes first");
  return addon.completion.watch(event, token) ? 0 : abi::outOfHostMemory;
}

Status hold(Call& call) {
  bool alive;
  if (!call.boolean(0, "alive", &alive)) return call.status;
  if (!addon.completion.listening()) return addon.fail(abi::badArgument, "nothing listens: onCompleted comes first");
  addon.completion.hold(alive);
  return 0;
}

const Entry kEntries[] = {
    {"streamCreate", entry<streamCreate>},
    {"streamDestroy", entry<streamDestroy>},
    {"streamSynchronize", entry<streamSynchronize>},
    {"streamQuery", entry<streamQuery>},
    {"eventCreate", entry<eventCreate>},
    {"eventDestroy", entry<eventDestroy>},
    {"eventRecord", entry<eventRecord>},
    {"eventQuery", entry<eventQuery>},
    {"eventSynchronize", entry<eventSynchronize>},
    {"eventElapsed", entry<eventElapsed>},
    {"onCompleted", entry<onCompleted>},
    {"watch", entry<watch>},
    {"hold", entry<hold>},
};

}  // namespace

bool exportStream(napi_env env, napi_value exports) {
  return exportAll(env, exports, kEntries, sizeof kEntries / sizeof *kEntries);
}
