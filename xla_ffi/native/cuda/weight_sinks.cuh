// Where a lane's weights go to: sinks take the 8 pairs of a half-step at a time.
//
// Pairs along rows: k and k + 1 lie in two rows of the output, in each of which the lane has 8
// neighbours. Pairs along columns: they are neighbours, and both half-steps give the lane 4
// neighbours in each of 8 rows. Inner sinks are for chunks that are aligned and nowhere at the
// view's edge, edge sinks for any.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/lanes.cuh"
#include "native/layout.h"

namespace df11::native {

// What a lane has of a tile.
struct Lane {
  int number, k, n;  // k and n, in the tile, of its first weight

  __device__ explicit Lane(int lane) : number(lane), k(lane % 4 * 4), n(lane / 4 * kLanePairs) {}
  __device__ int place() const { return number % 4 * kTileCols + n; }
};

// The first weights of pairs, or the second ones, of 8 neighbouring n.
__device__ __forceinline__ uint4 one_of_each(const uint32_t (&pair)[kLanePairs], bool second) {
  const uint32_t bytes = second ? 0x7632 : 0x5410;
  return {__byte_perm(pair[0], pair[1], bytes), __byte_perm(pair[2], pair[3], bytes),
          __byte_perm(pair[4], pair[5], bytes), __byte_perm(pair[6], pair[7], bytes)};
}
__device__ __forceinline__ uint4 firsts(const uint32_t (&pair)[kLanePairs]) {
  return one_of_each(pair, false);
}
__device__ __forceinline__ uint4 seconds(const uint32_t (&pair)[kLanePairs]) {
  return one_of_each(pair, true);
}

class InnerRows {
 public:
  // `out` is where the chunk's first weight goes.
  __device__ InnerRows(uint16_t* out, const View& view, const Lane& lane)
      : row_(out + lane.k * view.n + lane.n), stride_(view.n) {}

  __device__ void store(int, const uint32_t (&pair)[kLanePairs]) {
    store_global(row_, firsts(pair));
    store_global(row_ + stride_, seconds(pair));
    row_ += 2 * stride_;
  }
  __device__ void end_step() { row_ += (kStepRows - 4) * stride_; }

 private:
  uint16_t* row_;
  int64_t stride_;
};

class InnerColumns {
 public:
  __device__ InnerColumns(uint16_t* out, const View& view, const Lane& lane)
      : first_(out + lane.n * view.k + lane.k), stride_(view.k) {}

  __device__ void store(int half_step, const uint32_t (&pair)[kLanePairs]) {
    uint16_t* to = first_;
#pragma unroll
    for (int j = 0; j < kLanePairs; ++j) {
      if (half_step == 0) {
        before_[j] = pair[j];
      } else {
        store_global(to, uint2{before_[j], pair[j]});
        to += stride_;
      }
    }
  }
  __device__ void end_step() { first_ += kStepRows; }

 private:
  uint16_t* first_;
  int64_t stride_;
  uint32_t before_[kLanePairs];
};

// How many of a chunk's weights a lane may write: along k from the lane's first on, along n, and in
// the last k of a flat view.
struct LaneExtent {
  int k, n, last_n;

  __device__ LaneExtent(const View& view, const Chunk& chunk, const Lane& lane) {
    const int64_t last = chunk.k + lane.k, first_n = chunk.n + lane.n;
    k = clamp(view.k - last, -1, kTileRows);
    n = clamp(view.n - first_n, 0, kLanePairs);
    last_n = view.is_flat ? clamp(view.size - (view.k - 1) * view.n - first_n, 0, kLanePairs) : n;
  }
  // Of the weights at `ahead` behind the lane's first k.
  __device__ int n_at(int ahead) const { return ahead < k - 1 ? n : ahead == k - 1 ? last_n : 0; }

 private:
  __device__ static int clamp(int64_t x, int low, int high) {
    return x < low ? low : x > high ? high : static_cast<int>(x);
  }
};

// `view` is in shared memory.
class EdgeRows {
 public:
  __device__ EdgeRows(uint16_t* out, const View& view, const Chunk& chunk, const Lane& lane)
      : row_(out + lane.k * view.n + lane.n), stride_(&view.n), extent_(view, chunk, lane) {}

  __device__ void store(int, const uint32_t (&pair)[kLanePairs]) {
    store_row(firsts(pair));
    store_row(seconds(pair));
  }
  __device__ void end_step() { skip(kStepRows - 4); }

 private:
  __device__ void store_row(const uint4& weights) {
    const int count = extent_.n_at(0);
    if (count == kLanePairs && is_aligned(row_)) {
      store_global(row_, weights);
    } else {
      const uint32_t words[4] = {weights.x, weights.y, weights.z, weights.w};
#pragma unroll
      for (int i = 0; i < kLanePairs; ++i) {
        if (i < count)
          store_global(row_ + i, static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2))));
      }
    }
    skip(1);
  }
  __device__ void skip(int rows) {
    row_ += rows * *stride_;
    extent_.k -= rows;
  }

  uint16_t* row_;
  // Read anew for each row: multiples of it, kept in registers by the compiler, spill.
  const volatile int64_t* stride_;
  LaneExtent extent_;
};

class EdgeColumns {
 public:
  __device__ EdgeColumns(uint16_t* out, const View& view, const Chunk& chunk, const Lane& lane)
      : first_(out + lane.n * view.k + lane.k), stride_(&view.k), extent_(view, chunk, lane) {}

  __device__ void store(int, const uint32_t (&pair)[kLanePairs]) {
    uint16_t* to = first_;
#pragma unroll
    for (int j = 0; j < kLanePairs; ++j) {
      // K is even: both weights of a pair are padding or none is.
      if (extent_.k > 0 && j < extent_.n) {
        store_global(to, static_cast<uint16_t>(pair[j]));
        store_global(to + 1, static_cast<uint16_t>(pair[j] >> 16));
      }
      to += *stride_;
    }
    skip(2);
  }
  __device__ void end_step() { skip(kStepRows - 4); }

 private:
  __device__ void skip(int weights) {
    first_ += weights;
    extent_.k -= weights;
  }

  uint16_t* first_;
  const volatile int64_t* stride_;
  LaneExtent extent_;
};

}  // namespace df11::native
