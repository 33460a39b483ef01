// How fast the CUDA kernels of the native layout are by themselves, without XLA: the decoder beside
// a copy, the product beside cuBLAS. Every bit of the decoder is compared, and the product with
// sums in double precision. docs/figures.md has what it printed.
//
//   nvcc -std=c++17 -arch=native -O3 -I xla_ffi -o kernels benchmarks/kernels.cu \
//     xla_ffi/native/cuda/decode.cu xla_ffi/native/cuda/product.cu -ldl
//   ./kernels decode [NAME]
//   ./kernels product [K N [ROWS [BITS [STEPS]]]]      of what is not named, all; 0 is all
//
// Weights are normal(0, 0.02). Launches follow each other in a CUDA graph, each reading another
// copy of the weights, as many as take 400 MB: no time is that of a cache.

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <library_types.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "check_cuda.h"
#include "native/cuda/decode.h"
#include "native/cuda/product.h"
#include "native/encode.h"

namespace df11::native {
namespace {

const int kThreads = std::max(1u, std::thread::hardware_concurrency());

std::vector<uint16_t> draw(int64_t count, float scale, uint64_t seed) {
  std::vector<uint16_t> weights(count);
  constexpr int64_t kPart = 1 << 20;
  parallel_for((count + kPart - 1) / kPart, kThreads, [&](int64_t part) {
    std::mt19937 rng(static_cast<uint32_t>(seed * 1000003 + part));
    std::normal_distribution<float> normal(0, scale);
    for (int64_t i = part * kPart; i < std::min(count, (part + 1) * kPart); ++i) {
      const float value = normal(rng);
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      weights[i] = static_cast<uint16_t>(bits >> 16);
    }
  });
  return weights;
}

template <typename T>
T* allocate(int64_t count) {
  T* memory;
  CHECK(cudaMalloc(&memory, std::max<int64_t>(count, 1) * sizeof(T)));
  return memory;
}

// `count` times the same words, in device memory.
template <typename T>
T* repeat(const std::vector<T>& data, int64_t count) {
  T* memory = allocate<T>(count * data.size());
  const size_t bytes = data.size() * sizeof(T);
  CHECK(cudaMemcpy(memory, data.data(), bytes, cudaMemcpyHostToDevice));
  for (int64_t i = 1; i < count; ++i) {
    CHECK(cudaMemcpy(memory + i * data.size(), memory, bytes, cudaMemcpyDeviceToDevice));
  }
  return memory;
}

// Seconds of one launch, the median of some replays.
double time_launches(int launches, const std::function<void(cudaStream_t, int)>& launch) {
  cudaStream_t stream;
  CHECK(cudaStreamCreate(&stream));
  launch(stream, 0);
  CHECK(cudaStreamSynchronize(stream));
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
  for (int i = 0; i < launches; ++i) launch(stream, i);
  cudaGraph_t graph;
  CHECK(cudaStreamEndCapture(stream, &graph));
  cudaGraphExec_t program;
  CHECK(cudaGraphInstantiate(&program, graph, 0));
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = 0; i < 9; ++i) {
    CHECK(cudaEventRecord(begin, stream));
    CHECK(cudaGraphLaunch(program, stream));
    CHECK(cudaEventRecord(end, stream));
    CHECK(cudaEventSynchronize(end));
    float milliseconds;
    CHECK(cudaEventElapsedTime(&milliseconds, begin, end));
    if (i >= 2) times.push_back(milliseconds);
  }
  CHECK(cudaGraphExecDestroy(program));
  CHECK(cudaGraphDestroy(graph));
  CHECK(cudaStreamDestroy(stream));
  std::sort(times.begin(), times.end());
  return times[times.size() / 2] * 1e-3 / launches;
}

// A compressed matrix of `copies` equal slices in device memory.
class Compressed {
 public:
  Compressed(const std::vector<uint16_t>& weights, int64_t k, int64_t n, int steps, int code_bits,
             int copies)
      : copies_(copies) {
    const int64_t dims[] = {k, n};
    Layout layout = default_layout(dims, 2);
    layout.steps = steps;
    layout.code_bits = code_bits;
    const View view = make_view(layout);
    std::vector<uint32_t> codebook(kCodebookWords), offsets(view.chunks() + 1),
        sign_mantissa(view.sign_mantissa_words());
    const Codebook book =
        choose_codebook(count_pairs(weights.data(), view, kThreads), layout.code_bits);
    book.pack(codebook.data());
    const Words records = encode_slice(weights.data(), view, CodeTable(book), kThreads,
                                       offsets.data(), sign_mantissa.data());
    std::vector<uint32_t> exponents(records.data(), records.data() + records.size());
    exponents.resize(padded_exponents_words(view, layout.code_bits, records.size()));
    const auto header_words = pack_header(layout);
    std::vector<uint32_t> header(header_words.begin(), header_words.end());
    static uint32_t tables = 0;
    header[kCodebookIdWord] = ++tables;  // as another's codebook has not
    std::vector<int32_t> indices(copies);
    for (int i = 0; i < copies; ++i) indices[i] = i;
    slices_.view = view;
    slices_.geometry = header[kGeometryWord];
    slices_.code_bits = layout.code_bits;
    slices_.stack = copies;
    slices_.exponents_words = static_cast<int64_t>(exponents.size());
    slices_.header = repeat(header, copies);
    slices_.codebook = repeat(codebook, copies);
    slices_.chunk_offsets = repeat(offsets, copies);
    slices_.exponents = repeat(exponents, copies);
    slices_.sign_mantissa = repeat(sign_mantissa, copies);
    index_ = repeat(indices, 1);
    bits_ = 32.0 *
            (header.size() + codebook.size() + offsets.size() + exponents.size() +
             sign_mantissa.size()) /
            view.size;
  }
  Compressed(const Compressed&) = delete;
  ~Compressed() {
    for (const void* part :
         {static_cast<const void*>(slices_.header), static_cast<const void*>(slices_.codebook),
          static_cast<const void*>(slices_.chunk_offsets),
          static_cast<const void*>(slices_.exponents),
          static_cast<const void*>(slices_.sign_mantissa), static_cast<const void*>(index_)}) {
      cudaFree(const_cast<void*>(part));
    }
  }
  TensorSlices slice(int copy) const {
    TensorSlices slices = slices_;
    slices.index = index_ + copy % copies_;
    return slices;
  }
  double bits() const { return bits_; }

