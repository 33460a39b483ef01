// Slices of the payload, and which table they need: shared by the decoders.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/lanes.cuh"
#include "native/cuda/decode_chunk.cuh"
#include "native/tensor_slices.h"

namespace df11::native {

// What matters here of what a slice's header says.
struct SliceHeader {
  uint32_t geometry;  // stands for all that says how a slice is cut
  uint32_t codebook_id[2];
};
__device__ __forceinline__ SliceHeader load_header(const uint32_t* header) {
  return {__ldg(header + kGeometryWord),
          {__ldg(header + kCodebookIdWord), __ldg(header + kCodebookIdWord + 1)}};
}

// What the block's table was made of.
struct TableKey {
  const uint32_t* codebook;  // null if there is no table yet
  uint32_t id[2];
  bool sound;

  // Whether the table is the right one for a slice whose header is sound.
  __device__ __forceinline__ bool serves(const uint32_t* of_slice,
                                         const SliceHeader& header) const {
    return of_slice == codebook ||
           (sound && header.codebook_id[0] == id[0] && header.codebook_id[1] == id[1]);
  }
};

// The first slice of the payload, for batch element `b`, whole; move_slice leads to others.
__device__ __forceinline__ Slice first_slice(const TensorSlices& tensor, int64_t b) {
  return {tensor.view,
          keep(tensor.chunk_offsets),
          keep(tensor.exponents),
          keep(tensor.sign_mantissa),
          keep(tensor.exponents_words),
          tensor.out + b * tensor.view.size,
          0,
          1};
}
// To the one that is `count` slices further in the payload.
__device__ __forceinline__ void move_slice(Slice& slice, int64_t count, int64_t chunks,
                                           int64_t sign_mantissa_words) {
  slice.chunk_offsets += count * (chunks + 1);
  slice.exponents += count * slice.exponents_words;
  slice.sign_mantissa += count * sign_mantissa_words;
}

// What the block needs to know of batch element `b` of a tensor, beside the slice itself.
struct OpenSlice {
  bool skipped;       // nothing is to be decoded
  bool header_sound;  // it says what is expected
  bool new_table;     // the block's table is another's
};

// Fills `slice`, and `key` anew if the table is to be made anew. One thread calls it.
__device__ inline OpenSlice open_slice(const TensorSlices& tensor, int64_t b, Slice& slice,
                                       TableKey& key) {
  const int64_t number = tensor.slice_of(b);
  if (number < 0) return {true, false, false};
  const View& view = tensor.view;
  const ChunkRange range = tensor.range_of(number);
  slice = first_slice(tensor, b);
  move_slice(slice, range.slice, view.chunks(), view.sign_mantissa_words());
  slice.out = tensor.out + b * tensor.size() - range.element;
  slice.first_chunk = range.first;
  slice.chunk_stride = range.stride;
  const SliceHeader header = load_header(tensor.header + range.slice * kHeaderWords);
  const uint32_t* codebook = tensor.codebook + range.slice * kCodebookWords;
  // Comes with the header, for all warps will wait for it.
  prefetch_global(codebook);
  prefetch_global(codebook + kCodebookWords - 1);
  const bool sound = header.geometry == tensor.geometry;
  if (!sound || key.serves(codebook, header)) return {false, sound, false};
  key = {codebook, {header.codebook_id[0], header.codebook_id[1]}, false};
  return {false, true, true};
}

}  // namespace df11::native
