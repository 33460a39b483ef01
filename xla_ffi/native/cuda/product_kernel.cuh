// The CUDA product y = x W: weights are decoded in registers, in the order in which tensor cores
// take them, and are never in memory. docs/kernel.md explains it and counts its instructions.
//
// A warp works on items, a few chunks below each other, one step of 16 k after the other. A few
// warps next to each other add up a group of items; what that is goes to the workspace, and whoever
// brings the last groups of a column adds them up. So in which order numbers are added depends on
// the matrix alone: not on the rows of x, on the number of warps or blocks, or on what else is in
// the launch.
//
// Nothing in a payload is trusted: nothing is read out of bounds and no copy is waited for that was
// not issued, whatever it holds. Where a header, a codebook, an offset or a length is wrong, its
// columns become NaN; checksums are not verified.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/async_copies.cuh"
#include "common/lanes.cuh"
#include "common/tensor_core.cuh"
#include "native/cuda/lookup_table.cuh"
#include "native/cuda/product_copies.cuh"
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
  int k_and_steps = 0;  // its first k, a multiple of 16, and its steps: 0 if there is no chunk
  uint32_t item_and_end = 0;    // twice the item that it is of, and 1 if it is the item's last
  uint32_t first_step = 0;      // in sign_mantissa
  uint32_t begin = 0, end = 0;  // of the record, as they were found

  __device__ int k() const { return k_and_steps & ~(kStepRows - 1); }
  __device__ int steps() const { return k_and_steps & (kStepRows - 1); }
  __device__ int item() const { return static_cast<int>(item_and_end >> 1); }
  __device__ bool ends_item() const { return item_and_end & 1; }
  // None if the offsets are wrong.
  __device__ uint32_t words(const MatrixWork& matrix) const {
    return begin <= end && end <= matrix.exponents_words ? end - begin : 0;
  }
  // Words from one multiple of 16 bytes to another that hold the record.
  __device__ uint32_t padded_words() const { return ((end + 3) & ~3u) - (begin & ~3u); }
  __device__ bool is_staged(const MatrixWork& matrix, const ProductMemory& memory) const {
    return words(matrix) >= kRecordHeaderWords && padded_words() <= memory.record_words;
  }
  // If it is.
  __device__ CopySource record(const Slice& slice) const {
    return {slice.exponents() + (begin & ~3u), 4 * padded_words()};
  }
};

// A warp's chunks: those of its items, of which it has every `stride`th. Each lane finds one, so
// that what is read of 32 chunks is waited for together. They are kept in shared memory, which has
// more room than registers: 16 bytes of each, where it is, then 8 bytes of each, its offsets. If a
// warp has fewer, the list has room for these only.
class ChunkList {
 public:
  __device__ ChunkList(uint32_t memory, int chunks, int first_item, int end_item, int stride)
      : memory_(memory),
        chunks_(chunks),
        first_item_(first_item),
        end_item_(end_item),
        stride_(stride) {}

  // Finds the next 32 rows of items of which any are there, in whatever slice: at the end of a
  // column some may not be, or a whole item. Returns the number of the lane's chunk, -1 if there is
  // none.
  __device__ __forceinline__ int find(const MatrixWork& matrix, int lane) {
    int chunk;
#pragma unroll 1
    do {
      chunk = find_rows(matrix, lane);
    } while (is_to_be_filled(matrix));
    return chunk;
  }
  // The offsets of a lane's chunk, which are to be kept when they have arrived. Where there is
  // none, nobody reads them: a choice of zeros would wait for the load.
  __device__ __forceinline__ static uint2 load_offsets(const Slice& slice, int chunk) {
    const uint32_t* from = slice.chunk_offsets() + max(chunk, 0);
    return uint2{__ldg(from), __ldg(from + 1)};
  }
  __device__ __forceinline__ void keep(const uint2& offsets, int lane) {
    if (lane < chunks_) {
      store_shared(offsets_of(lane), offsets.x);
      store_shared(offsets_of(lane) + 4, offsets.y);
    }
    __syncwarp();  // All are there.
  }

