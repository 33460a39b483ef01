// The native layout, version 1: constants and index arithmetic shared by the
// encoder, the CPU decoder and the CUDA kernel. docs/format.md specifies it.
#pragma once

#include <array>
#include <cstdint>

#include "common/bits.h"
#include "common/inline.h"
#include "common/lanes.h"

namespace df11::native {

inline constexpr uint32_t kFormatVersion = 1;

inline constexpr int kStepRows = 16;
inline constexpr int kSteps = 8;  // at most, in a chunk
inline constexpr int kTileRows = kStepRows * kSteps;
inline constexpr int kTileCols = 64;
inline constexpr int kHalfStepPairs = kStepRows * kTileCols / 4;  // 256
inline constexpr int kLanePairs = kHalfStepPairs / kLanes;        // 8, of a half-step
inline constexpr int kStepWords = kStepRows * kTileCols / 4;      // of sign_mantissa

inline constexpr int kMaxCodeBits = 12;
inline constexpr int kTableSize = 1 << kMaxCodeBits;
inline constexpr int kCodedExponents = 16;
inline constexpr int kSymbols = kCodedExponents * kCodedExponents;

inline constexpr int kMaxDims = 8;
inline constexpr int kHeaderWords = 20;
inline constexpr int kCodebookWords = (kCodedExponents + kSymbols / 2) / 4;  // 36

// A record: checksum, patch count and base length, 32 extra lengths, streams, patches.
inline constexpr int kRecordHeaderWords = 10;
inline constexpr int kRawRecordHeaderWords = 2;
inline constexpr uint32_t kRawChunk = 0xffff;

// Sign and mantissa of both weights of a pair.
inline constexpr uint32_t kSignMantissa = 0x807f807fu;

// A table entry holds both exponents in place, and the code's length in bits 0..4.
// Bits 5 and 6 stay zero, so that an entry can serve as a shift amount, and a sum of
// a few entries keeps the sum of their lengths in its low seven bits.
DF11_HD uint32_t table_entry(uint32_t exponent0, uint32_t exponent1, uint32_t length) {
  return exponent0 << 7 | exponent1 << 23 | length;
}

// The checksum of a chunk: see docs/format.md.
DF11_HD uint32_t checksum_step(uint32_t acc, uint32_t pair) {
  return rotl(acc * 0x9e3779b1u + pair, 13);
}
DF11_HD uint32_t checksum_mix(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352du;
  return x ^ x >> 15;
}
DF11_HD uint32_t checksum_place(uint32_t acc, uint32_t place) {
  return checksum_mix(acc + 0x85ebca6bu * place);
}
DF11_HD uint32_t checksum_patch(uint32_t patch) { return checksum_mix(patch + 0xc2b2ae35u); }
DF11_HD uint32_t checksum_chunk(uint64_t chunk) {
  return checksum_mix(static_cast<uint32_t>(chunk) + 0x27d4eb2fu);
}

// How one slice is seen as a matrix and cut into chunks.
struct View {
  int64_t size = 0;  // weights
  int64_t rows = 0;
  int64_t cols = kTileCols;

  DF11_HD int64_t tile_cols() const { return (cols + kTileCols - 1) / kTileCols; }
  DF11_HD int64_t tile_rows() const { return (rows + kTileRows - 1) / kTileRows; }
  DF11_HD int64_t chunks() const { return tile_rows() * tile_cols(); }
  DF11_HD int64_t step_rows() const { return (rows + kStepRows - 1) / kStepRows; }
  DF11_HD int64_t sign_mantissa_words() const { return step_rows() * tile_cols() * kStepWords; }
};

struct Chunk {
  int64_t row, col;            // of its first weight in the view
  int64_t sign_mantissa_word;  // its first
  int steps;
};

DF11_HD Chunk locate_chunk(const View& view, int64_t chunk) {
  const int64_t tiles = view.tile_cols();
  const int64_t tile_row = chunk / tiles, tile_col = chunk % tiles;
  const int64_t steps_left = view.step_rows() - tile_row * kSteps;
  const int steps = steps_left < kSteps ? static_cast<int>(steps_left) : kSteps;
  return {tile_row * kTileRows, tile_col * kTileCols,
          (tile_row * kSteps * tiles + tile_col * steps) * kStepWords, steps};
}

// The view of a slice of `size` weights whose last dimension is `cols`, or 0 if it has fewer than
// two. Numbers that a corrupt header invents give some view, which the caller compares with the
// one it expects.
DF11_HD View make_view(uint64_t size, uint64_t cols) {
  View view;
  view.size = static_cast<int64_t>(size);
  if (size > 0 && cols > 0 && cols % 8 == 0) {
    const uint64_t rows = size / cols;
    const uint64_t padded_rows = (rows + kStepRows - 1) / kStepRows * kStepRows;
    const uint64_t padded_cols = (cols + kTileCols - 1) / kTileCols * kTileCols;
    // The padding, compared so that it does not overflow for any size in memory.
    if (50 * (padded_rows * padded_cols - size) <= size) {
      view.rows = static_cast<int64_t>(rows);
      view.cols = static_cast<int64_t>(cols);
      return view;
    }
  }
  view.rows = static_cast<int64_t>((size + kTileCols - 1) / kTileCols);
  view.cols = kTileCols;
  return view;
}

inline View make_view(const int64_t* dims, int ndim) {
  uint64_t size = 1;
  for (int i = 0; i < ndim; ++i) size *= static_cast<uint64_t>(dims[i]);
  return make_view(size, ndim >= 2 ? static_cast<uint64_t>(dims[ndim - 1]) : uint64_t{0});
}

// The header of a slice of the given shape.
inline std::array<uint32_t, kHeaderWords> make_header(const int64_t* dims, int ndim) {
  std::array<uint32_t, kHeaderWords> header{};
  header[0] = kFormatVersion;
  header[1] = static_cast<uint32_t>(ndim);
  for (int i = 0; i < ndim; ++i) {
    header[2 + 2 * i] = static_cast<uint32_t>(dims[i]);
    header[3 + 2 * i] = static_cast<uint32_t>(dims[i] >> 32);
  }
  return header;
}

}  // namespace df11::native
