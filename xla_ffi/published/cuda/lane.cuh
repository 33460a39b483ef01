// A lane's part in decoding a published unit: some windows of the stream, counted and decoded.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/lanes.cuh"
#include "published/cuda/step_table.cuh"
#include "published/layout.h"

namespace df11::published {

// In a round a lane has four windows; two, whose elements always fit, where those of four do not.
inline constexpr int kMostWindows = 4;
inline constexpr int kFewestWindows = 2;
inline constexpr int kMaxRoundElements = kLanes * kFewestWindows * kMaxWindowElements;

// A lane completes its last word of four exponents with up to three codes of the lanes after it.
// All of these start before 64 bits after the last code of its own, and that one ends at most 31
// bits after its windows: so it gets to see the bits of some words more.
inline constexpr int kLookaheadWords = 5;
inline constexpr int kLaneWords = kMostWindows * kWindowBytes / 4 + kLookaheadWords;
static_assert(kLaneWords % 2 == 1, "lanes that are equally far on would meet in a memory bank");

// Positions in a lane's bits are counted from its word before the first.
inline constexpr uint32_t kFirstPosition = 32 - kWindowLead;

// 32 bits of the stream, the first of them lowest.
__device__ __forceinline__ uint32_t first_bit_lowest(uint32_t bytes) {
  return __brev(__byte_perm(bytes, 0, 0x0123));
}

// Four bytes, of which `left` are in the stream; zeros follow them.
__device__ inline uint32_t load_end(const uint8_t* bytes, int64_t left) {
  uint32_t word = 0;
#pragma unroll 1
  for (int i = 0; i < 4 && i < left; ++i) word |= uint32_t{__ldg(bytes + i)} << 8 * i;
  return word;
}

// Copies a lane's windows, as if they were four, and the words after them. The first of them has an
// even number.
__device__ inline void stage_words(const Unit& unit, int64_t window, uint32_t* words) {
  constexpr int kLoads = (kLaneWords + 3) / 4, kLoadBytes = sizeof(uint4);
  static_assert(kFewestWindows * kWindowBytes % kLoadBytes == 0);
  const uint8_t* bytes = unit.encoded_exponent + window * kWindowBytes;
  const int64_t left = unit.encoded_bytes - window * kWindowBytes;
  if (left >= kLoads * kLoadBytes) {
    uint4 loaded[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) loaded[i] = __ldg(reinterpret_cast<const uint4*>(bytes) + i);
#pragma unroll
    for (int i = 0; i < kLaneWords; ++i) {
      const uint4& four = loaded[i / 4];
      const uint32_t word[4] = {four.x, four.y, four.z, four.w};
      words[i] = first_bit_lowest(word[i % 4]);
    }
    return;
  }
#pragma unroll 1
  for (int i = 0; i < kLaneWords; ++i) {
    words[i] = first_bit_lowest(load_end(bytes + 4 * i, left - 4 * i));
  }
}

// The result of counting a lane's codes.
struct LaneCodes {
  uint32_t count;  // that start in its windows
  uint32_t after;  // where the next code starts, in bits after its windows
};
inline constexpr uint32_t kNoCode = ~0u;

// Bits of the window that index the table, as an offset in bytes.
__device__ __forceinline__ uint32_t table_offset(uint32_t window) {
  static_assert(kWindowLead == 2 && kWindowLead + 2 * kIndexBits <= 32);
  return window & (kIndices - 1) << kWindowLead;
}

__device__ __forceinline__ uint32_t table_word(const uint32_t* words, uint32_t offset) {
  return *reinterpret_cast<const uint32_t*>(reinterpret_cast<const char*>(words) + offset);
}

// The step over one code that is not in the table; 0 if there is none.
__device__ inline uint32_t long_step(const Unit& unit, const uint32_t* words, uint32_t state,
                                     uint32_t& exponent) {
  const uint32_t at = (state & kStepBits) + kWindowLead;
  const uint32_t bits = __funnelshift_r(words[at / 32], words[at / 32 + 1], at);
  const DecodedCode code = look_up_code(unit, __brev(bits));
  if (code.length == 0) return 0;
  exponent = rotate_exponent(code.exponent);
  return code.length | 1u << kStepCodes;
}

// Counts the codes from `position` to `end`, which may be before it. `windows_end` is where the
// lane's windows end; `end` is there, or where the stream ends.
__device__ inline LaneCodes count_codes(const Unit& unit, const StepTable& table,
                                        const uint32_t* words, uint32_t position, uint32_t end,
                                        uint32_t windows_end) {
  StagedWords stream(words + position / 32);
  uint32_t state = position;  // a sum of steps
  const auto advance = [&](uint32_t steps) {
    const uint32_t before = state;
    state += steps;
    stream.advance_if((before ^ state) & 32);
  };
  // Two look-ups at a time, as long as all their codes must start before the end.
  const int last = static_cast<int>(end) - 2 * kIndexBits;
  while (static_cast<int>(state & kStepBits) <= last) {
    const uint32_t window = stream.window(state);
    uint32_t step = table_word(table.steps, table_offset(window)), second = 0, exponent;
    if (step == 0) {
      step = long_step(unit, words, state, exponent);
      if (step == 0) return {state >> kStepCodes & kMaxStepCodes, kNoCode};
    } else {
      second = table_word(table.steps, table_offset(__funnelshift_r(window, 0, step)));
    }
    advance(step + second);
  }
  uint32_t step = 0, start = position;
  while ((state & kStepBits) < end) {
    start = state & kStepBits;
    step = table_word(table.steps, table_offset(stream.window(state)));
    uint32_t exponent;
    if (step == 0) step = long_step(unit, words, state, exponent);
    if (step == 0) return {state >> kStepCodes & kMaxStepCodes, kNoCode};
    advance(step);
  }
  // The last step may have gone over codes that start at or after the end.
  const uint32_t left = end - start;
  const uint32_t beyond = left < kIndexBits ? step >> kStepStarts >> left : 0;
  const uint32_t count = (state >> kStepCodes & kMaxStepCodes) - __popc(beyond);
  const uint32_t next = beyond ? end + __ffs(beyond) - 1 : state & kStepBits;
  return {count, next - windows_end};
}

// Exponents on their way to shared memory, whole words at a time. Of the words of neighbouring
// lanes each is written by one: the lane whose element is the first in it.
class StagedExponents {
 public:
  // The next exponent is for byte `place`. Words `begin` to `end` - 1 are the lane's.
  __device__ StagedExponents(uint8_t* bytes, int place, int begin, int end)
      : words_(bytes + 4 * begin),
        at_(4 * (place / 4 - begin)),
        end_(4 * (end - begin)),
        fill_(place % 4 * 8) {}

