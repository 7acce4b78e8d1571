// expand  Y[M, columns] += scale * H (gate o W),  or  Y = bias + that, where Y is not read
//
// A block makes 128 x 128 of Y for one segment, whose columns no other segment has, in two halves. Y is read into
// registers before the products start and written once, rounded once. Ranks go through shared memory up to 64 at a
// time, while those before are multiplied: H by cp.async, W through registers, multiplied with its gates. A wide block
// has the sums of both halves at once, so that it reads H once, and copies a prepared W.
#pragma once

#include "cuda/dropout.cuh"
#include "cuda/row_blocks.cuh"
#include "cuda/segment_table.h"
#include "cuda/tile_io.cuh"

namespace ardlora::cuda {

struct ExpandParams {
  FactorTable table;
  const RowBlock* blocks;  // of rows sorted by expert, grid.x of them; else null
  int width;               // columns of a segment
  Activations h;           // in the type of y
  Operand w;
  const float* gate;  // of W's rows, or null
  float scale;
  Activations y;
  bool fresh;        // y = bias + the product; else y += it
  const void* bias;  // [columns of y] in its type, or null
  int column_tiles;  // of a segment; grid.y = segments * column_tiles
  int rank_tile;     // 16, 32 or, with 16-bit types, 64
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
    return data + row * kExpandMaskStride + (block - first_block) * (kPhiloxColumns / 8);
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
  ARDLORA_DEVICE void fill(const BlockDropout& d, int row, int column) const {
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

// A thread's part of a block's tile of Y: in each half, four rows 8 apart and kChunks chunks of each. `kHalves`: whose
// sums it holds at once.
template <typename T, int kHalves>
struct ExpandTile {
  static constexpr int kChunk = Tile<T>::kChunk, kProducts = kChunk / 2, kChunkColumns = 8 * kProducts;
  static constexpr int kWarpColumns = kExpandHalf / 2, kChunks = kWarpColumns / kChunkColumns;
  const ExpandParams& p;
  int lane_row, y_column;       // of the first chunk: in the tile, in Y
  int rows_left, columns_left;  // of Y and of the segment, from there
  T* y;
  Word16 old[4][kChunks];
  float acc[kHalves][2][kWarpColumns / 8][4];

  ARDLORA_DEVICE ExpandTile(const ExpandParams& params, int row, int end, int col_begin, int tile_column)
      : p(params), lane_row(warp_row() + lane_id() / 4) {
    const int column = tile_column + warp_column() + lane_id() % 4 * kChunk;
    y_column = col_begin + column;
    rows_left = end - row - lane_row;
    columns_left = p.width - column;
    y = static_cast<T*>(p.y.data) + (row + lane_row) * p.y.stride + y_column;
  }

  ARDLORA_DEVICE static int warp_row() { return warp_id() / 2 * 32; }
  ARDLORA_DEVICE static int warp_column() { return warp_id() % 2 * kWarpColumns; }
  ARDLORA_DEVICE static int chunk_column(int half, int c) { return half * kExpandHalf + c * kChunkColumns; }
  ARDLORA_DEVICE bool exists(int i, int column) const { return i * 8 < rows_left && column < columns_left; }

  // Of the segment's column `n` from the lane's first one on.
  ARDLORA_DEVICE T bias(int n) const {
    return p.bias != nullptr && n < columns_left ? static_cast<const T*>(p.bias)[y_column + n] : narrow<T>(0.0f);
  }

  ARDLORA_DEVICE void begin(int half) {
    const T* from = y + half * kExpandHalf;
    if (p.fresh) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int n = chunk_column(half, c);
        float v[kChunk];
#pragma unroll
        for (int e = 0; e < kChunk; ++e) v[e] = widen(bias(n + e));
        const Word16 first = add_chunk<T>(Word16{}, v);
#pragma unroll
        for (int i = 0; i < 4; ++i) old[i][c] = first;
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i, from += 8 * p.y.stride) {
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          old[i][c] = Word16{};
          if (p.y.vector && exists(i, chunk_column(half, c))) old[i][c] = load16(from + c * kChunkColumns);
        }
      }
    }
  }

  ARDLORA_DEVICE void clear() {
#pragma unroll
    for (auto& half : acc) {
#pragma unroll
      for (auto& i : half) {
#pragma unroll
        for (auto& j : i) {
#pragma unroll
          for (float& v : j) v = 0.0f;
        }
      }
    }
  }

