// outer  dW[R, columns] = scale * gate o (H^T X[:, columns])
//
// A block makes up to 64 ranks x 128 columns of one segment, from its share of the rows of X. The products are those of
// the transpose, X^T H, so that ranks are padded to 8 and not to 16. With one share the block writes dW; with more it
// writes partial sums for `sum_shares_kernel`.
#pragma once

#include "cuda/dropout.cuh"
#include "cuda/mma_tile.cuh"
#include "cuda/segment_table.h"

namespace ardlora::cuda {

struct OuterParams {
  const Word16* table;
  int factor;
  int width;  // columns of a segment
  Operand h;
  Activations x;
  const float* gate;  // of dW's rows, or null
  float scale;        // with dropout: times its keep_scale
  float* out;         // dW, or [shares, rows, out_stride]
  std::int64_t out_stride;
  std::int64_t share_stride;  // between shares
  bool partial;               // scale and gate are left to the second stage
  int steps;                  // steps of kOuterRows rows
  int column_tiles;           // grid.x = segments * column_tiles
  int rank_tile;              // 16, 32 or 64; grid.y counts them
  Dropout dropout;            // of x
};

template <typename T>
__global__ void __launch_bounds__(kOuterThreads) outer_kernel(const OuterParams p) {
  constexpr int kRows = outer_rows(sizeof(T)), kMaxRanks = 64;
  constexpr int kStageBytes = tile_bytes<T>(kRows, kOuterColumns);
  ARDLORA_SHARED(shared);
  const FactorIndex index = load_record<FactorIndex>(p.table + p.factor);
  const int segment_number = static_cast<int>(blockIdx.x) / p.column_tiles;
  if (segment_number >= index.segments) return;
  const DeviceSegment segment = load_record<DeviceSegment>(p.table + index.first_segment + segment_number);
  const int first_rank = static_cast<int>(blockIdx.y) * p.rank_tile;
  if (first_rank >= segment.rank) return;
  const int ranks = segment.rank - first_rank < p.rank_tile ? segment.rank - first_rank : p.rank_tile;
  const int log_ranks = p.rank_tile == 16 ? 4 : (p.rank_tile == 32 ? 5 : 6);
  const int tile_column = static_cast<int>(blockIdx.x) % p.column_tiles * kOuterColumns;  // in the segment
  const int x_column = segment.col_begin + tile_column;

  const int all = (p.x.rows + kRows - 1) / kRows, begin = static_cast<int>(blockIdx.z) * p.steps;
  const int end = begin + p.steps < all ? begin + p.steps : all;
  const auto x_tile = [&](int step) { return Tile<T>{shared + step % kOuterStages * kStageBytes, kRows}; };
  const auto h_tile = [&](int step) {
    return Tile<T>{shared + kOuterStages * kStageBytes + step % 2 * tile_bytes<T>(kRows, p.rank_tile), kRows};
  };

  float acc[2][kMaxRanks / 8][4] = {};
  Staged<T, kOuterThreads, kRows * kMaxRanks / kOuterThreads> staged;
  const auto copy_x = [&](int step) {
    if (step < end) {
      copy_async<T, kOuterThreads, kOuterColumns>(x_tile(step), p.x, step * kRows, x_column,
                                                  segment.col_begin + p.width);
    }
    cp_async_commit();
  };
  const auto fetch_h = [&](int step) {
    staged.fetch(p.h, step * kRows, segment.h_begin + first_rank, kRows, log_ranks, p.x.rows - step * kRows, ranks);
  };
  const auto store_h = [&](int step) { staged.store(h_tile(step), p.h, kRows, log_ranks, 0, nullptr); };

  for (int s = 0; s < kOuterStages - 1; ++s) copy_x(begin + s);
  if (begin < end) {
    fetch_h(begin);
    store_h(begin);
  }
  for (int step = begin; step < end; ++step) {
    cp_async_wait<kOuterStages - 2>();
    __syncthreads();
    copy_x(step + kOuterStages - 1);
    if (step + 1 < end) fetch_h(step + 1);
    const Tile<T> x = x_tile(step), h = h_tile(step);
    if (p.dropout.threshold > 0) {
      drop<T, kOuterThreads, kOuterColumns>(x, p.dropout, step * kRows, x_column, p.x.vector);
      __syncthreads();
    }
#pragma unroll 4
    for (int k = 0; k < kRows; k += Tile<T>::kStep) {
      std::uint32_t a[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) load_a_trans(a[i], x, k, warp_id() * 32 + i * 16);
#pragma unroll
      for (int j = 0; j < kMaxRanks / 16; ++j) {
        if (j * 16 >= ranks) break;
        std::uint32_t b[4];
        load_b_trans(b, h, k, j * 16);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          multiply_add<T>(acc[i][2 * j], a[i], b);
          multiply_add<T>(acc[i][2 * j + 1], a[i], b + 2);
        }
      }
    }
    if (step + 1 < end) store_h(step + 1);
  }
  cp_async_wait<0>();

  float* const out = p.out + blockIdx.z * p.share_stride;
#pragma unroll
  for (int j = 0; j < kMaxRanks / 8; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int r = j * 8 + lane_id() % 4 * 2 + e, w_row = segment.w_begin + first_rank + r;
      if (r >= ranks) continue;
      float scale = 1.0f;
      if (!p.partial) scale = p.gate == nullptr ? p.scale : p.scale * p.gate[w_row];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int n = tile_column + warp_id() * 32 + i * 8 + lane_id() / 4;
        if (n < p.width) out[w_row * p.out_stride + n] = scale * acc[i / 2][j][i % 2 * 2 + e];
      }
    }
  }
}

}  // namespace ardlora::cuda
