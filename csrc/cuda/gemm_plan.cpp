#include "cuda/gemm_plan.h"

#include <algorithm>
#include <limits>
#include <sstream>
#include <utility>
#include <vector>

#include "ardlora/check.h"
#include "cuda/segment_table.h"

namespace ardlora::cuda {
namespace {

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

int fitting_rank_tile(std::int64_t rank) { return rank <= 16 ? 16 : (rank <= 32 ? 32 : kRankTile); }

// A sum that may be divided among blocks.
struct Sum {
  std::int64_t blocks;             // of a share
  std::int64_t length;             // of the sum
  std::int64_t unit;               // shares are multiples of it
  std::int64_t bytes;              // that a block moves for each element of its share
  std::int64_t partial_bytes;      // of a share's partial sums
  std::int64_t alone;              // quarters of its time that a block takes with no other beside it
  std::int64_t most_resident = 3;  // blocks of a multiprocessor, by their registers
};

// The shares with which the last multiprocessor is done first. What a multiprocessor does is counted in bytes that it
// moves: its blocks' shares, a latency for each wave, and its part of the partial sums, written and read again. Latency
// and `alone` are estimates from the simulation in docs/cuda.md.
void set_shares(GemmPlan& plan, const Sum& sum, const Multiprocessors& device) {
  constexpr std::int64_t kLatency = 16 * 1024, kReserved = 1024;
  const std::int64_t resident =
      std::clamp<std::int64_t>(device.shared / (plan.shared + kReserved), 1, sum.most_resident);
  const std::int64_t wave = resident * device.count, most = std::max<std::int64_t>(1, 3 * wave / sum.blocks);
  std::int64_t least = std::numeric_limits<std::int64_t>::max();
  for (std::int64_t shares = 1; shares <= most; ++shares) {
    const std::int64_t share = ceil_div(ceil_div(sum.length, shares), sum.unit) * sum.unit;
    if (share * (shares - 1) >= sum.length) continue;
    const std::int64_t blocks = sum.blocks * shares, rest = ceil_div(blocks % wave, device.count);
    const std::int64_t quarters = blocks / wave * resident * 4 + (rest == 1 ? sum.alone : rest * 4);
    std::int64_t cost = quarters * share * sum.bytes / 4 + ceil_div(blocks, wave) * kLatency;
    if (shares > 1) cost += 2 * shares * sum.partial_bytes / device.count + kLatency;
    if (cost >= least) continue;
    least = cost;
    plan.share = static_cast<int>(share);
    plan.shares = static_cast<int>(shares);
  }
}

struct Problem {
  const Factor& factor;
  std::int64_t hidden, rows;
  int bytes;  // of an element of the activations
  bool dropout;
  const Multiprocessors& device;
  bool sorted;  // by expert: a segment is an expert

