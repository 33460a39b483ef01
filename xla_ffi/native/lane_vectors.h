// Vectors of words as lanes have them, for the CPU codec's loops. Host only.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/simd.h"
#include "native/layout.h"

namespace df11::native {

// Vectors of the compiler's, which it maps to the registers of the target: the words that one, two
// or four lanes of a grid row have in a half-step.
using OneLane = uint32_t __attribute__((vector_size(16)));
using TwoLanes = uint32_t __attribute__((vector_size(32)));
using FourLanes = uint32_t __attribute__((vector_size(64)));

template <Simd kSimd>
struct VectorOf {
  using Type = OneLane;
};
template <>
struct VectorOf<Simd::kAvx2> {
  using Type = TwoLanes;
};
template <>
struct VectorOf<Simd::kAvx512> {
  using Type = FourLanes;
};

// From one lane of a grid row to the next, in the words of a half-step.
inline constexpr int kRowStride = 4 * kLaneWords;

// Load and store the words of neighbouring lanes of a grid row. Vectors are not passed by value:
// that would depend on the target.
DF11_INLINE void load_lanes(const uint32_t* from, OneLane& out) {
  std::memcpy(&out, from, sizeof out);
}
#if __has_builtin(__builtin_shufflevector)
DF11_INLINE void load_lanes(const uint32_t* from, TwoLanes& out) {
  OneLane low, high;
  load_lanes(from, low);
  load_lanes(from + kRowStride, high);
  out = __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7);
}
DF11_INLINE void load_lanes(const uint32_t* from, FourLanes& out) {
  TwoLanes low, high;
  load_lanes(from, low);
  load_lanes(from + 2 * kRowStride, high);
  out = __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
#else  // Before GCC 12. Slower: the vectors are put together in memory.
template <typename Lanes>
DF11_INLINE void load_lanes(const uint32_t* from, Lanes& out) {
  for (size_t i = 0; i < sizeof out / 16; ++i) {
    std::memcpy(reinterpret_cast<char*>(&out) + 16 * i, from + i * kRowStride, 16);
  }
}
#endif
template <typename Lanes>
DF11_INLINE void store_lanes(uint32_t* to, const Lanes& lanes) {
  for (size_t i = 0; i < sizeof lanes / 16; ++i) {
    std::memcpy(to + i * kRowStride, reinterpret_cast<const char*>(&lanes) + 16 * i, 16);
  }
}

// checksum_step, for a pair of each word.
template <typename Lanes>
DF11_INLINE void fold(Lanes& acc, const Lanes& pairs) {
  acc = acc * 0x9e3779b1u + pairs;
  acc = acc << 13 | acc >> 19;
}

}  // namespace df11::native
