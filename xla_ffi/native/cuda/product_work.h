// How a product is shared out: what the kernel gets as its parameter, and how the host fills it in.
#pragma once

#include <algorithm>
#include <cstdint>

#include "native/cuda/product.h"
#include "native/cuda/share_blocks.h"
#include "native/layout.h"

namespace df11::native {

inline constexpr int kSlotSteps = 2;  // steps whose signs and mantissas are copied together
inline constexpr int kSlotBytes = kSlotSteps * kStepWords * 4;
// Scratch of the block in front of what warps have, by what product_kernel.cuh needs.
inline constexpr uint32_t kBlockBytes = 1280;
inline constexpr uint32_t kListedBytes = 24;   // of a chunk in a warp's list
inline constexpr uint32_t kBarrierBytes = 32;  // of the slot, of up to two records, and its turn
inline constexpr uint32_t kPlaceBytes = 16;    // of the warp in its group

// Divides by multiplying, for what a kernel divides where everything waits for it. Right as long as
// the dividend times the divisor is less than 2^32: it is for 2^24 chunks, shared out among 28
// warps or more.
inline uint32_t reciprocal(int64_t divisor) {
  return divisor == 1 ? 0 : static_cast<uint32_t>(((int64_t{1} << 32) + divisor - 1) / divisor);
}
DF11_HD int divide_by_reciprocal(int dividend, uint32_t reciprocal) {
  return reciprocal == 0
             ? dividend
             : static_cast<int>(uint64_t{static_cast<uint32_t>(dividend)} * reciprocal >> 32);
}

struct MatrixWork {
  const uint32_t* header;
  const uint32_t* codebook;
  const uint32_t* chunk_offsets;
  const uint32_t* exponents;
  const uint32_t* sign_mantissa;
  void* out;
  float* sums;        // [groups, rows of x, 64]
  uint32_t* arrived;  // by columns of chunks: groups whose sums are there
  uint32_t exponents_words, geometry;
  int stack, chunks;
  int n, tiles_k, tiles_n, steps_k, steps, code_bits;  // n and tiles_n of all that stand together
  int one_tiles_n;                                     // of one of these
  uint32_t one_tiles_n_reciprocal;
  // Items are numbered as if every group had all of its items.
  int item_chunks, group_items, column_groups;
  uint32_t item_chunks_reciprocal, group_items_reciprocal, column_groups_reciprocal;
  int first_block, blocks;
  int block_groups, longer_blocks;  // every block has so many groups, the first ones another
  int warps;                        // of a block that work on it: for whole groups
};

// Where things are in a block's shared memory. Warps lie before the table, as many as fit there,
// and behind it; then sums of groups, likewise.
struct ProductMemory {
  int warps, warps_before_table;
  uint32_t table_log2_bytes;
  int list_chunks;    // that a warp's list has room for
  uint32_t x_bytes;   // of two steps' rows of x, if they are copied: a warp has two such slots
  uint32_t before_x;  // of a warp: what it has before those
  uint32_t before_records;
  uint32_t records;       // buffers of a warp
  uint32_t record_words;  // longer ones are read where they are
  uint32_t record_bytes;  // of a buffer: with room behind a record, which lanes may read
  uint32_t warp_bytes;
  bool sums_in_records;             // of a group: of its first warp, which then has no other item
  int groups, groups_before_table;  // whose sums have room of their own
  uint32_t group_bytes;

  DF11_HD uint32_t table(uint32_t base) const {
    const uint32_t size = 1u << table_log2_bytes;
    return (base + kBlockBytes + size - 1) & ~(size - 1);
  }
  DF11_HD uint32_t warp(uint32_t base, int warp) const {
    const int behind = warp - warps_before_table;
    return behind < 0 ? base + kBlockBytes + static_cast<uint32_t>(warp) * warp_bytes
                      : table_end(base) + static_cast<uint32_t>(behind) * warp_bytes;
  }
  // What the items of one of the groups that are in work add up to.
  DF11_HD uint32_t sums(uint32_t base, int group, uint32_t first_warp) const {
    if (sums_in_records) return first_warp + before_records;
    const int behind = group - groups_before_table;
    return behind < 0 ? table(base) - static_cast<uint32_t>(group + 1) * group_bytes
                      : warp(base, warps) + static_cast<uint32_t>(behind) * group_bytes;
  }
  DF11_HD uint32_t end(uint32_t base) const {
    return warp(base, warps) + static_cast<uint32_t>(groups - groups_before_table) * group_bytes;
  }

