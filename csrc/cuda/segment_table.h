// What the GEMM kernels read of a UnitTable: its two factors' segments, in one run of 16-byte words that the caller
// copies to the device, at an address divisible by 16. Kernels take ranks from here, never from the host. Where a
// record lies depends on the number of units alone; records that these ranks do not need are zero. Of experts each has
// its own, a group of one segment.
#pragma once

#include <cstdint>
#include <vector>

#include "ardlora/unit_table.h"

namespace ardlora::cuda {

// As ardlora::Segment.
struct alignas(16) DeviceSegment {
  std::int32_t h_begin;
  std::int32_t rank;
  std::int32_t w_begin;
  std::int32_t col_begin;
};

// Neighbouring segments whose shrink adds up in the same columns of H; `rank` is the largest.
struct alignas(16) SegmentGroup {
  std::int32_t first_segment;
  std::int32_t segments;
  std::int32_t h_begin;
  std::int32_t rank;
};

inline constexpr int kFactorA = 0;
inline constexpr int kFactorB = 1;

// One factor's part of the table, room for as many groups and segments as there are units.
struct FactorTable {
  const SegmentGroup* groups;
  const DeviceSegment* segments;
};

inline FactorTable factor_table(const void* words, const UnitTable& table, int factor) {
  const std::size_t units = table.ranks().size();
  const auto* const groups = static_cast<const SegmentGroup*>(words) + 2 * units * static_cast<std::size_t>(factor);
  return {groups, reinterpret_cast<const DeviceSegment*>(groups + units)};
}

std::vector<std::int64_t> segment_table(const UnitTable& table);

std::vector<SegmentGroup> segment_groups(const Factor& factor);

}  // namespace ardlora::cuda
