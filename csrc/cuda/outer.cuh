// outer  dW[R, columns] = scale * gate o (H^T X[:, columns])
//
// A block makes up to 64 ranks x 128 columns of one segment, from its share of the rows of X. The products are those of
// the transpose, X^T H, so that ranks are padded to 8 and not to 16. With one share the block writes dW; with more it
// writes partial sums for `sum_shares_kernel`.
//
// With few ranks the same block also makes its columns' part of  dH = scale * X (gate o W)^T  from the tile that lies
// in shared memory: the one pass over dy of the backward. The parts of a row are added up by `sum_shares_kernel`.
#pragma once

#include "cuda/dropout.cuh"
#include "cuda/mma_tile.cuh"
#include "cuda/segment_table.h"

namespace ardlora::cuda {

struct OuterParams {
  FactorTable table;
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

struct OuterShrinkParams {
  OuterParams outer;
  Operand w;
  const float* gate;  // of W's rows, or null
  float scale;
  float* dh;  // dH, or [column tiles, M, stride]
  std::int64_t stride;
  std::int64_t tile_stride;  // between column tiles
};

// Rows [row, row + kRows) of dH from the columns of one tile; w [kOnePassRanks, kOuterColumns], a warp makes 16 rows.
template <typename T>
ARDLORA_DEVICE void shrink_tile(const OuterShrinkParams& p, const Tile<T>& x, const Tile<T>& w, int row, int h_begin,
                                int ranks) {
  static_assert(kOuterThreads / 32 * 16 == outer_rows(sizeof(T)) && kOnePassRanks == 16);
  const Fragments<T> rows = rows_first(x), factors = chunks_first(w);
  float acc[2][4] = {};
#pragma unroll
  for (int k = 0; k < kOuterColumns; k += Tile<T>::kStep) {
    std::uint32_t a[4], b[4];
    rows.load_a(a, warp_id() * 16, k);
    factors.load_b(b, 0, k);
    multiply_add<T>(acc[0], a, b);
    multiply_add<T>(acc[1], a, b + 2);
  }
  const int tile = static_cast<int>(blockIdx.x) % p.outer.column_tiles;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int m = row + warp_id() * 16 + i * 8 + lane_id() / 4;
    if (m >= p.outer.x.rows) continue;
    float* const to = p.dh + tile * p.tile_stride + m * p.stride + h_begin;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int r = j * 8 + lane_id() % 4 * 2;
      store_pair(to + r, p.scale * acc[j][2 * i], p.scale * acc[j][2 * i + 1], ranks - r);
    }
  }
}

// `with`: an OuterShrinkParams with few ranks, or a null pointer.
template <typename T, int kMaxRanks, typename With>
ARDLORA_DEVICE void outer_block(const OuterParams& p, With with) {
  constexpr bool kShrinks = !std::is_same_v<With, std::nullptr_t>;
  constexpr int kRows = outer_rows(sizeof(T));
  constexpr int kStageBytes = tile_bytes<T>(kRows, kOuterColumns);
  ARDLORA_SHARED(shared);
  const DeviceSegment segment = load_record(p.table.segments + blockIdx.x / static_cast<unsigned>(p.column_tiles));
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
  Staged<T, kOuterThreads, kRows * kMaxRanks / kOuterThreads, Staging::kCut> staged;
  const auto copy_x = [&](int step) {
    if (step < end) {
      copy_async<T, kOuterThreads, kRows, kOuterColumns>(x_tile(step), p.x, step * kRows, x_column,
                                                         segment.col_begin + p.width);
    }
    cp_async_commit();
  };
  const auto fetch_h = [&](int step) {
    staged.fetch(p.h, step * kRows, segment.h_begin + first_rank, 0, kRows, log_ranks, p.x.rows - step * kRows, ranks,
                 nullptr);
  };
  const auto store_h = [&](int step) { staged.store(h_tile(step), p.h, 0, kRows, log_ranks, 0, nullptr); };

  for (int s = 0; s < kOuterStages - 1; ++s) copy_x(begin + s);
  const Tile<T> w{h_tile(0).data + 2 * tile_bytes<T>(kRows, p.rank_tile), kOnePassRanks};
  if constexpr (kShrinks) {
    const float* const gate = with->gate == nullptr ? nullptr : with->gate + segment.w_begin;
#pragma unroll
    for (int c = 0; c < kOuterColumns; c += Tile<T>::kPanel) {
      const Tile<T> panel{w.data + tile_bytes<T>(kOnePassRanks, c), kOnePassRanks};
      stage<T, kOuterThreads>(panel, with->w, segment.w_begin, tile_column + c, kOnePassRanks, 6, ranks,
                              p.width - tile_column - c, gate);
    }
  }
  if (begin < end) {
    fetch_h(begin);
    store_h(begin);
  }
#pragma unroll 1
  for (int step = begin; step < end; ++step) {
    cp_async_wait<kOuterStages - 2>();
    __syncthreads();
    copy_x(step + kOuterStages - 1);
    if (step + 1 < end) fetch_h(step + 1);
    const Tile<T> tile = x_tile(step);
    if (!kShrinks && p.dropout.threshold > 0) {
      TileDropout<T, kOuterThreads, kRows, kOuterColumns> dropout;
      dropout.apply(tile, p.dropout, step * kRows, x_column, p.x.vector);
      __syncthreads();
    }
    const Fragments<T> x = chunks_first(tile), h = rows_first(h_tile(step));
#pragma unroll
    for (int k = 0; k < kRows; k += Tile<T>::kStep) {
      std::uint32_t a[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) x.load_a_trans(a[i], k, warp_id() * 32 + i * 16);
#pragma unroll
      for (int j = 0; j < kMaxRanks / 16; ++j) {
        if (j * 16 >= ranks) break;
        std::uint32_t b[4];
        h.load_b_trans(b, k, j * 16);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          multiply_add<T>(acc[i][2 * j], a[i], b);
          multiply_add<T>(acc[i][2 * j + 1], a[i], b + 2);
        }
      }
    }
    if constexpr (kShrinks) shrink_tile(*with, tile, w, step * kRows, segment.h_begin, ranks);
    if (step + 1 < end) store_h(step + 1);
  }
  cp_async_wait<0>();

  const int first_row = segment.w_begin + first_rank + lane_id() % 4 * 2;  // of the lane, in dW
  const int n = tile_column + warp_id() * 32 + lane_id() / 4;
  float* to = p.out + blockIdx.z * p.share_stride + first_row * p.out_stride + n;
#pragma unroll
  for (int j = 0; j < kMaxRanks / 8; ++j, to += 8 * p.out_stride) {
    if (j * 8 >= ranks) break;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (j * 8 + lane_id() % 4 * 2 + e >= ranks) continue;
      float scale = 1.0f;
      if (!p.partial) scale = p.gate == nullptr ? p.scale : p.scale * p.gate[first_row + j * 8 + e];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (n + i * 8 < p.width) to[e * p.out_stride + i * 8] = scale * acc[i / 2][j][i % 2 * 2 + e];
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kOuterThreads) outer_kernel(const OuterParams p) {
  outer_block<T, kRankTile>(p, nullptr);
}

template <typename T>
__global__ void __launch_bounds__(kOuterThreads) outer_shrink_kernel(const OuterShrinkParams p) {
  outer_block<T, kOnePassRanks>(p.outer, &p);
}

}  // namespace ardlora::cuda
