// The CUDA decoder for compute capability 9.0 and up: tensors that are matrices with pairs along
// rows. A warp decodes groups of neighbouring chunks (chunk_group.cuh), two at a time or, where
// there are few, one; what is left over, at edges and where a chunk is not of that kind, it decodes
// as decode_kernel.cuh does. docs/kernel.md explains it.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "common/lanes.cuh"
#include "native/cuda/canonical_codes.cuh"
#include "native/cuda/chunk_group.cuh"
#include "native/cuda/open_slice.cuh"
#include "native/tensor_slices.h"

namespace df11::native {

// How a slice's chunks are groups, and which are left over: those of the last tile along k if that
// is not full, and in the others those at the end that are not full or have no such neighbour.
// Numbers fit in 32 bits, and those of steps in a chunk are 2, 4 and 8: so little is divided, which
// takes long at a block's start.
template <int kChunks>
struct GroupGrid {
  uint32_t batch, steps_k, tiles_k, tiles_n, full_tiles_k, groups_n;

  DF11_HD explicit GroupGrid(const View& view)
      : batch(static_cast<uint32_t>(view.batch)),
        steps_k((static_cast<uint32_t>(view.k) + kStepRows - 1) / kStepRows),
        tiles_n((static_cast<uint32_t>(view.n) + kTileCols - 1) / kTileCols),
        groups_n(static_cast<uint32_t>(view.n) / (kChunks * kTileCols)) {
    const int log2_steps = view.steps / 2 - view.steps / 8;
    tiles_k = (steps_k + view.steps - 1) >> log2_steps;
    full_tiles_k = static_cast<uint32_t>(view.k) / kStepRows >> log2_steps;
  }

  DF11_HD uint32_t chunks() const { return batch * tiles_k * tiles_n; }
  DF11_HD int64_t sign_mantissa_words() const {
    return int64_t{batch * steps_k} * tiles_n * kStepWords;
  }
  DF11_HD uint32_t groups() const { return batch * full_tiles_k * groups_n; }
  DF11_HD uint32_t singles_n() const { return tiles_n - kChunks * groups_n; }
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
      in_one = tile_k * tiles_n + kChunks * groups_n + (at - tile_k * singles_n());
    }
    return b * tiles_k * tiles_n + in_one;
  }
};

// Where a group is in whatever slice.
template <int kChunks>
struct GroupPlace {
  uint32_t chunk;
  int64_t sign_mantissa_word;
  int row, tile;

  __device__ __forceinline__ ChunkGroup<kChunks> of(const Slice& slice, int slice_row) const {
    ChunkGroup<kChunks> group = {
        chunk, slice.sign_mantissa + sign_mantissa_word, slice_row + row, tile, {}};
#pragma unroll
    for (int u = 0; u <= kChunks; ++u) group.offsets[u] = __ldg(slice.chunk_offsets + chunk + u);
    return group;
  }
};
template <int kChunks>
__device__ __forceinline__ GroupPlace<kChunks> place_group(const GroupGrid<kChunks>& grid,
                                                           const View& view, uint32_t group) {
  const uint32_t line = group / grid.groups_n, group_n = group - line * grid.groups_n;
  const uint32_t b = grid.batch == 1 ? 0 : line / grid.full_tiles_k;
  const uint32_t tile_k = line - b * grid.full_tiles_k, first_step = tile_k * view.steps;
  const int64_t step =
      int64_t{b * grid.steps_k + first_step} * grid.tiles_n + kChunks * group_n * view.steps;
  return {(b * grid.tiles_k + tile_k) * grid.tiles_n + kChunks * group_n, step * kStepWords,
          static_cast<int>(b * static_cast<uint32_t>(view.k) + first_step * kStepRows),
          static_cast<int>(kChunks * group_n)};
}

// The tensors of one launch, passed by value in the 4 KB that parameters may take. Numbers of
// chunks fit in 31 bits, so that nothing divides in 64.
inline constexpr int kTensorsPerBulkLaunch = 11;
struct BulkBatch {
  CUtensorMap maps[kTensorsPerBulkLaunch];  // of all batch elements' weights, as one matrix
  TensorSlices tensors[kTensorsPerBulkLaunch];
  // Of each tensor the first of the blocks that decode its groups, and its first single chunk;
  // behind the last tensor's, the end.
  uint32_t first_block[kTensorsPerBulkLaunch + 1];
  uint32_t first_single[kTensorsPerBulkLaunch + 1];
  int count;
  uint32_t zero;  // for after_loads
};
static_assert(sizeof(BulkBatch) <= 4096);

