// Dynamic shared memory that remembers who accessed each two bytes last, and through which proxy:
// so that what a GPU would only sometimes get wrong is an error each time. Accesses that go through
// the functions of common/async_copies.cuh are checked; those by plain pointers are not.
//
// Included by cuda_runtime.h.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <vector>

#include "fibers.h"

namespace cuda_emulation {

inline constexpr uint32_t kSharedBase = 1024;  // address of the first dynamic byte
inline constexpr size_t kMostShared = 227 * 1024;

// When a thread did something: how many barriers of its warp and of its block it had passed.
// Shuffles and votes do not count, since they order no memory.
struct Time {
  uint32_t warp = 0, block = 0;
};
inline PerThread<Time> now;
// Up to which of its barriers a thread knows what each warp has done: from barriers in shared
// memory, where a thread of that warp has arrived, or one that knew of it.
using KnownTimes = std::array<uint32_t, kMostThreads / 32>;
inline PerThread<KnownTimes> known;
inline void learn(KnownTimes& times, const KnownTimes& others) {
  for (size_t i = 0; i < times.size(); ++i) times[i] = std::max(times[i], others[i]);
}
// Whether this thread comes after what that one has done at that time.
inline bool is_after(uint32_t thread, const Time& time) {
  if (thread == this_thread()) return true;
  if (thread / 32 == this_thread() / 32) return time.warp != (now->warp & 0xfffff);
  return time.block != (now->block & 0xffff) || time.warp < (*known)[thread / 32];
}
// Phases of barriers that this thread has seen complete, by the barrier's address.
inline PerThread<std::map<uint32_t, uint32_t>> observed_phases;

class SharedMemory {
 public:
  explicit SharedMemory(size_t bytes, size_t threads)
      : size_(bytes),
        // Of exactly the size, in an allocation of its own: so that sanitizers see what leaves it.
        bytes_(new std::byte[bytes]),
        cells_(new Cell[bytes / 2]),
        fences_(new Unordered<uint32_t>[threads]),
        threads_(threads) {
    check(bytes <= kMostShared, "there is not as much shared memory");
    reset();
  }

  // Before a block starts: nothing is known of what is there.
  void reset() {
    for (size_t i = 0; i < size_; ++i) bytes_[i] = static_cast<std::byte>(random_());
    for (size_t i = 0; i < size_ / 2; ++i) {
      cells_[i].write = 0;
      cells_[i].read = 0;
      cells_[i].stores = 0;
    }
    for (size_t i = 0; i < threads_; ++i) fences_[i] = 1;
  }

  std::byte* data() { return bytes_.get(); }
  std::byte* at(uint32_t address, size_t bytes) {
    check(address >= kSharedBase && address + bytes <= kSharedBase + size_,
          "an access leaves shared memory");
    check(address % (bytes < 16 ? bytes : 16) == 0, "an access to shared memory is not aligned");
    return bytes_.get() + (address - kSharedBase);
  }

  // The generic proxy: loads and stores of threads.
  void before_load(uint32_t address, size_t bytes) {
    at(address, bytes);
    for_each_cell(address, bytes, [&](Cell& cell) {
      check_write_is_visible(cell.write);
      note_read(cell);
    });
  }
  void before_store(uint32_t address, size_t bytes) {
    at(address, bytes);
    for_each_cell(address, bytes, [&](Cell& cell) {
      check_write_is_visible(cell.write);
      check_reads_are_over(cell);
      cell.write = pack({kGeneric, this_thread(), now->warp, now->block, fences_[this_thread()]});
      cell.read = 0;
    });
  }
  void fence() { fences_[this_thread()] = fences_[this_thread()] + 1; }

  // The asynchronous proxy: a copy that arrives with a phase of a barrier, and a store that reads
  // later.
  void begin_copy(uint32_t address, size_t bytes, uint32_t barrier, uint32_t phase) {
    std::byte* to = at(address, bytes);
    for_each_cell(address, bytes, [&](Cell& cell) {
      check_write_is_visible(cell.write);
      check_write_is_fenced(cell.write);
      check_reads_are_over(cell);
      cell.write = pack({kAsync, 0, barrier / 8, phase, 0});
      cell.read = 0;
    });
    for (size_t i = 0; i < bytes; ++i) to[i] = static_cast<std::byte>(0xa5 + 29 * i);
  }
  void begin_store(uint32_t address, size_t bytes) {
    at(address, bytes);
    for_each_cell(address, bytes, [&](Cell& cell) {
      check_write_is_visible(cell.write);
      check_write_is_fenced(cell.write);
      cell.stores = cell.stores + 1;
    });
  }
  void end_store(uint32_t address, size_t bytes) {
    for_each_cell(address, bytes, [&](Cell& cell) {
      cell.stores = cell.stores - 1;
      note_read(cell);
    });
  }

