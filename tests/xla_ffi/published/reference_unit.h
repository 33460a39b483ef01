// A small encoder and a bit-by-bit decoder of published units, for tests: written from the
// layout's description alone, and slow.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <numeric>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace df11::published_test {

using Bytes = std::vector<uint8_t>;

constexpr int64_t kBlockBits = 32768;
constexpr int kWindowBits = 64, kBlockWindows = 512;

// Codes as strings of 0 and 1; an empty one where there is none.
struct Codebook {
  std::array<std::string, 256> codes;
  std::string end;
};

// Huffman's code for these counts; the end symbol counts 1.
inline Codebook huffman(const std::array<int64_t, 256>& counts) {
  constexpr int kEnd = 256;
  Codebook book;
  const auto code = [&](int s) -> std::string& { return s == kEnd ? book.end : book.codes[s]; };
  std::multimap<int64_t, std::vector<int>> nodes = {{1, {kEnd}}};
  for (int e = 0; e < 256; ++e) {
    if (counts[e]) nodes.insert({counts[e], {e}});
  }
  while (nodes.size() > 1) {
    const auto a = nodes.extract(nodes.begin()), b = nodes.extract(nodes.begin());
    for (int s : a.mapped()) code(s).insert(0, "0");
    for (int s : b.mapped()) code(s).insert(0, "1");
    std::vector<int> both = a.mapped();
    both.insert(both.end(), b.mapped().begin(), b.mapped().end());
    nodes.insert({a.key() + b.key(), both});
  }
  return book;
}

// A code of these lengths for the exponents; the end symbol's is the last.
inline Codebook of_lengths(const std::vector<int>& lengths, const std::vector<uint8_t>& exponents) {
  std::vector<size_t> order(lengths.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return lengths[a] < lengths[b]; });
  Codebook book;
  uint64_t next = 0;  // in 2^-40
  for (size_t i : order) {
    std::string code;
    for (int bit = 0; bit < lengths[i]; ++bit) code += next >> (39 - bit) & 1 ? '1' : '0';
    next += uint64_t{1} << (40 - lengths[i]);
    (i + 1 == lengths.size() ? book.end : book.codes[exponents[i]]) = code;
  }
  return book;
}

inline size_t last_level(const std::string& code) { return (code.size() - 1) / 8; }

// Empty if the code needs more than 17 rows.
inline Bytes make_luts(const Codebook& book) {
  std::vector<std::string> prefixes = {""};
  for (const std::string& code : book.codes) {
    for (size_t level = 1; !code.empty() && level <= last_level(code); ++level) {
      const std::string prefix = code.substr(0, 8 * level);
      if (std::find(prefixes.begin(), prefixes.end(), prefix) == prefixes.end()) {
        prefixes.push_back(prefix);
      }
    }
  }
  std::stable_sort(prefixes.begin(), prefixes.end(),
                   [](const auto& a, const auto& b) { return a.size() < b.size(); });
  if (prefixes.size() > 17) return {};
  const auto byte = [](const std::string& bits) { return std::stoi(bits, nullptr, 2); };
  Bytes luts;
  int carried = 0;
  for (const std::string& prefix : prefixes) {
    std::array<int, 256> row;
    row.fill(-1);
    for (int e = 0; e < 256; ++e) {
      const std::string& code = book.codes[e];
      if (code.size() <= prefix.size() || code.compare(0, prefix.size(), prefix) != 0) continue;
      std::string rest = code.substr(prefix.size());
      if (rest.size() > 8) {
        const auto target =
            std::find(prefixes.begin(), prefixes.end(), code.substr(0, prefix.size() + 8));
        row[byte(rest.substr(0, 8))] = 256 - static_cast<int>(target - prefixes.begin());
        continue;
      }
      const int first = byte((rest + "0000000").substr(0, 8)), count = 256 >> rest.size();
      std::fill(row.begin() + first, row.begin() + first + count, e);
    }
    for (int entry : row) {
      if (entry >= 0) carried = entry;
      luts.push_back(static_cast<uint8_t>(carried));
    }
  }
  for (const std::string& code : book.codes) luts.push_back(static_cast<uint8_t>(code.size()));
  return luts;
}

struct UnitArrays {
  Bytes sign_mantissa, encoded_exponent, luts, gaps;
  std::vector<uint32_t> output_positions;

  int64_t size() const { return static_cast<int64_t>(sign_mantissa.size()); }
  int64_t bits() const { return 8 * static_cast<int64_t>(encoded_exponent.size()); }
  int64_t blocks() const { return (bits() + kBlockBits - 1) / kBlockBits; }
  int rows() const { return static_cast<int>(luts.size() / 256) - 1; }
  int64_t position(int64_t block) const {
    return output_positions[std::min<size_t>(block, output_positions.size() - 1)];
  }
  int bit(int64_t i) const { return i < bits() ? encoded_exponent[i / 8] >> (7 - i % 8) & 1 : 0; }
  int gap(int64_t window) const {
    int gap = 0;
    for (int64_t i = 5 * window; i < 5 * window + 5; ++i) {
      gap = 2 * gap + (gaps[i / 8] >> (7 - i % 8) & 1);
    }
    return gap;
  }
};

