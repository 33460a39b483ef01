// The encoder's output in vectors, for tests.
#pragma once

#include <vector>

#include "native/encode.h"

namespace df11::native {

struct EncodedSlice {
  std::vector<uint32_t> codebook, chunk_offsets, exponents, sign_mantissa;
};

inline EncodedSlice encode_slice(const uint16_t* weights, const Layout& layout, int threads) {
  const View view = make_view(layout);
  EncodedSlice slice;
  slice.codebook.resize(kCodebookWords);
  slice.chunk_offsets.resize(view.chunks() + 1);
  slice.sign_mantissa.resize(view.sign_mantissa_words());
  const Codebook book = choose_codebook(count_pairs(weights, view, threads), layout.code_bits);
  book.pack(slice.codebook.data());
  const Words records = encode_slice(weights, view, CodeTable(book), threads,
                                     slice.chunk_offsets.data(), slice.sign_mantissa.data());
  slice.exponents.assign(records.data(), records.data() + records.size());
  slice.exponents.resize(padded_exponents_words(view, layout.code_bits, records.size()));
  return slice;
}

inline EncodedSlice encode_slice(const uint16_t* weights, const std::vector<int64_t>& dims,
                                 int threads) {
  return encode_slice(weights, default_layout(dims.data(), static_cast<int>(dims.size())), threads);
}

}  // namespace df11::native
