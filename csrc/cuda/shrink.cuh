// shrink  H[M, R] = scale * sum over the group's segments of X[:, columns] (gate o W)^T
//
// A block makes 128 rows x up to 64 columns of H of one group of segments, and one share of the summed dimension. X
// goes to shared memory by cp.async, three stages deep; W, mostly in L2, comes through registers one step ahead, where
// it is multiplied with its gates and rounded to X's type. With one share the block writes H; with more it writes
// partial sums, which `sum_shares_kernel` (sum_shares.cuh) adds in order.
#pragma once

#include "cuda/dropout.cuh"
#include "cuda/mma_tile.cuh"
#include "cuda/segment_table.h"

namespace ardlora::cuda {

struct ShrinkParams {
  FactorTable table;
  int width;  // columns of a segment
  Activations x;
  Operand w;
  const float* gate;  // of W's rows, or null
  float scale;        // with dropout: times its keep_scale
  float* h;
  std::int64_t h_stride;
  float* partial;  // [shares, M, partial_stride], or null for one share
  std::int64_t partial_stride;
  int steps;       // of a share, kPanel columns each
  int rank_tiles;  // grid.y = groups * rank_tiles
  int rank_tile;   // 16, 32 or 64
  Dropout dropout;
};

// Walks the steps of a group: segment after segment, `kPanel` columns at a time.
struct StepWalk {
  const DeviceSegment* next_segment;
  DeviceSegment segment;
  int column;  // in the segment

  ARDLORA_DEVICE StepWalk(const DeviceSegment* segments, int step, int steps_per_segment, int columns)
      : next_segment(segments + step / steps_per_segment + 1),
        segment(load_record(next_segment - 1)),
        column(step % steps_per_segment * columns) {}

  ARDLORA_DEVICE void advance(int columns, int width, bool more) {
    column += columns;
    if (column < width || !more) return;
    column = 0;
    segment = load_record(next_segment++);
  }
};

template <typename T>
__global__ void __launch_bounds__(kShrinkThreads, 3) shrink_kernel(const ShrinkParams p) {
  constexpr int kColumns = Tile<T>::kPanel, kLogColumns = sizeof(T) == 2 ? 6 : 5;
  constexpr int kPairs = kRankTile / 16;
  ARDLORA_SHARED(shared);
  const SegmentGroup group = load_record(p.table.groups + blockIdx.y / static_cast<unsigned>(p.rank_tiles));
  const int first_rank = static_cast<int>(blockIdx.y) % p.rank_tiles * p.rank_tile;
  if (first_rank >= group.rank) return;
  const DeviceSegment* const segments = p.table.segments + group.first_segment;
  const int ranks = group.rank - first_rank < p.rank_tile ? group.rank - first_rank : p.rank_tile;
  const int row = static_cast<int>(blockIdx.x) * kShrinkRows;

  const int per_segment = (p.width + kColumns - 1) / kColumns;
  const int begin = static_cast<int>(blockIdx.z) * p.steps;
  const int all = group.segments * per_segment, end = begin + p.steps < all ? begin + p.steps : all;
  const int tile_rows = (ranks + 15) & ~15;

  const auto x_tile = [&](int step) {
    return Tile<T>{shared + step % kShrinkStages * (kShrinkRows * kPanelBytes), kShrinkRows};
  };
  const auto w_tile = [&](int step) {
    return Tile<T>{shared + (kShrinkStages * kShrinkRows + step % 2 * p.rank_tile) * kPanelBytes, p.rank_tile};
  };

  float acc[2][2 * kPairs][4] = {};
  if (begin < end) {
    StepWalk x_walk(segments, begin, per_segment, kColumns), w_walk = x_walk;
    Staged<T, kShrinkThreads, kRankTile * kColumns / kShrinkThreads> staged;
    TileDropout<T, kShrinkThreads, kShrinkRows, kColumns> dropout;

    const auto copy_x = [&](int step) {
      if (step < end) {
        const int from = x_walk.segment.col_begin;
        copy_async<T, kShrinkThreads, kShrinkRows, kColumns>(x_tile(step), p.x, row, from + x_walk.column,
                                                             from + p.width);
        x_walk.advance(kColumns, p.width, step + 1 < all);
      }
      cp_async_commit();
    };
    const auto valid_ranks = [&] { return w_walk.segment.rank - first_rank; };
    const auto gate = [&] { return p.gate == nullptr ? nullptr : p.gate + w_walk.segment.w_begin + first_rank; };
    const auto fetch_w = [&] {
      staged.fetch(p.w, w_walk.segment.w_begin + first_rank, w_walk.column, 0, tile_rows, kLogColumns, valid_ranks(),
                   p.width - w_walk.column, gate());
    };
    const auto store_w = [&](int step) {
      staged.store(w_tile(step), p.w, 0, tile_rows, kLogColumns, valid_ranks(), gate());
      w_walk.advance(kColumns, p.width, step + 1 < all);
    };

    for (int s = 0; s < kShrinkStages - 1; ++s) copy_x(begin + s);
    fetch_w();
    store_w(begin);
#pragma unroll 1
    for (int step = begin; step < end; ++step) {
      cp_async_wait<kShrinkStages - 2>();
      __syncthreads();
      copy_x(step + kShrinkStages - 1);
      if (step + 1 < end) fetch_w();
      const Tile<T> tile = x_tile(step);
      if (p.dropout.threshold > 0) {
        const StepWalk walk(segments, step, per_segment, kColumns);
        dropout.apply(tile, p.dropout, row, walk.segment.col_begin + walk.column, p.x.vector);
        __syncthreads();
      }
      const Fragments<T> x = rows_first(tile), w = chunks_first(w_tile(step));
#pragma unroll
      for (int k = 0; k < kColumns; k += Tile<T>::kStep) {
        std::uint32_t a[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) x.load_a(a[i], warp_id() * 32 + i * 16, k);
#pragma unroll
        for (int j = 0; j < kPairs; ++j) {
          if (j * 16 >= ranks) break;
          std::uint32_t b[4];
          w.load_b(b, j * 16, k);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            multiply_add<T>(acc[i][2 * j], a[i], b);
            multiply_add<T>(acc[i][2 * j + 1], a[i], b + 2);
          }
        }
      }
      if (step + 1 < end) store_w(step + 1);
    }
    cp_async_wait<0>();
  }

  const bool whole = p.partial == nullptr;
  float* const out = whole ? p.h : p.partial + blockIdx.z * p.x.rows * p.partial_stride;
  const std::int64_t stride = whole ? p.h_stride : p.partial_stride;
  const float scale = whole ? p.scale : 1.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int m = row + warp_id() * 32 + i * 8 + lane_id() / 4;
    if (m >= p.x.rows) continue;
#pragma unroll
    for (int j = 0; j < 2 * kPairs; ++j) {
      const int r = j * 8 + lane_id() % 4 * 2;
      const float* v = acc[i / 2][j] + i % 2 * 2;
      store_pair(out + m * stride + group.h_begin + first_rank + r, scale * v[0], scale * v[1], ranks - r);
    }
  }
}

}  // namespace ardlora::cuda
