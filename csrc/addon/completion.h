// The completion thread: it waits for events one after the other and tells JavaScript about each.
#pragma once

#define NAPI_VERSION 8
#include <node_api.h>
#include <pthread.h>

#include "driver.h"
#include "table.h"

class Completion {
 public:
  // Once per environment, before anything is watched; later calls exchange the callback. False: host memory is
  // exhausted.
  bool listen(napi_env env, napi_value callback);
  bool listening() const { return callback_ != nullptr; }
  // Starts the thread when it does not run yet. False: host memory or threads are exhausted.
  bool watch(Slot* event, double token);
  void hold(bool alive);
  // Waits for the event that is being waited for and ends the thread; what was watched is forgotten.
  void stop();
  // The environment ends: nothing will be called any more.
  void close();

 private:
  struct Watch;
  static void* thread(void* self);
  static void report(napi_env env, napi_value, void* self, void* watch);
  void run();
  void finish(napi_env env, const Watch& watch);
  void forget();

  pthread_mutex_t mutex_ = PTHREAD_MUTEX_INITIALIZER;
  pthread_cond_t changed_ = PTHREAD_COND_INITIALIZER;
  pthread_t thread_ = {};
  bool running_ = false;
  bool exitHooked_ = false;
  // Below `mutex_`.
  bool stopping_ = false;
  Watch* first_ = nullptr;
  Watch* last_ = nullptr;

  napi_env env_ = nullptr;
  napi_threadsafe_function function_ = nullptr;
  napi_ref callback_ = nullptr;
  bool held_ = false;
  // Counts `stop`s, so that reports of an earlier context are dropped.
  unsigned epoch_ = 0;
};
