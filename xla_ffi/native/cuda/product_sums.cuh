// The sums of items and of groups, and how those of a column become its result.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/async_copies.cuh"
#include "common/lanes.cuh"
#include "common/tensor_core.cuh"
#include "native/cuda/product_work.h"

namespace df11::native {

// Where a warp is in a group of warps that add up their items; it is kept in shared memory, since
// registers are short and it takes divisions to find.
struct PlaceInGroup {
  uint32_t sums, next, first;  // addresses: of the group's sums, of memory of other warps
  bool is_first, is_last;

  __device__ PlaceInGroup(const ProductMemory& memory, const MatrixWork& matrix, uint32_t base,
                          int warp) {
    const int group = divide_by_reciprocal(warp, matrix.group_items_reciprocal);
    const int position = warp - group * matrix.group_items;
    next = memory.warp(base, warp + 1);
    first = memory.warp(base, warp - position);
    sums = memory.sums(base, group, first);
    is_first = position == 0;
    is_last = position + 1 == matrix.group_items;
  }
  __device__ explicit PlaceInGroup(const uint4& packed)
      : sums(packed.x),
        next(packed.y),
        first(packed.z),
        is_first(packed.w & 1),
        is_last(packed.w & 2) {}
  __device__ uint4 pack() const {
    return {sums, next, first, uint32_t{is_first} | uint32_t{is_last} << 1};
  }
};

// A lane's part of what items add up to in shared memory, of the rows that x has: 64 bytes of every
// two rows, in pieces of 16 that lie beside those of other lanes.
class SharedSums {
 public:
  __device__ SharedSums(uint32_t memory, int rows, int lane)
      : memory_(memory), pairs_((rows + 1) / 2), lane_(lane) {}

  template <int kTiles>
  __device__ __forceinline__ void store(const float (&sums)[kTiles][4][4]) const {
    for_each<kTiles>([&](uint32_t place, int tile, int i) {
      const float(&s)[4] = sums[tile][i];
      store_shared(place, uint4{__float_as_uint(s[0]), __float_as_uint(s[1]), __float_as_uint(s[2]),
                                __float_as_uint(s[3])});
    });
  }
  template <int kTiles>
  __device__ __forceinline__ void add_to(float (&sums)[kTiles][4][4]) const {
    for_each<kTiles>([&](uint32_t place, int tile, int i) {
      const uint4 before = load_shared4(place);
      float(&s)[4] = sums[tile][i];
      s[0] += __uint_as_float(before.x);
      s[1] += __uint_as_float(before.y);
      s[2] += __uint_as_float(before.z);
      s[3] += __uint_as_float(before.w);
    });
  }

 private:
  template <int kTiles, typename F>
  __device__ __forceinline__ void for_each(const F& f) const {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int left = pairs_ - 4 * tile, pairs = min(left, 4);
      if (lane_ % 4 >= left) continue;
      const uint32_t at = memory_ + 512 * 4 * tile + 16 * (lane_ / 4 * pairs + lane_ % 4);
#pragma unroll
      for (int i = 0; i < 4; ++i) f(at + 128 * pairs * i, tile, i);
    }
  }

  uint32_t memory_;
  int pairs_, lane_;  // of rows
};

// Stores a group's sums. The lane 4 g + t has columns 8 g .. 8 g + 7 of rows 2 t and 2 t + 1 of
// each tile of x.
template <int kTiles>
__device__ inline void store_sums(float* to, int group, int rows, int lane,
                                  const float (&sums)[kTiles][4][4]) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      const int row = 8 * tile + lane % 4 * 2 + odd;
      if (row >= rows) continue;
      const float(&s)[4][4] = sums[tile];
      auto* place =
          reinterpret_cast<float4*>(to + (int64_t{group} * rows + row) * kTileCols + lane / 4 * 8);
      __stcg(place, float4{s[0][odd], s[0][2 + odd], s[1][odd], s[1][2 + odd]});
      __stcg(place + 1, float4{s[2][odd], s[2][2 + odd], s[3][odd], s[3][2 + odd]});
    }
  }
}

// Of a block's first and last columns of chunks, whether it is the last block there: at those
// between it is the only one.
struct BlockColumns {
  int number[2];
  bool complete[2];
};

