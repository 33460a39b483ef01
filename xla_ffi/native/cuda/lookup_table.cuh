// A look-up table in shared memory with as many bits as a matrix's longest code has, and copies of
// each entry in neighbouring banks: docs/format.md, section "codebook".
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/async_copies.cuh"
#include "common/lanes.cuh"
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

// What blocks of 32 symbols hold of each length. First how many; then what precedes them in
// canonical order: symbols in the low 9 bits, and above them what these take of 2^12 codes.
inline constexpr int kSymbolBlocks = kSymbols / kLanes;
struct LookupScratch {
  uint32_t preceding[kMaxCodeBits * kSymbolBlocks];
  uint32_t sorted[kSymbols];  // table entries in canonical order
  uint32_t ranks[kSymbols];   // of a symbol in its block, and its length above
};

__device__ inline void count_lengths(const uint32_t* codebook, LookupScratch& scratch,
                                     bool& too_long, int code_bits) {
  const int lane = threadIdx.x % kLanes, warps = blockDim.x / kLanes;
  for (int block = threadIdx.x / kLanes; block < kSymbolBlocks; block += warps) {
    const int symbol = kLanes * block + lane;
    const uint32_t words = __ldg(codebook + (kCodedExponents + symbol / 2) / 4);
    const uint32_t length = words >> (4 * (symbol % 8)) & 15;
    too_long |= length > static_cast<uint32_t>(code_bits);
    uint32_t rank = 0, count = 0;
    for (uint32_t bits = 1; bits <= kMaxCodeBits; ++bits) {
      const uint32_t same = __ballot_sync(kAllLanes, length == bits);
      if (lane + 1 == static_cast<int>(bits)) count = __popc(same);
      if (length == bits) rank = __popc(same & ((1u << lane) - 1));
    }
    if (lane < kMaxCodeBits) scratch.preceding[lane * kSymbolBlocks + block] = count;
    scratch.ranks[symbol] = length << 8 | rank;
  }
}

// A prefix sum over lengths and blocks by one warp; returns, in its last lane, how many of 2^12
// codes are taken.
__device__ inline uint32_t add_up_lengths(LookupScratch& scratch) {
  constexpr int kCells = kMaxCodeBits * kSymbolBlocks / kLanes;  // of a lane
  const int lane = threadIdx.x % kLanes;
  uint32_t cell[kCells], sum = 0;
#pragma unroll
  for (int i = 0; i < kCells; ++i) {
    const int at = kCells * lane + i, bits = at / kSymbolBlocks + 1;
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
  for (int i = 0; i < kCells; ++i) {
    scratch.preceding[kCells * lane + i] = inclusive - sum + cell[i];
  }
  return inclusive >> 9;
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
  constexpr uint32_t kCountMask = 511;
  bool too_long = false;
  count_lengths(codebook, scratch, too_long, table.code_bits);
  too_long = __syncthreads_or(too_long);
  uint32_t taken = 0;
  if (threadIdx.x < kLanes) taken = add_up_lengths(scratch);
  const bool complete = __syncthreads_or(threadIdx.x == kLanes - 1 && taken == kTableSize);
  if (!complete || too_long) return false;

  for (int symbol = threadIdx.x; symbol < kSymbols; symbol += blockDim.x) {
    const uint32_t length = scratch.ranks[symbol] >> 8, rank = scratch.ranks[symbol] & 255;
    if (length == 0) continue;
    const auto exponent = [&](int number) {
      return __ldg(codebook + number / 4) >> (8 * (number % 4)) & 255;
    };
    const uint32_t before = scratch.preceding[(length - 1) * kSymbolBlocks + symbol / kLanes];
    scratch.sorted[(before & kCountMask) + rank] =
        table_entry(exponent(symbol / kCodedExponents), exponent(symbol % kCodedExponents), length);
  }
  __syncthreads();

  // The table's index is the code bit-reversed. A thread fills the entries of four successive
  // codes, which lie a quarter of the table apart, so that a warp's stores do not collide.
  const uint32_t bits = table.code_bits, columns = 1u << (bits - 2);
  for (uint32_t column = threadIdx.x; column < columns; column += blockDim.x) {
    const uint32_t code = __brev(column) >> (34 - bits) << (kMaxCodeBits + 2 - bits);
    uint32_t length = 1;
    for (uint32_t longer = 2; longer <= bits; ++longer) {
      if (scratch.preceding[(longer - 1) * kSymbolBlocks] >> 9 <= code) length = longer;
    }
    const uint32_t first = scratch.preceding[(length - 1) * kSymbolBlocks];
    const uint32_t place = (code - (first >> 9)) >> (kMaxCodeBits - length);
    uint32_t at = (first & kCountMask) + place;
    uint32_t end = (first >> 9) + ((place + 1) << (kMaxCodeBits - length));
    uint32_t entry = scratch.sorted[at];
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      if (code + (i << (kMaxCodeBits - bits)) == end) {
        entry = scratch.sorted[++at];
        end += kTableSize >> (entry & 31);
      }
      store_copies(table, column + (__brev(i) >> 30) * columns, entry);
    }
  }
  __syncthreads();
  return true;
}

}  // namespace df11::native
