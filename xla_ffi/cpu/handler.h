// The CPU handler's interface to the Python module.
#pragma once

#include <cstdint>

#include "cpu/decode_slices.h"
#include "operands.h"

namespace df11 {

extern "C" XLA_FFI_Error* df11_decode_cpu(XLA_FFI_CallFrame* call_frame);

// Slices decoded by the handler since the library was loaded: tests count with it.
int64_t decode_count();

// Makes the CPU handlers use this level from now on; it must be one that the processor has.
void use_simd(Simd level);
Simd simd_in_use();

}  // namespace df11
