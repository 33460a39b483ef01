// Decodes one chunk by a warp, whatever it is like: coded or raw, long or short, inner or at an
// edge, with pairs along rows or along columns. Each lane reads a bit stream of its own, one
// look-up in a table in shared memory gives the exponents of two weights, sign and mantissa come
// from words that are already in the lane's order.
//
// Nothing in a payload is trusted: nothing is read or written out of bounds whatever it holds. What
// is corrupt is for the caller to poison: every weight of the chunk becomes 0xffff, a NaN.
#pragma once

#include <cuda_runtime.h>
#ifdef __CUDACC__
#include <cuda_pipeline_primitives.h>
#endif

#include <cstdint>

#include "native/cuda/pair_sources.cuh"
#include "native/cuda/weight_sinks.cuh"
#include "native/layout.h"

namespace df11::native {

// A record of up to this many words is staged in shared memory; it may be one of any
// chunk whose exponents take less than 3.2 bits a weight. Lanes may read behind it, up to
// the codes of 128 pairs and one window.
inline constexpr int kStagedWords = 832;
inline constexpr int kStagedOverread =
    (kMaxSteps * 2 * kLanePairs * kMaxCodeBits / 32 + 2 + 3) / 4 * 4;
struct alignas(16) StagedRecord {
  uint32_t words[kStagedWords + kStagedOverread];
};

// A warp's present chunk, in shared memory to leave the registers to the hot loop.
struct Record {
  Chunk chunk;
  const uint32_t* words;
  uint32_t count, patches, checksum;
  bool raw;
  bool fast;  // the record is staged, and all weights can be stored several at a time
};

// The slice that chunks are of. In shared memory, too.
struct Slice {
  View view;
  const uint32_t* chunk_offsets;
  const uint32_t* exponents;
  const uint32_t* sign_mantissa;
  int64_t exponents_words;
  uint16_t* out;                      // of the slice's first weight, which may not be wanted
  int64_t first_chunk, chunk_stride;  // of what is wanted
};

// Decodes a lane's part of a chunk; returns its part of the checksum. This is the hot loop.
template <typename Pairs, typename Sink>
__device__ __forceinline__ uint32_t decode_steps(Pairs pairs, Sink sink,
                                                 const uint32_t* sign_mantissa, int steps,
                                                 const Lane& lane) {
  constexpr int kHalfStepLoads = kHalfStepWords / 4;
  uint32_t acc[kLanePairs] = {};
  const auto* next = reinterpret_cast<const uint4*>(sign_mantissa + lane_word(lane.number));
  // Loaded one half-step before it is needed.
  uint4 loaded[2] = {__ldcs(next), __ldcs(next + kHalfStepLoads)};
#pragma unroll 1
  for (int left = steps; left > 0; --left) {
    next += 2 * kHalfStepLoads;
#pragma unroll
    for (int half_step = 0; half_step < 2; ++half_step) {
      const uint4 words = loaded[half_step];
      const uint32_t word[kLaneWords] = {words.x, words.y, words.z, words.w};
      uint32_t pair[kLanePairs];
#pragma unroll
      for (int j = 0; j < kLaneWords; ++j) {
        uint32_t entry0, entry1;
        pairs.next_two(j, entry0, entry1);
        pair[2 * j] = merge_in_one(entry0, word[j]);
        pair[2 * j + 1] = merge_in_one(entry1, rotl(word[j], 8));
        acc[2 * j] = checksum_step(acc[2 * j], pair[2 * j]);
        acc[2 * j + 1] = checksum_step(acc[2 * j + 1], pair[2 * j + 1]);
      }
      pairs.end_half_step();
      if (left > 1) loaded[half_step] = __ldcs(next + half_step * kHalfStepLoads);
      sink.store(half_step, pair);
    }
    sink.end_step();
  }
  uint32_t sum = 0;
#pragma unroll
  for (int j = 0; j < kLanePairs; ++j) sum += checksum_place(acc[j], lane.place() + j);
  return sum;
}

// Copies words begin .. end of the slice's exponents, rounded to 16 bytes, without waiting.
__device__ inline void stage(const uint32_t* exponents, uint32_t begin, uint32_t end, int lane,
                             uint32_t* staged) {
  begin &= ~3u;
  for (uint32_t i = 4 * lane; i < end - begin; i += 4 * kLanes) {
    __pipeline_memcpy_async(staged + i, exponents + begin + i, sizeof(uint4));
  }
  __pipeline_commit();
}

__device__ inline bool can_stage(const Slice& slice, uint32_t begin, uint32_t end) {
  return is_aligned(slice.exponents) && slice.exponents_words % 4 == 0 &&
         ((end + 3) & ~3u) - (begin & ~3u) <= kStagedWords;
}

// Whether all of the chunk's weights can be stored 16 or 8 bytes at a time.
__device__ inline bool is_inner(const Slice& slice, const Chunk& chunk) {
  const View& view = slice.view;
  const int64_t end = chunk.k + chunk.steps * kStepRows;
  return chunk.n + kTileCols <= view.n && end <= view.k &&
         (!view.is_flat || end * kTileCols <= view.size) && is_aligned(slice.out);
}

// The sum over the lanes, in all of them.
__device__ __forceinline__ uint32_t sum_of_warp(uint32_t x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    x += __shfl_xor_sync(kAllLanes, x, distance);
  }
  return x;
#else
  return __reduce_add_sync(kAllLanes, x);
#endif
}

