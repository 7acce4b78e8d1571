// Dropout (ardlora/philox.h) on tiles: one call of Philox gives the 16 bits of eight elements of a row that lie 16
// columns apart. A thread takes a row and a chunk's worth of such calls and has the mask of every (16 / chunk)-th chunk
// of the row's block of 128 columns.
#pragma once

#include "ardlora/philox.h"
#include "cuda/mma_tile.cuh"

namespace ardlora::cuda {

inline constexpr int kPhiloxLanes = 16;
inline constexpr int kPhiloxColumns = 128;

struct PhiloxWords {
  std::uint32_t word[4];
};

ARDLORA_DEVICE PhiloxWords philox(const Dropout& d, std::uint32_t counter, std::uint32_t row) {
  std::uint32_t c0 = counter, c1 = row, c2 = 0, c3 = 0;
  std::uint32_t k0 = static_cast<std::uint32_t>(d.seed), k1 = static_cast<std::uint32_t>(d.seed >> 32);
#pragma unroll
  for (int round = 0; round < 7; ++round) {
    const std::uint64_t p0 = static_cast<std::uint64_t>(0xD2511F53u) * c0;
    const std::uint64_t p1 = static_cast<std::uint64_t>(0xCD9E8D57u) * c2;
    c0 = static_cast<std::uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<std::uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<std::uint32_t>(p1);
    c3 = static_cast<std::uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// One element, for layouts without chunks.
ARDLORA_DEVICE bool kept(const Dropout& d, int row, int column) {
  const int block = column / kPhiloxColumns, in_block = column % kPhiloxColumns;
  const PhiloxWords w = philox(d, static_cast<std::uint32_t>(block * kPhiloxLanes + column % kPhiloxLanes),
                               static_cast<std::uint32_t>(row));
  const bool odd = (in_block & 32) != 0, upper = (in_block & 64) != 0;
  const std::uint32_t low = odd ? w.word[1] : w.word[0], high = odd ? w.word[3] : w.word[2];
  const std::uint32_t bits = upper ? high : low;
  return (in_block / kPhiloxLanes % 2 == 0 ? bits & 0xffffu : bits >> 16) >= d.threshold;
}

// Bit e is set where the element at column + e is kept.
template <int kCount>
ARDLORA_DEVICE std::uint32_t kept_bits(const Dropout& d, int row, int column) {
  std::uint32_t bits = 0;
#pragma unroll 1
  for (int e = 0; e < kCount; ++e) bits |= static_cast<std::uint32_t>(kept(d, row, column + e)) << e;
  return bits;
}

// The masks of chunks [slot * kChunk + 16 i, kChunk columns) for i = 0..7 of a block: bit e of byte i of `low` (i < 4)
// and `high` is set where the element is kept.
struct ChunkMasks {
  std::uint32_t low = 0, high = 0;

  ARDLORA_DEVICE std::uint32_t chunk(int i) const { return ((i < 4 ? low : high) >> (i % 4 * 8)) & 0xffu; }
};

template <int kChunk>
ARDLORA_DEVICE ChunkMasks chunk_masks(const Dropout& d, int row, int block, int slot) {
  ChunkMasks out;
#pragma unroll 1
  for (int e = 0; e < kChunk; ++e) {
    const PhiloxWords w = philox(d, static_cast<std::uint32_t>(block * kPhiloxLanes + slot * kChunk + e),
                                 static_cast<std::uint32_t>(row));
    std::uint32_t keep[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      keep[i / 2] |= static_cast<std::uint32_t>((w.word[i] & 0xffffu) >= d.threshold) << (i % 2 * 16);
      keep[i / 2] |= static_cast<std::uint32_t>((w.word[i] >> 16) >= d.threshold) << (i % 2 * 16 + 8);
    }
    out.low |= keep[0] << e;
    out.high |= keep[1] << e;
  }
  return out;
}

// Zeroes what is dropped of a tile [tile.rows, kColumns] that starts at `row` and `column`; `chunked` where chunks of
// the tile are chunks of X. The tile must be complete before and needs a barrier after.
template <typename T, int kThreads, int kColumns>
ARDLORA_DEVICE void drop(const Tile<T>& tile, const Dropout& d, int row, int column, bool chunked) {
  constexpr int kChunk = Tile<T>::kChunk, kSlots = kPhiloxLanes / kChunk;
  if (!chunked) {
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < tile.rows * kColumns; i += kThreads) {
      if (!kept(d, row + i / kColumns, column + i % kColumns)) *tile.at(i / kColumns, i % kColumns) = narrow<T>(0.0f);
    }
    return;
  }
  for (int unit = static_cast<int>(threadIdx.x); unit < tile.rows * kSlots; unit += kThreads) {
    const int r = unit / kSlots, slot = unit % kSlots;
    for (int block = column / kPhiloxColumns; block * kPhiloxColumns < column + kColumns; ++block) {
      const ChunkMasks masks = chunk_masks<kChunk>(d, row + r, block, slot);
#pragma unroll 1
      for (int i = 0; i < kPhiloxColumns / kPhiloxLanes; ++i) {
        const int c = block * kPhiloxColumns + i * kPhiloxLanes + slot * kChunk - column;
        if (c < 0 || c >= kColumns) continue;
        const std::uint32_t bits = masks.chunk(i);
        unsigned char* const at = reinterpret_cast<unsigned char*>(tile.at(r, c));
        Word16 v = load16(at);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          if constexpr (sizeof(T) == 2) {
            v.part[e] &= (bits >> (2 * e) & 1u) * 0xffffu | (bits >> (2 * e + 1) & 1u) * 0xffff0000u;
          } else {
            v.part[e] &= 0u - (bits >> e & 1u);
          }
        }
        store16(at, v);
      }
    }
  }
}

}  // namespace ardlora::cuda
