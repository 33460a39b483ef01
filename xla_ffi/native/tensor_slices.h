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

// The payload is a number of stacks of `stack` slices each; out[b] receives slice
// clamp(index[...], 0, stack - 1) of the payload's stack for batch element b. Where the index is
// -1, nothing is read and nothing written.
struct TensorSlices {
  View view;
  uint32_t geometry = 0;  // word of the header that says how slices are cut
  int64_t stack = 1;
  int64_t batch = 1;            // product of the axes' sizes
  int64_t exponents_words = 0;  // of one slice, padding included
  const int32_t* index = nullptr;
  const uint32_t* header = nullptr;  // each: [stacks, stack, words of one slice]
  const uint32_t* codebook = nullptr;
  const uint32_t* chunk_offsets = nullptr;
  const uint32_t* exponents = nullptr;
  const uint32_t* sign_mantissa = nullptr;
  uint16_t* out = nullptr;  // [batch, view.size]
  int batch_axes = 0;
  BatchAxis axes[kMaxBatchAxes] = {};

  // The slice of the payload that batch element b wants, counted over all stacks; -1 for none.
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

  // The slice that an index means in a stack of the payload.
  DF11_HD int64_t slice_at(int64_t of_payload, int64_t wanted) const {
    // Without branches, so that a GPU can go on before the index arrives.
    const int64_t least = wanted < 0 ? 0 : wanted;
    const int64_t slice = of_payload * stack + (least > stack - 1 ? stack - 1 : least);
    return wanted == -1 ? -1 : slice;
  }
};

}  // namespace df11::native
