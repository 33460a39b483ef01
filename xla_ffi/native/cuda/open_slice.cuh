// Which slice a block works on, and which table that needs: shared by the decoders.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "native/cuda/decode_chunk.cuh"
#include "native/tensor_slices.h"

namespace df11::native {

// What the block's table was made of.
struct TableKey {
  const uint32_t* codebook = nullptr;
  uint32_t id[2] = {};
  bool sound = false;
};

// What the block needs to know of batch element `b` of a tensor, beside the slice itself.
struct OpenSlice {
  bool skipped;       // nothing is to be decoded
  bool header_sound;  // it says what is expected
  bool new_table;     // the block's table is another's
};

// Fills `slice`, and `key` anew if the table is to be made anew. One thread calls it.
__device__ inline OpenSlice open_slice(const TensorSlices& tensor, int64_t b, Slice& slice,
                                       TableKey& key) {
  const int64_t at = tensor.slice_of(b);
  if (at < 0) return {true, false, false};
  const View& view = tensor.view;
  const uint32_t* header = tensor.header + at * kHeaderWords;
  const uint32_t* codebook = tensor.codebook + at * kCodebookWords;
  slice.view = view;
  slice.chunk_offsets = tensor.chunk_offsets + at * (view.chunks() + 1);
  slice.exponents = tensor.exponents + at * tensor.exponents_words;
  slice.sign_mantissa = tensor.sign_mantissa + at * view.sign_mantissa_words();
  slice.exponents_words = tensor.exponents_words;
  slice.out = tensor.out + b * view.size;

  // One word of the header stands for all that say how a slice is cut.
  const bool sound = header[kGeometryWord] == tensor.geometry;
  const uint32_t id[2] = {header[kCodebookIdWord], header[kCodebookIdWord + 1]};
  const bool same =
      codebook == key.codebook || (key.sound && id[0] == key.id[0] && id[1] == key.id[1]);
  if (!sound || same) return {false, sound, false};
  key = {codebook, {id[0], id[1]}, false};
  return {false, true, true};
}

}  // namespace df11::native
