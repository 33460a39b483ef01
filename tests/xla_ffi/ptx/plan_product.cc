// The plan of a product's launch, for the interpreter of PTX.
#include <cstdint>
#include <cstring>

#include "native/cuda/product_work.h"

using namespace df11::native;  // NOLINT(build/namespaces): a program of one function

// Fills in the kernel's parameter, and the launch's blocks and warps. `item_chunks` and
// `group_items` are those of the first matrix, if not 0. Returns the bytes of shared memory that
// the launch needs; 0 if there is no plan.
extern "C" uint32_t plan(const Product* product, uint32_t* counters, bool has_bulk_copies,
                         int blocks, int most_warps, uint32_t shared_bytes, int item_chunks,
                         int group_items, void* parameter, int parameter_bytes, int* launch) {
  ProductWork work;
  if (parameter_bytes != sizeof work || !describe_product(*product, counters, work)) return 0;
  if (item_chunks) {
    const View& view = product->matrices[0].slices.view;
    const int64_t items = divide_up(view.tiles_k(), item_chunks);
    const int per_column = static_cast<int>(divide_up(items, group_items));
    set_items(work.matrices[0],
              {item_chunks, group_items, per_column, per_column * product_tiles_n(view)});
  }
  if (!share_out(work, has_bulk_copies, blocks, most_warps, shared_bytes)) return 0;
  const MatrixWork& last = work.matrices[work.count - 1];
  launch[0] = last.first_block + last.blocks;
  launch[1] = work.memory.warps;
  std::memcpy(parameter, &work, sizeof work);
  return work.memory.end(kMostSharedBase);
}
