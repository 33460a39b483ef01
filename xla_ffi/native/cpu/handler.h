// The CPU handler of the native layout, for the Python module.
#pragma once

#include <cstdint>

#include "xla/ffi/api/ffi.h"

namespace df11::native {

extern "C" XLA_FFI_Error* df11_decode_cpu(XLA_FFI_CallFrame* call_frame);

// Slices decoded by the handler since the library was loaded: tests count with it.
int64_t decode_count();

}  // namespace df11::native
