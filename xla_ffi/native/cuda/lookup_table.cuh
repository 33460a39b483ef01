// A look-up table in shared memory with as many bits as a matrix's longest code has, and copies of
// each entry in neighbouring banks: docs/format.md, section "codebook".
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/async_copies.cuh"
#include "common/lanes.cuh"
#include "native/cuda/canonical_codes.cuh"
#include "native/layout.h"

namespace df11::native {

// The table takes 1 << log2_bytes bytes, and lies at a multiple of that: so a masked window and the
// table's address are joined by the one instruction that masks.
struct LookupTable {
  uint32_t address, log2_bytes, code_bits;

  // A window begins this many bits before the code, so that the code is where an offset has the
  // number of an entry.
  DF11_HD uint32_t lead() const { return log2_bytes - code_bits; }
  DF11_HD uint32_t copies() const { return 1u << (lead() - 2); }
  DF11_HD uint32_t mask() const { return ((1u << code_bits) - 1) << lead(); }
  // Lanes look at different copies.
  DF11_HD uint32_t of_lane(int lane) const { return address + 4 * (lane % copies()); }
};

struct LookupScratch {
  CanonicalCodes codes;
  uint32_t ranks[kSymbols];  // of a symbol in its group, and its length above
};

__device__ inline void count_lengths(const uint32_t* codebook, LookupScratch& scratch,
                                     bool& too_long, int code_bits) {
  const int lane = threadIdx.x % kLanes, warps = blockDim.x / kLanes;
  for (int group = threadIdx.x / kLanes; group < kSymbolGroups; group += warps) {
    const int symbol = kLanes * group + lane;
    const uint32_t words = __ldg(codebook + (kCodedExponents + symbol / 2) / 4);
    const uint32_t length = words >> (4 * (symbol % 8)) & 15;
    too_long |= length > static_cast<uint32_t>(code_bits);
    const uint32_t rank = scratch.codes.count_group(group, length, lane);
    scratch.ranks[symbol] = length << 8 | rank;
  }
}

__device__ inline void store_copies(const LookupTable& table, uint32_t index, uint32_t entry) {
  const uint32_t copies = table.copies(), at = table.address + 4 * copies * index;
  if (copies < 4) {
    for (uint32_t i = 0; i < copies; ++i) store_shared(at + 4 * i, entry);
    return;
  }
  // Beginning elsewhere in each lane, so that fewer banks are asked twice.
  for (uint32_t i = 0; i < copies / 4; ++i) {
    const uint32_t place = (i + threadIdx.x) % (copies / 4);
    store_shared(at + 16 * place, uint4{entry, entry, entry, entry});
  }
}

// Fills the table; returns false, in all threads alike, if the code is not complete or is longer
// than the table's. All threads of the block take part. Ends with a barrier.
__device__ inline bool fill_lookup_table(const uint32_t* codebook, const LookupTable& table,
                                         LookupScratch& scratch) {
  bool too_long = false;
  count_lengths(codebook, scratch, too_long, table.code_bits);
  too_long = __syncthreads_or(too_long);
  uint32_t taken = 0;
  if (threadIdx.x < kLanes) taken = scratch.codes.add_up(threadIdx.x);
  const bool complete = __syncthreads_or(threadIdx.x == kLanes - 1 && taken == kTableSize);
  if (!complete || too_long) return false;

  for (int symbol = threadIdx.x; symbol < kSymbols; symbol += blockDim.x) {
    const uint32_t length = scratch.ranks[symbol] >> 8, rank = scratch.ranks[symbol] & 255;
    if (length == 0) continue;
    const auto exponent = [&](int number) {
      return __ldg(codebook + number / 4) >> (8 * (number % 4)) & 255;
    };
    scratch.codes.sort(symbol, length, rank, exponent);
  }
  __syncthreads();

  // The table's index is the code bit-reversed. A thread fills the entries of four successive
  // codes, which lie a quarter of the table apart, so that a warp's stores do not collide.
  const uint32_t bits = table.code_bits, columns = 1u << (bits - 2);
  for (uint32_t column = threadIdx.x; column < columns; column += blockDim.x) {
    const uint32_t code = __brev(column) >> (34 - bits) << (kMaxCodeBits + 2 - bits);
    CodeCursor cursor(scratch.codes, code, bits);
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      const uint32_t entry = cursor.entry(code + (i << (kMaxCodeBits - bits)));
      store_copies(table, column + (__brev(i) >> 30) * columns, entry);
    }
  }
  __syncthreads();
  return true;
}

}  // namespace df11::native
