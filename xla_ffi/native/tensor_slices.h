// What one decode call is asked for, per tensor; filled in from XLA's buffers by
// operands.h, understood by the CPU decoder and by the CUDA kernel alike.
#pragma once

#include <cstdint>

#include "native/layout.h"

namespace df11::native {

// Axes that vmap put in front of everything. Along each the payload and the index
// either move or stay (stride 0).
inline constexpr int kMaxBatchAxes = 4;
struct BatchAxis {
  int64_t size;
  int64_t payload_stride;  // in stacks
  int64_t index_stride;    // in elements
};

// What an element of the index means: chunks of a slice, all of them or those of a band.
struct ChunkRange {
  int64_t slice;          // of the payload, counted over all stacks
  int64_t first, stride;  // the slice's chunks: first, first + stride, ...
  int64_t element;        // of the slice, which is the first of the result
};

// The payload is a number of stacks of `stack` slices each; out[b] receives slice
// clamp(index[...], 0, stack - 1) of the payload's stack for batch element b. Where the index is
// -1, nothing is read and nothing written.
//
// A band is what has the same tile along n: of matrices with pairs along columns, 64 rows. Each can
// be decoded alone: if there are `bands` of a slice, these are counted in place of slices. Rows
// that the last one of a matrix does not have are not written.
struct TensorSlices {
  View view;
  uint32_t geometry = 0;        // word of the header that says how slices are cut
  int32_t bands = 0;            // of a slice, if the index counts them; else 0
  int64_t stack = 1;            // slices, or their bands
  int64_t batch = 1;            // product of the axes' sizes
  int64_t exponents_words = 0;  // of one slice, padding included
  const int32_t* index = nullptr;
  const uint32_t* header = nullptr;  // each: [stacks, stack, words of one slice]
  const uint32_t* codebook = nullptr;
  const uint32_t* chunk_offsets = nullptr;
  const uint32_t* exponents = nullptr;
  const uint32_t* sign_mantissa = nullptr;
  uint16_t* out = nullptr;       // [batch, size()]
  int code_bits = kMaxCodeBits;  // of the longest code that the header allows
  int batch_axes = 0;
  BatchAxis axes[kMaxBatchAxes] = {};

  // Of the result for one element of the index.
  DF11_HD int64_t size() const { return bands ? kTileCols * view.k : view.size; }
  DF11_HD int64_t chunks() const { return bands ? view.tiles_k() : view.chunks(); }

  // The slice or band of the payload that batch element b wants, counted over all stacks; -1 for
  // none.
  DF11_HD int64_t slice_of(int64_t b) const {
    int64_t payload = 0, at = 0;
    for (int i = batch_axes - 1; i >= 0 && b > 0; --i) {
      const int64_t along = b % axes[i].size;
      b /= axes[i].size;
      payload += along * axes[i].payload_stride;
      at += along * axes[i].index_stride;
    }
    return slice_at(payload, index[at]);
  }

  // What the slice or band with this number is.
  DF11_HD ChunkRange range_of(int64_t number) const {
    if (!bands) return {number, 0, 1, 0};
    const int64_t tiles_n = view.tiles_n(), slice = divide(number, bands);
    const int64_t in_slice = number - slice * bands, b = divide(in_slice, tiles_n);
    const int64_t tile_n = in_slice - b * tiles_n;
    return {slice, b * view.tiles_k() * tiles_n + tile_n, tiles_n,
            b * view.k * view.n + tile_n * kTileCols * view.stride_n()};
  }

  // The slice or band that an index means in a stack of the payload.
  DF11_HD int64_t slice_at(int64_t of_payload, int64_t wanted) const {
    // Without branches, so that a GPU can go on before the index arrives.
    const int64_t least = wanted < 0 ? 0 : wanted;
    const int64_t slice = of_payload * stack + (least > stack - 1 ? stack - 1 : least);
    return wanted == -1 ? -1 : slice;
  }
};

}  // namespace df11::native
