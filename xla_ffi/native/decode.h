// The CPU decoder: one chunk at a time, into a tile of full size. Everything in the
// payload is checked before it is used; docs/format.md, section "Bounds".
#pragma once

#include <cstdint>
#include <cstring>

#include "common/simd.h"
#include "native/codebook.h"
#include "native/layout.h"

namespace df11::native {

// Words that a lane may read past its own start: 128 codes of 12 bits and a window.
inline constexpr int64_t kOverreadWords = 52;

// The longest record: all codes and all weights patched.
inline constexpr uint32_t kMostRecordWords =
    kRecordHeaderWords + kTileRows * kTileCols / 2 * kMaxCodeBits / 32 + kTileRows * kTileCols;

// The arrays of one slice.
struct SlicePayload {
  View view;
  const uint32_t* codebook;
  const uint32_t* chunk_offsets;
  const uint32_t* exponents;
  int64_t exponents_words;
  const uint32_t* sign_mantissa;
};

// A table of what 12 bits of a stream begin with: two pairs where both their codes fit, else
// one. (A GPU's warp must know how many a look-up gives; a CPU's lanes need not keep step.)
struct PairsTable {
  uint32_t pairs[kTableSize];    // exponents of up to two pairs, a byte each
  uint16_t advance[kTableSize];  // length of the codes in bits 0..5, number of pairs above
};

// Fills the table from the one of single pairs, which build_table makes.
template <Simd>
DF11_INLINE void fill_pairs_table(const uint32_t* __restrict entries, PairsTable& table) {
  for (uint32_t bits = 0; bits < kTableSize; ++bits) {
    const uint32_t first = entries[bits], length = first & 31;
    const uint32_t second = entries[bits >> length], both = length + (second & 31);
    const uint32_t first_pair = (first >> 7 & 255) | (first >> 15 & 0xff00);
    const uint32_t second_pair = (second >> 7 & 255) | (second >> 15 & 0xff00);
    const bool two = both <= kMaxCodeBits;
    table.pairs[bits] = two ? first_pair | second_pair << 16 : first_pair;
    table.advance[bits] = static_cast<uint16_t>(two ? both | 2 << 6 : length | 1 << 6);
  }
}

DF11_FOR_EACH_SIMD(void, fill_pairs_table, (const uint32_t* entries, PairsTable& table),
                   (entries, table))

// The lanes of one grid row. Each look-up waits for the one before it in its lane, so a core
// must follow several lanes to be busy.
inline constexpr int kRowLanes = kLanes / 4;

// Pairs of a grid row's lanes, as many as a chunk has, with room for what a lane decodes past
// its end: up to two pairs for each look-up that another lane needs.
struct RowPairs {
  uint16_t lane[kRowLanes][2 * 2 * kSteps * kLanePairs + 8];
};

// Decodes `count` pairs, a multiple of 4, of each lane, from bit positions[lane] on.
DF11_INLINE void look_up_row(const uint8_t* streams, const uint32_t* positions, int count,
                             const PairsTable& table, RowPairs& out) {
  uint32_t at[kRowLanes];
  uint16_t* to[kRowLanes];
  for (int l = 0; l < kRowLanes; ++l) {
    at[l] = positions[l];
    to[l] = out.lane[l];
  }
  // No lane is done before it has had eight pairs a round.
  int rounds = count / 8;
  for (bool more = true; more;) {
    // 64 bits less at most 7 serve four look-ups of at most 12. The highest bit marks how far
    // the window was shifted.
    uint64_t window[kRowLanes];
    for (int l = 0; l < kRowLanes; ++l) {
      std::memcpy(&window[l], streams + (at[l] >> 3), 8);
      window[l] = window[l] >> (at[l] & 7) | uint64_t{1} << 63;
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 8
      for (int l = 0; l < kRowLanes; ++l) {
        const uint32_t bits = window[l] & (kTableSize - 1);
        const uint32_t advance = table.advance[bits];
        std::memcpy(to[l], &table.pairs[bits], 4);
        to[l] += advance >> 6;
        window[l] >>= advance & 63;
      }
    }
    for (int l = 0; l < kRowLanes; ++l) at[l] += __builtin_clzll(window[l]);
    if (--rounds > 0) continue;
    more = false;
    for (int l = 0; l < kRowLanes; ++l) more |= to[l] - out.lane[l] < count;
  }
}

// The same for a raw chunk, whose exponents are not coded.
DF11_INLINE void copy_row(const uint32_t* words, int half_steps, RowPairs& out) {
  for (int half_step = 0; half_step < half_steps; ++half_step) {
    for (int l = 0; l < kRowLanes; ++l) {
      std::memcpy(out.lane[l] + half_step * kLanePairs,
                  words + half_step * kHalfStepPairs / 2 + l * kLanePairs / 2, 2 * kLanePairs);
    }
  }
}

// Vectors of the compiler's, which it maps to the registers of the target: kWidth pairs.
template <int kWidth>
struct Vectors;
template <>
struct Vectors<8> {
  using U16 = uint16_t __attribute__((vector_size(16)));
  using U32 = uint32_t __attribute__((vector_size(32)));
  using HalfU32 = uint32_t __attribute__((vector_size(16)));
};
template <>
struct Vectors<16> {
  using U16 = uint16_t __attribute__((vector_size(32)));
  using U32 = uint32_t __attribute__((vector_size(64)));
  using HalfU32 = uint32_t __attribute__((vector_size(32)));
};

// Merges the exponents of one lane or two neighbouring ones (the vector's width tells) with
// their sign and mantissa, folds the pairs into the checksum accumulators and writes them to
// two rows of `out`. Vectors are not passed by value: that would depend on the target.
template <int kWidth>
DF11_INLINE void merge_pairs(const uint16_t* lane, const uint16_t* next_lane,
                             const uint32_t* sign_mantissa, uint32_t* acc, uint16_t* out,
                             int64_t stride) {
  using V = Vectors<kWidth>;
  typename V::U16 exponents;
  typename V::HalfU32 words;
  typename V::U32 sums;
  std::memcpy(&words, sign_mantissa, sizeof words);
  std::memcpy(&sums, acc, sizeof sums);
  const typename V::HalfU32 rotated = words << 8 | words >> 24;
  typename V::U32 rest;
#if __has_builtin(__builtin_shufflevector)
  if constexpr (kWidth == kLanePairs) {
    std::memcpy(&exponents, lane, sizeof exponents);
    rest = __builtin_shufflevector(words, rotated, 0, 4, 1, 5, 2, 6, 3, 7);
  } else {
    Vectors<kLanePairs>::U16 first, second;
    std::memcpy(&first, lane, sizeof first);
    std::memcpy(&second, next_lane, sizeof second);
    exponents = __builtin_shufflevector(first, second, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13,
                                        14, 15);
    rest = __builtin_shufflevector(words, rotated, 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7,
                                   15);
  }
#else  // Before GCC 12. Slower: the vectors are put together in memory.
  std::memcpy(&exponents, lane, 2 * kLanePairs);
  if constexpr (kWidth > kLanePairs) {
    std::memcpy(reinterpret_cast<char*>(&exponents) + 2 * kLanePairs, next_lane, 2 * kLanePairs);
  }
  for (int i = 0; i < kWidth; ++i) rest[i] = i % 2 ? rotated[i / 2] : words[i / 2];
#endif
  (void)next_lane;
  const auto both = __builtin_convertvector(exponents, typename V::U32);
  const typename V::U32 pairs =
      (both << 7 & 0x7f80u) | (both << 15 & 0x7f800000u) | (rest & kSignMantissa);
  sums = sums * 0x9e3779b1u + pairs;  // checksum_step
  sums = sums << 13 | sums >> 19;
  const auto row = __builtin_convertvector(pairs, typename V::U16);
  const auto next_row = __builtin_convertvector(pairs >> 16, typename V::U16);
  std::memcpy(acc, &sums, sizeof sums);
  std::memcpy(out, &row, sizeof row);
  std::memcpy(out + stride, &next_row, sizeof next_row);
}

// Fetches what the same part of the next chunk will need, since the hardware's prefetchers
// stop at page boundaries. Addresses past the end are harmless.
DF11_INLINE void prefetch(const uint32_t* words, int count) {
  for (int i = 0; i < count; i += 16) __builtin_prefetch(words + i);
}

// Decodes a record into a tile of 16 * chunk.steps rows of 64 weights, `stride` apart.
// The record must be followed by kOverreadWords readable words. Returns false if it is
// corrupt; what was written to the tile is then of no use.
template <Simd kSimd>
DF11_INLINE bool decode_record(const uint32_t* record, int64_t words, const Chunk& chunk,
                               int64_t index, const uint32_t* chunk_sign_mantissa,
                               const PairsTable& table, uint16_t* tile, int64_t stride) {
  if (words < kRawRecordHeaderWords) return false;
  const bool raw = record[1] == kRawChunk;
  uint32_t positions[4][kRowLanes];
  uint32_t patches = 0;
  if (raw) {
    if (words != kRawRecordHeaderWords + chunk.steps * kStepWords) return false;
  } else {
    if (words < kRecordHeaderWords) return false;
    patches = record[1] & 0xffff;
    if (patches == kRawChunk) return false;
    const uint32_t base = record[1] >> 16;
    uint32_t bits = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      positions[lane % 4][lane / 4] = bits;
      bits += base + (record[2 + lane / 4] >> (8 * (lane % 4)) & 255);
    }
    if (words != kRecordHeaderWords + int64_t{(bits + 31) / 32} + patches) return false;
  }

