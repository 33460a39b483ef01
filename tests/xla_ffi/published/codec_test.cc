// Round trips and fuzzing of the published layout's encoder and CPU decoder, to be run under
// sanitizers. Arrays are vectors of their exact sizes, so that AddressSanitizer sees every step
// outside of them.

#include <cstdio>
#include <functional>
#include <random>
#include <vector>

#include "../thread_sanitizer.h"
#include "encoded_unit.h"
#include "published/check.h"
#include "published/decode.h"

namespace df11::published {
namespace {

std::mt19937_64 random_bits(0);
int failures = 0;

void check(bool ok, const char* what, int64_t size) {
  if (ok) return;
  ++failures;
  std::printf("FAILED: %s at %lld elements\n", what, static_cast<long long>(size));
}

using Weights = std::vector<uint16_t>;
using Source = std::function<uint16_t(int64_t)>;

uint16_t with_exponent(uint32_t exponent) {
  return join_weight(exponent, static_cast<uint32_t>(random_bits() & 255));
}

uint16_t normal_weight(int64_t) {
  static std::normal_distribution<float> normal(0, 0.02f);
  const float value = normal(random_bits);
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>(bits >> 16);
}

Weights draw(int64_t size, const Source& source) {
  Weights weights(size);
  for (int64_t i = 0; i < size; ++i) weights[i] = source(i);
  return weights;
}

Weights decode(const Unit& unit, int64_t start, int64_t stop) {
  Words words = decode_elements(unit, start, stop, 2);
  const auto* out = reinterpret_cast<const uint16_t*>(words.data());
  return Weights(out, out + (stop - start));
}

// Code by code from the first bit on, as nothing but the tables say; empty if they do not go on.
Weights decode_plainly(const Unit& unit) {
  Weights weights;
  int64_t bit = 0;
  for (int64_t i = 0; i < unit.size; ++i) {
    uint64_t window = 0;
    for (int64_t byte = bit / 8; byte < bit / 8 + 8; ++byte) {
      window = window << 8 | (byte < unit.encoded_bytes ? unit.encoded_exponent[byte] : 0);
    }
    const Symbol symbol = look_up(unit, static_cast<uint32_t>(window << bit % 8 >> 32));
    if (symbol.length == 0) return {};
    weights.push_back(join_weight(symbol.exponent, unit.sign_mantissa[i]));
    bit += symbol.length;
  }
  return weights;
}

void round_trip(int64_t size, const Source& source) {
  const Weights weights = draw(size, source);
  const int64_t first = static_cast<int64_t>(random_bits() % (size + 1));
  const std::vector<Part> parts = {
      {weights.data(), first}, {nullptr, 0}, {weights.data() + first, size - first}};
  const TestUnit made = make_unit(parts, 3);
  const Unit unit = made.view();
  const std::string problem = check_structure(unit);
  if (!problem.empty()) std::printf("%s\n", problem.c_str());
  check(problem.empty(), "structure", size);
  check(decode(unit, 0, size) == weights, "round trip", size);
  for (int i = 0; i < 5; ++i) {
    const auto stop = static_cast<int64_t>(random_bits() % (size + 1));
    const auto start = static_cast<int64_t>(random_bits() % (stop + 1));
    check(decode(unit, start, stop) == Weights(weights.begin() + start, weights.begin() + stop),
          "a part", size);
  }
  const CodeTable table(unit);
  for (int simd = 0; simd <= static_cast<int>(best_simd()); ++simd) {
    Weights out(size, 0x5555);
    const auto decoder = std::make_unique<BlockDecoder>(unit, table, static_cast<Simd>(simd));
    check(decoder->decode(0, unit.blocks, 0, size, out.data()).empty() && out == weights,
          "an instruction set", size);
  }
}

// Weights that change between counting and encoding are refused, and nothing is written outside.
void encode_others(const Source& counted, const Source& encoded) {
  for (int64_t size : {1, 100, 12288, 70000}) {
    const Weights before = draw(size, counted), after = draw(size, encoded);
    const std::vector<Piece> pieces = cut_to_pieces({{before.data(), size}});
    std::vector<Counts> counts(pieces.size());
    count_exponents(pieces, 1, counts.data());
    // A code for all of both.
    Weights both = before;
    both.insert(both.end(), after.begin(), after.end());
    const TestCode code = make_unit({{both.data(), 2 * size}}, 1).code;
    bool refused = size < 1000;  // codes of other weights may be just as long
    try {
      UnitEncoder(cut_to_pieces({{after.data(), size}}), counts.data(), code.codes, code.end_symbol)
          .encode(2);
    } catch (const std::invalid_argument&) {
      refused = true;
    }
    check(refused, "other weights than were counted", size);
  }
}

enum Field { kStream, kLuts, kGaps, kPositions, kFields };

void damage(TestUnit& unit, Field field) {
  std::vector<uint8_t>* const bytes[] = {&unit.encoded_exponent, &unit.code.luts, &unit.gaps};
  const int kind = random_bits() % 8;
  if (kind == 0) {  // the array ends early, or holds more
    const int change = static_cast<int>(random_bits() % 9) - 4;
    if (field == kPositions) {
      unit.output_positions.resize(std::max<int64_t>(unit.output_positions.size() + change, 0));
    } else {
      bytes[field]->resize(std::max<int64_t>(bytes[field]->size() + change, 0));
    }
  } else if (field == kPositions) {
    if (unit.output_positions.empty()) return;
    uint32_t& position = unit.output_positions[random_bits() % unit.output_positions.size()];
    position = kind < 4 ? position ^ 1u << random_bits() % 32
                        : static_cast<uint32_t>(random_bits() >> random_bits() % 64);
  } else {
    if (bytes[field]->empty()) return;
    uint8_t& byte = (*bytes[field])[random_bits() % bytes[field]->size()];
    byte = kind < 6 ? byte ^ 1u << random_bits() % 8 : static_cast<uint8_t>(random_bits());
  }
}

// What is damaged is refused, or decodes to what its stream holds; if its stream and tables are
// good, to the right weights.
void fuzz(int64_t size, const Source& source, int tries) {
  const Weights weights = draw(size, source);
  const TestUnit good = make_unit({{weights.data(), size}}, 1);
  int refused = 0;
  for (int attempt = 0; attempt < tries; ++attempt) {
    TestUnit bad = good;
    bool same_stream = true;
    for (int i = random_bits() % 2; i >= 0; --i) {
      const auto field = static_cast<Field>(random_bits() % kFields);
      damage(bad, field);
      same_stream &= field == kGaps || field == kPositions;
    }
    // Vectors keep their room when they shrink.
    bad = TestUnit(bad);
    try {
      Unit unit = bad.view();
      if (!set_sizes(unit, unit.size, unit.encoded_bytes, bad.code.luts.size() / kRowEntries,
                     kRowEntries, unit.positions, bad.gaps.size())
               .empty() ||
          bad.code.luts.size() % kRowEntries != 0) {
        ++refused;
        continue;
      }
      check_structure(unit);
      const auto start = static_cast<int64_t>(random_bits() % size);
      decode(unit, start, std::min(size, start + 1000));
      const Weights out = decode(unit, 0, size);
      check(out == decode_plainly(unit), "decoded to something else than the stream holds", size);
      check(!same_stream || out == weights, "corruption went unnoticed", size);
    } catch (const std::invalid_argument&) {
      ++refused;
    }
  }
  std::printf("fuzz %lld: %d of %d changes refused\n", static_cast<long long>(size), refused,
              tries);
}

// Whatever the tables are, nothing is read outside of them, and every look-up ends.
void fuzz_tables() {
  for (int rows = 1; rows <= kMaxRows; ++rows) {
    for (int attempt = 0; attempt < 20; ++attempt) {
      std::vector<uint8_t> luts((rows + 1) * kRowEntries);
      const int pointers = attempt % 5;
      for (uint8_t& entry : luts) {
        entry = static_cast<uint8_t>(random_bits() % 4 < static_cast<unsigned>(pointers)
                                         ? kFirstPointer + random_bits() % 16
                                         : random_bits());
      }
      for (int e = 0; e < kRowEntries; ++e) luts[rows * kRowEntries + e] = random_bits() % 40;
      Unit unit;
      unit.luts = luts.data();
      unit.rows = rows;
      for (int i = 0; i < 1000; ++i) {
        check(look_up(unit, static_cast<uint32_t>(random_bits())).length <= kMaxCodeBits, "look-up",
              rows);
      }
      check(!check_tables(unit).empty(), "random tables are refused", rows);
      const CodeTable table(unit);
    }
  }
}

int run() {
  const auto constant = [](int64_t) { return uint16_t{0x3f80}; };
  const auto two = [](int64_t i) { return with_exponent(i % 7 ? 100 : 101); };
  const auto even = [](int64_t) { return with_exponent(random_bits() % kFirstPointer); };
  // Codes of many lengths, up to those that no table of eleven bits holds.
  const auto skewed = [](int64_t) {
    return with_exponent(100 + __builtin_ctzll(random_bits() | uint64_t{1} << 39));
  };
  // Every window begins with a long code.
  const auto rare = [](int64_t i) {
    return with_exponent(i % 11 ? 100 : 120 + random_bits() % 30 * (random_bits() % 50 == 0));
  };
  std::vector<Source> sources = {normal_weight, skewed};
  // Threads do the same with the others.
  if (!kIsSlow) sources.insert(sources.end(), {constant, two, even, rare});
  for (const Source& source : sources) {
    for (int64_t n :
         {1,   2,    3,    4,    5,    7,     8,     9,     63,    64,    65,    127,   128,
          129, 1000, 4095, 4096, 4097, 12000, 16000, 32767, 32768, 32769, 65536, 65537, 100000}) {
      round_trip(n, source);
    }
  }
  // The stream ends anywhere about a block's end.
  for (int64_t n = 32768 * 8 / 10; n < 32768 * 8 / 10 + 60; ++n) {
    round_trip(n, [](int64_t i) { return with_exponent(100 + (i % 5 == 0) + (i % 10 == 0)); });
  }
  round_trip(1 << 20, normal_weight);
  encode_others(two, skewed);
  encode_others(skewed, two);
  if (!kIsSlow) fuzz_tables();  // by one thread
  const int tries = kIsSlow ? 15 : 100;
  for (const Source& source : sources) {
    fuzz(30, source, tries);
    fuzz(40000, source, tries);
  }
  if (!kIsSlow) fuzz(20000, normal_weight, 500);
  std::printf("%s\n", failures ? "FAILED" : "all passed");
  return failures != 0;
}

}  // namespace
}  // namespace df11::published

int main() { return df11::published::run(); }