 private:
  TensorSlices slices_;
  int32_t* index_;
  int copies_;
  double bits_;
};

int copies_of(double bytes) { return std::max(2, static_cast<int>(400e6 / bytes) + 1); }

__global__ void count_differences(const uint16_t* a, const uint16_t* b, int64_t count,
                                  unsigned long long* differences) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * blockDim.x) {
    if (a[i] != b[i]) atomicAdd(differences, 1ull);
  }
}

// ---------------------------------------------------------------------------------- the decoder

struct Shape {
  int64_t k, n;
};
struct Case {
  const char* name;
  std::vector<Shape> shapes;
};

void time_decoder(const char* only) {
  const std::vector<Case> cases = {
      {"1M", {{1024, 1024}}},
      {"4M", {{2048, 2048}}},
      {"16M", {{4096, 4096}}},
      {"64M", {{8192, 8192}}},
      {"llama-8b",
       {{4096, 4096},
        {4096, 1024},
        {4096, 1024},
        {4096, 4096},
        {4096, 14336},
        {4096, 14336},
        {14336, 4096}}},
      {"218M", {{16384, 13312}}},
  };
  constexpr int64_t kCopied = 16384 * 13312;
  uint16_t *from = allocate<uint16_t>(kCopied), *to = allocate<uint16_t>(kCopied);
  const double copy_rate =
      4.0 * kCopied / time_launches(10, [&](cudaStream_t stream, int) {
        CHECK(cudaMemcpyAsync(to, from, 2 * kCopied, cudaMemcpyDeviceToDevice, stream));
      });
  CHECK(cudaFree(from));
  CHECK(cudaFree(to));
  std::printf("a copy moves %.3f TB/s\n", copy_rate * 1e-12);
  for (const Case& that : cases) {
    if (*only && that.name != std::string(only)) continue;
    for (const int steps : {8, 4, 2}) {
      if (steps == 2 && that.shapes[0].k > 4096) continue;
      int64_t weights = 0;
      for (const Shape& shape : that.shapes) weights += shape.k * shape.n;
      if (steps == 4 && weights > 1 << 26) continue;
      const int copies = copies_of(1.33 * weights);
      std::vector<std::unique_ptr<Compressed>> matrices;
      std::vector<uint16_t*> originals, outs;
      double bits = 0;
      for (const Shape& shape : that.shapes) {
        const auto original = draw(shape.k * shape.n, 0.02f, matrices.size());
        matrices.push_back(
            std::make_unique<Compressed>(original, shape.k, shape.n, steps, 12, copies));
        originals.push_back(repeat(original, 1));
        outs.push_back(allocate<uint16_t>(original.size() * copies));
        bits += matrices.back()->bits() * original.size() / weights;
      }
      const auto time_decodes = [&](Grouping grouping) {
        return time_launches(std::max(10, copies), [&](cudaStream_t stream, int i) {
          std::vector<TensorSlices> tensors;
          for (size_t t = 0; t < matrices.size(); ++t) {
            tensors.push_back(matrices[t]->slice(i));
            tensors.back().out = outs[t] + i % copies * tensors.back().view.size;
          }
          CHECK(launch_decode(stream, tensors.data(), static_cast<int>(tensors.size()), grouping));
        });
      };
      auto* differences = allocate<unsigned long long>(1);
      const double limit = (2 + bits / 8) * weights / copy_rate;
      struct Way {
        const char* name;
        Grouping grouping;
      };
      std::vector<Way> ways = {{"", Grouping::kBySize}};
      if (weights <= 1 << 24) {
        ways.push_back({", one chunk a warp", Grouping::kSingle});
        ways.push_back({", two chunks a warp", Grouping::kPairs});
      }
      for (const Way& way : ways) {
        for (size_t t = 0; t < matrices.size(); ++t) {
          CHECK(cudaMemset(outs[t], 0xff, 2 * matrices[t]->slice(0).view.size * copies));
        }
        const double seconds = time_decodes(way.grouping);
        CHECK(cudaMemset(differences, 0, 8));
        for (size_t t = 0; t < matrices.size(); ++t) {
          const int64_t size = matrices[t]->slice(0).view.size;
          for (int copy : {0, copies - 1}) {
            count_differences<<<1024, 256>>>(outs[t] + copy * size, originals[t], size,
                                             differences);
          }
        }
        unsigned long long wrong;
        CHECK(cudaMemcpy(&wrong, differences, 8, cudaMemcpyDeviceToHost));
        std::printf(
            "decode %-9s steps %d%s: %llu wrong, %6.3f bits, %7.2f us, %.3f TB/s, %.1f %% of a "
            "copy\n",
            that.name, steps, way.name, wrong, bits, seconds * 1e6, 2e-12 * weights / seconds,
            100 * limit / seconds);
        std::fflush(stdout);
      }
      for (uint16_t* memory : originals) CHECK(cudaFree(memory));
      for (uint16_t* memory : outs) CHECK(cudaFree(memory));
      CHECK(cudaFree(differences));
    }
  }
}

