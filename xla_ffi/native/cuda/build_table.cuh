// Builds the look-up table of a codebook in shared memory: docs/format.md, section "codebook".
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/lanes.cuh"
#include "native/cuda/canonical_codes.cuh"
#include "native/layout.h"

namespace df11::native {

DF11_HD uint32_t unpack_nibble(const uint32_t* words, int i) {
  return words[i / 8] >> (4 * (i % 8)) & 15;
}

// Fills the table; returns false, in all threads alike, if the code is not complete.
// All threads of the block, kWarps warps, take part. Ends with a barrier.
template <int kWarps>
__device__ inline bool build_table_in_block(const uint32_t* codebook, CanonicalCodes& codes,
                                            uint32_t* table) {
  constexpr int kThreads = kWarps * kLanes;
  static_assert(kSymbolGroups % kWarps == 0 && kSymbols % kThreads == 0);
  constexpr int kGroups = kSymbolGroups / kWarps;  // a warp's
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;

  // How many symbols of each length are in each group of 32, and a symbol's rank there.
  uint32_t length[kGroups], rank[kGroups];
  bool too_long = false;
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    const int group = warp + i * kWarps;
    length[i] = unpack_nibble(codebook + kCodedExponents / 4, kLanes * group + lane);
    too_long |= length[i] > kMaxCodeBits;
    rank[i] = codes.count_group(group, length[i], lane);
  }
  too_long = __syncthreads_or(too_long);

  const uint32_t total = warp == 0 ? codes.add_up(lane) : 0;
  // Kraft's sum is in the last lane.
  const bool complete = __syncthreads_or(threadIdx.x == kLanes - 1 && total == kTableSize);
  if (!complete || too_long) return false;

#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    if (length[i] == 0) continue;
    const int symbol = kLanes * (warp + i * kWarps) + lane;
    const auto exponent = [&](int number) {
      return codebook[number / 4] >> (8 * (number % 4)) & 255;
    };
    codes.sort(symbol, length[i], rank[i], exponent);
  }
  __syncthreads();

  // The table's index is the code bit-reversed. A thread fills the entries of a column,
  // 256 apart, which are 16 successive codes; and a warp's stores do not collide.
  for (int column = threadIdx.x; column < kSymbols; column += kThreads) {
    const uint32_t code = __brev(column) >> 24 << 4;
    CodeCursor cursor(codes, code, kMaxCodeBits);
#pragma unroll
    for (uint32_t i = 0; i < 16; ++i) {
      table[column + (__brev(i) >> 28) * kSymbols] = cursor.entry(code + i);
    }
  }
  __syncthreads();
  return true;
}

}  // namespace df11::native
