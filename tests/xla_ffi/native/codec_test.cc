// Round trips and fuzzing of the C++ encoder and CPU decoder, to be run under sanitizers. Arrays
// are allocated in their exact sizes, so that AddressSanitizer sees every step outside of them.

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <new>
#include <random>
#include <vector>

#include "../thread_sanitizer.h"
#include "encoded_slice.h"
#include "native/cpu/decode_slices.h"

namespace df11::native {
namespace {

std::mt19937_64 random_bits(0);
int failures = 0;

void check(bool ok, const char* what, const View& view) {
  if (ok) return;
  ++failures;
  std::printf("FAILED: %s at %lld x %lld x %lld%s, %d steps a chunk\n", what,
              static_cast<long long>(view.batch), static_cast<long long>(view.k),
              static_cast<long long>(view.n), view.along_columns ? " along columns" : "",
              view.steps);
}

using Source = std::function<uint16_t(int64_t)>;
using Dims = std::vector<int64_t>;

uint16_t normal_weight(int64_t) {
  static std::normal_distribution<float> normal(0, 0.02f);
  const float value = normal(random_bits);
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>(bits >> 16);
}

struct Arrays {
  View view;
  std::unique_ptr<uint32_t[]> codebook, chunk_offsets, exponents, sign_mantissa;
  size_t words[4];

  Arrays(const View& view, const EncodedSlice& slice) : view(view) {
    const auto copy = [&](int i, const std::vector<uint32_t>& from) {
      words[i] = from.size();
      std::unique_ptr<uint32_t[]> to(new uint32_t[from.size()]);
      std::copy(from.begin(), from.end(), to.get());
      return to;
    };
    codebook = copy(0, slice.codebook);
    chunk_offsets = copy(1, slice.chunk_offsets);
    exponents = copy(2, slice.exponents);
    sign_mantissa = copy(3, slice.sign_mantissa);
  }

  // Runs sound(decoder, chunk) for all chunks, as far as there is a code; false if corruption was
  // found.
  template <typename Sound>
  bool all_chunks(Simd simd, const Sound& sound) const {
    const auto decoder = std::make_unique<ChunkDecoder>(simd);
    if (!decoder->set_slice({view, kMaxCodeBits, codebook.get(), chunk_offsets.get(),
                             exponents.get(), static_cast<int64_t>(words[2]),
                             sign_mantissa.get()})) {
      return false;
    }
    bool ok = true;
    for (int64_t c = 0; c < view.chunks(); ++c) ok &= sound(*decoder, c);
    return ok;
  }

  // Decodes into fresh memory, `skew` weights behind the start of a cache line, where jax's begins.
  bool decode(Simd simd, std::vector<uint16_t>& out, int skew = 0) const {
    constexpr std::align_val_t kAligned{kCacheLine};
    void* fresh = ::operator new(2 * (out.size() + skew), kAligned);
    uint16_t* weights = static_cast<uint16_t*>(fresh) + skew;
    std::copy(out.begin(), out.end(), weights);
    const bool ok =
        all_chunks(simd, [&](ChunkDecoder& d, int64_t c) { return d.decode(c, weights); });
    std::copy_n(weights, out.size(), out.begin());
    ::operator delete(fresh, kAligned);
    return ok;
  }

  bool verify(Simd simd) const {
    return all_chunks(simd, [](ChunkDecoder& d, int64_t c) { return d.verify(c); });
  }

