// Passes over factors and their gradients that feed the rank controllers.
#pragma once

#include <cstdint>
#include <vector>

#include "ardlora/dtype.h"

namespace ardlora {

// out[i] = <weight_i, grad_i> over `cols` contiguous elements. For a gated component <dL/dB_i, B_i> = g_i dL/dg_i.
struct RowDot {
  const void* weight;
  const void* grad;
  std::int64_t cols;
};

void row_dots(const std::vector<RowDot>& rows, DType dtype, float* out, int threads);

}  // namespace ardlora
