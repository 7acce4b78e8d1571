// shrink  H[M, R] = scale * sum over the group's segments of X[:, columns] (gate o W)^T
//
// A block makes 128 rows x up to 64 columns of H, or 128 where it is wide, of one group of segments, and one share of
// the summed dimension. X goes to shared memory by cp.async, one step ahead; W, mostly in L2, comes through registers,
// where it is multiplied with its gates and rounded to X's type. With one share the block writes H, in X's type as the
// tensor cores will want it; with more it writes partial sums in float, which `sum_shares_kernel` (sum_shares.cuh) adds
// in order.
#pragma once

#include "cuda/dropout.cuh"
#include "cuda/row_blocks.cuh"
#include "cuda/segment_table.h"
#include "cuda/tile_io.cuh"

namespace ardlora::cuda {

struct ShrinkParams {
  FactorTable table;
  const RowBlock* blocks;  // of rows sorted by expert, grid.x of them; else null
  int width;               // columns of a segment
  Activations x;
  Operand w;
  const float* gate;  // of W's rows, or null
  float scale;        // with dropout: times its keep_scale
  void* h;
  std::int64_t h_stride;
  int hidden;      // columns of H in use
  float* partial;  // [shares, M, partial_stride], or null for one share
  std::int64_t partial_stride;
  int share;       // steps of a share, kPanel columns each
  int rank_tiles;  // grid.y = groups * rank_tiles
  int rank_tile;   // 16, 32 or 64; of a wide block 128
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

// A warp makes 32 rows x up to 64 ranks. `kWide`: two warps beside each other, and W is a prepared factor.
template <typename T, bool kWide>
ARDLORA_DEVICE void shrink_block(const ShrinkParams& p) {
  constexpr int kColumns = Tile<T>::kPanel, kLogColumns = sizeof(T) == 2 ? 6 : 5;
  constexpr int kPairs = kRankTile / 16;
  constexpr int kThreads = kWide ? kWideThreads : kShrinkThreads;
  ARDLORA_SHARED(seed);
  unsigned char* const shared = seed + kSeedBytes;
  const RowBlock rows = row_block(p.blocks, static_cast<int>(blockIdx.x), kShrinkRows, p.x.rows);
  if (rows.segment < 0) return;
  const SegmentGroup group =
      load_record(p.table.groups + rows.segment + blockIdx.y / static_cast<unsigned>(p.rank_tiles));
  const int first_rank = static_cast<int>(blockIdx.y) % p.rank_tiles * p.rank_tile;
  if (first_rank >= group.rank) return;
  const DeviceSegment* const segments = p.table.segments + group.first_segment;
  const int ranks = group.rank - first_rank < p.rank_tile ? group.rank - first_rank : p.rank_tile;
  const int row = rows.begin;
  Activations x_rows = p.x;
  x_rows.rows = rows.end;

  const int per_segment = (p.width + kColumns - 1) / kColumns;
  const int begin = static_cast<int>(blockIdx.z) * p.share;
  const int all = group.segments * per_segment, end = begin + p.share < all ? begin + p.share : all;
  const int tile_rows = (ranks + 15) & ~15;

  const auto x_tile = [&](int step) {
    return Tile<T>{shared + step % kShrinkStages * (kShrinkRows * kPanelBytes), kShrinkRows};
  };
  const auto w_tile = [&](int step) {
    const int tile = kWide ? kWideRanks : p.rank_tile;
    return Tile<T>{shared + (kShrinkStages * kShrinkRows + step % 2 * tile) * kPanelBytes, tile};
  };
  const int warp_row = (kWide ? warp_id() % 4 : warp_id()) * 32, warp_rank = kWide ? warp_id() / 4 * kRankTile : 0;

  const BlockDropout drops = block_dropout(p.dropout, seed);
  float acc[2][2 * kPairs][4] = {};
  if (begin < end) {
    StepWalk x_walk(segments, begin, per_segment, kColumns), w_walk = x_walk;
    [[maybe_unused]] Staged<T, kShrinkThreads, kRankTile * kColumns / kShrinkThreads> staged;
    TileDropout<T, kThreads, kShrinkRows, kColumns> dropout;

    const auto valid_ranks = [&](const StepWalk& walk) { return ValidRows{0, walk.segment.rank - first_rank}; };
    const auto copy_x = [&](int step) {
      if (step < end) {
        const int from = x_walk.segment.col_begin;
        copy_async<T, kThreads, kShrinkRows>(x_tile(step), x_rows, row, from + x_walk.column, kLogColumns,
                                             from + p.width);
        if constexpr (kWide) {
          const int w_row = x_walk.segment.w_begin + first_rank;
          copy_factor<T, kThreads, kWideRanks, kColumns>(w_tile(step), p.w, w_row, x_walk.column, valid_ranks(x_walk));
        }
        x_walk.advance(kColumns, p.width, step + 1 < all);
      }
      cp_async_commit();
    };
    const auto gate = [&] { return p.gate == nullptr ? nullptr : p.gate + w_walk.segment.w_begin + first_rank; };
    const auto fetch_w = [&] {
      staged.fetch(p.w, w_walk.segment.w_begin + first_rank, w_walk.column, tile_rows, kLogColumns, valid_ranks(w_walk),
                   p.width - w_walk.column, gate());
    };
    const auto store_w = [&](int step) {
      staged.store(w_tile(step), p.w, tile_rows, kLogColumns, valid_ranks(w_walk), gate());
      w_walk.advance(kColumns, p.width, step + 1 < all);
    };

    // Always W first: it would wait behind the X of a later step.
    if constexpr (!kWide) fetch_w();
    for (int s = 0; s < kShrinkStages - 1; ++s) copy_x(begin + s);
    if constexpr (!kWide) store_w(begin);
#pragma unroll 1
    for (int step = begin; step < end; ++step) {
      cp_async_wait<kShrinkStages - 2>();
      __syncthreads();
      if constexpr (!kWide) {
        if (step + 1 < end) fetch_w();
      }
      copy_x(step + kShrinkStages - 1);
      const Tile<T> tile = x_tile(step);
      if (p.dropout.threshold > 0) {
        const StepWalk walk(segments, step, per_segment, kColumns);
        dropout.apply(tile, drops, row, walk.segment.col_begin + walk.column, p.x.vector);
        __syncthreads();
      }
      const Fragments<T> x = rows_first(tile), w = chunks_first(w_tile(step));
#pragma unroll
      for (int k = 0; k < kColumns; k += Tile<T>::kStep) {
        std::uint32_t a[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) x.load_a(a[i], warp_row + i * 16, k);
#pragma unroll
        for (int j = 0; j < kPairs; ++j) {
          if (warp_rank + j * 16 >= ranks) break;
          std::uint32_t b[4];
          w.load_b(b, warp_rank + j * 16, k);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            multiply_add<T>(acc[i][2 * j], a[i], b);
            multiply_add<T>(acc[i][2 * j + 1], a[i], b + 2);
          }
        }
      }
      if constexpr (!kWide) {
        if (step + 1 < end) store_w(step + 1);
      }
    }
    cp_async_wait<0>();
  }

