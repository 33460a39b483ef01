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
#include "native/prefetch.h"
#include "native/transpose.h"

namespace df11::native {

// Chunks that one thread takes at a time.
inline constexpr int64_t kEncodeBatch = 64;

DF11_INLINE int pair_row(int half_step, int t) {
  return half_step / 2 * kStepRows + 4 * t + 2 * (half_step % 2);
}

// How many of a chunk's k and n are no padding; of a flat view's last k, only some n are.
struct Extent {
  int64_t k, n, last_n;

  Extent(const View& view, const Chunk& chunk)
      : k(std::min<int64_t>(view.k - chunk.k, chunk.steps * kStepRows)),
        n(std::min<int64_t>(view.n - chunk.n, kTileCols)),
        last_n(n) {
    if (view.is_flat && chunk.k + k == view.k) last_n = view.size - (view.k - 1) * kTileCols;
  }
  DF11_INLINE int64_t n_of(int64_t row) const {
    return row < k - 1 ? n : row == k - 1 ? last_n : 0;
  }
  DF11_INLINE bool is_whole(const Chunk& chunk) const {
    return k == chunk.steps * kStepRows && n == kTileCols && last_n == kTileCols;
  }
};

// Where the weights of a chunk are: (k, n) at k * stride + n.
struct ChunkRows {
  const uint16_t* first;
  int64_t stride;
};

// The weights of a chunk; those of a view along columns are put into `tile`.
inline ChunkRows chunk_rows(const uint16_t* weights, const View& view, const Chunk& chunk,
                            uint16_t* tile) {
  const uint16_t* first = weights + chunk.element;
  if (!view.along_columns) return {first, view.n};
  const Extent extent(view, chunk);
  transpose(first, view.k, extent.n, extent.k, tile, kTileCols);
  return {tile, kTileCols};
}

// Room for a half-step's weights, by grid places.
struct HalfStepWeights {
  alignas(64) uint16_t row[kHalfStepPairs];
  alignas(64) uint16_t next_row[kHalfStepPairs];
};

// Where the weights of a half-step's pairs are: those of grid row t in rows k and k + 1.
struct HalfStepRows {
  const uint16_t* row[4];
  const uint16_t* next_row[4];
};

// Finds the rows of a half-step; those with padding are copied, and it is filled by `pad`.
DF11_INLINE HalfStepRows half_step_rows(const ChunkRows& chunk, const Extent& extent, int half_step,
                                        uint16_t pad, HalfStepWeights& copies) {
  HalfStepRows rows;
  for (int t = 0; t < 4; ++t) {
    const int k = pair_row(half_step, t);
    rows.row[t] = chunk.first + k * chunk.stride;
    rows.next_row[t] = rows.row[t] + chunk.stride;
    if (extent.n_of(k + 1) == kTileCols) continue;
    const auto copy = [&](const uint16_t*& row, int64_t count, uint16_t* to) {
      std::memcpy(to, row, 2 * count);
      std::fill(to + count, to + kTileCols, pad);
      row = to;
    };
    copy(rows.row[t], extent.n_of(k), copies.row + t * kTileCols);
    copy(rows.next_row[t], extent.n_of(k + 1), copies.next_row + t * kTileCols);
  }
  return rows;
}

// Counts pairs of exponents, leaving out those with padding. Of a
// large slice only a sample of about 2^19 pairs is counted: pairs that it misses are patched.
// Chunks are picked by a hash, so that no regularity of the tensor can hide from it.
inline std::vector<uint32_t> count_pairs(const uint16_t* weights, const View& view, int threads) {
  const uint32_t one_in = static_cast<uint32_t>(std::max<int64_t>(1, view.size >> 20));
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
    HalfStepWeights padded;
    uint16_t indices[kTileCols];
    uint16_t tile[kTileRows * kTileCols];
    for (int64_t batch; (batch = next.fetch_add(1)) < batches;) {
      const int64_t end = std::min((batch + 1) * kEncodeBatch, size);
      for (int64_t i = batch * kEncodeBatch; i < end; ++i) {
        const Chunk chunk = locate_chunk(view, sample[i]);
        const Chunk following = locate_chunk(view, sample[std::min(i + 1, size - 1)]);
        const WeightsAhead weights_ahead(weights, view, following, 2 * chunk.steps);
        const Extent extent(view, chunk);
        const ChunkRows source = chunk_rows(weights, view, chunk, tile);
        for (int half_step = 0; half_step < 2 * chunk.steps; ++half_step) {
          prefetch(weights_ahead, half_step);
          const HalfStepRows rows = half_step_rows(source, extent, half_step, 0, padded);
          for (int t = 0; t < 4; ++t) {
            for (int k = 0; k < kTileCols; ++k) {
              indices[k] = exponent_index(rows.row[t][k], rows.next_row[t][k]);
            }
            const int64_t count = extent.n_of(pair_row(half_step, t) + 1);
            for (int64_t k = 0; k + 1 < count; k += 2) {
              ++counts[indices[k]];
              ++counts[65536 + indices[k + 1]];
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
