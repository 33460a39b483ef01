// What is done with the bits of weights, of one or of two as a pair, whatever the layout.
#pragma once

#include <cstdint>

#include "common/inline.h"

namespace df11 {

DF11_HD uint32_t rotl(uint32_t x, int n) { return x << (n & 31) | x >> (-n & 31); }

// Index of a pair's exponents, the first one's above the second's, in a table of 65,536 entries.
DF11_INLINE uint16_t exponent_index(uint16_t first, uint16_t second) {
  return static_cast<uint16_t>((first << 1 & 0xff00) | (second >> 7 & 0xff));
}
DF11_INLINE uint16_t exponent_index(uint32_t pair) {
  return exponent_index(static_cast<uint16_t>(pair), static_cast<uint16_t>(pair >> 16));
}

}  // namespace df11
