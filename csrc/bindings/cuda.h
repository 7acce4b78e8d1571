// What the binding files share.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "ardlora/rank_resize.h"

namespace ardlora {

using IndexArray = pybind11::array_t<std::int64_t, pybind11::array::c_style | pybind11::array::forcecast>;

// moves [n, 5]: source address, destination address, bytes per row, source rows, plan
std::vector<RowMove> row_moves(const IndexArray& moves);

void bind_cuda(pybind11::module_& m);
void bind_cuda_controller(pybind11::module_& m);
void bind_cuda_lora(pybind11::module_& m);

}  // namespace ardlora
