// The encoder of the published layout, given a code. The bytes are those of the reference.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/bits.h"
#include "common/inline.h"
#include "common/parallel.h"
#include "common/simd.h"
#include "common/words.h"
#include "published/layout.h"

namespace df11::published {

// One tensor of a unit.
struct Part {
  const uint16_t* weights;
  int64_t size;
};

// The code of an exponent, or of the end symbol; length 0 where there is none.
struct Code {
  uint32_t bits = 0;
  uint32_t length = 0;
};

struct EncodedUnit {
  Words encoded_exponent;  // filled up to whole windows
  Words sign_mantissa;     // filled up to whole words
  Words output_positions;
  Words gaps;
  int64_t size = 0;
  int64_t encoded_bytes = 0;

  int64_t blocks() const { return count_blocks(encoded_bytes); }
};

DF11_INLINE uint32_t exponent_of(uint16_t weight) { return weight >> 7 & 255; }

template <Simd>
DF11_INLINE void split_sign_mantissa(const uint16_t* __restrict weights, int64_t count,
                                     uint8_t* __restrict out) {
  for (int64_t i = 0; i < count; ++i) {
    out[i] = static_cast<uint8_t>((weights[i] >> 8 & 0x80) | (weights[i] & 0x7f));
  }
}

DF11_FOR_EACH_SIMD(void, split_sign_mantissa,
                   (const uint16_t* weights, int64_t count, uint8_t* out), (weights, count, out))

// A piece of a part: what a thread encodes at a time.
struct Piece {
  const uint16_t* weights;
  int64_t size;
  int64_t first_element;
  int64_t first_bit = 0;
  int64_t end_bit = 0;
};

inline constexpr int64_t kPieceSize = 1 << 16;

inline std::vector<Piece> cut_to_pieces(const std::vector<Part>& parts) {
  std::vector<Piece> pieces;
  int64_t element = 0;
  for (const Part& part : parts) {
    for (int64_t at = 0; at < part.size; at += kPieceSize) {
      const int64_t size = std::min(kPieceSize, part.size - at);
      pieces.push_back({part.weights + at, size, element});
      element += size;
    }
  }
  return pieces;
}

// How often each exponent occurs in a piece.
using Counts = std::array<uint32_t, 256>;

inline Counts count_exponents(const Piece& piece) {
  // Neighbours are often equal: counted in one array, each would wait for the one before.
  Counts counts[4] = {};
  int64_t i = 0;
  for (; i + 4 <= piece.size; i += 4) {
    for (int k = 0; k < 4; ++k) ++counts[k][exponent_of(piece.weights[i + k])];
  }
  for (; i < piece.size; ++i) ++counts[0][exponent_of(piece.weights[i])];
  for (int e = 0; e < 256; ++e) counts[0][e] += counts[1][e] + counts[2][e] + counts[3][e];
  return counts[0];
}

inline void count_exponents(const std::vector<Piece>& pieces, int threads, Counts* counts) {
  parallel_for(pieces.size(), threads, [&](int64_t i) { counts[i] = count_exponents(pieces[i]); });
}

// The codes of exponents, alone and in pairs.
class PairCodes {
 public:
  static constexpr int kBits = 48;  // of a pair's codes; longer ones count as kTooLong
  static constexpr uint64_t kCodes = (uint64_t{1} << kBits) - 1;
  static constexpr uint32_t kTooLong = 127;

  explicit PairCodes(const std::array<Code, 256>& codes) : single_(codes), pairs_(65536) {
    std::vector<uint32_t> coded;
    for (uint32_t e = 0; e < 256; ++e) {
      if (codes[e].length) coded.push_back(e);
    }
    for (uint32_t first : coded) {
      for (uint32_t second : coded) {
        const Code a = codes[first], b = codes[second];
        const uint32_t length = a.length + b.length;
        pairs_[exponent_index(first << 7 | second << 23)] =
            length > kBits ? uint64_t{kTooLong} << kBits
                           : uint64_t{a.length} << 56 | uint64_t{length} << kBits |
                                 uint64_t{a.bits} << b.length | b.bits;
      }
    }
  }

  const Code& single(uint16_t weight) const { return single_[exponent_of(weight)]; }

  // Of two weights, the first in the lower half: codes in bits 0..47, their length in 48..54, that
  // of the first in 56..61.
  const uint64_t* pairs() const { return pairs_.data(); }

 private:
  const std::array<Code, 256>& single_;
  std::vector<uint64_t> pairs_;
};

// Bits for a window that neighbouring pieces write to.
struct SharedWindow {
  int64_t window = -1;
  uint64_t bits = 0;
};

// Where codes are written.
struct Stream {
  uint8_t* bytes;
  uint8_t* window_gaps;  // one byte each
  uint32_t* output_positions;

  DF11_INLINE void store_window(int64_t window, uint64_t bits) const {
    bits = __builtin_bswap64(bits);
    std::memcpy(bytes + window * kWindowBytes, &bits, 8);
  }

