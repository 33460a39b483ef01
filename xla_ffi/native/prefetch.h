// What the CPU codec fetches ahead, since the hardware's prefetchers stop at page boundaries and do
// not guess rows that are far from each other. Addresses past the end are harmless. Host only.
#pragma once

#include <cstdint>
#include <utility>

#include "native/layout.h"

namespace df11::native {

DF11_INLINE void prefetch(const uint32_t* words, int count) {
  for (int i = 0; i < count; i += 16) __builtin_prefetch(words + i, 0, 2);
}

// A chunk's weights in memory, fetched in so many parts, of equally many rows each.
struct WeightsAhead {
  const uint16_t* first;
  int64_t stride;
  int columns, rows;  // of a part; along columns, a row is one n, and its columns k

  WeightsAhead(const uint16_t* weights, const View& view, const Chunk& chunk, int parts)
      : first(weights + chunk.element), stride(view.n), columns(kTileCols) {
    int all_rows = chunk.steps * kStepRows;
    if (view.along_columns) {
      stride = view.k;
      std::swap(columns, all_rows);
    }
    rows = (all_rows + parts - 1) / parts;
  }
};

// Not into the first cache: rows are often a power of two apart, and would compete for its places.
DF11_INLINE void prefetch(const WeightsAhead& weights, int part) {
  const uint16_t* row = weights.first + part * weights.rows * weights.stride;
  for (int k = 0; k < weights.rows; ++k, row += weights.stride) {
    for (int i = 0; i < weights.columns; i += 32) __builtin_prefetch(row + i, 0, 2);
    // numpy's arrays begin within a cache line.
    __builtin_prefetch(row + weights.columns - 1, 0, 2);
  }
}

}  // namespace df11::native
