// Rank changes: rows of parameters, gradients and optimizer moments move by one plan, many buffers in one call.
#pragma once

#include <cstdint>
#include <vector>

namespace ardlora {

// dst row i takes row index[i] of src; -1 makes it zero. Every source row is used at most once. src == dst moves in
// place with one row of scratch; other overlaps are not allowed.
struct RowMove {
  const void* src;
  void* dst;
  std::int64_t row_bytes;
  std::int64_t src_rows;
  std::int64_t plan;  // which index list
};

void rank_resize(const std::vector<RowMove>& moves, const std::vector<std::vector<std::int64_t>>& plans, int threads);

}  // namespace ardlora
