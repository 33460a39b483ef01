// A codebook's symbols in the order of their codes, from the codes' lengths, by a block: what
// look-up tables are filled from. docs/format.md, section "codebook".
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/lanes.cuh"
#include "native/layout.h"

namespace df11::native {

// Symbols are sorted in parts, a lane a symbol.
inline constexpr int kParts = kSymbols / kLanes;

// Codes are of 12 bits here, whatever is shorter filled up behind.
struct CanonicalCodes {
  // By length: what precedes its codes, symbols in the low 9 bits and above them the first code.
  uint32_t first[16];
  uint32_t sorted[kSymbols];  // table entries in canonical order
  uint2 counts[16];           // by length: how many codes each part has, a byte a part
  bool sound;                 // the code is complete, and none is longer than allowed

  static constexpr uint32_t kCountMask = 511;

  // Whether none is of more bits: nothing comes behind those.
  __device__ __forceinline__ bool fit_in(int bits) const {
    return first[bits + 1] == first[kMaxCodeBits + 1];
  }
};
static_assert(kParts == sizeof(uint2));

// A lane's words of a codebook.
struct CodebookWords {
  uint32_t lengths;    // of the codes of eight symbols
  uint32_t exponents;  // four of the sixteen, those of lane % 4
};
__device__ __forceinline__ CodebookWords load_codebook(const uint32_t* codebook, int lane) {
  return {__ldg(codebook + kCodedExponents / 4 + lane), __ldg(codebook + lane % 4)};
}

// The lengths of a part's codes.
struct PartLengths {
  uint32_t own = 0;         // the lane's
  uint32_t planes[4] = {};  // all lanes', bit by bit