 private:
  DF11_HD uint32_t table_end(uint32_t base) const { return table(base) + (1u << table_log2_bytes); }
};

struct ProductWork {
  const uint4* x;
  const int32_t* index;
  int rows, k, count;
  uint32_t rows_reciprocal;
  uint32_t zero;  // is 0, which the compiler does not know
  bool float_out;
  bool has_bulk_copies;  // which copies the kernel uses: see product_copies.cuh
  ProductMemory memory;
  MatrixWork matrices[kMatricesPerProduct];
};
static_assert(sizeof(ProductWork) <= 4096);

// Rows of x are taken in tiles of 8: 1, 2 or 4 of them.
inline int product_tiles(int rows) { return rows <= 8 ? 1 : rows <= 16 ? 2 : 4; }
// Warps of a block, which leave a thread 72, 128 and 168 registers; on GPUs without bulk copies,
// where copies take more and shared memory has room for fewer warps, 128, 128 and 255.
DF11_HD constexpr int most_product_warps(int tiles, bool has_bulk_copies) {
  if (!has_bulk_copies) return tiles <= 2 ? 16 : 8;
  return tiles == 1 ? kProductWarps : tiles == 2 ? 16 : 12;
}

// Dynamic shared memory begins at this address or before.
inline constexpr uint32_t kMostSharedBase = 1024;

// Words of a record of `steps` steps that are usual: 2.97 bits an exponent or less.
inline uint32_t usual_record_words(int steps) { return steps == 8 ? 760 : steps == 4 ? 392 : 208; }
// Words that a lane may read behind a record: its codes, if they are damaged, and three words
// ahead.
inline uint32_t overread_words(int steps) { return 6 * steps + 4; }

// What a warp has at most.
struct WarpShare {
  int64_t items, chunks;
};

// Fits as many of `most_warps` warps as there is room for in `shared_bytes`; none if there is too
// little. `group_items` is the least number of warps in a group whose sums need room, those of
// `rows` rows; 1 if none do.
inline ProductMemory plan_memory(int steps, int rows, int group_items, const WarpShare& share,
                                 int most_warps, uint32_t shared_bytes, bool has_bulk_copies,
                                 bool copy_x) {
  ProductMemory memory = {};
  // Records lie at multiples of 16 bytes.
  memory.list_chunks = static_cast<int>(std::min<int64_t>(round_up(share.chunks, 2), kLanes));
  memory.x_bytes = copy_x ? static_cast<uint32_t>(2 * rows * kSlotSteps * kStepRows) : 0;
  memory.before_x = kSlotBytes + kBarrierBytes + kPlaceBytes + kListedBytes * memory.list_chunks;
  memory.before_records = memory.before_x + 2 * memory.x_bytes;
  memory.record_words = usual_record_words(steps);
  memory.record_bytes = 4 * (memory.record_words + overread_words(steps));
  memory.group_bytes = kTileCols * 4 * round_up(rows, 2);
  const auto fit = [&](uint32_t table_log2_bytes, uint32_t records) {
    if (records > 1 && !has_bulk_copies) return false;
    memory.table_log2_bytes = table_log2_bytes;
    memory.records = records;
    memory.warp_bytes = memory.before_records + records * memory.record_bytes;
    memory.sums_in_records =
        share.items == 1 && memory.group_bytes <= records * memory.record_bytes;
    const bool need_room = group_items > 1 && !memory.sums_in_records;
    const uint32_t room = memory.table(kMostSharedBase) - kMostSharedBase - kBlockBytes;
    for (memory.warps = most_warps; memory.warps > 0; --memory.warps) {
      memory.warps_before_table =
          std::min(memory.warps, static_cast<int>(room / memory.warp_bytes));
      const uint32_t left = room - memory.warps_before_table * memory.warp_bytes;
      memory.groups = need_room ? memory.warps / group_items : 0;
      memory.groups_before_table =
          std::min(memory.groups, static_cast<int>(left / memory.group_bytes));
      if (memory.end(kMostSharedBase) <= shared_bytes) break;
    }
    return memory.warps == most_warps;
  };
  // Warps come first. For them goes the half of the table's copies, then a second record, then
  // both, then all copies.
  static_assert(kMaxCodeBits + 2 == 14);
  if (!fit(16, 2) && !fit(15, 2) && !fit(16, 1) && !fit(15, 1) && !fit(14, 2)) fit(14, 1);
  return memory;
}

// By how many steps the matrices have.
inline void assign_blocks(ProductWork& work, int blocks) {
  int64_t groups[kMatricesPerProduct], steps[kMatricesPerProduct];
  int shares[kMatricesPerProduct];
  for (int i = 0; i < work.count; ++i) {
    const MatrixWork& matrix = work.matrices[i];
    groups[i] = int64_t{matrix.tiles_n} * matrix.column_groups;
    steps[i] = int64_t{matrix.chunks} * matrix.steps;
  }
  share_blocks(blocks, work.count, steps, groups, shares);
  int first = 0;
  for (int i = 0; i < work.count; ++i) {
    MatrixWork& matrix = work.matrices[i];
    matrix.blocks = shares[i];
    matrix.first_block = first;
    first += matrix.blocks;
    matrix.block_groups = static_cast<int>(groups[i] / matrix.blocks);
    matrix.longer_blocks = static_cast<int>(groups[i] % matrix.blocks);
  }
}

// Gives each matrix as many of a block's warps as it has items for, whole groups and `most` at
// most; fewer if they can then have equally many items. Returns how many warps that takes, 0 if
// `most` are not enough for a group.
inline int assign_warps(ProductWork& work, int most) {
  int warps = 0;
  for (int i = 0; i < work.count; ++i) {
    MatrixWork& matrix = work.matrices[i];
    const int at_once = most / matrix.group_items;
    if (at_once == 0) return 0;
    const int groups = matrix.block_groups + (matrix.longer_blocks > 0);
    const int64_t rounds = divide_up(groups, at_once);
    matrix.warps = static_cast<int>(divide_up(groups, rounds)) * matrix.group_items;
    warps = std::max(warps, matrix.warps);
  }
  return warps;
}

inline WarpShare most_of_a_warp(const ProductWork& work) {
  WarpShare most = {};
  for (int i = 0; i < work.count; ++i) {
    const MatrixWork& matrix = work.matrices[i];
    if (matrix.warps == 0) continue;
    const int64_t groups = matrix.block_groups + (matrix.longer_blocks > 0);
    const int64_t items = divide_up(groups * matrix.group_items, matrix.warps);
    most = {std::max(most.items, items), std::max(most.chunks, items * matrix.item_chunks)};
  }
  return most;
}

inline void set_items(MatrixWork& matrix, const ProductItems& items) {
  matrix.item_chunks = items.chunks;
  matrix.group_items = items.group;
  matrix.column_groups = items.per_column;
  matrix.item_chunks_reciprocal = reciprocal(items.chunks);
  matrix.group_items_reciprocal = reciprocal(items.group);
  matrix.column_groups_reciprocal = reciprocal(items.per_column);
}

// What is to be done, by whoever. False if the product is not one that the kernel can do. Of
// `counters` there are product_counters(product), all 0.
inline bool describe_product(const Product& product, uint32_t* counters, ProductWork& work) {
  constexpr int64_t kMost = INT32_MAX;
  if (product.count < 1 || product.count > kMatricesPerProduct || product.rows < 1 ||
      product.rows > kMostProductRows) {
    return false;
  }
  const View& first = product.matrices[0].slices.view;
  if (product.rows * round_up(first.k, kXGroup) > kMost) return false;
  work = {};
  work.x = reinterpret_cast<const uint4*>(product.x);
  work.index = product.matrices[0].slices.index;
  work.rows = product.rows;
  work.rows_reciprocal = reciprocal(product.rows);
  work.k = static_cast<int>(first.k);
  work.count = product.count;
  work.float_out = product.float_out;
  uint32_t* arrived = counters;
  float* sums = reinterpret_cast<float*>(product.workspace);
  for (int i = 0; i < product.count; ++i) {
    const TensorSlices& slices = product.matrices[i].slices;
    const View& view = slices.view;
    if (!can_multiply(view) || view.k != first.k || slices.batch != 1 || slices.batch_axes != 0 ||
        product_n(view) >= 1 << 26 || view.chunks() >= 1 << 24 ||
        slices.exponents_words > UINT32_MAX || slices.stack > kMost || slices.stack < 1 ||
        slices.index != work.index) {
      return false;
    }
    const ProductItems items = cut_into_items(view);
    MatrixWork& matrix = work.matrices[i];
    matrix.header = slices.header;
    matrix.codebook = slices.codebook;
    matrix.chunk_offsets = slices.chunk_offsets;
    matrix.exponents = slices.exponents;
    matrix.sign_mantissa = slices.sign_mantissa;
    matrix.out = product.matrices[i].out;
    matrix.sums = sums;
    matrix.arrived = arrived;
    matrix.exponents_words = static_cast<uint32_t>(slices.exponents_words);
    matrix.geometry = slices.geometry;
    matrix.stack = static_cast<int>(slices.stack);
    matrix.chunks = static_cast<int>(view.chunks());
    matrix.n = static_cast<int>(product_n(view));
    matrix.tiles_k = static_cast<int>(view.tiles_k());
    matrix.tiles_n = static_cast<int>(product_tiles_n(view));
    matrix.one_tiles_n = static_cast<int>(view.tiles_n());
    // Of one matrix, the quotient is 0.
    matrix.one_tiles_n_reciprocal = view.batch == 1 ? 1 : reciprocal(view.tiles_n());
    matrix.steps_k = static_cast<int>(view.steps_k());
    matrix.steps = view.steps;
    matrix.code_bits = slices.code_bits;
    set_items(matrix, items);
    arrived += matrix.tiles_n;
    sums += items.groups * product.rows * kTileCols;
  }
  return true;
}

// Who does it, on a GPU that has bulk copies or not. False if there are too few blocks or warps, or
// too little shared memory.
inline bool share_out(ProductWork& work, bool has_bulk_copies, int blocks, int most_warps,
                      uint32_t shared_bytes) {
  if (blocks < work.count) return false;
  work.has_bulk_copies = has_bulk_copies;
  assign_blocks(work, blocks);
  int steps = 0, least_group = 1;
  for (int i = 0; i < work.count; ++i) {
    const MatrixWork& matrix = work.matrices[i];
    steps = std::max(steps, matrix.steps);
    const bool is_less = least_group == 1 || matrix.group_items < least_group;
    if (matrix.group_items > 1 && is_less) least_group = matrix.group_items;
  }
  const auto plan = [&](int most, bool copy_x) {
    const int warps = assign_warps(work, most);
    work.memory = plan_memory(steps, work.rows, least_group, most_of_a_warp(work), warps,
                              shared_bytes, has_bulk_copies, copy_x);
    return work.memory.warps == warps;
  };
  const auto plan_as_many = [&](bool copy_x) {
    for (int most = most_warps; !plan(most, copy_x);) most = work.memory.warps;
    return work.memory.warps;
  };
  // Where x is loaded, not copied, the compiler does it just before it is needed, since registers
  // have no room for it. With 28 warps, others work then. With fewer, those that have more rows, x
  // is copied, if that does not leave still fewer.
  const int warps = plan_as_many(false);
  if (has_bulk_copies && product_tiles(work.rows) > 1) {
    const ProductWork loading = work;
    if (plan_as_many(true) < warps) work = loading;
  }
  return warps > 0;
}

inline bool plan_product(const Product& product, uint32_t* counters, bool has_bulk_copies,
                         int blocks, uint32_t shared_bytes, ProductWork& work) {
  const int most_warps = most_product_warps(product_tiles(product.rows), has_bulk_copies);
  return describe_product(product, counters, work) &&
         share_out(work, has_bulk_copies, blocks, most_warps, shared_bytes);
}

// The kernel's launch. For tests, which share work out otherwise.
cudaError_t launch_product_work(cudaStream_t stream, const ProductWork& work);

// Counters for launches with this workspace on a device, as many or more.
cudaError_t take_counters(int device, const uint32_t* workspace, int64_t count,
                          uint32_t** counters);

}  // namespace df11::native
