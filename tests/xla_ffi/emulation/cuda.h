// Tensor maps on the host: enough of the real cuda.h for three dimensions of two-byte elements.
// It takes the place of the real header, as cuda_runtime.h does.
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
  uint64_t sizes[3], strides[2];
  uint32_t box[3];
  bool swizzled;
  char rest[64];
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
  if (rank != 3 || reinterpret_cast<uintptr_t>(base) % 16 || 2 * box[0] % 16 ||
      (swizzled && 2 * box[0] > 128)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  *map = {};
  map->base = static_cast<std::byte*>(base);
  map->swizzled = swizzled;
  for (int i = 0; i < 3; ++i) {
    if (dims[i] == 0 || dims[i] > kMost || box[i] == 0 || box[i] > 256 || element_strides[i] != 1) {
      return CUDA_ERROR_INVALID_VALUE;
    }
    map->sizes[i] = dims[i];
    map->box[i] = box[i];
  }
  for (int i = 0; i < 2; ++i) {
    if (strides[i] % 16 || strides[i] >= uint64_t{1} << 40) return CUDA_ERROR_INVALID_VALUE;
    map->strides[i] = strides[i];
  }
  return CUDA_SUCCESS;
}

namespace cuda_emulation {

// Stores a box whose first element is at (x, y, z); what lies outside of the map is left out.
inline void store_box(const CUtensorMap& map, int x, int y, int z, uint32_t from) {
  const uint32_t row_bytes = 2 * map.box[0], rows = map.box[1] * map.box[2];
  const uint32_t bytes = row_bytes * rows;
  check(from % 128 == 0 && (!map.swizzled || row_bytes == 128), "a box is not aligned");
  const std::byte* source = shared->at(from, bytes);
  begin_store({{{from, bytes}}, [=, &map] {
                 for (uint32_t row = 0; row < rows; ++row) {
                   for (uint32_t in_row = 0; in_row < map.box[0]; ++in_row) {
                     // Of addresses, not of rows: bits 7 to 9 are added to bits 4 to 6.
                     const uint32_t at = from + row * row_bytes + 2 * in_row;
                     const uint32_t place = map.swizzled ? at ^ (at >> 7 & 7) << 4 : at;
                     const int64_t to[] = {int64_t{x} + in_row, int64_t{y} + row % map.box[1],
                                           int64_t{z} + row / map.box[1]};
                     bool inside = true;
                     for (int i = 0; i < 3; ++i) {
                       inside &= to[i] >= 0 && to[i] < static_cast<int64_t>(map.sizes[i]);
                     }
                     if (!inside) continue;
                     std::memcpy(
                         map.base + to[2] * map.strides[1] + to[1] * map.strides[0] + 2 * to[0],
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