  // The lanes whose code has this length.
  __device__ __forceinline__ uint32_t lanes_with(uint32_t length) const {
    uint32_t lanes = kAllLanes;
#pragma unroll
    for (int bit = 0; bit < 4; ++bit) lanes &= planes[bit] ^ ((length >> bit & 1) - 1);
    return lanes;
  }
};
__device__ __forceinline__ PartLengths lengths_of_part(const CodebookWords& codebook, int part,
                                                       int lane) {
  PartLengths lengths;
  const uint32_t word = __shfl_sync(kAllLanes, codebook.lengths, 4 * part + lane / 8);
  lengths.own = word >> (4 * (lane % 8)) & 15;
#pragma unroll
  for (int bit = 0; bit < 4; ++bit) {
    lengths.planes[bit] = __ballot_sync(kAllLanes, lengths.own >> bit & 1);
  }
  return lengths;
}

// The sum of those of the eight bytes that are in the mask.
__device__ __forceinline__ uint32_t sum_bytes(const uint2& bytes, uint64_t mask) {
  constexpr uint32_t kOnes = 0x01010101;
  const uint32_t upper = __dp4a(bytes.y & static_cast<uint32_t>(mask >> 32), kOnes, 0u);
  return __dp4a(bytes.x & static_cast<uint32_t>(mask), kOnes, upper);
}

// Fills `codes`, by all threads of a block; the first eight warps do it. There is a barrier within,
// and another has to follow.
__device__ inline void sort_codes(const CodebookWords& codebook, uint32_t longest,
                                  CanonicalCodes& codes) {
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int warps = static_cast<int>(blockDim.x / kLanes);
  const auto count = [&](int part) {
    const PartLengths lengths = lengths_of_part(codebook, part, lane);
    const int of_length = __popc(lengths.lanes_with(lane));  // a lane a length
    if (lane < 16) reinterpret_cast<uint8_t*>(codes.counts + lane)[part] = of_length;
    return lengths;
  };
  PartLengths lengths;
  if (warp < kParts) lengths = count(warp);
#pragma unroll 1
  for (int part = warp + warps; part < kParts; part += warps) count(part);
  __syncthreads();
  if (warp >= kParts) return;

  // A lane a length: what precedes it.
  const uint2 counts = codes.counts[lane % 16];
  const uint32_t symbols = sum_bytes(counts, ~uint64_t{0});
  const bool is_length = lane >= 1 && lane <= kMaxCodeBits;
  const uint32_t own = is_length ? (symbols << (kMaxCodeBits - lane)) << 9 | symbols : 0;
  const uint32_t inclusive = sum_up_to<16>(own, lane);
  const uint32_t first = inclusive - own;
  // Kraft's sum.
  const bool complete = __shfl_sync(kAllLanes, inclusive, 15) >> 9 == kTableSize;
  const bool is_too_long = symbols > 0 && static_cast<uint32_t>(lane % 16) > longest;
  const bool sound = complete && !__ballot_sync(kAllLanes, is_too_long);
  if (warp == 0) {
    if (lane < 16) codes.first[lane] = first;
    if (lane == 0) codes.sound = sound;
  }

  const auto exponent = [&](int number) {
    return __shfl_sync(kAllLanes, codebook.exponents, number / 4) >> (8 * (number % 4)) & 255;
  };
#pragma unroll 1
  for (int part = warp; part < kParts; part += warps) {
    if (part > warp) lengths = lengths_of_part(codebook, part, lane);
    // Of a lane's length, those in parts before this one, and of shorter ones all.
    const uint32_t preceding =
        (first & CanonicalCodes::kCountMask) + sum_bytes(counts, (uint64_t{1} << (8 * part)) - 1);
    const uint32_t equal = lengths.lanes_with(lengths.own) & ((1u << lane) - 1);
    const uint32_t at = __shfl_sync(kAllLanes, preceding, lengths.own) + __popc(equal);
    const uint32_t first_exponent = exponent(2 * part + lane / 16);
    const uint32_t second_exponent = exponent(lane % 16);
    if (lengths.own == 0 || !sound) continue;
    codes.sorted[at] = table_entry(first_exponent, second_exponent, lengths.own);
  }
}

// Fills a table of 1 << bits entries, by all threads of a block, when the codes are sorted; a
// barrier has to follow. `store` puts an entry at an index, which is the code bit-reversed: so the
// entries of a code that is shorter by b bits than the table's are 1 << b, far from each other. A
// thread takes a beginning of bits - kRunBits bits and, if a code is no longer, fills all entries
// that begin so; and it takes a symbol and, if its code is longer, fills those of that one. So no
// thread has many symbols to look up, one after the other.
template <int kRunBits, typename Store>
__device__ __forceinline__ void fill_table(const CanonicalCodes& codes, uint32_t bits,
                                           const Store& store) {
  const uint32_t short_bits = bits - kRunBits, columns = 1u << short_bits;
  for (uint32_t column = threadIdx.x; column < columns; column += blockDim.x) {
    const uint32_t code = __brev(column) >> (32 - kMaxCodeBits);
    uint32_t length = 1;
#pragma unroll
    for (uint32_t longer = 2; longer <= kMaxCodeBits; ++longer) {
      length += codes.first[longer] >> 9 <= code;
    }
    if (length > short_bits) continue;
    const uint32_t first = codes.first[length];
    const uint32_t place = (code - (first >> 9)) >> (kMaxCodeBits - length);
    const uint32_t entry = codes.sorted[(first & CanonicalCodes::kCountMask) + place];
#pragma unroll
    for (uint32_t i = 0; i < 1u << kRunBits; ++i) store(column + i * columns, entry);
  }
  if (kRunBits == 0) return;
  // Beginning with the threads that had no column, if there are any.
  const uint32_t symbols = codes.first[kMaxCodeBits + 1] & CanonicalCodes::kCountMask;
  for (uint32_t i = blockDim.x - 1 - threadIdx.x; i < symbols; i += blockDim.x) {
    const uint32_t entry = codes.sorted[i], length = entry & 31;
    if (length <= short_bits) continue;
    const uint32_t first = codes.first[length];
    const uint32_t place = i - (first & CanonicalCodes::kCountMask);
    const uint32_t code = (first >> 9) + (place << (kMaxCodeBits - length));
#pragma unroll 1
    for (uint32_t index = __brev(code) >> (32 - kMaxCodeBits); index >> bits == 0;
         index += 1u << length) {
      store(index, entry);
    }
  }
}

}  // namespace df11::native
