#include "ardlora/unit_table.h"

#include <algorithm>
#include <numeric>

#include "ardlora/check.h"

namespace ardlora {
namespace {

constexpr std::int64_t kMost = std::int64_t{1} << 31;  // of features, units and ranks: products stay in 64 bits

// Neighbours that continue each other in H, in the factor and on the same columns become one segment, so that the
// full-width factor of independent heads is a single GEMM.
void append(Factor& factor, const Segment& next) {
  factor.rows = std::max(factor.rows, next.w_begin + next.rank);
  if (next.rank == 0) return;
  if (!factor.segments.empty()) {
    Segment& last = factor.segments.back();
    if (last.col_begin == next.col_begin && last.h_begin + last.rank == next.h_begin &&
        last.w_begin + last.rank == next.w_begin) {
      last.rank += next.rank;
      factor.max_rank = std::max(factor.max_rank, last.rank);
      return;
    }
  }
  factor.segments.push_back(next);
  factor.max_rank = std::max(factor.max_rank, next.rank);
}

}  // namespace

UnitTable::UnitTable(UnitKind kind, Factoring factoring, std::int64_t in_features, std::int64_t out_features,
                     std::vector<std::int64_t> ranks)
    : kind_(kind), ranks_(std::move(ranks)) {
  const auto units = static_cast<std::int64_t>(ranks_.size());
  ARDLORA_CHECK(in_features > 0 && out_features > 0, "unit_table: features must be positive, got ", in_features, " x ",
                out_features);
  ARDLORA_CHECK(in_features <= kMost && out_features <= kMost && units <= kMost, "unit_table: sizes must be at most ",
                kMost, ", got ", in_features, " x ", out_features, " and ", units, " units");
  ARDLORA_CHECK(units >= 1, "unit_table: ranks must name at least one unit, got none");
  ARDLORA_CHECK(kind != UnitKind::kMatrix || units == 1, "unit_table: a matrix must have one unit, got ", units);
  for (const std::int64_t rank : ranks_) {
    ARDLORA_CHECK(rank >= 0, "unit_table: ranks must be >= 0, got ", rank);
    ARDLORA_CHECK(rank <= kMost, "unit_table: ranks must be at most ", kMost, ", got ", rank);
  }
  const bool experts = kind == UnitKind::kExperts;
  const std::int64_t cut = kind == UnitKind::kInHeads ? in_features : out_features;
  ARDLORA_CHECK(experts || cut % units == 0, "unit_table: heads must divide the features they cut, got ", units,
                " heads for ", cut, " features");

  a_.features = in_features;
  b_.features = out_features;
  a_.width = kind == UnitKind::kInHeads ? in_features / units : in_features;
  b_.width = kind == UnitKind::kOutHeads ? out_features / units : out_features;
  const bool shared = factoring == Factoring::kShared && kind != UnitKind::kMatrix && !experts;
  gate_on_a_ = shared && kind == UnitKind::kInHeads;

  unit_begin_.assign(1, 0);
  for (const std::int64_t rank : ranks_) unit_begin_.push_back(unit_begin_.back() + rank);
  const std::int64_t largest = *std::max_element(ranks_.begin(), ranks_.end());
  hidden_ = shared || experts ? largest : unit_begin_.back();

  for (std::int64_t u = 0; u < units; ++u) {
    const std::int64_t begin = unit_begin_[u];
    const std::int64_t h_begin = shared || experts ? 0 : begin;
    if (!(shared && kind == UnitKind::kOutHeads)) {
      append(a_, {h_begin, ranks_[u], begin, kind == UnitKind::kInHeads ? u * a_.width : 0});
    }
    if (!(shared && kind == UnitKind::kInHeads)) {
      append(b_, {h_begin, ranks_[u], begin, kind == UnitKind::kOutHeads ? u * b_.width : 0});
    }
  }
  if (shared) append(kind == UnitKind::kOutHeads ? a_ : b_, {0, largest, 0, 0});
}

}  // namespace ardlora
