// The native layout's functions in the Python module: encoding, its verification, and decoding and
// verification for files. Programs decode through the FFI handler.

#include <nanobind/ndarray.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "common/parallel.h"
#include "common/words.h"
#include "modules/bindings.h"
#include "native/cpu/decode_slices.h"
#include "native/cpu/handler.h"
#include "native/encode.h"

namespace nb = nanobind;

namespace df11::native {
namespace {

using WeightsIn = nb::ndarray<const uint16_t, nb::ndim<2>, nb::c_contig, nb::device::cpu, nb::ro>;
using WeightsOut = nb::ndarray<uint16_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using WordsIn = nb::ndarray<const uint32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu, nb::ro>;

// The words of every slice of a stack; numpy takes them over.
struct WordArray {
  size_t stack, slice_words;
  Words words;

  WordArray(size_t stack, size_t slice_words)
      : stack(stack), slice_words(slice_words), words(stack * slice_words) {}
  explicit WordArray(Words slice) : stack(1), slice_words(slice.size()), words(std::move(slice)) {}

  uint32_t* slice(size_t i) { return words.data() + i * slice_words; }
  NumpyArray<uint32_t, 2> release() {
    return df11::release<uint32_t>(std::move(words), {stack, slice_words});
  }
};

using HeaderIn =
    nb::ndarray<const uint32_t, nb::shape<kHeaderWords>, nb::c_contig, nb::device::cpu, nb::ro>;

Layout checked_layout(const HeaderIn& header) {
  Layout layout;
  if (!unpack_header(header.data(), layout)) throw std::invalid_argument("not a header");
  return layout;
}

Layout checked_layout(const HeaderIn& header, size_t size) {
  const Layout layout = checked_layout(header);
  if (static_cast<size_t>(make_view(layout).size) != size) {
    throw std::invalid_argument("the weights do not have the size that the header says");
  }
  return layout;
}

// Slices are shared out among the threads where there are enough of them, else each slice's
// chunks are.
template <typename Body>
void for_each_slice(int64_t stack, int threads, const Body& body) {
  const bool across = stack >= threads;
  parallel_for(stack, across ? threads : 1, [&](int64_t i) { body(i, across ? 1 : threads); });
}

// A stack of slices of different lengths, filled up with zeros to what the longest is padded to.
WordArray pad_together(std::vector<Words> slices, const View& view, int code_bits) {
  size_t longest = 0;
  for (const Words& slice : slices) longest = std::max(longest, slice.size());
  longest = padded_exponents_words(view, code_bits, longest);
  if (slices.size() == 1) {
    const size_t missing = longest - slices[0].size();
    std::fill_n(slices[0].extend(missing), missing, 0u);
    return WordArray(std::move(slices[0]));
  }
  WordArray padded(slices.size(), longest);
  for (size_t i = 0; i < slices.size(); ++i) {
    uint32_t* end = std::copy_n(slices[i].data(), slices[i].size(), padded.slice(i));
    std::fill(end, padded.slice(i) + longest, 0u);
    slices[i] = Words();
  }
  return padded;
}

nb::tuple encode(WeightsIn weights, HeaderIn header, bool share_codebook, int threads) {
  const size_t stack = weights.shape(0);
  const Layout layout = checked_layout(header, weights.shape(1));
  const View view = make_view(layout);
  WordArray headers(stack, kHeaderWords), codebooks(stack, kCodebookWords),
      chunk_offsets(stack, view.chunks() + 1), sign_mantissa(stack, view.sign_mantissa_words());
  std::vector<Words> records(stack);
  WordArray exponents(stack, 0);
  {
    nb::gil_scoped_release release;
    const auto counts_of = [&](int64_t i, int slice_threads) {
      return count_pairs(weights.data() + i * view.size, view, slice_threads);
    };
    std::vector<uint32_t> all_counts(65536);
    for (size_t i = 0; share_codebook && i < stack; ++i) {
      const std::vector<uint32_t> counts = counts_of(i, threads);
      // Halved, should they become so many that they do not fit.
      const bool halve = std::any_of(all_counts.begin(), all_counts.end(),
                                     [](uint32_t count) { return count >> 31; });
      for (int k = 0; k < 65536; ++k) all_counts[k] = (all_counts[k] >> halve) + counts[k];
    }
    for_each_slice(stack, threads, [&](int64_t i, int slice_threads) {
      const Codebook book = choose_codebook(
          share_codebook ? all_counts : counts_of(i, slice_threads), layout.code_bits);
      book.pack(codebooks.slice(i));
      const uint64_t id = codebook_id(codebooks.slice(i));
      uint32_t* own_header =
          std::copy_n(header.data(), kHeaderWords, headers.slice(i)) - kHeaderWords;
      own_header[kCodebookIdWord] = static_cast<uint32_t>(id);
      own_header[kCodebookIdWord + 1] = static_cast<uint32_t>(id >> 32);
      records[i] = encode_slice(weights.data() + i * view.size, view, CodeTable(book),
                                slice_threads, chunk_offsets.slice(i), sign_mantissa.slice(i));
    });
    exponents = pad_together(std::move(records), view, layout.code_bits);
  }
  return nb::make_tuple(headers.release(), codebooks.release(), chunk_offsets.release(),
                        exponents.release(), sign_mantissa.release());
}

// Keeps the smallest of the values that threads offer.
class Smallest {
 public:
  void offer(int64_t value) {
    for (int64_t seen = value_; value < seen && !value_.compare_exchange_weak(seen, value);) {
    }
  }
  // -1 if none was.
  int64_t get() const { return value_ == INT64_MAX ? -1 : value_.load(); }

