// The CPU decoder: one chunk at a time, into a tile of full size. Everything in the
// payload is checked before it is used; docs/format.md, section "Bounds".
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "codebook.h"
#include "layout.h"
#include "simd.h"

namespace df11 {

// Words that a lane may read past its own start: 128 codes of 12 bits and a window.
inline constexpr int64_t kOverreadWords = 52;

// The arrays of one slice.
struct SlicePayload {
  View view;
  const uint32_t* codebook;
  const uint32_t* chunk_offsets;
  const uint32_t* exponents;
  int64_t exponents_words;
  const uint32_t* sign_mantissa;
};

// Lanes decoded side by side: each look-up waits for the one before it in its lane, so a
// core needs several lanes to be busy. Measured on a Zen 5 core: 1 lane 0.36 ns a weight,
// 2 lanes 0.31, 4 lanes 0.25, 8 lanes 0.22; 16 lanes with AVX-512 gathers 0.46.
inline constexpr int kLanesAtOnce = 8;

// The exponent pairs of kLanesAtOnce lanes' half-step into their places in the grid;
// advances the lanes' positions, which are in bits.
DF11_HD void look_up_lanes(const uint8_t* streams, const uint32_t* table, int first_lane,
                           uint32_t* positions, uint32_t* entries) {
  uint32_t at[kLanesAtOnce];
  for (int l = 0; l < kLanesAtOnce; ++l) at[l] = positions[first_lane + l];
  for (int i = 0; i < kLanePairs; i += 4) {
    // 64 bits less at most 7 serve four codes of at most 12. The highest bit marks how far
    // the window was shifted.
    uint64_t window[kLanesAtOnce];
    for (int l = 0; l < kLanesAtOnce; ++l) {
      std::memcpy(&window[l], streams + (at[l] >> 3), 8);
      window[l] = window[l] >> (at[l] & 7) | uint64_t{1} << 63;
    }
#pragma GCC unroll 4
    for (int j = i; j < i + 4; ++j) {
#pragma GCC unroll 8
      for (int l = 0; l < kLanesAtOnce; ++l) {
        const int lane = first_lane + l;
        const uint32_t entry = table[window[l] & (kTableSize - 1)];
        entries[lane % 4 * kTileCols + lane / 4 * kLanePairs + j] = entry;
        window[l] >>= entry & 63;
      }
    }
    for (int l = 0; l < kLanesAtOnce; ++l) at[l] += __builtin_clzll(window[l]);
  }
  for (int l = 0; l < kLanesAtOnce; ++l) positions[first_lane + l] = at[l];
}

// Merges a half-step's exponents with sign and mantissa, folds the pairs into the checksum
// accumulators and writes its rows: grid row t fills rows 4 t and 4 t + 1 of `out`.
DF11_HD void merge_half_step(const uint32_t* __restrict entries,
                             const uint32_t* __restrict sign_mantissa, uint32_t* __restrict acc,
                             uint16_t* __restrict out, int64_t stride) {
  for (int t = 0; t < 4; ++t) {
    uint32_t pairs[kTileCols];
    for (int q = 0; q < kTileCols / 2; ++q) {
      const uint32_t word = sign_mantissa[t * kTileCols / 2 + q];
      pairs[2 * q] = merge_pair(entries[t * kTileCols + 2 * q], word);
      pairs[2 * q + 1] = merge_pair(entries[t * kTileCols + 2 * q + 1], rotl(word, 8));
    }
    for (int i = 0; i < kTileCols; ++i) {
      acc[t * kTileCols + i] = checksum_step(acc[t * kTileCols + i], pairs[i]);
    }
    uint16_t* __restrict first = out + 4 * t * stride;
    uint16_t* __restrict second = first + stride;
    for (int i = 0; i < kTileCols; ++i) first[i] = static_cast<uint16_t>(pairs[i]);
    for (int i = 0; i < kTileCols; ++i) second[i] = static_cast<uint16_t>(pairs[i] >> 16);
  }
}

// Fetches the part of the next chunk that the same half-step will need, since the hardware's
// prefetchers stop at page boundaries. Addresses past the end are harmless.
DF11_HD void prefetch_next_chunk(const uint32_t* chunk_sign_mantissa, const uint32_t* next_record,
                                 int half_step) {
  constexpr int kLineWords = 16, kRecordWords = 48;  // 48 words of codes a half-step, or fewer
  const uint32_t* next = chunk_sign_mantissa + kSteps * kStepWords + half_step * kStepWords / 2;
  for (int i = 0; i < kStepWords / 2; i += kLineWords) __builtin_prefetch(next + i);
  next_record += half_step * kRecordWords;
  for (int i = 0; i < kRecordWords; i += kLineWords) __builtin_prefetch(next_record + i);
}

// Decodes a record into a tile of 16 * chunk.steps rows of 64 weights, `stride` apart.
// The record must be followed by kOverreadWords readable words. Returns false if it is
// corrupt; what was written to the tile is then of no use.
DF11_HD bool decode_record(const uint32_t* record, int64_t words, const Chunk& chunk, int64_t index,
                           const uint32_t* chunk_sign_mantissa, const uint32_t* table,
                           uint16_t* tile, int64_t stride) {
  if (words < kRawRecordHeaderWords) return false;
  const bool raw = record[1] == kRawChunk;
  uint32_t positions[kLanes];
  uint32_t patches = 0;
  const uint32_t* streams = record + kRecordHeaderWords;
  if (raw) {
    if (words != kRawRecordHeaderWords + chunk.steps * kStepWords) return false;
  } else {
    if (words < kRecordHeaderWords) return false;
    patches = record[1] & 0xffff;
    if (patches == kRawChunk) return false;
    const uint32_t base = record[1] >> 16;
    uint32_t bits = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      positions[lane] = bits;
      bits += base + (record[2 + lane / 4] >> (8 * (lane % 4)) & 255);
    }
    if (words != kRecordHeaderWords + int64_t{(bits + 31) / 32} + patches) return false;
  }

  uint32_t acc[kHalfStepPairs] = {};
  uint32_t entries[kHalfStepPairs];
  for (int half_step = 0; half_step < 2 * chunk.steps; ++half_step) {
    if (raw) {
      const uint32_t* exponents = record + kRawRecordHeaderWords + half_step * kHalfStepPairs / 2;
      for (int i = 0; i < kHalfStepPairs; ++i) {
        const uint32_t pair = exponents[i / 2] >> (16 * (i % 2));
        entries[i] = table_entry(pair & 255, pair >> 8 & 255, 0);
      }
    } else {
      for (int lane = 0; lane < kLanes; lane += kLanesAtOnce) {
        look_up_lanes(reinterpret_cast<const uint8_t*>(streams), table, lane, positions, entries);
      }
    }
    prefetch_next_chunk(chunk_sign_mantissa, record + words, half_step);
    const int64_t row = half_step / 2 * kStepRows + half_step % 2 * 2;
    merge_half_step(entries, chunk_sign_mantissa + half_step * kHalfStepPairs / 2, acc,
                    tile + row * stride, stride);
  }

  uint32_t sum = checksum_chunk(index);
  for (int i = 0; i < kHalfStepPairs; ++i) sum += checksum_place(acc[i], i);
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
                    const uint32_t* chunk_sign_mantissa, const uint32_t* table, uint16_t* tile,
                    int64_t stride),
                   (record, words, chunk, index, chunk_sign_mantissa, table, tile, stride))

}  // namespace df11
