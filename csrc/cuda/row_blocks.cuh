// Rows sorted by expert (ardlora/lora_grouped.h), cut into blocks of one expert each: a small kernel reads the offsets
// and writes tables of (expert, rows), and the blocks of a launch look up theirs. The grid covers the worst case, so
// that nothing waits for the offsets; what is left of a table names no expert.
#pragma once

#include "cuda/segment_table.h"
#include "cuda/tile_io.cuh"

namespace ardlora::cuda {

inline constexpr int kRowBlockThreads = 32;
inline constexpr int kRowBlockTables = 3;  // for tiles of rows, and for the shares of each factor's `outer`

struct alignas(16) RowBlock {
  std::int32_t segment;  // -1: none
  std::int32_t begin, end;
  std::int32_t share;  // of `outer`: where its partial sums go; -1 where the expert has no other
};

struct RowBlockTable {
  int length;        // most rows of a block
  RowBlock* blocks;  // [room]
  int room;
  // Of `outer`, else null: blocks of experts without rows too, and for experts with several the range of their shares.
  RowBlock* sums;  // [sum_room]
  int sum_room;
};

struct RowBlocksParams {
  const std::int64_t* offsets;    // [experts + 1]
  const DeviceSegment* segments;  // [experts]
  int experts;
  int rows;
  RowBlockTable table[kRowBlockTables];  // one for each block of the launch
};

// What the lanes before this one have, all together; `total` grows by what all have.
ARDLORA_DEVICE int add_before(int mine, int& total) {
  int sum = mine;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_sync(kFullWarp, sum, lane_id() - distance);
    if (lane_id() >= distance) sum += other;
  }
  const int before = total + sum - mine;
  total += __shfl_sync(kFullWarp, sum, 31);
  return before;
}

// The largest of this lane's, those before it and `last`, which becomes the largest of all.
ARDLORA_DEVICE int largest_so_far(int mine, int& last) {
  int most = mine;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_sync(kFullWarp, most, lane_id() - distance);
    if (lane_id() >= distance && other > most) most = other;
  }
  if (last > most) most = last;
  last = __shfl_sync(kFullWarp, most, 31);
  return most;
}

// Offsets that do not ascend or leave the rows cannot be refused here: rows stay with the first expert that has them.
__global__ void __launch_bounds__(kRowBlockThreads) row_blocks_kernel(const RowBlocksParams p) {
  begin_kernel();
  const RowBlockTable t = p.table[blockIdx.x];
  const bool outer = t.sums != nullptr;
  const auto offset = [&](int e) {
    const std::int64_t at = p.offsets[e < p.experts ? e : p.experts];
    return at < 0 ? 0 : (at > p.rows ? p.rows : static_cast<int>(at));
  };
  int blocks = 0, shares = 0, sums = 0, reached = offset(0);
#pragma unroll 1
  for (int first = 0; first < p.experts; first += 32) {
    const int e = first + lane_id();
    int before = reached;
    const int end = largest_so_far(offset(e + 1), reached);
    const int begin = __shfl_sync(kFullWarp, end, lane_id() - 1);
    if (lane_id() > 0) before = begin;
    int count = 0;
    if (e < p.experts && p.segments[e].rank > 0) {
      count = (end - before + t.length - 1) / t.length;
      if (outer && count == 0) count = 1;
    }
    const bool divided = outer && count > 1;
    const int block = add_before(count, blocks), share = add_before(divided ? count : 0, shares);
    const int sum = add_before(divided ? 1 : 0, sums);
    if (divided && sum < t.sum_room) t.sums[sum] = {e, share, share + count, 0};
    for (int i = 0; i < count && block + i < t.room; ++i) {
      const int from = before + i * t.length;
      t.blocks[block + i] = {e, from, from + t.length < end ? from + t.length : end, divided ? share + i : -1};
    }
  }
  for (int i = blocks + lane_id(); i < t.room; i += 32) t.blocks[i] = {-1, 0, 0, -1};
  for (int i = sums + lane_id(); i < t.sum_room; i += 32) t.sums[i] = {-1, 0, 0, 0};
}

// The rows of one block of a launch: its record of the table, or without one its part of all rows.
ARDLORA_DEVICE RowBlock row_block(const RowBlock* table, int index, int length, int rows) {
  if (table != nullptr) return load_record(table + index);
  const int begin = index * length;
  return {0, begin, rows - begin < length ? rows : begin + length, index};
}

}  // namespace ardlora::cuda
