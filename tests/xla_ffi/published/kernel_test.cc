// Tests of the CUDA decoder of the published layout, against a decoder that reads bit by bit and
// the weights that were encoded. Compiled by g++ against ../emulation
// (test_kernel_emulated.py) it runs the kernel on the host; compiled by nvcc, on a GPU.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "../kernel_driver.h"
#include "published/cuda/decode.h"
#include "reference_unit.h"

namespace df11::published_test {
namespace {

using Weights = std::vector<uint16_t>;
using Lengths = std::vector<int>;

// Neither can be a weight: its exponent has no code.
constexpr uint16_t kUnwritten = 0x7fc0, kPoison = 0xffff;

Weights decode(const UnitArrays& arrays) {
  const Buffer<uint8_t> sign_mantissa(arrays.sign_mantissa), luts(arrays.luts), gaps(arrays.gaps);
  const Buffer<uint8_t> encoded_exponent(arrays.encoded_exponent);
  const Buffer<uint32_t> output_positions(arrays.output_positions);
  const Buffer<uint16_t> out(Weights(arrays.size(), kUnwritten));
  published::Unit unit;
  unit.sign_mantissa = sign_mantissa.get();
  unit.encoded_exponent = encoded_exponent.get();
  unit.luts = luts.get();
  unit.output_positions = output_positions.get();
  unit.gaps = gaps.get();
  unit.out = out.get();
  unit.size = arrays.size();
  unit.encoded_bytes = arrays.bits() / 8;
  unit.blocks = arrays.blocks();
  unit.positions = static_cast<int64_t>(arrays.output_positions.size());
  unit.rows = arrays.rows();
  const cudaError_t error = published::launch_decode(nullptr, unit);
  expect(error == cudaSuccess, "launch_decode returned " + std::to_string(error));
  expect(cudaDeviceSynchronize() == cudaSuccess, "cudaDeviceSynchronize");
  return out.copy();
}

// The blocks agree with each other about which elements are whose.
bool positions_in_order(const UnitArrays& arrays) {
  bool in_order = arrays.position(0) == 0 && arrays.position(arrays.blocks()) == arrays.size();
  for (int64_t b = 0; b < arrays.blocks(); ++b) {
    in_order &= arrays.position(b) <= arrays.position(b + 1);
  }
  return in_order;
}

// Expects every block to be what it holds, or poison where it is corrupt.
void check(const std::string& name, const UnitArrays& arrays) {
  const Weights decoded = decode(arrays);
  const bool in_order = positions_in_order(arrays);
  std::vector<bool> explained(arrays.size());
  for (int64_t b = 0; b < arrays.blocks(); ++b) {
    const BlockModel model = decode_block(arrays, b);
    const int64_t end = std::min(model.end, arrays.size());
    bool right = true, poison = true;
    for (int64_t i = model.first; i < end; ++i) {
      const size_t k = static_cast<size_t>(i - model.first);
      const bool is_right = k < model.weights.size() && decoded[i] == model.weights[k];
      right &= is_right;
      poison &= decoded[i] == kPoison;
      if (is_right) explained[i] = true;
    }
    if (!in_order || model.first >= end) continue;
    ++checked;
    poisoned += poison;
    const bool ok = model.sound ? right : model.must_be_poison ? poison : right || poison;
    expect(ok, name + ", block " + std::to_string(b) + " of " + std::to_string(arrays.blocks()) +
                   (model.sound ? ", sound" : ", corrupt"));
  }
  for (int64_t i = 0; i < arrays.size(); ++i) {
    if (decoded[i] == kPoison || explained[i]) continue;
    expect(false, name + ", element " + std::to_string(i) + " is " + std::to_string(decoded[i]));
    break;
  }
}

void round_trip(const std::string& name, const Weights& weights, const Codebook& book) {
  const UnitArrays arrays = encode(weights, book);
  expect(!arrays.luts.empty(), name + ": too many rows");
  if (arrays.luts.empty()) return;
  check(name, arrays);
  expect(decode(arrays) == weights, name + ": not the original");
}

// Weights and codes

Codebook huffman_of(const Weights& weights) {
  std::array<int64_t, 256> counts{};
  for (uint16_t weight : weights) ++counts[weight >> 7 & 255];
  return huffman(counts);
}

Weights normal_weights(int64_t size) {
  Weights weights(size);
  for (uint16_t& weight : weights) weight = normal();
  return weights;
}

// Some exponents that a code can have, in any order.
std::vector<uint8_t> random_exponents(size_t count) {
  std::vector<uint8_t> exponents(240);
  std::iota(exponents.begin(), exponents.end(), uint8_t{0});
  std::shuffle(exponents.begin(), exponents.end(), rng);
  exponents.resize(count);
  return exponents;
}

// Weights whose exponents are drawn alike, whatever the lengths of their codes.
Weights draw(int64_t size, const std::function<uint8_t()>& exponent) {
  Weights weights(size);
  for (uint16_t& weight : weights) {
    weight = static_cast<uint16_t>(exponent() << 7 | (rng() & 0x807f));
  }
  return weights;
}

struct Coded {
  Codebook book;
  Weights weights;
};

// `lengths` ends with that of the end symbol.
Coded drawn_alike(int64_t size, const Lengths& lengths) {
  const auto exponents = random_exponents(lengths.size() - 1);
  return {of_lengths(lengths, exponents),
          draw(size, [&] { return exponents[random_below(exponents.size())]; })};
}

// 1, 2, .. 31, 32, 32 bits.
Lengths chain() {
  Lengths lengths(33, 32);
  std::iota(lengths.begin(), lengths.end() - 1, 1);
  return lengths;
}

// Random lengths that fill the code space.
Lengths random_lengths() {
  Lengths lengths = {1, 1};
  const size_t count = 2 + random_below(60);
  while (lengths.size() < count) {
    // Mostly of the longest.
    const size_t at = lengths.size() - 1 - random_below(std::min<size_t>(lengths.size(), 4));
    if (lengths[at] == 32) break;
    lengths.push_back(++lengths[at]);
  }
  std::shuffle(lengths.begin(), lengths.end(), rng);
  return lengths;
}

// Sections

void test_sizes() {
  const Weights all = normal_weights(26000);
  const Codebook book = huffman_of(all);
  std::vector<int64_t> sizes = {1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 100, 3083};
  // Around the ends of windows of lanes, and of blocks.
  int64_t bit = 0;
  for (size_t i = 0; i < all.size(); ++i) {
    const int64_t next = bit + static_cast<int64_t>(book.codes[all[i] >> 7 & 255].size());
    if (next / 256 != bit / 256 && (next / kBlockBits != bit / kBlockBits || next < 512)) {
      for (int64_t size : {-1, 0, 1, 2, 3}) sizes.push_back(static_cast<int64_t>(i) + size);
    }
    bit = next;
  }
  for (int64_t size : sizes) {
    round_trip("normal, " + std::to_string(size), Weights(all.begin(), all.begin() + size), book);
  }
  for (int64_t size : {1, 2, 60000}) {
    const Weights constant = draw(size, [] { return 120; });
    round_trip("constant, " + std::to_string(size), constant, huffman_of(constant));
  }
}

void test_codes() {
  const Coded long_codes = drawn_alike(8000, chain());
  round_trip("1 to 32 bits", long_codes.weights, long_codes.book);
  // Bytes only: codes often end with a block.
  Lengths bytes = {8, 16, 24, 32, 32};
  for (int64_t size : {1, 2, 3271, 3272, 3273, 3274, 3275, 3276, 3277, 3278, 3279}) {
    const Coded coded = drawn_alike(size, bytes);
    round_trip("bytes, " + std::to_string(size), coded.weights, coded.book);
  }
  // 16 codes of one bit, then 16 of 32, and so on: some rounds are too large.
  const auto exponents = random_exponents(32);
  int64_t at = 0;
  const Weights uneven = draw(60000, [&] {
    const bool dense = at++ / 8192 % 2 == 0;
    return dense ? exponents[0] : exponents[random_below(32)];
  });
  round_trip("uneven", uneven, of_lengths(chain(), exponents));
  for (int i = 0; i < 20; ++i) {
    const Coded coded = drawn_alike(1 + random_below(4000), random_lengths());
    if (make_luts(coded.book).empty()) continue;
    round_trip("random code " + std::to_string(i), coded.weights, coded.book);
  }
}

// The last code reaches into the last block, and ends there with a byte: no code starts there, and
// output_positions is one shorter.
void test_straddling_end() {
  int found = 0;
  for (int i = 0; i < 2000 && found < 6; ++i) {
    Coded coded = drawn_alike(1800 + random_below(200), {8, 16, 24, 32, 32});
    int64_t bits = 0;
    size_t size = 0;
    while (size < coded.weights.size() && bits <= kBlockBits) {
      bits += static_cast<int64_t>(coded.book.codes[coded.weights[size++] >> 7 & 255].size());
    }
    if (bits <= kBlockBits) continue;
    coded.weights.resize(size);
    const UnitArrays arrays = encode(coded.weights, coded.book);
    if (static_cast<int64_t>(arrays.output_positions.size()) != arrays.blocks()) continue;
    ++found;
    round_trip("straddling end", coded.weights, coded.book);
  }
  expect(found == 6, "no unit has its last code straddle a block");
}

void test_alignment() {
  const Buffer<uint8_t> bytes(Bytes(4096));
  const Buffer<uint16_t> out(Weights(100));
  published::Unit aligned;
  aligned.sign_mantissa = aligned.encoded_exponent = bytes.get();
  aligned.out = out.get();
  for (int i = 0; i < 3; ++i) {
    published::Unit unit = aligned;
    if (i == 0) ++unit.sign_mantissa;
    if (i == 1) ++unit.encoded_exponent;
    if (i == 2) ++unit.out;
    expect(published::launch_decode(nullptr, unit) == cudaErrorMisalignedAddress,
           "unaligned array " + std::to_string(i) + " is refused");
  }
}

template <typename T>
void damage_array(std::vector<T>& array) {
  if (array.empty()) return;
  T& entry = array[random_below(array.size())];
  switch (random_below(3)) {
    case 0:
      entry = static_cast<T>(rng());
      break;
    case 1:
      entry = static_cast<T>(random_below(3) - 1);  // -1, 0, 1
      break;
    default:
      entry ^= static_cast<T>(T{1} << random_below(8 * sizeof(T)));
  }
}

// Damages a unit somewhere; its arrays' sizes fit each other before and after.
void damage(UnitArrays& arrays) {
  switch (random_below(10)) {
    case 0:
      return damage_array(arrays.encoded_exponent);
    case 1:
      return damage_array(arrays.gaps);
    case 2:
      return damage_array(arrays.output_positions);
    case 3:
      return damage_array(arrays.luts);
    case 4: {  // a position that is nearly right
      uint32_t& position = arrays.output_positions[random_below(arrays.output_positions.size())];
      position += static_cast<uint32_t>(random_below(5) - 2);
      return;
    }
    case 5: {  // the end of the stream is missing
      const int64_t bytes = arrays.bits() / 8;
      const int64_t in_last_block = bytes - (arrays.blocks() - 1) * kBlockBits / 8;
      arrays.encoded_exponent.resize(bytes - random_below(in_last_block));
      return;
    }
    case 6: {  // the end of the weights is missing
      arrays.sign_mantissa.resize(1 + random_below(arrays.size()));
      if (random_below(2)) arrays.output_positions.back() = static_cast<uint32_t>(arrays.size());
      return;
    }
    case 7: {  // a length
      const size_t row = arrays.luts.size() - 256;
      arrays.luts[row + random_below(256)] = static_cast<uint8_t>(random_below(40));
      return;
    }
    case 8:  // where a block's first code starts
      arrays.gaps[320 * random_below(arrays.blocks())] ^= static_cast<uint8_t>(rng());
      return;
    default:  // a piece of the tables
      for (uint64_t i = 0; i < random_below(300); ++i) {
        arrays.luts[random_below(arrays.luts.size())] = static_cast<uint8_t>(rng());
      }
  }
}

void test_damage(int rounds) {
  std::vector<UnitArrays> sound;
  const Weights normal = normal_weights(40000);
  sound.push_back(encode(normal, huffman_of(normal)));
  const Coded long_codes = drawn_alike(3000, chain());
  sound.push_back(encode(long_codes.weights, long_codes.book));
  const Weights constant = draw(70000, [] { return 7; });
  sound.push_back(encode(constant, huffman_of(constant)));
  for (int round = 0; round < rounds; ++round) {
    UnitArrays arrays = sound[round % sound.size()];
    for (uint64_t i = 0; i <= random_below(3); ++i) damage(arrays);
    check("damage, round " + std::to_string(round), arrays);
  }
}

}  // namespace
}  // namespace df11::published_test

int main(int argc, char** argv) {
  int device;
  if (cudaGetDevice(&device) != cudaSuccess) {
    std::printf("no GPU\n");
    return 2;
  }
  const int rounds = argc > 1 ? std::atoi(argv[1]) : df11::kDraws;
  using namespace df11::published_test;
  df11::section("sizes", "blocks", test_sizes);
  df11::section("codes", "blocks", test_codes);
  df11::section("straddling", "blocks", test_straddling_end);
  df11::section("alignment", "blocks", test_alignment);
  df11::section("damage", "blocks", [&] { test_damage(rounds); });
  std::printf("%d failures\n", df11::failures);
  return df11::failures != 0;
}
