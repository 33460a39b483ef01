// An operator new, to be preloaded, that can be made to fail for _cpu_library: not for XLA and
// Python, which end the process when there is no memory.

#include <dlfcn.h>
#include <execinfo.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

namespace {

std::atomic<long> left{-1};      // allocations until one fails; -1 for none that does
std::atomic<bool> fails{false};  // the next one, and all later ones
std::atomic<bool> stays{false};  // failing, once one has failed
std::atomic<bool> failed{false};

// Whether the library asks, itself or by way of the standard library.
bool is_for_library() {
  void* frames[16];
  const int depth = backtrace(frames, 16);
  for (int i = 2; i < depth; ++i) {  // after this function, and operator new
    Dl_info info;
    if (!dladdr(frames[i], &info)) return false;
    if (std::strstr(info.dli_fname, "libstdc++")) continue;
    return std::strstr(info.dli_fname, "_cpu_library") != nullptr;
  }
  return false;
}

void count_allocation() {
  if (left < 0 && !fails) return;
  if (!is_for_library()) return;
  if (!fails && left-- != 0) return;
  fails = stays.load();
  failed = true;
  throw std::bad_alloc();
}

}  // namespace

extern "C" {

// The allocation after `allocations` others fails, and if `all_later`, so do those after it.
void fail_after(long allocations, bool all_later) {
  failed = false;
  stays = all_later;
  left = allocations;
}

// Whether an allocation has failed; none does from now on.
bool stop_failing() {
  left = -1;
  fails = false;
  return failed;
}
}

[[gnu::noinline]] void* operator new(size_t bytes) {
  count_allocation();
  if (void* memory = std::malloc(bytes)) return memory;
  throw std::bad_alloc();
}

[[gnu::noinline]] void* operator new(size_t bytes, std::align_val_t alignment) {
  count_allocation();
  const auto align = static_cast<size_t>(alignment);
  if (void* memory = std::aligned_alloc(align, (bytes + align - 1) / align * align)) return memory;
  throw std::bad_alloc();
}

void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, size_t, std::align_val_t) noexcept { std::free(memory); }