  // The first element, in the order of chunks, that is not as in `weights`; or -1.
  int64_t find_difference(Simd simd, const std::vector<uint16_t>& weights) const {
    const auto decoder = std::make_unique<ChunkDecoder>(simd);
    decoder->set_slice({view, kMaxCodeBits, codebook.get(), chunk_offsets.get(), exponents.get(),
                        static_cast<int64_t>(words[2]), sign_mantissa.get()});
    for (int64_t c = 0; c < view.chunks(); ++c) {
      const int64_t at = decoder->find_difference(c, weights.data());
      if (at >= 0) return at;
    }
    return -1;
  }
};

Layout layout_of(const Dims& dims) {
  return default_layout(dims.data(), static_cast<int>(dims.size()));
}

// Ways to cut slices of a shape.
std::vector<Layout> layouts_of(const Dims& dims) {
  std::vector<Layout> layouts(1, layout_of(dims));
  for (const int steps : {4, 2}) {
    layouts.push_back(layouts[0]);
    layouts.back().steps = steps;
  }
  if (dims.size() < 2) return layouts;
  for (int i = 0; i < 3; ++i) {
    layouts.push_back(layouts[i]);
    layouts.back().along_columns = true;
  }
  layouts[1].code_bits = 9;
  layouts[4].code_bits = 10;
  if (dims.size() < 3) return layouts;
  for (int i = 0; i < 6; ++i) {
    layouts.push_back(layouts[i]);
    layouts.back().batch_axes = i % 2;
    layouts.back().row_axes = 1;
  }
  return layouts;
}

// Padding is decoded as finite weights, of which sign and mantissa are 0.
void check_padding(const View& view, const Arrays& arrays) {
  const auto decoder = std::make_unique<ChunkDecoder>(best_simd());
  decoder->set_slice({view, kMaxCodeBits, arrays.codebook.get(), arrays.chunk_offsets.get(),
                      arrays.exponents.get(), static_cast<int64_t>(arrays.words[2]),
                      arrays.sign_mantissa.get()});
  alignas(64) static uint16_t tile[kTileRows * kTileCols];
  bool finite = true;
  for (int64_t c = 0; c < view.chunks(); ++c) {
    const Chunk chunk = locate_chunk(view, c);
    const Extent extent(view, chunk);
    decoder->decode_rows(c, chunk, {tile, kTileCols, false});
    for (int k = 0; k < chunk.steps * kStepRows; ++k) {
      for (int64_t n = extent.n_of(k); n < kTileCols; ++n) {
        const uint16_t weight = tile[k * kTileCols + n];
        finite &= (weight & kSignMantissa & 0xffff) == 0 && weight >> 7 != 255;
      }
    }
  }
  check(finite, "padding", view);
}

void round_trip_of(const Layout& layout, const Source& source) {
  const View view = make_view(layout);
  std::vector<uint16_t> weights(view.size);
  for (int64_t i = 0; i < view.size; ++i) weights[i] = source(i);
  const Arrays arrays(view, encode_slice(weights.data(), layout, 2));
  for (int simd = 0; simd <= static_cast<int>(best_simd()); ++simd) {
    for (const int skew : {0, 1}) {
      std::vector<uint16_t> out(view.size, 0x5555);
      check(arrays.decode(static_cast<Simd>(simd), out, skew) && out == weights, "round trip",
            view);
    }
    check(arrays.verify(static_cast<Simd>(simd)), "sound chunks are corrupt", view);
  }
  check_padding(view, arrays);
  Layout unpacked;
  check(unpack_header(pack_header(layout).data(), unpacked) &&
            pack_header(unpacked) == pack_header(layout),
        "header", view);
}

void round_trip(const Dims& dims, const Source& source) {
  for (const Layout& layout : layouts_of(dims)) round_trip_of(layout, source);
}

void fuzz_of(const Layout& layout, const Source& source, int tries) {
  const View view = make_view(layout);
  std::vector<uint16_t> weights(view.size);
  for (int64_t i = 0; i < view.size; ++i) weights[i] = source(i);
  const EncodedSlice good = encode_slice(weights.data(), layout, 1);
  int caught = 0;
  for (int attempt = 0; attempt < tries; ++attempt) {
    Arrays arrays(view, good);
    uint32_t* parts[] = {arrays.codebook.get(), arrays.chunk_offsets.get(), arrays.exponents.get(),
                         arrays.sign_mantissa.get()};
    const int changes = 1 + random_bits() % 3;
    for (int i = 0; i < changes; ++i) {
      const int part = random_bits() % 4;
      uint32_t& word = parts[part][random_bits() % arrays.words[part]];
      word = random_bits() % 4 ? word ^ 1u << random_bits() % 32
                               : static_cast<uint32_t>(random_bits());
    }
    std::vector<uint16_t> out(view.size);
    const bool ok = arrays.decode(best_simd(), out);
    caught += !ok;
    check(!ok || out == weights, "corruption went unnoticed", view);
    for (int simd = 0; simd <= static_cast<int>(best_simd()); ++simd) {
      check(arrays.verify(static_cast<Simd>(simd)) == ok, "verify finds what decode finds", view);
    }
  }
  std::printf("fuzz %lld x %lld: %d of %d changes refused, the others harmless\n",
              static_cast<long long>(view.k), static_cast<long long>(view.n), caught, tries);
}

void fuzz(const Dims& dims, const Source& source, int tries) {
  for (const Layout& layout : layouts_of(dims)) fuzz_of(layout, source, tries);
}

// Every instruction set's loops give what the portable ones do.
void check_encoder_loops(const Source& source) {
  const int count = kTileRows * kTileCols / 2;
  std::vector<uint16_t> weights(2 * count);
  for (uint16_t& weight : weights) weight = source(&weight - weights.data());
  const View view = make_view(layout_of({kTileRows, kTileCols}));
  const CodeTable codes(choose_codebook(count_pairs(weights.data(), view, 1), kMaxCodeBits));

  struct Result {
    std::vector<uint32_t> sign_mantissa;
    std::array<Accumulators, 2> acc{};
    std::vector<uint16_t> index;
    std::vector<uint16_t> entries;
    std::vector<uint64_t> groups;
    std::vector<uint8_t> stream;
    std::array<int, kLanes> bits;
    std::vector<bool> uncoded;
  };
  const auto run = [&](EncoderLoops loops) {
    Result result;
    result.sign_mantissa.resize(count / 2);
    result.groups.resize(count / kGroupPairs);
    result.stream.resize(count * kMaxCodeBits / 8 + 8);
    result.index.resize(count);
    result.entries.resize(count);
    const Extent extent(view, locate_chunk(view, 0));
    HalfStepWeights copies;
    for (int i = 0; i < 2 * kMaxSteps; ++i) {
      uint16_t *const index = &result.index[i * kHalfStepPairs],
                      *const entries = &result.entries[i * kHalfStepPairs];
      loops.split_pairs(half_step_rows({weights.data(), view.n}, extent, i, 0, copies),
                        result.acc[i % 2], result.acc[(i + 1) % 2], index,
                        &result.sign_mantissa[i * kHalfStepWords]);
      result.uncoded.push_back(loops.look_up_codes(index, codes, entries));
      loops.join_codes(entries, &result.groups[i * kHalfStepPairs / kGroupPairs]);
    }
    loops.write_streams(result.groups.data(), 2 * kMaxSteps, 0, result.stream.data(), result.bits);
    return result;
  };
  const Result expected = run(encoder_loops(Simd::kPortable));
  for (int simd = 1; simd <= static_cast<int>(best_simd()); ++simd) {
    const Result result = run(encoder_loops(static_cast<Simd>(simd)));
    check(result.sign_mantissa == expected.sign_mantissa && result.acc == expected.acc &&
              result.index == expected.index && result.entries == expected.entries &&
              result.groups == expected.groups && result.stream == expected.stream &&
              result.bits == expected.bits && result.uncoded == expected.uncoded,
          "loops of an instruction set", view);
  }
}

// What is wrong in the final arrays is found, wherever it is.
void check_verification_of(const Layout& layout) {
  const View view = make_view(layout);
  std::vector<uint16_t> weights(view.size);
  for (int64_t i = 0; i < view.size; ++i) weights[i] = normal_weight(i);
  const Arrays arrays(view, encode_slice(weights.data(), layout, 1));
  for (int simd = 0; simd <= static_cast<int>(best_simd()); ++simd) {
    check(arrays.find_difference(static_cast<Simd>(simd), weights) == -1, "verification", view);
    for (int attempt = 0; attempt < 20; ++attempt) {
      // As if another weight had been encoded: nothing but the comparison can see that.
      const int64_t at = random_bits() % view.size;
      const uint16_t bit = static_cast<uint16_t>(1u << random_bits() % 16);
      weights[at] ^= bit;
      check(arrays.find_difference(static_cast<Simd>(simd), weights) == at, "verification", view);
      weights[at] ^= bit;
    }
  }
}

void check_verification(const Dims& dims) {
  for (const Layout& layout : layouts_of(dims)) check_verification_of(layout);
}

// An exception in any thread reaches the caller, who may be Python.
void check_exceptions() {
  for (int threads : {1, 4}) {
    bool caught = false;
    try {
      parallel_for(100, threads, [](int64_t i) {
        if (i == 37) throw std::bad_alloc();
      });
    } catch (const std::bad_alloc&) {
      caught = true;
    }
    check(caught, "exception got lost", View());
  }
}

// What one thread does.
void check_codec() {
  const auto pattern = [](int64_t i) { return static_cast<uint16_t>(i); };
  const auto noise = [](int64_t) { return static_cast<uint16_t>(random_bits()); };
  const auto constant = [](int64_t) { return uint16_t{0x3f80}; };
  // All lanes but one compress to nearly nothing: more than 255 bits of spread.
  const auto uneven = [&](int64_t i) { return i % 64 < 8 ? normal_weight(i) : uint16_t{0}; };
  // Exponents that only some places of the tensor have: many patches.
  const auto rare = [&](int64_t i) { return i % 97 ? normal_weight(i) : noise(i); };
  // Nothing that is coded is finite.
  const auto infinite = [](int64_t i) { return static_cast<uint16_t>(0x7f80 | i % 2); };
  // Exponents from 240 on: 32 from the least one go beyond the last.
  const auto large = [](int64_t) { return static_cast<uint16_t>(0x7800 | random_bits() % 0x800); };
  const Source sources[] = {normal_weight, pattern, noise, constant, uneven, rare, infinite, large};
  for (const Source& source : sources) check_encoder_loops(source);
  // Every shape with weights of all kinds of chunks; the other kinds with a few shapes.
  for (const Source& source : {Source(rare), Source(noise)}) {
    for (int64_t n : {0,   1,   2,    7,    8,    9,    63,   64,   65,    127,
                      128, 129, 1023, 1024, 1025, 8191, 8192, 8193, 16385, 65536}) {
      round_trip({n}, source);
    }
    for (int64_t rows : {1, 15, 16, 17, 127, 128, 129, 144, 257}) {
      for (int64_t cols : {8, 56, 64, 72, 100, 128, 192}) round_trip({rows, cols}, source);
    }
    for (int64_t rows : {5, 16, 48, 130}) round_trip({3, rows, 64}, source);
  }
  for (const Source& source : sources) {
    for (int64_t n : {1, 65, 8193, 65536}) round_trip({n}, source);
    for (int64_t rows : {17, 144}) {
      for (int64_t cols : {64, 100}) round_trip({rows, cols}, source);
    }
    round_trip({40, 4, 24}, source);
    round_trip({}, source);
  }
  round_trip({2200, 1024}, normal_weight);                // written past the caches
  round_trip_of(layout_of({2200, 1024}), rare);           // and patched there
  round_trip_of(layout_of({2200, 1000}), normal_weight);  // whose rows are no whole cache lines
  for (int64_t rows : {1, 130, 256}) check_verification({rows, 72 * 8});
  check_verification({100, 100});
  fuzz({130, 64}, normal_weight, 500);
  fuzz({16, 64}, normal_weight, 500);
  fuzz({500, 64}, rare, 100);  // not flat, and with padding
  fuzz({1000}, rare, 1000);
  fuzz({100, 64}, noise, 200);
  fuzz_of(layout_of({2200, 1024}), rare, 5);
}

int run() {
  check_exceptions();
  round_trip({700, 1024}, normal_weight);  // more than one batch of chunks
  if (!kIsSlow) check_codec();             // no races where there is one thread
  std::printf("%s\n", failures ? "FAILED" : "all passed");
  return failures != 0;
}

}  // namespace
}  // namespace df11::native

int main() { return df11::native::run(); }
