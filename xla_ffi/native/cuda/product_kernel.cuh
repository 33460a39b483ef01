// The CUDA product y = x W: weights are decoded in registers, in the order in which tensor cores
// take them, and are never in memory. docs/kernel.md explains it and counts its instructions.
//
// A warp works on items, a few chunks below each other, one step of 16 k after the other; an item's
// sums go to the workspace, and whoever brings the last ones of a column adds them up. So in
// which order numbers are added depends on the matrix alone: not on the rows of x, on the number of
// warps or blocks, or on what else is in the launch.
//
// Nothing in a payload is trusted: nothing is read out of bounds and no copy is waited for that was
// not issued, whatever it holds. Where a chunk is corrupt, its columns become NaN.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/async_copies.cuh"
#include "common/lanes.cuh"
#include "common/tensor_core.cuh"
#include "native/cuda/lookup_table.cuh"
#include "native/cuda/product_sources.cuh"
#include "native/cuda/product_sums.cuh"
#include "native/cuda/product_work.h"

namespace df11::native {

// A slice of a matrix, which a block works on. Its pointers are computed where they are needed, to
// leave the registers to the inner loop.
struct Slice {
  const MatrixWork& matrix;
  int number;

  __device__ const uint32_t* header() const {
    return matrix.header + int64_t{number} * kHeaderWords;
  }
  __device__ const uint32_t* codebook() const {
    return matrix.codebook + int64_t{number} * kCodebookWords;
  }
  __device__ const uint32_t* chunk_offsets() const {
    return matrix.chunk_offsets + int64_t{number} * (matrix.chunks + 1);
  }
  __device__ const uint32_t* exponents() const {
    return matrix.exponents + int64_t{number} * matrix.exponents_words;
  }
  // Steps are counted over all slices.
  __device__ uint32_t first_step() const {
    return static_cast<uint32_t>(number) * (matrix.steps_k * matrix.tiles_n);
  }
};

// A chunk: where its bytes are, and what is computed of it.
struct ProductChunk {
  int k_and_steps;  // its first k, a multiple of 16, and its steps: 0 if there is no chunk
  int item;         // that it is of
  bool ends_item;
  uint32_t first_step;    // in sign_mantissa
  uint32_t begin, words;  // of the record; no words if its offsets are wrong

  __device__ int k() const { return k_and_steps & ~(kStepRows - 1); }
  __device__ int steps() const { return k_and_steps & (kStepRows - 1); }
  // Words from one multiple of 16 bytes to another that hold the record.
  __device__ uint32_t padded_words() const { return ((begin + words + 3) & ~3u) - (begin & ~3u); }
  __device__ bool is_staged(const ProductMemory& memory) const {
    return words >= kRecordHeaderWords && padded_words() <= memory.record_words;
  }
};

// A warp's way through its items.
class ChunkCursor {
 public:
  __device__ ChunkCursor(const MatrixWork& matrix, int first_item, int end_item)
      : item_(first_item), end_item_(end_item) {
    column_ = item_ / matrix.column_items;
    part_ = item_ - column_ * matrix.column_items;
    enter(matrix);
  }

  __device__ void next(const Slice& slice, ProductChunk& chunk) {
    const MatrixWork& matrix = slice.matrix;
    chunk.k_and_steps = 0;
    if (item_ == end_item_) return;
    const uint32_t* offsets = slice.chunk_offsets() + (row_ * matrix.tiles_n + column_);
    chunk.begin = __ldg(offsets);
    const uint32_t end = __ldg(offsets + 1);
    chunk.words = chunk.begin <= end && end <= matrix.exponents_words ? end - chunk.begin : 0;
    const int step = row_ * matrix.steps;
    const int steps = min(matrix.steps, matrix.steps_k - step);
    chunk.k_and_steps = step * kStepRows | steps;
    chunk.item = item_;
    chunk.first_step = slice.first_step() + step * matrix.tiles_n + column_ * steps;
    chunk.ends_item = ++row_ == row_end_;
    if (!chunk.ends_item) return;
    ++item_;
    if (++part_ == matrix.column_items) {
      part_ = 0;
      ++column_;
    }
    enter(matrix);
  }

