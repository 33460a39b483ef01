// Weights in, pairs out: what the encoder reads, and counts to choose a codebook. Host only.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "layout.h"
#include "parallel.h"

namespace df11 {

// Chunks that one thread takes at a time.
inline constexpr int64_t kEncodeBatch = 64;

// Index of a pair's exponents in a table of 65,536 entries.
DF11_INLINE uint16_t exponent_index(uint32_t pair) {
  return static_cast<uint16_t>((pair << 1 & 0xff00u) | (pair >> 23 & 0xffu));
}

// Fetches a row of the next tile: too far from this tile's for the hardware to guess.
DF11_INLINE void prefetch_weights(const uint16_t* row) {
  for (int i = 0; i < kTileCols; i += 32) __builtin_prefetch(row + i);
}

// The pairs of grid row t of a half-step, whose first row in the view is `row`: `col` is
// the tile's first column. Returns false, with padding filled by `pad`, at the view's edge.
inline bool load_pairs(const uint16_t* weights, const View& view, int64_t row, int64_t col,
                       uint32_t pad, uint32_t* __restrict pairs) {
  if (col + kTileCols <= view.cols && (row + 1) * view.cols + col + kTileCols <= view.size) {
    const uint16_t* __restrict first = weights + row * view.cols + col;
    const uint16_t* __restrict second = first + view.cols;
    prefetch_weights(first + kTileCols);
    prefetch_weights(second + kTileCols);
    for (int i = 0; i < kTileCols; ++i) pairs[i] = first[i] | uint32_t{second[i]} << 16;
    return true;
  }
  const auto at = [&](int64_t r, int64_t c) -> uint32_t {
    return c < view.cols && r * view.cols + c < view.size ? weights[r * view.cols + c] : pad;
  };
  for (int i = 0; i < kTileCols; ++i) {
    pairs[i] = at(row, col + i) | at(row + 1, col + i) << 16;
  }
  return false;
}

DF11_INLINE int64_t pair_row(int half_step, int t) {
  return half_step / 2 * kStepRows + 4 * t + 2 * (half_step % 2);
}

// Counts pairs of exponents, leaving out row pairs at the edges, which may hold padding. Of a
// large slice only a sample of about 2^20 pairs is counted: pairs that it misses are patched.
// Chunks are picked by a hash, so that no regularity of the tensor can hide from it.
inline std::vector<uint64_t> count_pairs(const uint16_t* weights, const View& view, int threads) {
  const uint32_t one_in = static_cast<uint32_t>(std::max<int64_t>(1, view.size >> 21));
  const int64_t batches = (view.chunks() + kEncodeBatch - 1) / kEncodeBatch;
  std::vector<std::vector<uint32_t>> partial(std::min<int64_t>(threads, batches));
  std::atomic<int64_t> next{0};
  parallel_for(partial.size(), threads, [&](int64_t slot) {
    // Two tables, used in turn: a pair often equals its neighbour, and a counter that was
    // just stored is slow to load.
    std::vector<uint32_t>& counts = partial[slot];
    counts.assign(2 * 65536, 0);
    uint32_t pairs[kTileCols];
    uint16_t at[kTileCols];
    for (int64_t batch; (batch = next.fetch_add(1)) < batches;) {
      const int64_t end = std::min((batch + 1) * kEncodeBatch, view.chunks());
      for (int64_t c = batch * kEncodeBatch; c < end; ++c) {
        if (checksum_chunk(c) % one_in != 0) continue;
        const Chunk chunk = locate_chunk(view, c);
        for (int half_step = 0; half_step < 2 * chunk.steps; ++half_step) {
          for (int t = 0; t < 4; ++t) {
            const int64_t row = chunk.row + pair_row(half_step, t);
            if (!load_pairs(weights, view, row, chunk.col, 0, pairs)) continue;
            for (int i = 0; i < kTileCols; ++i) at[i] = exponent_index(pairs[i]);
            for (int i = 0; i < kTileCols; i += 2) {
              ++counts[at[i]];
              ++counts[65536 + at[i + 1]];
            }
          }
        }
      }
    }
  });
  std::vector<uint64_t> total(65536, 0);
  for (const std::vector<uint32_t>& counts : partial) {
    for (int i = 0; i < 65536; ++i) total[i] += uint64_t{counts[i]} + counts[65536 + i];
  }
  return total;
}

}  // namespace df11
