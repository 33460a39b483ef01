// The look-up table for the codes of a published unit, built by a block in shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/lanes.cuh"
#include "published/check.h"
#include "published/layout.h"

namespace df11::published {

// One look-up takes this many bits, and gives the codes that are complete in them, but at most
// four: their exponents fill a word. The first bit of the stream is the index's lowest.
inline constexpr int kIndexBits = 11;
inline constexpr int kIndices = 1 << kIndexBits;
inline constexpr int kMaxCodes = 4;

// A step over some codes: their length in bits 0..11, their number from bit 12 on, and from bit 21
// on where codes after the first start: bit 20 + i is for bit i of the stream. So a sum of steps
// has in its low 12 bits how far they go together, in the 9 bits above how many codes they are.
// 0 stands for bits that hold no complete code: it is longer, or there is none.
inline constexpr uint32_t kStepBits = 0xfff;
inline constexpr int kStepCodes = 12;
inline constexpr uint32_t kMaxStepCodes = 0x1ff;
inline constexpr int kStepStarts = 20;

struct StepTable {
  uint32_t steps[kIndices];
  uint32_t exponents[kIndices];  // rotated, the first in the lowest byte; 0 where there are fewer
};

struct StepTableScratch {
  uint32_t changes[kMaxRows * kRowEntries / kLanes];  // a bit for each entry unlike the one before
  uint16_t first_codes[kIndices];                     // exponent and length of the first, or 0
};

// An exponent is kept rotated: its lowest bit, which bf16 has on top of the low byte, comes on top,
// and the others below, as in the high byte.
DF11_HD uint32_t rotate_exponent(uint32_t exponent) {
  return (exponent >> 1 | exponent << 7) & 0xff;
}

struct DecodedCode {
  uint32_t exponent, length;  // 0 if these are no code
};

// The code that the bits, the first of them highest, begin with.
__device__ inline DecodedCode look_up_code(const Unit& unit, uint32_t bits) {
  const uint8_t* row = unit.luts;
#pragma unroll 1
  for (int level = 0; level < kLevels; ++level) {
    const uint32_t entry = __ldg(row + (bits >> 24));
    if (entry < kFirstPointer) {
      const uint32_t length = __ldg(unit.luts + unit.rows * kRowEntries + entry);
      return {entry, ends_in_level(length, level) ? length : 0};
    }
    if (pointed_row(entry) >= unit.rows) break;
    row = unit.luts + pointed_row(entry) * kRowEntries;
    bits <<= 8;
  }
  return {0, 0};
}

// Whether all entries of a run are alike. Its length is a power of two, and it is aligned to that.
__device__ inline bool is_run(const uint32_t* changes, int first, int length) {
  uint32_t seen = changes[first / 32] >> first % 32 & ~1u;
  if (length < 32) return (seen & ((1u << length) - 1)) == 0;
  for (int i = 1; i < length / 32; ++i) seen |= changes[first / 32 + i];
  return seen == 0;
}

// The first code in kIndexBits bits, if it is the same whatever follows them. This must be asked:
// where no code is, as in the place of the end symbol, tables repeat the entry before, whose
// length may reach over other codes.
__device__ inline uint16_t first_code(const Unit& unit, const uint32_t* changes, uint32_t bits) {
  const DecodedCode code = look_up_code(unit, bits);
  const int length = static_cast<int>(code.length);
  if (length == 0 || length > kIndexBits) return 0;
  static_assert(kIndexBits <= 16);
  int row = 0, entry = static_cast<int>(bits >> 24), run = 8 - length;
  if (length > 8) {
    row = pointed_row(__ldg(unit.luts + entry));
    entry = static_cast<int>(bits >> 16 & 255);
    run = 16 - length;
  }
  if (!is_run(changes, row * kRowEntries + (entry >> run << run), 1 << run)) return 0;
  return static_cast<uint16_t>(rotate_exponent(code.exponent) << 8 | length);
}

// All threads of the block take part. Ends with a barrier.
__device__ inline void build_step_table(const Unit& unit, StepTableScratch& scratch,
                                        StepTable& table) {
  const int warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  for (int i = warp; i < unit.rows * (kRowEntries / kLanes); i += kWarps) {
    const int at = i * kLanes + lane;
    const bool differs =
        at % kRowEntries != 0 && __ldg(unit.luts + at) != __ldg(unit.luts + at - 1);
    const uint32_t changes = __ballot_sync(kAllLanes, differs);
    if (lane == 0) scratch.changes[i] = changes;
  }
  __syncthreads();
  for (uint32_t index = threadIdx.x; index < kIndices; index += kThreads) {
    scratch.first_codes[index] = first_code(unit, scratch.changes, __brev(index));
  }
  __syncthreads();
  for (uint32_t index = threadIdx.x; index < kIndices; index += kThreads) {
    uint32_t length = 0, count = 0, starts = 0, exponents = 0;
    while (count < kMaxCodes) {
      const uint32_t code = scratch.first_codes[index >> length];
      if (code == 0 || length + (code & 255) > kIndexBits) break;
      starts |= 1u << length;
      exponents |= code >> 8 << 8 * count;
      length += code & 255;
      ++count;
    }
    table.steps[index] = length | count << kStepCodes | (starts & ~1u) << kStepStarts;
    table.exponents[index] = exponents;
  }
  __syncthreads();
}

}  // namespace df11::published
