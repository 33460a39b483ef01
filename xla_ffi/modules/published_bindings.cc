// The published layout's functions in the Python module: encoding, and decoding of any part of a
// unit, for files. Programs decode through the FFI handler.

#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <array>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common/words.h"
#include "modules/bindings.h"
#include "published/check.h"
#include "published/decode.h"
#include "published/encode.h"

namespace nb = nanobind;

namespace df11::published {
namespace {

template <typename T>
using In = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu, nb::ro>;
using TablesIn = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu, nb::ro>;
using CountsIn = nb::ndarray<const uint32_t, nb::ndim<2>, nb::c_contig, nb::device::cpu, nb::ro>;

// The arrays of a sequence. nanobind would end the process if there were no memory for the vector.
std::vector<In<uint16_t>> arrays_of(const nb::sequence& parts) {
  std::vector<In<uint16_t>> arrays;
  for (const nb::handle item : parts) {
    In<uint16_t> array;
    if (!nb::try_cast(item, array)) throw nb::type_error("expected contiguous arrays of uint16");
    arrays.push_back(array);
  }
  return arrays;
}

std::vector<Part> make_parts(const std::vector<In<uint16_t>>& arrays) {
  std::vector<Part> parts;
  for (const auto& array : arrays) {
    parts.push_back({array.data(), static_cast<int64_t>(array.shape(0))});
  }
  return parts;
}

NumpyArray<uint32_t, 2> histogram(const nb::sequence& parts, int threads) {
  const std::vector<In<uint16_t>> arrays = arrays_of(parts);
  const std::vector<Piece> pieces = cut_to_pieces(make_parts(arrays));
  Words words(256 * pieces.size());
  {
    nb::gil_scoped_release release_gil;
    count_exponents(pieces, threads, reinterpret_cast<Counts*>(words.data()));
  }
  return release<uint32_t>(std::move(words), {pieces.size(), 256});
}

nb::tuple encode(const nb::sequence& parts, CountsIn counts, In<uint32_t> code_bits,
                 In<uint8_t> code_lengths, uint32_t tail_bits, uint32_t tail_length, int threads) {
  const std::vector<In<uint16_t>> arrays = arrays_of(parts);
  std::vector<Piece> pieces = cut_to_pieces(make_parts(arrays));
  if (counts.shape(0) != pieces.size() || counts.shape(1) != 256 || code_bits.shape(0) != 256 ||
      code_lengths.shape(0) != 256) {
    throw std::invalid_argument("the counts or the code are not of these arrays");
  }
  std::array<Code, 256> codes;
  for (int e = 0; e < 256; ++e) codes[e] = {code_bits.data()[e], code_lengths.data()[e]};
  EncodedUnit unit;
  {
    nb::gil_scoped_release release_gil;
    const auto* piece_counts = reinterpret_cast<const Counts*>(counts.data());
    unit = UnitEncoder(std::move(pieces), piece_counts, codes, {tail_bits, tail_length})
               .encode(threads);
  }
  const size_t bytes = unit.encoded_bytes, size = unit.size,
               positions = unit.output_positions.size(), gap_bytes = unit.blocks() * kBlockGapBytes;
  return nb::make_tuple(release<uint8_t>(std::move(unit.encoded_exponent), {bytes}),
                        release<uint8_t>(std::move(unit.sign_mantissa), {size}),
                        release<uint32_t>(std::move(unit.output_positions), {positions}),
                        release<uint8_t>(std::move(unit.gaps), {gap_bytes}));
}

// A unit of these arrays; throws if they do not fit each other.
Unit make_unit(const In<uint8_t>& sign_mantissa, const In<uint8_t>& encoded_exponent,
               const TablesIn& luts, const In<uint32_t>& output_positions,
               const In<uint8_t>& gaps) {
  Unit unit{sign_mantissa.data(), encoded_exponent.data(), luts.data(), output_positions.data(),
            gaps.data()};
  const std::string problem =
      set_sizes(unit, sign_mantissa.shape(0), encoded_exponent.shape(0), luts.shape(0),
                luts.shape(1), output_positions.shape(0), gaps.shape(0));
  if (!problem.empty()) throw std::invalid_argument(problem);
  return unit;
}

NumpyArray<uint16_t, 1> decode(In<uint8_t> sign_mantissa, In<uint8_t> encoded_exponent,
                               TablesIn luts, In<uint32_t> output_positions, In<uint8_t> gaps,
                               int64_t start, int64_t stop, int threads) {
  const Unit unit = make_unit(sign_mantissa, encoded_exponent, luts, output_positions, gaps);
  Words words;
  {
    nb::gil_scoped_release release_gil;
    words = decode_elements(unit, start, stop, threads);
  }
  return release<uint16_t>(std::move(words), {static_cast<size_t>(stop - start)});
}

std::string check(In<uint8_t> sign_mantissa, In<uint8_t> encoded_exponent, TablesIn luts,
                  In<uint32_t> output_positions, In<uint8_t> gaps) {
  Unit unit;
  try {
    unit = make_unit(sign_mantissa, encoded_exponent, luts, output_positions, gaps);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  nb::gil_scoped_release release_gil;
  return check_structure(unit);
}

}  // namespace

void add_bindings(nb::module_& m) {
  m.def("published_histogram", &histogram, nb::arg("parts"), nb::arg("threads"),
        "How often each exponent occurs in each piece of 65536 weights of some uint16 arrays.");
  m.def("published_encode", &encode, nb::arg("parts"), nb::arg("counts"), nb::arg("code_bits"),
        nb::arg("code_lengths"), nb::arg("tail_bits"), nb::arg("tail_length"), nb::arg("threads"),
        "Encodes uint16 arrays as one unit: encoded_exponent, sign_mantissa, output_positions, "
        "gaps.");
  m.def("published_decode", &decode, nb::arg("sign_mantissa"), nb::arg("encoded_exponent"),
        nb::arg("luts"), nb::arg("output_positions"), nb::arg("gaps"), nb::arg("start"),
        nb::arg("stop"), nb::arg("threads"),
        "The elements from start to stop - 1 as uint16; raises ValueError if they are corrupt.");
  m.def("published_check", &check, nb::arg("sign_mantissa"), nb::arg("encoded_exponent"),
        nb::arg("luts"), nb::arg("output_positions"), nb::arg("gaps"),
        "What is wrong with a unit as far as that shows without decoding it, or ''.");
}

}  // namespace df11::published