// Finds chunk `index`, stages its record if there is a place for it, and checks it; false if it is
// corrupt. Sets `record` and, for a coded chunk, the bit of the record where the lane's stream
// starts. Like all below, it is called by a warp, whose lanes get the same result.
__device__ inline bool open_record(const Slice& slice, int64_t index, const Lane& lane,
                                   Record& record, StagedRecord* staged, uint32_t& start) {
  const uint32_t begin = __ldg(slice.chunk_offsets + index);
  const uint32_t end = __ldg(slice.chunk_offsets + index + 1);
  const uint32_t count = end - begin;
  if (begin > end || end > slice.exponents_words || count < kRecordHeaderWords) return false;

  __syncwarp();  // No lane needs the former chunk any more.
  const Chunk chunk = locate_chunk(slice.view, index);
  const bool fast = staged && is_inner(slice, chunk) && can_stage(slice, begin, end);
  if (fast) stage(slice.exponents, begin, end, lane.number, staged->words);

  const uint32_t* words = slice.exponents + begin;
  const uint32_t counts = __ldg(words + 1);
  const bool raw = counts == kRawChunk;
  const uint32_t patches = raw ? 0 : counts & 0xffff;
  const uint32_t extra = __ldg(words + 2 + lane.number / 4) >> (8 * (lane.number % 4)) & 255;
  const uint32_t bits = (counts >> 16) + extra;
  const uint32_t stream_end = sum_up_to(bits, lane.number);
  const uint32_t total = __shfl_sync(kAllLanes, stream_end, kLanes - 1);
  start = 32 * kRecordHeaderWords + stream_end - bits;
  if (lane.number == 0) {
    record = {chunk, words, count, patches, __ldg(words), raw, fast && !raw};
  }
  if (fast) __pipeline_wait_prior(0);
  __syncwarp();  // All lanes' copies have arrived.
  if (!raw && patches == kRawChunk) return false;
  return count == (raw ? kRawRecordHeaderWords + chunk.steps * kStepWords
                       : kRecordHeaderWords + (total + 31) / 32 + patches);
}

