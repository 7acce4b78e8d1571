// What the GEMM kernels read of a UnitTable: its two factors' segments, in one run of 16-byte words that the caller
// copies to the device, at an address divisible by 16. Kernels take counts and ranks from here, never from the host.
#pragma once

#include <cstdint>
#include <vector>

#include "ardlora/unit_table.h"

namespace ardlora::cuda {

// First two words: where the segments and groups of A and of B lie, in words.
struct FactorIndex {
  std::int32_t first_segment;
  std::int32_t segments;
  std::int32_t first_group;
  std::int32_t groups;
};

// As ardlora::Segment.
struct DeviceSegment {
  std::int32_t h_begin;
  std::int32_t rank;
  std::int32_t w_begin;
  std::int32_t col_begin;
};

// Neighbouring segments whose shrink adds up in the same columns of H; `rank` is the largest.
struct SegmentGroup {
  std::int32_t first_segment;  // in words, as in FactorIndex
  std::int32_t segments;
  std::int32_t h_begin;
  std::int32_t rank;
};

inline constexpr int kFactorA = 0;
inline constexpr int kFactorB = 1;

std::vector<std::int64_t> segment_table(const UnitTable& table);

// Groups of one factor, `first_segment` counted from the factor's first.
std::vector<SegmentGroup> segment_groups(const Factor& factor);

}  // namespace ardlora::cuda
