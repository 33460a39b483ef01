// What the checks of XLA's buffers share, whatever the layout.
#pragma once

#include <string>

#include "xla/ffi/api/ffi.h"

namespace df11 {

namespace ffi = xla::ffi;

// The dimensions, for messages.
inline std::string describe(ffi::AnyBuffer::Dimensions dims) {
  std::string text = "[";
  for (size_t i = 0; i < dims.size(); ++i) text += (i ? "," : "") + std::to_string(dims[i]);
  return text + "]";
}

}  // namespace df11
