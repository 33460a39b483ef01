// The launch of the published layout's CUDA decoder.

#include <algorithm>
#include <cstdint>

#include "common/resident_blocks.h"
#include "published/cuda/decode.h"
#include "published/cuda/decode_kernel.cuh"

namespace df11::published {

cudaError_t launch_decode(cudaStream_t stream, const Unit& unit) {
  if (!is_aligned(unit.sign_mantissa) || !is_aligned(unit.encoded_exponent) ||
      !is_aligned(unit.out)) {
    return cudaErrorMisalignedAddress;
  }
  int resident = 0;
  const cudaError_t error = resident_blocks<decode_kernel>(kThreads, sizeof(BlockState), &resident);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(std::min<int64_t>(resident, unit.blocks)));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = sizeof(BlockState);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, decode_kernel, unit);
}

}  // namespace df11::published
