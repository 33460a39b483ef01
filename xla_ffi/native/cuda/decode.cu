// The launches of the native layout's CUDA decoders, and the choice between them.

#include <algorithm>
#include <cstdint>

#include "common/resident_blocks.h"
#include "native/cuda/decode.h"
#include "native/cuda/decode_bulk.cuh"
#include "native/cuda/decode_kernel.cuh"
#include "native/cuda/share_blocks.h"

namespace df11::native {
namespace {

// Collects tensors, and launches a kernel when there are as many as it takes.
class GeneralLaunches {
 public:
  explicit GeneralLaunches(cudaStream_t stream) : stream_(stream) {}

  cudaError_t add(const TensorSlices& tensor) {
    batch_.tensors[batch_.count] = tensor;
    batch_.first_chunk[batch_.count + 1] =
        batch_.first_chunk[batch_.count] + tensor.batch * tensor.chunks();
    return ++batch_.count == kTensorsPerLaunch ? launch() : cudaSuccess;
  }

  cudaError_t launch() {
    if (batch_.count == 0) return cudaSuccess;
    int resident = 0;
    if (cudaError_t error = resident_blocks<decode_kernel>(kThreads, 0, &resident);
        error != cudaSuccess)
      return error;
    const int64_t chunks = batch_.first_chunk[batch_.count];
    cudaLaunchConfig_t config = {};
    config.gridDim =
        dim3(static_cast<unsigned>(std::min<int64_t>(resident, (chunks + kWarps - 1) / kWarps)));
    config.blockDim = dim3(kThreads);
    config.stream = stream_;
    const cudaError_t error = cudaLaunchKernelEx(&config, decode_kernel, batch_);
    batch_.count = 0;
    return error;
  }

 private:
  cudaStream_t stream_;
  DecodeBatch batch_;
};

// The driver's function that makes tensor maps; null if the driver is too old. Asked for at run
// time, so that the library can be loaded where there is no driver.
using EncodeTensorMap = decltype(&cuTensorMapEncodeTiled);
EncodeTensorMap tensor_map_encoder() {
  static const EncodeTensorMap encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                               12000, cudaEnableDefault, &found);
    const bool ok = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return ok ? reinterpret_cast<EncodeTensorMap>(function) : nullptr;
  }();
  return encoder;
}

