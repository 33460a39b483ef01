// The CUDA decoder of the published layout: its host interface. It knows nothing of XLA.
#pragma once

#include <cuda_runtime.h>

#include "published/layout.h"

namespace df11::published {

// Enqueues the decoding of a unit whose sizes fit each other (set_sizes in published/check.h); its
// pointers are device pointers. sign_mantissa, encoded_exponent and out must be aligned to 16
// bytes. Nothing is allocated, synchronized or queried on the stream, so that the call can be
// captured in a CUDA graph.
//
// A kernel cannot report a corrupt unit: what is found corrupt becomes 0xffff, a NaN; see
// decode_kernel.cuh.
cudaError_t launch_decode(cudaStream_t stream, const Unit& unit);

}  // namespace df11::published
