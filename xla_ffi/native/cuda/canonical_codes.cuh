// The symbols of a codebook in the order of their codes, from the codes' lengths, by a block: what
// both look-up tables are filled from. docs/format.md, section "codebook".
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/lanes.cuh"
#include "native/layout.h"

namespace df11::native {

inline constexpr int kSymbolGroups = kSymbols / kLanes;

struct CanonicalCodes {
  // For each length and each group of 32 symbols, in this order: first how many there are,
  // then what precedes them in canonical order, symbols in the low 9 bits and above them
  // what these take of 2^12 codes.
  uint32_t preceding[kMaxCodeBits * kSymbolGroups];
  uint32_t sorted[kSymbols];  // table entries in canonical order

  DF11_HD static int length_and_group(uint32_t length, int group) {
    return (static_cast<int>(length) - 1) * kSymbolGroups + group;
  }

  // By a warp: how many symbols of a group have each length, where a lane has the length of one.
  // Returns the rank of the lane's symbol among those as long.
  __device__ __forceinline__ uint32_t count_group(int group, uint32_t length, int lane) {
    uint32_t rank = 0, count = 0;
    for (uint32_t bits = 1; bits <= kMaxCodeBits; ++bits) {
      const uint32_t same = __ballot_sync(kAllLanes, length == bits);
      if (lane + 1 == static_cast<int>(bits)) count = __popc(same);
      if (length == bits) rank = __popc(same & ((1u << lane) - 1));
    }
    if (lane < kMaxCodeBits) preceding[length_and_group(lane + 1, group)] = count;
    return rank;
  }

  // By a warp: a prefix sum over lengths and groups. Returns, in the last lane, how many of 2^12
  // codes are taken, which is Kraft's sum.
  __device__ __forceinline__ uint32_t add_up(int lane) {
    constexpr int kCells = kMaxCodeBits * kSymbolGroups / kLanes;  // of a lane, neighbours
    static_assert(kCells * kLanes == kMaxCodeBits * kSymbolGroups);
    uint32_t cell[kCells], sum = 0;
#pragma unroll
    for (int i = 0; i < kCells; ++i) {
      const int at = kCells * lane + i, bits = at / kSymbolGroups + 1;
      const uint32_t count = preceding[at];
      cell[i] = sum;
      sum += (count << (kMaxCodeBits - bits)) << 9 | count;
    }
    uint32_t inclusive = sum;
    for (int distance = 1; distance < kLanes; distance *= 2) {
      const uint32_t below = __shfl_up_sync(kAllLanes, inclusive, distance);
      if (lane >= distance) inclusive += below;
    }
#pragma unroll
    for (int i = 0; i < kCells; ++i) {
      preceding[kCells * lane + i] = inclusive - sum + cell[i];
    }
    return inclusive >> 9;
  }

  // Puts the entry of a symbol, which has a code, in its place; `exponent` gives the codebook's.
  template <typename Exponent>
  __device__ __forceinline__ void sort(int symbol, uint32_t length, uint32_t rank,
                                       const Exponent& exponent) {
    const uint32_t before = preceding[length_and_group(length, symbol / kLanes)];
    sorted[(before & kCountMask) + rank] =
        table_entry(exponent(symbol / kCodedExponents), exponent(symbol % kCodedExponents), length);
  }

  static constexpr uint32_t kCountMask = 511;
};

// The entries of ascending codes. Codes are of 12 bits, whatever is shorter filled up behind.
class CodeCursor {
 public:
  // No code is longer than `longest`.
  __device__ __forceinline__ CodeCursor(const CanonicalCodes& codes, uint32_t code,
                                        uint32_t longest)
      : codes_(codes) {
    const auto first_of = [&](uint32_t length) {
      return codes.preceding[CanonicalCodes::length_and_group(length, 0)];
    };
    uint32_t length = 1;
    for (uint32_t longer = 2; longer <= longest; ++longer) {
      if (first_of(longer) >> 9 <= code) length = longer;
    }
    const uint32_t first = first_of(length);
    const uint32_t place = (code - (first >> 9)) >> (kMaxCodeBits - length);
    at_ = (first & CanonicalCodes::kCountMask) + place;
    end_ = (first >> 9) + ((place + 1) << (kMaxCodeBits - length));
    entry_ = codes.sorted[at_];
  }

  // Of the same code as before, or of one that follows it without another's between.
  __device__ __forceinline__ uint32_t entry(uint32_t code) {
    if (code == end_) {
      entry_ = codes_.sorted[++at_];
      end_ += kTableSize >> (entry_ & 31);
    }
    return entry_;
  }

 private:
  const CanonicalCodes& codes_;
  uint32_t at_, end_, entry_;
};

}  // namespace df11::native