  constexpr int kRowWords = kTileCols / 2;  // of sign_mantissa, and of a raw chunk's exponents
  const int half_steps = 2 * chunk.steps;
  RowPairs exponents;
  uint32_t sum = checksum_chunk(index);
  for (int t = 0; t < 4; ++t) {
    if (raw) {
      copy_row(record + kRawRecordHeaderWords + t * kRowWords, half_steps, exponents);
    } else {
      look_up_row(reinterpret_cast<const uint8_t*>(record + kRecordHeaderWords), positions[t],
                  half_steps * kLanePairs, table, exponents);
    }
    prefetch(record + words + t * 192, 192);
    uint32_t acc[kTileCols] = {};
    for (int half_step = 0; half_step < half_steps; ++half_step) {
      const int first_word = half_step * kHalfStepPairs / 2 + t * kRowWords;
      const uint32_t* sign_mantissa = chunk_sign_mantissa + first_word;
      prefetch(sign_mantissa + kSteps * kStepWords, kRowWords);
      const int64_t row = half_step / 2 * kStepRows + 4 * t + half_step % 2 * 2;
      constexpr int kVectorLanes = kSimd == Simd::kAvx512 ? 2 : 1;
      for (int l = 0; l < kRowLanes; l += kVectorLanes) {
        const int col = l * kLanePairs, first_pair = half_step * kLanePairs;
        merge_pairs<kVectorLanes * kLanePairs>(
            exponents.lane[l] + first_pair, exponents.lane[l + kVectorLanes - 1] + first_pair,
            sign_mantissa + col / 2, acc + col, tile + row * stride + col, stride);
      }
    }
    for (int i = 0; i < kTileCols; ++i) sum += checksum_place(acc[i], t * kTileCols + i);
  }

  const uint32_t* patch = record + words - patches;
  for (uint32_t i = 0; i < patches; ++i) {
    sum += checksum_patch(patch[i]);
    const uint32_t position = patch[i] >> 16;
    if (position < static_cast<uint32_t>(chunk.steps * kStepRows * kTileCols)) {
      tile[position / kTileCols * stride + position % kTileCols] = static_cast<uint16_t>(patch[i]);
    }
  }
  return sum == record[0];
}

DF11_FOR_EACH_SIMD(bool, decode_record,
                   (const uint32_t* record, int64_t words, const Chunk& chunk, int64_t index,
                    const uint32_t* chunk_sign_mantissa, const PairsTable& table, uint16_t* tile,
                    int64_t stride),
                   (record, words, chunk, index, chunk_sign_mantissa, table, tile, stride))

}  // namespace df11::native
