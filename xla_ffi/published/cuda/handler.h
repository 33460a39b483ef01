// The CUDA handler of the published layout, for the Python module.
#pragma once

#include "xla/ffi/api/ffi.h"

namespace df11::published {

extern "C" XLA_FFI_Error* df11_published_decode_cuda(XLA_FFI_CallFrame* call_frame);

}  // namespace df11::published
