#include "ardlora/soft_orthogonality.h"

#include <cmath>

#include "ardlora/check.h"
#include "cpu/kernel_table.h"
#include "cpu/parallel.h"

namespace ardlora {
namespace {

// The error M M^T - I [count, count], then times what the gradient multiplies it with.
void scaled_error(const OrthogonalityBlock& b, double strength, bool norm, std::vector<float>* error) {
  const auto type = static_cast<int>(b.dtype);
  const cpu::RowDotFn dot = cpu::active().row_dot[type][type];
  const char* rows = static_cast<const char*>(b.rows);
  const std::int64_t bytes = b.width * dtype_size(b.dtype);
  error->resize(static_cast<std::size_t>(b.count * b.count));
  float* const e = error->data();
  double square = 0.0;
  for (std::int64_t i = 0; i < b.count; ++i) {
    for (std::int64_t j = 0; j <= i; ++j) {
      const float found = dot(rows + i * bytes, rows + j * bytes, b.width) - (i == j ? 1.0f : 0.0f);
      e[i * b.count + j] = e[j * b.count + i] = found;
      square += (i == j ? 1.0 : 2.0) * static_cast<double>(found) * static_cast<double>(found);
    }
  }
  const double scale = !norm ? 4.0 : square > 0.0 ? 2.0 / std::sqrt(square) : 0.0;
  for (float& value : *error) value *= static_cast<float>(strength * scale);
}

}  // namespace

void add_soft_orthogonality(const std::vector<OrthogonalityBlock>& blocks, const double* strength, bool norm,
                            int threads) {
  double flops = 0.0;
  for (const OrthogonalityBlock& b : blocks) {
    ARDLORA_CHECK(b.count >= 0 && b.width >= 0, "soft_orthogonality: sizes must be >= 0, got ", b.count, " x ",
                  b.width);
    ARDLORA_CHECK(b.count * b.width == 0 || (b.rows != nullptr && b.grad != nullptr),
                  "soft_orthogonality: rows must not be null");
    flops += 3.0 * static_cast<double>(b.count * b.count * b.width);
  }
  const auto n = static_cast<std::int64_t>(blocks.size());
  cpu::parallel_for(n, 1, cpu::useful_threads(threads, flops), [&](std::int64_t begin, std::int64_t end) {
    std::vector<float> error;
    for (std::int64_t k = begin; k < end; ++k) {
      const OrthogonalityBlock& b = blocks[static_cast<std::size_t>(k)];
      scaled_error(b, strength[k], norm, &error);
      char* grad = static_cast<char*>(b.grad);
      for (std::int64_t i = 0; i < b.count; ++i) {
        cpu::active().add_combination[static_cast<int>(b.dtype)](error.data() + i * b.count, b.rows, b.count, b.width,
                                                                 grad + i * b.width * dtype_size(b.dtype));
      }
    }
  });
}

}  // namespace ardlora
