// The CUDA decoder of the native layout (docs/format.md). A warp decodes a chunk: each
// lane reads a bit stream of its own, one look-up in a table in shared memory gives the
// exponents of two weights, sign and mantissa come from words that are already in the
// right order. docs/kernel.md explains it and counts its instructions.
//
// A kernel cannot return an error, and nothing in a payload is trusted: nothing is read or
// written out of bounds whatever it holds, and what is corrupt is poisoned: every weight of
// the chunk becomes 0xffff, a NaN. A slice whose header or codebook is wrong is poisoned as
// a whole; a chunk, if its offsets, its record's length or the checksum is wrong.
#pragma once

#include <cuda_runtime.h>
#ifdef __CUDACC__
#include <cuda_pipeline_primitives.h>
#endif

#include <cstdint>

#include "native/cuda/build_table.cuh"
#include "native/cuda/lane_io.cuh"
#include "native/layout.h"
#include "native/tensor_slices.h"

namespace df11::native {

// Four blocks of 256 threads leave a thread 64 registers.
inline constexpr int kMinBlocks = 4;

// The tensors of one launch, passed by value: all there is room for in the 4 KB that
// kernel parameters may take.
inline constexpr int kTensorsPerLaunch = 18;
struct DecodeBatch {
  int count = 0;
  int64_t first_chunk[kTensorsPerLaunch + 1] = {};  // of a tensor; the last is the end
  TensorSlices tensors[kTensorsPerLaunch] = {};
};
static_assert(sizeof(DecodeBatch) <= 4096);

// A record of up to this many words is staged in shared memory; it may be one of any
// chunk whose exponents take less than 3.2 bits a weight. Lanes may read behind it, up to
// the codes of 128 pairs and one window.
inline constexpr int kStagedWords = 832;
inline constexpr int kStagedOverread =
    (kSteps * 2 * kLanePairs * kMaxCodeBits / 32 + 2 + 3) / 4 * 4;

// A warp's present chunk, in shared memory to leave the registers to the hot loop.
struct alignas(16) WarpState {
  uint32_t staged_words[kStagedWords + kStagedOverread];
  Chunk chunk;
  const uint32_t* record;
  uint32_t words, patches, checksum;
  bool raw;
  bool fast;  // the record is staged, and all rows can be stored 16 bytes at a time
};

struct Lane {
  int number, row, col;  // row and column, in the tile, of its first weight

