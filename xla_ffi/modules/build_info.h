// What nvcc compiled the CUDA decoders for.
#pragma once

#include <vector>

namespace df11 {

struct CudaBuild {
  int version;                     // of the CUDA runtime: 13000 is 13.0
  std::vector<int> architectures;  // 900 is 9.0; of the last one there is PTX, too
};

CudaBuild cuda_build();

}  // namespace df11