  // The code of this element starts at this bit, as the first in its window.
  DF11_INLINE void record_start(int64_t bit, int64_t element) const {
    const int64_t window = bit / kWindowBits;
    window_gaps[window] = bit % kWindowBits;
    if (window % kBlockWindows == 0) {
      output_positions[window / kBlockWindows] = static_cast<uint32_t>(element);
    }
  }
};

// Writes a piece's codes; what lies in the windows at its ends goes to up to two `shared`. The
// start of its first code is recorded elsewhere. False if they do not end where they should.
template <Simd>
DF11_INLINE bool encode_piece(const Piece& piece, const PairCodes& codes, const Stream& stream,
                              SharedWindow* shared) {
  int64_t window = piece.first_bit / kWindowBits;
  uint64_t bits = 0;  // the lowest `fill` are those of the window so far
  uint32_t fill = piece.first_bit % kWindowBits;
  bool is_shared = fill > 0;
  const int64_t end_window = piece.end_bit / kWindowBits;
  // Appends up to 64 bits that fill the window. In the one after, the first code to start, with
  // next_end - 64, is that of element `next`. Windows after the last are not written.
  const auto append_across = [&](uint64_t more, uint32_t length, uint32_t next_end, int64_t next) {
    const uint32_t rest = fill + length - kWindowBits;
    const uint64_t full = bits << 1 << (kWindowBits - 1 - fill) | more >> rest;
    if (is_shared) {
      *shared++ = {window, full};
      is_shared = false;
    } else if (window < end_window) {
      stream.store_window(window, full);
    }
    if (next < piece.size && window < end_window) {
      stream.record_start(window * kWindowBits + next_end, piece.first_element + next);
    }
    ++window;
    bits = more;
    fill = rest;
  };
  const auto append_one = [&](int64_t i) {
    const Code code = codes.single(piece.weights[i]);
    const uint32_t end = fill + code.length;
    if (end >= kWindowBits) return append_across(code.bits, code.length, end, i + 1);
    bits = bits << code.length | code.bits;
    fill = end;
  };
  const uint64_t* pairs = codes.pairs();
  int64_t i = 0;
  for (; i + 4 <= piece.size; i += 4) {
    uint32_t weights[4 / 2];
    std::memcpy(weights, piece.weights + i, sizeof weights);
    const uint64_t first = pairs[exponent_index(weights[0])];
    const uint64_t second = pairs[exponent_index(weights[1])];
    const uint32_t first_length = first >> PairCodes::kBits & 127;
    const uint32_t second_length = second >> PairCodes::kBits & 127;
    const uint32_t length = first_length + second_length;
    if (length > kWindowBits) {
      for (int k = 0; k < 4; ++k) append_one(i + k);
      continue;
    }
    const uint64_t all =
        (first & PairCodes::kCodes) << second_length | (second & PairCodes::kCodes);
    if (fill + length < kWindowBits) {
      bits = bits << length | all;
      fill += length;
      continue;
    }
    const uint32_t ends[3] = {fill + static_cast<uint32_t>(first >> 56), fill + first_length,
                              fill + first_length + static_cast<uint32_t>(second >> 56)};
    uint32_t end = fill + length;
    int64_t next = i + 4;
    for (int k = 2; k >= 0; --k) {
      end = ends[k] >= kWindowBits ? ends[k] : end;
      next -= ends[k] >= kWindowBits;
    }
    append_across(all, length, end, next);
  }
  for (; i < piece.size; ++i) append_one(i);
  if (fill > 0) *shared = {window, bits << (kWindowBits - fill)};
  return window * kWindowBits + fill == piece.end_bit;
}

DF11_FOR_EACH_SIMD(bool, encode_piece,
                   (const Piece& piece, const PairCodes& codes, const Stream& stream,
                    SharedWindow* shared),
                   (piece, codes, stream, shared))

class UnitEncoder {
 public:
  // `counts` of each piece; codes by exponent.
  UnitEncoder(std::vector<Piece> pieces, const Counts* counts, const std::array<Code, 256>& codes,
              Code end_symbol)
      : pieces_(std::move(pieces)), codes_(codes), end_symbol_(end_symbol) {
    for (int e = 0; e < 256; ++e) {
      if (codes[e].length > kMaxCodeBits) {
        throw std::invalid_argument("exponent " + std::to_string(e) + " has a code of " +
                                    std::to_string(codes[e].length) + " bits, more than 32");
      }
    }
    for (Piece& piece : pieces_) {
      piece.first_bit = end_bit_;
      for (int e = 0; e < 256; ++e) {
        if ((*counts)[e] && !codes[e].length) {
          throw std::invalid_argument("exponent " + std::to_string(e) + " occurs, but has no code");
        }
        end_bit_ += int64_t{(*counts)[e]} * codes[e].length;
      }
      piece.end_bit = end_bit_;
      ++counts;
    }
  }

