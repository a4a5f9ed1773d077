#include "completion.h"

#include <cstdlib>

#include "addon.h"
#include "glibc.h"

struct Completion::Watch {
  Watch* next;
  cuda::Event event;
  uint32_t slot;
  unsigned epoch;
  double token;
  Status status;
};

namespace {

// process.exit() runs no cleanup hook, and the driver must not be torn down while the thread is inside it. Registered
// after the driver's own, hence called before.
void stopAtExit() { addon.completion.stop(); }

}  // namespace

void cleanUp(void*) {
  releaseContext();
  addon.completion.close();
  addon.owner.store(nullptr);
}

bool Completion::listen(napi_env env, napi_value callback) {
  napi_ref reference;
  if (napi_create_reference(env, callback, 1, &reference) != napi_ok) return false;
  if (!function_) {
    napi_value name;
    if (napi_create_string_utf8(env, "halfbyte", NAPI_AUTO_LENGTH, &name) != napi_ok ||
        napi_create_threadsafe_function(env, nullptr, nullptr, name, 0, 1, nullptr, nullptr, this, report,
                                        &function_) != napi_ok) {
      function_ = nullptr;
      napi_delete_reference(env, reference);
      return false;
    }
    napi_unref_threadsafe_function(env, function_);
    // Hooks run last first, and Node's own for the function frees it: the thread must have ended before, so our hook
    // moves behind it.
    napi_remove_env_cleanup_hook(env, cleanUp, nullptr);
    napi_add_env_cleanup_hook(env, cleanUp, nullptr);
  }
  if (callback_) napi_delete_reference(env, callback_);
  env_ = env;
  callback_ = reference;
  return true;
}

bool Completion::watch(Slot* event, double token) {
  auto* watch = static_cast<Watch*>(malloc(sizeof(Watch)));
  if (!watch) return false;
  if (!running_) {
    exitHooked_ = exitHooked_ || atexit(stopAtExit) == 0;
    stopping_ = false;
    if (!exitHooked_ || pthread_create(&thread_, nullptr, thread, this) != 0) {
      free(watch);
      return false;
    }
    running_ = true;
  }
  *watch = {nullptr, event->as<cuda::Event>(), addon.handles.indexOf(event), epoch_, token, 0};
  event->watches++;
  pthread_mutex_lock(&mutex_);
  (first_ ? last_->next : first_) = watch;
  last_ = watch;
  pthread_cond_signal(&changed_);
  pthread_mutex_unlock(&mutex_);
  return true;
}

void Completion::hold(bool alive) {
  if (alive == held_ || !function_) return;
  held_ = alive;
  (alive ? napi_ref_threadsafe_function : napi_unref_threadsafe_function)(env_, function_);
}

void Completion::stop() {
  if (!running_) return;
  pthread_mutex_lock(&mutex_);
  stopping_ = true;
  pthread_cond_signal(&changed_);
  pthread_mutex_unlock(&mutex_);
  pthread_join(thread_, nullptr);
  running_ = false;
  epoch_++;
  forget();
}

void Completion::close() {
  stop();
  if (callback_) napi_delete_reference(env_, callback_);
  // Node frees the function after this hook.
  callback_ = nullptr;
  function_ = nullptr;
  held_ = false;
}

void Completion::forget() {
  while (Watch* watch = first_) {
    first_ = watch->next;
    free(watch);
  }
}

void* Completion::thread(void* self) {
  static_cast<Completion*>(self)->run();
  return nullptr;
}

void Completion::run() {
  const Status current = addon.driver.contextSetCurrent(addon.context);
  pthread_mutex_lock(&mutex_);
  for (;;) {
    while (!first_ && !stopping_) pthread_cond_wait(&changed_, &mutex_);
    if (stopping_) break;
    Watch* watch = first_;
    first_ = watch->next;
    pthread_mutex_unlock(&mutex_);
    watch->status = current ? current : addon.driver.eventSynchronize(watch->event);
    pthread_mutex_lock(&mutex_);
    if (stopping_ || napi_call_threadsafe_function(function_, watch, napi_tsfn_nonblocking) != napi_ok) free(watch);
  }
  pthread_mutex_unlock(&mutex_);
}

// On the event loop; without an environment when that has ended.
void Completion::report(napi_env env, napi_value, void* self, void* data) {
  Watch watch = *static_cast<Watch*>(data);
  free(data);
  if (env) static_cast<Completion*>(self)->finish(env, watch);
}

void Completion::finish(napi_env env, const Watch& watch) {
  if (watch.epoch != epoch_) return;
  Slot* slot = addon.handles.at(watch.slot);
  if (--slot->watches == 0 && slot->doomed) {
    addon.driver.eventDestroy(slot->as<cuda::Event>());
    addon.handles.drop(slot);
  }
  napi_value callback, receiver, arguments[2];
  if (napi_get_reference_value(env, callback_, &callback) != napi_ok || !callback ||
      napi_get_undefined(env, &receiver) != napi_ok || napi_create_double(env, watch.token, &arguments[0]) != napi_ok ||
      napi_create_int32(env, watch.status, &arguments[1]) != napi_ok) {
    return;
  }
  if (napi_call_function(env, receiver, callback, 2, arguments, nullptr) == napi_pending_exception) {
    napi_value error;
    // What the callback throws is the program's: an uncaught exception, as from any other callback.
    if (napi_get_and_clear_last_exception(env, &error) == napi_ok) napi_fatal_exception(env, error);
  }
}
