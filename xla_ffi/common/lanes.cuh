// The lanes and warps of a block, their accesses of 16 bytes, and streams of bits in shared memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/inline.h"
#include "common/lanes.h"

namespace df11 {

#ifndef DF11_DECODE_WARPS
#define DF11_DECODE_WARPS 8
#endif
inline constexpr int kWarps = DF11_DECODE_WARPS;  // of a block
inline constexpr int kThreads = kWarps * kLanes;
inline constexpr uint32_t kAllLanes = 0xffffffffu;

DF11_HD bool is_aligned(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % sizeof(uint4) == 0;
}

// The inclusive prefix sum over the lanes of a warp, or over the first `kCount` of them.
template <int kCount = kLanes>
__device__ __forceinline__ uint32_t sum_up_to(uint32_t x, int lane) {
#pragma unroll
  for (int distance = 1; distance < kCount; distance *= 2) {
    const uint32_t below = __shfl_up_sync(kAllLanes, x, distance);
    if (lane >= distance) x += below;
  }
  return x;
}

// A value of which nvcc computes nothing earlier than here, nor it anew later. (ptxas still may.)
template <typename T>
__device__ __forceinline__ T keep(T value) {
#ifdef __CUDACC__
  if constexpr (sizeof(T) == 4) {
    asm volatile("" : "+r"(value));
  } else {
    asm volatile("" : "+l"(value));
  }
#endif
  return value;
}

// The compiler moves nothing past it: neither up what waits for loads, in front of other work, nor
// up loads, in front of a fence that waits for them. All lanes must be there. It orders no memory.
__device__ __forceinline__ void keep_order() {
#ifdef __CUDACC__
  __syncwarp();
#endif
}

// Stores to global memory. The compiler does not see that a pointer that comes from shared
// memory is one to global memory, and would take a slower, generic store.
__device__ __forceinline__ void store_global(uint16_t* to, const uint4& weights) {
#ifdef __CUDACC__
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "r"(weights.x), "r"(weights.y), "r"(weights.z), "r"(weights.w)
               : "memory");
#else
  *reinterpret_cast<uint4*>(to) = weights;
#endif
}
__device__ __forceinline__ void store_global(uint16_t* to, const uint2& weights) {
#ifdef __CUDACC__
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)),
               "r"(weights.x), "r"(weights.y)
               : "memory");
#else
  *reinterpret_cast<uint2*>(to) = weights;
#endif
}
__device__ __forceinline__ void store_global(uint16_t* to, uint16_t weight) {
#ifdef __CUDACC__
  asm volatile("st.global.b16 [%0], %1;" ::"l"(__cvta_generic_to_global(to)), "h"(weight)
               : "memory");
#else
  *to = weight;
#endif
}

// A load that the compiler leaves where it is.
__device__ __forceinline__ int32_t load_here(const int32_t* from) {
#ifdef __CUDACC__
  int32_t value;
  asm volatile("ld.global.s32 %0, [%1];"
               : "=r"(value)
               : "l"(__cvta_generic_to_global(from))
               : "memory");
  return value;
#else
  return *from;
#endif
}

// Brings what is there to L2.
__device__ __forceinline__ void prefetch_global(const void* from) {
#ifdef __CUDACC__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(from)));
#else
  static_cast<void>(from);
#endif
}

// Adds to a counter in global memory and returns what it was. Who sees the sum, by adding to it
// likewise, sees what this thread has stored before, and what it knows of by a barrier, on the
// whole device.
__device__ __forceinline__ uint32_t add_in_order(uint32_t* counter, uint32_t count) {
#ifdef __CUDACC__
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(counter)), "r"(count)
               : "memory");
  return before;
#else
  return atomicAdd(counter, count);
#endif
}

// The bits of `a` where kMask has zeros, those of `b` where it has ones: in one instruction. The
// compiler takes two.
template <uint32_t kMask>
__device__ __forceinline__ uint32_t select_bits(uint32_t a, uint32_t b) {
#ifdef __CUDACC__
  uint32_t selected;
  asm("lop3.b32 %0, %1, %2, %3, 0xb8;"  // (a & ~mask) | (b & mask)
      : "=r"(selected)
      : "r"(a), "n"(kMask), "r"(b));
  return selected;
#else
  return (a & ~kMask) | (b & kMask);
#endif
}

// The window into a stream begins two bits early: so the next code, masked, is the byte
// offset of its table entry.
inline constexpr uint32_t kWindowLead = 2;

// Two successive words of a stream that is in shared memory.
class StagedWords {
 public:
  __device__ explicit StagedWords(const uint32_t* words)
      : low_(words[0]), high_(words[1]), next_(words + 2) {}

  __device__ uint32_t window(uint32_t position) const {
    return __funnelshift_r(low_, high_, position);
  }

  // Moves on by a word if `crossed` is not 0.
  __device__ void advance_if(uint32_t crossed) {
#ifdef __CUDACC__
    // Four instructions; the compiler makes six of the other branch.
    auto next = static_cast<uint32_t>(__cvta_generic_to_shared(next_));
    asm("{\n\t.reg .pred crossed;\n\t"
        "setp.ne.u32 crossed, %3, 0;\n\t"
        "@crossed mov.b32 %0, %1;\n\t"
        "@crossed ld.shared.u32 %1, [%2];\n\t"
        "@crossed add.u32 %2, %2, 4;\n\t}"
        : "+r"(low_), "+r"(high_), "+r"(next)
        : "r"(crossed));
    next_ = static_cast<const uint32_t*>(__cvta_shared_to_generic(next));
#else
    if (crossed) {
      low_ = high_;
      high_ = *next_++;
    }
#endif
  }

 private:
  uint32_t low_, high_;
  const uint32_t* next_;
};

}  // namespace df11
