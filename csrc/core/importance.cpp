#include "ardlora/importance.h"

#include "cpu/kernel_table.h"
#include "cpu/parallel.h"

namespace ardlora {

void row_dots(const std::vector<RowBlock>& blocks, DType dtype, float* out, int threads) {
  struct Row {
    const char* weight;
    const char* grad;
    std::int64_t cols;
  };
  std::vector<Row> rows;
  double flops = 0.0;
  const std::int64_t size = dtype_size(dtype);
  for (const RowBlock& b : blocks) {
    ARDLORA_CHECK(b.rows >= 0 && b.cols >= 0, "row_dots: sizes must be >= 0, got ", b.rows, " x ", b.cols);
    ARDLORA_CHECK(b.rows * b.cols == 0 || (b.weight != nullptr && b.grad != nullptr),
                  "row_dots: rows must not be null");
    for (std::int64_t r = 0; r < b.rows; ++r) {
      const std::int64_t offset = r * b.cols * size;
      rows.push_back({static_cast<const char*>(b.weight) + offset, static_cast<const char*>(b.grad) + offset, b.cols});
    }
    flops += 2.0 * static_cast<double>(b.rows) * static_cast<double>(b.cols);
  }
  const cpu::RowDotFn dot = cpu::active().row_dot[static_cast<int>(dtype)][static_cast<int>(dtype)];
  const auto n = static_cast<std::int64_t>(rows.size());
  cpu::parallel_for(n, 8, cpu::useful_threads(threads, flops), [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const Row& r = rows[static_cast<std::size_t>(i)];
      out[i] = dot(r.weight, r.grad, r.cols);
    }
  });
}

}  // namespace ardlora
