// df11_jax._cuda_library: the FFI handlers for CUDA, for Python.

#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include "modules/build_info.h"
#include "native/cuda/handler.h"
#include "published/cuda/handler.h"

namespace nb = nanobind;

NB_MODULE(_cuda_library, m) {
  using namespace df11;
  m.doc() = "The CUDA decoders of df11_jax.";
  m.def("handlers", [] {
    nb::dict handlers;
    handlers["df11_decode"] = nb::capsule(reinterpret_cast<void*>(native::df11_decode_cuda));
    handlers["df11_product"] = nb::capsule(reinterpret_cast<void*>(native::df11_product_cuda));
    handlers["df11_published_decode"] =
        nb::capsule(reinterpret_cast<void*>(published::df11_published_decode_cuda));
    return handlers;
  });
  const CudaBuild build = cuda_build();
  m.attr("cuda_version") = build.version;
  m.attr("architectures") = build.architectures;
}
