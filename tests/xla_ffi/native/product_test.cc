// Tests of the CUDA product against sums of the weights that were encoded. Compiled by g++ against
// ../emulation (test_product_emulated.py) it runs the kernel on the host; compiled by nvcc, on
// a GPU.
#include "native/cuda/product.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "../kernel_driver.h"
#include "../thread_sanitizer.h"
#include "compressed_matrix.h"
#include "native/cuda/product_work.h"

namespace df11::native {
namespace {

// Bulk copies or those of lanes, whichever there are; of both, any.
bool any_copies() {
#ifdef __CUDACC__
  int major = 0;
  expect(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0) == cudaSuccess,
         "a device");
  if (major < 9) return false;
#ifndef DF11_LANE_COPIES_EVERYWHERE
  return true;
#endif
#endif
  return random_below(2) == 0;
}

// How a launch shares its work out, and what the GPU has; what it computes must not depend on it.
// With the more shared memory, more rows of x are copied.
struct Shares {
  int blocks = 3, warps = kMostItemsPerGroup;
  uint32_t shared_bytes = random_below(2) == 0 ? 64 * 1024 : 96 * 1024;
  bool has_bulk_copies = any_copies();
};

struct Call {
  std::vector<const CompressedMatrix*> matrices;
  std::vector<uint16_t> x;  // [rows, k]
  int rows;
  int32_t index = 0;
  bool float_out = true;
  Shares shares = {};
  ProductItems items = {};  // of the first matrix, if other ones than the kernel's host has
};

// The results' bits, a word each, of each matrix.
using Results = std::vector<std::vector<uint32_t>>;

struct DeviceMatrix {
  explicit DeviceMatrix(const CompressedMatrix& m)
      : header(m.header),
        codebook(m.codebook),
        chunk_offsets(m.chunk_offsets),
        exponents(m.exponents),
        sign_mantissa(m.sign_mantissa) {}
  Buffer<uint32_t> header, codebook, chunk_offsets, exponents, sign_mantissa;
};

Results multiply(const Call& call) {
  const int64_t k = call.matrices[0]->view.k;
  std::vector<uint16_t> ordered(call.rows * round_up(k, kXGroup));
  for (int row = 0; row < call.rows; ++row) {
    for (int64_t i = 0; i < k; ++i) {
      ordered[place_in_x(call.rows, row, i)] = call.x[row * k + i];
    }
  }
  const Buffer<uint16_t> x(ordered);
  const Buffer<int32_t> index(std::vector<int32_t>{call.index});
  std::vector<std::unique_ptr<DeviceMatrix>> inputs;
  std::vector<std::unique_ptr<Buffer<uint16_t>>> outs;
  Product product;
  product.x = x.get();
  product.rows = call.rows;
  product.float_out = call.float_out;
  product.count = static_cast<int>(call.matrices.size());
  for (int i = 0; i < product.count; ++i) {
    const CompressedMatrix& m = *call.matrices[i];
    inputs.push_back(std::make_unique<DeviceMatrix>(m));
    const int halves = call.float_out ? 2 : 1;
    outs.push_back(std::make_unique<Buffer<uint16_t>>(
        std::vector<uint16_t>(call.rows * product_n(m.view) * halves, 0x5a5a)));
    ProductMatrix& matrix = product.matrices[i];
    matrix.slices.view = m.view;
    matrix.slices.geometry = m.geometry;
    matrix.slices.stack = m.stack;
    matrix.slices.exponents_words = m.exponents_words;
    matrix.slices.index = index.get();
    matrix.slices.header = inputs[i]->header.get();
    matrix.slices.codebook = inputs[i]->codebook.get();
    matrix.slices.chunk_offsets = inputs[i]->chunk_offsets.get();
    matrix.slices.exponents = inputs[i]->exponents.get();
    matrix.slices.sign_mantissa = inputs[i]->sign_mantissa.get();
    matrix.slices.code_bits = m.layout.code_bits;
    matrix.out = outs[i]->get();
  }
  // Sums are written before they are read.
  const Buffer<uint32_t> workspace(
      std::vector<uint32_t>(product_workspace_words(product), 0x7fc00001u));
  product.workspace = workspace.get();
  const std::vector<uint32_t> zeros(product_counters(product));
  const Buffer<uint32_t> counters(zeros);
  if (call.shares.blocks == 0) {
    Recording recording([&](cudaStream_t stream) { return launch_product(stream, product); });
    for (int i = 0; i < 2; ++i) expect(recording.run() == 1, "one kernel a product");
  } else {
    ProductWork work;
    expect(describe_product(product, counters.get(), work), "a product");
    if (call.items.chunks) set_items(work.matrices[0], call.items);
    expect(share_out(work, call.shares.has_bulk_copies, call.shares.blocks, call.shares.warps,
                     call.shares.shared_bytes),
           "a plan");
    expect(
        launch_product_work(nullptr, work) == cudaSuccess && cudaDeviceSynchronize() == cudaSuccess,
        "a launch");
    expect(counters.copy() == zeros, "counters are 0 again");
  }
  Results results;
  for (int i = 0; i < product.count; ++i) {
    const std::vector<uint16_t> out = outs[i]->copy();
    std::vector<uint32_t> words(call.rows * product_n(call.matrices[i]->view));
    for (size_t at = 0; at < words.size(); ++at) {
      words[at] =
          call.float_out ? out[2 * at] | uint32_t{out[2 * at + 1]} << 16 : uint32_t{out[at]} << 16;
    }
    results.push_back(std::move(words));
  }
  return results;
}

float to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

std::vector<uint16_t> random_x(int rows, int64_t k) {
  std::vector<uint16_t> x(rows * k);
  for (uint16_t& value : x) value = normal();
  return x;
}

// Whether the results are the sums of products, up to what 32-bit sums may lose.
void compare(const Call& call, const Results& results, const std::string& what) {
  for (size_t i = 0; i < results.size(); ++i) {
    const CompressedMatrix& m = *call.matrices[i];
    double worst = 0;
    for (int row = 0; row < call.rows; ++row) {
      for (int64_t n = 0; n < product_n(m.view); ++n) {
        double sum = 0, mass = 0;
        for (int64_t k = 0; k < m.view.k; ++k) {
          const double product = double(to_float(uint32_t{m.weight(call.index, k, n)} << 16)) *
                                 to_float(uint32_t{call.x[row * m.view.k + k]} << 16);
          sum += product;
          mass += std::fabs(product);
        }
        const double found = to_float(results[i][row * product_n(m.view) + n]);
        const double allowed = 1e-5 * mass + (call.float_out ? 0 : std::fabs(sum) / 255);
        const double error = std::fabs(found - sum);
        if (!(error <= allowed)) worst = std::max(worst, std::isnan(found) ? 1e30 : error / mass);
        ++checked;
      }
    }
    expect(worst == 0, what + ", matrix " + std::to_string(i) + ": error " + std::to_string(worst));
  }
}

std::string name_of(const CompressedMatrix& m) {
  return std::to_string(m.view.batch) + " of " + std::to_string(m.view.k) + " x " +
         std::to_string(m.view.n) + " steps " + std::to_string(m.view.steps) + " bits " +
         std::to_string(m.layout.code_bits) + (m.view.along_columns ? " along columns" : "");
}

// All rows and all ways to share the work out give the same bits; raw records, too.
void check_matrix(const CompressedMatrix& matrix) {
  const int most_rows = kMostProductRows;
  Call call{{&matrix}, random_x(most_rows, matrix.view.k), most_rows};
  const Results all = multiply(call);
  compare(call, all, name_of(matrix));
  const CompressedMatrix raw = matrix.as_raw();
  const auto same = [&](Call other, const std::string& what) {
    const Results found = multiply(other);
    const size_t count = other.rows * product_n(matrix.view);
    expect(std::equal(found[0].begin(), found[0].end(), all[0].begin(), all[0].begin() + count),
           name_of(matrix) + ": other bits " + what);
  };
  for (const int rows : {1, 8, 9 + int(random_below(9))}) {
    Call other = call;
    other.rows = rows;
    other.x.resize(rows * matrix.view.k);
    other.shares = {1 + int(random_below(6)), kMostItemsPerGroup + int(random_below(4)), 64 * 1024};
    same(other, "of " + std::to_string(rows) + " rows");
  }
  Call other = call;
  other.matrices = {&raw};
  other.rows = 2;
  other.x.resize(2 * matrix.view.k);
  same(other, "of raw records");
  other.float_out = false;
  compare(other, multiply(other), name_of(matrix) + " to bfloat16");
}

void shapes() {
  int kind = 0;
  const auto any_weights = [&] {
    const Weights kinds[] = {rare_weight, normal_weight, noise};
    return kinds[kind++ % 3];
  };
  for (const int steps : {8, 4, 2}) {
    for (const bool along_columns : {false, true}) {
      if (kIsSlow && along_columns != (steps == 4)) continue;
      const auto check = [&](int64_t k, int64_t n) {
        const std::vector<int64_t> dims{along_columns ? n : k, along_columns ? k : n};
        const int code_bits = kMinCodeBits + static_cast<int>(random_below(4));
        check_matrix(
            CompressedMatrix(layout_of(dims, along_columns, steps, code_bits), any_weights()));
      };
      if (!kIsSlow) check(128, 64);
      check(272, 128);  // a tile of one step
      if (!kIsSlow) check(16 + 16 * random_below(12), 64);
      if (!kIsSlow) check(64, 504);                                // columns that there are not
      check(along_columns ? 504 : 523, along_columns ? 127 : 64);  // and k
    }
  }
}

// Matrices that stand side by side.
void side_by_side() {
  const auto check = [](const std::vector<int64_t>& dims, bool along_columns, int steps) {
    check_matrix(CompressedMatrix(as_batch(layout_of(dims, along_columns, steps, 11)), rare_weight,
                                  kIsSlow ? 1 : 2));
  };
  check({3, 272, 128}, false, 4);
  if (kIsSlow) return;
  check({5, 144, 64}, false, 2);
  check({2, 128, 304}, true, 8);
  check({9, 64, 304}, true, 8);
  const Layout halves = as_batch(layout_of({3, 256, 96}, false, 8, 12));
  Product product;
  product.count = product.rows = 1;
  product.matrices[0].slices.view = make_view(halves);
  ProductWork work;
  expect(!describe_product(product, nullptr, work), "tiles of two matrices");
}

// A launch of several: each as it is alone.
void partners() {
  const auto matrix = [](int64_t n, int steps, int bits, int stack) {
    return CompressedMatrix(layout_of({384, n}, false, steps, bits), rare_weight, stack);
  };
  const CompressedMatrix matrices[] = {matrix(256, 8, 12, 3), matrix(64, 4, 10, 2),
                                       matrix(128, 2, 9, 3), matrix(320, 8, 11, 3)};
  for (const int rows : {1, 12}) {
    if (kIsSlow && rows == 1) continue;
    for (const int32_t index : {2, 7, -5}) {
      if (kIsSlow && index != 2) continue;
      for (int count = kIsSlow ? 4 : 2; count <= 4; ++count) {
        Call call{{}, random_x(rows, 384), rows, index};
        for (int i = 0; i < count; ++i) call.matrices.push_back(&matrices[i]);
        call.shares = {count + int(random_below(9)), kMostItemsPerGroup, 64 * 1024};
        const Results together = multiply(call);
        Call clamped = call;
        compare(clamped, together, "launch of " + std::to_string(count));
        for (int i = 0; i < count; ++i) {
          Call alone = call;
          alone.matrices.assign(1, &matrices[i]);
          expect(multiply(alone)[0] == together[i], "bits depend on the launch");
        }
      }
    }
  }
}

// The launch as it is on a device, with all warps, and shared memory of other sizes.
void devices() {
  const CompressedMatrix matrix(layout_of({640, 512}, false, 4, 11), rare_weight);
  Call call{{&matrix}, random_x(4, 640), 4};
  const Results expected = multiply(call);
  for (const uint32_t shared_bytes : {64u << 10, 99u << 10, 163u << 10, 227u << 10}) {
    if (kIsSlow && shared_bytes != 99u << 10) continue;
    call.shares = {2, 7, shared_bytes};
    expect(multiply(call) == expected, "bits depend on shared memory");
  }
  if (kIsSlow) return;  // 768 threads
  call.shares.blocks = 0;
  expect(multiply(call) == expected, "bits depend on the device");
}

// More chunks than items, and more of a warp's than its list holds at a time.
void items() {
  if (kIsSlow) return;
  const int64_t n = kTileCols * (kProductItems / 34 + 1);
  const CompressedMatrix matrix(layout_of({34 * 32, n}, false, 2, 10), rare_weight);
  expect(cut_into_items(matrix.view).chunks == 2, "items of two chunks");
  Call call{{&matrix}, random_x(2, matrix.view.k), 2};
  const Results expected = multiply(call);
  compare(call, expected, name_of(matrix));
  call.shares = {1, 8, 64 * 1024};
  expect(multiply(call) == expected, "bits depend on who has which items");
}

// Long items, of which a warp has none in its first round, but in those that follow.
void long_items() {
  if (kIsSlow) return;
  const CompressedMatrix matrix(layout_of({104 * 32, 7 * kTileCols}, false, 2, 10), rare_weight);
  for (const int group : {2, 3}) {
    // Three items and four: a group and an item in each column.
    const int chunks = group == 2 ? 40 : 33;
    Call call{{&matrix}, random_x(2, matrix.view.k), 2};
    call.items = {chunks, group, 2, 2 * product_tiles_n(matrix.view)};
    call.shares = {1, 3 * group, 96 * 1024};
    compare(call, multiply(call), name_of(matrix) + ", long items");
  }
}

// Batches of 9 rows and more, for which a block has fewer warps than a matrix has items for it:
// what they have in shared memory is used again and again. Only a GPU is fast enough to be too fast
// for a copy that does not wait until it may overwrite what is there, and not each time.
void batches() {
#ifdef __CUDACC__
  const int repetitions = 20;
  const CompressedMatrix matrices[] = {{layout_of({2048, 2048}, false, 8, 11), rare_weight},
                                       {layout_of({4096, 6144}, false, 8, 12), normal_weight},
                                       {layout_of({2048, 3080}, false, 2, 10), rare_weight}};
#else
  const int repetitions = 1;
  const CompressedMatrix matrices[] = {{layout_of({330, 576}, false, 2, 10), rare_weight}};
#endif
  if (kIsSlow) return;  // 512 threads
  for (const CompressedMatrix& matrix : matrices) {
    const int most_rows = 20;
    const std::vector<uint16_t> x = random_x(most_rows, matrix.view.k);
    const auto with_rows = [&](int first, int rows, const Shares& shares) {
      const auto begin = x.begin() + first * matrix.view.k;
      const std::vector<uint16_t> part(begin, begin + rows * matrix.view.k);
      return multiply({{&matrix}, part, rows, 0, true, shares})[0];
    };
    std::vector<uint32_t> expected;
    for (int row = 0; row < most_rows; ++row) {
      for (const uint32_t bits : with_rows(row, 1, {})) expected.push_back(bits);
    }
    for (int repetition = 0; repetition < repetitions; ++repetition) {
      for (const int rows : {12, 16, 20}) {
        const std::vector<uint32_t> found = with_rows(0, rows, {0});
        expect(std::equal(found.begin(), found.end(), expected.begin()),
               name_of(matrix) + ": other bits of " + std::to_string(rows) + " rows at once");
        checked += static_cast<int64_t>(found.size());
      }
    }
  }
}

void absent() {
  CompressedMatrix matrix(layout_of({256, 128}, false, 8, 12), normal_weight);
  // Nothing is read: there is nothing to be read.
  for (auto* words : {&matrix.header, &matrix.codebook, &matrix.chunk_offsets, &matrix.exponents,
                      &matrix.sign_mantissa}) {
    words->clear();
  }
  multiply({{&matrix}, random_x(2, 256), 2, -1});
}

// Other workspaces have other counters, however many launches there were between: one may be in a
// CUDA graph, and run again at any time. Launches with the same workspace need no others.
void counters() {
  constexpr int64_t kCount = 1000;
  const std::vector<uint32_t> workspaces(2500);
  const auto take = [](const uint32_t& workspace, int64_t count) {
    uint32_t* first = nullptr;
    expect(take_counters(0, &workspace, count, &first) == cudaSuccess, "counters");
    return first;
  };
  std::vector<const uint32_t*> taken;
  for (const uint32_t& workspace : workspaces) {
    taken.push_back(take(workspace, kCount));
    expect(take(workspace, kCount / 2) == taken.back(), "a workspace keeps its counters");
    ++checked;
  }
  std::sort(taken.begin(), taken.end());
  for (size_t i = 1; i < taken.size(); ++i) {
    expect(taken[i] - taken[i - 1] >= kCount, "two workspaces have the same counters");
  }
}

// What is damaged is NaN, or as wrong as it looks; the other columns are right.
void damage_of(const Layout& layout, const Weights& weights, int tries) {
  const CompressedMatrix good(layout, weights);
  const Call call{{&good}, random_x(2, good.view.k), 2};
  const Results expected = multiply(call);
  for (int attempt = 0; attempt < tries; ++attempt) {
    CompressedMatrix bad = good;
    std::vector<uint32_t>* parts[] = {&bad.header, &bad.codebook, &bad.chunk_offsets,
                                      &bad.exponents, &bad.exponents};
    std::vector<uint32_t>& part = *parts[random_below(5)];
    size_t at = random_below(part.size());
    if (&part == &bad.exponents && random_below(2)) {
      at = bad.chunk_offsets[random_below(bad.view.chunks())] + random_below(10);
    }
    part[at] = random_below(3) ? part[at] ^ 1u << random_below(32) : uint32_t(rng());
    Call other = call;
    other.matrices = {&bad};
    other.shares.blocks = 1 + int(random_below(4));
    const Results found = multiply(other);
    const int64_t columns = product_n(good.view);
    for (int64_t n = 0; n < columns; ++n) {
      const bool unsound = !bad.column_is_sound(n / kTileCols);
      const bool unchanged = bad.column_equals(good, n / kTileCols);
      for (int row = 0; row < 2; ++row) {
        const uint32_t bits = found[0][row * columns + n];
        expect(!unsound || std::isnan(to_float(bits)), "what is damaged is not NaN");
        expect(!unchanged || bits == expected[0][row * columns + n], "damage spreads");
        ++checked;
        poisoned += unsound;
      }
    }
  }
}

int tries = kDraws / 2;  // of damage

void damage() {
  damage_of(layout_of({300, 192}, false, 8, 12), rare_weight, tries);
  damage_of(layout_of({304, 128}, false, 4, 9), rare_weight, tries);
  damage_of(layout_of({250, 64}, true, 2, 10), noise, tries);
  damage_of(as_batch(layout_of({2, 304, 64}, false, 8, 11)), rare_weight, tries);
}

int run() {
  section("shapes", "results", shapes);
  section("side by side", "results", side_by_side);
  section("partners", "results", partners);
  section("devices", "results", devices);
  section("items", "results", items);
  section("long items", "results", long_items);
  section("batches", "results", batches);
  section("absent", "results", absent);
  section("counters", "counters", counters);
  section("damage", "results", damage);
  std::printf("%d failures\n", failures);
  return failures != 0;
}

}  // namespace
}  // namespace df11::native

int main(int argc, char** argv) {
  if (argc > 1) df11::native::tries = std::atoi(argv[1]);
  return df11::native::run();
}
