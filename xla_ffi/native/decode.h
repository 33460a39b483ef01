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

// Merges the exponents of a grid row with their sign and mantissa, and writes the weights: what is
// streamed, a half-step a call, between look-ups of the next row. Memory takes it more slowly than
// a core merges it, and would keep the core waiting if it came all at once.
template <Simd kSimd, bool kStream>
class RowMerge {
 public:
  DF11_INLINE RowMerge(const uint32_t* sign_mantissa, int half_steps, const Destination& to)
      : sign_mantissa_(sign_mantissa),
        next_chunk_(sign_mantissa + half_steps * kHalfStepWords),
        half_steps_(half_steps),
        to_(to) {}

  // The next row, whose `exponents` must stay until its end.
  DF11_INLINE void begin(const RowExponents& exponents, int row) {
    exponents_ = &exponents;
    words_ = sign_mantissa_ + lane_word(row);
    out_ = to_.out + 4 * row * to_.stride;
    row_ = row;
    half_step_ = 0;
    for (int i = 0; i < kVectors; ++i) even_[i] = odd_[i] = Words{};
  }

  DF11_INLINE void operator()() {
    if (kStream && half_step_ < half_steps_) merge_half_step();
  }

  // Merges what is left, and returns the row's part of the checksum.
  DF11_INLINE uint32_t end() {
    while (half_step_ < half_steps_) merge_half_step();
    uint32_t even[kTileCols / 2], odd[kTileCols / 2];
    std::memcpy(even, even_, sizeof even);
    std::memcpy(odd, odd_, sizeof odd);
    uint32_t sum = 0;
    for (int i = 0; i < kTileCols / 2; ++i) {
      const uint32_t place = row_ * kTileCols + 2 * i;
      sum += checksum_place(even[i], place) + checksum_place(odd[i], place + 1);
    }
    return sum;
  }

 private:
  using Words = typename VectorOf<kSimd>::Type;
  static constexpr int kColumns = sizeof(Words) / 2, kVectors = kTileCols / kColumns;

  // Meanwhile fetches as much of the next chunk's sign and mantissa.
  DF11_INLINE void merge_half_step() {
    prefetch(next_chunk_, kHalfStepWords / 4);
    next_chunk_ += kHalfStepWords / 4;
    if (to_.compared) prefetch(*to_.compared, row_ * half_steps_ + half_step_);
    const int64_t stride = to_.stride;
    uint16_t* out = out_;
    out_ += half_step_ % 2 ? (kStepRows - 2) * stride : 2 * stride;
    Words rows[kVectors], next_rows[kVectors];
    for (int i = 0; i < kVectors; ++i) {
      const int l = i * kColumns / kLanePairs;
      // `words` are two pairs each, as they are stored; the others, two neighbours in a row.
      Words both, words;
      std::memcpy(&both, exponents_->half_step[half_step_][l], sizeof both);
      load_lanes(words_ + l * kRowStride, words);
      const Words rotated = words << 8 | words >> 24;
      const Words rest = (words & 0xffffu) | rotated << 16;
      const Words next_rest = words >> 16 | (rotated & 0xffff0000u);
      const Words row = (both << 7 & ~kSignMantissa) | (rest & kSignMantissa);
      const Words next_row = (both >> 1 & ~kSignMantissa) | (next_rest & kSignMantissa);
      fold(even_[i], (row & 0xffffu) | next_row << 16);
      fold(odd_[i], row >> 16 | (next_row & 0xffff0000u));
      rows[i] = row;
      next_rows[i] = next_row;
    }
    // One row after the other: a core that streams puts few cache lines together at a time, and
    // fewer still where they are a power of two apart; memory prefers neighbouring ones.
    for (int i = 0; i < kVectors; ++i) store<kStream>(out + i * kColumns, rows[i]);
    for (int i = 0; i < kVectors; ++i) store<kStream>(out + stride + i * kColumns, next_rows[i]);
    words_ += kHalfStepWords;
    ++half_step_;
  }

  const uint32_t *sign_mantissa_, *next_chunk_;
  const int half_steps_;
  const Destination& to_;
  // Of the row, and of its next half-step.
  const RowExponents* exponents_ = nullptr;
  const uint32_t* words_ = nullptr;
  uint16_t* out_ = nullptr;
  int row_ = 0, half_step_ = half_steps_;
  Words even_[kVectors], odd_[kVectors];  // the checksum's accumulators, by columns
};

// Decodes all rows of a record whose lanes begin at bits `starts` of its streams, or of a raw one
// if there are none. Returns whether all lanes were complete, and adds to the checksum.
template <Simd kSimd, bool kStream>
DF11_INLINE bool decode_rows(const uint32_t* record, int64_t words, int half_steps,
                             const uint32_t* starts, const uint32_t* sign_mantissa,
                             const LookUpTable& table, JoinSymbols join_symbols,
                             const Destination& to, uint32_t& sum) {
  const int pairs = half_steps * kLanePairs;
  RowEntries entries;
  RowExponents exponents;
  RowMerge<kSimd, kStream> merge(sign_mantissa, half_steps, to);
  for (int row = 0; row < 4; ++row) {
    int look_ups = 0;
    if (starts) {
      look_ups = look_up_row(reinterpret_cast<const uint8_t*>(record + kRecordHeaderWords),
                             starts + row, pairs, table, entries, merge);
    }
    prefetch(record + words + row * 192, 192);  // a quarter of what the next chunk has
    if (row > 0) sum += merge.end();
    if (!starts) {
      copy_row(record + kRawRecordHeaderWords + lane_word(row), half_steps, exponents);
    } else if (!join_symbols(entries, look_ups, pairs, table.exponents, exponents)) {
      return false;
    }
    merge.begin(exponents, row);
  }
  sum += merge.end();
  return true;
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

  const uint32_t* patch = record + words - patches;
  uint32_t sum = checksum_chunk(index);
  for (uint32_t i = 0; i < patches; ++i) sum += checksum_patch(patch[i]);
  const int half_steps = 2 * chunk.steps;
  const uint32_t* lane_starts = raw ? nullptr : starts;
  const bool complete =
      to.stream ? decode_rows<kSimd, true>(record, words, half_steps, lane_starts,
                                           chunk_sign_mantissa, table, join_symbols, to, sum)
                : decode_rows<kSimd, false>(record, words, half_steps, lane_starts,
                                            chunk_sign_mantissa, table, join_symbols, to, sum);
  if (!complete) return false;
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
