// The encoder's output in vectors, for tests.
#pragma once

#include <vector>

#include "native/encode.h"

namespace df11::native {

struct EncodedSlice {
  std::vector<uint32_t> codebook, chunk_offsets, exponents, sign_mantissa;
};

inline EncodedSlice encode_slice(const uint16_t* weights, const View& view, int threads) {
  EncodedSlice slice;
  slice.codebook.resize(kCodebookWords);
  slice.chunk_offsets.resize(view.chunks() + 1);
  slice.sign_mantissa.resize(view.sign_mantissa_words());
  const Words records = encode_slice(weights, view, threads, slice.codebook.data(),
                                     slice.chunk_offsets.data(), slice.sign_mantissa.data());
  slice.exponents.assign(records.data(), records.data() + records.size());
  return slice;
}

}  // namespace df11::native