// Decodes all of the chunk but its patches; returns the lane's part of the checksum. Here and
// below, kColumns tells whether pairs may be along columns.
template <bool kColumns>
__device__ inline uint32_t decode_record(const Slice& slice, const Record& record,
                                         const StagedRecord* staged, uint32_t start,
                                         const uint32_t* table, const Lane& lane) {
  const Chunk& chunk = record.chunk;
  const View& view = slice.view;
  const uint32_t* sign_mantissa = slice.sign_mantissa + chunk.sign_mantissa_word;
  const uint32_t word = (start - kWindowLead) / 32;
  const uint32_t* words = record.words;
  uint16_t* out = slice.out + chunk.element;
  if (record.fast) {
    const uint32_t* in_place = staged->words + reinterpret_cast<uintptr_t>(words) / 4 % 4;
    const CodedPairs pairs(StagedWords(in_place + word), start - 32 * word, table);
    if (kColumns && view.along_columns) {
      return decode_steps(pairs, InnerColumns(out, view, lane), sign_mantissa, chunk.steps, lane);
    }
    return decode_steps(pairs, InnerRows(out, view, lane), sign_mantissa, chunk.steps, lane);
  }
  const auto decode_to = [&](auto sink) {
    if (record.raw) {
      const RawPairs pairs(words + kRawRecordHeaderWords + lane_word(lane.number));
      return decode_steps(pairs, sink, sign_mantissa, chunk.steps, lane);
    }
    const GlobalWords in_global(words + word, words + record.count - 1);
    return decode_steps(CodedPairs(in_global, start - 32 * word, table), sink, sign_mantissa,
                        chunk.steps, lane);
  };
  if (kColumns && view.along_columns) return decode_to(EdgeColumns(out, view, chunk, lane));
  return decode_to(EdgeRows(out, view, chunk, lane));
}

// Decodes chunk `index`; false if it is corrupt. Without `staged` nothing is staged.
template <bool kColumns>
__device__ inline bool decode_chunk(const Slice& slice, int64_t index, Record& record,
                                    StagedRecord* staged, const uint32_t* table, const Lane& lane) {
  uint32_t start;
  if (!open_record(slice, index, lane, record, staged, start)) return false;
  uint32_t sum = decode_record<kColumns>(slice, record, staged, start, table, lane);

  const Chunk& chunk = record.chunk;
  const View& view = slice.view;
  const uint32_t* patches = record.words + record.count - record.patches;
  const int rows = chunk.steps * kStepRows;
  for (uint32_t i = lane.number; i < record.patches; i += kLanes) {
    sum += checksum_patch(__ldg(patches + i));
  }
  sum = sum_of_warp(sum) + checksum_chunk(index);
  if (sum != record.checksum) return false;
  __syncwarp();  // Patches come after all other stores.
  for (uint32_t i = lane.number; i < record.patches; i += kLanes) {
    const uint32_t patch = __ldg(patches + i), position = patch >> 16;
    const int k = position / kTileCols, n = position % kTileCols;
    const int64_t element = chunk.element + k * view.stride_k() + n * view.stride_n();
    if (k < rows && chunk.k + k < view.k && chunk.n + n < view.n && element < view.size) {
      store_global(slice.out + element, static_cast<uint16_t>(patch));
    }
  }
  return true;
}

template <typename Sink>
__device__ inline void poison_steps(Sink sink, int steps) {
  uint32_t poison[kLanePairs];
#pragma unroll
  for (int j = 0; j < kLanePairs; ++j) poison[j] = ~0u;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    sink.store(0, poison);
    sink.store(1, poison);
    sink.end_step();
  }
}

// A lane poisons the weights that it decodes, so that its stores are in order.
template <bool kColumns>
__device__ inline void poison_chunk(const Slice& slice, int64_t index, const Lane& lane) {
  const Chunk chunk = locate_chunk(slice.view, index);
  uint16_t* out = slice.out + chunk.element;
  if (kColumns && slice.view.along_columns) {
    poison_steps(EdgeColumns(out, slice.view, chunk, lane), chunk.steps);
  } else {
    poison_steps(EdgeRows(out, slice.view, chunk, lane), chunk.steps);
  }
}

}  // namespace df11::native
