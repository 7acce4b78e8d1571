// What the kernels over rows of factors read: jobs in device memory, the rows of all of them numbered job after job.
#pragma once

#include <cstdint>
#include <vector>

#include "ardlora/dtype.h"

namespace ardlora::cuda {

// One factor: all matrices [rows, cols], rows contiguous. `sensitivity` and `uncertainty` may be null for row dots
// alone.
struct RowBuffers {
  const void* weight;
  const void* grad;
  float* sensitivity;
  float* uncertainty;
  std::int64_t rows;
  std::int64_t cols;
  DType dtype;  // of weight and grad
};

struct RowJob {
  RowBuffers buffers;
  std::int64_t first_row;
  std::int64_t vectors;  // 1: every row begins at an address divisible by 16 and is a multiple of 16 bytes long
};
static_assert(sizeof(RowJob) % 8 == 0);

struct RowTable {
  std::vector<std::int64_t> words;  // RowJobs
  std::int64_t jobs;
  std::int64_t rows;
};

// Factors without rows get no job.
RowTable row_table(const std::vector<RowBuffers>& buffers, const char* op);

}  // namespace ardlora::cuda
