// expand  Y[M, columns] += scale * H (gate o W)
//
// A block makes 128 x 128 of Y for one segment, whose columns no other segment has. Y is read into registers before the
// products start and written once, rounded once. The ranks go through shared memory up to 64 at a time.
#pragma once

#include "cuda/dropout.cuh"
#include "cuda/mma_tile.cuh"
#include "cuda/segment_table.h"

namespace ardlora::cuda {

struct ExpandParams {
  FactorTable table;
  int width;  // columns of a segment
  Operand h;
  Operand w;
  const float* gate;  // of W's rows, or null
  float scale;
  Activations y;
  int column_tiles;  // of a segment; grid.y = segments * column_tiles
  int rank_tile;     // 16, 32 or 64
  Dropout dropout;   // of what is added
};

// A chunk plus v.
template <typename T>
ARDLORA_DEVICE Word16 add_chunk(const Word16& old, const float* v) {
  Word16 sum;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    if constexpr (sizeof(T) == 2) {
      sum.part[e] = pack2<T>(widen_low<T>(old.part[e]) + v[2 * e], widen_high<T>(old.part[e]) + v[2 * e + 1]);
    } else {
      sum.part[e] = as_bits(as_float(old.part[e]) + v[e]);
    }
  }
  return sum;
}

// Bytes of the masks of a tile [kExpandRows, kExpandColumns]: [row][block of 128 columns][chunk].
template <typename T>
struct MaskTable {
  static constexpr int kChunk = Tile<T>::kChunk, kSlots = kPhiloxLanes / kChunk;
  unsigned char* data;
  int first_block;

  ARDLORA_DEVICE unsigned char* at(int row, int block) const {
    return data + (row * 2 + block - first_block) * (kPhiloxColumns / 8);
  }
  // One bit each of a chunk's elements; `column` is the chunk's first.
  ARDLORA_DEVICE std::uint32_t bits(int row, int column) const {
    const int in_block = column % kPhiloxColumns, slot = in_block % kPhiloxLanes / kChunk;
    const unsigned char* const p = at(row, column / kPhiloxColumns);
    if constexpr (kChunk == 8) return p[slot * 8 + in_block / kPhiloxLanes];
    return static_cast<std::uint32_t>(p[slot * 4 + in_block / kPhiloxLanes / 2]) >> (in_block / kPhiloxLanes % 2 * 4);
  }
  ARDLORA_DEVICE bool kept(int row, int column) const {
    const int in_chunk = column % kPhiloxColumns % kPhiloxLanes % kChunk;
    return (bits(row, column - in_chunk) >> in_chunk & 1u) != 0;
  }
  ARDLORA_DEVICE void fill(const Dropout& d, int row, int column) const {
#pragma unroll 1
    for (int unit = static_cast<int>(threadIdx.x); unit < kExpandRows * kSlots; unit += kExpandThreads) {
      const int r = unit / kSlots, slot = unit % kSlots;
#pragma unroll 1
      for (int block = first_block; block * kPhiloxColumns < column + kExpandColumns; ++block) {
        const ChunkMasks m = chunk_masks<kChunk>(d, row + r, block, slot);
        auto* const to = reinterpret_cast<std::uint32_t*>(at(r, block)) + slot * kChunk / 4;
        if constexpr (kChunk == 8) {
          to[0] = m.low;
          to[1] = m.high;
        } else {
          to[0] = pack_nibbles(m.low) | pack_nibbles(m.high) << 16;
        }
      }
    }
  }
  ARDLORA_DEVICE static std::uint32_t pack_nibbles(std::uint32_t v) {
    v = (v | v >> 4) & 0x00ff00ffu;
    return (v | v >> 8) & 0xffffu;
  }
};