  std::int64_t segments() const { return static_cast<std::int64_t>(factor.segments.size()); }
  // Segments that each block of rows meets.
  std::int64_t beside() const { return sorted ? 1 : segments(); }
  // Most columns of H that are read for a segment: from the chunk on in which it begins.
  std::int64_t ranks() const {
    std::int64_t most = 0;
    for (const Segment& s : factor.segments) most = std::max(most, s.h_begin % (16 / bytes) + s.rank);
    return most;
  }
  // Blocks of up to `length` rows, in the worst case where they are sorted.
  std::int64_t row_blocks(std::int64_t length) const {
    return sorted ? rows / length + std::min(segments(), rows) : ceil_div(rows, length);
  }
};

// The rows of a share where rows are sorted by expert: two waves of blocks if they are of one expert, but so many rows
// that partial sums are a small part of what is moved. An expert with more has a partial sum for each share.
void set_row_shares(GemmPlan& plan, const Problem& p, std::int64_t blocks) {
  constexpr std::int64_t kWaves = 2, kResident = 2, kLeast = 256, kOfRank = 32, kMostShares = 32768;
  const std::int64_t shares = std::max<std::int64_t>(1, kWaves * kResident * p.device.count / blocks);
  const std::int64_t rows =
      std::max({ceil_div(p.rows, shares), kLeast, kOfRank * p.factor.max_rank, ceil_div(p.rows, kMostShares)});
  plan.share = static_cast<int>(ceil_div(rows, 16) * 16);
  plan.sums = static_cast<int>((p.rows - 1) / plan.share);
  plan.shares = std::max(1, 2 * plan.sums);
  plan.partial_rows = p.factor.max_rank;
}

// Floats of a prepared factor, or 0 where blocks are not to be wide.
std::int64_t prepared_floats(const Problem& p) {
  const Factor& f = p.factor;
  const bool pays = p.rows / (p.sorted ? p.segments() : 1) >= kWideRows * p.device.count;
  if (f.max_rank <= kRankTile || p.bytes != 2 || !pays) return 0;
  return f.rows * prepared_stride(f.width) / 2;
}

// Each returns the tiles along x and y.
using Tiles = std::pair<std::int64_t, std::int64_t>;

Tiles plan_shrink(GemmPlan& plan, const Problem& p) {
  plan.prepared = prepared_floats(p);
  if (plan.wide()) plan.rank_tile = kWideRanks;
  const std::int64_t rank_tiles = ceil_div(p.factor.max_rank, plan.rank_tile);
  const std::vector<SegmentGroup> groups = p.sorted ? std::vector<SegmentGroup>{} : segment_groups(p.factor);
  std::int32_t longest = 1;
  for (const SegmentGroup& g : groups) longest = std::max(longest, g.segments);
  const Tiles tiles{p.row_blocks(kShrinkRows), (p.sorted ? 1 : static_cast<std::int64_t>(groups.size())) * rank_tiles};
  plan.threads = plan.wide() ? kWideThreads : kShrinkThreads;
  plan.shared = shrink_shared(plan.rank_tile);
  plan.tiles = static_cast<int>(rank_tiles);
  plan.partial_rows = p.rows;
  plan.partial_stride = ceil_div(p.hidden, 8) * 8;  // whole sectors
  set_shares(plan,
             {.blocks = tiles.first * tiles.second,
              .length = ceil_div(p.factor.width, kPanelBytes / p.bytes) * longest,
              .unit = 1,
              .bytes = (kShrinkRows + (plan.wide() ? kWideRanks : 0)) * kPanelBytes,
              .partial_bytes = p.rows * plan.partial_stride * 4,
              .alone = plan.wide() ? 5 : 6,
              .most_resident = plan.wide() ? 2 : 3},
             p.device);
  return tiles;
}

Tiles plan_expand(GemmPlan& plan, const Problem& p) {
  plan.rank_tile = fitting_rank_tile(p.ranks());
  if (p.bytes == 4) plan.rank_tile = std::min(plan.rank_tile, 32);  // shared memory
  plan.prepared = prepared_floats(p);
  plan.threads = kExpandThreads;
  plan.shared = expand_shared(p.bytes, plan.rank_tile, p.ranks() > plan.rank_tile ? 2 : 1, p.dropout, plan.wide());
  plan.tiles = static_cast<int>(ceil_div(p.factor.width, kExpandColumns));
  return {p.row_blocks(kExpandRows), p.beside() * plan.tiles};
}

Tiles plan_outer(GemmPlan& plan, const Problem& p) {
  const std::int64_t ranks = p.ranks();
  const bool shrinks = plan.kind == Gemm::kOuterShrink;
  plan.rank_tile = fitting_rank_tile(ranks);
  plan.threads = kOuterThreads;
  plan.shared = shrinks ? outer_shrink_shared(p.bytes, plan.rank_tile) : outer_shared(p.bytes, plan.rank_tile);
  plan.tiles = static_cast<int>(ceil_div(p.factor.width, kOuterColumns));
  plan.partial_rows = p.factor.rows;
  plan.partial_stride = ceil_div(p.factor.width, 4) * 4;
  plan.hidden_rows = shrinks ? p.rows : 0;
  plan.hidden_stride = ceil_div(p.hidden, 8) * 8;
  const Tiles tiles{p.beside() * plan.tiles, ceil_div(ranks, plan.rank_tile)};
  if (p.sorted) {
    set_row_shares(plan, p, tiles.first * tiles.second);
    return tiles;
  }
  set_shares(plan,
             {.blocks = tiles.first * tiles.second,
              .length = p.rows,
              .unit = 16,
              .bytes = (kOuterColumns + plan.rank_tile) * p.bytes,
              .partial_bytes = p.factor.rows * plan.partial_stride * 4,
              .alone = plan.rank_tile > 16 ? 5 : 4},
             p.device);
  return tiles;
}

}  // namespace

GemmPlan plan_gemm(Gemm kind, const Factor& factor, std::int64_t hidden, std::int64_t rows, DType activations,
                   bool dropout, const Multiprocessors& device, bool sorted) {
  constexpr std::int64_t kMaxRows = std::numeric_limits<std::int32_t>::max() - 1024, kMaxY = 65535;
  ARDLORA_CHECK(rows <= kMaxRows, "gemm_plan: x must have at most ", kMaxRows, " rows, got ", rows);
  GemmPlan plan{};
  plan.kind = kind;
  plan.shares = 1;
  plan.rank_tile = fitting_rank_tile(factor.max_rank);
  if (rows == 0 || factor.segments.empty()) return plan;
  const Problem problem{factor, hidden, rows, static_cast<int>(dtype_size(activations)), dropout, device, sorted};
  const auto [x, y] = kind == Gemm::kShrink   ? plan_shrink(plan, problem)
                      : kind == Gemm::kExpand ? plan_expand(plan, problem)
                                              : plan_outer(plan, problem);
  ARDLORA_CHECK(y <= kMaxY, "gemm_plan: a factor must need at most ", kMaxY, " tiles, got ", y);
  plan.blocks[0] = static_cast<unsigned>(x);
  plan.blocks[1] = static_cast<unsigned>(y);
  // Of sorted rows an expert without any has a share too: its gradient is zero.
  const bool counted = sorted && kind == Gemm::kOuter;
  plan.blocks[2] = static_cast<unsigned>(counted ? rows / plan.share + problem.segments() : plan.shares);
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
      << plan.rank_tile << ", shares " << plan.shares << " of " << plan.share << ", workspace " << plan.workspace() * 4
      << " bytes";
  return out.str();
}

}  // namespace ardlora::cuda
