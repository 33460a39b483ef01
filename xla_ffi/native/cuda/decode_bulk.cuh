// The CUDA decoder for compute capability 9.0 and up: tensors that are matrices with pairs along
// rows. A warp decodes pairs of neighbouring chunks (chunk_pair.cuh); what is left over, at edges
// and where a chunk is not of that kind, it decodes as decode_kernel.cuh does. docs/kernel.md
// explains it.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "native/cuda/canonical_codes.cuh"
#include "native/cuda/chunk_pair.cuh"
#include "native/cuda/open_slice.cuh"
#include "native/tensor_slices.h"

namespace df11::native {

// How a slice's chunks are pairs, and which are left over: those of the last tile along k if that
// is not full, and in the others those at the end that have no full neighbour.
struct PairGrid {
  uint32_t batch, tiles_k, tiles_n, full_tiles_k, pairs_n;

  DF11_HD explicit PairGrid(const View& view)
      : batch(static_cast<uint32_t>(view.batch)),
        tiles_k(static_cast<uint32_t>(view.tiles_k())),
        tiles_n(static_cast<uint32_t>(view.tiles_n())),
        full_tiles_k(static_cast<uint32_t>(divide(view.k, kStepRows * view.steps))),
        pairs_n(static_cast<uint32_t>(view.n / (2 * kTileCols))) {}

  DF11_HD uint32_t pairs() const { return batch * full_tiles_k * pairs_n; }
  DF11_HD uint32_t singles_n() const { return tiles_n - 2 * pairs_n; }
  // Of one of the batch.
  DF11_HD uint32_t singles_of_one() const {
    return full_tiles_k * singles_n() + (tiles_k - full_tiles_k) * tiles_n;
  }
  DF11_HD uint32_t singles() const { return batch * singles_of_one(); }

  DF11_HD uint32_t chunk_of_single(uint32_t single) const {
    const uint32_t b = batch == 1 ? 0 : single / singles_of_one();
    const uint32_t at = single - b * singles_of_one(), in_full = full_tiles_k * singles_n();
    uint32_t in_one = full_tiles_k * tiles_n + (at - in_full);
    if (at < in_full) {
      const uint32_t tile_k = at / singles_n();
      in_one = tile_k * tiles_n + 2 * pairs_n + (at - tile_k * singles_n());
    }
    return b * tiles_k * tiles_n + in_one;
  }
};

// The tensors of one launch, passed by value in the 4 KB that parameters may take. Numbers of
// chunks fit in 31 bits, so that nothing divides in 64.
inline constexpr int kTensorsPerBulkLaunch = 11;
struct BulkBatch {
  CUtensorMap maps[kTensorsPerBulkLaunch];  // of all batch elements' weights, as one matrix
  TensorSlices tensors[kTensorsPerBulkLaunch];
  // Of each tensor the first pair and the first single chunk; the last is the end.
  uint32_t first[2][kTensorsPerBulkLaunch + 1];
  int count;
  uint32_t zero;  // for after_loads
};
static_assert(sizeof(BulkBatch) <= 4096);

// What a block works on: successive pairs of one slice, or successive single chunks. In shared
// memory.
struct BulkAssignment {
  Slice slice;
  uint32_t first, count;  // pairs or single chunks of the slice; no count if nothing is left
  int row;                // of the slice's first weight, in the map's matrix
  bool singles;
  bool header_sound, new_table;
  TableKey table;
  uint32_t at, end;  // what is left to the block of the launch's pairs or single chunks
  int tensor;        // the next to look at
};

// Each block has its share of the pairs, and then its share of the single chunks: those take
// longer.
__device__ inline void take_share(const BulkBatch& batch, bool singles, BulkAssignment& work) {
  const uint32_t total = batch.first[singles][batch.count], block = blockIdx.x;
  const uint32_t share = total / gridDim.x, rest = total - share * gridDim.x;
  work.singles = singles;
  work.at = block * share + (block < rest ? block : rest);
  work.end = work.at + share + (block < rest);
  work.tensor = 0;
}

__device__ inline void next_assignment(const BulkBatch& batch, BulkAssignment& work) {
  for (;;) {
    work.count = 0;
    if (work.at == work.end) {
      if (work.singles) return;
      take_share(batch, true, work);
      continue;
    }
    const uint32_t* first = batch.first[work.singles];
    while (work.at >= first[work.tensor + 1]) ++work.tensor;
    const TensorSlices& tensor = batch.tensors[work.tensor];
    const PairGrid grid(tensor.view);
    const uint32_t in_slice = work.singles ? grid.singles() : grid.pairs();
    const uint32_t in_tensor = work.at - first[work.tensor];
    const uint32_t b = tensor.batch == 1 ? 0 : in_tensor / in_slice;
    work.first = in_tensor - b * in_slice;
    const uint32_t left = work.end - work.at;
    work.count = left < in_slice - work.first ? left : in_slice - work.first;
    work.at += work.count;
    work.row = static_cast<int>(b * tensor.view.batch * tensor.view.k);
    const OpenSlice opened = open_slice(tensor, b, work.slice, work.table);
    work.header_sound = opened.header_sound;
    work.new_table = opened.new_table;
    if (!opened.skipped) return;
  }
}

__device__ inline ChunkPair locate_pair(const Slice& slice, const PairGrid& grid, int slice_row,
                                        uint32_t pair) {
  const View& view = slice.view;
  const uint32_t row = pair / grid.pairs_n, pair_n = pair - row * grid.pairs_n;
  const uint32_t b = grid.batch == 1 ? 0 : row / grid.full_tiles_k;
  const uint32_t tile_k = row - b * grid.full_tiles_k;
  const uint32_t chunk = (b * grid.tiles_k + tile_k) * grid.tiles_n + 2 * pair_n;
  const int64_t step =
      (b * view.steps_k() + tile_k * view.steps) * grid.tiles_n + int64_t{2} * pair_n * view.steps;
  const int k = static_cast<int>(b * view.k) + static_cast<int>(tile_k) * view.steps * kStepRows;
  const uint32_t* offsets = slice.chunk_offsets + chunk;
  return {chunk,
          slice.sign_mantissa + step * kStepWords,
          slice_row + k,
          static_cast<int>(2 * pair_n),
          {__ldg(offsets), __ldg(offsets + 1), __ldg(offsets + 2)}};
}

// A block's shared memory: its state, the table at an address that is a multiple of the table's
// size, then the warps'.
template <int kWarps>
struct BulkMemory {
  struct State {
    BulkAssignment work;
    CanonicalCodes codes;
    Record records[kWarps];
    uint64_t barriers[4 * kWarps];
  };
  static constexpr uint32_t kTableBytes = 4 * kTableSize;
  static constexpr uint32_t kBoxes = 2 * kTableBytes;
  static constexpr uint32_t kInputs = kBoxes + kWarps * kWarpBoxBytes;
  // An address; dynamic shared memory begins at 0 or a little behind.
  static constexpr uint32_t kEnd = kInputs + kWarps * kWarpInputBytes;
  static constexpr uint32_t kMostReserved = 1024;
  static_assert(kMostReserved + sizeof(State) <= kTableBytes);

