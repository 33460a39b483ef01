// Where a lane's exponents come from, and where its weights go to.
//
// Sources hand out the table entries of a lane's pairs, two at a time: CodedPairs from a
// bit stream, RawPairs from a raw chunk. Rows take 8 columns of one row at a time.
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

  __device__ void end_half_step() { words_ += kHalfStepPairs / 2; }

 private:
  const uint32_t* words_;
};

// Rows of a chunk that is aligned and nowhere at the view's edge.
class InnerRows {
 public:
  __device__ InnerRows(uint16_t* first, int64_t cols) : row_(first), cols_(cols) {}

  __device__ void store(const uint4& weights) {
    store_global(row_, weights);
    row_ += cols_;
  }

  __device__ void skip(int rows) { row_ += rows * cols_; }

 private:
  uint16_t* row_;
  int64_t cols_;
};

// Rows of any chunk: the lane's 8 columns may end early, or be unaligned.
class EdgeRows {
 public:
  // Of the view's rows all are complete, but in a flat view perhaps the last. `view` is in
  // shared memory.
  __device__ EdgeRows(uint16_t* out, const View& view, int64_t row, int64_t col)
      : row_(out + row * view.cols + col), cols_(&view.cols) {
    const bool partial = view.size != view.rows * view.cols;
    const int64_t complete = view.rows - (partial ? 1 : 0);
    rows_left_ = clamp(complete - row, -1, kTileRows);
    count_ = clamp(view.cols - col, 0, 8);
    last_count_ = partial ? clamp(view.size - complete * view.cols - col, 0, 8) : 0;
  }

  __device__ void store(const uint4& weights) {
    const int count = rows_left_ > 0 ? count_ : rows_left_ == 0 ? last_count_ : 0;
    if (count == 8 && is_aligned(row_)) {
      store_global(row_, weights);
    } else {
      const uint32_t words[4] = {weights.x, weights.y, weights.z, weights.w};
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (i < count)
          store_global(row_ + i, static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2))));
      }
    }
    skip(1);
  }

  __device__ void skip(int rows) {
    row_ += rows * *cols_;
    rows_left_ -= rows;
  }

 private:
  __device__ static int clamp(int64_t x, int low, int high) {
    return x < low ? low : x > high ? high : static_cast<int>(x);
  }

  uint16_t* row_;
  // Read anew for each row: multiples of it, kept in registers by the compiler, spill.
  const volatile int64_t* cols_;
  int rows_left_;           // complete ones, from here to the end of the view
  int count_, last_count_;  // weights of the lane in a complete row, in the one after these
};

}  // namespace df11::native
