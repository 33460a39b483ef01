// A codebook's symbols in the order of their codes, from the codes' lengths, by a block: what
// look-up tables are filled from. docs/format.md, section "codebook".
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/lanes.cuh"
#include "native/layout.h"

namespace df11::native {

// Codes are of 12 bits here, whatever is shorter filled up behind.
struct CanonicalCodes {
  // By length: what precedes its codes, symbols in the low 9 bits and above them the first code.
  uint32_t first[16];
  uint32_t sorted[kSymbols];  // table entries in canonical order
  bool sound;                 // the code is complete, and none is longer than allowed

  static constexpr uint32_t kCountMask = 511;
};

// How many symbols have each length from 1 to 12: ten bits for each, three in a word.
struct LengthCounts {
  uint32_t words[4];

  __device__ static int shift(int length) { return 10 * ((length - 1) % 3); }
  __device__ __forceinline__ uint32_t of(int length) const {
    const int at = (length - 1) / 3;
    const uint32_t word = at == 0 ? words[0] : at == 1 ? words[1] : at == 2 ? words[2] : words[3];
    return word >> shift(length) & 1023;
  }
};

// A lane's words of a codebook.
struct CodebookWords {
  uint32_t lengths;    // of the codes of eight symbols
  uint32_t exponents;  // four of the sixteen, those of lane % 4
};
__device__ __forceinline__ CodebookWords load_codebook(const uint32_t* codebook, int lane) {
  return {__ldg(codebook + kCodedExponents / 4 + lane), __ldg(codebook + lane % 4)};
}

// Fills `codes`, by all threads of a block; the first eight warps do it. A barrier has to follow.
__device__ inline void sort_codes(const CodebookWords& codebook, uint32_t longest,
                                  CanonicalCodes& codes) {
  constexpr int kParts = 8;  // a lane has the lengths of as many symbols, in a word
  static_assert(kSymbols == kParts * kLanes);
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int warps = static_cast<int>(blockDim.x / kLanes);
  if (warp >= kParts) return;
  const uint32_t lengths = codebook.lengths;
  const auto exponent = [&](int number) {
    return __shfl_sync(kAllLanes, codebook.exponents, number / 4) >> (8 * (number % 4)) & 255;
  };
  const uint32_t first_exponent = exponent(lane / 2);

  // Of the lane's symbols, four bits for each length from 0 to 15.
  uint64_t counts = 0;
#pragma unroll
  for (int i = 0; i < kParts; ++i) counts += uint64_t{1} << (4 * (lengths >> (4 * i) & 15));
  const bool too_long = __ballot_sync(kAllLanes, counts >> (4 * longest) >> 4 != 0);

  // Of the symbols in lanes before this one, and of all.
  LengthCounts before, all;
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    uint32_t own = 0;
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      own |= static_cast<uint32_t>(counts >> (4 * (3 * word + i + 1)) & 15) << (10 * i);
    }
    const uint32_t inclusive = sum_up_to(own, lane);
    before.words[word] = inclusive - own;
    all.words[word] = __shfl_sync(kAllLanes, inclusive, kLanes - 1);
  }

  // A lane a length: what precedes it.
  const bool is_length = lane >= 1 && lane <= kMaxCodeBits;
  const uint32_t count = is_length ? all.of(lane) : 0;
  const uint32_t own = is_length ? (count << (kMaxCodeBits - lane)) << 9 | count : 0;
  const uint32_t inclusive = sum_up_to(own, lane);
  const uint32_t first = inclusive - own;
  // Kraft's sum.
  const bool complete = __shfl_sync(kAllLanes, inclusive, kLanes - 1) >> 9 == kTableSize;
  const bool sound = complete && !too_long;
  if (warp == 0) {
    if (lane < 16) codes.first[lane] = first;
    if (lane == 0) codes.sound = sound;
  }

  for (int part = warp; part < kParts; part += warps) {
    const uint32_t length = lengths >> (4 * part) & 15;
    const uint32_t preceding = __shfl_sync(kAllLanes, first, length) & CanonicalCodes::kCountMask;
    const uint32_t second_exponent = exponent(lane % 2 * kParts + part);
    if (length == 0 || !sound) continue;
    // Of the word's lengths before this one, those that are equal: their difference is 0.
    const uint32_t other = lengths ^ length * 0x11111111u;
    const uint32_t differs = (other | other >> 1 | other >> 2 | other >> 3) & 0x11111111u;
    const uint32_t equal = ~differs & 0x11111111u & ((1u << (4 * part)) - 1);
    codes.sorted[preceding + before.of(static_cast<int>(length)) + __popc(equal)] =
        table_entry(first_exponent, second_exponent, length);
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
