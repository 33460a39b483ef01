// The CUDA product's host interface: y = x W with W compressed. It knows nothing of XLA.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "native/tensor_slices.h"

namespace df11::native {

// Major compute capability: earlier ones have no tensor cores for bfloat16.
inline constexpr int kLeastProductCapability = 8;
inline constexpr int kMatricesPerProduct = 4;
inline constexpr int kMostProductRows = 32;
inline constexpr int kXGroup = 32;  // neighbours along k that lie together in x

// Where x[row, k] is in memory: see Product.
inline int64_t place_in_x(int64_t rows, int64_t row, int64_t k) {
  const int64_t in_group = k % 4 + 4 * (k / 16 % 2) + 8 * (k / 4 % 4);
  return (k / kXGroup * rows + row) * kXGroup + in_group;
}

// One W: a slice of `slices`, whose `out` is not used. If that is a batch of matrices, they stand
// side by side in W, and must have whole tiles of columns.
struct ProductMatrix {
  TensorSlices slices;
  void* out = nullptr;  // [rows, product_n], bfloat16 or float32; aligned to 8 bytes
};
inline int64_t product_n(const View& view) { return view.batch * view.n; }
inline int64_t product_tiles_n(const View& view) { return view.batch * view.tiles_n(); }
inline bool can_multiply(const View& view) {
  const bool has_whole_tiles = view.n % kTileCols == 0;
  // Less than 2^32: see reciprocal().
  const bool is_divided = product_tiles_n(view) * view.tiles_n() >> 32 == 0;
  return !view.is_flat && view.size > 0 && (view.batch == 1 || (has_whole_tiles && is_divided));
}

struct Product {
  // bfloat16[rows, k] in the order in which lanes read it: [k / 32, rows, 4, 2, 4], where
  // x[row, 32 a + 16 c + 4 b + d] is at [a, row, b, c, d]; 0 where k ends before. Aligned to 16
  // bytes.
  const uint16_t* x = nullptr;
  int rows = 0;
  int count = 0;
  ProductMatrix matrices[kMatricesPerProduct];
  bool float_out = false;
  uint32_t* workspace = nullptr;  // of product_workspace_words; aligned to 16 bytes
};

// How sums over k are cut, which decides in which order they are added. It depends on the view
// alone.
struct ProductItems {
  int chunks;      // below each other, of an item; the last of a column may have fewer
  int group;       // items below each other that are added up in a block
  int per_column;  // groups in a column of chunks; the last may have fewer items
  int64_t groups;  // of all columns
};

// An item a warp, on the GPUs that have most of them.
inline constexpr int kProductWarps = 28;
inline constexpr int64_t kProductItems = kProductWarps * 132;
inline constexpr int kMostItemsPerGroup = 5;

inline constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline ProductItems cut_into_items(const View& view) {
  if (view.size == 0) return {};
  const int64_t most = view.tiles_k();
  const int64_t items = divide_up(most, std::min(most, divide_up(view.chunks(), kProductItems)));
  const int64_t chunks = divide_up(most, items), all_items = items * product_tiles_n(view);
  // Groups are what blocks share out, so large ones leave some of them with more to do than others;
  // but each costs the time of its sums. In cycles of the busiest block, as they were measured or
  // computed for an H200, of GPUs with as many blocks as an H200 and a B200 have.
  constexpr int kBlocks[] = {132, 148};
  constexpr int64_t kStep = 90, kSums = 4000, kHandOver = 60;
  const int64_t item = chunks * view.steps * kStep;
  // A small matrix shares its launch with others: there it counts how much of a group is empty.
  const bool is_small = 2 * all_items < kProductItems;
  ProductItems best = {};
  int64_t least = INT64_MAX;
  for (int group = 1; group <= kMostItemsPerGroup; ++group) {
    const int64_t per_column = divide_up(items, group), groups = per_column * product_tiles_n(view);
    int64_t cycles = 0;
    for (const int blocks : kBlocks) {
      const int64_t busiest =
          is_small ? kProductWarps * groups * group / all_items : divide_up(groups, blocks) * group;
      cycles += busiest * item + kSums / group + kHandOver * group;
    }
    if (cycles >= least) continue;
    least = cycles;
    best = {static_cast<int>(chunks), group, static_cast<int>(per_column), groups};
  }
  return best;
}

// Counters that a product needs, one for each column of chunks. It leaves them as they were: all 0.
inline int64_t product_counters(const Product& product) {
  int64_t columns = 0;
  for (int i = 0; i < product.count; ++i) {
    columns += product_tiles_n(product.matrices[i].slices.view);
  }
  return columns;
}

// Words of the workspace: 64 sums of each group and row of x.
inline int64_t product_workspace_words(const Product& product) {
  int64_t groups = 0;
  for (int i = 0; i < product.count; ++i) {
    groups += cut_into_items(product.matrices[i].slices.view).groups;
  }
  return groups * product.rows * kTileCols;
}

// Enqueues a product. All matrices have the same k, and can be multiplied. Pointers in
// `product` are device pointers. `exponents` and `sign_mantissa` must be aligned to 16 bytes.
// Nothing is allocated, synchronized or queried on the stream, so that the call can be captured in
// a CUDA graph; but the first call on a device allocates the memory that counters are taken from,
// and so does a call with a new workspace when that memory is used up. Products that may run at the
// same time must have different workspaces.
//
// A kernel cannot report a corrupt payload: where a header, a codebook, an offset or a
// length is wrong, the columns that it concerns become NaN. Checksums are not verified.
cudaError_t launch_product(cudaStream_t stream, const Product& product);

}  // namespace df11::native
