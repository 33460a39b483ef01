// For the benchmarks of CUDA: a call that fails ends the program, which says what failed.
#pragma once

#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>

namespace df11 {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

}  // namespace df11

#define CHECK(call) ::df11::check(call, #call)
