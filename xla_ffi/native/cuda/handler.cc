// The FFI handler for CUDA: enqueues the decoding of a set of tensors. No allocation and no
// synchronization, so that XLA may capture it in a CUDA graph.

#include "native/cuda/handler.h"

#include <string>
#include <string_view>
#include <vector>

#include "common/handler.h"
#include "native/cuda/decode.h"
#include "native/operands.h"

namespace df11::native {
namespace {

ffi::Error DecodeCudaImpl(cudaStream_t stream, std::string_view names,
                          ffi::Span<const uint32_t> headers, ffi::RemainingArgs args,
                          ffi::RemainingRets results) {
  std::vector<TensorSlices> tensors;
  if (ffi::Error error = read_operands(args, results, names, headers, tensors); error.failure()) {
    return error;
  }
  const cudaError_t status =
      launch_decode(stream, tensors.data(), static_cast<int>(tensors.size()));
  if (status != cudaSuccess) {
    return ffi::Error::Internal(std::string("df11_decode: ") + cudaGetErrorString(status));
  }
  return ffi::Error::Success();
}

}  // namespace

DF11_DEFINE_HANDLER_SYMBOL(df11_decode_cuda, DecodeCudaImpl,
                           ffi::Ffi::Bind()
                               .Ctx<ffi::PlatformStream<cudaStream_t>>()
                               .Attr<std::string_view>("names")
                               .Attr<ffi::Span<const uint32_t>>("headers")
                               .RemainingArgs()   // index, then five arrays a tensor
                               .RemainingRets(),  // the tensors
                           {ffi::Traits::kCmdBufferCompatible});

}  // namespace df11::native
