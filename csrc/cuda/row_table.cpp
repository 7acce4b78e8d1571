#include "cuda/row_table.h"

#include <cstring>

#include "ardlora/check.h"

namespace ardlora::cuda {
namespace {

bool vectors_fit(const RowBuffers& b) {
  std::uint64_t bits = static_cast<std::uint64_t>(b.cols * dtype_size(b.dtype));
  for (const void* p :
       {b.weight, b.grad, static_cast<const void*>(b.sensitivity), static_cast<const void*>(b.uncertainty)}) {
    bits |= reinterpret_cast<std::uint64_t>(p);
  }
  return bits % 16 == 0;
}

}  // namespace

RowTable row_table(const std::vector<RowBuffers>& buffers, const char* op) {
  std::vector<RowJob> jobs;
  std::int64_t rows = 0;
  for (const RowBuffers& b : buffers) {
    ARDLORA_CHECK(b.rows >= 0 && b.cols >= 0, op, ": sizes must be >= 0, got ", b.rows, " x ", b.cols);
    ARDLORA_CHECK(b.rows * b.cols == 0 || (b.weight != nullptr && b.grad != nullptr), op, ": rows must not be null");
    ARDLORA_CHECK((b.sensitivity == nullptr) == (b.uncertainty == nullptr), op,
                  ": sensitivity and uncertainty must come together");
    if (b.rows == 0) continue;
    jobs.push_back({b, rows, vectors_fit(b) ? 1 : 0});
    rows += b.rows;
  }
  std::vector<std::int64_t> words(jobs.size() * sizeof(RowJob) / 8);
  if (!jobs.empty()) std::memcpy(words.data(), jobs.data(), jobs.size() * sizeof(RowJob));
  return {std::move(words), static_cast<std::int64_t>(jobs.size()), rows};
}

}  // namespace ardlora::cuda
