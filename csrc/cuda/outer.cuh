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
#include "cuda/row_blocks.cuh"
#include "cuda/segment_table.h"
#include "cuda/tile_io.cuh"

namespace ardlora::cuda {

struct OuterParams {
  FactorTable table;
  const RowBlock* blocks;  // shares of rows sorted by expert, grid.z of them; else null
  int width;               // columns of a segment
  Activations h;           // in the type of x
  Activations x;
  const float* gate;  // of dW's rows, or null
  float scale;        // with dropout: times its keep_scale
  float* out;         // dW
  std::int64_t out_stride;
  float* partial;  // sums of shares, to which the second stage brings scale and gate: [shares, rows of dW, .] or, where
                   // rows are sorted, [shares, ranks, .]; or null
  std::int64_t partial_stride;
  std::int64_t share_stride;  // between shares
  int share;                  // rows of a share
  int column_tiles;           // grid.x = segments * column_tiles
  int rank_tile;              // 16, 32 or 64; grid.y counts them
  Dropout dropout;            // of x
};

struct OuterShrinkParams {
  OuterParams outer;
  Operand w;
  const float* gate;  // of W's rows, or null
  float scale;
  void* dh;
  std::int64_t dh_stride;
  float* partial;  // [column tiles, M, partial_stride], or null for one tile
  std::int64_t partial_stride;
};

// A warp's rows of dH on their way out.
template <typename T>
struct HiddenRows {
  static constexpr int kStride = kOnePassRanks + Tile<T>::kChunk;  // rows of a pair's lanes lie on different banks
  T* data;

  ARDLORA_DEVICE T* at(int row, int column) const { return data + row * kStride + column; }
};

// Rows [row, row + kRows) before `end` of dH from the columns of one tile; w [kOnePassRanks, kOuterColumns], a warp
// makes 16 rows.
template <typename T>
ARDLORA_DEVICE void shrink_tile(const OuterShrinkParams& p, const Tile<T>& x, const Tile<T>& w,
                                const HiddenRows<T>& out, int row, int end, int h_begin, int ranks) {
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
  const bool whole = p.partial == nullptr;
  const int first = row + warp_id() * 16, left = end - first;
  const int tile = static_cast<int>(blockIdx.x) % p.outer.column_tiles;
  float* const partial =
      p.partial + (static_cast<std::int64_t>(tile) * p.outer.x.rows + first) * p.partial_stride + h_begin;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int r = i * 8 + lane_id() / 4;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int c = j * 8 + lane_id() % 4 * 2;
      const float* v = acc[j] + 2 * i;
      if (whole) {
        put_pair(out.at(r, c), p.scale * v[0], p.scale * v[1]);
      } else if (r < left) {
        store_pair(partial + r * p.partial_stride + c, v[0], v[1], ranks - c);
      }
    }
  }
  if (!whole) return;
  __syncwarp();
  store_rows(static_cast<T*>(p.dh) + first * p.dh_stride + h_begin, p.dh_stride, left < 16 ? left : 16, 4, ranks,
             [&](int r, int c) { return out.at(r, c); });
  __syncwarp();
}

