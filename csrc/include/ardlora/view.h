// A matrix in somebody else's memory: pointer, extents, row stride in elements. Rows are contiguous.
#pragma once

#include <cstdint>

#include "ardlora/check.h"
#include "ardlora/dtype.h"

namespace ardlora {

struct MatrixView {
  void* data;
  std::int64_t rows;
  std::int64_t cols;
  std::int64_t row_stride;
  DType dtype;
};

inline void check_view(const MatrixView& view, std::int64_t cols, const char* op, const char* name) {
  ARDLORA_CHECK(view.rows >= 0, op, ": ", name, " must have a non-negative number of rows, got ", view.rows);
  ARDLORA_CHECK(view.cols == cols, op, ": ", name, " must have ", cols, " columns, got ", view.cols);
  ARDLORA_CHECK(view.rows <= 1 || view.row_stride >= cols, op, ": ", name, " must have a row stride of at least ", cols,
                ", got ", view.row_stride);
  ARDLORA_CHECK(view.data != nullptr || view.rows * cols == 0, op, ": ", name, " must not be null");
}

}  // namespace ardlora