  // A warp alone, or two where they are wide, has read its rows of X; H takes their place on its way out.
  const bool whole = p.partial == nullptr;
  const Tile<T> h_tile{shared, kShrinkRows};
  const int column = group.h_begin + first_rank;
  float* const partial = p.partial + blockIdx.z * p.x.rows * p.partial_stride + column;
  // The last group also writes what rounds it up to the stride: the second stage takes four columns at a time.
  const int stored = column + ranks == p.hidden ? static_cast<int>(p.partial_stride) - column : ranks;
  if constexpr (kWide) {
    __syncthreads();
  } else {
    __syncwarp();
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int r = warp_row + i * 8 + lane_id() / 4;
    if (!whole && row + r >= rows.end) continue;
#pragma unroll
    for (int j = 0; j < 2 * kPairs; ++j) {
      if (warp_rank + j * 8 >= ranks) break;
      const int c = warp_rank + j * 8 + lane_id() % 4 * 2;
      const float* v = acc[i / 2][j] + i % 2 * 2;
      if (whole) {
        put_pair(h_tile.at(r, c), p.scale * v[0], p.scale * v[1]);
      } else {
        store_pair(partial + (row + r) * p.partial_stride + c, v[0], v[1], stored - c);
      }
    }
  }
  if (!whole) return;
  __syncwarp();
  const int log_ranks = kWide ? 6 : log_rank_tile(p.rank_tile), left = rows.end - row - warp_row;
  const int own = kWide && ranks - warp_rank > kRankTile ? kRankTile : ranks - warp_rank;
  T* const h = static_cast<T*>(p.h) + (row + warp_row) * p.h_stride + column + warp_rank;
  store_rows(h, p.h_stride, left < 32 ? left : 32, log_ranks, own,
             [&](int r, int c) { return h_tile.at(warp_row + r, warp_rank + c); });
}

template <typename T>
__global__ void __launch_bounds__(kShrinkThreads, 3) shrink_kernel(const ShrinkParams p) {
  begin_kernel();
  shrink_block<T, false>(p);
}

template <typename T>
__global__ void __launch_bounds__(kWideThreads, 2) wide_shrink_kernel(const ShrinkParams p) {
  begin_kernel();
  shrink_block<T, true>(p);
}

}  // namespace ardlora::cuda