// What a block works on: groups of one slice, or single chunks of one. All its threads find out by
// themselves, so that none waits for another.
template <int kWarps, int kChunks>
struct BulkWork {
  using Grid = GroupGrid<kChunks>;

  uint32_t warp;
  Slice slice;
  Grid grid;
  const uint32_t *header, *codebook;  // of the slice
  int row;                            // of the slice's first weight, in the map's matrix
  uint32_t first, count;              // groups or single chunks of the slice
  uint32_t turn, turns;  // so many blocks take groups of these in turn, of which this is one
  GroupPlace<kChunks> first_group;  // of the warp, if these are groups and it has any
  bool singles;
  int tensor;
  uint32_t at, end;  // what is left to the block of the tensor's groups, or of the launch's singles

  // Each block has groups of one tensor. If that is one slice, its blocks take successive groups,
  // one for each of their warps, in turn, so that what is in work at a time lies close together in
  // memory. Of several slices each block has a contiguous share, so that it meets few of them: it
  // makes a table for each.
  __device__ BulkWork(const BulkBatch& batch, uint32_t warp)
      : warp(warp), grid(batch.tensors[0].view) {
    const uint32_t block = blockIdx.x;
    singles = false;
    tensor = 0;
    at = end = 0;
    turn = 0;
    turns = 1;
    if (block >= batch.first_block[kTensorsPerBulkLaunch]) return;
    // All at once: a loop would wait for each.
#pragma unroll
    for (int i = 1; i < kTensorsPerBulkLaunch; ++i) tensor += block >= batch.first_block[i];
    const TensorSlices& of = batch.tensors[tensor];
    const uint32_t in_slice = Grid(of.view).groups();
    const uint32_t number = block - batch.first_block[tensor];
    const uint32_t blocks = batch.first_block[tensor + 1] - batch.first_block[tensor];
    if (of.batch == 1) {
      end = in_slice;
      turn = number;
      turns = blocks;
    } else {
      take_share(static_cast<uint32_t>(of.batch) * in_slice, number, blocks);
    }
  }

  // Goes on to the next slice; false if nothing is left. Single chunks come last: those take
  // longer.
  __device__ __forceinline__ bool next(const BulkBatch& batch) {
    for (;;) {
      if (at == end) {
        if (singles) return false;
        singles = true;
        tensor = 0;
        take_share(batch.first_single[batch.count], blockIdx.x, gridDim.x);
        continue;
      }
      uint32_t in_tensor = at;
      if (singles) {
        while (at >= batch.first_single[tensor + 1]) ++tensor;
        in_tensor -= batch.first_single[tensor];
      }
      // Nothing above may wait for it, as the head of this loop would.
      const int32_t index = load_here(batch.tensors[0].index);
      const TensorSlices& of = batch.tensors[tensor];
      grid = Grid(of.view);
      const uint32_t in_slice = singles ? grid.singles() : grid.groups();
      const uint32_t b = of.batch == 1 ? 0 : in_tensor / in_slice;
      first = in_tensor - b * in_slice;
      count = end - at < in_slice - first ? end - at : in_slice - first;
      at += count;
      // All tensors of a program's call have the same index.
      const bool known = of.batch == 1 && of.index == batch.tensors[0].index;
      // While the index is on its way: the place of the first slice, from which the index leads to
      // that of the wanted one. Of single chunks the group means nothing.
      first_group = place_group(grid, of.view, first + group_of_round(0));
      first_group.chunk = keep(first_group.chunk);
      first_group.sign_mantissa_word = keep(first_group.sign_mantissa_word);
      row = keep(static_cast<int>(b * of.view.batch * of.view.k));
      header = keep(of.header);
      codebook = keep(of.codebook);
      slice = first_slice(of, b);
      const uint32_t chunks = keep(grid.chunks());
      const int64_t sign_mantissa_words = keep(grid.sign_mantissa_words());
      const int64_t wanted = known ? of.slice_at(0, keep(index)) : of.slice_of(b);
      if (wanted < 0) continue;
      header += wanted * kHeaderWords;
      codebook += wanted * kCodebookWords;
      move_slice(slice, wanted, chunks, sign_mantissa_words);
      return true;
    }
  }

  // The group for the warp, counted from `first`, of the round that begins with group `base`; there
  // is none if that is `count` or more. A round that is not full is spread over all blocks.
  __device__ uint32_t group_of_round(uint32_t base) const {
    return base + (base + turns * kWarps <= count ? turn * kWarps + warp : warp * turns + turn);
  }

