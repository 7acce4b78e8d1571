// Tiles in shared memory and the fragments that the tensor cores take from them, for T = BFloat16, Float16 and float.
//
// A tile is cut into panels of 128 bytes width; a panel's row is eight chunks of 16 bytes, chunk c of row r lies at
// c ^ key(r). Every access below is free of bank conflicts: copies of whole rows, ldmatrix over eight rows, and the
// single floats that stand in for ldmatrix.trans, which knows 16-bit elements alone.
//
// One step of the product takes 32 bytes of the summed dimension: 16 elements of 16 bits in one instruction, or 8
// floats in three, each factor cut into two tf32 (a_hi b_hi + a_hi b_lo + a_lo b_hi; what is left out is below 2^-21 of
// |a b|).
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/gemm_plan.h"
#include "cuda/ptx.h"

namespace ardlora::cuda {

template <typename T>
struct Tile {
  static constexpr int kLogChunk = sizeof(T) == 2 ? 3 : 2, kChunk = 1 << kLogChunk;  // elements of 16 bytes
  static constexpr int kPanel = 8 * kChunk;                                          // columns of a panel
  static constexpr int kStep = 2 * kChunk;  // elements of the summed dimension in one product

  unsigned char* data;
  int rows;  // of a panel, a multiple of 8

  ARDLORA_DEVICE int offset(int row, int column) const {
    const int key = (row & 1) << 2 | (row & 2) | ((row ^ row >> 2) & 1), chunk = column >> kLogChunk;
    return ((chunk >> 3) * rows + row) * kPanelBytes + (((chunk & 7) ^ key) << 4) +
           (column & (kChunk - 1)) * static_cast<int>(sizeof(T));
  }
  ARDLORA_DEVICE T* at(int row, int column) const { return reinterpret_cast<T*>(data + offset(row, column)); }
  ARDLORA_DEVICE std::uint32_t address(int row, int column) const {
    return shared_address(data) + static_cast<std::uint32_t>(offset(row, column));
  }
};

template <typename T>
ARDLORA_HOST_DEVICE constexpr int tile_bytes(int rows, int columns) {
  return tile_bytes(static_cast<int>(sizeof(T)), rows, columns);
}

ARDLORA_DEVICE int lane_id() { return static_cast<int>(threadIdx.x % 32); }
ARDLORA_DEVICE int warp_id() { return static_cast<int>(threadIdx.x / 32); }

// ---- fragments: four registers each. A is [16, kStep]; B is [kStep, 16], two products wide: b and b + 2.
//
// A lane's address of a tile's first fragment is computed once. Others lie at a constant distance, or, along a row, at
// the address with other chunk bits: tiles begin at multiples of 128 bytes.

template <typename T>
struct Fragments {
  Tile<T> tile;
  std::uint32_t lane;  // ldmatrix: the row this lane names in the first fragment

  // A = t[row + i, step + k]
  ARDLORA_DEVICE void load_a(std::uint32_t* a, int row, int step) const { ldmatrix<4>(a, at(row, step)); }
  // B = t[row + j, step + k]
  ARDLORA_DEVICE void load_b(std::uint32_t* b, int row, int step) const { ldmatrix<4>(b, at(row, step)); }
  // A = t[step + k, column + i]
  ARDLORA_DEVICE void load_a_trans(std::uint32_t* a, int step, int column) const {
    if constexpr (sizeof(T) == 2) {
      ldmatrix<4, true>(a, at(step, column));
    } else {
      load_words<1, 2>(a, step, column);
    }
  }
  // B = t[step + k, column + j]
  ARDLORA_DEVICE void load_b_trans(std::uint32_t* b, int step, int column) const {
    if constexpr (sizeof(T) == 2) {
      ldmatrix<4, true>(b, at(step, column));
    } else {
      load_words<2, 1>(b, step, column);
    }
  }

 private:
  // `row` a multiple of 8, `column` of two chunks.
  ARDLORA_DEVICE std::uint32_t at(int row, int column) const {
    const int panel = column >> (Tile<T>::kLogChunk + 3), in_panel = column & (Tile<T>::kPanel - 1);
    return (lane ^ static_cast<std::uint32_t>(in_panel * static_cast<int>(sizeof(T)))) +
           static_cast<std::uint32_t>((panel * tile.rows + row) * kPanelBytes);
  }
  // What ldmatrix.trans would do with words: register i is t[step + l % 4 + 4 a, column + l / 4 + 8 b] of lane l, where
  // a and b are bits of i.
  template <int kColumnBit, int kRowBit>
  ARDLORA_DEVICE void load_words(std::uint32_t* r, int step, int column) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = step + lane_id() % 4 + (i & kRowBit ? 4 : 0),
                c = column + lane_id() / 4 + (i & kColumnBit ? 8 : 0);
      r[i] = *reinterpret_cast<const std::uint32_t*>(tile.at(row, c));
    }
  }
};

// For load_a and load_b_trans: matrices 1 and 3 of a fragment are the lower rows of the tile, 2 and 3 the next chunk.
template <typename T>
ARDLORA_DEVICE Fragments<T> rows_first(const Tile<T>& t) {
  const int matrix = lane_id() / 8;
  return {t, t.address(lane_id() % 8 + matrix % 2 * 8, matrix / 2 * Tile<T>::kChunk)};
}

// For load_b and load_a_trans: the other way round.
template <typename T>
ARDLORA_DEVICE Fragments<T> chunks_first(const Tile<T>& t) {
  const int matrix = lane_id() / 8;
  return {t, t.address(lane_id() % 8 + matrix / 2 * 8, matrix % 2 * Tile<T>::kChunk)};
}

ARDLORA_DEVICE float as_float(std::uint32_t bits) { return __uint_as_float(bits); }
ARDLORA_DEVICE std::uint32_t as_bits(float value) { return __float_as_uint(value); }

template <int kCount>
ARDLORA_DEVICE void split_tf32(const std::uint32_t* v, std::uint32_t* high, std::uint32_t* low) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    high[i] = to_tf32(as_float(v[i]));
    low[i] = to_tf32(as_float(v[i]) - as_float(high[i]));
  }
}

// c [16, 8] += a b. Lane l holds rows l / 4 and l / 4 + 8, columns 2 (l % 4) and the next, of c.
template <typename T>
ARDLORA_DEVICE void multiply_add(float* c, const std::uint32_t* a, const std::uint32_t* b) {
  if constexpr (sizeof(T) == 2) {
    mma_k16<T>(c, a, b);
  } else {
    std::uint32_t a_high[4], a_low[4], b_high[2], b_low[2];
    split_tf32<4>(a, a_high, a_low);
    split_tf32<2>(b, b_high, b_low);
    mma_tf32(c, a_low, b_high);
    mma_tf32(c, a_high, b_low);
    mma_tf32(c, a_high, b_high);
  }
}

// Rank tiles are 16, 32 or 64.
ARDLORA_DEVICE int log_rank_tile(int tile) { return tile == 16 ? 4 : (tile == 32 ? 5 : 6); }

}  // namespace ardlora::cuda