// `with`: an OuterShrinkParams with few ranks, or a null pointer.
template <typename T, int kMaxRanks, typename With>
ARDLORA_DEVICE void outer_block(const OuterParams& p, With with) {
  constexpr bool kShrinks = !std::is_same_v<With, std::nullptr_t>;
  constexpr int kRows = outer_rows(sizeof(T)), kLogColumns = 7;
  static_assert(1 << kLogColumns == kOuterColumns);
  constexpr int kXBytes = tile_bytes<T>(kRows, kOuterColumns);
  ARDLORA_SHARED(seed);
  unsigned char* const shared = seed + kSeedBytes;
  const RowBlock rows = row_block(p.blocks, static_cast<int>(blockIdx.z), p.share, p.x.rows);
  if (rows.segment < 0) return;
  const DeviceSegment segment =
      load_record(p.table.segments + rows.segment + blockIdx.x / static_cast<unsigned>(p.column_tiles));
  // A tile's columns of H begin at a chunk, maybe with some of the unit before: their sums are not written.
  const int h_column = segment.h_begin / Tile<T>::kChunk * Tile<T>::kChunk + static_cast<int>(blockIdx.y) * p.rank_tile;
  const int first_rank = h_column - segment.h_begin;
  if (first_rank >= segment.rank) return;
  const int ranks = segment.rank - first_rank < p.rank_tile ? segment.rank - first_rank : p.rank_tile;
  const int log_ranks = log_rank_tile(p.rank_tile);
  const int tile_column = static_cast<int>(blockIdx.x) % p.column_tiles * kOuterColumns;  // in the segment
  const int x_column = segment.col_begin + tile_column;

  // The rows of this share, and their steps.
  const int first_row = rows.begin;
  Activations x_rows = p.x, h_rows = p.h;
  x_rows.rows = h_rows.rows = rows.end;
  const int steps = (x_rows.rows - first_row + kRows - 1) / kRows;
  const int stage_bytes = kXBytes + tile_bytes<T>(kRows, p.rank_tile);
  const auto x_tile = [&](int step) { return Tile<T>{shared + step % kOuterStages * stage_bytes, kRows}; };
  const auto h_tile = [&](int step) { return Tile<T>{x_tile(step).data + kXBytes, kRows}; };

  float acc[2][kMaxRanks / 8][4] = {};
  const auto copy = [&](int step) {
    if (step < steps) {
      const int row = first_row + step * kRows;
      copy_async<T, kOuterThreads, kRows>(h_tile(step), h_rows, row, h_column, log_ranks, h_column + ranks);
      copy_async<T, kOuterThreads, kRows>(x_tile(step), x_rows, row, x_column, kLogColumns,
                                          segment.col_begin + p.width);
    }
    cp_async_commit();
  };

  const auto first_copies = [&] {
    for (int s = 0; s < kOuterStages - 1; ++s) copy(s);
  };
  const BlockDropout drops = block_dropout(p.dropout, seed);
  const Tile<T> w{shared + kOuterStages * stage_bytes, kOnePassRanks};
  if constexpr (kShrinks) {
    constexpr int kPanel = Tile<T>::kPanel;
    Staged<T, kOuterThreads, kOnePassRanks * kPanel / kOuterThreads> panel[kOuterColumns / kPanel];
    const float* const gate = with->gate == nullptr ? nullptr : with->gate + segment.w_begin;
#pragma unroll
    for (int c = 0; c < kOuterColumns; c += kPanel) {
      panel[c / kPanel].fetch(with->w, segment.w_begin, tile_column + c, kOnePassRanks, 6, {0, segment.rank},
                              p.width - tile_column - c, gate);
    }
    first_copies();
#pragma unroll
    for (int c = 0; c < kOuterColumns; c += kPanel) {
      const Tile<T> to{w.data + tile_bytes<T>(kOnePassRanks, c), kOnePassRanks};
      panel[c / kPanel].store(to, with->w, kOnePassRanks, 6, {0, segment.rank}, gate);
    }
  } else {
    first_copies();
  }
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<kOuterStages - 2>();
    __syncthreads();
    copy(step + kOuterStages - 1);
    const Tile<T> tile = x_tile(step);
    if (!kShrinks && p.dropout.threshold > 0) {
      TileDropout<T, kOuterThreads, kRows, kOuterColumns> dropout;
      dropout.apply(tile, drops, first_row + step * kRows, x_column, p.x.vector);
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
    if constexpr (kShrinks) {
      T* const out = reinterpret_cast<T*>(w.data + tile_bytes<T>(kOnePassRanks, kOuterColumns));
      shrink_tile(*with, tile, w, HiddenRows<T>{out + warp_id() * 16 * HiddenRows<T>::kStride},
                  first_row + step * kRows, x_rows.rows, segment.h_begin, segment.rank);
    }
  }
  cp_async_wait<0>();

  const bool partial = p.partial != nullptr && rows.share >= 0;
  const int lane_rank = first_rank + lane_id() % 4 * 2, w_row = segment.w_begin + lane_rank;
  const int n = tile_column + warp_id() * 32 + lane_id() / 4;
  const std::int64_t stride = partial ? p.partial_stride : p.out_stride;
  float* to = partial ? p.partial + rows.share * p.share_stride : p.out;
  to += (partial && p.blocks != nullptr ? lane_rank : w_row) * stride + n;
#pragma unroll
  for (int j = 0; j < kMaxRanks / 8; ++j, to += 8 * stride) {
    if (j * 8 >= ranks) break;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int c = j * 8 + lane_id() % 4 * 2 + e;
      if (c >= ranks || first_rank + c < 0) continue;
      float scale = 1.0f;
      if (!partial) scale = p.gate == nullptr ? p.scale : p.scale * p.gate[w_row + j * 8 + e];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (n + i * 8 < p.width) to[e * stride + i * 8] = scale * acc[i / 2][j][i % 2 * 2 + e];
      }
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kOuterThreads, 2) outer_kernel(const OuterParams p) {
  begin_kernel();
  outer_block<T, kRankTile>(p, nullptr);
}

template <typename T>
__global__ void __launch_bounds__(kOuterThreads, 3) outer_shrink_kernel(const OuterShrinkParams p) {
  begin_kernel();
  outer_block<T, 2 * kOnePassRanks>(p.outer, &p);  // with those of the unit before
}

}  // namespace ardlora::cuda