  // Whether there are no more in the list, but behind it.
  __device__ bool is_to_be_filled(const MatrixWork& matrix) const {
    return left_ == 0 && first_item_ + row_ / matrix.item_chunks * stride_ < end_item_;
  }

  // Takes the next one, if there is any: its number in the list, else -1.
  __device__ __forceinline__ int take() {
    const int number = __ffs(left_) - 1;
    left_ &= left_ - 1;
    return number;
  }
  // Without offsets.
  __device__ __forceinline__ ProductChunk place_of(const Slice& slice, int number) const {
    ProductChunk chunk;
    if (number < 0) return chunk;
    const uint4 place = load_shared4(memory_ + 16 * number);
    chunk.k_and_steps = static_cast<int>(place.x);
    chunk.item_and_end = place.y;
    chunk.first_step = slice.first_step() + place.z;
    return chunk;
  }
  __device__ __forceinline__ ProductChunk get(const Slice& slice, int number) const {
    ProductChunk chunk = place_of(slice, number);
    if (number < 0) return chunk;
    chunk.begin = load_shared(offsets_of(number));
    chunk.end = load_shared(offsets_of(number) + 4);
    return chunk;
  }

 private:
  __device__ __forceinline__ uint32_t offsets_of(int number) const {
    return memory_ + 16 * chunks_ + 8 * number;
  }
  __device__ __forceinline__ int find_rows(const MatrixWork& matrix, int lane) {
    const int at = row_ + lane, item_chunks = matrix.item_chunks;
    const int ahead = divide_by_reciprocal(at, matrix.item_chunks_reciprocal);
    const int in_item = at - ahead * item_chunks;
    const int item = first_item_ + ahead * stride_;
    const int group = divide_by_reciprocal(item, matrix.group_items_reciprocal);
    const int column = divide_by_reciprocal(group, matrix.column_groups_reciprocal);
    const int above = column * matrix.column_groups * matrix.group_items;
    const int begin = (item - above) * item_chunks, row = begin + in_item;
    const bool is_there = item < end_item_ && row < matrix.tiles_k;
    // Of matrices that stand side by side, the one that has the column.
    const int number = divide_by_reciprocal(column, matrix.one_tiles_n_reciprocal);
    const int tiles_n = matrix.one_tiles_n, tile_n = column - number * tiles_n;
    __syncwarp();  // All lanes have read what was in the list.
    if (is_there) {
      const int step = row * matrix.steps, steps = min(matrix.steps, matrix.steps_k - step);
      const bool ends = row + 1 == min(begin + item_chunks, matrix.tiles_k);
      store_shared(
          memory_ + 16 * lane,
          uint4{static_cast<uint32_t>(step * kStepRows | steps),
                static_cast<uint32_t>(2 * item + ends),
                static_cast<uint32_t>((number * matrix.steps_k + step) * tiles_n + tile_n * steps),
                0});
    }
    left_ = __ballot_sync(kAllLanes, is_there);
    row_ += kLanes;
    __syncwarp();  // All places are there.
    return is_there ? (number * matrix.tiles_k + row) * tiles_n + tile_n : -1;
  }

  uint32_t memory_;
  int chunks_, first_item_, end_item_, stride_;
  int row_ = 0;        // of all items' rows, the first that is not in the list yet
  uint32_t left_ = 0;  // a bit for each lane whose chunk is not taken
};

// A half-step's weights, of which the words have signs and mantissas.
template <typename Pairs>
__device__ __forceinline__ void decode_half_step(Pairs& pairs, const uint4& words, int half,
                                                 uint32_t (&weights)[4][4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    uint32_t entry0, entry1;
    pairs.next_two(j, entry0, entry1);
    const uint32_t word = j == 0 ? words.x : j == 1 ? words.y : j == 2 ? words.z : words.w;
    weights[j][2 * half] = select_bits<kSignMantissa>(entry0, word);
    weights[j][2 * half + 1] = select_bits<kSignMantissa>(entry1, __funnelshift_l(word, word, 8));
  }
  pairs.end_half_step();
}

