// The instructions of tensor cores on the host: see common/tensor_core.cuh.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace cuda_emulation {

// Rounded to the nearest, ties to even; a NaN stays one.
inline uint32_t to_bfloat16(float value) {
  const uint32_t bits = __float_as_uint(value);
  if (value != value) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline uint32_t to_bfloat16x2(float first, float second) {
  return to_bfloat16(first) | to_bfloat16(second) << 16;
}

// What the lanes of each warp hold. Used in turn: when a lane writes one, all lanes have read what
// it held before.
struct Fragments {
  uint32_t a[4][4];
  uint2 b[8];
};
inline Fragments fragments[2][kWarpSize][kWarpSize];
inline PerThread<unsigned> products;

// The sums of 16 products are added up in the order of their index, which differs from what
// hardware does: it adds them in an order, and with roundings, of its own.
template <int kTiles>
void multiply_add(float (&sums)[kTiles][4][4], const uint32_t (&a)[4][4],
                  const uint2 (&b)[kTiles]) {
  Fragments* all = fragments[(*products)++ % 2][threadIdx.x / kWarpSize];
  std::memcpy(all[lane()].a, a, sizeof a);
  std::memcpy(all[lane()].b, b, sizeof b);
  warp().barrier.arrive_and_wait();
  const int g = lane() / 4, t = lane() % 4;
  const auto low = [](uint32_t pair) { return __uint_as_float(pair << 16); };
  const auto high = [](uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); };
  for (int tile = 0; tile < kTiles; ++tile) {
    for (int i = 0; i < 4; ++i) {
      for (int c = 0; c < 4; ++c) {
        float sum = sums[tile][i][c];
        for (int half = 0; half < 2; ++half) {
          for (int u = 0; u < 4; ++u) {
            const uint32_t row = all[4 * g + u].a[i][2 * half + c / 2];
            const uint2& columns = all[4 * (2 * t + c % 2) + u].b[tile];
            const uint32_t column = half ? columns.y : columns.x;
            sum += low(row) * low(column) + high(row) * high(column);
          }
        }
        sums[tile][i][c] = sum;
      }
    }
  }
}

}  // namespace cuda_emulation
