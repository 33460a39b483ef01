// Looking codes up: as the layout says, eight bits at a time, and several codes at once.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "published/check.h"
#include "published/layout.h"

namespace df11::published {

struct Symbol {
  uint32_t exponent;
  int length;  // of its code; 0 if these are no code
};

// What the highest of these bits stand for. Safe for any tables.
inline Symbol look_up(const Unit& unit, uint32_t bits) {
  const uint8_t* lengths = unit.luts + unit.rows * kRowEntries;
  int row = 0;
  for (int level = 0; level < kLevels; ++level, bits <<= 8) {
    const uint32_t entry = unit.luts[row * kRowEntries + (bits >> 24)];
    if (entry < kFirstPointer) {
      if (!ends_in_level(lengths[entry], level)) break;
      return {entry, lengths[entry]};
    }
    row = pointed_row(entry);
    if (row >= unit.rows) break;
  }
  return {0, 0};
}

// For all that 11 bits can begin with, as many codes as they hold, but at most 4.
class CodeTable {
 public:
  static constexpr int kBits = 11;
  static constexpr int kMaxCodes = 4;

  // An entry: the length of its codes in bits 0..5, their number in bits 6..8, in bits 16.. a bit
  // for the place at which each ends, in bits 32.. the exponents. Its length is 0 where the first
  // code is longer than kBits, or is none.
  static constexpr uint64_t kLength = 0x3f;
  static constexpr uint64_t kLengthAndCount = 0x1ff;

  explicit CodeTable(const Unit& unit) : entries_(1 << kBits) {
    std::array<Symbol, 1 << kBits> first;
    for (uint32_t bits = 0; bits < first.size(); ++bits) first[bits] = first_code(unit, bits);
    for (uint32_t bits = 0; bits < first.size(); ++bits) {
      uint64_t length = 0, count = 0, ends = 0, exponents = 0;
      while (count < kMaxCodes) {
        const Symbol& next = first[bits << length & (first.size() - 1)];
        if (next.length == 0 || length + next.length > kBits) break;
        length += next.length;
        ends |= uint64_t{1} << length;
        exponents |= uint64_t{next.exponent} << 8 * count;
        ++count;
      }
      entries_[bits] = length | count << 6 | ends << 16 | exponents << 32;
    }
  }

  const uint64_t* entries() const { return entries_.data(); }

 private:
  // The first code in kBits bits, if it is one whatever follows. The place of the end symbol
  // repeats another entry, which tells nothing about the bits beside it.
  static Symbol first_code(const Unit& unit, uint32_t bits) {
    const int row_bits = static_cast<int>(bits >> (kBits - 8));
    const Symbol symbol = look_up(unit, bits << (32 - kBits));
    if (symbol.length == 0 || symbol.length > kBits) return {0, 0};
    const bool in_first_row = symbol.length <= 8;
    const uint8_t* row =
        unit.luts + (in_first_row ? 0 : pointed_row(unit.luts[row_bits]) * kRowEntries);
    const int entry = in_first_row ? row_bits : static_cast<int>(bits << (16 - kBits) & 255);
    const bool complete = in_complete_run(row, entry, symbol.length, in_first_row ? 0 : 1);
    return complete ? symbol : Symbol{0, 0};
  }

  std::vector<uint64_t> entries_;
};

}  // namespace df11::published