// Multiplies a chunk: the inner loop. Meanwhile signs and mantissas of the steps after these are
// fetched.
template <int kTiles, typename Pairs, typename Record, typename Copies>
__device__ __forceinline__ void multiply_chunk(Pairs pairs, Patches<Record> patches, Copies& copies,
                                               const ProductWork& work, const MatrixWork& matrix,
                                               const RowsOfX<kTiles>& x, const ProductChunk& chunk,
                                               const ProductChunk& next, int lane,
                                               float (&sums)[kTiles][4][4]) {
  const int end = chunk.k() + chunk.steps() * kStepRows;
  uint32_t ahead = chunk.first_step + kSlotSteps;
  const uint32_t at = copies.steps() + 4 * lane_word(lane);
#pragma unroll 1
  for (int k = chunk.k(); k < end; k += kSlotSteps * kStepRows) {
    uint2 rows[kSlotSteps][kTiles];
    if (!Copies::kCopyX) x.load(k, copies, rows);
    copies.wait_for_steps();
    uint4 words[kSlotSteps][2];
#pragma unroll
    for (int i = 0; i < 2 * kSlotSteps; ++i) {
      words[i / 2][i % 2] = load_shared4(at + 4 * kHalfStepWords * i);
    }
#pragma unroll
    for (int step = 0; step < kSlotSteps; ++step) {
      if (step > 0 && k + kStepRows == end) break;
      uint32_t weights[4][4];
      decode_half_step(pairs, words[step][0], 0, weights);
      if (step == 0) {
        __syncwarp();  // All lanes have read the slot.
        const int left = (end - k) / kStepRows - kSlotSteps;
        const int steps_left = left > 0 ? left : next.steps();
        if (steps_left > 0) {
          const uint32_t loaded =
              after_loads(0, work.zero, words[0][0].x, words[0][1].x, words[1][0].x, words[1][1].x);
          const uint32_t first = (left > 0 ? ahead : next.first_step) + loaded;
          const uint32_t next_k = (left > 0 ? k + kSlotSteps * kStepRows : next.k()) + loaded;
          copies.fetch_steps([&] { return CopySource::of_steps(matrix, first, steps_left); },
                             [&] { return CopySource::of_x(work, next_k); });
        }
        ahead += kSlotSteps;
        if (Copies::kCopyX) x.load(k, copies, rows);  // not before, to leave registers
      }
      decode_half_step(pairs, words[step][1], 1, weights);
      const uint32_t number = static_cast<uint32_t>(k - chunk.k()) / kStepRows + step;
      if (patches.are_in(number)) patches.apply(number, work.k - chunk.k(), lane, weights);
      multiply_add(sums, weights, rows[step]);
    }
  }
}

