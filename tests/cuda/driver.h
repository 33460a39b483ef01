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
#include <vector>

namespace df11 {

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
    expect(cudaMallocManaged(&memory_, bytes ? bytes : 1) == cudaSuccess, "cudaMallocManaged");
    data_ = memory_ + offset;
    std::copy(data.begin(), data.end(), data_);
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { cudaFree(memory_); }
  T* get() const { return data_; }
  std::vector<T> copy() const { return std::vector<T>(data_, data_ + size_); }

 private:
  T* memory_ = nullptr;
  T* data_;
  size_t size_;
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
