// What sanitizers have to see in kernels that run as fibers; each is a fault that an argument asks
// for: "none", "race within a warp", "race between warps", or "overflow".
#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>
#include <string>

namespace df11 {
namespace {

std::string fault;
__shared__ uint32_t values[64];

void kernel(uint32_t* out) {
  uint32_t own[4] = {};
  values[threadIdx.x] = threadIdx.x;
  if (fault != "race within a warp") __syncwarp();
  const uint32_t neighbour = values[threadIdx.x ^ 1];
  if (fault != "race between warps") __syncthreads();
  own[neighbour % 4] = values[threadIdx.x ^ 32];
  // The stack is one that others have left and come back to in the meantime.
  uint32_t* volatile past_the_end = own + 4;
  if (fault == "overflow") *past_the_end = 1;
  out[threadIdx.x] = own[neighbour % 4];
}

}  // namespace
}  // namespace df11

int main(int argc, char** argv) {
  df11::fault = argv[argc - 1];
  uint32_t out[64];
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(3);
  config.blockDim = dim3(64);
  cudaLaunchKernelEx(&config, df11::kernel, out);
  for (uint32_t i = 0; i < 64; ++i) {
    if (df11::fault == "none" && out[i] != (i ^ 32)) return 1;
  }
  return 0;
}
