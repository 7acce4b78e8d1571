#include "ardlora/importance.h"

#include <algorithm>
#include <atomic>

#include "cpu/kernel_table.h"
#include "cpu/parallel.h"

namespace ardlora {
namespace {

// fn(block, begin, end) for entries [begin, end) of each block, in equal parts of all entries per thread.
template <typename F>
void for_entries(const std::vector<ImportanceBlock>& blocks, int threads, F&& fn) {
  constexpr std::int64_t kGrain = 4096;
  std::int64_t total = 0;
  for (const ImportanceBlock& b : blocks) total += b.entries;
  const int used = cpu::useful_threads(threads, 8.0 * static_cast<double>(total));
  cpu::parallel_for(total, kGrain, used, [&](std::int64_t begin, std::int64_t end) {
    std::int64_t before = 0;
    for (const ImportanceBlock& b : blocks) {
      const std::int64_t from = std::max(begin - before, std::int64_t{0}), to = std::min(end - before, b.entries);
      if (from < to) fn(b, from, to);
      before += b.entries;
    }
  });
}

const char* entry(const void* base, std::int64_t i, DType dtype) {
  return static_cast<const char*>(base) + i * dtype_size(dtype);
}

}  // namespace

bool update_importance(const std::vector<ImportanceBlock>& blocks, double beta1, double beta2, int threads) {
  for (const ImportanceBlock& b : blocks) {
    ARDLORA_CHECK(b.entries >= 0, "importance: entries must be >= 0, got ", b.entries);
    const bool given = b.weight != nullptr && b.grad != nullptr && b.sensitivity != nullptr && b.uncertainty != nullptr;
    ARDLORA_CHECK(b.entries == 0 || given, "importance: buffers must not be null");
  }
  ARDLORA_CHECK(beta1 >= 0.0 && beta1 <= 1.0, "importance: beta1 must be in [0, 1], got ", beta1);
  ARDLORA_CHECK(beta2 >= 0.0 && beta2 <= 1.0, "importance: beta2 must be in [0, 1], got ", beta2);
  const cpu::KernelTable& isa = cpu::active();
  std::atomic<bool> finite{true};
  for_entries(blocks, threads, [&](const ImportanceBlock& b, std::int64_t begin, std::int64_t end) {
    const auto check = isa.importance_finite[static_cast<int>(b.dtype)];
    if (check(entry(b.weight, begin, b.dtype), entry(b.grad, begin, b.dtype), end - begin) != 0.0f) finite = false;
  });
  if (!finite) return false;
  for_entries(blocks, threads, [&](const ImportanceBlock& b, std::int64_t begin, std::int64_t end) {
    isa.importance_update[static_cast<int>(b.dtype)](entry(b.weight, begin, b.dtype), entry(b.grad, begin, b.dtype),
                                                     b.sensitivity + begin, b.uncertainty + begin, end - begin, beta1,
                                                     beta2);
  });
  return true;
}

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
