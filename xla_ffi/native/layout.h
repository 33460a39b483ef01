// The native layout, version 2: constants and index arithmetic shared by the
// encoder, the CPU decoder and the CUDA kernel. docs/format.md specifies it.
#pragma once

#include <array>
#include <cstdint>

#include "common/bits.h"
#include "common/inline.h"
#include "common/lanes.h"

namespace df11::native {

inline constexpr uint32_t kFormatVersion = 2;

// A tile is cut into steps of 16 k x 64 n; pairs run along k.
inline constexpr int kStepRows = 16;
inline constexpr int kMaxSteps = 8;                      // of a chunk
inline constexpr int kTileRows = kStepRows * kMaxSteps;  // at most
inline constexpr int kTileCols = 64;
inline constexpr int kHalfStepPairs = kStepRows * kTileCols / 4;  // 256
inline constexpr int kHalfStepWords = kHalfStepPairs / 2;         // of sign_mantissa
inline constexpr int kLanePairs = kHalfStepPairs / kLanes;        // 8, of a half-step
inline constexpr int kLaneWords = kLanePairs / 2;                 // of sign_mantissa
inline constexpr int kStepWords = 2 * kHalfStepWords;

inline constexpr int kMinCodeBits = 9;  // that the longest code may have
inline constexpr int kMaxCodeBits = 12;
inline constexpr int kTableSize = 1 << kMaxCodeBits;
inline constexpr int kCodedExponents = 16;
inline constexpr int kSymbols = kCodedExponents * kCodedExponents;

inline constexpr int kMaxDims = 8;
inline constexpr int kHeaderWords = 28;
inline constexpr int kGeometryWord = 3;                                      // of the header
inline constexpr int kCodebookIdWord = 24;                                   // and the next
inline constexpr int kCodebookWords = (kCodedExponents + kSymbols / 2) / 4;  // 36

// A record: checksum, patch count and base length, 32 extra lengths, streams, patches.
inline constexpr int kRecordHeaderWords = 10;
inline constexpr int kRawRecordHeaderWords = 2;
inline constexpr uint32_t kRawChunk = 0xffff;

// Of the four words of lane 4 g + t in a half-step, the first.
DF11_HD int lane_word(int lane) { return kLaneWords * lane; }

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

// What a header says of a slice: its shape, how that is a matrix, and how it is cut.
struct Layout {
  int ndim = 0;
  int64_t dims[kMaxDims] = {};
  int batch_axes = 0;  // the first dimensions
  int row_axes = 0;    // the next ones; the others are columns
  bool along_columns = false;
  int steps = kMaxSteps;         // of a chunk
  int code_bits = kMaxCodeBits;  // of the longest code
  uint16_t parts[kMaxDims] = {};
};

using Header = std::array<uint32_t, kHeaderWords>;

DF11_HD uint32_t geometry_digest(const uint32_t* header) {
  uint32_t acc = 0;
  for (int i = 0; i < kCodebookIdWord; ++i) {
    if (i != kGeometryWord) acc = checksum_step(acc, header[i]);
  }
  return checksum_mix(acc);
}

inline Header pack_header(const Layout& layout) {
  Header header{};
  header[0] = kFormatVersion;
  header[1] = static_cast<uint32_t>(layout.ndim | layout.batch_axes << 8 | layout.row_axes << 16 |
                                    int{layout.along_columns} << 24);
  header[2] = static_cast<uint32_t>(layout.steps | layout.code_bits << 8);
  for (int i = 0; i < layout.ndim; ++i) {
    header[4 + 2 * i] = static_cast<uint32_t>(layout.dims[i]);
    header[5 + 2 * i] = static_cast<uint32_t>(layout.dims[i] >> 32);
    header[20 + i / 2] |= uint32_t{layout.parts[i]} << (16 * (i % 2));
  }
  header[kGeometryWord] = geometry_digest(header.data());
  return header;
}

// False if the header is none, of whatever version.
inline bool unpack_header(const uint32_t* header, Layout& layout) {
  layout = {};
  layout.ndim = header[1] & 255;
  layout.batch_axes = header[1] >> 8 & 255;
  layout.row_axes = header[1] >> 16 & 255;
  layout.along_columns = header[1] >> 24 & 1;
  layout.steps = header[2] & 255;
  layout.code_bits = header[2] >> 8 & 255;
  if (header[0] != kFormatVersion || layout.ndim > kMaxDims ||
      layout.batch_axes + layout.row_axes > layout.ndim ||
      (layout.steps != 8 && layout.steps != 4 && layout.steps != 2) ||
      layout.code_bits < kMinCodeBits || layout.code_bits > kMaxCodeBits) {
    return false;
  }
  for (int i = 0; i < layout.ndim; ++i) {
    layout.dims[i] = static_cast<int64_t>(header[4 + 2 * i] | uint64_t{header[5 + 2 * i]} << 32);
    layout.parts[i] = static_cast<uint16_t>(header[20 + i / 2] >> (16 * (i % 2)));
    if (layout.dims[i] < 0) return false;
  }
  const Header expected = pack_header(layout);
  for (int i = 0; i < kHeaderWords; ++i) {
    const bool is_id = i == kCodebookIdWord || i == kCodebookIdWord + 1;
    if (!is_id && header[i] != expected[i]) return false;
  }
  return true;
}

// The layout of a slice of the given shape, unless a writer is told otherwise.
inline Layout default_layout(const int64_t* dims, int ndim) {
  Layout layout;
  layout.ndim = ndim;
  for (int i = 0; i < ndim; ++i) layout.dims[i] = dims[i];
  layout.row_axes = ndim > 0 ? ndim - 1 : 0;
  return layout;
}

// A quotient of what is seldom too large for 32 bits, in which a GPU divides several times faster.
DF11_HD int64_t divide(int64_t a, int64_t b) {
  return (a | b) >> 32 == 0 ? static_cast<uint32_t>(a) / static_cast<uint32_t>(b) : a / b;
}

// How one slice is seen: `batch` matrices of k x n, cut into chunks.
struct View {
  int64_t size = 0;  // weights
  int64_t batch = 1;
  int64_t k = 0;
  int64_t n = kTileCols;
  int steps = kMaxSteps;       // of a chunk
  bool along_columns = false;  // the weights of a pair are neighbours in memory
  bool is_flat = true;         // the last k may be incomplete