// The weights of all batch elements are one matrix of (row, tile, column of the tile), without a
// last tile that is not full. A box is a step of a group of chunks.
bool encode_tensor_map(const TensorSlices& tensor, int chunks, CUtensorMap* map) {
  const View& view = tensor.view;
  const cuuint64_t sizes[] = {kTileCols, static_cast<cuuint64_t>(view.n / kTileCols),
                              static_cast<cuuint64_t>(tensor.batch * view.batch * view.k)};
  const cuuint64_t strides[] = {kRowBytes, 2 * static_cast<cuuint64_t>(view.n)};
  const cuuint32_t box[] = {kTileCols, static_cast<cuuint32_t>(chunks), kStepRows},
                   steps[] = {1, 1, 1};
  return tensor_map_encoder()(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, tensor.out, sizes, strides,
                              box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                              CU_TENSOR_MAP_L2_PROMOTION_NONE,
                              CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

// As many warps as shared memory has room for; GPUs with 100 KB of it move fewer weights a clock.
constexpr int kWideWarps = kWarps, kNarrowWarps = 2;

class BulkLaunches {
 public:
  BulkLaunches(cudaStream_t stream, Grouping grouping) : stream_(stream), grouping_(grouping) {
    int device = 0, capability = 0;
    usable_ = cudaGetDevice(&device) == cudaSuccess &&
              cudaDeviceGetAttribute(&capability, cudaDevAttrComputeCapabilityMajor, device) ==
                  cudaSuccess &&
              cudaDeviceGetAttribute(&shared_bytes_, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                     device) == cudaSuccess &&
              capability >= 9 && tensor_map_encoder();
  }

  // Whether the tensor is of the kind, and has a pair of chunks.
  bool takes(const TensorSlices& tensor) const {
    const View& view = tensor.view;
    constexpr int64_t kMost = INT32_MAX;
    if (!usable_ || view.is_flat || view.along_columns || !is_aligned(tensor.out) ||
        !is_aligned(tensor.exponents) || tensor.exponents_words % 4 != 0 ||
        tensor.exponents_words > kMost || view.n > kMost ||
        tensor.batch * view.batch * view.k > kMost || tensor.batch * view.chunks() > kMost) {
      return false;
    }
    return GroupGrid<2>(view).groups() > 0;
  }

  cudaError_t add(const TensorSlices& tensor) {
    if (cudaError_t error = find_resident(); error != cudaSuccess) return error;
    const int64_t chunks = tensor.batch * tensor.view.chunks();
    // Of all tensors' together, too, numbers fit.
    if (chunks_ + chunks > INT32_MAX) {
      if (cudaError_t error = launch(); error != cudaSuccess) return error;
    }
    batch_.tensors[batch_.count] = tensor;
    chunks_ += chunks;
    // Each tensor has a block of its own at least.
    return ++batch_.count == std::min(kTensorsPerBulkLaunch, resident_) ? launch() : cudaSuccess;
  }

  cudaError_t launch() {
    if (batch_.count == 0) return cudaSuccess;
    const cudaError_t error = !is_wide()   ? launch<kNarrowWarps, 2>()
                              : is_small() ? launch<kWideWarps, 1>()
                                           : launch<kWideWarps, 2>();
    batch_.count = 0;
    chunks_ = 0;
    return error;
  }

 private:
  bool is_wide() const {
    return BulkMemory<kWideWarps>::kEnd <= static_cast<uint32_t>(shared_bytes_);
  }
  // Whether each warp can have one chunk, which it is done with sooner than with two.
  bool is_small() const {
    if (grouping_ != Grouping::kBySize) return grouping_ == Grouping::kSingle;
    return chunks_ <= int64_t{resident_} * kWideWarps;
  }
  template <int kBlockWarps, int kChunks>
  cudaError_t find_resident() {
    return resident_blocks<bulk_decode_kernel<kBlockWarps, kChunks>>(
        kBlockWarps * kLanes, BulkMemory<kBlockWarps>::kEnd, &resident_);
  }
  cudaError_t find_resident() {
    return is_wide() ? find_resident<kWideWarps, 2>() : find_resident<kNarrowWarps, 2>();
  }

  // A tensor has no more blocks than groups: few of them are spread over all multiprocessors, not
  // decoded side by side on some.
  template <int kChunks>
  void assign_blocks() {
    int64_t groups[kTensorsPerBulkLaunch], steps[kTensorsPerBulkLaunch];
    int blocks[kTensorsPerBulkLaunch];
    for (int i = 0; i < batch_.count; ++i) {
      const TensorSlices& tensor = batch_.tensors[i];
      const GroupGrid<kChunks> grid(tensor.view);
      groups[i] = tensor.batch * grid.groups();
      steps[i] = groups[i] * tensor.view.steps;
      batch_.first_single[i + 1] =
          batch_.first_single[i] + static_cast<uint32_t>(tensor.batch * grid.singles());
    }
    share_blocks(resident_, batch_.count, steps, groups, blocks);
    for (int i = 0; i < kTensorsPerBulkLaunch; ++i) {
      const int own = i < batch_.count ? blocks[i] : 0;
      batch_.first_block[i + 1] = batch_.first_block[i] + static_cast<uint32_t>(own);
    }
  }

  template <int kBlockWarps, int kChunks>
  cudaError_t launch() {
    if (cudaError_t error = find_resident<kBlockWarps, kChunks>(); error != cudaSuccess)
      return error;
    for (int i = 0; i < batch_.count; ++i) {
      if (!encode_tensor_map(batch_.tensors[i], kChunks, &batch_.maps[i]))
        return cudaErrorNotSupported;
    }
    assign_blocks<kChunks>();
    const uint32_t singles = batch_.first_single[batch_.count];
    const uint32_t blocks = std::max(batch_.first_block[batch_.count],
                                     std::min(static_cast<uint32_t>(resident_), singles));
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(blocks);
    config.blockDim = dim3(kBlockWarps * kLanes);
    config.dynamicSmemBytes = BulkMemory<kBlockWarps>::kEnd;
    config.stream = stream_;
    return cudaLaunchKernelEx(&config, bulk_decode_kernel<kBlockWarps, kChunks>, batch_);
  }

  cudaStream_t stream_;
  Grouping grouping_;
  bool usable_ = false;
  int shared_bytes_ = 0, resident_ = 0;
  int64_t chunks_ = 0;
  BulkBatch batch_ = {};
};

}  // namespace

cudaError_t launch_decode(cudaStream_t stream, const TensorSlices* tensors, int count,
                          Grouping grouping) {
  GeneralLaunches general(stream);
  BulkLaunches bulk(stream, grouping);
  for (int i = 0; i < count; ++i) {
    const TensorSlices& tensor = tensors[i];
    if (tensor.batch * tensor.view.chunks() == 0) continue;
    if (!is_aligned(tensor.sign_mantissa)) return cudaErrorMisalignedAddress;
    const cudaError_t error = bulk.takes(tensor) ? bulk.add(tensor) : general.add(tensor);
    if (error != cudaSuccess) return error;
  }
  if (cudaError_t error = bulk.launch(); error != cudaSuccess) return error;
  return general.launch();
}

}  // namespace df11::native
