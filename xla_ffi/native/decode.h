// The CPU decoder: one chunk at a time, with all its rows and columns. Everything in the payload is
// checked before it is used; docs/format.md, section "Bounds".
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "common/simd.h"
#include "native/lane_vectors.h"
#include "native/layout.h"
#include "native/look_up.h"
#include "native/prefetch.h"

namespace df11::native {

// Words that a lane may read past its own start: 128 codes of 12 bits and a window.
inline constexpr int64_t kOverreadWords = 52;

// The longest record: all codes and all weights patched.
inline constexpr uint32_t kMostRecordWords =
    kRecordHeaderWords + kTileRows * kTileCols / 2 * kMaxCodeBits / 32 + kTileRows * kTileCols;

// The arrays of one slice.
struct SlicePayload {
  View view;
  int code_bits;  // of the longest code that the header allows
  const uint32_t* codebook;
  const uint32_t* chunk_offsets;
  const uint32_t* exponents;
  int64_t exponents_words;
  const uint32_t* sign_mantissa;
};

// What look-ups find of grid row t, for a raw chunk, whose exponents are not coded: `words` are
// from its first lane on.
DF11_INLINE void copy_row(const uint32_t* words, int half_steps, RowExponents& out) {
  for (int half_step = 0; half_step < half_steps; ++half_step) {
    for (int l = 0; l < kRowLanes; ++l) {
      std::memcpy(out.half_step[half_step][l], words + half_step * kHalfStepWords + l * kRowStride,
                  2 * kLanePairs);
    }
  }
}

// Where a chunk's weights are written: rows are `stride` apart, and past the caches or not. For
// that `out` and `stride` must be multiples of cache lines.
struct Destination {
  uint16_t* out;
  int64_t stride;
  bool stream;
  const WeightsAhead* compared = nullptr;  // with what is written: fetched meanwhile
};

template <bool kStream, typename Words>
DF11_INLINE void store(uint16_t* out, const Words& words) {
  if constexpr (kStream) {
    using Aliasing __attribute__((may_alias)) = Words;
#if __has_builtin(__builtin_nontemporal_store)
    __builtin_nontemporal_store(words, reinterpret_cast<Aliasing*>(out));
    return;
#elif defined(DF11_X86)
    if constexpr (sizeof words == sizeof(__m128i)) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(out), reinterpret_cast<const __m128i&>(words));
    } else {  // intrinsics of larger vectors can be inlined only where the target is already set
      asm volatile("vmovntdq %1, %0" : "=m"(*reinterpret_cast<Aliasing*>(out)) : "v"(words));
    }
    return;
#endif
  }
  std::memcpy(out, &words, sizeof words);
}

// Merges the exponents of grid row t with their sign and mantissa, and writes the weights;
// meanwhile fetches, from `next` on, a quarter of the sign and mantissa of the next chunk. Returns
// its part of the checksum.
template <Simd kSimd, bool kStream>
DF11_INLINE uint32_t merge_row(const RowExponents& exponents, const uint32_t* sign_mantissa, int t,
                               int half_steps, const Destination& to, const uint32_t* next) {
  using Words = typename VectorOf<kSimd>::Type;
  constexpr int kColumns = sizeof(Words) / 2, kVectors = kTileCols / kColumns;
  Words even[kVectors]{}, odd[kVectors]{};  // the checksum's accumulators, by columns
  for (int half_step = 0; half_step < half_steps; ++half_step, next += 32) {
    prefetch(next, 32);
    if (to.compared) prefetch(*to.compared, t * half_steps + half_step);
    uint16_t* out = to.out + (half_step / 2 * kStepRows + 4 * t + half_step % 2 * 2) * to.stride;
    Words rows[kVectors], next_rows[kVectors];
    for (int i = 0; i < kVectors; ++i) {
      const int l = i * kColumns / kLanePairs;
      // `words` are two pairs each, as they are stored; the others, two neighbours in a row.
      Words both, words;
      std::memcpy(&both, exponents.half_step[half_step][l], sizeof both);
      load_lanes(sign_mantissa + half_step * kHalfStepWords + lane_word(t) + l * kRowStride, words);
      const Words rotated = words << 8 | words >> 24;
      const Words rest = (words & 0xffffu) | rotated << 16;
      const Words next_rest = words >> 16 | (rotated & 0xffff0000u);
      const Words row = (both << 7 & ~kSignMantissa) | (rest & kSignMantissa);
      const Words next_row = (both >> 1 & ~kSignMantissa) | (next_rest & kSignMantissa);
      fold(even[i], (row & 0xffffu) | next_row << 16);
      fold(odd[i], row >> 16 | (next_row & 0xffff0000u));
      rows[i] = row;
      next_rows[i] = next_row;
    }
    // One row after the other: a core that streams puts few cache lines together at a time, and
    // fewer still where they are a power of two apart; memory prefers neighbouring ones.
    for (int i = 0; i < kVectors; ++i) store<kStream>(out + i * kColumns, rows[i]);
    for (int i = 0; i < kVectors; ++i) {
      store<kStream>(out + to.stride + i * kColumns, next_rows[i]);
    }
  }
  uint32_t even_sums[kTileCols / 2], odd_sums[kTileCols / 2];
  std::memcpy(even_sums, even, sizeof even);
  std::memcpy(odd_sums, odd, sizeof odd);
  uint32_t sum = 0;
  for (int i = 0; i < kTileCols / 2; ++i) {
    const uint32_t place = t * kTileCols + 2 * i;
    sum += checksum_place(even_sums[i], place) + checksum_place(odd_sums[i], place + 1);
  }
  return sum;
}

