#include "cuda/gemm_plan.h"

#include <algorithm>
#include <limits>
#include <sstream>

#include "ardlora/check.h"
#include "cuda/segment_table.h"

namespace ardlora::cuda {
namespace {

constexpr int kMinSteps = 2;  // of a share

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

int fitting_rank_tile(std::int64_t rank) { return rank <= 16 ? 16 : (rank <= 32 ? 32 : kRankTile); }

// Two blocks on each multiprocessor hide each other's waits. One block more than that would cost as much as a second
// on all of them, and each further share costs workspace traffic.
void set_shares(GemmPlan& plan, std::int64_t blocks, std::int64_t all_steps, int multiprocessors) {
  const std::int64_t wanted = std::min(2 * multiprocessors / blocks, ceil_div(all_steps, kMinSteps));
  plan.steps = static_cast<int>(ceil_div(all_steps, std::max<std::int64_t>(1, wanted)));
  plan.shares = static_cast<int>(ceil_div(all_steps, plan.steps));
}

}  // namespace

GemmPlan plan_gemm(Gemm kind, const Factor& factor, std::int64_t hidden, std::int64_t rows, DType activations,
                   bool dropout, int multiprocessors) {
  constexpr std::int64_t kMaxRows = std::numeric_limits<std::int32_t>::max() - 1024;
  ARDLORA_CHECK(rows <= kMaxRows, "gemm_plan: x must have at most ", kMaxRows, " rows, got ", rows);
  const int bytes = static_cast<int>(dtype_size(activations));
  GemmPlan plan{};
  plan.kind = kind;
  plan.shares = 1;
  plan.rank_tile = fitting_rank_tile(factor.max_rank);
  const auto segments = static_cast<std::int64_t>(factor.segments.size());
  if (rows == 0 || segments == 0) return plan;
  const std::int64_t rank_tiles = ceil_div(factor.max_rank, plan.rank_tile);
  std::int64_t x = 0, y = 0;
  if (kind == Gemm::kShrink) {
    plan.threads = kShrinkThreads;
    plan.shared = shrink_shared(plan.rank_tile);
    const std::vector<SegmentGroup> groups = segment_groups(factor);
    std::int32_t longest = 0;
    for (const SegmentGroup& g : groups) longest = std::max(longest, g.segments);
    plan.tiles = static_cast<int>(rank_tiles);
    x = ceil_div(rows, kShrinkRows);
    y = static_cast<std::int64_t>(groups.size()) * rank_tiles;
    set_shares(plan, x * y, ceil_div(factor.width, kPanelBytes / bytes) * longest, multiprocessors);
    plan.partial_rows = rows;
    plan.partial_stride = ceil_div(hidden, 4) * 4;
  } else if (kind == Gemm::kExpand) {
    plan.threads = kExpandThreads;
    if (activations == DType::kFloat32) plan.rank_tile = std::min(plan.rank_tile, 32);  // shared memory
    plan.shared = expand_shared(bytes, plan.rank_tile, dropout);
    plan.tiles = static_cast<int>(ceil_div(factor.width, kExpandColumns));
    x = ceil_div(rows, kExpandRows);
    y = segments * plan.tiles;
  } else {
    const bool shrinks = kind == Gemm::kOuterShrink;
    plan.threads = kOuterThreads;
    plan.shared = shrinks ? outer_shrink_shared(bytes) : outer_shared(bytes, plan.rank_tile);
    plan.tiles = static_cast<int>(ceil_div(factor.width, kOuterColumns));
    x = segments * plan.tiles;
    y = rank_tiles;
    set_shares(plan, x * y, ceil_div(rows, outer_rows(bytes)), multiprocessors);
    plan.partial_rows = factor.rows;
    plan.partial_stride = ceil_div(factor.width, 4) * 4;
    plan.hidden_rows = shrinks ? rows : 0;
    plan.hidden_stride = ceil_div(hidden, 4) * 4;
  }
  constexpr std::int64_t kMaxY = 65535;
  ARDLORA_CHECK(y <= kMaxY, "gemm_plan: a factor must need at most ", kMaxY, " tiles, got ", y);
  plan.blocks[0] = static_cast<unsigned>(x);
  plan.blocks[1] = static_cast<unsigned>(y);
  plan.blocks[2] = static_cast<unsigned>(plan.shares);
  return plan;
}

bool one_pass(const Factor& factor, std::int64_t hidden, std::int64_t rows, DType activations) {
  return rows > 0 && activations != DType::kFloat32 && factor.max_rank > 0 && factor.max_rank <= kOnePassRanks &&
         factor.rows == hidden;
}

std::string describe(const GemmPlan& plan) {
  constexpr const char* kNames[] = {"shrink", "expand", "outer", "outer_shrink"};
  std::ostringstream out;
  out << kNames[static_cast<int>(plan.kind)] << ": blocks " << plan.blocks[0] << " x " << plan.blocks[1] << " x "
      << plan.blocks[2] << " of " << plan.threads << " threads, " << plan.shared << " bytes shared, rank tile "
      << plan.rank_tile << ", shares " << plan.shares << ", workspace " << plan.workspace() * 4 << " bytes";
  return out.str();
}

}  // namespace ardlora::cuda