  ARDLORA_DEVICE void multiply(const Tile<T>& h_tile, const Tile<T>& w_tile, int ranks) {
    const Fragments<T> h = rows_first(h_tile), w = rows_first(w_tile);
#pragma unroll 1
    for (int k = 0; k < ranks; k += Tile<T>::kStep) {
      std::uint32_t a[2][4];
#pragma unroll
      for (int i = 0; i < 2; ++i) h.load_a(a[i], warp_row() + i * 16, k);
#pragma unroll
      for (int half = 0; half < kHalves; ++half) {
#pragma unroll
        for (int j = 0; j < kWarpColumns / 16; ++j) {
          std::uint32_t b[4];
          w.load_b_trans(b, k, half * kExpandHalf + warp_column() + j * 16);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            multiply_add<T>(acc[half][i][2 * j], a[i], b);
            multiply_add<T>(acc[half][i][2 * j + 1], a[i], b + 2);
          }
        }
      }
    }
  }

  ARDLORA_DEVICE void end(int half, const MaskTable<T>& masks) const {
    const bool dropping = p.dropout.threshold > 0;
    const auto& sums = acc[kHalves == 1 ? 0 : half];
    T* first = y + half * kExpandHalf;
#pragma unroll
    for (int i = 0; i < 4; ++i, first += 8 * p.y.stride) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const int n = chunk_column(half, c);
        if (!exists(i, n)) continue;
        T* const to = first + c * kChunkColumns;
        float v[kChunk];
#pragma unroll
        for (int e = 0; e < kChunk; ++e) v[e] = p.scale * sums[i / 2][c * kProducts + e / 2][i % 2 * 2 + e % 2];
        if (p.y.vector) {
          if (dropping) {
            const std::uint32_t keep = masks.bits(lane_row + i * 8, y_column + n);
#pragma unroll
            for (int e = 0; e < kChunk; ++e) v[e] = (keep >> e & 1u) != 0 ? v[e] : 0.0f;
          }
          store16_global(to, add_chunk<T>(old[i][c], v));
        } else {
#pragma unroll
          for (int e = 0; e < kChunk; ++e) {
            if (n + e >= columns_left) continue;
            if (dropping && !masks.kept(lane_row + i * 8, y_column + n + e)) {
              if (!p.fresh) continue;
              v[e] = 0.0f;
            }
            to[e] = narrow<T>(widen(p.fresh ? bias(n + e) : to[e]) + v[e]);
          }
        }
      }
    }
  }
};

