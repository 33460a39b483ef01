// Decodes whole slices on the CPU: checks, work items, edges of tiles. Knows nothing of
// XLA; handler.cc runs it on XLA's thread pool, the encoder's verification on its own.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "common/words.h"
#include "native/decode.h"
#include "native/pairs.h"
#include "native/prefetch.h"
#include "native/tensor_slices.h"
#include "native/transpose.h"

namespace df11::native {

// A problem with a slice, or none if empty: its header is to be the expected one, but for the
// codebook's id.
inline std::string check_header(const uint32_t* header, const uint32_t* expected) {
  if (header[0] != kFormatVersion) {
    return "has format version " + std::to_string(header[0]) + ", but this library reads version " +
           std::to_string(kFormatVersion);
  }
  if (!std::equal(header, header + kCodebookIdWord, expected)) {
    return "has a header that does not describe a slice of the expected shape";
  }
  return "";
}

// From this size on a slice will have left the caches before it is used, and is written past
// them. A tile's rows lie far apart, often by a power of two, so that they would compete for
// the same places in the caches.
inline constexpr int64_t kStreamingBytes = 4 << 20;

// Whether a tile of full rows is bit for bit the one at `weights`, whose rows are `stride` apart.
template <Simd>
DF11_INLINE bool equals_tile(const uint16_t* tile, int64_t rows, const uint16_t* weights,
                             int64_t stride) {
  uint16_t difference[kTileCols] = {};
  for (int64_t row = 0; row < rows; ++row) {
    for (int i = 0; i < kTileCols; ++i) {
      difference[i] |= tile[row * kTileCols + i] ^ weights[row * stride + i];
    }
  }
  return std::all_of(difference, difference + kTileCols, [](uint16_t bits) { return bits == 0; });
}

DF11_FOR_EACH_SIMD(bool, equals_tile,
                   (const uint16_t* tile, int64_t rows, const uint16_t* weights, int64_t stride),
                   (tile, rows, weights, stride))

// Decodes chunk after chunk of one slice after the other with one table.
class ChunkDecoder {
 public:
  explicit ChunkDecoder(Simd simd)
      : fill_entries_(DF11_SELECT(simd, fill_entries)),
        join_symbols_(best_join_symbols(simd)),
        decode_record_(DF11_SELECT(simd, decode_record)),
        equals_tile_(DF11_SELECT(simd, equals_tile)) {}

  // Must be called before chunks of this slice are decoded; false if the codebook is corrupt.
  bool set_slice(const SlicePayload& slice) {
    slice_ = slice;
    const Codebook book = Codebook::unpack(slice.codebook);
    uint16_t symbols[kTableSize];
    const int longest = *std::max_element(book.lengths.begin(), book.lengths.end());
    if (longest > slice.code_bits || !build_table(book, symbols)) return false;
    fill_entries_(symbols, table_.entries);
    std::copy(book.exponents.begin(), book.exponents.end(), table_.exponents);
    return true;
  }

  // Decodes chunk.steps * 16 rows; false if the chunk is corrupt.
  bool decode_rows(int64_t index, const Chunk& chunk, const Destination& to) {
    const uint32_t begin = slice_.chunk_offsets[index], end = slice_.chunk_offsets[index + 1];
    if (begin > end || end > slice_.exponents_words || end - begin > kMostRecordWords) return false;
    const uint32_t* record = slice_.exponents + begin;
    if (end + kOverreadWords > slice_.exponents_words) {
      // Near the end of the buffer the record is read from a copy with room behind it.
      copy_.resize(kMostRecordWords + kOverreadWords);
      std::memcpy(copy_.data(), record, 4 * size_t{end - begin});
      record = copy_.data();
    }
    return decode_record_(record, end - begin, chunk, index,
                          slice_.sign_mantissa + chunk.sign_mantissa_word, table_, join_symbols_,
                          to);
  }

