// The CPU decoder of the published layout: blocks of 4096 bytes, two at a time. It holds where
// codes start against gaps and output_positions, so that all decoders, also those that rely on them
// for every window, find the same weights or corruption. A block is taken to start where gaps says:
// that this is where the block before ends is checked with that one.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/inline.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "common/words.h"
#include "published/check.h"
#include "published/layout.h"
#include "published/tables.h"

namespace df11::published {

// Blocks that a thread takes at a time: tens of microseconds.
inline constexpr int64_t kItemBlocks = 8;

// Bytes after a block that following its codes may read.
inline constexpr int64_t kOverreadBytes = 8;

// What a block's stream holds, and where in it codes start: bit i % 64 of starts[i / 64] for bit i
// of the stream. Of the window after the block, only the first start counts.
struct BlockCodes {
  uint64_t starts[kBlockWindows + 2];
  // Room for what is decoded past the end, and for stores of kMaxCodes.
  uint8_t exponents[kMaxBlockElements + 2 * kWindowBits];
};

// Where following a block's codes is at.
struct Cursor {
  const uint8_t* stream;
  uint32_t end_bit;  // codes that start from here on do not matter
  uint32_t byte;     // the place in the stream, and the bit in the byte
  uint32_t bit;
  uint64_t starts;       // of codes, from `byte` on
  uint8_t* start_bytes;  // BlockCodes::starts
  uint8_t* exponents;

  Cursor(const uint8_t* stream, uint32_t first_bit, uint32_t end_bit, BlockCodes& codes)
      : stream(stream),
        end_bit(end_bit),
        byte(first_bit >> 3),
        bit(first_bit & 7),
        starts(uint64_t{1} << bit),
        start_bytes(reinterpret_cast<uint8_t*>(codes.starts)),
        exponents(codes.exponents) {
    std::memset(start_bytes, 0, byte);
  }

  DF11_INLINE bool done() const { return byte * 8 + bit >= end_bit; }

  DF11_INLINE uint64_t window() const {
    uint64_t bits;
    std::memcpy(&bits, stream + byte, 8);
    return __builtin_bswap64(bits) << bit;
  }

  // Goes on to `place`, at most 63 bits after the beginning of `byte`: `starts` has all in between.
  DF11_INLINE void advance(uint32_t place) {
    std::memcpy(start_bytes + byte, &starts, 8);
    starts >>= place & ~7u;
    byte += place >> 3;
    bit = place & 7;
  }

  // Follows a code that is too long for the table; false if there is none.
  DF11_INLINE bool follow_long_code(const Unit& unit) {
    const Symbol symbol = look_up(unit, static_cast<uint32_t>(window() >> 32));
    if (symbol.length == 0) return false;
    *exponents++ = static_cast<uint8_t>(symbol.exponent);
    starts |= uint64_t{1} << (bit + symbol.length);
    advance(bit + symbol.length);
    return true;
  }

