// The CUDA decoder for every GPU and every slice: a warp decodes a chunk at a time
// (decode_chunk.cuh). docs/kernel.md explains it and counts its instructions.
//
// A kernel cannot return an error: what is corrupt is poisoned. A slice whose header or codebook is
// wrong is poisoned as a whole; a chunk, if its offsets, its record's length or the checksum is
// wrong.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "native/cuda/canonical_codes.cuh"
#include "native/cuda/decode_chunk.cuh"
#include "native/cuda/open_slice.cuh"
#include "native/tensor_slices.h"

namespace df11::native {

// Three blocks of 256 threads, which is what shared memory has room for on most GPUs, leave a
// thread 80 registers.
inline constexpr int kMinBlocks = 3;

// The tensors of one launch, passed by value: all there is room for in the 4 KB that
// kernel parameters may take.
inline constexpr int kTensorsPerLaunch = 17;
struct DecodeBatch {
  int count = 0;
  int64_t first_chunk[kTensorsPerLaunch + 1] = {};  // of a tensor; the last is the end
  TensorSlices tensors[kTensorsPerLaunch] = {};
};
static_assert(sizeof(DecodeBatch) <= 4096);

// What a block works on: successive chunks of one slice. In shared memory.
struct Assignment {
  Slice slice;
  int64_t first;   // of the chunks that are wanted
  uint32_t count;  // of chunks; 0 if there is nothing left
  bool header_sound, new_table;
  TableKey table;
  int64_t at, end;  // what is left to the block, in chunks of the launch
  int tensor;       // of this slice, and the first to look at for the next one
};

// Blocks share the chunks of a launch in order, so that a block sees few slices: it builds
// a table for each.
__device__ inline void start_block(const DecodeBatch& batch, Assignment& work) {
  const int64_t chunks = batch.first_chunk[batch.count], block = blockIdx.x;
  const int64_t share = divide(chunks, gridDim.x), rest = chunks - share * gridDim.x;
  work.at = block * share + (block < rest ? block : rest);
  work.end = work.at + share + (block < rest);
  work.tensor = 0;
  work.table = {};
}

__device__ inline void next_assignment(const DecodeBatch& batch, Assignment& work) {
  for (;;) {
    work.count = 0;
    if (work.at == work.end) return;
    while (work.at >= batch.first_chunk[work.tensor + 1]) ++work.tensor;
    const TensorSlices& tensor = batch.tensors[work.tensor];
    const int64_t chunks = tensor.chunks();
    const int64_t in_tensor = work.at - batch.first_chunk[work.tensor];
    const int64_t b = tensor.batch == 1 ? 0 : divide(in_tensor, chunks);
    work.first = in_tensor - b * chunks;
    const int64_t left = work.end - work.at, in_slice = chunks - work.first;
    constexpr int64_t kMost = 1 << 30;
    const int64_t count = left < in_slice ? left : in_slice;
    work.count = static_cast<uint32_t>(count < kMost ? count : kMost);
    work.at += work.count;
    const OpenSlice opened = open_slice(tensor, b, work.slice, work.table);
    work.header_sound = opened.header_sound;
    work.new_table = opened.new_table;
    if (!opened.skipped) return;
  }
}

__global__ void __launch_bounds__(kThreads, kMinBlocks)
    decode_kernel(const __grid_constant__ DecodeBatch batch) {
  __shared__ uint32_t table[kTableSize];
  __shared__ StagedRecord staged[kWarps];
  __shared__ Record records[kWarps];
  __shared__ CanonicalCodes codes;
  // Raw, since shared memory has no initial values, which the type has.
  alignas(Assignment) __shared__ unsigned char work_memory[sizeof(Assignment)];
  auto& work = *reinterpret_cast<Assignment*>(work_memory);
  const Lane lane(threadIdx.x % kLanes);
  // The same in all lanes, and the compiler knows it.
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / kLanes, 0);

  if (threadIdx.x == 0) start_block(batch, work);
  for (;;) {
    __syncthreads();  // No warp needs the former assignment, or its table, any more.
    if (threadIdx.x == 0) next_assignment(batch, work);
    __syncthreads();
    if (work.count == 0) return;
    if (work.new_table) {
      sort_codes(load_codebook(work.table.codebook, lane.number), kMaxCodeBits, codes);
      __syncthreads();
      if (threadIdx.x == 0) work.table.sound = codes.sound;
      if (codes.sound) {
        fill_table<4>(codes, kMaxCodeBits,
                      [&](uint32_t index, uint32_t entry) { table[index] = entry; });
      }
      __syncthreads();
    }
    const bool sound =
        work.header_sound && work.table.sound && codes.fit_in(batch.tensors[work.tensor].code_bits);
    for (uint32_t i = warp; i < work.count; i += kWarps) {
      const int64_t index = work.slice.first_chunk + (work.first + i) * work.slice.chunk_stride;
      if (!sound ||
          !decode_chunk<true>(work.slice, index, records[warp], &staged[warp], table, lane)) {
        poison_chunk<true>(work.slice, index, lane);
      }
    }
  }
}

}  // namespace df11::native
