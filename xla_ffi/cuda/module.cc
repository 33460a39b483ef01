// df11_jax._native_cuda: the FFI handler for CUDA. No allocation and no synchronization, so
// that XLA may capture it in a CUDA graph.

#include <nanobind/nanobind.h>

#include <string_view>
#include <vector>

#include "cuda/decode.h"
#include "operands.h"

namespace nb = nanobind;

namespace df11 {
namespace {

ffi::Error DecodeCudaImpl(cudaStream_t stream, std::string_view names, ffi::RemainingArgs args,
                          ffi::RemainingRets results) {
  std::vector<TensorSlices> tensors;
  if (ffi::Error error = read_operands(args, results, names, tensors); error.failure()) {
    return error;
  }
  const cudaError_t status =
      launch_decode(stream, tensors.data(), static_cast<int>(tensors.size()));
  if (status != cudaSuccess) {
    return ffi::Error::Internal(std::string("df11_decode: ") + cudaGetErrorString(status));
  }
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER(kDecodeCuda, DecodeCudaImpl,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<cudaStream_t>>()
                           .Attr<std::string_view>("names")
                           .RemainingArgs()   // index, then five arrays a tensor
                           .RemainingRets(),  // the tensors
                       {ffi::Traits::kCmdBufferCompatible});

}  // namespace
}  // namespace df11

NB_MODULE(_native_cuda, m) {
  m.doc() = "The CUDA decoder of df11_jax.";
  m.def("handlers", [] {
    nb::dict handlers;
    handlers["df11_decode"] = nb::capsule(reinterpret_cast<void*>(df11::kDecodeCuda));
    return handlers;
  });
}