 private:
  __device__ void enter(const MatrixWork& matrix) {
    row_ = part_ * matrix.item_chunks;
    row_end_ = min(row_ + matrix.item_chunks, matrix.tiles_k);
  }

  int item_, end_item_, column_, part_, row_, row_end_;
};

// The copies of a warp: of two steps' signs and mantissas, and of one or two records.
class WarpCopies {
 public:
  __device__ WarpCopies(uint32_t memory, const ProductMemory& plan)
      : memory_(memory),
        barriers_(memory + kSlots * kSlotBytes),
        record_bytes_(plan.record_bytes) {}

  __device__ void initialize() {
    if (elect_lane()) {
      for (int i = 0; i < 4; ++i) init_barrier(barriers_ + 8 * i);
      fence_barriers();
    }
    __syncwarp();
  }
  __device__ __forceinline__ void fetch_step(int slot, const MatrixWork& matrix, uint32_t number) {
    if (elect_lane()) {
      expect_bytes(barriers_ + 8 * slot, kSlotBytes);
      copy_to_shared(step(slot), matrix.sign_mantissa + int64_t{number} * kStepWords, kSlotBytes,
                     barriers_ + 8 * slot);
    }
  }
  __device__ void fetch_record(int buffer, const Slice& slice, const ProductChunk& chunk) {
    if (elect_lane()) {
      const uint32_t bytes = 4 * chunk.padded_words(), barrier = barriers_ + 8 * (kSlots + buffer);
      expect_bytes(barrier, bytes);
      copy_to_shared(record(buffer), slice.exponents() + (chunk.begin & ~3u), bytes, barrier);
    }
  }
  __device__ __forceinline__ void wait_for_step(int slot) { wait(slot); }
  __device__ void wait_for_record(int buffer) { wait(kSlots + buffer); }

  __device__ uint32_t step(int slot) const { return memory_ + slot * kSlotBytes; }
  __device__ uint32_t record(int buffer) const {
    return barriers_ + kBarrierBytes + buffer * record_bytes_;
  }

 private:
  __device__ __forceinline__ void wait(int barrier) {
    wait_for_phase(barriers_ + 8 * barrier, phases_ >> barrier & 1);
    phases_ ^= 1u << barrier;
  }

  uint32_t memory_, barriers_, record_bytes_;
  uint32_t phases_ = 0;  // a bit a barrier
};

// Multiplies a chunk: the inner loop. Meanwhile signs and mantissas of the steps after these are
// fetched, and x.
template <int kTiles, typename Pairs, typename Record>
__device__ __forceinline__ void multiply_chunk(Pairs pairs, Patches<Record> patches,
                                               WarpCopies& copies, const MatrixWork& matrix,
                                               const RowsOfX<kTiles>& x, uint2 (&next_x)[kTiles],
                                               const ProductChunk& chunk, const ProductChunk& next,
                                               int k_end, int lane, float (&sums)[kTiles][4][4]) {
  const int end = chunk.k() + chunk.steps() * kStepRows;
  uint32_t fetched = chunk.first_step + kSlots;
#pragma unroll 1
  for (int k = chunk.k(); k < end;) {
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      if (slot > 0 && k == end) break;
      uint2 this_x[kTiles];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) this_x[tile] = next_x[tile];
      x.load(k + kStepRows < end ? k + kStepRows : next.k(), next_x);

      copies.wait_for_step(slot);
      const uint32_t at = copies.step(slot) + 4 * lane_word(lane);
      const uint4 half0 = load_shared4(at), half1 = load_shared4(at + 4 * kHalfStepWords);
      __syncwarp();  // All lanes have read it.
      const bool own = k + kSlots * kStepRows < end;
      if (own || slot < next.steps()) {
        copies.fetch_step(slot, matrix, own ? fetched : next.first_step + slot);
      }
      ++fetched;

      const uint32_t words[2][4] = {{half0.x, half0.y, half0.z, half0.w},
                                    {half1.x, half1.y, half1.z, half1.w}};
      uint32_t weights[4][4];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          uint32_t entry0, entry1;
          pairs.next_two(j, entry0, entry1);
          const uint32_t word = words[half][j];
          weights[j][2 * half] = select_bits<kSignMantissa>(entry0, word);
          weights[j][2 * half + 1] =
              select_bits<kSignMantissa>(entry1, __funnelshift_l(word, word, 8));
        }
        pairs.end_half_step();
      }
      if (patches.are_in(k)) patches.apply(k_end, lane, weights);
      multiply_add(sums, weights, this_x);
      k += kStepRows;
    }
  }
  // The second slot was not used, and nobody has fetched the next chunk's step for it.
  if (chunk.steps() == 1 && next.steps() > 1) copies.fetch_step(1, matrix, next.first_step + 1);
}