// Columns n and n + 1 of a row of the result, of which the second, or both, may not exist.
__device__ inline void store_result(const ProductWork& work, const MatrixWork& matrix, int row,
                                    int n, float first, float second) {
  const int64_t at = int64_t{row} * matrix.n + n;
  const bool both = n + 1 < matrix.n && matrix.n % 2 == 0;
  if (work.float_out) {
    float* to = static_cast<float*>(matrix.out) + at;
    if (both) {
      *reinterpret_cast<float2*>(to) = float2{first, second};
    } else {
      if (n < matrix.n) to[0] = first;
      if (n + 1 < matrix.n) to[1] = second;
    }
  } else {
    uint16_t* to = static_cast<uint16_t*>(matrix.out) + at;
    const uint32_t rounded = to_bfloat16x2(first, second);
    if (both) {
      *reinterpret_cast<uint32_t*>(to) = rounded;
    } else {
      if (n < matrix.n) to[0] = static_cast<uint16_t>(rounded);
      if (n + 1 < matrix.n) to[1] = static_cast<uint16_t>(rounded >> 16);
    }
  }
}

// Adds up the columns of which this block brings the last groups, in the order of groups.
template <int kTiles>
__device__ inline void add_columns(const ProductWork& work, const MatrixWork& matrix, int begin,
                                   int end, BlockColumns& columns) {
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, warps = blockDim.x / kLanes;
  const int per_column = matrix.column_groups;

  // All that does not depend on other warps is computed before they are waited for.
  int first = keep(columns.number[0]), last = keep(columns.number[1]);
  const bool is_last = threadIdx.x == 1;
  const int column = keep(is_last ? last : first), column_begin = column * per_column;
  const int groups = keep(min(end, column_begin + per_column) - max(begin, column_begin));
  const int is_alone = keep(static_cast<int>(groups == per_column || (is_last && first == last)));
  __syncthreads();
  // What the block has stored is seen by whoever sees its count; and what others have counted,
  // here.
  if (threadIdx.x < 2) {
    const uint32_t before =
        is_alone ? 0 : add_in_order(matrix.arrived + column, static_cast<uint32_t>(groups));
    const bool complete = static_cast<int>(before) + groups == per_column;
    columns.complete[is_last] = complete;
    if (complete && before > 0) matrix.arrived[column] = 0;  // as it was
  }
  __syncthreads();
  const bool first_complete = columns.complete[0];
  const bool last_complete = columns.complete[first != last];
  if (first == last && !first_complete) return;
  if (!first_complete) ++first;
  if (!last_complete) --last;

  // Of a column of chunks and a row of x: 64 sums of each group. A warp adds up a few such rows at
  // a time, of which it waits for many loads together.
  const int results = (last - first + 1) * work.rows, first_group = first * per_column;
  constexpr int kResults = kTiles, kGroups = kTiles == 4 ? 8 : 16;  // as there are registers
  const int stride = work.rows * (kTileCols / 2);
  for (int result = warp; result < results; result += kResults * warps) {
    int column[kResults], row[kResults];
    const float2* from[kResults];
    float2 sum[kResults];
#pragma unroll
    for (int i = 0; i < kResults; ++i) {
      const int that = result + i * warps;
      const int columns_before = divide_by_reciprocal(that, work.rows_reciprocal);
      column[i] = first + columns_before;
      row[i] = that - columns_before * work.rows;
      const int64_t group = first_group + columns_before * per_column;
      from[i] =
          reinterpret_cast<const float2*>(matrix.sums + (group * work.rows + row[i]) * kTileCols) +
          lane;
      sum[i] = float2{0, 0};
    }
#pragma unroll 1
    for (int group = 0; group < per_column; group += kGroups) {
      float2 more[kResults][kGroups];
#pragma unroll
      for (int i = 0; i < kResults; ++i) {
        const int left = result + i * warps < results ? per_column - group : 0;
#pragma unroll
        for (int j = 0; j < kGroups; ++j) {
          more[i][j] = j < left ? __ldcg(from[i]) : float2{0, 0};
          from[i] += stride;
        }
      }
      // Without this the compiler adds each when it has come, before it loads the next.
      __syncwarp();
      // Nothing is added where there is none: a sum is never the zero of negative sign.
#pragma unroll
      for (int i = 0; i < kResults; ++i) {
#pragma unroll
        for (int j = 0; j < kGroups; ++j) {
          sum[i].x += more[i][j].x;
          sum[i].y += more[i][j].y;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kResults; ++i) {
      if (result + i * warps >= results) continue;
      store_result(work, matrix, row[i], column[i] * kTileCols + 2 * lane, sum[i].x, sum[i].y);
    }
  }
}

}  // namespace df11::native