  // To be called at the end: there are no starts after those seen.
  void finish() const {
    std::memcpy(start_bytes + byte, &starts, 8);
    std::memset(start_bytes + byte + 8, 0, sizeof(BlockCodes::starts) - byte - 8);
  }
};

// Follows the codes of some blocks until one of them is done, or comes to what is no code.
template <int kCursors>
DF11_INLINE void follow_codes(const Unit& unit, const uint64_t* table, Cursor* cursors) {
  // 64 bits less at most 7 serve five look-ups of at most 11.
  constexpr int kLookups = 5;
  static_assert(kLookups * CodeTable::kBits + 7 < 64);
  const auto none_done = [&] {
    for (int c = 0; c < kCursors; ++c) {
      if (cursors[c].done()) return false;
    }
    return true;
  };
  for (bool more = true; more && none_done();) {
    uint64_t window[kCursors], state[kCursors], entry[kCursors];
    for (int c = 0; c < kCursors; ++c) {
      window[c] = cursors[c].window();
      state[c] = cursors[c].bit;  // the place in bits 0..5, the number of codes above
    }
#pragma GCC unroll 5
    for (int i = 0; i < kLookups; ++i) {
#pragma GCC unroll 2
      for (int c = 0; c < kCursors; ++c) {
        entry[c] = table[window[c] >> (64 - CodeTable::kBits)];
        const uint32_t exponents = static_cast<uint32_t>(entry[c] >> 32);
        std::memcpy(cursors[c].exponents + (state[c] >> 6), &exponents, 4);
        cursors[c].starts |= uint64_t{static_cast<uint16_t>(entry[c] >> 16)} << (state[c] & 63);
        window[c] <<= entry[c] & CodeTable::kLength;
        state[c] += entry[c] & CodeTable::kLengthAndCount;
      }
    }
    for (int c = 0; c < kCursors; ++c) {
      cursors[c].exponents += state[c] >> 6;
      cursors[c].advance(state[c] & 63);
      // The table does not get past a code that it does not have.
      if ((entry[c] & CodeTable::kLength) == 0 && !cursors[c].done()) {
        more &= cursors[c].follow_long_code(unit);
      }
    }
  }
}

// Follows the codes of one or two blocks to their ends, or to what is no code.
template <Simd>
DF11_INLINE void follow_blocks(const Unit& unit, const uint64_t* table, Cursor* cursors,
                               int count) {
  // Copies that nothing points to can live in registers.
  if (count == 2) {
    Cursor both[2] = {cursors[0], cursors[1]};
    follow_codes<2>(unit, table, both);
    cursors[0] = both[0];
    cursors[1] = both[1];
  }
  for (int c = 0; c < count; ++c) {
    Cursor one[1] = {cursors[c]};
    follow_codes<1>(unit, table, one);
    one[0].finish();
  }
}

// Whether `count` codes start in a block, and the first of each window where gaps says.
template <Simd>
DF11_INLINE bool starts_agree(const uint64_t* starts, const uint8_t* gaps, int64_t count) {
  int64_t seen = 0;
  uint64_t wrong = 0;
  for (int i = 0; i < kBlockWindows; i += 8) {
    uint64_t eight = 0;
    for (int k = 0; k < kGapBits; ++k) eight = eight << 8 | gaps[kGapBits * i / 8 + k];
    for (int k = 0; k < 8; ++k) {
      const uint64_t gap = eight >> (kGapBits * (7 - k)) & 31;
      const uint64_t lowest = starts[i + k] & -starts[i + k];
      wrong |= lowest ^ uint64_t { 1 } << gap;
      seen += __builtin_popcountll(starts[i + k]);
    }
  }
  return wrong == 0 && seen == count;
}

template <Simd>
DF11_INLINE void join_weights(const uint8_t* __restrict exponents,
                              const uint8_t* __restrict sign_mantissa, int64_t count,
                              uint16_t* __restrict out) {
  for (int64_t i = 0; i < count; ++i) out[i] = join_weight(exponents[i], sign_mantissa[i]);
}

DF11_FOR_EACH_SIMD(void, follow_blocks,
                   (const Unit& unit, const uint64_t* table, Cursor* cursors, int count),
                   (unit, table, cursors, count))
DF11_FOR_EACH_SIMD(bool, starts_agree, (const uint64_t* starts, const uint8_t* gaps, int64_t count),
                   (starts, gaps, count))
DF11_FOR_EACH_SIMD(void, join_weights,
                   (const uint8_t* exponents, const uint8_t* sign_mantissa, int64_t count,
                    uint16_t* out),
                   (exponents, sign_mantissa, count, out))

// Decodes blocks of one unit on one thread. Its tables and ends must have been checked.
class BlockDecoder {
 public:
  BlockDecoder(const Unit& unit, const CodeTable& table, Simd simd)
      : unit_(unit),
        table_(table.entries()),
        follow_blocks_(DF11_SELECT(simd, follow_blocks)),
        starts_agree_(DF11_SELECT(simd, starts_agree)),
        join_weights_(DF11_SELECT(simd, join_weights)) {}

  // Writes the elements of blocks first_block..end_block - 1, but only those from `start` to
  // `stop` - 1, to out[element - start]. Returns a problem, or nothing.
  std::string decode(int64_t first_block, int64_t end_block, int64_t start, int64_t stop,
                     uint16_t* out) {
    for (int64_t block = first_block; block < end_block; block += kTogether) {
      const int count = static_cast<int>(std::min<int64_t>(kTogether, end_block - block));
      std::string problem = follow(block, count);
      for (int i = 0; problem.empty() && i < count; ++i) {
        problem = check_codes(block + i, codes_[i]);
        if (problem.empty()) write(block + i, codes_[i], start, stop, out);
      }
      if (!problem.empty()) return problem;
    }
    return "";
  }

 private:
  // One block's look-ups each wait for the one before; those of another fill the time.
  static constexpr int kTogether = 2;

  std::string follow(int64_t block, int count) {
    Cursor cursors[kTogether] = {cursor(block, 0), cursor(block + count - 1, count - 1)};
    for (int i = 0; i < count; ++i) {
      const std::string problem = check_position(unit_, block + i);
      if (!problem.empty()) return problem;
    }
    follow_blocks_(unit_, table_, cursors, count);
    return "";
  }

  Cursor cursor(int64_t block, int i) {
    const uint8_t* stream = unit_.encoded_exponent + block * kBlockBytes;
    const int64_t bytes = unit_.encoded_bytes - block * kBlockBytes;
    if (bytes < kBlockBytes + kOverreadBytes) {
      std::memcpy(ends_[i], stream, bytes);
      std::memset(ends_[i] + bytes, 0, sizeof ends_[i] - bytes);
      stream = ends_[i];
    }
    const auto end_bit = static_cast<uint32_t>(8 * std::min<int64_t>(bytes, kBlockBytes));
    return {stream, read_gap(gaps(block), 0), end_bit, codes_[i]};
  }

