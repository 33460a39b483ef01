// Asynchronous copies and stores on the host. What is copied arrives when a thread waits for
// it, not before; until then its target holds rubbish. What is stored is read from shared memory
// when the thread that stores it waits for that. So a wait that is missing shows.
//
// Included by cuda_runtime.h; common/async_copies.cuh uses it in place of PTX.
#pragma once

#include <functional>
#include <map>
#include <utility>
#include <vector>

#include "shared_memory.h"

namespace cuda_emulation {

// Not the first lane, so that nobody relies on that.
inline bool elect_lane() { return this_thread() % 32 == 21; }

template <typename T>
T load_shared(uint32_t address) {
  shared->before_load(address, sizeof(T));
  T value;
  std::memcpy(&value, shared->at(address, sizeof(T)), sizeof(T));
  return value;
}
template <typename T>
void store_shared(uint32_t address, const T& value) {
  shared->before_store(address, sizeof(T));
  std::memcpy(shared->at(address, sizeof(T)), &value, sizeof(T));
}

// Barriers in shared memory whose phases complete by one arrival, and the bytes that it expects.
struct PhaseBarrier {
  uint32_t phase = 0;
  bool fenced = false, armed = false;
  uint32_t armed_by = 0;  // this thread, at its time
  Time armed_at;
  std::map<uint32_t, Time> seen;  // when each thread saw the last phase complete
  KnownTimes known = {};          // what those who arrived knew
  size_t expected = 0, under_way = 0;
  std::vector<std::function<void()>> copies;
};
inline std::map<uint32_t, PhaseBarrier> barriers;  // by address
inline PerThread<std::vector<uint32_t>> unfenced_barriers;

inline void init_barrier(uint32_t address) {
  store_shared(address, uint2{});
  const Unseen unseen;
  barriers[address] = {};
  unfenced_barriers->push_back(address);
}
inline void fence_barriers() {
  const Unseen unseen;
  for (const uint32_t address : *unfenced_barriers) barriers.at(address).fenced = true;
  unfenced_barriers->clear();
}
inline PhaseBarrier& find_barrier(uint32_t address) {
  const auto found = barriers.find(address);
  check(found != barriers.end(), "a barrier has not been initialized");
  return found->second;
}
// That a barrier of the threads lies between.
inline void check_is_before(uint32_t thread, const Time& time) {
  check(is_after(thread, time), "a phase begins before all threads have waited for the one before");
}
inline void check_arrival(const PhaseBarrier& barrier) {
  check(!barrier.armed, "a thread arrives at a phase that has had its arrival");
  // Who still waits for the phase before could find this one complete, too, and wait for ever.
  for (const auto& [thread, time] : barrier.seen) check_is_before(thread, time);
}
inline void arrive(uint32_t address) {
  shared->before_load(address, sizeof(uint2));
  const Unseen unseen;
  PhaseBarrier& barrier = find_barrier(address);
  check_arrival(barrier);
  learn(barrier.known, *known);
  uint32_t& mine = barrier.known[this_thread() / 32];
  mine = std::max(mine, now->warp);
  release(&barrier);
  ++barrier.phase;
}
inline void expect_bytes(uint32_t address, uint32_t bytes) {
  shared->before_load(address, sizeof(uint2));
  const Unseen unseen;
  PhaseBarrier& barrier = find_barrier(address);
  check_arrival(barrier);
  barrier.armed = true;
  barrier.armed_by = this_thread();
  barrier.armed_at = *now;
  barrier.expected += bytes;
  release(&barrier);
}
inline uint32_t find_phase_of_copy(uint32_t address) {
  const Unseen unseen;
  const PhaseBarrier& barrier = find_barrier(address);
  check(barrier.fenced, "no fence between a barrier's initialization and a copy");
  return barrier.phase;
}
inline void check_source(const void* from, uint32_t bytes) {
  check(bytes > 0 && bytes % 16 == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0,
        "a bulk copy is not aligned");
}
inline void prefetch_copy(const void* from, uint32_t bytes) {
  check_source(from, bytes);
  // Sanitizers see whether all of it is there.
  std::vector<std::byte>(static_cast<const std::byte*>(from),
                         static_cast<const std::byte*>(from) + bytes);
}
inline void copy_to_shared(uint32_t to, const void* from, uint32_t bytes, uint32_t address) {
  check_source(from, bytes);
  check(to % 16 == 0, "a bulk copy is not aligned");
  shared->begin_copy(to, bytes, address, find_phase_of_copy(address));
  // The arrival is not seen, the begin is. It tells who waits for it what the thread that begins it
  // has done, as expect_bytes does before; of what lies between the two, a GPU would not.
  const Unseen unseen;
  PhaseBarrier& barrier = find_barrier(address);
  release(&barrier);
  barrier.under_way += bytes;
  barrier.copies.push_back(
      [=, target = shared->at(to, bytes)] { std::memcpy(target, from, bytes); });
}
inline void wait_for_phase(uint32_t address, uint32_t parity) {
  shared->before_load(address, sizeof(uint2));
  fibers.wait_until([=] {
    const Unseen unseen;
    PhaseBarrier& barrier = find_barrier(address);
    if (barrier.phase % 2 == parity && barrier.armed && barrier.under_way == barrier.expected) {
      for (const auto& copy : barrier.copies) copy();
      barrier.copies.clear();
      barrier.expected = barrier.under_way = 0;
      barrier.armed = false;
      ++barrier.phase;
    }
    if (barrier.phase % 2 == parity) return false;
    if (barrier.armed) check_is_before(barrier.armed_by, barrier.armed_at);
    acquire(&barrier);
    barrier.seen[this_thread()] = *now;
    learn(*known, barrier.known);
    (*observed_phases)[address] = barrier.phase;
    return true;
  });
}

// Stores of a thread, by groups. That they have read shared memory and that they are in global
// memory are one event here, the last that is allowed.
struct PendingStore {
  std::vector<std::pair<uint32_t, size_t>> from;  // addresses and bytes
  std::function<void()> store;
};
inline PerThread<std::vector<PendingStore>> open_stores;
inline PerThread<std::vector<std::vector<PendingStore>>> store_groups;

inline void begin_store(PendingStore store) {
  for (const auto& [address, bytes] : store.from) shared->begin_store(address, bytes);
  open_stores->push_back(std::move(store));
}
inline void commit_stores() {
  store_groups->push_back(std::move(*open_stores));
  open_stores->clear();
}
inline void wait_for_stores(size_t left) {
  while (store_groups->size() > left) {
    for (const PendingStore& store : store_groups->front()) {
      store.store();
      for (const auto& [address, bytes] : store.from) shared->end_store(address, bytes);
    }
    store_groups->erase(store_groups->begin());
  }
}

// Copies of single threads: cuda_pipeline_primitives.h, and those to an address in shared memory,
// which are the thread's stores, when they begin and when it has waited for them.
struct SharedCopy {
  uint32_t to;
  const void* from;
};
inline PerThread<std::vector<SharedCopy>> shared_copies;
inline void copy_16_bytes(uint32_t to, const void* from) {
  check(reinterpret_cast<uintptr_t>(from) % 16 == 0, "an asynchronous copy is not aligned");
  shared->before_store(to, 16);
  std::memset(shared->at(to, 16), 0xa5, 16);
  shared_copies->push_back({to, from});
}
inline void wait_copies() {
  for (const SharedCopy& copy : *shared_copies) {
    shared->before_store(copy.to, 16);
    std::memcpy(shared->at(copy.to, 16), copy.from, 16);
  }
  shared_copies->clear();
}
struct ThreadCopy {
  void* to;
  const void* from;
  size_t bytes;
};
inline PerThread<std::vector<ThreadCopy>> open_copies;
inline PerThread<std::vector<std::vector<ThreadCopy>>> copy_groups;

// What a thread has to have waited for when it ends, or when shared memory becomes another block's.
inline void end_block() {
  check(open_stores->empty() && store_groups->empty(), "a thread ends before its stores");
  check(open_copies->empty() && copy_groups->empty() && shared_copies->empty(),
        "a thread ends before its copies");
  check(unfenced_barriers->empty(), "a thread initializes barriers and makes no fence");
  observed_phases->clear();
  *known = {};
}
inline void reset_barriers() {
  const Unseen unseen;
  for (const auto& [address, barrier] : barriers) {
    check(!barrier.armed && barrier.copies.empty(), "a block ends before its copies");
  }
  barriers.clear();
}

}  // namespace cuda_emulation

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  const auto aligned = [&](const void* p) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
  cuda_emulation::check(aligned(to) && aligned(from), "an asynchronous copy is not aligned");
  std::memset(to, 0xa5, bytes);
  cuda_emulation::open_copies->push_back({to, from, bytes});
}
inline void __pipeline_commit() {
  cuda_emulation::copy_groups->push_back(std::move(*cuda_emulation::open_copies));
  cuda_emulation::open_copies->clear();
}
inline void __pipeline_wait_prior(size_t left) {
  auto& groups = *cuda_emulation::copy_groups;
  while (groups.size() > left) {
    for (const auto& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
    groups.erase(groups.begin());
  }
}
