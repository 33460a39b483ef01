// A warp's part of the product's shared memory, and how what it multiplies gets there.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/async_copies.cuh"
#include "common/lanes.cuh"
#include "native/cuda/product_sums.cuh"
#include "native/cuda/product_work.h"

namespace df11::native {

#ifdef __CUDA_ARCH__
inline constexpr int kArchitecture = __CUDA_ARCH__;
#else
inline constexpr int kArchitecture = 0;  // the host's
#endif

// What is to be copied of global memory: a multiple of 16 bytes, aligned to 16.
struct CopySource {
  const uint32_t* from;
  uint32_t bytes;

  // Of the chunk's steps from this one on, one or two: signs and mantissas.
  __device__ static CopySource of_steps(const MatrixWork& matrix, uint32_t first, int steps_left) {
    return {matrix.sign_mantissa + int64_t{first} * kStepWords,
            static_cast<uint32_t>(steps_left > 1 ? kSlotBytes : kSlotBytes / kSlotSteps)};
  }
  // Of the two steps that begin at k: all rows of x.
  __device__ static CopySource of_x(const ProductWork& work, uint32_t k) {
    const uint32_t bytes = work.memory.x_bytes;
    const auto* from = reinterpret_cast<const char*>(work.x);
    from += uint64_t{k / (kSlotSteps * kStepRows)} * bytes;
    return {reinterpret_cast<const uint32_t*>(from), bytes};
  }
};

// Where a warp has what: a slot of two steps' signs and mantissas, barriers, its place in its
// group, a list of chunks, if x is copied two slots of that, and one or two records.
class WarpMemory {
 public:
  __device__ WarpMemory(uint32_t memory, const ProductMemory& plan)
      : memory_(memory), barriers_(memory + kSlotBytes), plan_(plan) {}

  __device__ uint32_t steps() const { return memory_; }
  __device__ uint32_t list() const { return barriers_ + kBarrierBytes + kPlaceBytes; }
  __device__ uint32_t record(int buffer) const {
    return memory_ + plan_.before_records + buffer * plan_.record_bytes;
  }

  // Of the steps that have been waited for, the rows of x.
  __device__ uint32_t x() const { return x_slot(~phases_ & 1); }

  // All lanes may ask for it after the next barrier.
  __device__ void keep(const PlaceInGroup& place) {
    // The first has its turn at once: it waits for the phase before the first.
    if (place.is_first) phases_ |= 1u << kTurn;
    if (elect_lane()) store_shared(barriers_ + kBarrierBytes, place.pack());
  }
  __device__ PlaceInGroup place() const {
    return PlaceInGroup(load_shared4(barriers_ + kBarrierBytes));
  }
  // A warp's turn to add to the sums of its group.
  __device__ void wait_for_turn() { wait(kTurn); }
  // That of the warp whose memory this is.
  __device__ static void give_turn(uint32_t memory) {
    if (elect_lane()) arrive(memory + kSlotBytes + 8 * kTurn);
  }

 protected:
  static constexpr int kTurn = 3;  // a barrier behind those of the slot and of the records

  // What was loaded there was multiplied before the signs and mantissas that were waited for since
  // were loaded: so a copy that comes after these does not overtake it.
  __device__ uint32_t next_x() const { return x_slot(phases_ & 1); }
  __device__ uint32_t barrier(int number) const { return barriers_ + 8 * number; }
  __device__ __forceinline__ void wait(int number) {
    wait_for_phase(barrier(number), phases_ >> number & 1);
    phases_ ^= 1u << number;
  }

 private:
  __device__ uint32_t x_slot(uint32_t slot) const {
    return memory_ + plan_.before_x + slot * plan_.x_bytes;
  }

  uint32_t memory_, barriers_;
  const ProductMemory& plan_;
  uint32_t phases_ = 0;  // a bit a barrier
};

// Copies by one lane, of compute capability 9.0 and up; of x, too, or without it.
template <bool kWithX>
class BulkCopies : public WarpMemory {
 public:
  using WarpMemory::WarpMemory;
  static constexpr bool kAreBulk = true, kCopyX = kWithX;
  static constexpr bool kRunHere = kArchitecture == 0 || kArchitecture >= 900;

  __device__ void initialize() {
    if (elect_lane()) {
      for (int i = 0; i <= kTurn; ++i) init_barrier(barrier(i));
      fence_barriers();
    }
  }
  // Sources are computed by the lane that copies.
  template <typename Steps, typename X>
  __device__ __forceinline__ void fetch_steps(const Steps& of_steps, const X& of_x) {
    if (!elect_lane()) return;
    const CopySource source = of_steps(), x = kCopyX ? of_x() : CopySource{};
    expect_bytes(barrier(0), source.bytes + x.bytes);
    copy_to_shared(steps(), source.from, source.bytes, barrier(0));
    if (kCopyX) copy_to_shared(next_x(), x.from, x.bytes, barrier(0));
  }
  __device__ void fetch_record(int buffer, const CopySource& source) {
    if (!elect_lane()) return;
    expect_bytes(barrier(1 + buffer), source.bytes);
    copy_to_shared(record(buffer), source.from, source.bytes, barrier(1 + buffer));
  }
  // To L2 only.
  __device__ void prefetch_record(const CopySource& source) {
    if (elect_lane()) prefetch_copy(source.from, source.bytes);
  }
  __device__ __forceinline__ void wait_for_steps() { wait(0); }
  __device__ void wait_for_record(int buffer) { wait(1 + buffer); }
};

// Copies by all lanes, of earlier ones. A lane waits for all of its copies: so there is one record,
// for which nothing else would wait as well.
class LaneCopies : public WarpMemory {
 public:
  using WarpMemory::WarpMemory;
  static constexpr bool kAreBulk = false, kCopyX = false;
#ifdef DF11_LANE_COPIES_EVERYWHERE  // where tests run them on newer GPUs
  static constexpr bool kRunHere = kArchitecture == 0 || kArchitecture >= 800;
#else
  static constexpr bool kRunHere =
      kArchitecture == 0 || (kArchitecture >= 800 && kArchitecture < 900);
#endif

  __device__ void initialize() {
    if (elect_lane()) {
      init_barrier(barrier(kTurn));
      fence_barriers();
    }
  }
  template <typename Steps, typename X>
  __device__ __forceinline__ void fetch_steps(const Steps& of_steps, const X&) {
    fetch(of_steps(), steps());
  }
  __device__ void fetch_record(int, const CopySource& source) { fetch(source, record(0)); }
  // To L2 only, which has lines of 128 bytes.
  __device__ void prefetch_record(const CopySource& source) {
    const uint32_t line = 128 * lane();
    if (line < source.bytes + 112) {
      prefetch_global(source.from + min(line, source.bytes - 16) / sizeof(uint32_t));
    }
  }
  // Each lane reads what it has copied.
  __device__ __forceinline__ void wait_for_steps() { wait_copies(); }
  __device__ void wait_for_record(int) {
    wait_copies();
    __syncwarp();  // All lanes have.
  }

 private:
  __device__ static uint32_t lane() { return threadIdx.x % kLanes; }
  __device__ __forceinline__ static void fetch(const CopySource& source, uint32_t to) {
    for (uint32_t at = 16 * lane(); at < source.bytes; at += 16 * kLanes) {
      copy_16_bytes(to + at, source.from + at / sizeof(uint32_t));
    }
  }
};

}  // namespace df11::native
