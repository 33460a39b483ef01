// The CPU decoder: one chunk at a time, into a tile of full size. Everything in the
// payload is checked before it is used; docs/format.md, section "Bounds".
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "codebook.h"
#include "layout.h"

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

// The eight exponent pairs of a lane's half-step; advances the lane's position in bits.
DF11_HD void look_up_lane(const uint8_t* streams, const uint32_t* table, uint32_t& position,
                          uint32_t* entries) {
  for (int i = 0; i < kLanePairs; i += 4) {
    // 64 bits less at most 7 serve four codes of at most 12.
    uint64_t window;
    std::memcpy(&window, streams + (position >> 3), 8);
    window >>= position & 7;
    uint32_t lengths = 0;
    for (int j = i; j < i + 4; ++j) {
      const uint32_t entry = table[window & (kTableSize - 1)];
      entries[j] = entry;
      lengths += entry;
      window >>= entry & 63;
    }
    position += lengths & 127;
  }
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

// Decodes a record into a tile of 16 * chunk.steps rows of 64 weights, `stride` apart.
// The record must be followed by kOverreadWords readable words. Returns false if it is
// corrupt; what was written to the tile is then of no use.
DF11_HD bool decode_record(const uint32_t* record, int64_t words, const Chunk& chunk,
                           int64_t index, const uint32_t* chunk_sign_mantissa,
                           const uint32_t* table, uint16_t* tile, int64_t stride) {
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
      for (int lane = 0; lane < kLanes; ++lane) {
        look_up_lane(reinterpret_cast<const uint8_t*>(streams), table, positions[lane],
                     entries + lane % 4 * kTileCols + lane / 4 * kLanePairs);
      }
    }
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
    if (position >= static_cast<uint32_t>(chunk.steps * kStepRows * kTileCols)) return false;
    tile[position / kTileCols * stride + position % kTileCols] = static_cast<uint16_t>(patch[i]);
  }
  return sum == record[0];
}

using DecodeRecord = bool (*)(const uint32_t*, int64_t, const Chunk&, int64_t, const uint32_t*,
                              const uint32_t*, uint16_t*, int64_t);

inline bool decode_record_portable(const uint32_t* record, int64_t words, const Chunk& chunk,
                                   int64_t index, const uint32_t* sign_mantissa,
                                   const uint32_t* table, uint16_t* tile, int64_t stride) {
  return decode_record(record, words, chunk, index, sign_mantissa, table, tile, stride);
}

#if defined(__x86_64__) && defined(__GNUC__)
// The same code, compiled for wider vectors.
__attribute__((target("avx2,bmi,bmi2"))) inline bool decode_record_avx2(
    const uint32_t* record, int64_t words, const Chunk& chunk, int64_t index,
    const uint32_t* sign_mantissa, const uint32_t* table, uint16_t* tile, int64_t stride) {
  return decode_record(record, words, chunk, index, sign_mantissa, table, tile, stride);
}
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,bmi,bmi2,prefer-vector-width=512")))
inline bool decode_record_avx512(
    const uint32_t* record, int64_t words, const Chunk& chunk, int64_t index,
    const uint32_t* sign_mantissa, const uint32_t* table, uint16_t* tile, int64_t stride) {
  return decode_record(record, words, chunk, index, sign_mantissa, table, tile, stride);
}
#endif

}  // namespace df11
