// What the resize kernel reads: jobs, then their steps, in one run of 8-byte words that is copied to the device.
#pragma once

#include <cstdint>
#include <vector>

#include "ardlora/rank_resize.h"

namespace ardlora::cuda {

inline constexpr int kResizeThreads = 128;

struct ResizeJob {
  std::uint64_t src;
  std::uint64_t dst;
  std::int64_t row_bytes;
  std::int64_t first_step;
  std::int64_t steps;
  std::int64_t first_block;
  std::int64_t word;  // bytes a thread moves at once: 16, 4, 2 or 1
};
static_assert(sizeof(ResizeJob) % 8 == 0 && sizeof(RowStep) == 8);

struct ResizeTable {
  std::vector<std::int64_t> words;
  std::int64_t jobs;
  std::int64_t blocks;
};

// Checks as `ardlora::rank_resize` does. Buffers without rows or columns get no job.
ResizeTable resize_table(const std::vector<RowMove>& moves, const std::vector<std::vector<std::int64_t>>& plans);

}  // namespace ardlora::cuda