// ---------------------------------------------------------------------------------- the product

// cuBLAS, found at run time.
class Cublas {
 public:
  Cublas() {
    for (const char* name : {"libcublas.so.13", "libcublas.so.12", "libcublas.so"}) {
      if (!library_) library_ = dlopen(name, RTLD_NOW);
    }
    if (!library_) return;
    const auto create = find<int (*)(void**)>("cublasCreate_v2");
    const auto set_workspace = find<int (*)(void*, void*, size_t)>("cublasSetWorkspace_v2");
    set_stream_ = find<int (*)(void*, cudaStream_t)>("cublasSetStream_v2");
    gemm_ = find<Gemm>("cublasGemmEx");
    if (create(&handle_) != 0) std::exit(1);
    constexpr size_t kWorkspace = 64 << 20;
    set_workspace(handle_, allocate<char>(kWorkspace), kWorkspace);
  }
  explicit operator bool() const { return library_; }

  // y = x w, w [k, n] in memory, or its transpose.
  void multiply(cudaStream_t stream, const uint16_t* x, const uint16_t* w, uint16_t* y, int rows,
                int k, int n, bool transposed) const {
    const float one = 1, zero = 0;
    constexpr int kFloat32 = 68, kDefault = -1;
    set_stream_(handle_, stream);
    const int status =
        gemm_(handle_, transposed, 0, n, rows, k, &one, w, CUDA_R_16BF, transposed ? k : n, x,
              CUDA_R_16BF, k, &zero, y, CUDA_R_16BF, n, kFloat32, kDefault);
    if (status != 0) std::exit(1);
  }

