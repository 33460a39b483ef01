// How many blocks of a kernel fit on the current device at once.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstddef>

namespace df11 {

// Also lets the kernel use that much dynamic shared memory. Asks each device once.
template <auto kKernel>
cudaError_t resident_blocks(int threads, size_t shared_bytes, int* blocks) {
  constexpr int kCachedDevices = 64;
  static std::atomic<int> cache[kCachedDevices];  // 0: not asked yet

  int device = 0;
  if (cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const bool cached = device < kCachedDevices;
  if (cached) {
    *blocks = cache[device].load(std::memory_order_relaxed);
    if (*blocks) return cudaSuccess;
  }
  int multiprocessors = 0, occupancy = 0;
  cudaError_t error =
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(shared_bytes));
  if (error != cudaSuccess) return error;
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&occupancy, kKernel, threads, shared_bytes);
  if (error != cudaSuccess) return error;
  *blocks = multiprocessors * std::max(occupancy, 1);
  if (cached) cache[device].store(*blocks, std::memory_order_relaxed);
  return cudaSuccess;
}

}  // namespace df11
