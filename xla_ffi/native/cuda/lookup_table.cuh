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

// Fills the table when the codes are sorted. All threads of the block take part; a barrier has to
// follow.
__device__ inline void fill_lookup_table(const CanonicalCodes& codes, const LookupTable& table) {
  const uint32_t copies = table.copies();
  const auto place = [&](uint32_t index) { return table.address + 4 * copies * index; };
  if (copies == 4) {
    fill_table<3>(codes, table.code_bits, [&](uint32_t index, uint32_t entry) {
      store_shared(place(index), uint4{entry, entry, entry, entry});
    });
    return;
  }
  // Beginning elsewhere in each lane, so that fewer banks are asked twice.
  fill_table<3>(codes, table.code_bits, [&](uint32_t index, uint32_t entry) {
#pragma unroll 1
    for (uint32_t i = 0; i < copies; ++i) {
      store_shared(place(index) + 4 * ((i + threadIdx.x) % copies), entry);
    }
  });
}

}  // namespace df11::native