 private:
  using Gemm = int (*)(void*, int, int, int, int, int, const void*, const void*, cudaDataType, int,
                       const void*, cudaDataType, int, const void*, void*, cudaDataType, int, int,
                       int);
  template <typename Function>
  Function find(const char* name) const {
    return reinterpret_cast<Function>(dlsym(library_, name));
  }
  void *library_ = nullptr, *handle_ = nullptr;
  int (*set_stream_)(void*, cudaStream_t) = nullptr;
  Gemm gemm_ = nullptr;
};

__global__ void reference_product(const uint16_t* x, const uint16_t* w, double* y, double* mass,
                                  int rows, int k, int n) {
  const int column = blockIdx.x * blockDim.x + threadIdx.x;
  if (column >= n) return;
  for (int row = 0; row < rows; ++row) {
    double sum = 0, total = 0;
    for (int i = 0; i < k; ++i) {
      const double product = double(__uint_as_float(uint32_t(x[int64_t(row) * k + i]) << 16)) *
                             __uint_as_float(uint32_t(w[int64_t(i) * n + column]) << 16);
      sum += product;
      total += fabs(product);
    }
    y[int64_t(row) * n + column] = sum;
    mass[int64_t(row) * n + column] = total;
  }
}

// The largest error, in parts of the sum of the products' absolute values; rounding to bfloat16 is
// taken off.
double largest_error(const uint16_t* device_y, const std::vector<double>& expected,
                     const std::vector<double>& mass, int64_t count) {
  std::vector<uint16_t> y(count);
  CHECK(cudaMemcpy(y.data(), device_y, 2 * count, cudaMemcpyDeviceToHost));
  double worst = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = uint32_t{y[i]} << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    if (std::isnan(value)) return 1e9;
    const double error = std::fabs(value - expected[i]) - std::fabs(expected[i]) / 255;
    worst = std::max(worst, error / mass[i]);
  }
  return worst;
}

struct Choice {  // 0 is all
  int64_t k = 0, n = 0;
  int rows = 0, code_bits = 0, steps = 0;
};