  DF11_HD int64_t tiles_n() const { return (n + kTileCols - 1) / kTileCols; }
  DF11_HD int64_t tiles_k() const { return divide(steps_k() + steps - 1, steps); }
  DF11_HD int64_t steps_k() const { return (k + kStepRows - 1) / kStepRows; }
  DF11_HD int64_t chunks() const { return batch * tiles_k() * tiles_n(); }
  DF11_HD int64_t sign_mantissa_words() const { return batch * steps_k() * tiles_n() * kStepWords; }
  // From one k to the next, and from one n to the next, in elements.
  DF11_HD int64_t stride_k() const { return along_columns ? 1 : n; }
  DF11_HD int64_t stride_n() const { return along_columns ? k : 1; }
};

struct Chunk {
  int64_t k, n;                // of its first weight
  int64_t element;             // that this is in the slice
  int64_t sign_mantissa_word;  // its first
  int steps;
};

DF11_HD Chunk locate_chunk(const View& view, int64_t chunk) {
  const int64_t tiles_n = view.tiles_n(), tiles_k = view.tiles_k();
  const int64_t row = divide(chunk, tiles_n), tile_n = chunk - row * tiles_n;
  const int64_t b = view.batch == 1 ? 0 : divide(row, tiles_k), tile_k = row - b * tiles_k;
  const int64_t first_step = tile_k * view.steps, left = view.steps_k() - first_step;
  const int steps = left < view.steps ? static_cast<int>(left) : view.steps;
  const int64_t k = first_step * kStepRows, n = tile_n * kTileCols;
  return {k, n, b * view.k * view.n + k * view.stride_k() + n * view.stride_n(),
          ((b * view.steps_k() + first_step) * tiles_n + tile_n * steps) * kStepWords, steps};
}

inline int64_t round_up(int64_t x, int64_t multiple) {
  return (x + multiple - 1) / multiple * multiple;
}

inline View make_view(const Layout& layout) {
  View view;
  uint64_t batch = 1, rows = 1, cols = 1;
  for (int i = 0; i < layout.ndim; ++i) {
    (i < layout.batch_axes                     ? batch
     : i < layout.batch_axes + layout.row_axes ? rows
                                               : cols) *= static_cast<uint64_t>(layout.dims[i]);
  }
  view.size = static_cast<int64_t>(batch * rows * cols);
  view.steps = layout.steps;
  const bool has_both = layout.row_axes > 0 && layout.batch_axes + layout.row_axes < layout.ndim;
  if (has_both && view.size > 0 && cols % 8 == 0) {
    view.batch = static_cast<int64_t>(batch);
    view.k = static_cast<int64_t>(layout.along_columns ? cols : rows);
    view.n = static_cast<int64_t>(layout.along_columns ? rows : cols);
    const int64_t padded = view.batch * round_up(view.k, kStepRows) * round_up(view.n, kTileCols);
    if (32 * (padded - view.size) <= view.size) {
      view.along_columns = layout.along_columns;
      view.is_flat = false;
      return view;
    }
  }
  view.batch = 1;
  view.k = (view.size + kTileCols - 1) / kTileCols;
  view.n = kTileCols;
  return view;
}

// The length of `exponents` for records of so many words: the next of the series that
// docs/format.md defines, in steps of 0.04 bits a weight.
inline int64_t padded_exponents_words(const View& view, int code_bits, int64_t words) {
  constexpr int kStep = 40;              // in 1/1000 bit
  const int by_code[] = {58, 25, 8, 0};  // 9 to 12 bits
  const int by_steps = view.steps == 8 ? 0 : view.steps == 4 ? 41 : 123;
  const int first = (2634 + by_code[code_bits - kMinCodeBits] + by_steps) % kStep;
  // Padding has the shortest codes, and counts as two thirds of a weight.
  const int64_t thirds = 8 * view.sign_mantissa_words() + view.size;
  const auto length = [&](int64_t i) {
    return 4 * (((first + kStep * i) * thirds + 383'999) / 384'000);
  };
  if (thirds == 0) return words;
  int64_t i = words * 96'000 / thirds / kStep;
  while (i > 0 && length(i - 1) >= words) --i;
  while (length(i) < words) ++i;
  return length(i);
}

}  // namespace df11::native
