// The launch of the CUDA product.

#include <cstdint>

#include "native/cuda/product.h"
#include "native/cuda/product_kernel.cuh"
#include "native/cuda/product_work.h"

namespace df11::native {
namespace {

template <int kTiles>
cudaError_t launch(cudaStream_t stream, const ProductWork& work) {
  const uint32_t bytes = work.memory.end(kMostSharedBase);
  const cudaError_t error = cudaFuncSetAttribute(
      product_kernel<kTiles>, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
  const MatrixWork& last = work.matrices[work.count - 1];
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(last.first_block + last.blocks));
  config.blockDim = dim3(static_cast<unsigned>(work.memory.warps * kLanes));
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, product_kernel<kTiles>, work);
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
  if (error == cudaSuccess) error = ask(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (error != cudaSuccess) return error;
  if (major < kLeastProductCapability) return cudaErrorNotSupported;
  for (int i = 0; i < product.count; ++i) {
    const TensorSlices& slices = product.matrices[i].slices;
    if (!is_aligned(slices.exponents) || !is_aligned(slices.sign_mantissa)) {
      return cudaErrorMisalignedAddress;
    }
  }
  if (!is_aligned(product.x) || !is_aligned(product.workspace)) return cudaErrorMisalignedAddress;
  ProductWork work;
  if (!plan_product(product, blocks, most_product_warps(product_tiles(product.rows)),
                    static_cast<uint32_t>(shared_bytes), work)) {
    return cudaErrorInvalidValue;
  }
  error = cudaMemsetAsync(product.workspace, 0, 4 * product_counter_words(product), stream);
  if (error != cudaSuccess) return error;
  return launch_product_work(stream, work);
}

}  // namespace df11::native
