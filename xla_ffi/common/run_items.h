// Work in items, on XLA's thread pool: for the CPU handlers.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace df11 {

// Runs worker(item) for all items on the pool and on the calling thread, each of which makes a
// worker for itself and destroys it before its items count as done. Waits only for items
// that were begun, so a pool whose threads are all busy (perhaps in a call like this one)
// delays nothing. A thread that comes late finds no item; it may outlive the call, which is
// why the state is shared. If a worker throws, no further items are begun, and the first exception
// is thrown again here: never on the pool's threads, nor while workers are busy.
template <typename MakeWorker>
void run_items(xla::ffi::ThreadPool& pool, int64_t items, const MakeWorker& make_worker) {
  struct State {
    std::atomic<int64_t> next{0};
    int64_t done = 0;
    std::exception_ptr failure;
    std::mutex mutex;
    std::condition_variable all_done;
  };
  const auto state = std::make_shared<State>();
  const auto work = [state, items, make_worker] {
    int64_t item = state->next.fetch_add(1);
    if (item >= items) return;
    int64_t done = 0;
    std::exception_ptr failure;
    try {
      auto worker = make_worker();
      for (; item < items; item = state->next.fetch_add(1), ++done) worker(item);
    } catch (...) {
      failure = std::current_exception();
      // This item counts as done, and so do those that nobody has begun.
      done += 1 + std::max<int64_t>(0, items - state->next.exchange(items));
    }
    const std::lock_guard<std::mutex> lock(state->mutex);
    if (failure && !state->failure) state->failure = std::move(failure);
    state->done += done;
    if (state->done == items) state->all_done.notify_all();
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), items - 1);
  try {
    for (int64_t i = 0; i < helpers; ++i) pool.Schedule(std::function<void()>(work));
  } catch (...) {
    // No memory to ask for more: those that were asked do the work.
  }
  work();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->all_done.wait(lock, [&] { return state->done == items; });
  if (state->failure) std::rethrow_exception(std::move(state->failure));
}

}  // namespace df11