 private:
  std::atomic<int64_t> value_{INT64_MAX};
};

// Runs body(decoder, slice, chunk) for all chunks of all slices; with a null pointer, and for the
// first chunk of a batch only, where the codebook of the slice is corrupt.
template <typename Body>
void for_each_chunk(const Layout& layout, size_t stack, const WordsIn& codebook,
                    const WordsIn& chunk_offsets, const WordsIn& exponents,
                    const WordsIn& sign_mantissa, int threads, const Body& body) {
  const View view = make_view(layout);
  const auto has_shape = [&](const WordsIn& words, int64_t count) {
    return words.shape(0) == stack && words.shape(1) == static_cast<size_t>(count);
  };
  const auto exponents_words = static_cast<int64_t>(exponents.shape(1));
  if (!has_shape(codebook, kCodebookWords) || !has_shape(chunk_offsets, view.chunks() + 1) ||
      !has_shape(exponents, exponents_words) ||
      !has_shape(sign_mantissa, view.sign_mantissa_words())) {
    throw std::invalid_argument("the compressed arrays do not have the shapes of the weights");
  }
  nb::gil_scoped_release release;
  for_each_slice(stack, threads, [&](int64_t i, int slice_threads) {
    const SlicePayload slice{view,
                             layout.code_bits,
                             codebook.data() + i * kCodebookWords,
                             chunk_offsets.data() + i * (view.chunks() + 1),
                             exponents.data() + i * exponents_words,
                             exponents_words,
                             sign_mantissa.data() + i * view.sign_mantissa_words()};
    const int64_t batches = (view.chunks() + kEncodeBatch - 1) / kEncodeBatch;
    std::atomic<int64_t> next{0};
    // Each thread builds the slice's table once.
    parallel_for(std::min<int64_t>(slice_threads, batches), slice_threads, [&](int64_t) {
      const auto decoder = std::make_unique<ChunkDecoder>(best_simd());
      const bool usable = decoder->set_slice(slice);
      for (int64_t batch; (batch = next.fetch_add(1)) < batches;) {
        const int64_t begin = batch * kEncodeBatch;
        if (!usable) {
          body(nullptr, i, begin);
          continue;
        }
        const int64_t end = std::min(begin + kEncodeBatch, view.chunks());
        for (int64_t c = begin; c < end; ++c) body(decoder.get(), i, c);
      }
      ChunkDecoder::finish();
    });
  });
}

// The first element (counted over the whole stack) that does not come back, or -1.
int64_t find_difference(WeightsIn weights, HeaderIn header, WordsIn codebook, WordsIn chunk_offsets,
                        WordsIn exponents, WordsIn sign_mantissa, int threads) {
  const Layout layout = checked_layout(header, weights.shape(1));
  const View view = make_view(layout);
  Smallest first;
  for_each_chunk(layout, weights.shape(0), codebook, chunk_offsets, exponents, sign_mantissa,
                 threads, [&](ChunkDecoder* decoder, int64_t slice, int64_t chunk) {
                   const uint16_t* expected = weights.data() + slice * view.size;
                   const int64_t at = decoder ? decoder->find_difference(chunk, expected) : 0;
                   if (at >= 0) first.offer(slice * view.size + at);
                 });
  return first.get();
}

// Decodes into `weights`. The first chunk (counted over the whole stack) that is corrupt, or -1.
int64_t decode(WeightsOut weights, HeaderIn header, WordsIn codebook, WordsIn chunk_offsets,
               WordsIn exponents, WordsIn sign_mantissa, int threads) {
  const Layout layout = checked_layout(header, weights.shape(1));
  const View view = make_view(layout);
  Smallest first;
  for_each_chunk(layout, weights.shape(0), codebook, chunk_offsets, exponents, sign_mantissa,
                 threads, [&](ChunkDecoder* decoder, int64_t slice, int64_t chunk) {
                   uint16_t* out = weights.data() + slice * view.size;
                   const bool decoded = decoder && decoder->decode(chunk, out);
                   if (!decoded) first.offer(slice * view.chunks() + chunk);
                 });
  return first.get();
}

// Decodes, and keeps nothing. The first chunk, counted in the same way, that is corrupt, or -1.
int64_t verify(HeaderIn header, WordsIn codebook, WordsIn chunk_offsets, WordsIn exponents,
               WordsIn sign_mantissa, int threads) {
  const Layout layout = checked_layout(header);
  const View view = make_view(layout);
  Smallest first;
  for_each_chunk(layout, codebook.shape(0), codebook, chunk_offsets, exponents, sign_mantissa,
                 threads, [&](ChunkDecoder* decoder, int64_t slice, int64_t chunk) {
                   const bool sound = decoder && decoder->verify(chunk);
                   if (!sound) first.offer(slice * view.chunks() + chunk);
                 });
  return first.get();
}

}  // namespace

void add_bindings(nb::module_& m) {
  m.def("encode", &encode, nb::arg("weights"), nb::arg("header"), nb::arg("share_codebook"),
        nb::arg("threads"),
        "Encodes uint16[stack, size]: header, codebook, chunk_offsets, exponents, sign_mantissa.");
  m.def("find_difference", &find_difference, nb::arg("weights"), nb::arg("header"),
        nb::arg("codebook"), nb::arg("chunk_offsets"), nb::arg("exponents"),
        nb::arg("sign_mantissa"), nb::arg("threads"),
        "The index of the first element that decodes to something else, or -1.");
  m.def("decode", &decode, nb::arg("weights"), nb::arg("header"), nb::arg("codebook"),
        nb::arg("chunk_offsets"), nb::arg("exponents"), nb::arg("sign_mantissa"),
        nb::arg("threads"),
        "Decodes into uint16[stack, size]; the index of the first chunk that is corrupt, or -1.");
  m.def("verify", &verify, nb::arg("header"), nb::arg("codebook"), nb::arg("chunk_offsets"),
        nb::arg("exponents"), nb::arg("sign_mantissa"), nb::arg("threads"),
        "Decodes into nothing; the index of the first chunk that is corrupt, or -1.");
  m.def("decode_count", &decode_count, "Slices decoded by the CPU handler so far.");
}

}  // namespace df11::native
