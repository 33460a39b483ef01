// The published DFloat11 layout: constants, and what one unit consists of, shared by the encoder,
// the CPU decoder and the CUDA kernel.
#pragma once

#include <cstdint>

#include "common/inline.h"

namespace df11::published {

// A stream of codes, first bit highest, is cut into windows, windows into blocks.
inline constexpr int kWindowBytes = 8;
inline constexpr int kWindowBits = 8 * kWindowBytes;
inline constexpr int kBlockWindows = 512;
inline constexpr int kBlockBytes = kWindowBytes * kBlockWindows;  // 4096
inline constexpr int kBlockBits = 8 * kBlockBytes;

// A window's gap is where in it the first code starts.
inline constexpr int kGapBits = 5;
inline constexpr int kBlockGapBytes = kBlockWindows * kGapBits / 8;  // 320

// Codes are looked up eight bits at a time: entries below kFirstPointer are exponents, v from
// there on points to row 256 - v. The lengths of the codes are in the row after the last.
inline constexpr int kMaxCodeBits = 32;
inline constexpr int kRowEntries = 256;
inline constexpr int kLevels = kMaxCodeBits / 8;
inline constexpr int kFirstPointer = 240;
inline constexpr int kMaxRows = 256 - kFirstPointer + 1;  // row 0, and those that can be pointed to

// A code has at least one bit.
inline constexpr int kMaxWindowElements = kWindowBits;
inline constexpr int kMaxBlockElements = kBlockBits;

DF11_HD int pointed_row(uint32_t entry) { return 256 - static_cast<int>(entry); }

DF11_HD int64_t count_blocks(int64_t encoded_bytes) {
  return (encoded_bytes + kBlockBytes - 1) / kBlockBytes;
}

// The gap of one of a block's windows, from the block's kBlockGapBytes.
DF11_HD uint32_t read_gap(const uint8_t* block_gaps, int window) {
  const int bit = kGapBits * window;
  const uint8_t* at = block_gaps + bit / 8;
  const int shift = 16 - kGapBits - bit % 8;
  // The last gap of a block ends with its byte: the byte after may not be there.
  const uint32_t low = shift < 8 ? at[1] : 0;
  return (uint32_t{at[0]} << 8 | low) >> shift & ((1u << kGapBits) - 1);
}

DF11_HD uint16_t join_weight(uint32_t exponent, uint32_t sign_mantissa) {
  return static_cast<uint16_t>((sign_mantissa & 0x80) << 8 | exponent << 7 |
                               (sign_mantissa & 0x7f));
}

// One unit's arrays, on the host or on a device.
struct Unit {
  const uint8_t* sign_mantissa = nullptr;      // [size]
  const uint8_t* encoded_exponent = nullptr;   // [encoded_bytes]; bytes after the last read as 0
  const uint8_t* luts = nullptr;               // [rows + 1][kRowEntries]
  const uint32_t* output_positions = nullptr;  // [positions]
  const uint8_t* gaps = nullptr;               // [blocks][kBlockGapBytes]
  uint16_t* out = nullptr;                     // [size]
  int64_t size = 0;
  int64_t encoded_bytes = 0;
  int64_t blocks = 0;
  int64_t positions = 0;  // blocks + 1, or blocks where no code starts in the last one
  int rows = 0;

  // The first element whose code starts in a block, or in a later one; `size` at the end.
  DF11_HD int64_t first_element(int64_t block) const {
    return output_positions[block < positions ? block : positions - 1];
  }
};

}  // namespace df11::published
