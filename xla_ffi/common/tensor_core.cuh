// What the product uses of tensor cores and bfloat16: compute capability 8.0 and up.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#ifndef __CUDACC__
#include <tensor_core.h>  // of the emulation
#endif

namespace df11 {

#ifdef __CUDACC__

// Two numbers rounded to bfloat16, the first in the low half.
__device__ __forceinline__ uint32_t to_bfloat16x2(float first, float second) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %2, %1;" : "=r"(both) : "f"(first), "f"(second));
  return both;
}

// sums += a b, with `a` of 16 rows and 16 columns and `b` of 16 rows and 8 columns. Lane 4 g + t
// holds of `a` rows g and g + 8 of columns 2 t, 2 t + 1 (a[0], a[1]) and 2 t + 8, 2 t + 9 (a[2],
// a[3]); of `b` column g of the same rows; of the sums rows g (sums[0], sums[1]) and g + 8, columns
// 2 t and 2 t + 1.
__device__ __forceinline__ void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same for four `a` and kTiles `b`.
template <int kTiles>
__device__ __forceinline__ void multiply_add(float (&sums)[kTiles][4][4], const uint32_t (&a)[4][4],
                                             const uint2 (&b)[kTiles]) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) multiply_add(sums[tile][i], a[i], b[tile].x, b[tile].y);
  }
}

#else

using cuda_emulation::multiply_add;
using cuda_emulation::to_bfloat16x2;

#endif

}  // namespace df11
