// Passes over factors and their gradients that feed the rank controllers.
#pragma once

#include <cstdint>
#include <vector>

#include "ardlora/dtype.h"

namespace ardlora {

// Rows of a factor and of its gradient, contiguous: out gets <weight_i, grad_i> for each row. For a gated component
// <dL/dB_i, B_i> = g_i dL/dg_i.
struct RowBlock {
  const void* weight;  // [rows, cols]
  const void* grad;    // [rows, cols]
  std::int64_t rows;
  std::int64_t cols;
};

// `out` holds the rows of all blocks, block after block.
void row_dots(const std::vector<RowBlock>& blocks, DType dtype, float* out, int threads);

}  // namespace ardlora
