// The CUDA handlers of the native layout, for the Python module.
#pragma once

#include "xla/ffi/api/ffi.h"

namespace df11::native {

extern "C" XLA_FFI_Error* df11_decode_cuda(XLA_FFI_CallFrame* call_frame);
extern "C" XLA_FFI_Error* df11_product_cuda(XLA_FFI_CallFrame* call_frame);

}  // namespace df11::native
