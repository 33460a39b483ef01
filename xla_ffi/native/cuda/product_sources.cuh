// What a warp multiplies: x from global memory, exponents from a bit stream in shared memory or, of
// records that are not there, from global memory; patches.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/async_copies.cuh"
#include "common/lanes.cuh"
#include "native/cuda/lookup_table.cuh"
#include "native/cuda/product_work.h"
#include "native/cuda/staged_stream.cuh"
#include "native/layout.h"

namespace df11::native {

// Rows of x as the second operand of multiply_add: lane 4 g + t has x[8 tile + g][k + 4 t ..],
// since the lane's weights of a step are of these k. In memory, 32 k of all rows lie together, and
// of a row what a lane needs for two steps. Rows that x has not are read as its last one, and their
// products are not used.
template <int kTiles>
class RowsOfX {
 public:
  __device__ RowsOfX(const uint4* x, int rows, int lane) : x_(x), rows_(rows) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int row = min(8 * tile + lane / 4, rows - 1);
      first_[tile] = keep(static_cast<uint32_t>(4 * row + lane % 4));
    }
  }

  // Of the steps that begin at k and after it, for which the warp has waited if x is copied.
  template <typename Copies>
  __device__ __forceinline__ void load(int k, const Copies& copies,
                                       uint2 (&to)[kSlotSteps][kTiles]) const {
    const uint4* from = x_ + k / (kSlotSteps * kStepRows) * 4 * rows_;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      uint4 both;
      if constexpr (Copies::kCopyX) {
        both = load_shared4(copies.x() + 16 * first_[tile]);
      } else {
        both = __ldg(from + first_[tile]);
      }
      to[0][tile] = uint2{both.x, both.y};
      to[1][tile] = uint2{both.z, both.w};
    }
  }

 private:
  const uint4* x_;
  int rows_;
  uint32_t first_[kTiles];
};

// A lane's table entries from a stream in shared memory.
class StagedPairs {
 public:
  // The stream starts at bit `start` of the record at address `record`.
  __device__ StagedPairs(uint32_t record, uint32_t start, const LookupTable& table, int lane)
      : mask_(keep(table.mask())), table_(keep(table.of_lane(lane))) {
    stream_.start(record, start - table.lead());
  }

  __device__ __forceinline__ void next_two(int, uint32_t& entry0, uint32_t& entry1) {
    const auto look_up = [this](uint32_t window) {
      return load_shared_constant((window & mask_) | table_);
    };
    stream_.next_two(look_up, entry0, entry1);
  }
  __device__ void end_half_step() {}

 private:
  StagedStream stream_;
  uint32_t mask_, table_;
};

// The same of a record in global memory, or of a raw one, or of none: slower, but in few registers.
// No word behind the record's last is read.
class GlobalPairs {
 public:
  enum Kind { kCoded, kRaw, kNone };

  __device__ GlobalPairs(Kind kind, const uint32_t* record, uint32_t words, uint32_t start,
                         const LookupTable& table, int lane)
      : record_(record),
        kind_(kind),
        last_(words - 1),
        position_(kind == kRaw ? kRawRecordHeaderWords + lane_word(lane) : start - table.lead()),
        mask_(table.mask()),
        table_(table.of_lane(lane)) {}

  __device__ __forceinline__ void next_two(int j, uint32_t& entry0, uint32_t& entry1) {
    if (kind_ == kCoded) {
      const uint32_t at = position_ / 32;
      const uint32_t window = __funnelshift_r(word(at), word(at + 1), position_);
      entry0 = load_shared_constant((window & mask_) | table_);
      entry1 = load_shared_constant((window >> (entry0 & 31) & mask_) | table_);
      position_ += (entry0 & 31) + (entry1 & 31);
    } else if (kind_ == kRaw) {
      const uint32_t exponents = __ldg(record_ + position_ + j);
      entry0 = __byte_perm(exponents, 0, 0x1404) >> 1;  // bytes 0 and 1 to bits 7 and 23
      entry1 = __byte_perm(exponents, 0, 0x3424) >> 1;
    } else {
      entry0 = entry1 = 0;
    }
  }
  __device__ void end_half_step() {
    if (kind_ == kRaw) position_ += kHalfStepWords;
  }

