// The launch of the CUDA product.

#include "native/cuda/product.h"

#include <cstdint>

#include "native/cuda/product_kernel.cuh"
#include "native/cuda/product_work.h"

namespace df11::native {
namespace {

template <int kTiles>
cudaError_t launch(cudaStream_t stream, const Product& product) {
  int device = 0, blocks = 0, shared_bytes = 0;
  if (cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  cudaError_t error = cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  ProductWork work;
  if (!plan_product(product, blocks, kProductWarps<kTiles>, shared_bytes, work)) {
    return cudaErrorInvalidValue;
  }
  return launch_work<kTiles>(stream, work);
}

}  // namespace

cudaError_t launch_product(cudaStream_t stream, const Product& product) {
  const cudaError_t error = cudaMemsetAsync(product.workspace, 0,
                                            4 * product_counter_words(product), stream);
  if (error != cudaSuccess) return error;
  return product.rows <= 8    ? launch<1>(stream, product)
         : product.rows <= 16 ? launch<2>(stream, product)
                              : launch<4>(stream, product);
}

}  // namespace df11::native
