// The layouts' functions in the Python module for the CPU.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstddef>
#include <cstdlib>
#include <utility>

#include "common/words.h"

namespace df11 {

template <typename T, size_t N>
using NumpyArray = nanobind::ndarray<T, nanobind::numpy, nanobind::ndim<N>>;

// The first entries of the words as a numpy array, which takes them over.
template <typename T, size_t N>
NumpyArray<T, N> release(Words words, const size_t (&shape)[N]) {
  if (!words.data()) words.reserve(1);  // a capsule cannot hold a null pointer
  nanobind::capsule owner(words.data(), [](void* p) noexcept { std::free(p); });
  uint32_t* raw = words.release();
  return NumpyArray<T, N>(reinterpret_cast<T*>(raw), N, shape, owner);
}

}  // namespace df11

namespace df11::native {
void add_bindings(nanobind::module_& m);
}  // namespace df11::native

namespace df11::published {
void add_bindings(nanobind::module_& m);
}  // namespace df11::published
