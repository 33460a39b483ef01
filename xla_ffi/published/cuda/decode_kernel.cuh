// The CUDA decoder of the published layout. A warp decodes a block of the stream, 4096 bytes, in
// rounds. In a round each lane has some windows of 64 bits. It counts their codes, a sum over the
// warp gives the places of its elements, and it decodes them to shared memory, from where the warp
// joins them with sign and mantissa. docs/kernel.md explains it and counts its instructions.
//
// A kernel cannot return an error, and nothing in a unit is trusted: nothing is read or written
// out of bounds whatever it holds, and what is found corrupt becomes 0xffff, a NaN: the elements
// of a block where its codes disagree with gaps or output_positions; more, if output_positions is
// not in order (see decode_kernel).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/lanes.cuh"
#include "published/cuda/lane.cuh"
#include "published/cuda/step_table.cuh"
#include "published/layout.h"

namespace df11::published {

// Three blocks of 256 threads leave a thread 80 registers.
inline constexpr int kMinBlocks = 3;

// The elements are staged from a place that is a multiple of this: as many as are stored at once.
inline constexpr int kGroup = 8;

// A warp's part of shared memory.
struct alignas(16) WarpState {
  uint8_t exponents[kMaxRoundElements + 2 * kGroup];
  // A lane's words begin one after the first, because its first window of bits begins early
  // (kWindowLead) and may reach back there; whatever is there.
  uint32_t words[kLanes * kLaneWords + 1];
};

// A block's shared memory.
struct alignas(16) BlockState {
  StepTable table;
  union {
    StepTableScratch scratch;
    WarpState warps[kWarps];
  };
};

// What a block takes of a multiprocessor, 1 KB for the system with it: three fit where there are
// 228 KB, two where there are 164, one where there are 100.
inline constexpr size_t kSharedBytes = sizeof(BlockState) + 1024;
static_assert(kMinBlocks * kSharedBytes <= 228 * 1024 && 2 * kSharedBytes <= 164 * 1024);
static_assert(kSharedBytes <= 100 * 1024);

// The weights of four exponents, rotated, and four signs and mantissas. Of both bytes of a weight
// the highest bit is from one side, the rest from the other.
struct FourWeights {
  uint32_t low, high;  // bytes

  __device__ FourWeights(uint32_t exponents, uint32_t sign_mantissa)
      : low(select_bits<0x7f7f7f7f>(exponents, sign_mantissa)),
        high(select_bits<0x80808080>(exponents, sign_mantissa)) {}
  __device__ uint32_t first_two() const { return __byte_perm(low, high, 0x5140); }
  __device__ uint32_t last_two() const { return __byte_perm(low, high, 0x7362); }
};

__device__ __forceinline__ uint4 join_group(const uint2& exponents, const uint2& sign_mantissa) {
  const FourWeights a(exponents.x, sign_mantissa.x), b(exponents.y, sign_mantissa.y);
  return {a.first_two(), a.last_two(), b.first_two(), b.last_two()};
}

// Writes groups begin .. end - 1. Group 0 is the first of `exponents`, `sign_mantissa` and `out`.
__device__ inline void write_groups(const uint8_t* exponents, const uint8_t* sign_mantissa,
                                    uint16_t* out, int begin, int end, int lane) {
  constexpr int kTogether = 4;  // loads on their way
  const auto* staged = reinterpret_cast<const uint2*>(exponents) + begin + lane;
  const auto* from = reinterpret_cast<const uint2*>(sign_mantissa) + begin + lane;
  out += (begin + lane) * kGroup;
  int left = end - begin - lane;
#pragma unroll 1
  for (; left > (kTogether - 1) * kLanes; left -= kTogether * kLanes) {
    uint2 loaded[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) loaded[i] = __ldcs(from + i * kLanes);
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      store_global(out + i * kLanes * kGroup, join_group(staged[i * kLanes], loaded[i]));
    }
    staged += kTogether * kLanes;
    from += kTogether * kLanes;
    out += kTogether * kLanes * kGroup;
  }
#pragma unroll 1
  for (; left > 0; left -= kLanes) {
    store_global(out, join_group(*staged, __ldcs(from)));
    staged += kLanes;
    from += kLanes;
    out += kLanes * kGroup;
  }
}