void time_product(const Choice& choice) {
  const Cublas cublas;
  if (!cublas) std::printf("no cuBLAS was found on LD_LIBRARY_PATH: nothing is compared with it\n");
  std::vector<Shape> shapes = {{4096, 4096}, {4096, 6144}, {4096, 28672}, {14336, 4096}};
  if (choice.k) shapes = {{choice.k, choice.n}};
  for (const Shape& shape : shapes) {
    const int64_t k = shape.k, n = shape.n;
    const std::vector<uint16_t> weights = draw(k * n, 0.02f, 1);
    const int copies = copies_of(1.33 * k * n);
    uint16_t* const plain = repeat(weights, copies);
    constexpr int kRows = kMostProductRows;
    const std::vector<uint16_t> host_x = draw(kRows * k, 1, 2);
    uint16_t* const x = repeat(host_x, 1);
    uint16_t* const y = allocate<uint16_t>(kRows * n);
    double *reference = allocate<double>(kRows * n), *masses = allocate<double>(kRows * n);
    reference_product<<<(n + 63) / 64, 64>>>(x, plain, reference, masses, kRows, k, n);
    std::vector<double> expected(kRows * n), mass(kRows * n);
    CHECK(cudaMemcpy(expected.data(), reference, 8 * kRows * n, cudaMemcpyDeviceToHost));
    CHECK(cudaMemcpy(mass.data(), masses, 8 * kRows * n, cudaMemcpyDeviceToHost));
    double best[kRows + 1] = {};
    const std::vector<int> all_rows = {1, 2, 4, 8, 16, 32};
    for (const int rows : all_rows) {
      if (!cublas || (choice.rows && rows != choice.rows)) continue;
      double seconds[2];
      for (const bool transposed : {false, true}) {
        seconds[transposed] = time_launches(2 * copies, [&](cudaStream_t stream, int i) {
          cublas.multiply(stream, x, plain + i % copies * k * n, y, rows, k, n, transposed);
        });
      }
      best[rows] = std::min(seconds[0], seconds[1]);
      std::printf("cublas %lld x %lld rows %2d: %.2f us, transposed %.2f\n", (long long)k,
                  (long long)n, rows, seconds[0] * 1e6, seconds[1] * 1e6);
    }
    for (const int code_bits : {12, 11, 10, 9}) {
      for (const int steps : {8, 4, 2}) {
        if ((choice.code_bits && code_bits != choice.code_bits) ||
            (choice.steps && steps != choice.steps)) {
          continue;
        }
        const Compressed matrix(weights, k, n, steps, code_bits, copies);
        for (const int rows : all_rows) {
          if (choice.rows && rows != choice.rows) continue;
          if (!choice.rows && rows != 1 && (code_bits != 12 || steps != 8)) continue;
          std::vector<uint16_t> ordered(rows * k);
          for (int64_t i = 0; i < rows * k; ++i)
            ordered[place_in_x(rows, i / k, i % k)] = host_x[i];
          uint16_t* const ordered_x = repeat(ordered, 1);
          const auto product_of = [&](int i) {
            Product product;
            product.x = ordered_x;
            product.rows = rows;
            product.count = 1;
            product.matrices[0] = {matrix.slice(i), y};
            return product;
          };
          uint32_t* const workspace = allocate<uint32_t>(product_workspace_words(product_of(0)));
          const auto launch = [&](cudaStream_t stream, int i) {
            Product product = product_of(i);
            product.workspace = workspace;
            CHECK(launch_product(stream, product));
          };
          CHECK(cudaMemset(y, 0xff, 2 * kRows * n));
          const double seconds = time_launches(2 * copies, launch);
          const double error = largest_error(y, expected, mass, rows * n);
          std::printf(
              "product %lld x %lld rows %2d bits %2d steps %d: error %.1e, %.3f bits, %.2f us, "
              "%.2f TB/s, %.2f of cuBLAS's time\n",
              (long long)k, (long long)n, rows, code_bits, steps, error, matrix.bits(),
              seconds * 1e6, matrix.bits() / 8 * k * n / seconds * 1e-12,
              best[rows] ? seconds / best[rows] : 0.0);
          std::fflush(stdout);
          CHECK(cudaFree(ordered_x));
          CHECK(cudaFree(workspace));
        }
      }
    }
    for (void* memory : {static_cast<void*>(plain), static_cast<void*>(x), static_cast<void*>(y),
                         static_cast<void*>(reference), static_cast<void*>(masses)}) {
      CHECK(cudaFree(memory));
    }
  }
}

int run(int argc, char** argv) {
  const std::string which = argc > 1 ? argv[1] : "";
  const auto number = [&](int i) { return argc > i ? std::atoi(argv[i]) : 0; };
  if (which == "decode") {
    time_decoder(argc > 2 ? argv[2] : "");
  } else if (which == "product") {
    time_product({number(2), number(3), number(4), number(5), number(6)});
  } else {
    std::fprintf(stderr, "usage: kernels decode [NAME] | product [K N [ROWS [BITS [STEPS]]]]\n");
    return 2;
  }
  return 0;
}

}  // namespace
}  // namespace df11::native

int main(int argc, char** argv) { return df11::native::run(argc, argv); }