// `kWide`: both halves at once, and W is a prepared factor.
template <typename T, bool kWide>
ARDLORA_DEVICE void expand_block(const ExpandParams& p) {
  constexpr int kLogHalf = 6;
  static_assert(1 << kLogHalf == kExpandHalf);
  ARDLORA_SHARED(seed);
  const RowBlock rows = row_block(p.blocks, static_cast<int>(blockIdx.x), kExpandRows, p.y.rows);
  if (rows.segment < 0) return;
  const DeviceSegment segment =
      load_record(p.table.segments + rows.segment + blockIdx.y / static_cast<unsigned>(p.column_tiles));
  if (segment.rank == 0) return;
  const int row = rows.begin;
  Activations h_rows = p.h;
  h_rows.rows = rows.end;
  const int tile_column = static_cast<int>(blockIdx.y) % p.column_tiles * kExpandColumns;  // in the segment
  // Columns of H are copied from the chunk on in which the unit begins; those before it meet zeros for W.
  const int before = p.h.vector ? segment.h_begin % Tile<T>::kChunk : 0, all_ranks = before + segment.rank;
  const int log_ranks = log_rank_tile(p.rank_tile);
  const int rank_tiles = (all_ranks + p.rank_tile - 1) >> log_ranks;
  const int h_bytes = tile_bytes<T>(kExpandRows, p.rank_tile);
  const int w_bytes = tile_bytes<T>(p.rank_tile, kWide ? kExpandColumns : kExpandHalf);
  const bool dropping = p.dropout.threshold > 0;
  unsigned char* const shared = seed + (dropping ? kSeedBytes : 0);
  const MaskTable<T> masks{shared + 2 * w_bytes, (segment.col_begin + tile_column) / kPhiloxColumns};
  unsigned char* const h_tiles = masks.data + (dropping ? kExpandMaskBytes : 0);
  const auto w_tile = [&](int step) { return Tile<T>{shared + step % 2 * w_bytes, p.rank_tile}; };
  const auto h_tile = [&](int step) {  // a single tile of ranks stays
    return Tile<T>{h_tiles + (rank_tiles > 1 ? step % 2 * h_bytes : 0), kExpandRows};
  };

  ExpandTile<T, kWide ? 2 : 1> y(p, row, rows.end, segment.col_begin, tile_column);
  y.begin(0);
  y.clear();
  if (dropping) {
    const BlockDropout drops = block_dropout(p.dropout, seed);
    __syncthreads();
    masks.fill(drops, row, segment.col_begin + tile_column);
  }

  const auto ranks = [&](int tile) {
    const int left = all_ranks - tile * p.rank_tile;
    return left < p.rank_tile ? left : p.rank_tile;
  };
  const auto valid = [&](int tile) { return ValidRows{tile == 0 ? before : 0, ranks(tile)}; };
  const auto first_row = [&](int tile) { return segment.w_begin - before + tile * p.rank_tile; };
  const auto gate = [&](int tile) { return p.gate == nullptr ? nullptr : p.gate + first_row(tile); };
  const auto copy_h = [&](int step, int tile) {
    const int column = segment.h_begin - before + tile * p.rank_tile;
    copy_async<T, kExpandThreads, kExpandRows>(h_tile(step), h_rows, row, column, log_ranks, column + ranks(tile));
    if constexpr (kWide) {
      copy_factor<T, kExpandThreads, kRankTile, kExpandColumns>(w_tile(step), p.w, first_row(tile), tile_column,
                                                                valid(tile));
    }
    cp_async_commit();
  };
  if constexpr (kWide) {
    copy_h(0, 0);
#pragma unroll 1
    for (int tile = 0; tile < rank_tiles; ++tile) {
      cp_async_wait<0>();
      __syncthreads();
      if (tile + 1 < rank_tiles) copy_h(tile + 1, tile + 1);
      y.multiply(h_tile(tile), w_tile(tile), ranks(tile));
    }
    y.end(0, masks);
    y.begin(1);
    y.end(1, masks);
    return;
  }
  // A step multiplies one tile of ranks for one half of the columns.
  Staged<T, kExpandThreads, kRankTile * kExpandHalf / kExpandThreads, Staging::kInterleaved> staged;
  const auto fetch_w = [&](int half, int tile) {
    const int column = tile_column + half * kExpandHalf;
    staged.fetch(p.w, first_row(tile), column, p.rank_tile, kLogHalf, valid(tile), p.width - column, gate(tile));
  };
  const auto store_w = [&](int step, int tile) {
    staged.store(w_tile(step), p.w, p.rank_tile, kLogHalf, valid(tile), gate(tile));
  };

  const int steps = (tile_column + kExpandHalf < p.width ? 2 : 1) * rank_tiles;
  copy_h(0, 0);
  fetch_w(0, 0);
  store_w(0, 0);
#pragma unroll 1
  for (int step = 0, half = 0, tile = 0; step < steps; ++step) {
    const bool last = tile + 1 == rank_tiles, more = step + 1 < steps;
    const int next_tile = last ? 0 : tile + 1, next_half = last ? half + 1 : half;
    cp_async_wait<0>();
    __syncthreads();
    if (more && rank_tiles > 1) copy_h(step + 1, next_tile);
    if (more) fetch_w(next_half, next_tile);
    y.multiply(h_tile(step), w_tile(step), ranks(tile));
    if (last) y.end(half, masks);
    if (more) store_w(step + 1, next_tile);
    if (more && last) {
      y.begin(next_half);
      y.clear();
    }
    tile = next_tile;
    half = next_half;
  }
}

template <typename T>
__global__ void __launch_bounds__(kExpandThreads, sizeof(T) == 2 ? 2 : 1) expand_kernel(const ExpandParams p) {
  begin_kernel();
  expand_block<T, false>(p);
}

template <typename T>
__global__ void __launch_bounds__(kExpandThreads, 2) wide_expand_kernel(const ExpandParams p) {
  begin_kernel();
  expand_block<T, true>(p);
}

}  // namespace ardlora::cuda
