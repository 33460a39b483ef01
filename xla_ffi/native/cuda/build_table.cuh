// Builds the look-up table of a codebook in shared memory: docs/format.md, section "codebook".
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/lanes.cuh"
#include "native/layout.h"

namespace df11::native {

inline constexpr int kSymbolGroups = kSymbols / kLanes;
struct TableScratch {
  // For each length and each group of 32 symbols, in this order: first how many there are,
  // then what precedes them in canonical order, symbols in the low 9 bits and above them
  // the table entries that these take.
  uint32_t preceding[kMaxCodeBits * kSymbolGroups];
  uint32_t sorted[kSymbols];  // table entries in canonical order
};

DF11_HD int length_and_group(uint32_t length, int group) {
  return (static_cast<int>(length) - 1) * kSymbolGroups + group;
}

DF11_HD uint32_t unpack_nibble(const uint32_t* words, int i) {
  return words[i / 8] >> (4 * (i % 8)) & 15;
}

// Fills the table; returns false, in all threads alike, if the code is not complete.
// All threads of the block, kWarps warps, take part. Ends with a barrier.
template <int kWarps>
__device__ inline bool build_table_in_block(const uint32_t* codebook, TableScratch& scratch,
                                            uint32_t* table) {
  constexpr int kThreads = kWarps * kLanes;
  static_assert(kSymbolGroups % kWarps == 0 && kSymbols % kThreads == 0);
  constexpr int kGroups = kSymbolGroups / kWarps;  // a warp's
  constexpr uint32_t kCountMask = 511;
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;

  // How many symbols of each length are in each group of 32, and a symbol's rank there.
  uint32_t length[kGroups], rank[kGroups];
  bool too_long = false;
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    const int group = warp + i * kWarps;
    length[i] = unpack_nibble(codebook + kCodedExponents / 4, kLanes * group + lane);
    too_long |= length[i] > kMaxCodeBits;
    rank[i] = 0;
    uint32_t count = 0;
    for (uint32_t bits = 1; bits <= kMaxCodeBits; ++bits) {
      const uint32_t same = __ballot_sync(kAllLanes, length[i] == bits);
      if (lane + 1 == static_cast<int>(bits)) count = __popc(same);
      if (length[i] == bits) rank[i] = __popc(same & ((1u << lane) - 1));
    }
    if (lane < kMaxCodeBits) scratch.preceding[length_and_group(lane + 1, group)] = count;
  }
  too_long = __syncthreads_or(too_long);

  // A prefix sum over (length, group): each lane has three neighbours.
  constexpr int kCells = kMaxCodeBits * kSymbolGroups;
  static_assert(kCells == 3 * kLanes);
  uint32_t total = 0;
  if (warp == 0) {
    uint32_t cell[3], sum = 0;
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      const int at = 3 * lane + i, bits = at / kSymbolGroups + 1;
      const uint32_t count = scratch.preceding[at];
      cell[i] = sum;
      sum += (count << (kMaxCodeBits - bits)) << 9 | count;
    }
    uint32_t inclusive = sum;
    for (int distance = 1; distance < kLanes; distance *= 2) {
      const uint32_t below = __shfl_up_sync(kAllLanes, inclusive, distance);
      if (lane >= distance) inclusive += below;
    }
#pragma unroll
    for (int i = 0; i < 3; ++i) scratch.preceding[3 * lane + i] = inclusive - sum + cell[i];
    total = inclusive >> 9;
  }
  // Kraft's sum is in the last lane.
  const bool complete = __syncthreads_or(threadIdx.x == kLanes - 1 && total == kTableSize);
  if (!complete || too_long) return false;

#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    if (length[i] == 0) continue;
    const int group = warp + i * kWarps, symbol = kLanes * group + lane;
    const auto exponent = [&](int number) {
      return codebook[number / 4] >> (8 * (number % 4)) & 255;
    };
    const uint32_t at =
        (scratch.preceding[length_and_group(length[i], group)] & kCountMask) + rank[i];
    scratch.sorted[at] = table_entry(exponent(symbol / kCodedExponents),
                                     exponent(symbol % kCodedExponents), length[i]);
  }
  __syncthreads();

  // The table's index is the code bit-reversed. A thread fills the entries of a column,
  // 256 apart, which are 16 successive codes; and a warp's stores do not collide.
  for (int column = threadIdx.x; column < kSymbols; column += kThreads) {
    const uint32_t code = __brev(column) >> 24 << 4;
    uint32_t bits = 1;
    for (uint32_t longer = 2; longer <= kMaxCodeBits; ++longer) {
      if (scratch.preceding[length_and_group(longer, 0)] >> 9 <= code) bits = longer;
    }
    const uint32_t first = scratch.preceding[length_and_group(bits, 0)];
    const uint32_t place = (code - (first >> 9)) >> (kMaxCodeBits - bits);
    uint32_t at = (first & kCountMask) + place;
    uint32_t end = (first >> 9) + ((place + 1) << (kMaxCodeBits - bits));
    uint32_t entry = scratch.sorted[at];
#pragma unroll
    for (uint32_t i = 0; i < 16; ++i) {
      if (code + i == end) {
        entry = scratch.sorted[++at];
        end += kTableSize >> (entry & 31);
      }
      table[column + (__brev(i) >> 28) * kSymbols] = entry;
    }
  }
  __syncthreads();
  return true;
}

}  // namespace df11::native
