// A look-up table in shared memory with as many bits as a matrix's longest code has, and copies of
// each entry in neighbouring banks: docs/format.md, section "codebook".
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/async_copies.cuh"
#include "common/lanes.cuh"
#include "native/cuda/canonical_codes.cuh"
#include "native/layout.h"

namespace df11::native {

// The table takes 1 << log2_bytes bytes, and lies at a multiple of that: so a masked window and the
// table's address are joined by the one instruction that masks.
struct LookupTable {
  uint32_t address, log2_bytes, code_bits;

  // A window begins this many bits before the code, so that the code is where an offset has the
  // number of an entry.
  DF11_HD uint32_t lead() const { return log2_bytes - code_bits; }
  DF11_HD uint32_t copies() const { return 1u << (lead() - 2); }
  DF11_HD uint32_t mask() const { return ((1u << code_bits) - 1) << lead(); }
  // Lanes look at different copies.
  DF11_HD uint32_t of_lane(int lane) const { return address + 4 * (lane % copies()); }
};

// A table entry's copies.
__device__ __forceinline__ void store_copies(const LookupTable& table, uint32_t copies,
                                             uint32_t index, uint32_t entry) {
  const uint32_t at = table.address + 4 * copies * index;
  if (copies < 4) {
    store_shared(at, entry);
    if (copies == 2) store_shared(at + 4, entry);
    return;
  }
  // Beginning elsewhere in each lane, so that fewer banks are asked twice.
#pragma unroll 1
  for (uint32_t i = 0; i < copies / 4; ++i) {
    store_shared(at + 16 * ((i + threadIdx.x) % (copies / 4)), uint4{entry, entry, entry, entry});
  }
}

// Fills the table when the codes are sorted. All threads of the block take part; a barrier has to
// follow. As many threads are busy, and store as much, whatever the longest code is.
__device__ inline void fill_lookup_table(const CanonicalCodes& codes, const LookupTable& table) {
  const uint32_t copies = table.copies();
  const auto store = [&](uint32_t index, uint32_t entry) {
    store_copies(table, copies, index, entry);
  };
  // The usual one, without a loop for each store.
  if (table.code_bits == 12 && copies == 4) {
    return fill_table<3>(codes, 12, [&](uint32_t index, uint32_t entry) {
      store_shared(table.address + 16 * index, uint4{entry, entry, entry, entry});
    });
  }
  switch (table.code_bits) {
    case 9:
      return fill_table<0>(codes, 9, store);
    case 10:
      return fill_table<1>(codes, 10, store);
    case 11:
      return fill_table<2>(codes, 11, store);
    default:
      return fill_table<3>(codes, 12, store);
  }
}

}  // namespace df11::native