  // Decodes into a tile of full rows.
  bool decode_tile(int64_t index, const Chunk& chunk, const WeightsAhead* compared = nullptr) {
    return decode_rows(index, chunk, {tile_, kTileCols, false, compared});
  }

  // Makes what was streamed visible to other threads; to be called once, after the last chunk.
  static void finish() {
#ifdef __SSE2__
    _mm_sfence();
#endif
  }

  // Decodes to where the chunk lies in `out`, the whole slice.
  bool decode(int64_t index, uint16_t* out) {
    const View& view = slice_.view;
    const Chunk chunk = locate_chunk(view, index);
    const Extent extent(view, chunk);
    const bool whole = extent.is_whole(chunk);
    uint16_t* place = out + chunk.element;
    // Only whole cache lines: of others, memory would have to be read.
    const bool stream = 2 * view.size >= kStreamingBytes && 2 * view.n % kCacheLine == 0 &&
                        reinterpret_cast<uintptr_t>(out) % kCacheLine == 0;
    if (whole && !view.along_columns) return decode_rows(index, chunk, {place, view.n, stream});
    if (!decode_tile(index, chunk)) return false;
    if (view.along_columns) {
      transpose(tile_, kTileCols, chunk.steps * kStepRows, kTileCols, transposed_, kTileRows);
      for (int64_t n = 0; n < extent.n; ++n) {
        std::memcpy(place + n * view.k, transposed_ + n * kTileRows, 2 * extent.k);
      }
    } else {
      for (int64_t k = 0; k < extent.k; ++k) {
        std::memcpy(place + k * view.n, tile_ + k * kTileCols, 2 * extent.n_of(k));
      }
    }
    return true;
  }

  // Decodes, and keeps nothing; false if the chunk is corrupt.
  bool verify(int64_t index) { return decode_tile(index, locate_chunk(slice_.view, index)); }

  // The first element at which the chunk does not decode to `weights`, or -1.
  int64_t find_difference(int64_t index, const uint16_t* weights) {
    const View& view = slice_.view;
    const Chunk chunk = locate_chunk(view, index);
    const WeightsAhead compared(weights, view, chunk, 8 * chunk.steps);
    if (!decode_tile(index, chunk, &compared)) return chunk.element;
    const Extent extent(view, chunk);
    const uint16_t* place = weights + chunk.element;
    if (!view.along_columns && extent.is_whole(chunk) &&
        equals_tile_(tile_, extent.k, place, view.n)) {
      return -1;
    }
    const auto differ = [&](const uint16_t* decoded, int64_t at, int64_t count) -> int64_t {
      if (std::memcmp(decoded, place + at, 2 * count) == 0) return -1;  // faster than below
      const uint16_t* end = decoded + count;
      const uint16_t* found = std::mismatch(decoded, end, place + at).first;
      return found == end ? -1 : chunk.element + at + (found - decoded);
    };
    if (view.along_columns)
      transpose(tile_, kTileCols, chunk.steps * kStepRows, kTileCols, transposed_, kTileRows);
    for (int64_t i = 0; i < (view.along_columns ? extent.n : extent.k); ++i) {
      const int64_t at = view.along_columns
                             ? differ(transposed_ + i * kTileRows, i * view.k, extent.k)
                             : differ(tile_ + i * kTileCols, i * view.n, extent.n_of(i));
      if (at >= 0) return at;
    }
    return -1;
  }

 private:
  decltype(&fill_entries_portable) fill_entries_;
  JoinSymbols join_symbols_;
  decltype(&decode_record_portable) decode_record_;
  decltype(&equals_tile_portable) equals_tile_;
  SlicePayload slice_{};
  std::vector<uint32_t> copy_;
  alignas(64) LookUpTable table_;
  alignas(64) uint16_t tile_[kTileRows * kTileCols];
  alignas(64) uint16_t transposed_[kTileCols * kTileRows];
};

}  // namespace df11::native
