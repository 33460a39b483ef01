// The sums of items, and how those of a column become its result.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/async_copies.cuh"
#include "common/lanes.cuh"
#include "common/tensor_core.cuh"
#include "native/cuda/product_work.h"

namespace df11::native {

// Stores an item's sums. The lane 4 g + t has columns 8 g .. 8 g + 7 of rows 2 t and 2 t + 1 of
// each tile of x.
template <int kTiles>
__device__ inline void store_sums(float* to, int item, int rows, int lane,
                                  const float (&sums)[kTiles][4][4]) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      const int row = 8 * tile + lane % 4 * 2 + odd;
      if (row >= rows) continue;
      const float(&s)[4][4] = sums[tile];
      auto* place =
          reinterpret_cast<float4*>(to + (int64_t{item} * rows + row) * kTileCols + lane / 4 * 8);
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

// Adds up the columns of which this block brings the last items. Items s, s + 8, s + 16 .. of a
// column are added by one warp, and their sums by another: both in the order of items.
__device__ inline void add_columns(const ProductWork& work, const MatrixWork& matrix, int begin,
                                   int end, uint32_t memory, BlockColumns& columns) {
  constexpr int kGroups = 8;
  constexpr int kUnitBytes = kTileCols * 4;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes, warps = blockDim.x / kLanes;
  const int per_column = matrix.column_items;

  __syncthreads();
  int first = columns.number[0], last = columns.number[1];
  // What the block has stored is seen by whoever sees its count; and what others have counted,
  // here.
  if (threadIdx.x < 2) {
    const bool is_last = threadIdx.x == 1;
    const int column = columns.number[is_last], column_begin = column * per_column;
    const int items = min(end, column_begin + per_column) - max(begin, column_begin);
    const uint32_t before =
        items == per_column || (is_last && first == last)
            ? 0
            : add_in_order(matrix.arrived + column, static_cast<uint32_t>(items));
    const bool complete = static_cast<int>(before) + items == per_column;
    columns.complete[is_last] = complete;
    if (complete && before > 0) matrix.arrived[column] = 0;  // as it was
  }
  __syncthreads();
  const bool first_complete = columns.complete[0];
  const bool last_complete = columns.complete[first != last];
  if (first == last && !first_complete) return;
  if (!first_complete) ++first;
  if (!last_complete) --last;

  // Of a column of chunks and a row of x: 64 sums of each item.
  const int results = (last - first + 1) * work.rows;
  const auto column_of = [&](int result) {
    return divide_by_reciprocal(result, work.rows_reciprocal);
  };
  const auto row_of = [&](int result) { return result - column_of(result) * work.rows; };
  const int at_once =
      static_cast<int>((1u << work.memory.table_log2_bytes) / (kGroups * kUnitBytes));
  for (int done = 0; done < results; done += at_once) {
    const int count = min(at_once, results - done);
    // Several at a time, and several items of each, whose loads are waited for together.
    constexpr int kUnits = 4, kItems = 4;
    const int stride = kGroups * work.rows * (kTileCols / 2);
    for (int unit = warp; unit < count * kGroups; unit += kUnits * warps) {
      const float2* from[kUnits];
      int left[kUnits];
      float2 sum[kUnits];
#pragma unroll
      for (int i = 0; i < kUnits; ++i) {
        const int that = unit + i * warps, group = that % kGroups;
        const int column = column_of(done + that / kGroups), row = row_of(done + that / kGroups);
        const int64_t item = int64_t{first + column} * per_column + group;
        from[i] =
            reinterpret_cast<const float2*>(matrix.sums + (item * work.rows + row) * kTileCols) +
            lane;
        left[i] = that < count * kGroups ? per_column - group : 0;
        sum[i] = float2{0, 0};
      }
#pragma unroll 1
      for (int item = 0; item < per_column; item += kItems * kGroups) {
        float2 more[kUnits][kItems];
#pragma unroll
        for (int j = 0; j < kItems; ++j) {
#pragma unroll
          for (int i = 0; i < kUnits; ++i) {
            more[i][j] = left[i] > 0 ? __ldcg(from[i]) : float2{0, 0};
            from[i] += stride;
            left[i] -= kGroups;
          }
        }
        // Without this the compiler adds each when it has come, before it loads the next.
        __syncwarp();
        // Nothing is added where there is none: a sum is never the zero of negative sign.
#pragma unroll
        for (int i = 0; i < kUnits; ++i) {
#pragma unroll
          for (int j = 0; j < kItems; ++j) {
            sum[i].x += more[i][j].x;
            sum[i].y += more[i][j].y;
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kUnits; ++i) {
        if (unit + i * warps >= count * kGroups) continue;
        const uint32_t place = memory + (unit + i * warps) * kUnitBytes + 8 * lane;
        store_shared(place, __float_as_uint(sum[i].x));
        store_shared(place + 4, __float_as_uint(sum[i].y));
      }
    }
    __syncthreads();
    for (int i = warp; i < count; i += warps) {
      const int column = first + column_of(done + i), row = row_of(done + i);
      float2 sum{0, 0};
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        const uint32_t place = memory + (i * kGroups + group) * kUnitBytes + 8 * lane;
        sum.x += __uint_as_float(load_shared(place));
        sum.y += __uint_as_float(load_shared(place + 4));
      }
      store_result(work, matrix, row, column * kTileCols + 2 * lane, sum.x, sum.y);
    }
    __syncthreads();
  }
}

}  // namespace df11::native