// Writes elements begin .. end - 1, less than a group.
__device__ inline void write_single(const uint8_t* exponents, const uint8_t* sign_mantissa,
                                    uint16_t* out, int begin, int end, int lane) {
  const int at = begin + lane;
  if (at >= end) return;
  const FourWeights weights(exponents[at], __ldg(sign_mantissa + at));
  store_global(out + at, static_cast<uint16_t>(weights.first_two()));
}

// A block of the stream on its way through the rounds. All lanes have the same.
struct Progress {
  int64_t first;   // element of the block
  int elements;    // that output_positions gives it
  bool open_end;   // there are no elements after these, but perhaps bits
  uint32_t after;  // where the next code starts, in bits after the windows before this one
  int done = 0;    // elements
  int window = 0;  // of the block
};

// One round with `windows` windows for each lane; false if something is corrupt. If its elements do
// not fit, it does nothing but ask for fewer windows.
__device__ inline bool decode_round(const Unit& unit, const StepTable& table, WarpState& warp,
                                    int64_t block, Progress& progress, int& windows, int lane) {
  const int window = progress.window + windows * lane;
  uint32_t* words = warp.words + lane * kLaneWords;
  __syncwarp();  // The round before needs nothing any more.
  stage_words(unit, block * kBlockWindows + window, words + 1);
  const uint32_t gap = read_gap(unit.gaps + block * kBlockGapBytes, window);
  __syncwarp();

  const uint32_t position = kFirstPosition + gap;
  const uint32_t windows_end = kFirstPosition + windows * kWindowBits;
  const int64_t bits = 8 * unit.encoded_bytes - (block * kBlockWindows + window) * kWindowBits;
  const uint32_t end = bits >= windows * kWindowBits ? windows_end
                       : bits > 0                    ? kFirstPosition + static_cast<uint32_t>(bits)
                                                     : 0;
  const LaneCodes codes = count_codes(unit, table, words, position, end, windows_end);

  const uint32_t sum = sum_up_to(codes.count, lane);
  const int total = static_cast<int>(__shfl_sync(kAllLanes, sum, kLanes - 1));
  if (total > kMaxRoundElements) {
    windows = kFewestWindows;
    return true;
  }

  // As long as elements are missing, a code must start where gaps says.
  const int missing = progress.elements - progress.done;
  const int before = static_cast<int>(sum - codes.count);
  const uint32_t after = __shfl_up_sync(kAllLanes, codes.after, 1);
  const bool wrong = before < missing && gap != (lane == 0 ? progress.after : after);
  if (__ballot_sync(kAllLanes, wrong)) return false;
  if (total > missing && !progress.open_end) return false;
  progress.after = __shfl_sync(kAllLanes, codes.after, kLanes - 1);

  // Staged from the last multiple of kGroup on; what is before the round's first element is from
  // the round before, which also completed the word that it ends in.
  const int64_t element = progress.first + progress.done;
  const int skip = static_cast<int>(element % kGroup);
  const int stop = skip + (total < missing ? total : missing);
  const auto place = [&](int elements) { return skip + elements < stop ? skip + elements : stop; };
  const int begin = place(before), end_place = place(static_cast<int>(sum));
  const bool first_round = progress.done == 0;
  if (begin < end_place) {
    const bool first_word = first_round && lane == 0;
    const StagedExponents staged(warp.exponents, begin, first_word ? begin / 4 : (begin + 3) / 4,
                                 (end_place + 3) / 4);
    decode_codes(unit, table, words, position, staged);
  }
  __syncwarp();

  const uint8_t* sign_mantissa = unit.sign_mantissa + (element - skip);
  uint16_t* out = unit.out + (element - skip);
  const int end_group = stop / kGroup, begin_group = first_round && skip > 0 ? 1 : 0;
  if (begin_group) {
    write_single(warp.exponents, sign_mantissa, out, skip, stop < kGroup ? stop : kGroup, lane);
  }
  write_groups(warp.exponents, sign_mantissa, out, begin_group, end_group, lane);
  progress.done += stop - skip;
  progress.window += kLanes * windows;
  if (progress.done == progress.elements) {
    const int tail = begin_group < end_group ? end_group : begin_group;
    write_single(warp.exponents, sign_mantissa, out, tail * kGroup, stop, lane);
    return true;
  }
  // The rest goes on with the next round.
  constexpr int kGroupWords = kGroup / 4;
  auto* staged = reinterpret_cast<uint32_t*>(warp.exponents);
  const uint32_t rest = lane < kGroupWords ? staged[end_group * kGroupWords + lane] : 0;
  __syncwarp();
  if (lane < kGroupWords) staged[lane] = rest;
  return true;
}

