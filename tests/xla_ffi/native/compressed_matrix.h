// Stacks of compressed matrices on the host, and what a kernel should find wrong with them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

#include "../kernel_driver.h"
#include "encoded_slice.h"
#include "native/codebook.h"
#include "native/layout.h"

namespace df11::native {

using Weights = std::function<uint16_t(int64_t)>;

inline uint16_t normal_weight(int64_t) { return normal(); }
inline uint16_t noise(int64_t) { return static_cast<uint16_t>(rng() & 0xbfff); }  // finite
// Exponents that few weights have: many patches.
inline uint16_t rare_weight(int64_t) {
  return rng() % 97 ? normal() : static_cast<uint16_t>(0x3c00 + rng() % 0x800);
}

inline Layout layout_of(const std::vector<int64_t>& dims, bool along_columns, int steps,
                        int code_bits) {
  Layout layout = default_layout(dims.data(), static_cast<int>(dims.size()));
  layout.along_columns = along_columns;
  layout.steps = steps;
  layout.code_bits = code_bits;
  return layout;
}

// The first axis counts matrices.
inline Layout as_batch(Layout layout) {
  layout.batch_axes = 1;
  layout.row_axes -= 1;
  return layout;
}

struct CompressedMatrix {
  Layout layout;
  View view;
  uint32_t geometry;
  int64_t stack, exponents_words = 0;
  std::vector<uint32_t> header, codebook, chunk_offsets, exponents, sign_mantissa;
  std::vector<uint16_t> weights;

  CompressedMatrix(const Layout& layout, const Weights& weight, int stack = 1)
      : layout(layout),
        view(make_view(layout)),
        geometry(pack_header(layout)[kGeometryWord]),
        stack(stack),
        weights(stack * view.size) {
    expect(!view.is_flat, "a matrix is viewed flat");
    for (uint16_t& w : weights) w = weight(0);
    std::vector<std::vector<uint32_t>> records;
    for (int64_t i = 0; i < stack; ++i) {
      const EncodedSlice slice = encode_slice(weights.data() + i * view.size, layout, 1);
      const auto append = [](std::vector<uint32_t>& to, const auto& from) {
        to.insert(to.end(), from.begin(), from.end());
      };
      append(header, pack_header(layout));
      append(codebook, slice.codebook);
      append(chunk_offsets, slice.chunk_offsets);
      append(sign_mantissa, slice.sign_mantissa);
      records.push_back(slice.exponents);
    }
    pad_together(records);
  }

  // Columns are counted over the matrices of a batch.
  uint16_t weight(int32_t index, int64_t k, int64_t n) const {
    const int64_t slice = std::clamp<int64_t>(index, 0, stack - 1), b = n / view.n;
    return weights[slice * view.size + b * view.k * view.n + k * view.stride_k() +
                   (n - b * view.n) * view.stride_n()];
  }

  // The same weights in raw records only. Padding has other exponents.
  CompressedMatrix as_raw() const {
    CompressedMatrix raw = *this;
    std::vector<std::vector<uint32_t>> records(stack);
    for (int64_t i = 0; i < stack; ++i) {
      for (int64_t c = 0; c < view.chunks(); ++c) {
        const Chunk chunk = locate_chunk(view, c);
        const int64_t first_n = c / (view.tiles_k() * view.tiles_n()) * view.n;
        raw.chunk_offsets[i * (view.chunks() + 1) + c] = records[i].size();
        records[i].insert(records[i].end(), {0, kRawChunk});
        for (int word = 0; word < chunk.steps * kStepWords; ++word) {
          const int half_step = word / kHalfStepWords, lane = word % kHalfStepWords / kLaneWords;
          const int64_t k = chunk.k + half_step / 2 * kStepRows + lane % 4 * 4 + half_step % 2 * 2;
          const int64_t n = chunk.n + lane / 4 * kLanePairs + word % kLaneWords * 2;
          uint32_t bytes = 0;
          for (int b = 0; b < 4; ++b) {
            const bool inside = k + b % 2 < view.k && n + b / 2 < view.n;
            if (inside) bytes |= (weight(i, k + b % 2, first_n + n + b / 2) >> 7 & 255u) << (8 * b);
          }
          records[i].push_back(bytes);
        }
      }
      raw.chunk_offsets[i * (view.chunks() + 1) + view.chunks()] = records[i].size();
      records[i].resize(round_up(records[i].size(), 4));
    }
    raw.pad_together(records);
    return raw;
  }

  // Of slice 0: whether the kernel should find nothing wrong with what it needs for a column of
  // chunks.
  bool column_is_sound(int64_t column) const {
    if (header[kGeometryWord] != geometry || !codebook_is_sound()) return false;
    for (int64_t tile_k = 0; tile_k < view.tiles_k(); ++tile_k) {
      if (!chunk_is_sound(chunk_of(tile_k, column))) return false;
    }
    return true;
  }

  // Whether it has the same bytes for a column of chunks.
  bool column_equals(const CompressedMatrix& other, int64_t column) const {
    if (header[kGeometryWord] != other.header[kGeometryWord] || codebook != other.codebook) {
      return false;
    }
    for (int64_t tile_k = 0; tile_k < view.tiles_k(); ++tile_k) {
      const int64_t c = chunk_of(tile_k, column);
      const uint32_t begin = chunk_offsets[c], end = chunk_offsets[c + 1];
      if (begin != other.chunk_offsets[c] || end != other.chunk_offsets[c + 1] ||
          !std::equal(exponents.begin() + begin + 1, exponents.begin() + end,
                      other.exponents.begin() + begin + 1)) {
        return false;
      }
    }
    return true;
  }

 private:
  int64_t chunk_of(int64_t tile_k, int64_t column) const {
    const int64_t b = column / view.tiles_n();
    return (b * view.tiles_k() + tile_k) * view.tiles_n() + column % view.tiles_n();
  }

  void pad_together(const std::vector<std::vector<uint32_t>>& records) {
    exponents_words = 0;
    for (const auto& slice : records) {
      exponents_words = std::max<int64_t>(exponents_words, slice.size());
    }
    exponents.clear();
    for (const auto& slice : records) {
      exponents.insert(exponents.end(), slice.begin(), slice.end());
      exponents.resize(round_up(exponents.size(), exponents_words));
    }
  }

  bool codebook_is_sound() const {
    std::vector<uint16_t> table(kTableSize);
    const Codebook book = Codebook::unpack(codebook.data());
    return build_table(book, table.data()) &&
           *std::max_element(book.lengths.begin(), book.lengths.end()) <= layout.code_bits;
  }

  bool chunk_is_sound(int64_t c) const {
    const uint32_t begin = chunk_offsets[c], end = chunk_offsets[c + 1];
    if (begin > end || end > exponents_words || end - begin < kRecordHeaderWords) return false;
    const uint32_t* record = exponents.data() + begin;
    if (record[1] == kRawChunk) {
      return end - begin ==
             uint32_t(kRawRecordHeaderWords + locate_chunk(view, c).steps * kStepWords);
    }
    const uint32_t patches = record[1] & 0xffff;
    uint32_t bits = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      bits += (record[1] >> 16) + (record[2 + lane / 4] >> (8 * (lane % 4)) & 255);
    }
    return patches != kRawChunk && end - begin == kRecordHeaderWords + (bits + 31) / 32 + patches;
  }
};

}  // namespace df11::native
