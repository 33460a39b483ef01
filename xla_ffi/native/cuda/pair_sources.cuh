// Where a lane's exponents come from: sources hand out the table entries of a lane's pairs, two at
// a time. CodedPairs reads a bit stream, RawPairs a raw chunk.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/lanes.cuh"
#include "native/layout.h"

namespace df11::native {

// A pair of weights: the exponents of a table entry, and signs and mantissas.
__device__ __forceinline__ uint32_t merge_in_one(uint32_t entry, uint32_t sign_mantissa) {
  return select_bits<kSignMantissa>(entry, sign_mantissa);
}

// The same as StagedWords, for a record in global memory. No word behind its last is read.
class GlobalWords {
 public:
  __device__ GlobalWords(const uint32_t* words, const uint32_t* last) : next_(words), last_(last) {
    low_ = load();
    high_ = load();
  }

  __device__ uint32_t window(uint32_t position) const {
    return __funnelshift_r(low_, high_, position);
  }

  __device__ void advance_if(uint32_t crossed) {
    if (crossed) {
      low_ = high_;
      high_ = load();
    }
  }

 private:
  __device__ uint32_t load() {
    const uint32_t word = __ldg(next_);
    next_ += next_ < last_;
    return word;
  }

  uint32_t low_, high_;
  const uint32_t* next_;
  const uint32_t* last_;
};

template <typename Words>
class CodedPairs {
 public:
  // The stream starts at bit `position` of the words, which are the two that its window is in.
  __device__ CodedPairs(Words words, uint32_t position, const uint32_t* table)
      : words_(words), position_(position - kWindowLead), table_(table) {}

  __device__ void next_two(int, uint32_t& entry0, uint32_t& entry1) {
    // 32 bits serve two codes of at most 12. Shifts look at an entry's low five bits only,
    // its length, so the entry itself is the shift amount.
    const uint32_t window = words_.window(position_);
    entry0 = look_up(window);
    entry1 = look_up(__funnelshift_r(window, 0, entry0));
    // Bits 5 and 6 of an entry are 0: whatever is added above, bits 0 to 6 stay right.
    const uint32_t before = position_;
    position_ += entry0 + entry1;
    words_.advance_if((before ^ position_) & 32);
  }

  __device__ void end_half_step() {}

 private:
  __device__ uint32_t look_up(uint32_t window) const {
    constexpr uint32_t kOffsets = (kTableSize - 1) * sizeof(uint32_t);
    return *reinterpret_cast<const uint32_t*>(reinterpret_cast<const char*>(table_) +
                                              (window & kOffsets));
  }

  Words words_;
  uint32_t position_;
  const uint32_t* table_;
};

// The exponents of a raw chunk, four bytes a word.
class RawPairs {
 public:
  __device__ explicit RawPairs(const uint32_t* words) : words_(words) {}

  __device__ void next_two(int j, uint32_t& entry0, uint32_t& entry1) const {
    const uint32_t word = __ldg(words_ + j);
    entry0 = __byte_perm(word, 0, 0x1404) >> 1;  // bytes 0 and 1 to bits 7 and 23
    entry1 = __byte_perm(word, 0, 0x3424) >> 1;
  }

  __device__ void end_half_step() { words_ += kHalfStepWords; }

 private:
  const uint32_t* words_;
};

}  // namespace df11::native
