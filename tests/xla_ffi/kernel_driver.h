// What the drivers that test CUDA kernels share.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "thread_sanitizer.h"

namespace df11 {

// How often damage is drawn: a GPU decodes in no time, the emulation does not.
#ifdef __CUDACC__
inline constexpr int kDraws = 200;
#else
inline constexpr int kDraws = kIsSlow ? 10 : 40;
#endif

inline int failures = 0;
// Of a section: chunks or blocks, whatever the kernel poisons as a whole.
inline int64_t checked = 0, poisoned = 0;

inline void expect(bool ok, const std::string& what) {
  if (ok) return;
  if (++failures <= 20) std::printf("FAILED: %s\n", what.c_str());
}

inline void section(const char* name, const char* checked_things,
                    const std::function<void()>& test) {
  checked = poisoned = 0;
  test();
  std::printf("%-12s %6lld %s compared, %lld of them poisoned\n", name,
              static_cast<long long>(checked), checked_things, static_cast<long long>(poisoned));
  std::fflush(stdout);
}

// Device memory of exactly the size of `data`; begins `offset` elements into an allocation.
template <typename T>
class Buffer {
 public:
  Buffer(const std::vector<T>& data, size_t offset = 0) : size_(data.size()) {
    const size_t bytes = (offset + size_) * sizeof(T);
    expect(cudaMalloc(&memory_, bytes ? bytes : 1) == cudaSuccess, "cudaMalloc");
    data_ = memory_ + offset;
    set(data);
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { cudaFree(memory_); }
  T* get() const { return data_; }
  void set(const std::vector<T>& data) {
    expect(cudaMemcpy(data_, data.data(), size_ * sizeof(T), cudaMemcpyHostToDevice) == cudaSuccess,
           "cudaMemcpy to the device");
  }
  std::vector<T> copy() const {
    std::vector<T> data(size_);
    expect(cudaMemcpy(data.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost) == cudaSuccess,
           "cudaMemcpy to the host");
    return data;
  }

 private:
  T* memory_ = nullptr;
  T* data_;
  size_t size_;
};

// What a function enqueues on a stream, as a CUDA graph. The emulation, which has no graphs,
// calls the function again each time.
class Recording {
 public:
  using Enqueue = std::function<cudaError_t(cudaStream_t)>;
#ifdef __CUDACC__
  explicit Recording(const Enqueue& enqueue) {
    expect(cudaStreamCreate(&stream_) == cudaSuccess, "cudaStreamCreate");
    // In this mode, a synchronization or an allocation anywhere in the process is an error.
    expect(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeGlobal) == cudaSuccess,
           "cudaStreamBeginCapture");
    const cudaError_t error = enqueue(stream_);
    expect(error == cudaSuccess, std::string("while captured: ") + cudaGetErrorString(error));
    expect(cudaStreamEndCapture(stream_, &graph_) == cudaSuccess, "cudaStreamEndCapture");
    expect(cudaGraphInstantiate(&program_, graph_, 0) == cudaSuccess, "cudaGraphInstantiate");
  }
  ~Recording() {
    cudaGraphExecDestroy(program_);
    cudaGraphDestroy(graph_);
    cudaStreamDestroy(stream_);
  }
  // Runs it to its end; returns how many kernels it has launched.
  int run() {
    size_t count = 0;
    expect(cudaGraphGetNodes(graph_, nullptr, &count) == cudaSuccess, "cudaGraphGetNodes");
    std::vector<cudaGraphNode_t> nodes(count);
    expect(cudaGraphGetNodes(graph_, nodes.data(), &count) == cudaSuccess, "cudaGraphGetNodes");
    int kernels = 0;
    for (const cudaGraphNode_t node : nodes) {
      cudaGraphNodeType type;
      expect(cudaGraphNodeGetType(node, &type) == cudaSuccess &&
                 (type == cudaGraphNodeTypeKernel || type == cudaGraphNodeTypeMemset),
             "nothing but kernels and memsets in a graph");
      kernels += type == cudaGraphNodeTypeKernel;
    }
    expect(cudaGraphLaunch(program_, stream_) == cudaSuccess, "cudaGraphLaunch");
    expect(cudaStreamSynchronize(stream_) == cudaSuccess, "cudaStreamSynchronize");
    return kernels;
  }

 private:
  cudaStream_t stream_ = nullptr;
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t program_ = nullptr;
#else
  explicit Recording(Enqueue enqueue) : enqueue_(std::move(enqueue)) {}
  int run() {
    const int before = cuda_emulation::launches;
    expect(enqueue_(nullptr) == cudaSuccess, "what is recorded fails");
    return cuda_emulation::launches - before;
  }

 private:
  Enqueue enqueue_;
#endif
  Recording(const Recording&) = delete;
};

inline std::mt19937_64 rng(11);

inline uint64_t random_below(uint64_t end) { return rng() % end; }

// A weight as a network has them.
inline uint16_t normal() {
  const float value = std::normal_distribution<float>(0, 0.02f)(rng);
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>(bits >> 16);
}

}  // namespace df11
