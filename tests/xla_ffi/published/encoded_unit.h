// Published units for C++ tests: a code and its tables, made as the layout's description says but
// for the order of equal counts, and what the encoder makes with them.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <string>
#include <vector>

#include "published/encode.h"
#include "published/layout.h"

namespace df11::published {

struct TestCode {
  std::array<Code, 256> codes{};
  Code end_symbol;
  std::vector<uint8_t> luts;
};

struct TestUnit {
  TestCode code;
  std::vector<uint8_t> sign_mantissa, encoded_exponent, gaps;
  std::vector<uint32_t> output_positions;

  Unit view() const {
    Unit unit;
    unit.sign_mantissa = sign_mantissa.data();
    unit.encoded_exponent = encoded_exponent.data();
    unit.luts = code.luts.data();
    unit.output_positions = output_positions.data();
    unit.gaps = gaps.data();
    unit.size = static_cast<int64_t>(sign_mantissa.size());
    unit.encoded_bytes = static_cast<int64_t>(encoded_exponent.size());
    unit.blocks = count_blocks(unit.encoded_bytes);
    unit.positions = static_cast<int64_t>(output_positions.size());
    unit.rows = static_cast<int>(code.luts.size() / kRowEntries) - 1;
    return unit;
  }
};

// Codes as strings of '0' and '1', by exponent; the end symbol's is the last.
using CodeStrings = std::array<std::string, 257>;

inline CodeStrings make_code_strings(const std::vector<uint64_t>& counts) {
  struct Node {
    double count;
    std::vector<int> symbols;
  };
  std::vector<Node> nodes;
  nodes.push_back({1, {256}});
  for (int e = 0; e < kFirstPointer; ++e) {
    if (counts[e]) nodes.push_back({static_cast<double>(counts[e]), {e}});
  }
  CodeStrings strings;
  const auto more = [](const Node& a, const Node& b) { return a.count > b.count; };
  while (nodes.size() > 1) {
    std::stable_sort(nodes.begin(), nodes.end(), more);
    Node a = nodes.back();
    nodes.pop_back();
    Node& b = nodes.back();
    for (int symbol : a.symbols) strings[symbol].insert(0, "0");
    for (int symbol : b.symbols) strings[symbol].insert(0, "1");
    b.count += a.count;
    b.symbols.insert(b.symbols.begin(), a.symbols.begin(), a.symbols.end());
  }
  return strings;
}

// Bits of a code before its last byte, whole or not.
inline size_t whole_bytes(const std::string& string) { return (string.size() - 1) / 8 * 8; }

inline TestCode make_code(std::vector<uint64_t> counts) {
  const CodeStrings strings = make_code_strings(counts);
  TestCode code;
  std::vector<std::string> prefixes = {""};
  for (int symbol = 0; symbol <= 256; ++symbol) {
    const std::string& string = strings[symbol];
    if (string.empty()) continue;
    Code& to = symbol < 256 ? code.codes[symbol] : code.end_symbol;
    to = {static_cast<uint32_t>(std::stoull(string.substr(0, 63), nullptr, 2)),
          static_cast<uint32_t>(string.size())};
    const std::string prefix = string.substr(0, whole_bytes(string));
    const bool known = std::find(prefixes.begin(), prefixes.end(), prefix) != prefixes.end();
    if (symbol < 256 && !known) prefixes.push_back(prefix);
  }
  std::stable_sort(prefixes.begin(), prefixes.end(),
                   [](const std::string& a, const std::string& b) { return a.size() < b.size(); });
  const auto longest = std::max_element(
      strings.begin(), strings.end(),
      [](const std::string& a, const std::string& b) { return a.size() < b.size(); });
  if (longest->size() > kMaxCodeBits || prefixes.size() > kMaxRows) {
    // Something flatter.
    for (uint64_t& count : counts) count = static_cast<uint64_t>(std::sqrt(count));
    return make_code(counts);
  }
  std::vector<int> entries(prefixes.size() * kRowEntries, -1);
  for (int symbol = 0; symbol < 256; ++symbol) {
    const std::string& string = strings[symbol];
    for (size_t at = 0; at < string.size(); at += 8) {
      const auto find = [&](const std::string& prefix) {
        return std::find(prefixes.begin(), prefixes.end(), prefix) - prefixes.begin();
      };
      std::string byte = string.substr(at, 8);
      byte.resize(8, '0');
      const bool last = at == whole_bytes(string);
      entries[find(string.substr(0, at)) * kRowEntries + std::stoi(byte, nullptr, 2)] =
          last ? symbol : static_cast<int>(kRowEntries - find(string.substr(0, at + 8)));
    }
  }
  int value = *std::find_if(entries.begin(), entries.end(), [](int entry) { return entry >= 0; });
  for (int entry : entries) {
    value = entry >= 0 ? entry : value;
    code.luts.push_back(static_cast<uint8_t>(value));
  }
  for (const Code& one : code.codes) code.luts.push_back(static_cast<uint8_t>(one.length));
  return code;
}

inline TestUnit make_unit(const std::vector<Part>& parts, int threads) {
  TestUnit unit;
  const std::vector<Piece> pieces = cut_to_pieces(parts);
  std::vector<Counts> counts(pieces.size());
  count_exponents(pieces, threads, counts.data());
  std::vector<uint64_t> total(256);
  for (const Counts& piece : counts) {
    for (int e = 0; e < 256; ++e) total[e] += piece[e];
  }
  unit.code = make_code(total);
  EncodedUnit encoded =
      UnitEncoder(pieces, counts.data(), unit.code.codes, unit.code.end_symbol).encode(threads);
  const auto bytes = [](Words& words, int64_t count) {
    const auto* data = reinterpret_cast<const uint8_t*>(words.data());
    return std::vector<uint8_t>(data, data + count);
  };
  unit.sign_mantissa = bytes(encoded.sign_mantissa, encoded.size);
  unit.encoded_exponent = bytes(encoded.encoded_exponent, encoded.encoded_bytes);
  unit.gaps = bytes(encoded.gaps, encoded.blocks() * kBlockGapBytes);
  const uint32_t* positions = encoded.output_positions.data();
  unit.output_positions.assign(positions, positions + encoded.output_positions.size());
  return unit;
}

}  // namespace df11::published
