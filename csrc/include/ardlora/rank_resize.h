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

// One row's way: dst row `to` takes src row `from`. kHeldRow is the one row of scratch, kZeroRow a row of zeros.
inline constexpr std::int32_t kZeroRow = -1;
inline constexpr std::int32_t kHeldRow = -2;

struct RowStep {
  std::int32_t to;
  std::int32_t from;
};

// The steps of one plan in an order that, in place, never overwrites a row still to be read.
std::vector<RowStep> row_steps(const std::vector<std::int64_t>& plan, bool in_place);

// Everything is checked before anything moves.
void check_moves(const std::vector<RowMove>& moves, const std::vector<std::vector<std::int64_t>>& plans);

void rank_resize(const std::vector<RowMove>& moves, const std::vector<std::vector<std::int64_t>>& plans, int threads);

}  // namespace ardlora
