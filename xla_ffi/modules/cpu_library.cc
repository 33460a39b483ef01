// df11_jax._cpu_library: the encoders, the CPU decoders, and the FFI handlers for the CPU, for
// Python.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "common/simd.h"
#include "modules/bindings.h"
#include "native/cpu/handler.h"
#include "published/cpu/handler.h"

namespace nb = nanobind;

namespace df11 {
namespace {

std::string simd_name(Simd simd) {
  constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_vbmi"};
  return kNames[static_cast<int>(simd)];
}

}  // namespace
}  // namespace df11

NB_MODULE(_cpu_library, m) {
  using namespace df11;
  m.doc() = "The C++ encoder and CPU decoder of df11_jax.";
  m.def("handlers", [] {
    nb::dict handlers;
    handlers["df11_decode"] = nb::capsule(reinterpret_cast<void*>(native::df11_decode_cpu));
    handlers["df11_published_decode"] =
        nb::capsule(reinterpret_cast<void*>(published::df11_published_decode_cpu));
    return handlers;
  });
  m.def(
      "simd_levels",
      [] {
        std::vector<std::string> names;
        for (int i = 0; i <= static_cast<int>(best_simd()); ++i) {
          names.push_back(simd_name(static_cast<Simd>(i)));
        }
        return names;
      },
      "The instruction sets that the decoder can use here, the one in use by default last.");
  m.def(
      "use_simd",
      [](const std::string& name) {
        for (int i = 0; i <= static_cast<int>(best_simd()); ++i) {
          if (simd_name(static_cast<Simd>(i)) == name) return use_simd(static_cast<Simd>(i));
        }
        throw std::invalid_argument("this processor has no " + name);
      },
      nb::arg("name"), "Makes the CPU handler use one of simd_levels().");
  native::add_bindings(m);
  published::add_bindings(m);
}
