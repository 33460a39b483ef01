// The launch of the CUDA product.

#include <cstdint>
#include <map>
#include <mutex>

#include "native/cuda/product.h"
#include "native/cuda/product_kernel.cuh"
#include "native/cuda/product_work.h"

namespace df11::native {
namespace {

// Counters of a device, from memory that is never freed and always 0 between launches: to set them
// to 0 before each would take 2 us. Launches that may run at the same time have workspaces of their
// own, so each workspace has counters of its own. To take the next ones for each launch would not
// do: of a CUDA graph XLA captures some launches anew and leaves others as they are, so they would
// meet some day.
class CounterPool {
 public:
  static cudaError_t take(int device, const uint32_t* workspace, int64_t count,
                          uint32_t** counters) {
    static std::mutex mutex;
    // Not destroyed when the process ends: kernels may still run.
    static std::map<int, CounterPool>& pools = *new std::map<int, CounterPool>;
    if (count > kCounters) return cudaErrorInvalidValue;
    const std::lock_guard<std::mutex> lock(mutex);
    CounterPool& pool = pools[device];
    Range& range = pool.of_workspaces_[workspace];
    if (range.count < count) {
      if (pool.left_ < count) {
        if (cudaError_t error = pool.allocate(); error != cudaSuccess) return error;
      }
      range = {pool.next_, count};
      pool.next_ += count;
      pool.left_ -= count;
    }
    *counters = range.first;
    return cudaSuccess;
  }

 private:
  static constexpr int64_t kCounters = 1 << 20;  // that are allocated at a time
  struct Range {
    uint32_t* first = nullptr;
    int64_t count = 0;
  };

  // Also while a stream is captured, which this has nothing to do with.
  cudaError_t allocate() {
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    cudaError_t error = cudaThreadExchangeStreamCaptureMode(&mode);
    if (error != cudaSuccess) return error;
    uint32_t* memory = nullptr;
    cudaStream_t stream = nullptr;
    constexpr size_t kBytes = kCounters * sizeof(uint32_t);
    error = cudaMalloc(&memory, kBytes);
    if (error == cudaSuccess) error = cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    if (error == cudaSuccess) error = cudaMemsetAsync(memory, 0, kBytes, stream);
    if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
    if (stream) cudaStreamDestroy(stream);
    if (error == cudaSuccess) {
      next_ = memory;
      left_ = kCounters;
    }
    if (error != cudaSuccess && memory) cudaFree(memory);
    cudaThreadExchangeStreamCaptureMode(&mode);
    return error;
  }

  std::map<const uint32_t*, Range> of_workspaces_;
  uint32_t* next_ = nullptr;
  int64_t left_ = 0;
};

cudaError_t most_shared_bytes(int* bytes) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error == cudaSuccess
             ? cudaDeviceGetAttribute(bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)
             : error;
}

template <int kTiles, typename Copies>
cudaError_t launch_with(cudaStream_t stream, const ProductWork& work) {
  const uint32_t bytes = work.memory.end(kMostSharedBase);
  // Always the same, since another thread may be about to launch the kernel.
  int most = 0;
  cudaError_t error = most_shared_bytes(&most);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(product_kernel<kTiles, Copies>,
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  }
  if (error != cudaSuccess) return error;
  const MatrixWork& last = work.matrices[work.count - 1];
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(last.first_block + last.blocks));
  config.blockDim = dim3(static_cast<unsigned>(work.memory.warps * kLanes));
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, product_kernel<kTiles, Copies>, work);
}

template <int kTiles>
cudaError_t launch(cudaStream_t stream, const ProductWork& work) {
  if (!work.has_bulk_copies) return launch_with<kTiles, LaneCopies>(stream, work);
  if constexpr (kTiles > 1) {
    if (work.memory.x_bytes > 0) return launch_with<kTiles, BulkCopies<true>>(stream, work);
  }
  return launch_with<kTiles, BulkCopies<false>>(stream, work);
}

}  // namespace

cudaError_t launch_product_work(cudaStream_t stream, const ProductWork& work) {
  switch (product_tiles(work.rows)) {
    case 1:
      return launch<1>(stream, work);
    case 2:
      return launch<2>(stream, work);
    default:
      return launch<4>(stream, work);
  }
}

cudaError_t take_counters(int device, const uint32_t* workspace, int64_t count,
                          uint32_t** counters) {
  return CounterPool::take(device, workspace, count, counters);
}

cudaError_t launch_product(cudaStream_t stream, const Product& product) {
  int device = 0, major = 0, blocks = 0, shared_bytes = 0;
  if (cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const auto ask = [&](int* value, cudaDeviceAttr attribute) {
    return cudaDeviceGetAttribute(value, attribute, device);
  };
  cudaError_t error = ask(&major, cudaDevAttrComputeCapabilityMajor);
  if (error == cudaSuccess) error = ask(&blocks, cudaDevAttrMultiProcessorCount);
  if (error == cudaSuccess) error = most_shared_bytes(&shared_bytes);
  if (error != cudaSuccess) return error;
  if (major < kLeastProductCapability) return cudaErrorNotSupported;
  for (int i = 0; i < product.count; ++i) {
    const TensorSlices& slices = product.matrices[i].slices;
    if (!is_aligned(slices.exponents) || !is_aligned(slices.sign_mantissa)) {
      return cudaErrorMisalignedAddress;
    }
  }
  if (!is_aligned(product.x) || !is_aligned(product.workspace)) return cudaErrorMisalignedAddress;
  uint32_t* counters = nullptr;
  error = take_counters(device, product.workspace, product_counters(product), &counters);
  if (error != cudaSuccess) return error;
  ProductWork work;
  if (!plan_product(product, counters, major >= 9, blocks, static_cast<uint32_t>(shared_bytes),
                    work)) {
    return cudaErrorInvalidValue;
  }
  return launch_product_work(stream, work);
}

}  // namespace df11::native