  __device__ explicit Lane(int lane)
      : number(lane), row(lane % 4 * 4), col(lane / 4 * kLanePairs) {}
  // Of 128 words that hold a half-step, where the lane's four begin.
  __device__ int half_step_word() const { return number % 4 * 32 + number / 4 * 4; }
  __device__ int place() const { return number % 4 * kTileCols + col; }
};

// Decodes a lane's part of a chunk; returns its part of the checksum. This is the hot loop.
template <typename Pairs, typename Rows>
__device__ __forceinline__ uint32_t decode_steps(Pairs pairs, Rows rows,
                                                 const uint32_t* sign_mantissa, int steps,
                                                 const Lane& lane) {
  constexpr int kHalfStepLoads = kHalfStepPairs / 8;
  uint32_t acc[kLanePairs] = {};
  const auto* next = reinterpret_cast<const uint4*>(sign_mantissa + lane.half_step_word());
  // Loaded one half-step before it is needed.
  uint4 loaded[2] = {__ldcs(next), __ldcs(next + kHalfStepLoads)};
#pragma unroll 1
  for (int left = steps; left > 0; --left) {
    next += 2 * kHalfStepLoads;
#pragma unroll
    for (int half_step = 0; half_step < 2; ++half_step) {
      const uint4 words = loaded[half_step];
      const uint32_t word[4] = {words.x, words.y, words.z, words.w};
      uint32_t even[4], odd[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        uint32_t entry0, entry1;
        pairs.next_two(j, entry0, entry1);
        const uint32_t pair0 = merge_in_one(entry0, word[j]);
        const uint32_t pair1 = merge_in_one(entry1, rotl(word[j], 8));
        acc[2 * j] = checksum_step(acc[2 * j], pair0);
        acc[2 * j + 1] = checksum_step(acc[2 * j + 1], pair1);
        even[j] = __byte_perm(pair0, pair1, 0x5410);
        odd[j] = __byte_perm(pair0, pair1, 0x7632);
      }
      pairs.end_half_step();
      if (left > 1) loaded[half_step] = __ldcs(next + half_step * kHalfStepLoads);
      rows.store({even[0], even[1], even[2], even[3]});
      rows.store({odd[0], odd[1], odd[2], odd[3]});
    }
    rows.skip(kStepRows - 4);
  }
  uint32_t sum = 0;
#pragma unroll
  for (int j = 0; j < kLanePairs; ++j) sum += checksum_place(acc[j], lane.place() + j);
  return sum;
}

// What a block works on: successive chunks of one slice. In shared memory, too.
struct Assignment {
  View view;
  const uint32_t* codebook;
  const uint32_t* chunk_offsets;
  const uint32_t* exponents;
  const uint32_t* sign_mantissa;
  int64_t exponents_words;
  uint16_t* out;
  int64_t first;   // chunk of the slice
  uint32_t count;  // of chunks
  bool header_sound, table_sound, new_table;
  int64_t at, end;  // what is left to the block, in chunks of the launch
  int tensor;       // the next to look at
};

// Copies words begin .. end of the slice's exponents, rounded to 16 bytes, without waiting.
__device__ inline void stage(const uint32_t* exponents, uint32_t begin, uint32_t end, int lane,
                             uint32_t* staged) {
  begin &= ~3u;
  for (uint32_t i = 4 * lane; i < end - begin; i += 4 * kLanes) {
    __pipeline_memcpy_async(staged + i, exponents + begin + i, sizeof(uint4));
  }
  __pipeline_commit();
}

__device__ inline bool can_stage(const Assignment& work, uint32_t begin, uint32_t end) {
  return is_aligned(work.exponents) && work.exponents_words % 4 == 0 &&
         ((end + 3) & ~3u) - (begin & ~3u) <= kStagedWords;
}

// Whether all of the chunk's rows can be stored 16 bytes at a time.
__device__ inline bool is_inner(const Assignment& work, const Chunk& chunk) {
  const int64_t last_row = chunk.row + chunk.steps * kStepRows - 1;
  return chunk.col + kTileCols <= work.view.cols &&
         last_row * work.view.cols + chunk.col + kTileCols <= work.view.size &&
         is_aligned(work.out);
}

// Finds chunk `index`, stages and checks its record; false if it is corrupt. Sets `warp`
// and, for a coded chunk, the bit of the record where the lane's stream starts. Like all
// below, it is called by a warp, whose lanes get the same result.
__device__ inline bool open_record(const Assignment& work, int64_t index, const Lane& lane,
                                   WarpState& warp, uint32_t& start) {
  const uint32_t begin = __ldg(work.chunk_offsets + index);
  const uint32_t end = __ldg(work.chunk_offsets + index + 1);
  const uint32_t words = end - begin;
  if (begin > end || end > work.exponents_words || words < kRecordHeaderWords) return false;

  __syncwarp();  // No lane needs the former chunk any more.
  const Chunk chunk = locate_chunk(work.view, index);
  const bool fast = is_inner(work, chunk) && can_stage(work, begin, end);
  if (fast) stage(work.exponents, begin, end, lane.number, warp.staged_words);

  const uint32_t* record = work.exponents + begin;
  const uint32_t counts = __ldg(record + 1);
  const bool raw = counts == kRawChunk;
  const uint32_t patches = raw ? 0 : counts & 0xffff;
  const uint32_t extra = __ldg(record + 2 + lane.number / 4) >> (8 * (lane.number % 4)) & 255;
  const uint32_t bits = (counts >> 16) + extra;
  uint32_t stream_end = bits;
  for (int distance = 1; distance < kLanes; distance *= 2) {
    const uint32_t below = __shfl_up_sync(kAllLanes, stream_end, distance);
    if (lane.number >= distance) stream_end += below;
  }
  const uint32_t total = __shfl_sync(kAllLanes, stream_end, kLanes - 1);
  start = 32 * kRecordHeaderWords + stream_end - bits;
  if (lane.number == 0) {
    warp.chunk = chunk;
    warp.record = record;
    warp.words = words;
    warp.patches = patches;
    warp.checksum = __ldg(record);
    warp.raw = raw;
    warp.fast = fast && !raw;
  }
  __pipeline_wait_prior(0);
  __syncwarp();  // All lanes' copies have arrived.
  if (!raw && patches == kRawChunk) return false;
  return words == (raw ? kRawRecordHeaderWords + chunk.steps * kStepWords
                       : kRecordHeaderWords + (total + 31) / 32 + patches);
}

__device__ inline EdgeRows edge_rows(const Assignment& work, const Chunk& chunk, const Lane& lane) {
  return EdgeRows(work.out, work.view, chunk.row + lane.row, chunk.col + lane.col);
}

// Decodes all of the chunk but its patches; returns the lane's part of the checksum.
__device__ inline uint32_t decode_record(const Assignment& work, const WarpState& warp,
                                         uint32_t start, const uint32_t* table, const Lane& lane) {
  const Chunk& chunk = warp.chunk;
  const uint32_t* sign_mantissa = work.sign_mantissa + chunk.sign_mantissa_word;
  const uint32_t word = (start - kWindowLead) / 32;
  const uint32_t* record = warp.record;
  if (warp.fast) {
    const uint32_t* staged = warp.staged_words + reinterpret_cast<uintptr_t>(record) / 4 % 4;
    const InnerRows rows(work.out + (chunk.row + lane.row) * work.view.cols + chunk.col + lane.col,
                         work.view.cols);
    const CodedPairs pairs(StagedWords(staged + word), start - 32 * word, table);
    return decode_steps(pairs, rows, sign_mantissa, chunk.steps, lane);
  }
  const EdgeRows rows = edge_rows(work, chunk, lane);
  if (warp.raw) {
    const RawPairs pairs(record + kRawRecordHeaderWords + lane.half_step_word());
    return decode_steps(pairs, rows, sign_mantissa, chunk.steps, lane);
  }
  const GlobalWords words(record + word, record + warp.words - 1);
  return decode_steps(CodedPairs(words, start - 32 * word, table), rows, sign_mantissa, chunk.steps,
                      lane);
}

// The sum over the lanes, in all of them.
__device__ inline uint32_t sum_of_warp(uint32_t x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(kAllLanes, x, distance);
  }
  return x;
#else
  return __reduce_add_sync(kAllLanes, x);
#endif
}

