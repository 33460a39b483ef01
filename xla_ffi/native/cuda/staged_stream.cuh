// A lane's bit stream in shared memory: what both the decoder of pairs and the product look up in.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/async_copies.cuh"

namespace df11::native {

// Three successive words are in registers: so a word that is loaded is not needed before two more
// look-ups are done.
class StagedStream {
 public:
  // Begins at a bit of the record at this address.
  __device__ __forceinline__ void start(uint32_t record, uint32_t bit) {
    const uint32_t address = record + bit / 32 * 4;
    low_ = load_shared(address);
    middle_ = load_shared(address + 4);
    high_ = load_shared(address + 8);
    next_ = address + 12;
    position_ = bit;
  }

  // The table entries of the next two pairs: see CodedPairs. `look_up` gives that of a window.
  template <typename LookUp>
  __device__ __forceinline__ void next_two(const LookUp& look_up, uint32_t& entry0,
                                           uint32_t& entry1) {
    // Shifts look at an entry's low five bits only, its length, so the entry itself is the amount.
    const uint32_t window = __funnelshift_r(low_, middle_, position_);
    entry0 = look_up(window);
    entry1 = look_up(__funnelshift_r(window, 0, entry0));
    // Bits 5 and 6 of an entry are 0: whatever is added above, bits 0 to 6 stay right.
    const uint32_t before = position_;
    position_ += entry0 + entry1;
    advance_if((before ^ position_) & 32);
  }

 private:
  __device__ __forceinline__ void advance_if(uint32_t crossed) {
#ifdef __CUDACC__
    asm volatile(
        "{\n\t.reg .pred crossed;\n\t"
        "setp.ne.u32 crossed, %4, 0;\n\t"
        "@crossed mov.b32 %0, %1;\n\t"
        "@crossed mov.b32 %1, %2;\n\t"
        "@crossed ld.shared.u32 %2, [%3];\n\t"
        "@crossed add.u32 %3, %3, 4;\n\t}"
        : "+r"(low_), "+r"(middle_), "+r"(high_), "+r"(next_)
        : "r"(crossed));
#else
    if (!crossed) return;
    low_ = middle_;
    middle_ = high_;
    high_ = load_shared(next_);
    next_ += 4;
#endif
  }

  uint32_t low_, middle_, high_, next_, position_;
};

}  // namespace df11::native