 private:
  __device__ uint32_t word(uint32_t at) const { return __ldg(record_ + (at < last_ ? at : last_)); }

  const uint32_t* record_;
  Kind kind_;
  uint32_t last_, position_, mask_, table_;
};

// The words of a record in shared memory, and of one that stayed in global memory.
struct StagedRecord {
  uint32_t address;
  __device__ uint32_t word(uint32_t i) const { return load_shared(address + 4 * i); }
  __device__ StagedRecord from(uint32_t i) const { return {address + 4 * i}; }
};
struct GlobalRecord {
  const uint32_t* words;
  __device__ uint32_t word(uint32_t i) const { return __ldg(words + i); }
  __device__ GlobalRecord from(uint32_t i) const { return {words + i}; }
};

// A chunk's patches, in the order of steps. All lanes look at the same one, the next.
template <typename Record>
class Patches {
 public:
  __device__ Patches(const Record& patches, uint32_t count) : patches_(patches), left_(count) {
    next_ = left_ ? patches_.word(0) : kNone;
  }

  // Whether there are any of this step of the chunk.
  __device__ __forceinline__ bool are_in(uint32_t step) const { return next_ >> kStepBits == step; }

  // Puts those of this step into the lane's weights, as the product has them, if they are not of k
  // from `k_left` on, counted from the chunk's first.
  __device__ __forceinline__ void apply(uint32_t step, int k_left, int lane,
                                        uint32_t (&weights)[4][4]) {
#pragma unroll 1
    do {
      const uint32_t patch = next_;
      patches_ = patches_.from(1);
      next_ = --left_ ? patches_.word(0) : kNone;
      put(patch, k_left, lane, weights);
    } while (are_in(step));
  }

 private:
  // Of a step that there is not.
  static constexpr uint32_t kStepBits = 26, kNone = ~0u;

  // The lane 4 g + t has k 4 t .. 4 t + 3 of a step, in its two half-steps, and n 8 g .. 8 g + 7.
  __device__ __forceinline__ static void put(uint32_t patch, int k_left, int lane,
                                             uint32_t (&weights)[4][4]) {
    const uint32_t position = patch >> 16, k = position / kTileCols % kStepRows,
                   n = position % kTileCols;
    const bool mine = static_cast<int>(n / 8 * 4 + k / 4) == lane &&
                      static_cast<int>(position / kTileCols) < k_left;
    const uint32_t selector = !mine ? 0x3210 : k % 2 ? 0x5410 : 0x3254;  // of which half
    // The same in all lanes, so that this is a jump.
    const auto replace = [&](uint32_t& weight) { weight = __byte_perm(weight, patch, selector); };
    switch (n % 8 / 2 * 4 + k % 4 / 2 * 2 + n % 2) {
      case 0:
        return replace(weights[0][0]);
      case 1:
        return replace(weights[0][1]);
      case 2:
        return replace(weights[0][2]);
      case 3:
        return replace(weights[0][3]);
      case 4:
        return replace(weights[1][0]);
      case 5:
        return replace(weights[1][1]);
      case 6:
        return replace(weights[1][2]);
      case 7:
        return replace(weights[1][3]);
      case 8:
        return replace(weights[2][0]);
      case 9:
        return replace(weights[2][1]);
      case 10:
        return replace(weights[2][2]);
      case 11:
        return replace(weights[2][3]);
      case 12:
        return replace(weights[3][0]);
      case 13:
        return replace(weights[3][1]);
      case 14:
        return replace(weights[3][2]);
      default:
        return replace(weights[3][3]);
    }
  }

  Record patches_;
  uint32_t left_, next_;
};

}  // namespace df11::native