inline UnitArrays encode(const std::vector<uint16_t>& weights, const Codebook& book) {
  UnitArrays unit;
  unit.luts = make_luts(book);
  std::string stream;
  std::map<int64_t, int64_t> gap_of_window, first_of_block;
  const auto record = [&](int64_t element) {
    const int64_t bit = static_cast<int64_t>(stream.size());
    gap_of_window.insert({bit / kWindowBits, bit % kWindowBits});
    first_of_block.insert({bit / kBlockBits, element});
  };
  for (size_t i = 0; i < weights.size(); ++i) {
    record(static_cast<int64_t>(i));
    stream += book.codes[weights[i] >> 7 & 255];
    unit.sign_mantissa.push_back(
        static_cast<uint8_t>((weights[i] >> 8 & 0x80) | (weights[i] & 0x7f)));
  }
  if (stream.size() % 8 != 0) {
    record(static_cast<int64_t>(weights.size()));
    stream += (book.end + "0000000").substr(0, 8 - stream.size() % 8);
  }
  for (size_t i = 0; i < stream.size(); i += 8) {
    unit.encoded_exponent.push_back(
        static_cast<uint8_t>(std::stoi(stream.substr(i, 8), nullptr, 2)));
  }
  std::string gaps;
  for (int64_t window = 0; window < unit.blocks() * kBlockWindows; ++window) {
    const auto found = gap_of_window.find(window);
    const int64_t gap = found == gap_of_window.end() ? 0 : found->second;
    for (int bit = 4; bit >= 0; --bit) gaps += gap >> bit & 1 ? '1' : '0';
  }
  for (size_t i = 0; i < gaps.size(); i += 8) {
    unit.gaps.push_back(static_cast<uint8_t>(std::stoi(gaps.substr(i, 8), nullptr, 2)));
  }
  for (const auto& block : first_of_block) {
    unit.output_positions.push_back(static_cast<uint32_t>(block.second));
  }
  unit.output_positions.push_back(static_cast<uint32_t>(weights.size()));
  return unit;
}

// What one block may decode to.
struct BlockModel {
  int64_t first, end;             // elements, by output_positions
  std::vector<uint16_t> weights;  // fewer than these if there are not enough codes
  bool sound = true;              // the codes agree with gaps and output_positions
  bool must_be_poison = false;    // not sound, in what the kernel must see
};

inline BlockModel decode_block(const UnitArrays& unit, int64_t block) {
  BlockModel model = {unit.position(block), unit.position(block + 1), {}};
  const int64_t elements = model.end - model.first;
  if (elements <= 0) return model;
  const int64_t begin = block * kBlockBits, end = std::min(begin + kBlockBits, unit.bits());
  const uint8_t* lengths = unit.luts.data() + 256 * unit.rows();
  std::vector<int64_t> starts;
  int64_t at = begin + unit.gap(block * kBlockWindows);
  while (at >= 0 && at < end) {
    int row = 0, length = 0, exponent = 0;
    for (int level = 0; level < 4; ++level) {
      int byte = 0;
      for (int i = 0; i < 8; ++i) byte = 2 * byte + unit.bit(at + 8 * level + i);
      const int entry = unit.luts[256 * row + byte];
      if (entry < 240) {
        exponent = entry;
        length = lengths[entry];
        if (length <= 8 * level || length > 8 * level + 8) length = 0;
        break;
      }
      row = 256 - entry;
      if (row >= unit.rows()) break;
    }
    if (length > 0) {
      const int64_t element = model.first + static_cast<int64_t>(starts.size());
      if (element < model.end && element < unit.size()) {
        const int byte = unit.sign_mantissa[element];
        model.weights.push_back(
            static_cast<uint16_t>((byte & 0x80) << 8 | exponent << 7 | (byte & 0x7f)));
      }
      starts.push_back(at);
    }
    at = length > 0 ? at + length : -1;
  }
  const int64_t found = static_cast<int64_t>(starts.size());
  const auto fail = [&](bool must_be_poison) {
    model.sound = false;
    model.must_be_poison |= must_be_poison;
  };
  if (block == 0 && unit.gap(0) != 0) fail(true);
  if (found < elements) fail(true);
  if (model.end != unit.size() && block + 1 < unit.blocks()) {
    if (found > elements) fail(true);
    const int64_t next_block = begin + kBlockBits;
    if (at < 0 || at != next_block + unit.gap((block + 1) * kBlockWindows)) fail(true);
  }
  for (int window = 0; window < kBlockWindows; ++window) {
    const int64_t window_begin = begin + window * kWindowBits;
    const auto start = std::lower_bound(starts.begin(), starts.end(), window_begin);
    if (start == starts.end() || start - starts.begin() >= elements) break;
    // The kernel looks at the first window of a lane's only: four, or two.
    if (*start != window_begin + unit.gap(block * kBlockWindows + window)) fail(window % 4 == 0);
  }
  return model;
}

}  // namespace df11::published_test