// Decodes chunk `index`; false if it is corrupt.
__device__ inline bool decode_chunk(const Assignment& work, int64_t index, WarpState& warp,
                                    const uint32_t* table, const Lane& lane) {
  uint32_t start;
  if (!open_record(work, index, lane, warp, start)) return false;
  uint32_t sum = decode_record(work, warp, start, table, lane);

  const Chunk& chunk = warp.chunk;
  const uint32_t* patches = warp.record + warp.words - warp.patches;
  const uint32_t weights = chunk.steps * kStepRows * kTileCols;
  for (uint32_t i = lane.number; i < warp.patches; i += kLanes) {
    sum += checksum_patch(__ldg(patches + i));
  }
  sum = sum_of_warp(sum) + checksum_chunk(index);
  if (sum != warp.checksum) return false;
  __syncwarp();  // Patches come after all other stores.
  for (uint32_t i = lane.number; i < warp.patches; i += kLanes) {
    const uint32_t patch = __ldg(patches + i), position = patch >> 16;
    const int64_t col = chunk.col + position % kTileCols;
    const int64_t element = (chunk.row + position / kTileCols) * work.view.cols + col;
    if (position < weights && col < work.view.cols && element < work.view.size) {
      store_global(work.out + element, static_cast<uint16_t>(patch));
    }
  }
  return true;
}

__device__ inline void poison_chunk(EdgeRows rows, int steps) {
  const uint4 poison = {~0u, ~0u, ~0u, ~0u};
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
#pragma unroll 1
    for (int i = 0; i < 4; ++i) rows.store(poison);
    rows.skip(kStepRows - 4);
  }
}

