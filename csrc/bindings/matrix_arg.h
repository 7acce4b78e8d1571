// A matrix as Python hands it over: (address, rows, cols, row stride in elements, dtype code).
#pragma once

#include <cstdint>
#include <tuple>

#include "ardlora/view.h"

namespace ardlora {

using MatrixArg = std::tuple<std::uintptr_t, std::int64_t, std::int64_t, std::int64_t, int>;

inline MatrixView view(const MatrixArg& arg, const char* op) {
  const auto [data, rows, cols, stride, dtype] = arg;
  return {reinterpret_cast<void*>(data), rows, cols, stride, dtype_from_code(dtype, op)};
}

inline const float* floats(std::uintptr_t address) { return reinterpret_cast<const float*>(address); }

}  // namespace ardlora
