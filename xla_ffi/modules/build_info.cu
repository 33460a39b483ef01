// What nvcc compiled the CUDA decoders for, as its macros have it.

#include <cuda_runtime.h>

#include "modules/build_info.h"

namespace df11 {

CudaBuild cuda_build() { return {CUDART_VERSION, {__CUDA_ARCH_LIST__}}; }

}  // namespace df11
