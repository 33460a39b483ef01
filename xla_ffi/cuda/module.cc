// df11_jax._native_cuda: the FFI handlers for CUDA. No allocation and no synchronization, so
// that XLA may capture it in a CUDA graph.

#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <string_view>
#include <vector>

#include "cuda/build_info.h"
#include "cuda/decode.h"
#include "cuda/published.h"
#include "operands.h"
#include "published/operands.h"

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

ffi::Error DecodePublishedCudaImpl(cudaStream_t stream, std::string_view name,
                                   ffi::AnyBuffer sign_mantissa, ffi::AnyBuffer encoded_exponent,
                                   ffi::AnyBuffer luts, ffi::AnyBuffer output_positions,
                                   ffi::AnyBuffer gaps, ffi::Result<ffi::AnyBuffer> out) {
  published::Unit unit;
  ffi::Error error = published::read_unit(sign_mantissa, encoded_exponent, luts, output_positions,
                                          gaps, out, name, unit);
  if (error.failure()) return error;
  const cudaError_t status = published::launch_decode(stream, unit);
  if (status != cudaSuccess) {
    return ffi::Error::Internal("df11_published_decode: '" + std::string(name) +
                                "': " + cudaGetErrorString(status));
  }
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER(kDecodePublishedCuda, DecodePublishedCudaImpl,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::PlatformStream<cudaStream_t>>()
                           .Attr<std::string_view>("name")
                           .Arg<ffi::AnyBuffer>()   // sign_mantissa
                           .Arg<ffi::AnyBuffer>()   // encoded_exponent
                           .Arg<ffi::AnyBuffer>()   // luts
                           .Arg<ffi::AnyBuffer>()   // output_positions
                           .Arg<ffi::AnyBuffer>()   // gaps
                           .Ret<ffi::AnyBuffer>(),  // the weights
                       {ffi::Traits::kCmdBufferCompatible});

}  // namespace
}  // namespace df11

NB_MODULE(_native_cuda, m) {
  m.doc() = "The CUDA decoders of df11_jax.";
  m.def("handlers", [] {
    nb::dict handlers;
    handlers["df11_decode"] = nb::capsule(reinterpret_cast<void*>(df11::kDecodeCuda));
    handlers["df11_published_decode"] =
        nb::capsule(reinterpret_cast<void*>(df11::kDecodePublishedCuda));
    return handlers;
  });
  const df11::CudaBuild build = df11::cuda_build();
  m.attr("cuda_version") = build.version;
  m.attr("architectures") = build.architectures;
}
