// Tensor maps on host threads: enough of the real cuda.h for matrices of two-byte elements. It
// takes the place of the real header, as cuda_runtime.h does.
#pragma once

#include <cuda_runtime.h>

using cuuint64_t = uint64_t;
using cuuint32_t = uint32_t;
enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_128B };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_NONE };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };

struct alignas(64) CUtensorMap {
  std::byte* base;
  uint64_t cols, rows, stride;
  uint32_t box_cols, box_rows;
  bool swizzled;
  char rest[72];
};
static_assert(sizeof(CUtensorMap) == 128);

inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t rank,
                                       void* base, const cuuint64_t* dims,
                                       const cuuint64_t* strides, const cuuint32_t* box,
                                       const cuuint32_t* element_strides, CUtensorMapInterleave,
                                       CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                                       CUtensorMapFloatOOBfill) {
  constexpr uint64_t kMost = uint64_t{1} << 32;
  const bool swizzled = swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
  if (rank != 2 || reinterpret_cast<uintptr_t>(base) % 16 || strides[0] % 16 ||
      strides[0] >= uint64_t{1} << 40 || dims[0] == 0 || dims[0] > kMost || dims[1] == 0 ||
      dims[1] > kMost || box[0] == 0 || box[0] > 256 || box[1] == 0 || box[1] > 256 ||
      2 * box[0] % 16 || (swizzled && 2 * box[0] > 128) || element_strides[0] != 1 ||
      element_strides[1] != 1) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  *map = {
      static_cast<std::byte*>(base), dims[0], dims[1], strides[0], box[0], box[1], swizzled, {}};
  return CUDA_SUCCESS;
}

namespace cuda_emulation {

// Stores a box whose first element is (row, col); what lies outside of the matrix is left out.
inline void store_box(const CUtensorMap& map, int col, int row, uint32_t from) {
  const uint32_t row_bytes = 2 * map.box_cols, bytes = row_bytes * map.box_rows;
  check(from % 128 == 0 && (!map.swizzled || row_bytes == 128), "a box is not aligned");
  const std::byte* source = shared->at(from, bytes);
  begin_store({{{from, bytes}}, [=, &map] {
                 for (uint32_t r = 0; r < map.box_rows; ++r) {
                   for (uint32_t c = 0; c < map.box_cols; ++c) {
                     // Of addresses, not of rows: bits 7 to 9 are added to bits 4 to 6.
                     const uint32_t at = from + r * row_bytes + 2 * c;
                     const uint32_t place = map.swizzled ? at ^ (at >> 7 & 7) << 4 : at;
                     const int64_t to_row = int64_t{row} + r, to_col = int64_t{col} + c;
                     if (to_row < 0 || to_col < 0 || to_row >= int64_t(map.rows) ||
                         to_col >= int64_t(map.cols)) {
                       continue;
                     }
                     std::memcpy(map.base + to_row * map.stride + 2 * to_col,
                                 source + (place - from), 2);
                   }
                 }
               }});
}

}  // namespace cuda_emulation

// How the host gets at the driver's functions without linking to it.
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
enum { cudaEnableDefault };
inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned,
                                                    unsigned long long,
                                                    cudaDriverEntryPointQueryResult* found) {
  *function = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
  *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