 private:
  __device__ void take_share(uint32_t total, uint32_t number, uint32_t shares) {
    const uint32_t share = total / shares, rest = total - share * shares;
    at = number * share + (number < rest ? number : rest);
    end = at + share + (number < rest);
  }
};

// A block's shared memory: its state, the table at an address that is a multiple of the table's
// size, then the warps'.
template <int kWarps>
struct BulkMemory {
  struct State {
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
    return {kBoxes + warp * kWarpBoxBytes, inputs, inputs + kWarpSlotBytes,
            barriers + warp * kWarpBarrierBytes};
  }
};

// Decodes a chunk that is alone, or not of the usual kind.
__device__ inline void decode_single(const Slice& slice, bool sound, uint32_t chunk, Record& record,
                                     StagedRecord* staged, const uint32_t* table,
                                     const Lane& lane) {
  if (!sound || !decode_chunk<false>(slice, chunk, record, staged, table, lane)) {
    poison_chunk<false>(slice, chunk, lane);
  }
}

template <int kWarps, int kChunks>
__global__ void __launch_bounds__(kWarps* kLanes, 1)
    bulk_decode_kernel(const __grid_constant__ BulkBatch batch) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  using Memory = BulkMemory<kWarps>;
  DF11_DYNAMIC_SHARED(memory);
  const uint32_t base_address = shared_address(memory);
  auto& state = *reinterpret_cast<typename Memory::State*>(memory);
  auto* const table = reinterpret_cast<uint32_t*>(memory + (Memory::kTableBytes - base_address));
  const Lane lane(threadIdx.x % kLanes);
  // The same in all lanes, and the compiler knows it.
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / kLanes, 0);
  const WarpMemory warp_memory = Memory::of_warp(shared_address(state.barriers), warp);
  GroupDecoder<kChunks> decoder(warp_memory, lane, batch.zero);
  __syncwarp();
  // Everything waits for it. Behind the fence of the barriers, which could wait for it, too.
  prefetch_global(batch.tensors[0].index);

  TableKey table_of = {};
  BulkWork<kWarps, kChunks> work(batch, warp);
  while (work.next(batch)) {
    uint32_t base = 0, i = work.group_of_round(base);
    const bool groups = !work.singles && i < work.count;
    ChunkGroup<kChunks> group = {};
    if (groups) group = work.first_group.of(work.slice, work.row);
    const CodebookWords codebook = load_codebook(work.codebook, lane.number);
    const SliceHeader header = load_header(work.header);
    if (groups) decoder.begin_slice(work.slice, group, batch.maps[work.tensor]);
    const bool header_sound = header.geometry == batch.tensors[work.tensor].geometry;
    if (header_sound && !table_of.serves(work.codebook, header)) {
      sort_codes(codebook, kMaxCodeBits, state.codes);
      __syncthreads();  // And no warp needs the former table any more.
      const uint32_t* id = header.codebook_id;
      table_of = {work.codebook, {id[0], id[1]}, state.codes.sound};
      if (table_of.sound) {
        fill_table<4>(state.codes, kMaxCodeBits,
                      [&](uint32_t index, uint32_t entry) { table[index] = entry; });
      }
      __syncthreads();
    }
    const bool sound =
        header_sound && table_of.sound && state.codes.fit_in(batch.tensors[work.tensor].code_bits);
    if (groups) {
      const CUtensorMap& map = batch.maps[work.tensor];
      for (bool more = true; more;) {
        base += work.turns * kWarps;
        i = work.group_of_round(base);
        more = i < work.count;
        ChunkGroup<kChunks> next = {};
        if (more) {
          next = place_group(work.grid, work.slice.view, work.first + i).of(work.slice, work.row);
        }
        if (!decoder.decode(work.slice, group, next, more, map, Memory::kTableBytes, sound)) {
          for (int u = 0; u < kChunks; ++u) {
            decode_single(work.slice, sound, group.chunk + u, state.records[warp], nullptr, table,
                          lane);
          }
        }
        group = next;
      }
    } else if (work.singles) {
      // No copy is under way: their place serves to stage single records.
      auto* staged = reinterpret_cast<StagedRecord*>(memory + (warp_memory.records - base_address));
      for (uint32_t single = warp; single < work.count; single += kWarps) {
        const uint32_t chunk = work.grid.chunk_of_single(work.first + single);
        decode_single(work.slice, sound, chunk, state.records[warp], staged, table, lane);
      }
    }
  }
  wait_stores_read<0>();  // Shared memory is others' then; the kernel ends when all is stored.
#endif
}

}  // namespace df11::native