  __device__ static WarpMemory of_warp(uint32_t barriers, int warp) {
    const uint32_t inputs = kInputs + warp * kWarpInputBytes;
    return {kBoxes + warp * kWarpBoxBytes, inputs, inputs + 4 * kStepBytes,
            barriers + warp * kWarpBarrierBytes};
  }
};

// Decodes a pair's chunks that are not of the usual kind.
__device__ inline void decode_single(const BulkAssignment& work, uint32_t chunk, Record& record,
                                     StagedRecord* staged, const uint32_t* table,
                                     const Lane& lane) {
  const bool sound = work.header_sound && work.table.sound;
  if (!sound || !decode_chunk<false>(work.slice, chunk, record, staged, table, lane)) {
    poison_chunk<false>(work.slice, chunk, lane);
  }
}

template <int kWarps>
__global__ void __launch_bounds__(kWarps* kLanes, 1)
    bulk_decode_kernel(const __grid_constant__ BulkBatch batch) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  using Memory = BulkMemory<kWarps>;
  DF11_DYNAMIC_SHARED(memory);
  const uint32_t base = shared_address(memory);
  auto& state = *reinterpret_cast<typename Memory::State*>(memory);
  auto* const table = reinterpret_cast<uint32_t*>(memory + (Memory::kTableBytes - base));
  BulkAssignment& work = state.work;
  const Lane lane(threadIdx.x % kLanes);
  // The same in all lanes, and the compiler knows it.
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / kLanes, 0);
  const WarpMemory warp_memory = Memory::of_warp(shared_address(state.barriers), warp);
  PairDecoder decoder(warp_memory, lane, batch.zero);

  if (threadIdx.x == 0) {
    work.table = {};
    take_share(batch, false, work);
  }
  for (;;) {
    __syncthreads();  // No warp needs the former assignment, or its table, any more.
    if (threadIdx.x == 0) next_assignment(batch, work);
    __syncthreads();
    if (work.count == 0) break;
    const PairGrid grid(work.slice.view);
    uint32_t i = warp;
    const bool pairs = !work.singles && i < work.count;
    ChunkPair pair = {};
    if (pairs) {
      pair = locate_pair(work.slice, grid, work.row, work.first + i);
      decoder.begin_slice(work.slice, pair);
    }
    if (work.new_table) {
      sort_codes(work.table.codebook, kMaxCodeBits, state.codes);
      __syncthreads();
      if (threadIdx.x == 0) work.table.sound = state.codes.sound;
      if (state.codes.sound) {
        fill_table<4>(state.codes, kMaxCodeBits,
                      [&](uint32_t index, uint32_t entry) { table[index] = entry; });
      }
      __syncthreads();
    }
    const bool sound = work.header_sound && work.table.sound;
    if (pairs) {
      const CUtensorMap& map = batch.maps[work.tensor];
      for (bool more = true; more; i += kWarps) {
        more = i + kWarps < work.count;
        ChunkPair next = {};
        if (more) next = locate_pair(work.slice, grid, work.row, work.first + i + kWarps);
        const uint32_t left_over =
            decoder.decode(work.slice, pair, next, more, map, Memory::kTableBytes, sound);
        for (uint32_t u = 0; u < 2 && left_over; ++u) {
          decode_single(work, pair.chunk + u, state.records[warp], nullptr, table, lane);
        }
        pair = next;
      }
    } else if (work.singles) {
      // No copy is under way: their place serves to stage single records.
      auto* staged = reinterpret_cast<StagedRecord*>(memory + (warp_memory.records - base));
      for (; i < work.count; i += kWarps) {
        const uint32_t chunk = grid.chunk_of_single(work.first + i);
        decode_single(work, chunk, state.records[warp], staged, table, lane);
      }
    }
  }
  wait_stores();
#endif
}

}  // namespace df11::native