// A record's kind, kNone if it is corrupt; where the lane's stream starts, and the number of
// patches.
template <typename Record>
__device__ __forceinline__ GlobalPairs::Kind open_record(const Record& record,
                                                         const ProductChunk& chunk, int lane,
                                                         uint32_t& start, uint32_t& patches) {
  const uint32_t counts = record.word(1);
  const uint32_t extra = record.word(2 + lane / 4) >> (8 * (lane % 4)) & 255;
  const uint32_t bits = (counts >> 16) + extra;
  uint32_t end = bits;
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) {
    const uint32_t below = __shfl_up_sync(kAllLanes, end, distance);
    if (lane >= distance) end += below;
  }
  const uint32_t total = __shfl_sync(kAllLanes, end, kLanes - 1);
  start = 32 * kRecordHeaderWords + end - bits;
  patches = 0;
  if (counts == kRawChunk) {
    const uint32_t expected = kRawRecordHeaderWords + chunk.steps() * kStepWords;
    return chunk.words == expected ? GlobalPairs::kRaw : GlobalPairs::kNone;
  }
  const uint32_t count = counts & 0xffff;
  if (count == kRawChunk || chunk.words != kRecordHeaderWords + (total + 31) / 32 + count) {
    return GlobalPairs::kNone;
  }
  patches = count;
  return GlobalPairs::kCoded;
}

template <int kTiles>
__device__ __forceinline__ void set_sums(float (&sums)[kTiles][4][4], float value) {
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int c = 0; c < 4; ++c) sums[tile][i][c] = value;
    }
  }
}

// What of a block's memory its threads share.
struct BlockScratch {
  CanonicalCodes codes;
  ColumnFlags flags;
};
static_assert(sizeof(BlockScratch) <= kBlockBytes);

// First item of block `block` of a matrix.
__device__ inline int first_item(const MatrixWork& matrix, int block) {
  return block * matrix.block_items + min(block, matrix.longer_blocks);
}

