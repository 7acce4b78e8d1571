#include "cuda/segment_table.h"

#include <algorithm>
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
  std::vector<std::int32_t> words(8);
  const auto put = [&words](std::int32_t a, std::int32_t b, std::int32_t c, std::int32_t d) {
    words.insert(words.end(), {a, b, c, d});
  };
  const Factor* factors[2] = {&table.a(), &table.b()};
  for (int f = 0; f < 2; ++f) {
    const Factor& factor = *factors[f];
    narrow(factor.features);
    narrow(factor.rows);
    FactorIndex index{};
    index.first_segment = static_cast<std::int32_t>(words.size() / 4);
    for (const Segment& s : factor.segments) {
      put(narrow(s.h_begin), narrow(s.rank), narrow(s.w_begin), narrow(s.col_begin));
    }
    index.segments = narrow(static_cast<std::int64_t>(factor.segments.size()));
    index.first_group = index.first_segment + index.segments;
    for (const SegmentGroup& g : segment_groups(factor)) {
      put(index.first_segment + g.first_segment, g.segments, g.h_begin, g.rank);
      ++index.groups;
    }
    std::memcpy(words.data() + 4 * f, &index, sizeof index);
  }
  std::vector<std::int64_t> out(words.size() / 2);
  std::memcpy(out.data(), words.data(), words.size() * sizeof(std::int32_t));
  return out;
}

}  // namespace ardlora::cuda