  __device__ bool complete() const { return at_ >= end_; }

  __device__ __forceinline__ void append(uint32_t exponents, uint32_t step) {
    const uint32_t before = fill_;
    fill_ += step >> (kStepCodes - 3);  // bits; above bit 5 it holds anything
    const uint32_t word = partial_ | __funnelshift_l(0, exponents, before);
    const uint32_t crossed = (before ^ fill_) & 32;
    if (crossed && static_cast<uint32_t>(at_) < static_cast<uint32_t>(end_)) {
      *reinterpret_cast<uint32_t*>(words_ + at_) = word;
    }
    partial_ = crossed ? __funnelshift_l(exponents, 0, before) : word;
    at_ += static_cast<int>(crossed / 8);
  }

 private:
  uint8_t* words_;
  int at_, end_;  // bytes; -4 in a word before the lane's
  uint32_t partial_ = 0, fill_;
};

// Decodes the codes from `position` on until all of the lane's words are complete.
__device__ inline void decode_codes(const Unit& unit, const StepTable& table, const uint32_t* words,
                                    uint32_t position, StagedExponents staged) {
  StagedWords stream(words + position / 32);
  uint32_t state = position;
  while (!staged.complete()) {
    const uint32_t window = stream.window(state), offset = table_offset(window);
    uint32_t step = table_word(table.steps, offset), second = 0;
    uint32_t exponents = table_word(table.exponents, offset), second_exponents = 0;
    if (step == 0) {
      step = long_step(unit, words, state, exponents);
      // After the last element there may be anything; it must only come to an end.
      if (step == 0) step = 1 | 1u << kStepCodes;
    } else {
      const uint32_t second_offset = table_offset(__funnelshift_r(window, 0, step));
      second = table_word(table.steps, second_offset);
      second_exponents = table_word(table.exponents, second_offset);
    }
    const uint32_t before = state;
    state += step + second;
    stream.advance_if((before ^ state) & 32);
    staged.append(exponents, step);
    staged.append(second_exponents, second);
  }
}

}  // namespace df11::published