template <typename T>
__global__ void __launch_bounds__(kExpandThreads, sizeof(T) == 2 ? 2 : 1) expand_kernel(const ExpandParams p) {
  constexpr int kChunk = Tile<T>::kChunk, kProducts = kChunk / 2;
  constexpr int kWarpColumns = 32, kChunks = kWarpColumns / (8 * kProducts);  // chunks of a row, for one lane
  ARDLORA_SHARED(shared);
  const DeviceSegment segment = load_record(p.table.segments + blockIdx.y / static_cast<unsigned>(p.column_tiles));
  if (segment.rank == 0) return;
  const int row = static_cast<int>(blockIdx.x) * kExpandRows;
  const int tile_column = static_cast<int>(blockIdx.y) % p.column_tiles * kExpandColumns;  // in the segment
  const int log_ranks = p.rank_tile == 16 ? 4 : (p.rank_tile == 32 ? 5 : 6);

  const Tile<T> h_tile{shared, kExpandRows};
  const Tile<T> w_tile{shared + tile_bytes<T>(kExpandRows, p.rank_tile), p.rank_tile};
  const MaskTable<T> masks{w_tile.data + tile_bytes<T>(p.rank_tile, kExpandColumns),
                           (segment.col_begin + tile_column) / kPhiloxColumns};
  const bool dropping = p.dropout.threshold > 0;
  if (dropping) masks.fill(p.dropout, row, segment.col_begin + tile_column);
  T* const y = static_cast<T*>(p.y.data) + segment.col_begin;
  const int warp_row = warp_id() / 2 * 32;
  const Fragments<T> h = rows_first(h_tile), w = rows_first(w_tile);
  const auto lane_row = [&](int i) { return row + warp_row + i * 8 + lane_id() / 4; };

  // Half of the columns at a time: sums and old values of all would need too many registers.
#pragma unroll 1
  for (int half = 0; half < kExpandColumns && tile_column + half < p.width; half += 2 * kWarpColumns) {
    const int warp_column = half + warp_id() % 2 * kWarpColumns;
    const int column = tile_column + warp_column + lane_id() % 4 * kChunk;  // of the lane's first chunk
    Word16 old[4][kChunks];
    if (p.y.vector) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          const int n = column + c * 8 * kProducts;
          old[i][c] = Word16{};
          if (lane_row(i) < p.y.rows && n < p.width) old[i][c] = load16(y + lane_row(i) * p.y.stride + n);
        }
      }
    }

    float acc[2][kWarpColumns / 8][4] = {};
#pragma unroll 1
    for (int rank = 0; rank < segment.rank; rank += p.rank_tile) {
      const int left = segment.rank - rank;
      if (half == 0 || segment.rank > p.rank_tile) {
        __syncthreads();
        const float* const gate = p.gate == nullptr ? nullptr : p.gate + segment.w_begin + rank;
        stage<T, kExpandThreads, Staging::kInterleaved>(w_tile, p.w, segment.w_begin + rank, tile_column, p.rank_tile,
                                                        7, left, p.width - tile_column, gate);
        stage<T, kExpandThreads, Staging::kCut>(h_tile, p.h, row, segment.h_begin + rank, kExpandRows, log_ranks,
                                                p.y.rows - row, left, nullptr);
        __syncthreads();
      }
#pragma unroll 1
      for (int k = 0; k < p.rank_tile && k < left; k += Tile<T>::kStep) {
        std::uint32_t a[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) h.load_a(a[i], warp_row + i * 16, k);
#pragma unroll
        for (int j = 0; j < kWarpColumns / 16; ++j) {
          std::uint32_t b[4];
          w.load_b_trans(b, k, warp_column + j * 16);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            multiply_add<T>(acc[i][2 * j], a[i], b);
            multiply_add<T>(acc[i][2 * j + 1], a[i], b + 2);
          }
        }
      }
    }

#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int m = lane_row(i);
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int n = column + c * 8 * kProducts, y_column = segment.col_begin + n;
        if (m >= p.y.rows || n >= p.width) continue;
        T* const to = y + m * p.y.stride + n;
        float v[kChunk];
#pragma unroll
        for (int e = 0; e < kChunk; ++e) v[e] = p.scale * acc[i / 2][c * kProducts + e / 2][i % 2 * 2 + e % 2];
        if (p.y.vector) {
          if (dropping) {
            const std::uint32_t keep = masks.bits(m - row, y_column);
#pragma unroll
            for (int e = 0; e < kChunk; ++e) v[e] = (keep >> e & 1u) != 0 ? v[e] : 0.0f;
          }
          store16(to, add_chunk<T>(old[i][c], v));
        } else {
#pragma unroll
          for (int e = 0; e < kChunk; ++e) {
            if (n + e >= p.width || (dropping && !masks.kept(m - row, y_column + e))) continue;
            to[e] = narrow<T>(widen(to[e]) + v[e]);
          }
        }
      }
    }
  }
}

}  // namespace ardlora::cuda