  std::string check_codes(int64_t block, const BlockCodes& codes) const {
    const int64_t end = unit_.first_element(block + 1);
    const int64_t count = end - unit_.first_element(block);
    // The last codes of a unit may end anywhere.
    if (end < unit_.size && starts_agree_(codes.starts, gaps(block), count) &&
        first_start(codes.starts[kBlockWindows]) == read_gap(gaps(block + 1), 0)) {
      return "";
    }
    if (count == 0 && end == unit_.size) return "";
    const std::string where = "block " + std::to_string(block) + " of encoded_exponent";
    int64_t left = count, end_bit = -1;
    for (int window = 0; window < kBlockWindows && end_bit < 0; ++window) {
      uint64_t starts = codes.starts[window];
      if (left > 0 && first_start(starts) != read_gap(gaps(block), window)) {
        return where + " has no code that starts in window " + std::to_string(window) +
               " where gaps says";
      }
      for (; starts && left > 0; --left) starts &= starts - 1;
      if (starts) end_bit = window * kWindowBits + first_start(starts);
    }
    const uint64_t starts_after = codes.starts[kBlockWindows];
    if (end_bit < 0 && starts_after) end_bit = kBlockBits + first_start(starts_after);
    const std::string expected =
        " codes than output_positions says, which is " + std::to_string(count);
    if (left > 0 || end_bit < 0) return where + " holds fewer" + expected;
    if (end < unit_.size) {
      if (end_bit < kBlockBits) return where + " holds more" + expected;
      return where + " does not end where gaps says that block " + std::to_string(block + 1) +
             " begins";
    }
    const int64_t end_byte = block * kBlockBytes + (end_bit + 7) / 8;
    if (end_byte == unit_.encoded_bytes) return "";
    return "encoded_exponent has " + std::to_string(unit_.encoded_bytes) +
           " bytes, but its last code ends in byte " + std::to_string(end_byte - 1);
  }

  void write(int64_t block, const BlockCodes& codes, int64_t start, int64_t stop,
             uint16_t* out) const {
    const int64_t first = unit_.first_element(block);
    const int64_t begin = std::max(first, start);
    const int64_t end = std::min(unit_.first_element(block + 1), stop);
    if (begin >= end) return;
    join_weights_(codes.exponents + (begin - first), unit_.sign_mantissa + begin, end - begin,
                  out + (begin - start));
  }

  const uint8_t* gaps(int64_t block) const { return unit_.gaps + block * kBlockGapBytes; }

  // kWindowBits if there is none.
  static uint32_t first_start(uint64_t starts) {
    return starts ? static_cast<uint32_t>(__builtin_ctzll(starts)) : kWindowBits;
  }

  Unit unit_;
  const uint64_t* table_;
  decltype(&follow_blocks_portable) follow_blocks_;
  decltype(&starts_agree_portable) starts_agree_;
  decltype(&join_weights_portable) join_weights_;
  BlockCodes codes_[kTogether];
  uint8_t ends_[kTogether][kBlockBytes + kOverreadBytes];
};

// Decodes elements start..stop - 1, from the blocks that they are in alone. Throws invalid_argument
// where the unit is corrupt.
inline Words decode_elements(const Unit& unit, int64_t start, int64_t stop, int threads) {
  if (start < 0 || start > stop || stop > unit.size) {
    throw std::out_of_range("elements " + std::to_string(start) + " to " + std::to_string(stop) +
                            " of a unit of " + std::to_string(unit.size));
  }
  Words words((stop - start + 1) / 2);
  if (start == stop) return words;
  std::string problem = check_tables(unit);
  if (problem.empty()) problem = check_ends(unit);
  if (!problem.empty()) throw std::invalid_argument(problem);

  const uint32_t* positions = unit.output_positions;
  const uint32_t* end = positions + unit.positions;
  const int64_t first_block = std::upper_bound(positions, end, start) - positions - 1;
  const int64_t end_block =
      std::min<int64_t>(std::lower_bound(positions, end, stop) - positions, unit.blocks);
  // In positions that are out of order, the search finds anything.
  if (first_block < 0 || first_block >= end_block || unit.first_element(first_block) > start ||
      unit.first_element(end_block) < stop) {
    throw std::invalid_argument("output_positions is not in order");
  }
  const CodeTable table(unit);
  uint16_t* out = reinterpret_cast<uint16_t*>(words.data());
  const int64_t items = (end_block - first_block + kItemBlocks - 1) / kItemBlocks;
  parallel_for(items, threads, [&](int64_t item) {
    const auto decoder = std::make_unique<BlockDecoder>(unit, table, best_simd());
    const int64_t block = first_block + item * kItemBlocks;
    const std::string problem =
        decoder->decode(block, std::min(block + kItemBlocks, end_block), start, stop, out);
    if (!problem.empty()) throw std::invalid_argument(problem);
  });
  return words;
}

}  // namespace df11::published
