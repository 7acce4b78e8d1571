#pragma once

#include <pybind11/pybind11.h>

namespace ardlora {

void bind_bench(pybind11::module_& m);

}  // namespace ardlora