// A record's kind, kNone if it is corrupt; where the lane's stream starts, and the number of
// patches.
template <typename Record>
__device__ __forceinline__ GlobalPairs::Kind open_record(const Record& record, int steps,
                                                         uint32_t words, int lane, uint32_t& start,
                                                         uint32_t& patches) {
  const uint32_t counts = record.word(1);
  const uint32_t extra = record.word(2 + lane / 4) >> (8 * (lane % 4)) & 255;
  const uint32_t bits = (counts >> 16) + extra;
  const uint32_t end = sum_up_to(bits, lane);
  const uint32_t total = __shfl_sync(kAllLanes, end, kLanes - 1);
  start = 32 * kRecordHeaderWords + end - bits;
  patches = 0;
  if (counts == kRawChunk) {
    const uint32_t expected = kRawRecordHeaderWords + steps * kStepWords;
    return words == expected ? GlobalPairs::kRaw : GlobalPairs::kNone;
  }
  const uint32_t count = counts & 0xffff;
  if (count == kRawChunk || words != kRecordHeaderWords + (total + 31) / 32 + count) {
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
  BlockColumns columns;
};
static_assert(sizeof(BlockScratch) <= kBlockBytes);

// First group of block `block` of a matrix.
__device__ inline int first_group(const MatrixWork& matrix, int block) {
  return block * matrix.block_groups + min(block, matrix.longer_blocks);
}

// Adds the sums of an item to those of the items before it in its group, which the warps before
// this one have: in shared memory, each when it has its turn. The last there is stores them.
template <int kTiles>
__device__ __forceinline__ void add_to_group(const ProductWork& work, const MatrixWork& matrix,
                                             const ProductChunk& chunk, int lane, WarpMemory& warp,
                                             float (&sums)[kTiles][4][4]) {
  const PlaceInGroup place = warp.place();
  const bool is_last =
      place.is_last || chunk.k() + chunk.steps() * kStepRows == matrix.steps_k * kStepRows;
  if (!place.is_first || !is_last) {
    const SharedSums before(place.sums, work.rows, lane);
    warp.wait_for_turn();
    if (!place.is_first) before.add_to(sums);
    if (!is_last) before.store(sums);
    __syncwarp();  // All lanes have.
    WarpMemory::give_turn(is_last ? place.first : place.next);
  }
  if (is_last) {
    const int group = divide_by_reciprocal(chunk.item(), matrix.group_items_reciprocal);
    store_sums<kTiles>(matrix.sums, group, work.rows, lane, sums);
  }
}

template <int kTiles, typename Copies>
__device__ __forceinline__ void multiply(const ProductWork& work) {
  DF11_DYNAMIC_SHARED(shared);
  const uint32_t base = shared_address(shared);
  BlockScratch& scratch = *reinterpret_cast<BlockScratch*>(shared);
  const ProductMemory& memory = work.memory;
  const int lane = threadIdx.x % kLanes;
  // The same in all lanes, and the compiler knows it.
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / kLanes, 0);

  Copies copies(memory.warp(base, warp), memory);
  copies.initialize();
  keep_order();
  // Everything waits for it. Not by __ldg, which the compiler would put before the fence of the
  // barriers, and that could wait for it, too. And what is loaded for all lanes alike it puts into
  // a uniform register, and waits for it there and then: so it must not know.
  const int unknown_zero = lane & static_cast<int>(work.zero);
  const int index = work.index[unknown_zero];
  int number = 0;
  while (number + 1 < work.count &&
         static_cast<int>(blockIdx.x) >= work.matrices[number + 1].first_block) {
    ++number;
  }
  const MatrixWork& matrix = work.matrices[__shfl_sync(kAllLanes, number, 0)];
  const int block = blockIdx.x - matrix.first_block;
  const int begin = first_group(matrix, block), end = first_group(matrix, block + 1);
  if (threadIdx.x < 2) {
    // For the end, where everything waits for this.
    const int column =
        divide_by_reciprocal(threadIdx.x == 0 ? begin : end - 1, matrix.column_groups_reciprocal);
    scratch.columns.number[threadIdx.x] = column;
    prefetch_global(matrix.arrived + column);
  }
  const int end_item = end * matrix.group_items;
  ChunkList chunks(copies.list(), memory.list_chunks,
                   warp < matrix.warps ? begin * matrix.group_items + warp : end_item, end_item,
                   matrix.warps);
  const int first_chunk = chunks.find(matrix, lane), first = chunks.take();

  const int wanted = __shfl_sync(kAllLanes, index, 0);
  if (wanted == -1) return;
  const Slice slice{matrix, wanted < 0 ? 0 : min(wanted, matrix.stack - 1)};
  const uint2 offsets = chunks.load_offsets(slice, first_chunk);
  const CodebookWords codebook = load_codebook(slice.codebook(), lane);
  const uint32_t geometry = __ldg(slice.header() + kGeometryWord + unknown_zero);
  // The first copies are under way while the table is made.
  ProductChunk chunk = chunks.place_of(slice, first);
  if (chunk.steps() > 0) {
    copies.fetch_steps(
        [&] { return CopySource::of_steps(matrix, chunk.first_step, chunk.steps()); },
        [&] { return CopySource::of_x(work, chunk.k()); });
  }
  const RowsOfX<kTiles> x(work.x, work.rows, lane);
  const LookupTable table{memory.table(base), memory.table_log2_bytes,
                          static_cast<uint32_t>(matrix.code_bits)};
  copies.keep(PlaceInGroup(memory, matrix, base, warp));  // while the offsets are on their way
  chunks.keep(offsets, lane);
  chunk = chunks.get(slice, first);
  if (chunk.is_staged(matrix, memory)) copies.fetch_record(0, chunk.record(slice));
  sort_codes(codebook, table.code_bits, scratch.codes);
  __syncthreads();
  if (scratch.codes.sound) fill_lookup_table(scratch.codes, table);
  __syncthreads();
  const bool sound = scratch.codes.sound && __shfl_sync(kAllLanes, geometry, 0) == matrix.geometry;

  float sums[kTiles][4][4];
  set_sums(sums, 0);
  int buffer = 0;
  while (chunk.steps() > 0) {
    if (chunks.is_to_be_filled(matrix)) {
      chunks.keep(chunks.load_offsets(slice, chunks.find(matrix, lane)), lane);
    }
    const int next_number = chunks.take();
    const uint32_t words = chunk.words(matrix);
    const bool staged = chunk.is_staged(matrix, memory);
    const StagedRecord in_shared{copies.record(buffer) + chunk.begin % 4 * 4};
    const GlobalRecord in_global{slice.exponents() + chunk.begin};
    GlobalPairs::Kind kind = GlobalPairs::kNone;
    uint32_t start = 0, patches = 0;
    if (staged) {
      copies.wait_for_record(buffer);
      kind = open_record(in_shared, chunk.steps(), words, lane, start, patches);
    } else if (words >= kRecordHeaderWords) {
      kind = open_record(in_global, chunk.steps(), words, lane, start, patches);
    }
    if (!sound) kind = GlobalPairs::kNone;

    // No lane needs what was in the other buffer: all have used what they have looked up there.
    // Without another, the record waits in L2.
    const int next_buffer = memory.records > 1 ? buffer ^ 1 : buffer;
    const auto bring_next_record = [&](bool to_buffer) {
      const ProductChunk next = chunks.get(slice, next_number);
      if (!next.is_staged(matrix, memory)) return;
      if (to_buffer) {
        copies.fetch_record(next_buffer, next.record(slice));
      } else {
        copies.prefetch_record(next.record(slice));
      }
    };
    bring_next_record(memory.records > 1);
    const ProductChunk next = chunks.place_of(slice, next_number);
    if (staged && kind == GlobalPairs::kCoded) {
      multiply_chunk(StagedPairs(in_shared.address, start, table, lane),
                     Patches(in_shared.from(words - patches), patches), copies, work, matrix, x,
                     chunk, next, lane, sums);
    } else {
      multiply_chunk(
          GlobalPairs(kind, in_global.words, words, start, table, lane),
          Patches(in_global.from(words - patches), kind == GlobalPairs::kCoded ? patches : 0),
          copies, work, matrix, x, chunk, next, lane, sums);
      if (kind == GlobalPairs::kNone) set_sums(sums, __uint_as_float(0x7fffffff));
    }
    __syncwarp();  // No lane needs the record any more.
    if (memory.records == 1) bring_next_record(true);
    buffer = next_buffer;

    if (chunk.ends_item()) {
      add_to_group(work, matrix, chunk, lane, copies, sums);
      set_sums(sums, 0);
    }
    chunk = chunks.get(slice, next_number);
  }
  add_columns<kTiles>(work, matrix, begin, end, scratch.columns);
}

// `Copies` are those of product_copies.cuh that the GPU has.
template <int kTiles, typename Copies>
__global__ void __launch_bounds__(most_product_warps(kTiles, Copies::kAreBulk) * kLanes, 1)
    product_kernel(const __grid_constant__ ProductWork work) {
  if constexpr (Copies::kRunHere) multiply<kTiles, Copies>(work);
}

}  // namespace df11::native
