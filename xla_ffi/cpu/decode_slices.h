// Decodes whole slices on the CPU: checks, work items, edges of tiles. Knows nothing of
// XLA; handler.cc runs it on XLA's thread pool, the encoder's verification on its own.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "df11/decode.h"
#include "df11/encode.h"
#include "df11/tensor_slices.h"

namespace df11 {

enum class Simd { kPortable, kAvx2, kAvx512 };

inline Simd best_simd() {
#if defined(__x86_64__) && defined(__GNUC__)
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("bmi2")) {
    return Simd::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2")) return Simd::kAvx2;
#endif
  return Simd::kPortable;
}

inline DecodeRecord decode_record_for(Simd simd) {
#if defined(__x86_64__) && defined(__GNUC__)
  if (simd == Simd::kAvx512) return decode_record_avx512;
  if (simd == Simd::kAvx2) return decode_record_avx2;
#endif
  (void)simd;
  return decode_record_portable;
}

// A problem with a slice, or none if empty.
inline std::string check_header(const uint32_t* header, const int64_t* dims, int ndim) {
  if (header[0] != kFormatVersion) {
    return "has format version " + std::to_string(header[0]) + ", but this library reads version " +
           std::to_string(kFormatVersion);
  }
  const auto expected = make_header(dims, ndim);
  if (!std::equal(expected.begin(), expected.end(), header)) {
    return "has a header that does not describe a slice of the expected shape";
  }
  return "";
}

// Decodes chunk after chunk of one slice after the other with one table.
class ChunkDecoder {
 public:
  explicit ChunkDecoder(Simd simd) : decode_record_(decode_record_for(simd)) {}

  // Must be called before chunks of this slice are decoded; false if the codebook is corrupt.
  bool set_slice(const SlicePayload& slice) {
    slice_ = slice;
    return build_table(slice.codebook, table_);
  }

  // Decodes into a tile of chunk.steps * 16 rows; false if the chunk is corrupt.
  bool decode_tile(int64_t index, const Chunk& chunk, uint16_t* tile, int64_t stride) {
    const uint32_t begin = slice_.chunk_offsets[index], end = slice_.chunk_offsets[index + 1];
    if (begin > end || end > slice_.exponents_words) return false;
    const uint32_t* record = slice_.exponents + begin;
    if (end + kOverreadWords > slice_.exponents_words) {
      // Near the end of the buffer the record is read from a copy with room behind it.
      copy_.assign(end - begin + kOverreadWords, 0);
      std::memcpy(copy_.data(), record, 4 * size_t{end - begin});
      record = copy_.data();
    }
    return decode_record_(record, end - begin, chunk, index,
                          slice_.sign_mantissa + chunk.sign_mantissa_word, table_, tile, stride);
  }

  // Decodes to where the chunk lies in `out`, the whole slice.
  bool decode(int64_t index, uint16_t* out) {
    const View& view = slice_.view;
    const Chunk chunk = locate_chunk(view, index);
    const int64_t rows = chunk.steps * kStepRows;
    const bool inside = chunk.col + kTileCols <= view.cols &&
                        (chunk.row + rows - 1) * view.cols + chunk.col + kTileCols <= view.size;
    if (inside) {
      return decode_tile(index, chunk, out + chunk.row * view.cols + chunk.col, view.cols);
    }
    if (!decode_tile(index, chunk, tile_, kTileCols)) return false;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t count = valid_weights(chunk, row);
      if (count <= 0) break;
      std::memcpy(out + (chunk.row + row) * view.cols + chunk.col, tile_ + row * kTileCols,
                  2 * count);
    }
    return true;
  }

  // The first element at which the chunk does not decode to `weights`, or -1.
  int64_t find_difference(int64_t index, const uint16_t* weights) {
    const View& view = slice_.view;
    const Chunk chunk = locate_chunk(view, index);
    if (!decode_tile(index, chunk, tile_, kTileCols)) return chunk.row * view.cols + chunk.col;
    for (int64_t row = 0; row < chunk.steps * kStepRows; ++row) {
      const int64_t at = (chunk.row + row) * view.cols + chunk.col;
      const int64_t count = valid_weights(chunk, row);
      if (count <= 0) break;
      if (std::memcmp(weights + at, tile_ + row * kTileCols, 2 * count) == 0) continue;
      for (int64_t i = 0; i < count; ++i) {
        if (weights[at + i] != tile_[row * kTileCols + i]) return at + i;
      }
    }
    return -1;
  }

 private:
  // Weights in a row of the tile that are not padding; not positive if there are none.
  int64_t valid_weights(const Chunk& chunk, int64_t row) const {
    const View& view = slice_.view;
    const int64_t at = (chunk.row + row) * view.cols + chunk.col;
    return std::min({int64_t{kTileCols}, view.cols - chunk.col, view.size - at});
  }

  DecodeRecord decode_record_;
  SlicePayload slice_{};
  std::vector<uint32_t> copy_;
  alignas(64) uint32_t table_[kTableSize];
  alignas(64) uint16_t tile_[kTileRows * kTileCols];
};

}  // namespace df11
