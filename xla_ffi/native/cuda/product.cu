// The launch of the CUDA product.

#include <cstdint>
#include <map>
#include <mutex>

#include "native/cuda/product.h"
#include "native/cuda/product_kernel.cuh"
#include "native/cuda/product_work.h"

namespace df11::native {
namespace {

// Counters of launches that follow each other on a device, each with its own, from memory that is
// never freed and always 0 between launches: to set them to 0 before each would take 2 us. They are
// used again after a million; so many are not under way at a time, and where XLA has captured a
// launch in a graph, the launches beside it in the graph have others.
class CounterPool {
 public:
  static cudaError_t take(int device, int64_t count, uint32_t** counters) {
    static std::mutex mutex;
    // Not destroyed when the process ends: kernels may still run.
    static std::map<int, CounterPool>& pools = *new std::map<int, CounterPool>;
    if (count > kCounters) return cudaErrorInvalidValue;
    const std::lock_guard<std::mutex> lock(mutex);
    CounterPool& pool = pools[device];
    if (!pool.memory_) {
      if (cudaError_t error = pool.allocate(); error != cudaSuccess) return error;
    }
    if (pool.next_ + count > kCounters) pool.next_ = 0;
    *counters = pool.memory_ + pool.next_;
    pool.next_ += count;
    return cudaSuccess;
  }

 private:
  static constexpr int64_t kCounters = 1 << 20;

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
    if (error == cudaSuccess) memory_ = memory;
    if (error != cudaSuccess && memory) cudaFree(memory);
    cudaThreadExchangeStreamCaptureMode(&mode);
    return error;
  }

  uint32_t* memory_ = nullptr;
  int64_t next_ = 0;
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
  error = CounterPool::take(device, product_counters(product), &counters);
  if (error != cudaSuccess) return error;
  ProductWork work;
  if (!plan_product(product, counters, major >= 9, blocks, static_cast<uint32_t>(shared_bytes),
                    work)) {
    return cudaErrorInvalidValue;
  }
  return launch_product_work(stream, work);
}

}  // namespace df11::native