// Decodes a block of the stream; false if it is corrupt.
__device__ inline bool decode_block(const Unit& unit, const StepTable& table, WarpState& warp,
                                    int64_t block, int lane) {
  const int64_t first = unit.first_element(block), end = unit.first_element(block + 1);
  if (first == end) return true;
  if (end - first > kMaxBlockElements) return false;
  const uint8_t* gaps = unit.gaps + block * kBlockGapBytes;
  const uint32_t first_gap = block > 0 ? read_gap(gaps, 0) : 0;  // the stream begins with a code
  Progress progress = {first, static_cast<int>(end - first), end == unit.size, first_gap};
  int windows = kMostWindows;
  while (progress.done < progress.elements) {
    if (progress.window == kBlockWindows) return false;
    if (!decode_round(unit, table, warp, block, progress, windows, lane)) return false;
  }
  if (progress.open_end) return true;
  return progress.window == kBlockWindows && progress.after == read_gap(gaps + kBlockGapBytes, 0);
}

__device__ inline void poison(const Unit& unit, int64_t begin, int64_t end, int thread,
                              int threads) {
#pragma unroll 1
  for (int64_t i = begin + thread; i < end; i += threads) {
    store_global(unit.out + i, uint16_t{0xffff});
  }
}

// Thread blocks share the unit's blocks in order. A block's elements are its warp's to write, if
// they are not another's, too: so if the shares do not begin in order, or do not fill the unit,
// all of it is poisoned; and if a thread block's blocks do not begin in order, all of its share.
__global__ void __launch_bounds__(kThreads, kMinBlocks)
    decode_kernel(const __grid_constant__ Unit unit) {
#ifdef __CUDACC__
  extern __shared__ uint4 dynamic_shared[];
#else
  uint4* dynamic_shared = cuda_emulation::dynamic_shared;
#endif
  auto& state = *reinterpret_cast<BlockState*>(dynamic_shared);
  const int64_t shares = gridDim.x, share = blockIdx.x;
  const int64_t least = unit.blocks / shares, rest = unit.blocks % shares;
  const auto share_begin = [&](int64_t i) { return least * i + (i < rest ? i : rest); };
  const auto in_order = [&](int64_t block, int64_t next) {
    return unit.first_element(block) <= unit.first_element(next);
  };

  bool sound = unit.first_element(0) == 0 && unit.first_element(unit.blocks) == unit.size;
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < shares; i += kThreads) {
    sound &= in_order(share_begin(i), share_begin(i + 1));
  }
  if (__syncthreads_or(!sound)) {
    poison(unit, unit.size * share / shares, unit.size * (share + 1) / shares, threadIdx.x,
           kThreads);
    return;
  }
  const int64_t begin = share_begin(share), end = share_begin(share + 1);
#pragma unroll 1
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) sound &= in_order(i, i + 1);
  if (__syncthreads_or(!sound)) {
    poison(unit, unit.first_element(begin), unit.first_element(end), threadIdx.x, kThreads);
    return;
  }

  build_step_table(unit, state.scratch, state.table);
  const int lane = threadIdx.x % kLanes;
  // The same in all lanes, and the compiler knows it.
  const int warp = __shfl_sync(kAllLanes, threadIdx.x / kLanes, 0);
  for (int64_t block = begin + warp; block < end; block += kWarps) {
    if (!decode_block(unit, state.table, state.warps[warp], block, lane)) {
      __syncwarp();  // Poison comes after all other stores.
      poison(unit, unit.first_element(block), unit.first_element(block + 1), lane, kLanes);
    }
  }
}

}  // namespace df11::published
