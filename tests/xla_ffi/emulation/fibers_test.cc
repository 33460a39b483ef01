// What sanitizers have to see in kernels that run as fibers; each is a fault that an argument asks
// for: "none", "race within a warp", "race across a shuffle", "race between warps", "race across
// another barrier", or "overflow".
#include <cuda_runtime.h>

#include <string>

#include "common/async_copies.cuh"

namespace df11 {
namespace {

std::string fault;
__shared__ uint32_t values[64];

void kernel(uint32_t* out) {
  uint32_t own[4] = {};
  const uint32_t barriers = shared_address(cuda_emulation::dynamic_shared);
  const uint32_t mine = barriers + threadIdx.x / 32 * 8,
                 other = barriers + 8 - threadIdx.x / 32 * 8;
  if (threadIdx.x % 32 == 0) {
    init_barrier(mine);
    fence_barriers();
  }
  __syncthreads();
  values[threadIdx.x] = threadIdx.x;
  if (fault == "race across a shuffle") {
    __shfl_sync(~0u, 0, 0);
  } else if (fault != "race within a warp") {
    __syncwarp();
  }
  const uint32_t neighbour = values[threadIdx.x ^ 1];
  if (threadIdx.x % 32 == 0) arrive(mine);
  // Until the other warp has arrived: its own barrier alone tells it nothing even then.
  for (int i = 0; i < 20 && fault == "race across another barrier"; ++i) __syncwarp();
  if (fault != "race between warps") {
    wait_for_phase(fault == "race across another barrier" ? mine : other, 0);
  }
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
  config.dynamicSmemBytes = 16;
  cudaLaunchKernelEx(&config, df11::kernel, out);
  for (uint32_t i = 0; i < 64; ++i) {
    if (df11::fault == "none" && out[i] != (i ^ 32)) return 1;
  }
  return 0;
}
