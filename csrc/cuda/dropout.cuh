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

// A block's dropout: the seed, from the call or from device memory, in shared memory, where it holds no register.
struct BlockDropout {
  const std::uint64_t* seed;
  std::uint32_t threshold;
  const std::int64_t* rows;
  std::int64_t count;
};

// `at`: kSeedBytes of shared memory. A barrier must follow before the result is used.
ARDLORA_DEVICE BlockDropout block_dropout(const Dropout& d, unsigned char* at) {
  auto* const seed = reinterpret_cast<std::uint64_t*>(at);
  if (d.threshold > 0 && threadIdx.x == 0) *seed = d.seed_at == nullptr ? d.seed : *d.seed_at;
  return {seed, d.threshold, d.rows, d.count};
}

ARDLORA_DEVICE PhiloxWords philox(std::uint64_t seed, std::uint32_t counter, std::uint32_t row) {
  std::uint32_t c0 = counter, c1 = row, c2 = 0, c3 = 0;
  std::uint32_t k0 = static_cast<std::uint32_t>(seed), k1 = static_cast<std::uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 7; ++round) {
    constexpr std::uint32_t kM0 = 0xD2511F53u, kM1 = 0xCD9E8D57u;
    // Not the halves of a 64-bit product: nvcc would do all that follows in 64 bits.
    const std::uint32_t n0 = __umulhi(kM1, c2) ^ c1 ^ k0, n2 = __umulhi(kM0, c0) ^ c3 ^ k1;
    c1 = kM1 * c2;
    c3 = kM0 * c0;
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Rows past the last, in the tail of a tile, have no counter and are not stored.
ARDLORA_DEVICE std::uint32_t row_counter(const BlockDropout& d, int row) {
  return static_cast<std::uint32_t>(d.rows == nullptr || row >= d.count ? row : d.rows[row]);
}

// One element, for layouts without chunks.
ARDLORA_DEVICE bool kept(const BlockDropout& d, int row, int column) {
  const int block = column / kPhiloxColumns, in_block = column % kPhiloxColumns;
  const PhiloxWords w =
      philox(*d.seed, static_cast<std::uint32_t>(block * kPhiloxLanes + column % kPhiloxLanes), row_counter(d, row));
  const bool odd = (in_block & 32) != 0, upper = (in_block & 64) != 0;
  const std::uint32_t low = odd ? w.word[1] : w.word[0], high = odd ? w.word[3] : w.word[2];
  const std::uint32_t bits = upper ? high : low;
  return (in_block / kPhiloxLanes % 2 == 0 ? bits & 0xffffu : bits >> 16) >= d.threshold;
}

// The masks of chunks [slot * kChunk + 16 i, kChunk columns) for i = 0..7 of a block: bit e of byte i of `low` (i < 4)
// and `high` is set where the element is kept.
struct ChunkMasks {
  std::uint32_t low = 0, high = 0;

  ARDLORA_DEVICE std::uint32_t chunk(int i) const { return ((i < 4 ? low : high) >> (i % 4 * 8)) & 0xffu; }
};

template <int kChunk>
ARDLORA_DEVICE ChunkMasks chunk_masks(const BlockDropout& d, int row, int block, int slot) {
  // Half h of v is at least the threshold where h + (2^16 - threshold) carries: both halves in one addition.
  const std::uint32_t add = ((0x10000u - d.threshold) & 0xffffu) * 0x10001u;
  const std::uint32_t counter = row_counter(d, row);
  std::uint32_t carries[4] = {};  // of word i, each new one above the older
#pragma unroll 1
  for (int e = 0; e < kChunk; ++e) {
    const PhiloxWords w =
        philox(*d.seed, static_cast<std::uint32_t>(block * kPhiloxLanes + slot * kChunk + e), counter);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const std::uint32_t v = w.word[i], below = (v & 0x7fff7fffu) + (add & 0x7fff7fffu);
      carries[i] = carries[i] >> 1 | (((v & add) | ((v | add) & below)) & 0x80008000u);
    }
  }
  const auto bytes = [&](int i) {  // chunks 2 i and 2 i + 1
    const std::uint32_t c = carries[i] >> (16 - kChunk);
    return (c & 0xffu) | (c >> 8 & 0xff00u);
  };
  return {bytes(0) | bytes(1) << 16, bytes(2) | bytes(3) << 16};
}

// A thread's masks of the last block of columns, for tiles [kRows, kColumns] of the same rows: a tile narrower than the
// block begins where the one before it ended.
template <typename T, int kThreads, int kRows, int kColumns>
struct TileDropout {
  static constexpr int kChunk = Tile<T>::kChunk, kSlots = kPhiloxLanes / kChunk, kUnits = kRows * kSlots / kThreads;
  static_assert(kUnits * kThreads == kRows * kSlots);
  ChunkMasks masks[kUnits];
  int block = -1;

  // Zeroes what is dropped of a tile that starts at `row` and `column`; `chunked` where chunks of the tile are chunks
  // of X. The tile must be complete before and needs a barrier after.
  ARDLORA_DEVICE void apply(const Tile<T>& tile, const BlockDropout& d, int row, int column, bool chunked) {
    if (!chunked) {
#pragma unroll 1
      for (int i = static_cast<int>(threadIdx.x); i < kRows * kColumns; i += kThreads) {
        const int r = i / kColumns, c = i % kColumns;
        if (!kept(d, row + r, column + c)) *tile.at(r, c) = narrow<T>(0.0f);
      }
      return;
    }
    const int slot = static_cast<int>(threadIdx.x) % kSlots;
#pragma unroll 1
    for (int b = column / kPhiloxColumns; b * kPhiloxColumns < column + kColumns; ++b) {
      const int first = b * kPhiloxColumns + slot * kChunk - column;
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        const int r = (static_cast<int>(threadIdx.x) + u * kThreads) / kSlots;
        if (b != block) masks[u] = chunk_masks<kChunk>(d, row + r, b, slot);
#pragma unroll 1
        for (int i = 0; i < kPhiloxColumns / kPhiloxLanes; ++i) {
          const int c = first + i * kPhiloxLanes;
          if (c >= 0 && c < kColumns) keep_only(tile.at(r, c), masks[u].chunk(i));
        }
      }
      block = b;
    }
  }

 private:
  ARDLORA_DEVICE static void keep_only(T* chunk, std::uint32_t bits) {
    Word16 v = load16(chunk);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if constexpr (sizeof(T) == 2) {
        v.part[e] &= ((bits >> (2 * e) & 3u) * 0x8001u & 0x10001u) * 0xffffu;
      } else {
        v.part[e] &= 0u - (bits >> e & 1u);
      }
    }
    store16(chunk, v);
  }
};

}  // namespace ardlora::cuda
