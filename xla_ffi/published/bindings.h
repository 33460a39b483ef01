// The published layout's functions in the Python module.
#pragma once

#include <nanobind/nanobind.h>

namespace df11::published {

void add_bindings(nanobind::module_& m);

}  // namespace df11::published
