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
  std::int64_t entries = 0;
  for (const RowBlock& b : blocks) {
    ARDLORA_CHECK(b.rows >= 0 && b.cols >= 1, "row_dots: blocks must have columns, got ", b.rows, " x ", b.cols);
    ARDLORA_CHECK(b.rows == 0 || (b.weight != nullptr && b.grad != nullptr), "row_dots: rows must not be null");
    entries += b.rows * b.cols;
  }
  constexpr std::int64_t kGrain = 4096;
  const cpu::RowDotFn dot = cpu::active().row_dot[static_cast<int>(dtype)][static_cast<int>(dtype)];
  const int used = cpu::useful_threads(threads, 2.0 * static_cast<double>(entries));
  cpu::parallel_for(entries, kGrain, used, [&](std::int64_t begin, std::int64_t end) {
    std::int64_t before = 0;
    float* to = out;
    for (const RowBlock& b : blocks) {
      // A row is computed where its first entry lies.
      const auto first_row = [&](std::int64_t at) {
        return std::clamp((at - before + b.cols - 1) / b.cols, std::int64_t{0}, b.rows);
      };
      const std::int64_t last = first_row(end);
      for (std::int64_t r = first_row(begin); r < last; ++r) {
        to[r] = dot(entry(b.weight, r * b.cols, dtype), entry(b.grad, r * b.cols, dtype), b.cols);
      }
      before += b.rows * b.cols;
      to += b.rows;
    }
  });
}

}  // namespace ardlora
