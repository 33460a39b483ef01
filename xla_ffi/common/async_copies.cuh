// Asynchronous copies between global and shared memory, and what orders them: instructions that
// have no C++ of their own. Bulk copies are those of compute capability 9.0 and up; before,
// from 8.0 on, threads copy. docs/kernel.md explains how they are used.
//
// Shared memory is accessed by address here, because that is what these instructions take. Threads
// access it through one proxy, bulk copies through another. Where one accesses what the other has
// written, the rules are:
// - a copy to shared memory has arrived when wait_for_phase returns, for the thread that calls it;
// - a copy to shared memory must not overtake loads of what it overwrites: see after_loads;
// - what a thread copies itself has arrived when wait_copies returns, for that thread; for others
//   after a barrier;
// - what threads have stored to shared memory is seen by copies after fence_to_async by each of
// these
//   threads, and a barrier of the threads after that;
// - a thread's bulk stores have read shared memory after wait_stores_read, and are in global memory
//   after wait_stores; other threads know it after a barrier. At the end of the kernel all are.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace df11 {

// What a copy uses, for instance its source, made to depend on what was loaded. A load that has
// been issued may not have read yet, nor does a barrier of the warp wait until it has; a copy that
// is begun then could overwrite what it is to read. So: all lanes load; a barrier of the warp; the
// lane that begins the copy passes a word of each load here. It waits for the whole warp's, as they
// are one instruction. `zero` is 0, but the compiler must not know: a kernel's parameter.
template <typename... Words>
__device__ __forceinline__ uint32_t after_loads(uint32_t value, uint32_t zero, Words... loaded) {
  return value + ((loaded | ...) & zero);
}

#ifdef __CUDACC__

// The dynamic shared memory of the block.
#define DF11_DYNAMIC_SHARED(NAME) extern __shared__ __align__(1024) unsigned char NAME[]
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ uint32_t load_shared(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}
__device__ __forceinline__ uint4 load_shared4(uint32_t address) {
  uint4 value;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
               : "r"(address)
               : "memory");
  return value;
}
// Of what does not change any more: the compiler may move it.
__device__ __forceinline__ uint32_t load_shared_constant(uint32_t address) {
  uint32_t value;
  asm("ld.shared.u32 %0, [%1];" : "=r"(value) : "r"(address));
  return value;
}
__device__ __forceinline__ void store_shared(uint32_t address, uint16_t value) {
  asm volatile("st.shared.b16 [%0], %1;" ::"r"(address), "h"(value) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t address, uint32_t value) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t address, const uint4& value) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(value.x),
               "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
}

// One lane of a warp, the same each time. All lanes must be there. What is issued under it compiles
// to single instructions; under a comparison of lane numbers it is a loop over lanes.
__device__ __forceinline__ bool elect_lane() {
#if __CUDA_ARCH__ >= 900
  uint32_t elected;
  asm volatile(
      "{\n\t.reg .pred elected;\n\telect.sync _|elected, 0xffffffff;\n\t"
      "selp.u32 %0, 1, 0, elected;\n\t}"
      : "=r"(elected));
  return elected;
#else
  return threadIdx.x % 32 == 0;
#endif
}

// A barrier, 8 bytes in shared memory, whose phases each take one arrival. After that of
// expect_bytes, the phase is complete when that many bytes have arrived.
__device__ __forceinline__ void init_barrier(uint32_t barrier) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier) : "memory");
}
// After all init_barrier of the thread, before anything else uses them.
__device__ __forceinline__ void fence_barriers() {
#if __CUDA_ARCH__ >= 900  // before, no copies use them
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
__device__ __forceinline__ void expect_bytes(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
// Completes a phase. Who waits for it sees what this thread has stored before, and what it knows of
// by a barrier of its warp.
__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Waits until the phase of this parity is complete; the first is 0, the next 1.
__device__ __forceinline__ void wait_for_phase(uint32_t barrier, uint32_t parity) {
  uint32_t complete;
#if __CUDA_ARCH__ >= 900
#define DF11_WAIT "try_wait"  // for some time, instead of asking again and again
#else
#define DF11_WAIT "test_wait"
#endif
  do {
    asm volatile(
        "{\n\t.reg .pred complete;\n\t"
        "mbarrier." DF11_WAIT
        ".parity.shared::cta.b64 complete, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, complete;\n\t}"
        : "=r"(complete)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!complete);
#undef DF11_WAIT
}

// A thread's own copies, of 16 bytes, aligned to 16.
__device__ __forceinline__ void copy_16_bytes(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to),
               "l"(__cvta_generic_to_global(from))
               : "memory");
}
__device__ __forceinline__ void wait_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Copies a multiple of 16 bytes, aligned to 16, and counts them at the barrier when they arrive.
__device__ __forceinline__ void copy_to_shared(uint32_t to, const void* from, uint32_t bytes,
                                               uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          to),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier)
      : "memory");
}
// Brings a multiple of 16 bytes, aligned to 16, to L2, where a copy then finds them.
__device__ __forceinline__ void prefetch_copy(const void* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(from)),
               "r"(bytes)
               : "memory");
}

// Stores belong to the thread that issues them, and are waited for in groups. This one stores a box
// of the map's three dimensions, whose first element is at (x, y, z), x along the innermost. The
// map is a kernel parameter.
__device__ __forceinline__ void store_box(const CUtensorMap& map, int x, int y, int z,
                                          uint32_t from) {
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%1, %2, %3}], [%4];" ::"l"(
          &map),
      "r"(x), "r"(y), "r"(z), "r"(from)
      : "memory");
}
// Has the map fetched before the first store needs it.
__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
__device__ __forceinline__ void commit_stores() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
template <int kGroupsLeft>
__device__ __forceinline__ void wait_stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kGroupsLeft) : "memory");
}
__device__ __forceinline__ void wait_stores() {
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}
__device__ __forceinline__ void fence_to_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

#else

#define DF11_DYNAMIC_SHARED(NAME) \
  unsigned char* const NAME = reinterpret_cast<unsigned char*>(cuda_emulation::dynamic_shared)
inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const std::byte*>(pointer) -
                               cuda_emulation::shared->data()) +
         cuda_emulation::kSharedBase;
}
inline uint32_t load_shared(uint32_t address) {
  return cuda_emulation::load_shared<uint32_t>(address);
}
inline uint4 load_shared4(uint32_t address) { return cuda_emulation::load_shared<uint4>(address); }
inline uint32_t load_shared_constant(uint32_t address) { return load_shared(address); }
template <typename T>
void store_shared(uint32_t address, const T& value) {
  cuda_emulation::store_shared(address, value);
}
using cuda_emulation::arrive;
using cuda_emulation::commit_stores;
using cuda_emulation::copy_16_bytes;
using cuda_emulation::copy_to_shared;
using cuda_emulation::elect_lane;
using cuda_emulation::expect_bytes;
using cuda_emulation::fence_barriers;
using cuda_emulation::init_barrier;
using cuda_emulation::prefetch_copy;
using cuda_emulation::store_box;
using cuda_emulation::wait_copies;
using cuda_emulation::wait_for_phase;
inline void prefetch_map(const CUtensorMap&) {}
template <int kGroupsLeft>
void wait_stores_read() {
  cuda_emulation::wait_for_stores(kGroupsLeft);
}
inline void wait_stores() { cuda_emulation::wait_for_stores(0); }
inline void fence_to_async() { cuda_emulation::shared->fence(); }

#endif

}  // namespace df11