// Whether the header names a shape with this view: the same weights in the same places.
DF11_HD bool is_header_of(const uint32_t* header, const View& view) {
  if (header[0] != kFormatVersion || header[1] > kMaxDims) return false;
  uint64_t size = 1, last = 0;
  for (uint32_t i = 0; i < header[1]; ++i) {
    last = header[2 + 2 * i] | uint64_t{header[3 + 2 * i]} << 32;
    size *= last;
  }
  const View found = make_view(size, header[1] >= 2 ? last : 0);
  return found.size == view.size && found.rows == view.rows && found.cols == view.cols;
}

// Blocks share the chunks of a launch in order, so that a block sees few slices: it builds
// a table for each.
__device__ inline void start_block(const DecodeBatch& batch, Assignment& work) {
  const int64_t chunks = batch.first_chunk[batch.count], block = blockIdx.x;
  const int64_t share = chunks / gridDim.x, rest = chunks % gridDim.x;
  work.at = block * share + (block < rest ? block : rest);
  work.end = work.at + share + (block < rest);
  work.tensor = 0;
  work.codebook = nullptr;
}

__device__ inline void next_assignment(const DecodeBatch& batch, Assignment& work) {
  work.count = 0;
  if (work.at == work.end) return;
  while (work.at >= batch.first_chunk[work.tensor + 1]) ++work.tensor;
  const TensorSlices& tensor = batch.tensors[work.tensor];
  const int64_t chunks = tensor.view.chunks(), in_tensor = work.at - batch.first_chunk[work.tensor];
  const int64_t b = in_tensor / chunks, slice = tensor.slice_of(b);
  const uint32_t* codebook = tensor.codebook + slice * kCodebookWords;
  work.new_table = codebook != work.codebook;
  work.header_sound = is_header_of(tensor.header + slice * kHeaderWords, tensor.view);
  work.view = tensor.view;
  work.codebook = codebook;
  work.chunk_offsets = tensor.chunk_offsets + slice * (chunks + 1);
  work.exponents = tensor.exponents + slice * tensor.exponents_words;
  work.sign_mantissa = tensor.sign_mantissa + slice * tensor.view.sign_mantissa_words();
  work.exponents_words = tensor.exponents_words;
  work.out = tensor.out + b * tensor.view.size;
  work.first = in_tensor - b * chunks;
  const int64_t left = work.end - work.at, in_slice = chunks - work.first;
  constexpr int64_t kMost = 1 << 30;
  const int64_t count = left < in_slice ? left : in_slice;
  work.count = static_cast<uint32_t>(count < kMost ? count : kMost);
  work.at += work.count;
}

__global__ void __launch_bounds__(kThreads, kMinBlocks)
    decode_kernel(const __grid_constant__ DecodeBatch batch) {
  __shared__ uint32_t table[kTableSize];
  __shared__ WarpState warps[kWarps];
  __shared__ TableScratch scratch;
  __shared__ Assignment work;
  const Lane lane(threadIdx.x % kLanes);
  // The same in all lanes, and the compiler knows it.
  const int warp_number = __shfl_sync(kAllLanes, threadIdx.x / kLanes, 0);
  WarpState& warp = warps[warp_number];

  if (threadIdx.x == 0) start_block(batch, work);
  for (;;) {
    __syncthreads();  // No warp needs the former assignment, or its table, any more.
    if (threadIdx.x == 0) next_assignment(batch, work);
    __syncthreads();
    if (work.count == 0) return;
    if (work.new_table) {
      const bool sound = build_table_in_block(work.codebook, scratch, table);
      if (threadIdx.x == 0) work.table_sound = sound;
      __syncthreads();
    }
    const bool sound = work.header_sound && work.table_sound;
    for (uint32_t i = warp_number; i < work.count; i += kWarps) {
      if (!sound || !decode_chunk(work, work.first + i, warp, table, lane)) {
        const Chunk chunk = locate_chunk(work.view, work.first + i);
        poison_chunk(edge_rows(work, chunk, lane), chunk.steps);
      }
    }
  }
}

}  // namespace df11::native
