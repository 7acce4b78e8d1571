#include "cuda/segment_table.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>

#include "ardlora/check.h"

namespace ardlora::cuda {
namespace {

std::int32_t narrow(std::int64_t value) {
  ARDLORA_CHECK(value <= std::numeric_limits<std::int32_t>::max(),
                "segment_table: features and rows must be below 2^31, got ", value);
  return static_cast<std::int32_t>(value);
}

}  // namespace

std::vector<SegmentGroup> segment_groups(const Factor& factor) {
  std::vector<SegmentGroup> groups;
  for (std::size_t i = 0; i < factor.segments.size(); ++i) {
    const Segment& s = factor.segments[i];
    const std::int32_t h_begin = narrow(s.h_begin), rank = narrow(s.rank);
    if (groups.empty() || groups.back().h_begin != h_begin) {
      groups.push_back({narrow(static_cast<std::int64_t>(i)), 1, h_begin, rank});
    } else {
      ++groups.back().segments;
      groups.back().rank = std::max(groups.back().rank, rank);
    }
  }
  return groups;
}

std::vector<std::int64_t> segment_table(const UnitTable& table) {
  const std::size_t units = table.ranks().size();
  const bool experts = table.kind() == UnitKind::kExperts;
  std::vector<std::int32_t> words(16 * units);
  auto at = words.begin();
  for (const Factor* factor : {&table.a(), &table.b()}) {
    narrow(factor->features);
    narrow(factor->rows);
    auto group = at, segment = at + static_cast<std::ptrdiff_t>(4 * units);
    for (std::size_t e = 0; experts && e < units; ++e) {
      const std::int32_t rank = narrow(table.ranks()[e]);
      group = std::ranges::copy(std::array{narrow(static_cast<std::int64_t>(e)), 1, 0, rank}, group).out;
      segment = std::ranges::copy(std::array{0, rank, narrow(table.unit_begin()[e]), 0}, segment).out;
    }
    for (const SegmentGroup& g : experts ? std::vector<SegmentGroup>{} : segment_groups(*factor)) {
      group = std::ranges::copy(std::array{g.first_segment, g.segments, g.h_begin, g.rank}, group).out;
    }
    for (const Segment& s : experts ? std::vector<Segment>{} : factor->segments) {
      const std::array record{narrow(s.h_begin), narrow(s.rank), narrow(s.w_begin), narrow(s.col_begin)};
      segment = std::ranges::copy(record, segment).out;
    }
    at += static_cast<std::ptrdiff_t>(8 * units);
  }
  std::vector<std::int64_t> out(words.size() / 2);
  std::memcpy(out.data(), words.data(), words.size() * sizeof(std::int32_t));
  return out;
}

}  // namespace ardlora::cuda
