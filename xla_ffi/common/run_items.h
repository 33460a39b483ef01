// Work in items, on XLA's thread pool: for the CPU handlers.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>

#include "xla/ffi/api/ffi.h"

namespace df11 {

// Runs worker(item) for all items on the pool and on the calling thread, each of which makes a
// worker for itself and destroys it before its items count as done. Waits only for items
// that were begun, so a pool whose threads are all busy (perhaps in a call like this one)
// delays nothing. A thread that comes late finds no item; it may outlive the call, which is
// why the state is shared.
template <typename MakeWorker>
void run_items(xla::ffi::ThreadPool& pool, int64_t items, const MakeWorker& make_worker) {
  struct State {
    std::atomic<int64_t> next{0};
    int64_t done = 0;
    std::mutex mutex;
    std::condition_variable all_done;
  };
  const auto state = std::make_shared<State>();
  const auto work = [state, items, make_worker] {
    int64_t item = state->next.fetch_add(1);
    if (item >= items) return;
    int64_t done = 0;
    {
      auto worker = make_worker();
      for (; item < items; item = state->next.fetch_add(1), ++done) worker(item);
    }
    const std::lock_guard<std::mutex> lock(state->mutex);
    state->done += done;
    if (state->done == items) state->all_done.notify_all();
  };
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), items - 1);
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule(std::function<void()>(work));
  work();
  std::unique_lock<std::mutex> lock(state->mutex);
  state->all_done.wait(lock, [&] { return state->done == items; });
}

}  // namespace df11