 private:
  struct Cell {
    Unordered<uint64_t> write, read;
    Unordered<uint32_t> stores;  // that have not read it yet
  };
  enum Kind : uint32_t { kNone, kGeneric, kAsync };
  // By a thread: its number, its time, how many fences it had made. By a copy: the barrier and
  // the phase in place of the time.
  struct Write {
    uint32_t kind, thread, warp, block, fences;
  };
  static uint64_t pack(const Write& w) {
    return uint64_t{w.kind} << 62 | uint64_t{w.thread & 1023} << 52 |
           uint64_t{w.warp & 0xfffff} << 32 | uint64_t{w.block & 0xffff} << 16 |
           (w.fences & 0xffff);
  }
  static Write unpack(uint64_t w) {
    return {static_cast<uint32_t>(w >> 62), static_cast<uint32_t>(w >> 52 & 1023),
            static_cast<uint32_t>(w >> 32 & 0xfffff), static_cast<uint32_t>(w >> 16 & 0xffff),
            static_cast<uint32_t>(w & 0xffff)};
  }
  // Of reads the last, and whether other lanes or warps have read it since the last barrier.
  static constexpr uint64_t kByLanes = 1, kByWarps = 2;

  template <typename F>
  void for_each_cell(uint32_t address, size_t bytes, const F& f) {
    const size_t first = (address - kSharedBase) / 2;
    for (size_t i = 0; i < bytes / 2; ++i) f(cells_[first + i]);
  }

  static bool is_ordered(const Write& w) { return is_after(w.thread, {w.warp, w.block}); }
  static void check_write_is_visible(uint64_t write) {
    const Write w = unpack(write);
    if (w.kind == kGeneric) {
      check(is_ordered(w), "race: shared memory that another thread writes");
    } else if (w.kind == kAsync) {
      const auto found = observed_phases->find(8 * w.warp);
      check(found != observed_phases->end() && static_cast<int16_t>(found->second - w.block) > 0,
            "a thread has not waited for the copy that brings what it accesses");
    }
  }
  void check_write_is_fenced(uint64_t write) const {
    const Write w = unpack(write);
    check(w.kind != kGeneric || w.fences != (fences_[w.thread] & 0xffff),
          "no proxy fence between a thread's store and an asynchronous access");
  }
  static void note_read(Cell& cell) {
    const uint64_t before = cell.read;
    uint64_t after = pack({kGeneric, this_thread(), now->warp, now->block, 0});
    const Write r = unpack(before);
    if (r.kind != kNone && r.block == (now->block & 0xffff)) {
      if (r.thread / 32 != this_thread() / 32 || (before & kByWarps)) after |= kByWarps;
      if (r.warp == (now->warp & 0xfffff) && (r.thread != this_thread() || (before & kByLanes))) {
        after |= kByLanes;
      }
    }
    cell.read = after;
  }
  static void check_reads_are_over(const Cell& cell) {
    check(cell.stores == 0, "what a store has not read yet is overwritten");
    const uint64_t read = cell.read;
    const Write r = unpack(read);
    if (r.kind == kNone) return;
    const bool same_block_time = r.block == (now->block & 0xffff);
    check(is_ordered(r) && !((read & kByWarps) && same_block_time) &&
              !((read & kByLanes) && r.thread / 32 == this_thread() / 32 &&
                r.warp == (now->warp & 0xfffff)),
          "race: shared memory that another thread reads is overwritten");
  }

  size_t size_;
  std::unique_ptr<std::byte[]> bytes_;
  std::unique_ptr<Cell[]> cells_;
  std::unique_ptr<Unordered<uint32_t>[]> fences_;  // that each thread has made
  size_t threads_;
  std::minstd_rand random_{1};
};

inline SharedMemory* shared = nullptr;

}  // namespace cuda_emulation
