#include "ardlora/importance.h"

#include "cpu/kernel_table.h"
#include "cpu/parallel.h"

namespace ardlora {

void row_dots(const std::vector<RowDot>& rows, DType dtype, float* out, int threads) {
  const auto n = static_cast<std::int64_t>(rows.size());
  double flops = 0.0;
  for (const RowDot& r : rows) {
    ARDLORA_CHECK(r.cols >= 0, "row_dots: cols must be >= 0, got ", r.cols);
    ARDLORA_CHECK(r.cols == 0 || (r.weight != nullptr && r.grad != nullptr), "row_dots: rows must not be null");
    flops += 2.0 * static_cast<double>(r.cols);
  }
  const cpu::RowDotFn dot = cpu::active().row_dot[static_cast<int>(dtype)];
  cpu::parallel_for(n, 8, cpu::useful_threads(threads, flops), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const RowDot& r = rows[static_cast<std::size_t>(i)];
      out[i] = dot(r.weight, r.grad, r.cols);
    }
  });
}

}  // namespace ardlora