// Decodes a record into 16 * chunk.steps rows of 64 weights. The record must be followed by
// kOverreadWords readable words. Returns false if it is corrupt; what was written is then of no
// use.
template <Simd kSimd>
DF11_INLINE bool decode_record(const uint32_t* record, int64_t words, const Chunk& chunk,
                               int64_t index, const uint32_t* chunk_sign_mantissa,
                               const LookUpTable& table, JoinSymbols join_symbols,
                               const Destination& to) {
  if (words < kRawRecordHeaderWords) return false;
  const bool raw = record[1] == kRawChunk;
  uint32_t starts[kLanes + 1];
  uint32_t patches = 0;
  if (raw) {
    if (words != kRawRecordHeaderWords + chunk.steps * kStepWords) return false;
  } else {
    if (words < kRecordHeaderWords) return false;
    patches = record[1] & 0xffff;
    if (patches == kRawChunk) return false;
    const uint32_t base = record[1] >> 16;
    starts[0] = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      starts[lane + 1] = starts[lane] + base + (record[2 + lane / 4] >> (8 * (lane % 4)) & 255);
    }
    if (words != kRecordHeaderWords + int64_t{(starts[kLanes] + 31) / 32} + patches) return false;
  }

  const int half_steps = 2 * chunk.steps, pairs = half_steps * kLanePairs;
  const uint32_t* patch = record + words - patches;
  uint32_t sum = checksum_chunk(index);
  for (uint32_t i = 0; i < patches; ++i) sum += checksum_patch(patch[i]);
  RowEntries entries;
  RowExponents exponents;
  for (int t = 0; t < 4; ++t) {
    if (raw) {
      copy_row(record + kRawRecordHeaderWords + lane_word(t), half_steps, exponents);
    } else {
      const int look_ups =
          look_up_row(reinterpret_cast<const uint8_t*>(record + kRecordHeaderWords), starts + t,
                      pairs, table, entries);
      if (!join_symbols(entries, look_ups, pairs, table.exponents, exponents)) return false;
    }
    prefetch(record + words + t * 192, 192);  // a quarter of what the next chunk has
    const uint32_t* next = chunk_sign_mantissa + (4 + t) * half_steps * kHalfStepWords / 4;
    if (to.stream) {
      sum += merge_row<kSimd, true>(exponents, chunk_sign_mantissa, t, half_steps, to, next);
    } else {
      sum += merge_row<kSimd, false>(exponents, chunk_sign_mantissa, t, half_steps, to, next);
    }
  }
  // Over what was streamed: a core keeps its own stores to one place in order.
  for (uint32_t i = 0; i < patches; ++i) {
    const int position = patch[i] >> 16, row = position / kTileCols;
    if (row >= chunk.steps * kStepRows) continue;
    to.out[row * to.stride + position % kTileCols] = static_cast<uint16_t>(patch[i]);
  }
  return sum == record[0];
}

DF11_FOR_EACH_SIMD(bool, decode_record,
                   (const uint32_t* record, int64_t words, const Chunk& chunk, int64_t index,
                    const uint32_t* chunk_sign_mantissa, const LookUpTable& table,
                    JoinSymbols join_symbols, const Destination& to),
                   (record, words, chunk, index, chunk_sign_mantissa, table, join_symbols, to))

}  // namespace df11::native
