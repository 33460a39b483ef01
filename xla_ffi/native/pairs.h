// Weights in, pairs out: what the encoder reads, and counts to choose a codebook. Host only.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

#include "common/bits.h"
#include "common/parallel.h"
#include "native/layout.h"

namespace df11::native {

// Chunks that one thread takes at a time.
inline constexpr int64_t kEncodeBatch = 64;

DF11_INLINE int pair_row(int half_step, int t) {
  return half_step / 2 * kStepRows + 4 * t + 2 * (half_step % 2);
}

// Fetches the weights of a half-step, whose rows are too far from each other for the hardware to
// guess; and often by a power of two, so that they would compete for places in the first cache.
// Addresses past the end are harmless.
DF11_INLINE void prefetch_half_step(const uint16_t* weights, const View& view, const Chunk& chunk,
                                    int half_step) {
  for (int t = 0; t < 4; ++t) {
    const uint16_t* row = weights + (chunk.row + pair_row(half_step, t)) * view.cols + chunk.col;
    for (const uint16_t* of : {row, row + view.cols}) {
      for (int i = 0; i < kTileCols; i += 32) __builtin_prefetch(of + i, 0, 2);
      __builtin_prefetch(of + kTileCols - 1, 0, 2);  // numpy's arrays begin within a cache line
    }
  }
}

// Whether a tile's row of the view, and the next one, are free of padding.
DF11_INLINE bool are_inside(const View& view, int64_t row, int64_t col) {
  return col + kTileCols <= view.cols && (row + 1) * view.cols + col + kTileCols <= view.size;
}

// The weights of a half-step's pairs, by grid places, with padding filled by `pad`.
DF11_INLINE void load_half_step(const uint16_t* weights, const View& view, const Chunk& chunk,
                                int half_step, uint16_t pad, uint16_t* __restrict rows,
                                uint16_t* __restrict next_rows) {
  const auto at = [&](int64_t row, int64_t col) {
    const bool inside = col < view.cols && row * view.cols + col < view.size;
    return inside ? weights[row * view.cols + col] : pad;
  };
  for (int t = 0; t < 4; ++t, rows += kTileCols, next_rows += kTileCols) {
    const int64_t row = chunk.row + pair_row(half_step, t);
    if (are_inside(view, row, chunk.col)) {
      const uint16_t* first = weights + row * view.cols + chunk.col;
      std::memcpy(rows, first, 2 * kTileCols);
      std::memcpy(next_rows, first + view.cols, 2 * kTileCols);
      continue;
    }
    for (int i = 0; i < kTileCols; ++i) {
      rows[i] = at(row, chunk.col + i);
      next_rows[i] = at(row + 1, chunk.col + i);
    }
  }
}

// Counts pairs of exponents, leaving out row pairs at the edges, which may hold padding. Of a
// large slice only a sample of about 2^20 pairs is counted: pairs that it misses are patched.
// Chunks are picked by a hash, so that no regularity of the tensor can hide from it.
inline std::vector<uint32_t> count_pairs(const uint16_t* weights, const View& view, int threads) {
  const uint32_t one_in = static_cast<uint32_t>(std::max<int64_t>(1, view.size >> 21));
  std::vector<int64_t> sample;
  for (int64_t c = 0; c < view.chunks(); ++c) {
    if (checksum_chunk(c) % one_in == 0) sample.push_back(c);
  }
  const int64_t size = sample.size(), batches = (size + kEncodeBatch - 1) / kEncodeBatch;
  // Two tables, used in turn: a pair often equals its neighbour, and a counter that was just
  // stored is slow to load.
  std::vector<std::vector<uint32_t>> tables(
      std::max<int64_t>(1, std::min<int64_t>(threads, batches)));
  std::atomic<int64_t> next{0};
  parallel_for(tables.size(), threads, [&](int64_t slot) {
    std::vector<uint32_t>& counts = tables[slot];
    counts.assign(2 * 65536, 0);
    uint16_t at[kTileCols];
    for (int64_t batch; (batch = next.fetch_add(1)) < batches;) {
      const int64_t end = std::min((batch + 1) * kEncodeBatch, size);
      for (int64_t i = batch * kEncodeBatch; i < end; ++i) {
        const Chunk chunk = locate_chunk(view, sample[i]);
        const Chunk following = locate_chunk(view, sample[std::min(i + 1, size - 1)]);
        for (int half_step = 0; half_step < 2 * chunk.steps; ++half_step) {
          prefetch_half_step(weights, view, following, half_step);
          for (int t = 0; t < 4; ++t) {
            const int64_t row = chunk.row + pair_row(half_step, t);
            if (!are_inside(view, row, chunk.col)) continue;
            const uint16_t* first = weights + row * view.cols + chunk.col;
            for (int k = 0; k < kTileCols; ++k) {
              at[k] = exponent_index(first[k], first[view.cols + k]);
            }
            for (int k = 0; k < kTileCols; k += 2) {
              ++counts[at[k]];
              ++counts[65536 + at[k + 1]];
            }
          }
        }
      }
    }
  });
  std::vector<uint32_t>& total = tables[0];
  for (int i = 0; i < 65536; ++i) total[i] += total[65536 + i];
  total.resize(65536);
  for (size_t slot = 1; slot < tables.size(); ++slot) {
    const std::vector<uint32_t>& counts = tables[slot];
    for (int i = 0; i < 65536; ++i) total[i] += counts[i] + counts[65536 + i];
  }
  return std::move(total);
}

}  // namespace df11::native
