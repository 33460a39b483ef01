// Checks of a published unit that need no decoding. Each gives a problem, or nothing if all is
// well.
//
// What no check can find, here or while decoding: the layout has no checksum. Other signs and
// mantissas are as good as the right ones; so are other exponents whose codes start where the
// right ones would, and tables with two exponents of the same code length exchanged.
#pragma once

#include <string>

#include "published/layout.h"

namespace df11::published {

inline std::string entries_problem(const char* field, int64_t found, const std::string& expected) {
  return std::string(field) + " has " + std::to_string(found) + " entries, expected " + expected;
}

// Fills in a unit's sizes from those of its arrays.
inline std::string set_sizes(Unit& unit, int64_t sign_mantissa_bytes, int64_t encoded_bytes,
                             int64_t luts_rows, int64_t luts_columns, int64_t positions,
                             int64_t gap_bytes) {
  unit.size = sign_mantissa_bytes;
  unit.encoded_bytes = encoded_bytes;
  unit.blocks = count_blocks(encoded_bytes);
  unit.positions = positions;
  unit.rows = static_cast<int>(luts_rows - 1);
  if (unit.size < 1 || unit.size > int64_t{UINT32_MAX}) {
    return entries_problem("sign_mantissa", unit.size, "1 to 2^32 - 1");
  }
  if (encoded_bytes < 1) {
    return entries_problem("encoded_exponent", encoded_bytes, "at least 1");
  }
  if (luts_rows < 2 || luts_rows > kMaxRows + 1 || luts_columns != kRowEntries) {
    return "luts has shape [" + std::to_string(luts_rows) + "," + std::to_string(luts_columns) +
           "], expected [2 to " + std::to_string(kMaxRows + 1) + ",256]";
  }
  const std::string for_stream =
      " for " + std::to_string(encoded_bytes) + " bytes of encoded_exponent";
  // Where no code starts in the last block, there is one less, and a block before.
  if (positions != unit.blocks + 1 && (positions != unit.blocks || positions < 2)) {
    return entries_problem("output_positions", positions,
                           std::to_string(unit.blocks + 1) + for_stream);
  }
  if (gap_bytes != unit.blocks * kBlockGapBytes) {
    return entries_problem("gaps", gap_bytes,
                           std::to_string(unit.blocks * kBlockGapBytes) + for_stream);
  }
  return "";
}

// Whether a code of this length ends in a row of this level.
DF11_HD bool ends_in_level(int length, int level) {
  return length > 8 * level && length <= 8 * (level + 1);
}

// Whether entry i of a row belongs to the complete run that a code of this length, which ends in
// the row's level, takes there.
inline bool in_complete_run(const uint8_t* row, int i, int length, int level) {
  const int run = 1 << (8 * (level + 1) - length), first = i & -run;
  for (int k = first; k < first + run; ++k) {
    if (row[k] != row[i]) return false;
  }
  return true;
}

// Every exponent with a length must have its code, every row must be pointed to from a row before
// it, and all this but once. What is left must be the place of the end symbol's code, which is in
// one row and repeats the entry before.
inline std::string check_tables(const Unit& unit) {
  const uint8_t* lengths = unit.luts + unit.rows * kRowEntries;
  for (int exponent = 0; exponent < kRowEntries; ++exponent) {
    const bool codable = exponent < kFirstPointer;
    if (lengths[exponent] <= (codable ? kMaxCodeBits : 0)) continue;
    return "luts gives exponent " + std::to_string(exponent) + " a code of " +
           std::to_string(lengths[exponent]) + " bits, expected " +
           (codable ? "at most 32" : "none, as exponents of 240 and more cannot be coded");
  }
  int level[kMaxRows];
  for (int& unknown : level) unknown = -1;
  level[0] = 0;
  bool seen[kFirstPointer] = {};
  int end_symbol = -1;  // the last entry that was found to be its
  for (int row = 0; row < unit.rows; ++row) {
    const uint8_t* entries = unit.luts + row * kRowEntries;
    if (level[row] < 0) return "luts has row " + std::to_string(row) + ", which nothing points to";
    for (int i = 0; i < kRowEntries;) {
      const int entry = entries[i], at = row * kRowEntries + i;
      if (entry < kFirstPointer && !seen[entry] && ends_in_level(lengths[entry], level[row]) &&
          in_complete_run(entries, i, lengths[entry], level[row])) {
        seen[entry] = true;
        const int run = 1 << (8 * (level[row] + 1) - lengths[entry]);
        i = (i & -run) + run;
        continue;
      }
      const int target = pointed_row(entry);
      if (entry >= kFirstPointer && target > row && target < unit.rows && level[target] < 0 &&
          level[row] + 1 < kLevels) {
        level[target] = level[row] + 1;
        ++i;
        continue;
      }
      const bool repeats = at == 0 || entry == unit.luts[at - 1];
      const bool same_place = end_symbol < 0 || (end_symbol == at - 1 && i > 0);
      if (!repeats || !same_place) {
        const std::string where =
            "luts has in row " + std::to_string(row) + ", entry " + std::to_string(i) + ", ";
        if (entry >= kFirstPointer) {
          return where + "a pointer to row " + std::to_string(target) +
                 ", expected one to a later row of the " + std::to_string(unit.rows) +
                 " that nothing else points to";
        }
        return where + "exponent " + std::to_string(entry) +
               ", which does not fit its code length of " + std::to_string(lengths[entry]);
      }
      end_symbol = at;
      ++i;
    }
  }
  for (int exponent = 0; exponent < kFirstPointer; ++exponent) {
    if (lengths[exponent] && !seen[exponent]) {
      return "luts gives exponent " + std::to_string(exponent) + " a code of " +
             std::to_string(lengths[exponent]) + " bits, but has no such code";
    }
  }
  return "";
}

// Of one block, so that a part of a unit can be decoded without looking at all positions.
inline std::string check_position(const Unit& unit, int64_t block) {
  const int64_t first = unit.first_element(block), end = unit.first_element(block + 1);
  if (first <= end && end <= unit.size && end - first <= kMaxBlockElements) return "";
  return "output_positions has block " + std::to_string(block) + " hold elements " +
         std::to_string(first) + " to " + std::to_string(end) + " of " + std::to_string(unit.size) +
         ", expected 0 to 32768 of them, in order";
}

// Where the first element and its code must be, and the number of elements.
inline std::string check_ends(const Unit& unit) {
  if (read_gap(unit.gaps, 0) != 0) return "gaps has the first code not start at bit 0";
  if (unit.output_positions[0] != 0) {
    return "output_positions begins with " + std::to_string(unit.output_positions[0]) +
           ", expected 0";
  }
  const int64_t last = unit.output_positions[unit.positions - 1];
  if (last == unit.size) return "";
  return "output_positions ends with " + std::to_string(last) + ", expected " +
         std::to_string(unit.size) + " like the bytes of sign_mantissa";
}

// Where there is no stream. All other gaps must be decoded to be checked.
inline std::string check_gaps_after_end(const Unit& unit) {
  const uint8_t* last = unit.gaps + (unit.blocks - 1) * kBlockGapBytes;
  const int64_t bits = 8 * unit.encoded_bytes - (unit.blocks - 1) * kBlockBits;
  for (int window = static_cast<int>((bits - 1) / kWindowBits); window < kBlockWindows; ++window) {
    const uint32_t gap = read_gap(last, window);
    if (gap != 0 && window * kWindowBits + gap >= bits) {
      return "gaps has a code start after the end of encoded_exponent, in window " +
             std::to_string(window) + " of the last block";
    }
  }
  return "";
}

// All of them.
inline std::string check_structure(const Unit& unit) {
  std::string problem = check_tables(unit);
  if (problem.empty()) problem = check_ends(unit);
  for (int64_t block = 0; problem.empty() && block < unit.blocks; ++block) {
    problem = check_position(unit, block);
  }
  if (problem.empty()) problem = check_gaps_after_end(unit);
  return problem;
}

}  // namespace df11::published
