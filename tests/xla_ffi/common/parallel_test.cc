// parallel_for where memory or threads run out at one point after the other: to be run under
// sanitizers. That the process goes on is half of what is tested.

#include "common/parallel.h"

#include <pthread.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

namespace {

// What happens at the allocation that comes after so many others.
enum class Shortage {
  kOneAllocation,   // it fails
  kAllAllocations,  // it fails, and so do all later ones
  kThreads,         // the thread that it is for cannot be created, nor can later ones
};
std::atomic<int> allocations_left{-1};
std::atomic<bool> is_short{false};
Shortage shortage;

void set_stack_bytes(size_t bytes) {
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  if (pthread_attr_setstacksize(&attributes, bytes) || pthread_setattr_default_np(&attributes)) {
    std::abort();
  }
  pthread_attr_destroy(&attributes);
}

void count_allocation() {
  if (is_short && shortage == Shortage::kAllAllocations) throw std::bad_alloc();
  if (allocations_left < 0 || allocations_left-- != 0) return;
  is_short = true;
  if (shortage != Shortage::kThreads) throw std::bad_alloc();
  set_stack_bytes(size_t{1} << 46);  // more than there are addresses
}

}  // namespace

void* operator new(size_t bytes) {
  count_allocation();
  if (void* memory = std::malloc(bytes)) return memory;
  throw std::bad_alloc();
}
// Not inlined, since GCC 16 warns of memory of `new` that goes to `free`.
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, size_t) noexcept { std::free(memory); }

namespace {

constexpr int kCount = 24;
int failures = 0;

void check(bool ok, const char* what, int threads, int allocation) {
  if (ok) return;
  ++failures;
  std::printf("FAILED: %s, with %d threads and shortage %d at allocation %d\n", what, threads,
              static_cast<int>(shortage), allocation);
}

// Runs a loop that runs short at this allocation; false if it took fewer.
template <typename Loop>
bool run_short(int allocation, const Loop& loop) {
  is_short = false;
  allocations_left = allocation;
  loop();
  allocations_left = -1;
  if (is_short && shortage == Shortage::kThreads) set_stack_bytes(8 << 20);
  return is_short.exchange(false);
}

// Fewer threads do all the work.
bool check_work(int threads, int allocation) {
  std::vector<std::atomic<int>> calls(kCount);
  const bool was_short = run_short(
      allocation, [&] { df11::parallel_for(kCount, threads, [&](int64_t i) { ++calls[i]; }); });
  for (const auto& count : calls) check(count == 1, "not called once", threads, allocation);
  return was_short;
}

// What a call throws arrives, whether it comes of the shortage or not.
bool check_exceptions(int threads, int allocation) {
  std::vector<std::unique_ptr<int>> made(kCount);
  int caught = -1;
  const bool was_short = run_short(allocation, [&] {
    try {
      df11::parallel_for(kCount, threads, [&](int64_t i) {
        made[i] = std::make_unique<int>(static_cast<int>(i));
        if (i == 17) throw 17;
      });
    } catch (const std::bad_alloc&) {
      caught = 0;
    } catch (int number) {
      caught = number;
    }
  });
  check(caught == 17 || (caught == 0 && was_short), "exception got lost", threads, allocation);
  return was_short;
}

}  // namespace

int main() {
  for (Shortage kind : {Shortage::kOneAllocation, Shortage::kAllAllocations, Shortage::kThreads}) {
    shortage = kind;
    for (int threads : {0, 1, 2, 8, 1 << 30}) {
      int allocation = 0;
      while (check_work(threads, allocation)) ++allocation;
      const int helpers = threads < 2 ? 0 : threads < kCount ? threads - 1 : kCount - 1;
      check(allocation >= helpers, "too few threads", threads, allocation);
      for (int i = 0; i < 2 * kCount && check_exceptions(threads, i); ++i) {
      }
    }
  }
  std::printf("%s\n", failures ? "FAILED" : "all passed");
  return failures != 0;
}
