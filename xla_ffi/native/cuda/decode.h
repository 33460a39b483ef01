// The CUDA decoder's host interface. It knows nothing of XLA.
#pragma once

#include <cuda_runtime.h>

#include "native/tensor_slices.h"

namespace df11::native {

// How many chunks a warp decodes at a time on compute capability 9.0 and up. By size: two, or one
// if the launch has so few that every warp of the device can have one. Only tests and benchmarks
// choose. Where shared memory has room for two warps only, it is always two.
enum class Grouping { kBySize, kSingle, kPairs };

// Enqueues the decoding of `count` tensors; all pointers in `tensors` are device pointers,
// `tensors` itself is read before the call returns. One kernel launch serves up to
// kTensorsPerLaunch tensors that have weights. `sign_mantissa` must be aligned to 16 bytes;
// `exponents` should be, and decodes slowly if it is not; the others have the alignment of
// their types. Nothing is allocated, synchronized or
// queried on the stream, so that the call can be captured in a CUDA graph.
//
// A kernel cannot report a corrupt payload: every weight of a corrupt chunk becomes
// 0xffff, a NaN; see decode_kernel.cuh.
cudaError_t launch_decode(cudaStream_t stream, const TensorSlices* tensors, int count,
                          Grouping grouping = Grouping::kBySize);

}  // namespace df11::native