template <int kTiles>
__global__ void __launch_bounds__(most_product_warps(kTiles) * kLanes, 1)
    product_kernel(const __grid_constant__ ProductWork work) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  DF11_DYNAMIC_SHARED(shared);
  const uint32_t base = shared_address(shared);
  BlockScratch& scratch = *reinterpret_cast<BlockScratch*>(shared);
  const ProductMemory& memory = work.memory;
  const int lane = threadIdx.x % kLanes;
  // The same in all lanes, and the compiler knows it.
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / kLanes, 0);

  int number = 0;
  while (number + 1 < work.count &&
         static_cast<int>(blockIdx.x) >= work.matrices[number + 1].first_block) {
    ++number;
  }
  const MatrixWork& matrix = work.matrices[__shfl_sync(kAllLanes, number, 0)];
  const int wanted = __shfl_sync(kAllLanes, __ldg(work.index), 0);
  if (wanted == -1) return;
  const Slice slice{matrix, wanted < 0 ? 0 : min(wanted, matrix.stack - 1)};
  const uint32_t geometry = __ldg(slice.header() + kGeometryWord);

  const int block = blockIdx.x - matrix.first_block;
  const int begin = first_item(matrix, block), end = first_item(matrix, block + 1);
  const int share = (end - begin) / memory.warps, longer = (end - begin) - share * memory.warps;
  const auto first_of_warp = [&](int warp) { return begin + warp * share + min(warp, longer); };

  WarpCopies copies(memory.warp(base, warp), memory);
  copies.initialize();
  const RowsOfX<kTiles> x(work.x, work.rows, work.k, lane);
  uint2 next_x[kTiles];
  ChunkCursor cursor(matrix, first_of_warp(warp), first_of_warp(warp + 1));
  ProductChunk chunk, next;
  cursor.next(slice, chunk);
  for (int slot = 0; slot < min(kSlots, chunk.steps()); ++slot) {
    copies.fetch_step(slot, matrix, chunk.first_step + slot);
  }
  x.load(chunk.k(), next_x);
  if (chunk.steps() > 0 && chunk.is_staged(memory)) copies.fetch_record(0, slice, chunk);
  cursor.next(slice, next);
  const LookupTable table{memory.table(base), memory.table_log2_bytes,
                          static_cast<uint32_t>(matrix.code_bits)};
  sort_codes(slice.codebook(), table.code_bits, scratch.codes);
  __syncthreads();
  if (scratch.codes.sound) fill_lookup_table(scratch.codes, table);
  __syncthreads();
  const bool sound = scratch.codes.sound && geometry == matrix.geometry;

  float sums[kTiles][4][4];
  set_sums(sums, 0);
  int buffer = 0;
  while (chunk.steps() > 0) {
    const bool staged = chunk.is_staged(memory);
    const StagedRecord in_shared{copies.record(buffer) + chunk.begin % 4 * 4};
    const GlobalRecord in_global{slice.exponents() + chunk.begin};
    GlobalPairs::Kind kind = GlobalPairs::kNone;
    uint32_t start = 0, patches = 0;
    if (staged) {
      copies.wait_for_record(buffer);
      kind = open_record(in_shared, chunk, lane, start, patches);
    } else if (chunk.words >= kRecordHeaderWords) {
      kind = open_record(in_global, chunk, lane, start, patches);
    }
    if (!sound) kind = GlobalPairs::kNone;

    const int next_buffer = memory.records > 1 ? buffer ^ 1 : buffer;
    const bool fetch = next.steps() > 0 && next.is_staged(memory);
    // No lane needs the chunk before this one any more, whose record was there.
    if (memory.records > 1 && fetch) copies.fetch_record(next_buffer, slice, next);
    if (staged && kind == GlobalPairs::kCoded) {
      multiply_chunk(StagedPairs(in_shared.address, start, table, lane),
                     Patches(in_shared.from(chunk.words - patches), patches, chunk.k()), copies,
                     matrix, x, next_x, chunk, next, work.k, lane, sums);
    } else {
      multiply_chunk(GlobalPairs(kind, in_global.words, chunk.words, start, table, lane),
                     Patches(in_global.from(chunk.words - patches),
                             kind == GlobalPairs::kCoded ? patches : 0, chunk.k()),
                     copies, matrix, x, next_x, chunk, next, work.k, lane, sums);
      if (kind == GlobalPairs::kNone) set_sums(sums, __uint_as_float(0x7fffffff));
    }
    __syncwarp();  // No lane needs the record any more.
    if (memory.records == 1 && fetch) copies.fetch_record(next_buffer, slice, next);
    buffer = next_buffer;

    if (chunk.ends_item) {
      store_sums<kTiles>(matrix.sums, chunk.item, work.rows, lane, sums);
      set_sums(sums, 0);
    }
    chunk = next;
    cursor.next(slice, next);
  }
  add_columns(work, matrix, begin, end, table.address, scratch.flags);
#endif
}

}  // namespace df11::native
