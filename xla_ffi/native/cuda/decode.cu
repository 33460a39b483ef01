// The launch of the native layout's CUDA decoder.

#include <algorithm>
#include <cstdint>

#include "common/resident_blocks.h"
#include "native/cuda/decode.h"
#include "native/cuda/decode_kernel.cuh"

namespace df11::native {
namespace {

cudaError_t launch(cudaStream_t stream, const DecodeBatch& batch) {
  int resident = 0;
  if (cudaError_t error = resident_blocks<decode_kernel>(kThreads, 0, &resident);
      error != cudaSuccess)
    return error;
  const int64_t chunks = batch.first_chunk[batch.count];
  cudaLaunchConfig_t config = {};
  config.gridDim =
      dim3(static_cast<unsigned>(std::min<int64_t>(resident, (chunks + kWarps - 1) / kWarps)));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, decode_kernel, batch);
}

}  // namespace

cudaError_t launch_decode(cudaStream_t stream, const TensorSlices* tensors, int count) {
  DecodeBatch batch = {};
  for (int i = 0; i < count; ++i) {
    const int64_t chunks = tensors[i].batch * tensors[i].view.chunks();
    if (chunks > 0) {
      if (!is_aligned(tensors[i].sign_mantissa)) return cudaErrorMisalignedAddress;
      batch.tensors[batch.count] = tensors[i];
      batch.first_chunk[batch.count + 1] = batch.first_chunk[batch.count] + chunks;
      ++batch.count;
    }
    if (batch.count == kTensorsPerLaunch || (i + 1 == count && batch.count > 0)) {
      if (cudaError_t error = launch(stream, batch); error != cudaSuccess) return error;
      batch.count = 0;
    }
  }
  return cudaSuccess;
}

}  // namespace df11::native
