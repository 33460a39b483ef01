// Enough of CUDA to compile the kernels of xla_ffi as C++20 and run them on host
// threads, for tests on machines without a GPU. It takes the place of the real header, by
// its directory being first among the include directories.
//
// A launch runs its blocks one after the other, every second launch from the last to the first,
// and the CUDA threads of a block as fibers (fibers.h), in which ThreadSanitizer sees the data
// races that a kernel has. All 32 lanes must take part in warp functions. What is asynchronous
// happens only when it is waited for.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "shared_memory.h"

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // blocks do not run at the same time

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

inline dim3 blockIdx, blockDim, gridDim;
#define threadIdx (dim3(cuda_emulation::this_thread()))

namespace cuda_emulation {

inline constexpr int kWarpSize = 32;
inline constexpr int kMultiprocessors = 5;

struct Warp {
  Barrier barrier{kWarpSize};
  // Used in turn: when a lane writes one, all lanes have read what it held before.
  Unordered<uint32_t> slots[2][kWarpSize];
};

struct Block {
  Barrier barrier;
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<int> votes;

  explicit Block(int threads) : barrier(threads), votes(threads) {
    for (int i = 0; i < threads; i += kWarpSize) warps.push_back(std::make_unique<Warp>());
  }
};

inline int launches = 0;  // of kernels, so far
inline int compute_capability = 9;
inline std::map<const void*, size_t> shared_allowed;  // of dynamic shared memory, by kernel

inline Block* block = nullptr;
inline uint4* dynamic_shared = nullptr;  // in place of an extern __shared__ array
inline PerThread<unsigned> exchanges;

inline Warp& warp() { return *block->warps[threadIdx.x / kWarpSize]; }
inline int lane() { return static_cast<int>(threadIdx.x % kWarpSize); }

// Gives every lane the values of all lanes, which orders no memory.
inline const Unordered<uint32_t>* exchange(unsigned mask, uint32_t value) {
  check(mask == 0xffffffffu, "a warp function needs all lanes");
  Unordered<uint32_t>* slots = warp().slots[(*exchanges)++ % 2];
  slots[lane()] = value;
  warp().barrier.meet();
  return slots;
}

}  // namespace cuda_emulation

inline void __syncthreads() {
  cuda_emulation::block->barrier.arrive_and_wait();
  ++cuda_emulation::now->warp;
  ++cuda_emulation::now->block;
}
inline int __syncthreads_or(int predicate) {
  cuda_emulation::Block& block = *cuda_emulation::block;
  block.votes[threadIdx.x] = predicate != 0;
  __syncthreads();
  const int any = *std::max_element(block.votes.begin(), block.votes.end());
  __syncthreads();
  return any;
}

inline void __syncwarp() {
  cuda_emulation::warp().barrier.arrive_and_wait();
  ++cuda_emulation::now->warp;
}
inline uint32_t __shfl_sync(unsigned mask, uint32_t value, int source) {
  return cuda_emulation::exchange(mask, value)[source];
}
inline uint32_t __shfl_up_sync(unsigned mask, uint32_t value, unsigned delta) {
  const int lane = cuda_emulation::lane(), source = lane - static_cast<int>(delta);
  return cuda_emulation::exchange(mask, value)[source < 0 ? lane : source];
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const auto* votes = cuda_emulation::exchange(mask, predicate != 0);
  unsigned ballot = 0;
  for (int i = 0; i < cuda_emulation::kWarpSize; ++i) ballot |= votes[i] << i;
  return ballot;
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  const auto* values = cuda_emulation::exchange(mask, value);
  unsigned sum = 0;
  for (int i = 0; i < cuda_emulation::kWarpSize; ++i) sum += values[i];
  return sum;
}

inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((uint64_t{high} << 32 | low) >> (shift & 31));
}
inline uint32_t __funnelshift_l(uint32_t low, uint32_t high, uint32_t shift) {
  return static_cast<uint32_t>((uint64_t{high} << 32 | low) << (shift & 31) >> 32);
}
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t bytes = uint64_t{y} << 32 | x;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned nibble = selector >> (4 * i) & 15;
    cuda_emulation::check(nibble < 8, "__byte_perm does not replicate signs");
    result |= static_cast<uint32_t>(bytes >> (8 * nibble) & 255) << (8 * i);
  }
  return result;
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>(uint64_t{a} * b >> 32);
}
inline uint32_t __dp4a(uint32_t a, uint32_t b, uint32_t sum) {
  for (int i = 0; i < 32; i += 8) sum += (a >> i & 255) * (b >> i & 255);
  return sum;
}
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(uint32_t x) { return __builtin_ffs(static_cast<int>(x)); }
inline uint32_t __brev(uint32_t x) {
  uint32_t result = 0;
  for (int i = 0; i < 32; ++i) result |= (x >> i & 1) << (31 - i);
  return result;
}

inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
using std::max;
using std::min;

template <typename T>
T __ldg(const T* from) {
  return *from;
}
template <typename T>
T __ldcg(const T* from) {
  return *from;
}
template <typename T>
void __stcg(T* to, const T& value) {
  *to = value;
}
template <typename T>
T __ldcs(const T* from) {
  return *from;
}

inline uint32_t atomicAdd(uint32_t* to, uint32_t value) {
  return __atomic_fetch_add(to, value, __ATOMIC_RELAXED);
}

#include "asynchronous.h"

// Host functions.

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorNotSupported = 801,
  cudaErrorMisalignedAddress = 716,
};
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = struct CUstream_st*;
struct cudaLaunchAttribute;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount      ? cuda_emulation::kMultiprocessors
           : attribute == cudaDevAttrComputeCapabilityMajor ? cuda_emulation::compute_capability
                                                            : int{cuda_emulation::kMostShared};
  return cudaSuccess;
}
template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int bytes) {
  cuda_emulation::shared_allowed[reinterpret_cast<const void*>(kernel)] = bytes;
  return cudaSuccess;
}
template <typename T>
cudaError_t cudaMalloc(T** memory, size_t bytes) {
  *memory = static_cast<T*>(std::malloc(bytes));
  return cudaSuccess;
}
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  if (bytes) std::memcpy(to, from, bytes);
  return cudaSuccess;
}
// Streams are of one kind, and nothing is captured.
enum cudaStreamCaptureMode { cudaStreamCaptureModeRelaxed };
inline constexpr unsigned cudaStreamNonBlocking = 1;
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) {
  return cudaSuccess;
}
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = nullptr;
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }

inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* memory) {
  std::free(memory);
  return cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  ++cuda_emulation::launches;
  const unsigned threads = config->blockDim.x;
  cuda_emulation::check(threads % cuda_emulation::kWarpSize == 0, "a warp is not full");
  cuda_emulation::Block block(static_cast<int>(threads));
  cuda_emulation::check(
      config->dynamicSmemBytes <=
          std::max<size_t>(48 * 1024,
                           cuda_emulation::shared_allowed[reinterpret_cast<const void*>(kernel)]),
      "the kernel was not allowed as much shared memory");
  cuda_emulation::SharedMemory shared(config->dynamicSmemBytes, threads);
  const bool backwards = cuda_emulation::launches % 2 == 0;
  cuda_emulation::block = &block;
  cuda_emulation::shared = &shared;
  cuda_emulation::dynamic_shared = reinterpret_cast<uint4*>(shared.data());
  blockDim = config->blockDim;
  gridDim = config->gridDim;
  const auto begin_block = [&](unsigned i) { blockIdx = dim3(backwards ? gridDim.x - 1 - i : i); };
  begin_block(0);
  cuda_emulation::fibers.run(threads, [&] {
    *cuda_emulation::now = {};
    for (unsigned i = 0; i < gridDim.x; ++i) {
      kernel(arguments...);
      cuda_emulation::end_block();
      __syncthreads();
      if (threadIdx.x == 0) {
        shared.reset();
        cuda_emulation::reset_barriers();
        begin_block(i + 1);
      }
      __syncthreads();
    }
  });
  return cudaSuccess;
}