  EncodedUnit encode(int threads) {
    if (pieces_.empty()) throw std::invalid_argument("a unit without elements");
    unit_.size = pieces_.back().first_element + pieces_.back().size;
    if (unit_.size > int64_t{UINT32_MAX}) {
      throw std::length_error("a unit of " + std::to_string(unit_.size) +
                              " elements, but their positions are stored in 32 bits");
    }
    unit_.encoded_bytes = (end_bit_ + 7) / 8;
    const int64_t windows = (end_bit_ + kWindowBits - 1) / kWindowBits;
    unit_.encoded_exponent.grow_to(windows * (kWindowBytes / 4));
    unit_.sign_mantissa.grow_to((unit_.size + 3) / 4);
    unit_.output_positions.grow_to(unit_.blocks() + 1);
    unit_.gaps.grow_to(unit_.blocks() * (kBlockGapBytes / 4));
    window_gaps_.resize(unit_.blocks() * kBlockWindows + 1);  // and one after the end
    shared_.assign(2 * pieces_.size(), {});
    stream_ = {reinterpret_cast<uint8_t*>(unit_.encoded_exponent.data()), window_gaps_.data(),
               unit_.output_positions.data()};
    const auto split = DF11_SELECT(best_simd(), split_sign_mantissa);
    const PairCodes pair_codes(codes_);
    const auto encode = DF11_SELECT(best_simd(), encode_piece);
    auto* sign_mantissa = reinterpret_cast<uint8_t*>(unit_.sign_mantissa.data());
    parallel_for(pieces_.size(), threads, [&](int64_t i) {
      const Piece& piece = pieces_[i];
      split(piece.weights, piece.size, sign_mantissa + piece.first_element);
      if (starts_window(piece)) stream_.record_start(piece.first_bit, piece.first_element);
      if (!encode(piece, pair_codes, stream_, &shared_[2 * i])) {
        throw std::invalid_argument("the weights are not those that were counted");
      }
    });
    end_stream();
    pack_gaps(threads);
    return std::move(unit_);
  }

 private:
  // Whether the piece's first code is the first in its window.
  bool starts_window(const Piece& piece) const {
    if (piece.first_element == 0) return true;
    const Piece& before = *(&piece - 1);
    const uint32_t length = codes_[exponent_of(before.weights[before.size - 1])].length;
    return (piece.first_bit - length) / kWindowBits < piece.first_bit / kWindowBits;
  }

  // What lies between the pieces, and after the last.
  void end_stream() {
    // Windows that pieces share come in order.
    SharedWindow joined;
    for (const SharedWindow& part : shared_) {
      if (part.window < 0) continue;
      if (part.window != joined.window) {
        if (joined.window >= 0) stream_.store_window(joined.window, joined.bits);
        joined = {part.window, 0};
      }
      joined.bits |= part.bits;
    }
    const Piece& last = pieces_.back();
    const uint32_t last_length = codes_[exponent_of(last.weights[last.size - 1])].length;
    int64_t last_start = end_bit_ - last_length;
    if (end_bit_ % 8 != 0) {
      // A last byte is filled up with the beginning of the end symbol, which counts as a start.
      if (last_start / kWindowBits < end_bit_ / kWindowBits)
        stream_.record_start(end_bit_, unit_.size);
      last_start = end_bit_;
      const int room = static_cast<int>(8 - end_bit_ % 8);
      const int length = static_cast<int>(end_symbol_.length);
      const uint32_t filling = length >= room ? end_symbol_.bits >> (length - room)
                                              : end_symbol_.bits << (room - length);
      const int64_t byte_end = end_bit_ % kWindowBits + room;
      joined.bits |= uint64_t{filling} << (kWindowBits - byte_end);
    }
    if (joined.window >= 0) stream_.store_window(joined.window, joined.bits);
    const int64_t starts_in_blocks = last_start / kBlockBits + 1;
    stream_.output_positions[starts_in_blocks] = static_cast<uint32_t>(unit_.size);
    unit_.output_positions.grow_to(starts_in_blocks + 1);
  }

  void pack_gaps(int threads) {
    auto* packed = reinterpret_cast<uint8_t*>(unit_.gaps.data());
    parallel_for(unit_.blocks(), threads, [&](int64_t block) {
      const uint8_t* from = window_gaps_.data() + block * kBlockWindows;
      uint8_t* to = packed + block * kBlockGapBytes;
      for (int i = 0; i < kBlockWindows; i += 8, to += kGapBits) {
        uint64_t eight = 0;
        for (int k = 0; k < 8; ++k) eight = eight << kGapBits | from[i + k];
        for (int k = 0; k < kGapBits; ++k) to[k] = static_cast<uint8_t>(eight >> 8 * (4 - k));
      }
    });
  }

  std::vector<Piece> pieces_;
  const std::array<Code, 256>& codes_;
  const Code end_symbol_;
  int64_t end_bit_ = 0;
  EncodedUnit unit_;
  Stream stream_{};
  std::vector<uint8_t> window_gaps_;  // 0 where no code starts
  std::vector<SharedWindow> shared_;  // up to two of each piece
};

}  // namespace df11::published
