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

__device__ __forceinline__ void store_copies(const LookupTable& table, uint32_t index,
                                             uint32_t entry) {
  const uint32_t copies = table.copies(), at = table.address + 4 * copies * index;
  const uint4 four{entry, entry, entry, entry};
  if (copies == 4) {
    store_shared(at, four);
  } else if (copies < 4) {
    store_shared(at, entry);
    if (copies == 2) store_shared(at + 4, entry);
  } else {
    // Beginning elsewhere in each lane, so that fewer banks are asked twice.
#pragma unroll 1
    for (uint32_t i = 0; i < copies / 4; ++i) {
      store_shared(at + 16 * ((i + threadIdx.x) % (copies / 4)), four);
    }
  }
}

// Fills the table when the codes are sorted. All threads of the block take part; a barrier has to
// follow.
__device__ inline void fill_lookup_table(const CanonicalCodes& codes, const LookupTable& table) {
  fill_table<3>(codes, table.code_bits,
                [&](uint32_t index, uint32_t entry) { store_copies(table, index, entry); });
}

}  // namespace df11::native
