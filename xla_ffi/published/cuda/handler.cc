// The FFI handler for CUDA: enqueues the decoding of one published unit. No allocation and no
// synchronization, so that XLA may capture it in a CUDA graph.

#include "published/cuda/handler.h"

#include <string>
#include <string_view>

#include "common/handler.h"
#include "published/cuda/decode.h"
#include "published/operands.h"

namespace df11::published {
namespace {

ffi::Error DecodeUnitCudaImpl(cudaStream_t stream, std::string_view name,
                              ffi::AnyBuffer sign_mantissa, ffi::AnyBuffer encoded_exponent,
                              ffi::AnyBuffer luts, ffi::AnyBuffer output_positions,
                              ffi::AnyBuffer gaps, ffi::Result<ffi::AnyBuffer> out) {
  Unit unit;
  ffi::Error error =
      read_unit(sign_mantissa, encoded_exponent, luts, output_positions, gaps, out, name, unit);
  if (error.failure()) return error;
  const cudaError_t status = launch_decode(stream, unit);
  if (status != cudaSuccess) {
    return ffi::Error::Internal("df11_published_decode: '" + std::string(name) +
                                "': " + cudaGetErrorString(status));
  }
  return ffi::Error::Success();
}

}  // namespace

DF11_DEFINE_HANDLER_SYMBOL(df11_published_decode_cuda, DecodeUnitCudaImpl,
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

}  // namespace df11::published
