// The FFI handler of the product: enqueues a kernel. XLA may capture it in a CUDA graph.

#include <string>
#include <string_view>

#include "common/handler.h"
#include "native/cuda/handler.h"
#include "native/cuda/product.h"
#include "native/cuda/product_operands.h"

namespace df11::native {
namespace {

ffi::Error ProductCudaImpl(cudaStream_t stream, std::string_view names,
                           ffi::Span<const uint32_t> headers, ffi::RemainingArgs args,
                           ffi::RemainingRets results) {
  Product product;
  if (ffi::Error error = read_product(args, results, names, headers, product); error.failure()) {
    return error;
  }
  const cudaError_t status = launch_product(stream, product);
  if (status == cudaErrorMemoryAllocation) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                      "df11_product: the GPU has no 4 MB left for counters beside the memory that "
                      "XLA has taken; give XLA less, by XLA_CLIENT_MEM_FRACTION");
  }
  if (status != cudaSuccess) {
    return ffi::Error::Internal(std::string("df11_product: ") + cudaGetErrorString(status));
  }
  return ffi::Error::Success();
}

}  // namespace

DF11_DEFINE_HANDLER_SYMBOL(df11_product_cuda, ProductCudaImpl,
                           ffi::Ffi::Bind()
                               .Ctx<ffi::PlatformStream<cudaStream_t>>()
                               .Attr<std::string_view>("names")
                               .Attr<ffi::Span<const uint32_t>>("headers")
                               .RemainingArgs()   // x, index, then five arrays a matrix
                               .RemainingRets(),  // a result a matrix, then the workspace
                           {ffi::Traits::kCmdBufferCompatible});

}  // namespace df11::native
