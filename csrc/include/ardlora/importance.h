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

// A factor, its gradient and the running means of its entries, all contiguous.
struct ImportanceBlock {
  const void* weight;
  const void* grad;
  float* sensitivity;
  float* uncertainty;
  std::int64_t entries;
  DType dtype;  // of weight and grad
};

// One step of the means (AdaLoRA's sensitivity and uncertainty) of every entry: with I = |weight * grad|,
// sensitivity = beta1 sensitivity + (1 - beta1) I, then uncertainty = beta2 uncertainty + (1 - beta2) |I -
// sensitivity|. Returns false, and changes nothing, where an entry of weight * grad is not finite.
bool update_importance(const std::vector<ImportanceBlock>& blocks, double beta1, double beta2, int threads);

// `out` holds the rows of all blocks, block after block.
void row_dots(const std::vector<RowBlock>& blocks, DType dtype, float* out, int threads);

}  // namespace ardlora
